"""OGEN: prompts that are learned on a few classes, with features of unseen classes made up from their names, and a
teacher that is the prompt's own recent past.

paper: Overcoming the Pitfalls of Vision-Language Model Finetuning for OOD Generalization
venue: ICLR 2024
arxiv: 2401.15914
task: classification by class names
family: prompts, self-distillation
use when: a CLIP is tuned on few images of some classes, and other classes are met by name alone
needs: a CLIP, few labelled images of base classes, the names of the new classes

Context vectors before the class name are learned with CLIP frozen (CoOp). A small cross-attention makes up an image
feature for a class from the k base classes nearest to it: of a base class as if it were unknown, the reverse, and of
the new classes nearest to a sample; the made-up features are classified too, so that the vectors of new classes learn.
In the first fifth of the epochs the generator alone learns, to rebuild real features. The whole of the released step is
here: its detaches, its noise of only positive offsets, the reconstruction from a forward pass of its own, and its
weights 0.25, 0.25 / k, 0.5 / k, 0.25, of which the k divides means once more. Its factor of 512 is the number of
dimensions here, and its warm-up ends (under its default argument it would not). Of the adaptive local mean teacher no
code was released: the window formula, its limits and the squared distance of probabilities [R] are from the paper as
the card has them; the decay of the average is open [choice]. It is an average over the last m checkpoints alone, oldest
first, and m grows from 2 to 9. Image features are computed once, without augmentation, where the paper crops and flips
[choice]. `neighbours: text` takes the nearest base classes by their vectors, as the paper is described, not by mean
features; `values: examples` gives the generator a real sample of each neighbour in the place of mean and noise.
Figures: base and new classes each among themselves and their harmonic mean, and `new_drop`, by how much the accuracy on
new classes fell from its best epoch to the last, on validation images. `generator: false` with `almt: null` is CoOp.
The captions of its recipe are written from class labels and masks: what its networks learn is class names, not
language.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.config.specs import Data, MethodConfig, ModelSpec, Spec, Teacher, TrainSpec
from stillhouse.data import BatchKey, Loader
from stillhouse.data.split import balanced
from stillhouse.distillation.own_input import OwnInput
from stillhouse.errors import UserError, unknown
from stillhouse.evaluation.image_text import base_and_new
from stillhouse.models.clip import Clip, as_clip
from stillhouse.models.image_text import prompt_ids, prompt_words
from stillhouse.models.weights import load_weights
from stillhouse.randomness import keyed
from stillhouse.runs.evaluators import evaluates
from stillhouse.runs.judging import check_groups, evaluate
from stillhouse.runs.method import Method, Stage
from stillhouse.runs.products import Student
from stillhouse.runs.run import Run
from stillhouse.signals import Batch, Signals, evaluating, to_device
from stillhouse.tasks.base import Task
from stillhouse.tasks.classification import Classification
from stillhouse.tasks.image_text import ImageText
from stillhouse.training.context import Context, Progress
from stillhouse.training.module import TrainingModule

# ---- made-up features ------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """Unit features from queries, by cross-attention over keys and values: normalize(FFN(Q) + MHA(Q, K, V)).

    Args:
        dim: D.
        heads, dropout: of the attention.
    """

    def __init__(self, dim: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"ogen: {heads} heads do not divide the {dim} dimensions of the embeddings.")
        self.attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, q, D), (B, n, D), (B, n, D) -> (B * q, D)."""
        found = self.ffn(queries) + self.attention(queries, keys, values, need_weights=False)[0]
        return F.normalize(found, dim=-1).flatten(0, 1)


@dataclass
class Classes:
    """Statistics of the base classes' image features.

    Attributes:
        mean, std: (C, D).
        nearest: (C, k) the nearest other classes of each.
    """

    mean: Tensor
    std: Tensor
    nearest: Tensor


