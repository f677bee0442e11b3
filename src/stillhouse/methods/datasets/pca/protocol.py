"""The benchmark's protocol (arXiv 2502.06434): networks trained on stored images with hard labels, or with a teacher's
labels of mixed batches.

AdamW with decay of weight matrices only, a cosine by epoch, one view of each stored image and epoch; a random subset of
the same size for comparison.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Model, ModelSpec, Spec
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import evaluate_classifier
from stillhouse.functional.precision import full_precision
from stillhouse.methods.datasets.pca.packing import views
from stillhouse.methods.datasets.pca.product import PackedSet
from stillhouse.randomness import generator, key, permutation
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.run import Run
from stillhouse.signals import read_logits
from stillhouse.synthetic.scores import improvement_over_random, soft_loss


class ProtocolSpec(Spec):
    """How a packed set is judged: networks trained on it from scratch, and tested on real data.

    Accuracies are those of the last epoch.
    """

    labels: Literal["hard", "soft"] = Field("hard", description="soft: the recipe's teacher labels every mixed batch.")
    network: Model | None = Field(None, description="The network to train; default: the one of the recipe.")
    networks: int = Field(
        3, ge=1, description="How many, each from its own initialisation: mean and spread are over them."
    )
    cross: list[Model] = Field(
        default_factory=list, description="Other architectures, trained the same way, once each."
    )
    epochs: int = Field(300, ge=1)
    batch_size: int = Field(
        128, ge=1, description="At most half of the stored images, so that batch norm sees several batches an epoch."
    )
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: float | None = Field(None, gt=0, description="Default: 0.001 (adamw), 0.1 (sgd).")
    weight_decay: float | None = Field(None, ge=0, description="Default: 0.01 (adamw), 1e-4 (sgd).")
    area: float = Field(0.08, gt=0, le=1, description="The smallest share of a tile that a crop keeps.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of mirroring; 0 for digits.")
    mix: Literal["none", "cutmix", "mixup"] = Field(
        "cutmix", description="soft: one box or share and one permutation a batch."
    )
    alpha: float | None = Field(None, gt=0, description="soft: of the Beta; default: 1 (cutmix), 0.8 (mixup).")
    temperature: float = Field(20.0, gt=0, description="soft: of both sides; no factor T^2.")
    top_k: int | None = Field(
        None,
        ge=1,
        description="soft: keep the teacher's k largest probabilities, and the mean of the rest for the others.",
    )
    random: bool = Field(True, description="Also train on as many random whole images under the same protocol.")


# ---- the mathematics -------------------------------------------------------------------------------------------------


def cutmix(x: Tensor, partner: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """A copy of x (B, C, H, W) with the rows b0 … b2 - 1 and columns b1 … b3 - 1 of the samples `partner` (B,)."""
    b0, b1, b2, b3 = box
    out = x.clone()
    out[..., b0:b2, b1:b3] = x[partner, :, b0:b2, b1:b3]
    return out


def mixup(x: Tensor, partner: Tensor, share: float) -> Tensor:
    """share * x + (1 - share) * x[partner]."""
    return share * x + (1 - share) * x[partner]


def mixed(x: Tensor, how: str, alpha: float | None, *keys: int | str) -> Tensor:
    """A batch mixed within itself: one permutation and one box or share, drawn by the keys."""
    if how == "none" or len(x) < 2:
        return x
    rng = np.random.default_rng(key(*keys))
    partner = torch.from_numpy(rng.permutation(len(x))).to(x.device)
    if how == "mixup":
        return mixup(x, partner, float(rng.beta(alpha or 0.8, alpha or 0.8)))
    height, width = x.shape[-2:]
    side = math.sqrt(1 - rng.beta(alpha or 1.0, alpha or 1.0))
    half = int(height * side) // 2, int(width * side) // 2
    at = int(rng.integers(height)), int(rng.integers(width))
    low, high = [max(a - h, 0) for a, h in zip(at, half)], [min(a + h, s) for a, h, s in zip(at, half, (height, width))]
    return cutmix(x, partner, (low[0], low[1], high[0], high[1]))


@full_precision
def top_k_labels(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """(B, C) teacher probabilities, in which all but the k largest of each row share what is left equally.

    Raises:
        UserError: k above C.
    """
    probs = F.softmax(teacher_logits / temperature, -1)
    classes = probs.shape[-1]
    if not 1 <= k <= classes:
        raise UserError(f"pca: top_k keeps between 1 and {classes} probabilities; given: {k}.")
    if k == classes:
        return probs
    top = probs.topk(k, -1)
    rest = (1 - top.values.sum(-1, keepdim=True)) / (classes - k)
    return rest.expand_as(probs).scatter(-1, top.indices, top.values)


def label_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    temperature: float = 20.0,
    top_k: int | None = None,
) -> Tensor:
    """Cross-entropy to class ids, or KL to a teacher at a temperature, without its square."""
    if teacher_logits is None:
        return F.cross_entropy(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, labels)
    if top_k is None:
        return soft_loss(logits, teacher_logits, "kl", temperature)
    return soft_loss(
        logits, top_k_labels(teacher_logits, top_k, temperature).clamp_min(1e-30).log() * temperature, "kl", temperature
    )


def cosine(epoch: int, epochs: int) -> float:
    """The factor 0.5 (1 + cos(pi e / E)) of the learning rate."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def decay_groups(network: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the parameters with weight decay (`weight` in the name and more than one dimension), and of the
    others."""
    named = [(n, p.dim()) for n, p in network.named_parameters()]
    decayed = [n for n, dim in named if "weight" in n and dim > 1]
    return decayed, [n for n, _ in named if n not in decayed]


def new_optimizer(network: nn.Module, spec: ProtocolSpec) -> torch.optim.Optimizer:
    """AdamW with decay of weight matrices only, or SGD with momentum 0.9."""
    if spec.optimiser == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            spec.lr or 0.1,
            momentum=0.9,
            weight_decay=1e-4 if spec.weight_decay is None else spec.weight_decay,
        )
    parameters = dict(network.named_parameters())
    decay = 0.01 if spec.weight_decay is None else spec.weight_decay
    groups = [
        {"params": [parameters[n] for n in names], "weight_decay": d}
        for names, d in zip(decay_groups(network), (decay, 0.0))
        if names
    ]
    return torch.optim.AdamW(groups, spec.lr or 1e-3)


# ---- the evaluation --------------------------------------------------------------------------------------------------


@evaluates(PackedSet.kind)
def judge(product: PackedSet, run: Run) -> dict[str, float]:
    """`accuracy` (mean over networks; `accuracy_std`), the same of a random subset and the gain over it,
    `accuracy_<model>` of `cross`, and the size.

    Raises:
        UserError: data without a test split, soft labels without a teacher.
    """
    config: Any = run.config
    spec: ProtocolSpec = config.evaluate
    teacher = None
    if spec.labels == "soft":
        if config.teacher is None:
            raise UserError(
                "evaluate.labels is soft, but the recipe names no teacher; give one, or take evaluate.labels=hard."
            )
        teacher = run.network("teacher", config.teacher, config.data).to(run.device).eval().requires_grad_(False)
    split = next((s for s in ("test", "val", "holdout") if run.data(config.data).has(s)), None)
    if split is None:
        raise UserError(
            "There is no data to judge the packed set by: give the data set a test folder, or set data.val to a share "
            "above 0."
        )
    test = run.loader(config.data, split)

    def accuracies(name: str, packed: PackedSet, model: ModelSpec, count: int) -> list[float]:
        """Test accuracies of networks, each a stage of its own."""
        found = []
        for number in range(count):
            seed = 1000 * run.seed + number

            def make(seed: int = seed) -> dict[str, float]:
                network = run.model(model, config.data, role="judge", seed=seed).to(run.device)
                _train(run, name, network, packed, spec, teacher, seed)
                return evaluate_classifier(network, test, run.device, ["accuracy"])

            uses = {
                "model": model.model_dump(mode="json"),
                "images": packed.fingerprint,
                "test": run.data(config.data).fingerprint,
                "seed": seed,
            }
            uses |= {
                "packing": packed.geometry,
                "spec": spec.model_dump(mode="json", exclude={"network", "networks", "cross", "random"}),
            }
            uses |= {"teacher": None if teacher is None else config.teacher.model_dump(mode="json")}
            found.append(run.stage(f"{name}.{number}", make, uses)["accuracy"])
        return found

    main = accuracies("evaluate", product, spec.network or config.network, spec.networks)
    out = {"accuracy": statistics.fmean(main), "accuracy_std": statistics.pstdev(main)}
    if spec.random and product.random_images is not None:
        other = accuracies("evaluate.random", product.random_images, spec.network or config.network, spec.networks)
        out |= {"accuracy_random": statistics.fmean(other), "accuracy_random_std": statistics.pstdev(other)}
        out["improvement_over_random"] = improvement_over_random(out["accuracy"], out["accuracy_random"])
    for model in spec.cross:
        out[f"accuracy_{model.model.rpartition(':')[2]}"] = accuracies("evaluate.cross", product, model, 1)[0]
    counts = torch.bincount(product.labels, minlength=len(product.classes))
    spread = float(counts.max() - counts.min())
    return out | {"stored_images": float(len(product)), "stored_mb": product.bytes / 1e6, "class_count_spread": spread}


def _train(
    run: Run, name: str, network: nn.Module, packed: PackedSet, spec: ProtocolSpec, teacher: nn.Module | None, seed: int
) -> None:
    images, labels = packed.images.to(run.device), packed.labels.to(run.device)
    batches = -(-len(images) // min(spec.batch_size, max(len(images) // 2, 1)))
    adam, rates = new_optimizer(network, spec), spec.lr or (1e-3 if spec.optimiser == "adamw" else 0.1)
    network.train()

    def step(i: int) -> Mapping[str, Tensor]:
        epoch, at = divmod(i, batches)
        for group in adam.param_groups:
            group["lr"] = rates * cosine(epoch, spec.epochs)
        rows = (
            torch.tensor(permutation(len(images), "pca judge", seed, "order", epoch))
            .tensor_split(batches)[at]
            .to(images.device)
        )
        drawn = generator("pca judge", seed, "views", i)
        x = views(images[rows], packed.grid, packed.size, drawn, spec.area, spec.flip, packed.confined)
        target = None
        if teacher is not None:
            x = mixed(x, spec.mix, spec.alpha, "pca judge", seed, "mix", i)
            with torch.no_grad():
                target = read_logits(teacher(x))
        loss = label_loss(read_logits(network(x)), labels[rows], target, spec.temperature, spec.top_k)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return {"loss": loss}

    run.loop(name, {"network": network, "optimizer": adam}, step, spec.epochs * batches)
