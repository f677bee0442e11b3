"""The evaluator of synthetic sets: networks trained on the set from scratch and tested on real data, over several initialisations.

Hard and soft labels are protocols of their own. DD-Ranking's scores train, beside them, on random real images of the same number and on all real data. Each
network is a stage, so that an evaluation that was cut off goes on, and baselines are trained once for all methods on the same data. DD-Ranking's search for
the best learning rate and its best epoch on test data are left out: one rate, the last epoch.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.evaluation import evaluates
from stillhouse.evaluation.classification import evaluate_classifier
from stillhouse.randomness import generator

if TYPE_CHECKING:
    from stillhouse.recipe import ModelSpec
    from stillhouse.run import Run
    from stillhouse.synthetic.product import SyntheticSet


@evaluates("synthetic_set")
def judge(product: SyntheticSet, run: Run) -> dict[str, float]:
    """`accuracy` (mean over networks; `accuracy_std`), `accuracy_<model>` of `cross`, the set's size, and with `scores` DD-Ranking's figures.

    `evaluate`, `network`, `augment` and `data` of the run's config say how.
    """
    return Judging(run, product).figures()


class Judging:
    """One evaluation.

    Raises:
        UserError: data without a test split.
    """

    def __init__(self, run: Run, product: SyntheticSet) -> None:
        self.run, self.product = run, product
        self.config: Any = run.config
        self.spec, self.data = self.config.evaluate, self.config.data
        self.augment = self.spec.augment or self.config.augment
        split = next((s for s in ("test", "val", "holdout") if run.data(self.data).has(s)), None)
        if split is None:
            raise UserError("There is no data to judge the synthetic set by: give the data set a test folder, or set data.val to a share above 0.")
        self.test = [{**batch, "input": product.prepared(batch["input"])} for batch in run.loader(self.data, split)]

    def figures(self) -> dict[str, float]:
        """All figures by name."""
        from stillhouse.synthetic.training import HardTraining, SoftTraining

        spec, product, device = self.spec, self.product, self.run.device
        images, labels = (t.to(device) for t in product.training_images())

        def hard(augment: Any, seed: int) -> Any:
            return HardTraining.of(images, labels, spec, augment, product.lr, ("judge", seed))

        def soft(augment: Any, seed: int) -> Any:
            return SoftTraining.of(product, spec, augment, device, ("judge", seed))

        wanted = soft if spec.protocol == "soft" else hard
        name = f"evaluate.{spec.protocol}"
        main = self._networks(name, lambda seed: wanted(self.augment, seed), product.fingerprint)
        out = {"accuracy": statistics.fmean(main), "accuracy_std": statistics.pstdev(main)}
        for model in spec.cross:
            out[f"accuracy_{model.model.rpartition(':')[2]}"] = self._networks(
                name, lambda seed: wanted(self.augment, seed), product.fingerprint, model, 1
            )[0]
        if spec.scores:
            out |= self._scores(hard, soft, main)
        pixels = product.pixels()
        out |= {
            "stored_images": float(len(product)),
            "stored_mb": product.bytes / 1e6,
            "out_of_range_pixels": float(((pixels < -1e-3) | (pixels > 1 + 1e-3)).double().mean()),
        }
        return out

    def _scores(self, hard: Any, soft: Any, main: list[float]) -> dict[str, float]:
        """DD-Ranking: LRS and ARS with their parts. Random images are labelled and augmented like the set: by its teacher where labels are soft, so that a
        soft protocol has them only if the method gave `random` (another set made with the same teacher)."""
        from stillhouse.synthetic import scores
        from stillhouse.synthetic.config import AugmentSpec
        from stillhouse.synthetic.training import HardTraining, SoftTraining

        spec, product, plain = self.spec, self.product, AugmentSpec(groups="", always="")
        mean = statistics.fmean
        real_x, real_y = self._real()
        full = spec.model_copy(update={"epochs": spec.full_epochs, "lr": None})
        whole = mean(
            self._networks(
                "evaluate.full", lambda s: HardTraining.of(real_x, real_y, full, self.augment, None, ("full", s)), self._identity(), count=1
            )
        )
        hard_runs = main if spec.protocol == "hard" else self._networks("evaluate.hard", lambda s: hard(self.augment, s), product.fingerprint)
        other = product.random
        if spec.protocol == "soft" and other is None:
            raise UserError(
                "evaluate.scores with soft labels compares with random images that the same teacher labelled, and this method keeps none."
            )

        def random(augment: Any, seed: int) -> Any:
            if other is not None:
                return SoftTraining.of(other, spec, augment, self.run.device, ("judge", seed))
            drawn = generator(seed, "random images")
            count = len(product) * product.factor**2 // len(product.classes)
            rows = torch.cat(
                [
                    at[torch.randperm(len(at), generator=drawn)[:count]]
                    for at in ((real_y.cpu() == c).nonzero().flatten() for c in range(len(product.classes)))
                ]
            )
            rows = rows.to(real_x.device)
            return HardTraining.of(real_x[rows], real_y[rows], spec, augment, None, ("judge", seed))

        whose = other.fingerprint if other is not None else f"{self._identity()}-{len(product) * product.factor**2}"
        wanted = soft if spec.protocol == "soft" else hard
        drawn_augmented = mean(self._networks("evaluate.random", lambda s: random(self.augment, s), whose))
        drawn_plain = mean(self._networks("evaluate.random_plain", lambda s: random(plain, s), whose))
        own_plain = mean(self._networks("evaluate.plain", lambda s: wanted(plain, s), product.fingerprint))
        hlr = scores.hard_label_recovery(whole, mean(hard_runs))
        ior = scores.improvement_over_random(mean(main), drawn_augmented)
        return {
            "accuracy_full": whole,
            "accuracy_random": drawn_augmented,
            "accuracy_unaugmented": own_plain,
            "accuracy_random_unaugmented": drawn_plain,
            "hlr": hlr,
            "ior": ior,
            "lrs": scores.label_robust_score(hlr, ior),
            "ars": scores.augmentation_robust_score(mean(main), drawn_augmented, own_plain, drawn_plain),
        }

    def _networks(self, name: str, training: Any, trained_on: str, model: ModelSpec | None = None, count: int | None = None) -> list[float]:
        """Test accuracies of networks, each a stage of its own; `training` makes a training from a seed."""
        from stillhouse.synthetic.training import train

        spec = model or self.spec.network or self.config.network
        found = []
        for number in range(count or self.spec.networks):
            seed = 1000 * self.run.seed + number
            made = training(seed)

            def make(made: Any = made, seed: int = seed) -> dict[str, float]:
                network = self.run.model(spec, self.data, role="judge", seed=seed).to(self.run.device)
                train(self.run, name, network, made)
                return evaluate_classifier(network, self.test, self.run.device, ["accuracy"])

            uses = {
                "model": spec.model_dump(mode="json"),
                "images": trained_on,
                "test": self.run.data(self.data).fingerprint,
                "training": _facts(made),
                "seed": seed,
            }
            found.append(self.run.stage(f"{name}.{number}", make, uses)["accuracy"])
        return found

    def _real(self) -> tuple[Tensor, Tensor]:
        from stillhouse.data import Loader

        dataset = self.run.data(self.data).dataset("train", train=False)
        images = torch.cat([self.product.prepared(b["input"]) for b in Loader(dataset, 512)])
        return images.to(self.run.device), dataset.labels().to(self.run.device)

    def _identity(self) -> str:
        return self.run.data(self.data).fingerprint + ("-whitened" if self.product.whitening is not None else "")


def _facts(training: Any) -> dict[str, Any]:
    """What a training depends on, without its images."""
    kept = {k: v for k, v in vars(training).items() if not isinstance(v, Tensor) and k != "synthetic"}
    return {"kind": type(training).__name__, **{k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in kept.items()}}
