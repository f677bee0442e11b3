"""DD-Ranking's scores of a synthetic set (arXiv 2505.13300; `stillhouse.synthetic.scores` has the equations), with the
trainings that they compare.

In addition, networks are trained on as many random real images under the same protocol, on all real data, and without
augmentation. With `evaluate.rates` each network is trained at every rate and the best test accuracy counts, and with
`best_every` the best epoch's: so the paper. Else every network is trained at one rate and its last epoch counts. Views
with stored labels are augmented once and for all, so that a set of such labels has no accuracy without augmentation,
and no `ars`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from stillhouse.errors import UserError
from stillhouse.randomness import generator
from stillhouse.synthetic import scores
from stillhouse.synthetic.config import AugmentSpec, EvaluateSpec
from stillhouse.synthetic.judging.protocol import Judging, Recipe
from stillhouse.synthetic.training import HardTraining, Training


def ranking(judging: Judging) -> dict[str, float]:
    """`lrs`, `ars` (not of views), `hlr`, `ior` and the accuracies that they are made of; with rates to try, also
    `accuracy_tried`, at the best rate.

    Raises:
        UserError: soft labels, and a method that keeps no random images under the same teacher.
    """
    spec, product, plain = judging.spec, judging.product, AugmentSpec(groups="", always="")
    random, whose = _random_images(judging)
    own = _tried(judging, judging.stage, judging.own(judging.augment))
    hard = own if spec.protocol == "hard" else _tried(judging, "evaluate.hard", judging.hard_labels(judging.augment))
    whole = _tried(judging, "evaluate.full", judging.all_real(), judging.data, count=1)
    drawn = _tried(judging, "evaluate.random", random(judging.augment), whose)
    hlr, ior = scores.hard_label_recovery(whole, hard), scores.improvement_over_random(own, drawn)
    out = {
        **({"accuracy_tried": own} if spec.rates else {}),
        "accuracy_full": whole,
        "accuracy_random": drawn,
        "hlr": hlr,
        "ior": ior,
        "lrs": scores.label_robust_score(hlr, ior),
    }
    if spec.protocol == "soft" and product.views is not None:
        return out
    drawn_plain = _tried(judging, "evaluate.random_plain", random(plain), whose)
    own_plain = _tried(judging, "evaluate.plain", judging.own(plain), product.fingerprint)
    return out | {
        "accuracy_unaugmented": own_plain,
        "accuracy_random_unaugmented": drawn_plain,
        "ars": scores.augmentation_robust_score(own, drawn, own_plain, drawn_plain),
    }


def _tried(
    judging: Judging, name: str, learns: Recipe, trained_on: str | None = None, count: int | None = None
) -> float:
    """The mean over networks of the accuracy that counts: of each, the best of the rates to try."""
    spec = judging.spec
    tries = [spec.model_copy(update={"lr": rate}) for rate in spec.rates] or [spec]
    found = [[t.best for t in judging.networks(name, learns, trained_on, spec=s, count=count)] for s in tries]
    return statistics.fmean(max(same) for same in zip(*found, strict=True))


def _random_images(judging: Judging) -> tuple[Callable[[AugmentSpec], Recipe], str]:
    """As many random real images, by the augmentation, and their identity; labelled like the set: by its teacher where
    labels are soft, so that a soft protocol has them only if the method gave `random` (another set made with the same
    teacher)."""
    product, other = judging.product, judging.product.random
    if judging.spec.protocol == "soft":
        if other is None:
            raise UserError(
                "evaluate.scores with soft labels compares with random images that the same teacher labelled, and "
                "this method keeps none."
            )
        return lambda augment: judging.soft_labels(other, augment), other.fingerprint
    images, labels = judging.real()
    of_class = [(labels.cpu() == c).nonzero().flatten() for c in range(len(product.classes))]
    count = len(judging.images) // len(of_class)

    def learns(augment: AugmentSpec) -> Recipe:
        def made(spec: EvaluateSpec, seed: int) -> Training:
            drawn = generator(seed, "random images")
            rows = torch.cat([at[torch.randperm(len(at), generator=drawn)[:count]] for at in of_class]).to(
                images.device
            )
            return HardTraining.of(images[rows], labels[rows], spec, augment, None, ("judge", seed))

        return made

    return learns, f"{judging.data}-{len(judging.images)}"
