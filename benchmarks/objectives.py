"""What each objective of the catalogue costs, beside plain KD: `python benchmarks/objectives.py`.

An objective is measured alone (forward and backward on signals that are already there) and in a whole training step
(both networks, inner steps).
It gets the kind of teacher that it asks for: a frozen network, one that trains along, the student's past, several at
once, or none.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from page import write_page
from run import RESULTS, keep
from torch import Tensor, nn

from stillhouse import catalog, models
from stillhouse.config.specs import ModelSpec
from stillhouse.data import Loader
from stillhouse.data.dataset import BatchKey
from stillhouse.distillation.distillation import Distillation
from stillhouse.distillation.objective import Objective, Progress
from stillhouse.distillation.teachers import CoTrainedTeacher, Ensemble, FrozenTeacher, PastSelf
from stillhouse.errors import UserError
from stillhouse.evaluation.cost import peak_of_tensors
from stillhouse.signals import Batch, Signals, to_device
from stillhouse.training.context import TrainingContext

PAIR = ("stillhouse:resnet32x4", "stillhouse:resnet8x4")
VITS = (
    ModelSpec(model="stillhouse:vit", options={"patch": 4, "dim": 192, "depth": 6, "heads": 6}),
    ModelSpec(model="stillhouse:vit", options={"patch": 4, "dim": 96, "depth": 3, "heads": 6}),
)
TOKENS = ("proc_kd",)  # objectives of token students: they and their `kd` are measured on VITS
OPTIONS: dict[str, dict[str, Any]] = {"ofa_kd": {"stages": [2, 3, 4]}}  # the last three: the pair has no more
CLASSES, TRAINING, HERE = (
    100,
    50_000,
    128,
)  # CIFAR-100's counts; of its samples, so many are here, enough for what reads a split


class Samples:
    """Random images of CIFAR-100's shape, a data set for `Loader`."""

    def __init__(self) -> None:
        self.images = torch.randn(HERE, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return HERE

    def labels(self) -> Tensor:
        return torch.arange(HERE) % CLASSES

    def batch(self, key: BatchKey, seed: int) -> Batch:
        index = torch.from_numpy(key.indices[key.start : key.stop])
        return {"input": self.images[index], "label": self.labels()[index], "index": index}


class TrainingSet:
    """What an objective may ask of the whole training set beforehand."""

    def labels(self) -> Tensor:
        return torch.arange(TRAINING) % CLASSES


class Trial:
    """One objective on the pair: built, prepared and run once.

    Raises:
        UserError: the objective cannot run with this teacher.
    """

    def __init__(
        self, objective: Objective, kind: str, batch: Batch, device: torch.device, tokens: bool = False
    ) -> None:
        torch.manual_seed(0)
        teacher, student = VITS if tokens else (ModelSpec(model=name) for name in PAIR)
        network = lambda spec: models.build(spec, CLASSES, (3, 32, 32)).to(device)  # noqa: E731
        self.objective, self.batch = objective, batch
        self.module = Distillation(network(student), TEACHERS[kind](lambda: network(teacher)), [objective]).to(device)
        self.module.build(batch)
        self.module.to(device).train()
        self._folder = tempfile.TemporaryDirectory()
        progress = Progress(epoch=1, steps_per_epoch=TRAINING // len(batch["label"]), epochs=10)
        splits = {name: Loader(Samples(), 64) for name in ("train", "holdout", "val")}
        self.ctx = TrainingContext(self.module, progress, splits, 0, device, Path(self._folder.name), TrainingSet())
        self.module.prepare(self.ctx)
        self.module.begin_epoch(self.ctx)
        self.module.train()
        said: list[Any] = []
        handle = objective.register_forward_pre_hook(lambda _, given: said.append(given))
        self.step()
        handle.remove()
        self._student, self._teacher = _leaves(said[-1][0], always=True), _leaves(said[-1][1], always=False)

    def step(self) -> None:
        """A whole training step, without the optimiser."""
        batch = dict(self.batch)
        self.module.before_step(batch, self.ctx)
        self.module(batch, self.ctx.progress)["loss"].backward()
        self.module.after_step(batch, self.ctx.progress, True)
        self.module.zero_grad()

    def loss(self) -> None:
        """The objective alone on the signals of the first step, forward and backward."""
        terms = self.objective(self._student, self._teacher, dict(self.batch), self.ctx.progress)
        torch.stack([value for name, value in terms.items() if not name.startswith("log:")]).sum().backward()
        for signals in (self._student, self._teacher):
            for leaf in (signals.logits, signals.embedding, *signals.taps.values()):
                if leaf is not None:
                    leaf.grad = None
        self.objective.zero_grad()

    def close(self) -> None:
        self.module.close()
        self._folder.cleanup()


def _several(network: Callable[[], nn.Module]) -> Ensemble:
    return Ensemble([FrozenTeacher(network()), FrozenTeacher(network())])


def _past(network: Callable[[], nn.Module]) -> PastSelf:
    past = PastSelf()
    past.start(TrainingSet().labels(), CLASSES)
    return past


TEACHERS: dict[str, Callable[[Callable[[], nn.Module]], Any]] = {
    "none": lambda network: None,
    "frozen": lambda network: FrozenTeacher(network()),
    "peer": lambda network: CoTrainedTeacher(network()),
    "past self": _past,
    "several": _several,
}


def _leaves(signals: Signals, always: bool) -> Signals:
    """The signals cut off from their networks, with a gradient of their own where `always` or where they had one."""
    cut = lambda x: None if x is None else x.detach().requires_grad_(always or x.requires_grad)  # noqa: E731
    taps = {name: cut(tap) for name, tap in signals.taps.items()}
    return replace(signals, logits=cut(signals.logits), embedding=cut(signals.embedding), taps=taps)


def kinds(objective: Objective, needs: str) -> Iterator[str]:
    """Kinds of teacher to try, the one that the card names first."""
    if not any(need.startswith("teacher.") for need in objective.needs):
        yield "none"
        return
    said = {"past_self": "past self", "peer": "peer", "several": "several", "ensemble": "several"}
    first = next((kind for word, kind in said.items() if word in needs), "frozen")
    yield first
    yield from (kind for kind in ("frozen", "peer", "several", "past self") if kind != first)


def make(name: str, needs: str, batch: Batch, device: torch.device, tokens: bool = False) -> tuple[Trial, str]:
    """An objective's trial, with the kind of teacher it took.

    Raises:
        UserError: it runs with none; the sentence is about the kind that it asks for.
    """
    why: UserError | None = None
    objective = lambda: catalog.objective(name)(**OPTIONS.get(name, {}))  # noqa: E731
    for kind in kinds(objective(), needs):
        try:
            return Trial(objective(), kind, batch, device, tokens), kind
        except UserError as error:
            why = why or error
    assert why is not None
    raise why


def seconds(work: Callable[[], None], times: int, device: torch.device) -> float:
    """Seconds of one call, over `times` calls: CPU time on a CPU, wall time on a GPU."""
    if device.type == "cpu":
        began = time.process_time()
        for _ in range(times):
            work()
        return (time.process_time() - began) / times
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def measure(trial: Trial, kd: Trial, rounds: int, steps: int, device: torch.device) -> dict[str, Any]:
    """An objective's figures beside those of `kd`, taken in turns."""
    trial.loss()
    calls = max(1, min(50, int(0.05 / max(seconds(trial.loss, 1, device), 1e-5))))
    alone = [(seconds(trial.loss, calls, device), seconds(kd.loss, 50, device)) for _ in range(rounds)]
    whole = [(seconds(trial.step, 1, device), seconds(kd.step, 1, device)) for _ in range(steps)]
    return {
        "loss_ms": 1000 * statistics.median(mine for mine, _ in alone),
        "loss_ratio": statistics.median(mine / theirs for mine, theirs in alone),
        "mebibytes": peak_of_tensors(trial.loss, device) / 2**20,
        "step_ms": 1000 * statistics.median(mine for mine, _ in whole) if whole else None,
        "step_ratio": statistics.median(mine / theirs for mine, theirs in whole) if whole else None,
    }


def main() -> None:
    """Measure every objective there is, keep results/objectives.json and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="objectives by name; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the loss alone")
    parser.add_argument("--steps", type=int, default=2, help="whole steps, about two seconds each on a CPU; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    batch = to_device(next(iter(Loader(Samples(), options.batch_size))), device)
    cards = {name: card for card in catalog.list_methods() if card.kind == "objective" for name in card.provides}
    kd, _ = make("kd", "", batch, device)
    rows, left_out = [], {}
    for name in options.only or cards:
        try:
            trial, kind = make(name, cards[name].fields.get("needs", ""), batch, device, name in TOKENS)
        except UserError as error:
            left_out[name] = str(error)
            print(f"{name:<24} {error}", flush=True)
            continue
        beside = make("kd", "", batch, device, tokens=True)[0] if name in TOKENS else kd
        pair = "two ViTs" if name in TOKENS else "the pair"
        row = {
            "name": name,
            "teacher": kind,
            "networks": pair,
            **measure(trial, beside, options.rounds, options.steps, device),
        }
        trial.close()
        rows.append(row)
        print(
            " ".join([f"{name:<24}", kind, *(f"{k} {v:.2f}" for k, v in row.items() if isinstance(v, float))]),
            flush=True,
        )
    if not options.only:
        rows.sort(key=lambda row: row["loss_ms"])
        figures = {
            "teacher": PAIR[0],
            "student": PAIR[1],
            "batch_size": options.batch_size,
            "classes": CLASSES,
            "objectives": rows,
            "left_out": left_out,
        }
        keep("objectives", figures, options.device, options.threads)
        write_page(RESULTS)


if __name__ == "__main__":
    main()
