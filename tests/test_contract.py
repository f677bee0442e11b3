"""What every objective of the catalogue promises: it runs on what it says it needs, trains the student and not the
teacher, saves its state, and waits for no device.

The objectives are found, not listed: a new file under `objectives/` is tested by being there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from test_detection import RT_DETR
from torch import Tensor, nn

from stillhouse import catalog
from stillhouse.config.specs import DataSpec, ModelSpec, TrainSpec
from stillhouse.data import BatchKey, Loader, load
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.teachers import CoTrainedTeacher, FrozenTeacher, PastSelf
from stillhouse.models import build
from stillhouse.signals import Batch, Signals, to_device
from stillhouse.tasks.base import Task
from stillhouse.tasks.detection import Detection
from stillhouse.tasks.restoration import Restoration
from stillhouse.training.context import TrainingContext
from stillhouse.training.engine import _Fit, make_accelerator
from stillhouse.training.optimizers import make_optimizer

CARDS = {name: card for card in catalog.list_methods() if card.kind == "objective" for name in card.provides}
ELSEWHERE = {
    "student.losses": "test_detection.py",
    "student.part:image": "test_image_text.py",
    "student.tap:encoder.counts": "test_pointdistiller.py",
}
"""What objectives may need that the classifiers here do not give -> the tests that try them on networks that do."""
OBJECTIVES = sorted(n for n in CARDS if not ELSEWHERE.keys() & catalog.objective(n)().needs)
SPAN = Progress(epoch=3, epochs=10, steps_per_epoch=4)
WITHOUT_DETECTOR = {"rt_detrv4": {"student_layer": "blocks.1"}}
"""Options on the meta device: the detectors of transformers wait for the device themselves."""
CPU, META = torch.device("cpu"), torch.device("meta")


def network(seed: int, device: torch.device = CPU, pyramid: bool = False) -> nn.Module:
    """A small transformer: it has stages, tokens that fold to maps, a class token, an embedding, a final norm and a
    head; or one with a patch embedding at the entrance of each stage."""
    torch.manual_seed(seed)
    if pyramid:
        options = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "sr_ratios": [1] * 4}
        return build(ModelSpec(model="hf:config:segformer", options=options), 10, (1, 8, 8)).to(device)
    spec = ModelSpec(model="stillhouse:vit", options={"patch": 2, "dim": 16, "depth": 4, "heads": 4})
    return build(spec, 10, (1, 8, 8)).to(device)


def detector(device: torch.device) -> tuple[nn.Module, nn.Module, Detection, Batch]:
    """A small RT-DETR, a transformer that teaches it by its tokens, its task, and a batch of images."""
    task = Detection(("a", "b"), (64, 96), (0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(0)
    student = task.build(ModelSpec(model="hf:config:rt_detr", options={**RT_DETR, "num_denoising": 0}))
    spec = ModelSpec(model="stillhouse:vit", options={"patch": 16, "dim": 16, "depth": 2, "heads": 2})
    teacher = build(spec, 10, (3, 64, 96))
    return student.to(device), teacher.to(device), task, {"input": torch.randn(4, 3, 64, 96).to(device)}


@dataclass
class World:
    """A fit of one objective that is made ready and has not begun."""

    module: Distillation
    ctx: TrainingContext
    batch: Batch

    @property
    def objective(self) -> Objective:
        return self.module.entries[0].objective

    def signals(self) -> tuple[Signals, Signals]:
        """What student and teacher give, as leaves with a gradient."""
        student = self.module._reader(self.batch)
        return leaf(student), leaf(self.module._ask(self.objective.teacher, self.batch, student))


def leaf(signals: Signals) -> Signals:
    """The same values, each with a gradient of its own."""
    free = lambda x: None if x is None else x.detach().clone().requires_grad_(x.is_floating_point())  # noqa: E731
    taps = {k: free(v) for k, v in signals.taps.items()}
    parts = {k: free(v) for k, v in signals.parts.items()}
    return Signals(
        free(signals.logits),
        free(signals.probs),
        embedding=free(signals.embedding),
        taps=taps,
        parts=parts,
        image=signals.image,
    )


def tensors(signals: Signals) -> list[Tensor]:
    found = [signals.logits, signals.probs, signals.embedding, *signals.taps.values(), *signals.parts.values()]
    return [x for x in found if x is not None and x.is_floating_point()]


def restorer(seed: int, device: torch.device) -> nn.Module:
    """A small network that gives images."""
    torch.manual_seed(seed)
    return build(ModelSpec(model="stillhouse:imdn", options={"scale": 1, "width": 8, "blocks": 1})).to(device)


class Photographs:
    """Pairs of images, for objectives of restoration."""

    def __len__(self) -> int:
        return 16

    def labels(self) -> None:
        return None

    def batch(self, key: BatchKey, seed: int) -> Batch:
        draw = torch.Generator().manual_seed(int(key.indices[0]))
        images = torch.rand(2, len(key.indices), 3, 12, 12, generator=draw)
        return {"input": images[0], "label": images[1], "index": torch.from_numpy(key.indices)}


def world_of_images(name: str, device: torch.device, **options: object) -> World:
    train = Loader(Photographs(), 8, seed=0, shuffle=True)
    teacher = FrozenTeacher(restorer(1, device), task=Restoration(1.0))
    objective = catalog.objective(name)(**options)
    module = Distillation(restorer(0, device), {"teacher": teacher}, [objective], task=Restoration(1.0))
    batch = to_device(next(iter(train)), device)
    module.build(batch)
    module.to(device).train()
    return World(module, TrainingContext(module, copy.copy(SPAN), {"train": train}, 0, device, Path(), train), batch)


def world(name: str, device: torch.device = CPU, **options: object) -> World:
    """The objective between a student and the kind of teacher that its card's family has."""
    if CARDS[name].fields["task"] == "restoration":
        return world_of_images(name, device, **options)
    bundle = load(DataSpec(name="digits", size=60, test_size=20, holdout=0.25))
    train = Loader(bundle.dataset("train", train=False), 8, seed=0, shuffle=True)
    holdout = Loader(bundle.dataset("holdout", train=False), 8)
    family = CARDS[name].fields["family"]
    torch.manual_seed(0)
    if device == META:
        options = {**WITHOUT_DETECTOR.get(name, {}), **options}
    objective = catalog.objective(name)(**options)
    pyramid = any("patch_embeddings" in need for need in objective.needs)
    head = "classifier" if pyramid else "head"
    teacher: object = FrozenTeacher(network(1, device, pyramid), embedding=head)
    if family == "online":
        teacher = CoTrainedTeacher(network(1, device, pyramid), embedding=head)
    elif family == "self-distillation":
        teacher = PastSelf()
        teacher.start(train.labels(), 10)
    batch = to_device(next(iter(train)), device)
    if any("aifi" in need for need in objective.needs) and device != META:
        student, taught_by, task, batch = detector(device)
        module = Distillation(student, FrozenTeacher(taught_by, task=Task()), [objective], task=task)
    else:
        module = Distillation(network(0, device, pyramid), {"teacher": teacher}, [objective], embedding=head)
    with device:  # what `build` makes is made there, so that optimisers hold what they step
        module.build(batch)
    module.to(device).train()
    ctx = TrainingContext(module, copy.copy(SPAN), {"train": train, "holdout": holdout}, 0, device, Path(), train)
    module.prepare(ctx)
    return World(module, ctx, batch)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([v for k, v in terms.items() if not k.startswith("log:")]).sum()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_the_catalogue_finds_every_objective() -> None:
    assert {"ce", "kd", "uskd", "gkd", "tgeo_kd", "acam_kd"} <= set(OBJECTIVES) and len(OBJECTIVES) >= 30


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_runs_on_what_it_says_it_needs(name: str) -> None:
    given = world(name)
    student, teacher = given.signals()
    batch = {k: v for k, v in given.batch.items() if k in given.objective.needs}
    loss = total(given.objective(student, teacher, batch, SPAN))
    assert loss.ndim == 0 and loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    grads = [x.grad for x in tensors(student) if x.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and any(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if CARDS[n].fields["family"] != "online"])
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    given = world(name)
    student, teacher = given.signals()
    total(given.objective(student, teacher, given.batch, SPAN)).backward()
    assert all(x.grad is None for x in tensors(teacher))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_own_layers_are_optimised_and_receive_a_gradient(name: str) -> None:
    given = world(name)
    total(given.objective(*given.signals(), given.batch, SPAN)).backward()
    listed = {id(p) for group in given.objective.param_groups() for p in group["params"]}
    own = {
        id(p)
        for o in given.objective.__dict__.get("_own_optimizers", {}).values()
        for g in o.param_groups
        for p in g["params"]
    }
    assert listed | own == {id(p) for p in given.objective.parameters() if p.requires_grad} and not listed & own
    assert all(p.grad is not None and p.grad.isfinite().all() for p in given.objective.parameters() if id(p) in listed)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_signals_are_computed_in_float32(name: str) -> None:
    given = world(name)
    given.objective.eval()
    exact, halves = given.signals(), []
    for signals in exact:  # the same numbers in both precisions
        half = copy.copy(signals)
        for x in tensors(signals):
            x.data = x.data.bfloat16().float()
        for field in fields(half):
            value = getattr(half, field.name)
            if isinstance(value, Tensor):
                setattr(half, field.name, value.bfloat16())
        half.taps = {k: v.bfloat16() for k, v in signals.taps.items()}
        half.parts = {k: v.bfloat16() for k, v in signals.parts.items()}
        halves.append(half)
    torch.manual_seed(1)
    expected = total(given.objective(*exact, given.batch, SPAN))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = total(given.objective(*halves, given.batch, SPAN))
    assert found.dtype == torch.float32
    learned = any(
        True for _ in given.objective.parameters()
    )  # own layers run in half precision under autocast, as the networks do
    torch.testing.assert_close(found, expected, rtol=0.05 if learned else 1e-5, atol=0.05 if learned else 1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_state_restores_to_the_same_loss(name: str) -> None:
    given = world(name)
    student, teacher = given.signals()
    given.objective(student, teacher, given.batch, SPAN)  # a memory moves
    other = world(name).objective
    with torch.no_grad():
        for x in [*other.parameters(), *other.buffers()]:
            if x.is_floating_point():
                x.zero_()
    other.load_state_dict(given.objective.state_dict())
    losses = []
    for each in (given.objective, other):
        torch.manual_seed(2)
        losses.append(total(each(student, teacher, given.batch, SPAN)).detach())
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_its_card_names_its_paper_and_its_options_are_recipe_keys(name: str) -> None:
    card = CARDS[name]
    assert card.title.count(": ") == 1 and card.title.endswith(".")
    assert {"task", "family", "use when", "needs"} <= set(card.fields)
    assert (
        card.fields["family"] == "supervision"
        or "arXiv" in card.text
        or {"paper", "venue", "arxiv"} <= set(card.fields)
    )
    cls = catalog.objective(name)
    options = catalog.options(cls)().model_dump()
    cls(**options)
    json.dumps(options)


# ---- a step waits for no device --------------------------------------------------------------------------------------


def step(given: World) -> None:
    """What an optimiser step of `fit` does."""
    optimizer = make_optimizer(given.module.param_groups(), TrainSpec())
    given.module.before_step(given.batch, given.ctx)
    given.module(given.batch, given.ctx.progress)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    given.module.after_step(given.batch, given.ctx.progress, True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_reads_nothing_back_and_mixes_no_devices(name: str) -> None:
    """Tensors of the meta device have no values: `.item()`, `bool()`, boolean masks and tensors of another device
    raise."""
    given = world(name, META)
    if given.objective.host_step is None:
        step(given)
    else:
        with pytest.raises((RuntimeError, NotImplementedError)):
            step(given)


def test_a_step_of_fit_reads_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TrainSpec.model_validate({"epochs": 1, "accumulate": 2, "clip": 1.0, "ema": 0.9})
    accelerator = make_accelerator(spec, cpu=True)
    monkeypatch.setattr(accelerator.state, "device", META)
    bundle = load(DataSpec(name="digits", size=60, test_size=20))
    module = Distillation(network(0, META), FrozenTeacher(network(1, META)), ["ce", "kd", "at"])
    made = _Fit(
        module,
        Loader(bundle.dataset("train", train=True), 8),
        spec,
        accelerator,
        tmp_path,
        "student",
        0,
        None,
        {},
        None,
    )
    module.train()
    for i in range(4):
        terms = made.step(i)
    assert terms["loss"].device == META