def class_statistics(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(C, D) means and standard deviations (population) of unit features by class; a class of one sample has std 0."""
    rows = [features[labels == c] for c in range(classes)]
    return torch.stack([r.mean(0) for r in rows]), torch.stack([r.std(0, correction=0) for r in rows])


def nearest_others(vectors: Tensor, k: int) -> Tensor:
    """(C, k) the classes whose vectors (C, D) have the largest inner product, never the class itself.

    Raises:
        UserError: a single class.
    """
    if len(vectors) < 2:
        raise UserError("ogen: one base class has no neighbours to extrapolate from; take two at least.")
    near = vectors @ vectors.T
    near.fill_diagonal_(-torch.inf)
    return near.topk(min(k, len(vectors) - 1), dim=1).indices


@dataclass
class MadeUp:
    """Features that the generator makes for a batch, with what they should be.

    Attributes:
        unknown: (B, D) of each sample's own class, from its neighbours.
        known: (B * k, D) of the neighbours, from the sample.
        known_target: (B * k, D) noisy features of the neighbours.
        new: (B * k', D) of the nearest new classes; None without new classes.
        known_label, new_label: their classes.
    """

    unknown: Tensor
    known: Tensor
    known_target: Tensor
    known_label: Tensor
    new: Tensor | None = None
    new_label: Tensor | None = None


def make_up(
    generator: nn.Module,
    features: Tensor,
    labels: Tensor,
    base: Tensor,
    new: Tensor,
    classes: Classes,
    values: Tensor,
    k: int = 3,
) -> MadeUp:
    """All made-up features of a batch.

    Args:
        features: (B, D) unit image features.
        labels: (B,).
        base, new: (C, D) and (C', D) unit class vectors; only the queries of new classes carry gradient to them.
        values: (B, k, D) features of each sample's neighbours, which the generator attends to.
        k: new classes a sample, at most.
    """
    still, near = base.detach(), classes.nearest[labels]
    own, others, sample = still[labels][:, None], still[near], features[:, None]
    unknown = generator(own, others, values)
    known = generator(others, own, sample)
    made = MadeUp(unknown, known, values.flatten(0, 1), near.flatten())
    if len(new):
        chosen = (still[labels] @ new.detach().T).topk(min(k, len(new)), dim=1).indices
        made.new, made.new_label = generator(new[chosen], own, sample), chosen.flatten()
    return made


def reconstruction(made: MadeUp, features: Tensor, factor: float) -> Tensor:
    """factor * (MSE of the own class's feature + MSE of the neighbours')."""
    return factor * F.mse_loss(made.unknown, features) + factor * F.mse_loss(made.known, made.known_target)


def score_losses(
    made: MadeUp, features: Tensor, labels: Tensor, base: Tensor, new: Tensor, scale: float | Tensor, k: int
) -> dict[str, Tensor]:
    """Cross-entropies of made-up and of real features, with their weights: `unknown`, `known`, `new`, `real`."""
    terms = {
        "unknown": 0.25 * F.cross_entropy(scale * made.unknown @ base.T, labels),
        "known": 0.25 / k * F.cross_entropy(scale * made.known @ base.T, made.known_label),
        "real": 0.25 * F.cross_entropy(scale * features @ base.T, labels),
    }
    if made.new is not None and made.new_label is not None:
        terms["new"] = 0.5 / k * F.cross_entropy(scale * made.new @ new.T, made.new_label)
    return terms


def noisy_values(classes: Classes, labels: Tensor, noise: Tensor) -> Tensor:
    """(B, k, D) of each sample's neighbours: mean + noise * std; noise (1, D) in [0, 1) is one row for all."""
    near = classes.nearest[labels]
    return classes.mean[near] + noise * classes.std[near]


# ---- the teacher of the recent past ----------------------------------------------------------------------------------


def window(epoch: int, epochs: int, smallest: int = 2, largest: int = 9) -> int:
    """How many past checkpoints the teacher averages after an epoch: `smallest` at 0, `largest` at the last.

    >>> [window(t, 10) for t in (0, 5, 10)]
    [2, 5, 9]
    """
    rise = (largest - smallest) / 2 * (1 + math.cos(math.pi * (epochs + epoch) / epochs))
    return math.floor(rise + 1e-9) + smallest


def local_mean(checkpoints: Tensor, decay: float) -> Tensor:
    """The exponential average of checkpoints (m, …), the oldest first, which it begins from."""
    mean = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        mean = decay * mean + (1 - decay) * checkpoint
    return mean


# ---- training --------------------------------------------------------------------------------------------------------


class PromptLearner(nn.Module):
    """Context vectors for the class names of a frozen CLIP, with the generator.

    Args:
        clip: the network, which is not trained.
        task: its tokenizer.
        names: of all classes.
        new: ids of those that are new.
        tokens: context vectors.
        heads, dropout: of the generator.
    """

    def __init__(
        self,
        clip: Clip,
        task: ImageText,
        names: Sequence[str],
        new: Sequence[int],
        tokens: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        self.context = nn.Parameter(clip.text.tokens(prompt_words(task.tokenizer, tokens)).detach().clone())
        self.generator = Generator(clip.image.projection.out_features, heads, dropout)
        ids, ends = prompt_ids(task.tokenizer, names, tokens, task.context)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("ends", ends, persistent=False)
        self.new = list(new)
        self.base = [c for c in range(len(names)) if c not in set(new)]

    def train(self, mode: bool = True) -> PromptLearner:
        super().train(mode)
        self.clip.eval()
        return self

    def vectors(self, context: Tensor | None = None) -> Tensor:
        """(C, D) unit vectors of all classes under the context (n, W)."""
        used = self.context if context is None else context
        embedded = self.clip.text.tokens(self.get_buffer("ids"))
        return F.normalize(self.clip.text.from_embedded(embedded, self.get_buffer("ends"), prompts=[used]), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits over all classes of unit image features (B, D)."""
        return self.clip.logit_scale.exp() * features @ self.vectors().T


class OgenTraining(TrainingModule):
    """The released step, and the consistency with the recent past.

    Args:
        student: context and generator.
        classes: statistics of the base classes; None: no generator, as CoOp.
        pool: features (N, D) and labels (N,) of the training images, for values that are examples.
        config: the recipe.
        epochs: of the training.
    """

    student: PromptLearner
    past: Tensor
    teacher: Tensor

    def __init__(
        self,
        student: PromptLearner,
        classes: Classes | None,
        pool: tuple[Tensor, Tensor],
        config: Config,
        epochs: int,
    ) -> None:
        super().__init__()
        self.student, self._pool, self._config, self._epochs = student, pool, config, epochs
        self._classes = classes
        self.register_buffer("past", torch.zeros(epochs + 1, *student.context.shape))
        self.register_buffer("teacher", student.context.detach().clone())

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.student.context, *self.student.generator.parameters()]}]

    @torch.no_grad()
    def begin_epoch(self, ctx: Context) -> None:
        epoch = ctx.progress.epoch
        self.past[epoch] = self.student.context
        almt = self._config.almt
        if almt is not None:
            m = window(epoch, self._epochs, almt.smallest, almt.largest)
            self.teacher.copy_(local_mean(self.past[max(epoch - m, 0) : epoch + 1], almt.decay))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        features, labels, net, config = batch["input"], batch["label"], self.student, self._config
        vectors, scale = net.vectors(), net.clip.logit_scale.exp()
        base, new = vectors[net.base], vectors[net.new]
        real = scale * features @ base.T
        terms: dict[str, Tensor] = {}
        made: MadeUp | None = None
        if self._classes is None:
            terms["real"] = F.cross_entropy(real, labels)
        else:
            classes = Classes(*(x.to(features.device) for x in vars(self._classes).values()))
            k = classes.nearest.shape[1]

            def again() -> MadeUp:
                return make_up(net.generator, features, labels, base, new, classes, self._values(classes, labels), k)

            terms["rebuilt"] = reconstruction(again(), features, features.shape[1])
            if progress.epoch < config.warmup * self._epochs:
                return {"loss": terms["rebuilt"], **terms}
            made = again()
            terms |= score_losses(made, features, labels, base, new, scale, k)
        if config.almt is not None and progress.epoch:
            terms["past"] = config.almt.weight * self._consistency(features, vectors, scale, made)
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def _values(self, classes: Classes, labels: Tensor) -> Tensor:
        if self._config.values == "noise":
            return noisy_values(classes, labels, torch.rand(1, classes.mean.shape[1], device=labels.device))
        features, owners = (x.to(labels.device) for x in self._pool)
        near = classes.nearest[labels]
        chances = torch.rand(*near.shape, len(owners), device=labels.device)
        return features[chances.masked_fill(owners != near[..., None], -1).argmax(-1)]

    def _consistency(self, features: Tensor, vectors: Tensor, scale: Tensor, made: MadeUp | None) -> Tensor:
        """Mean squared distance of class probabilities from those under the past's context, of real and made-up
        features."""
        with torch.no_grad():
            theirs = self.student.vectors(self.teacher)
        net = self.student
        pairs = [(features, net.base)]
        if made is not None:
            pairs.append((made.unknown, net.base))
            if made.new is not None:
                pairs.append((made.new, net.new))
        losses = []
        for x, own in pairs:
            ours, past = ((scale * x @ v[own].T).softmax(-1) for v in (vectors, theirs))
            losses.append(F.mse_loss(ours, past.detach()))
        return torch.stack(losses).mean()

    def read_student(self, batch: Batch) -> Signals:
        return Signals(logits=self.student(batch["input"]))


class FeatureRows:
    """Features and labels in memory, as a data set."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self._features, self._labels = features, labels

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self) -> Tensor:
        return self._labels.clone()

    def batch(self, key: BatchKey, seed: int) -> Batch:
        index = torch.from_numpy(key.indices[key.start : key.stop])
        return {"input": self._features[index], "label": self._labels[index], "index": index}


# ---- the recipe ------------------------------------------------------------------------------------------------------


class Almt(Spec):
    """The adaptive local mean teacher."""

    smallest: int = Field(2, ge=1, description="Checkpoints of the first window.")
    largest: int = Field(9, ge=1, description="Checkpoints of the last.")
    decay: float = Field(0.5, ge=0, lt=1, description="Of the average inside a window.")
    weight: float = Field(1.0, ge=0)


class Config(MethodConfig):
    data: Data = Field(description="Images of base and new classes; those of new classes are only judged on.")
    new: list[str] = Field(default_factory=list, description="Classes, by name, that training has no images of.")
    clip: Teacher = Field(description="The CLIP whose prompt is learned.")
    shots: int = Field(16, ge=1, description="Labelled images of each base class.")
    tokens: int = Field(4, ge=1, description="Context vectors.")
    generator: bool = Field(True, description="false: real features alone, as CoOp.")
    k: int = Field(3, ge=1, description="Neighbours; as many as there are, at most.")
    heads: int = Field(4, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    neighbours: Literal["features", "text"] = "features"
    values: Literal["noise", "examples"] = "noise"
    warmup: float = Field(0.2, ge=0, lt=1, description="Share of the epochs in which the generator alone learns.")
    almt: Almt | None = Field(default_factory=Almt, description="null: no teacher.")
    train: TrainSpec = Field(default_factory=TrainSpec)
    evaluate: list[str] = Field(default_factory=lambda: ["quality", "cost"])


NETWORK = Stage("teacher", "train the CLIP (stored, shared)")
FEATURES = Stage("features", "image features of all splits, once (stored, shared)")
PROMPT = Stage("prompt", "learn the context, with made-up features and the recent past")


class OGEN(Method[Config]):
    def plan(self, config: Config, run: Run) -> list[Stage]:
        bundle = run.data(config.data, Classification)
        check_groups(bundle.task, config.evaluate)
        _ids(config.new, bundle.classes)
        rows = config.shots * (bundle.num_classes - len(config.new))
        steps = config.train.epochs * max(rows // config.train.batch_size, 1)
        return [*([NETWORK] if config.clip.train else []), FEATURES, PROMPT.filled(steps=steps)]

    def run(self, config: Config, run: Run) -> PromptProduct:
        bundle = run.data(config.data, Classification)
        names, new = bundle.classes, _ids(config.new, bundle.classes)
        teacher = run.teacher("clip", config.clip, config.data)
        if not isinstance(teacher.task, ImageText):
            raise UserError("ogen: the network must embed images and texts: give it data such as captions:cifar10.")
        task, clip = teacher.task, as_clip(teacher.model).to(run.device)
        uses = {"network": teacher, "data": bundle}
        found = run.stage(FEATURES, lambda: self.features(config, run, teacher), uses)
        base = [c for c in range(len(names)) if c not in new]
        train = few_shots(found["train"]["features"], found["train"]["labels"], base, config.shots, config.data.seed)
        with keyed("prompt", run.seed):
            student = PromptLearner(clip, task, names, new, config.tokens, config.heads, config.dropout)
        classes = self.classes(config, student, *train) if config.generator else None
        module = OgenTraining(student, classes, train, config, config.train.epochs)
        loader = Loader(
            FeatureRows(*train),
            min(config.train.batch_size, len(train[1])),
            seed=run.seed,
            shuffle=True,
            drop_last=True,
        )
        curve: list[dict[str, float]] = []

        def judged(model: nn.Module, device: torch.device) -> dict[str, float]:
            figures = scored(model, found["val"], new, device)
            curve.append(figures)
            return figures

        fitted = run.fit(str(PROMPT), module, loader, config.train, evaluate=judged if "val" in found else None)
        split = "test" if "test" in found else "val"
        figures = {"train_seconds": fitted.seconds, **scored(student, found[split], new, run.device)}
        if new and curve:
            figures["new_drop"] = max(c["accuracy_new"] for c in curve) - curve[-1]["accuracy_new"]
        plain = task.class_vectors(clip, names).cpu()
        before = found[split]["features"] @ plain.T
        figures["accuracy_before"] = float((before.argmax(-1) == found[split]["labels"]).double().mean())
        if new:
            figures["accuracy_new_before"] = base_and_new(before, found[split]["labels"], new)["accuracy_new"]
        run.record["weights"] = {"clip": teacher.fingerprint()}
        own: Any = teacher.readers()[0].prepare
        with torch.no_grad():
            prompted = PromptedClip(clip, student.context, student.vectors(), own)
        spec = ModelSpec(model="stillhouse:clip", options=clip.options)
        made = run.student(prompted.eval(), spec, config.data, figures)
        return PromptProduct(made.module, made.model, made.task, made.figures, config.tokens, own)

    def features(self, config: Config, run: Run, teacher: Any) -> dict[str, Any]:
        """Unit image features and labels of each split, without augmentation."""
        out: dict[str, Any] = {}
        teacher.to(run.device)
        for split in ("train", "val", "test"):
            if not run.data(config.data).has(split):
                continue
            rows, labels = [], []
            for batch in run.loader(config.data, split):
                rows.append(teacher(to_device(batch, run.device)).require("embedding").cpu())
                labels.append(batch["label"])
            out[split] = {"features": torch.cat(rows), "labels": torch.cat(labels)}
        return out

    def classes(self, config: Config, student: PromptLearner, features: Tensor, labels: Tensor) -> Classes:
        count = len(student.base)
        mean, std = class_statistics(features, labels, count)
        with torch.no_grad():
            texts = student.vectors()[student.base].cpu()
        return Classes(mean, std, nearest_others(mean if config.neighbours == "features" else texts, config.k))


def few_shots(features: Tensor, labels: Tensor, base: list[int], shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (N, D) and labels (N,), renumbered, of `shots` images of each base class."""
    inside = np.flatnonzero(np.isin(labels.numpy(), base))
    own = labels.numpy()[inside]
    chosen = inside[balanced(own, min(shots * len(base), len(inside)), seed, "shots")]
    number = {c: i for i, c in enumerate(base)}
    return features[chosen], torch.tensor([number[int(c)] for c in labels[chosen]])


@torch.no_grad()
def scored(student: Any, part: Mapping[str, Tensor], new: Sequence[int], device: torch.device) -> dict[str, float]:
    """Accuracy over all classes, and of base and new ones among themselves, of stored features."""
    with evaluating(student):
        logits = student(part["features"].to(device)).cpu()
    labels = part["labels"]
    if not new:
        return {"accuracy_base": float((logits.argmax(-1) == labels).double().mean())}
    return base_and_new(logits, labels, new)


def _ids(new: Sequence[str], classes: Sequence[str]) -> list[int]:
    wrong = next((n for n in new if n not in classes), None)
    if wrong is not None:
        raise unknown("class in new,", wrong, list(classes))
    return [list(classes).index(n) for n in new]


# ---- the product -----------------------------------------------------------------------------------------------------


class PromptedClip(nn.Module):
    """A CLIP with its learned context, and the vectors of the classes under it.

    Args:
        clip: the network.
        context: (n, W).
        vectors: (C, D) unit.
        own_input: makes its images of the data's; None: they are the same.
    """

    context: Tensor
    vectors: Tensor

    def __init__(self, clip: Clip, context: Tensor, vectors: Tensor, own_input: OwnInput | None = None) -> None:
        super().__init__()
        self.clip, self._own_input = clip, own_input
        self.register_buffer("context", context.detach().clone())
        self.register_buffer("vectors", vectors.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        x = images if self._own_input is None else self._own_input.image(images)
        return self.clip.logit_scale.exp() * F.normalize(self.clip.get_image_features(x), dim=-1) @ self.vectors.T


@dataclass
class PromptProduct(Student):
    """A CLIP with a learned context.

    Attributes:
        tokens: context vectors.
        own_input: makes the network's images of the data's.
    """

    kind: ClassVar[str] = "stillhouse.methods.image_text.ogen:PromptProduct"
    tokens: int = field(default=4)
    own_input: OwnInput | None = None

    def extras(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "own_input": None if self.own_input is None else asdict(self.own_input)}

    @classmethod
    def rebuilt(cls, meta: Mapping[str, Any], spec: ModelSpec, task: Task, folder: Path) -> PromptProduct:
        assert isinstance(task, Classification)
        own = None if meta["own_input"] is None else OwnInput(**_tuples(meta["own_input"]))
        size = task.input_shape[1:] if own is None or own.size is None else own.size
        clip = Clip(**spec.options, input_shape=(task.input_shape[0], *size))
        width, dim = clip.text.encoder.shape.width, clip.image.projection.out_features
        vectors = torch.zeros(len(task.classes), dim)
        module = PromptedClip(clip, torch.zeros(meta["tokens"], width), vectors, own)
        load_weights(module, task.weights_file(folder), owner=f"model {spec.model}")
        return cls(module.eval(), spec, task, tokens=meta["tokens"], own_input=own)


def _tuples(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of JSON as the tuples they were."""
    return {
        k: tuple(tuple(x) if isinstance(x, list) else x for x in v) if isinstance(v, list) else v
        for k, v in facts.items()
    }


evaluates(PromptProduct.kind)(evaluate)
