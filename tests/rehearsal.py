"""A rehearsal of a recipe: its method runs from end to end on the meta device, with made-up data and one step of every
training.

Tensors of the meta device have shapes and no values, so a network of any size costs nothing, and in a step every read
by the host (`.item()`, `bool()`, boolean masks) and every tensor of another device raises. Between the steps, where a
method may look at its results, what it reads is made up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_up_data
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from stillhouse import catalog, models, randomness
from stillhouse.config.specs import MethodConfig, TrainSpec
from stillhouse.data.dataset import BatchKey
from stillhouse.data.loader import Loader
from stillhouse.distillation.teachers import FrozenTeacher
from stillhouse.evaluation import cost
from stillhouse.files import cache_folder
from stillhouse.models import sources, tokenizer, weights
from stillhouse.runs import stages
from stillhouse.runs.method import Stage
from stillhouse.runs.run import Run
from stillhouse.training.engine import FitResult, _Fit, make_accelerator
from stillhouse.training.module import TrainingModule

META = torch.device("meta")
OPS = torch.ops.aten
SMALL = 200_000  # elements of a tensor whose values are computed
UNKNOWN_SIZE = {OPS.nonzero, OPS.masked_select, OPS.bincount, OPS._unique2, OPS.unique_dim, OPS.unique_consecutive}
READS = {OPS._local_scalar_dense, OPS.equal, OPS.allclose, OPS.is_nonzero}
INDEXING = {OPS.index, OPS.index_put, OPS.index_put_}


class HostReads(TorchDispatchMode):
    """Between steps, the host may read meta tensors: every small one has a value, computed along on the CPU from those
    of others, and from ones where nothing is known, such as weights after a step.

    Args:
        mixing: whether tensors of the CPU that meet those of the meta device are moved.
    """

    def __init__(self, mixing: bool = True) -> None:
        super().__init__()
        self.mixing = mixing
        self.known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet, device = func.overloadpacket, kwargs.get("device")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        makes = device is not None and torch.device(device) == META
        if not makes and not any(x.device == META for x in inputs):
            return func(*args, **kwargs)
        if packet in READS or (device is not None and not makes):
            return func(*tree_map(self.value, args), **kwargs)
        if packet is OPS.copy_ and args[0].device != META:
            return func(args[0], self.value(args[1]))
        if packet in INDEXING:
            args = (args[0], self.places(args[1]), *args[2:])
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        values = None
        dense = all(x.layout == torch.strided for x in inputs)
        if packet in UNKNOWN_SIZE or (dense and all(x.numel() <= SMALL for x in inputs)):
            on_cpu = {**kwargs, "device": "cpu"} if makes else kwargs
            if not makes or inputs or math.prod(tree_leaves(args[:1]) or [0]) <= SMALL:
                values = self.computed(func, args, on_cpu)
        if values is not None and not func._schema.is_mutable:
            return tree_map(self.on_meta, values)
        return func(*self.moved(args), **self.moved(kwargs))

    def places(self, indices: Any) -> list[Any]:
        """Indices in which a mask is the places where it is true, on the meta device."""
        out: list[Any] = []
        for index in indices:
            mask = isinstance(index, Tensor) and index.dtype == torch.bool
            out += map(self.on_meta, self.value(index).nonzero(as_tuple=True)) if mask else [index]
        return out

    def computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result on the CPU; None where made-up values cannot have one."""
        try:
            return func(*tree_map(self.value, args), **tree_map(self.value, kwargs))
        except (RuntimeError, IndexError, NotImplementedError):
            return None

    def value(self, x: Any) -> Any:
        """A tensor's value on the CPU, made up where it is not known."""
        if not isinstance(x, Tensor) or x.device != META:
            return x
        if x.numel() > SMALL:
            return torch.ones((), dtype=x.dtype).expand(x.shape)  # takes no memory
        if x not in self.known:
            self.known[x] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).fill_(1)
        return self.known[x]

    def on_meta(self, x: Any) -> Any:
        """A computed value as a meta tensor."""
        if not isinstance(x, Tensor):
            return x
        out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
        if x.numel() <= SMALL:
            self.known[out] = x
        return out

    def moved(self, values: Any) -> Any:
        def move(x: Any) -> Any:
            return torch.empty_like(x, device=META) if isinstance(x, Tensor) and x.device != META and x.ndim else x

        return tree_map(move, values) if self.mixing else values


@contextmanager
def plain() -> Iterator[None]:
    """Inside, no mode is at work: a read of a meta tensor raises."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


class Figures(dict[str, float]):
    """Figures of a network that was not trained: every name has one."""

    def __missing__(self, name: str) -> float:
        return 0.5

    def __contains__(self, name: object) -> bool:
        return True


@dataclass
class Repeated:
    """A split whose batches are one or two of its samples over and over: the shape is right, at little cost."""

    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def batch(self, key: BatchKey, seed: int) -> Any:
        own = key.indices[key.start : key.stop]
        if len(own) <= 2:
            return self.dataset.batch(key, seed)
        made = self.dataset.batch(BatchKey(key.epoch, own[:2], 0, 2), seed)
        made = repeated(made, len(own))
        if isinstance(made.get("label"), Tensor) and made["label"].shape == (len(own),):
            made["label"] = self.dataset.labels()[torch.from_numpy(own)]
        return {**made, "index": torch.from_numpy(own)}


def repeated(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:1].expand(count, *value.shape[1:])
    if isinstance(value, Mapping):
        return {k: repeated(v, count) for k, v in value.items()}
    return [value[0]] * count if isinstance(value, list) else value


class Rehearsal(Run):
    """A run in which every training is one step on the meta device."""

    def __init__(self, folder: Path, config: MethodConfig, made_up: bool, reads_in_steps: bool) -> None:
        super().__init__(folder, config, cpu=True)
        self.reads_in_steps = reads_in_steps
        self.trained_stages: list[str] = []
        self.reads = HostReads()
        self._stages = 0
        self._made_up = made_up

    @property
    def device(self) -> torch.device:
        return META

    def data(self, spec: Any, *of: Any) -> Any:
        name = spec.model_dump_json()
        if self._made_up and name not in self._bundles:
            bundle = made_up_data.load(self, spec, self.folder)
            if bundle is not None:
                self._bundles[name] = bundle
        bundle = super().data(spec, *of)
        if not getattr(bundle, "rehearsed", False) and hasattr(bundle, "dataset"):
            plain = bundle.dataset
            bundle.dataset = lambda split, *, train=False: Repeated(plain(split, train=train))
            bundle.rehearsed = True
            with suppress(AttributeError):  # of texts it is computed
                bundle.evaluation_batch = 4096  # a batch costs the same, whatever its size
        return bundle

    def loader(self, spec: Any, split: str, batch_size: int | None = None, *, train: bool = False) -> Any:
        if train and batch_size is not None:  # made-up data are few, which the paper's batch need not fit
            batch_size = max(1, min(batch_size, len(self.data(spec).dataset(split, train=True))))
        return super().loader(spec, split, batch_size, train=train)

    def network(self, name: str, spec: Any, data: Any, as_saved: bool = False) -> nn.Module:
        if spec.train is not None and spec.checkpoint is None:
            return super().network(name, spec, data, as_saved)
        return self.model(spec.network, spec.data or data, role="teacher")

    def figures(self, *arguments: Any, **options: Any) -> dict[str, float]:
        return Figures()

    def _stored(self, name: str, spec: Any, data: Any) -> Any:
        return FrozenTeacher(self.network(name, spec, data), name=name)

    def stage(
        self, stage: str | Stage, make: Callable[[], Any], uses: Mapping[str, Any], *, shared: bool = True
    ) -> Any:
        outer, self._stages = self._folder, self._stages + 1
        done = (cache_folder() if shared else self.folder) / "stages" / f"{stage}-rehearsed-{self._stages}"
        self._folder = done.with_name(f"{done.name}.partial")
        self._folder.mkdir(parents=True)
        try:
            result = make()
        finally:
            self._folder.rename(done)
            self._folder = outer
        return result

    def fit(
        self,
        stage: str | Stage,
        module: TrainingModule,
        train: Any,
        spec: TrainSpec,
        *,
        evaluate: Callable[..., dict[str, float]] | None = None,
        splits: Mapping[str, Any] | None = None,
    ) -> FitResult:
        spec = spec.model_copy(update={"precision": "full", "compile": False, "trackers": []})
        accelerator = make_accelerator(spec, cpu=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accelerator.state, "device", META)
            made = _Fit(module, train, spec, accelerator, self.folder, str(stage), 0, None, splits or {}, None)
            module.train()
            patch.setattr(module, "begin_epoch", self.reading(module.begin_epoch))
            patch.setattr(made.batches, "fetch", self.reading(made.batches.fetch))
            with self.strict(stage, any(getattr(m, "host_step", None) for m in module.modules())):
                made.step(0)
            made.batches.close()
        return FitResult(Figures(), 1.0, spec.epochs)

    def loop(
        self,
        stage: str | Stage,
        state: Mapping[str, Any],
        step: Callable[[int], Mapping[str, Tensor]],
        steps: int,
        **_: Any,
    ) -> float:
        with self.strict(stage):
            step(0)
        return 1.0

    def reading(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The same function, which may read."""

        def wrapped(value: Any) -> Any:
            with self.reads:
                return call(value)

        return wrapped

    @contextmanager
    def strict(self, stage: str | Stage, allowed: bool = False) -> Iterator[None]:
        """Inside, reads by the host raise, unless an objective declares them (`host_step`)."""
        with plain(), HostReads(mixing=False) if allowed or self.reads_in_steps else nullcontext():
            yield
        self.trained_stages.append(str(stage))


class CpuGenerators:
    """torch, in which a generator of the meta device is one of the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def Generator(self, device: Any = "cpu") -> torch.Generator:
        return torch.Generator("cpu" if torch.device(device) == META else device)


def run_plainly(call: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.Module.__call__` that runs a network without values, which is fast."""

    def wrapped(module: nn.Module, *arguments: Any, **named: Any) -> Any:
        mode = torch.utils._python_dispatch._get_current_dispatch_mode()
        if not isinstance(mode, HostReads) or not mode.mixing or not any(p.device == META for p in module.parameters()):
            return call(module, *arguments, **named)
        arguments, named = mode.moved(arguments), mode.moved(named)
        try:
            with plain():
                return call(module, *arguments, **named)
        except (NotImplementedError, RuntimeError):  # a network that reads, which it may here
            return call(module, *arguments, **named)

    return wrapped


@contextmanager
def on_meta(cache: Path) -> Iterator[None]:
    """Inside, networks by name are built on the meta device, without published weights and checkpoints."""

    def built(original: Callable[..., nn.Module], published: bool = True) -> Callable[..., nn.Module]:
        def make(name: str, classes: Any, shape: Any, options: Any, *rest: Any) -> nn.Module:
            kept = {k: v for k, v in options.items() if k not in ("weights_backbone", "backbone_weights")}
            if name in made_up_data.CONFIGS:
                name, published_options = made_up_data.config_of(name)
                kept = {**published_options, **kept}
            with plain(), META:
                return original(name, classes, shape, kept, *([False] if published else []))

        return make

    with pytest.MonkeyPatch.context() as patch:
        for name in ("from_timm", "from_torchvision", "from_transformers"):
            patch.setattr(sources, name, built(getattr(sources, name)))
        patch.setattr(models, "build_own", built(models.build_own, published=False))
        patch.setattr(tokenizer, "_published", made_up_data.published_tokenizer)
        patch.setattr(models, "load_weights", lambda *a, **k: None)
        patch.setattr(weights, "load_fitting", lambda *a, **k: [])
        patch.setattr(FrozenTeacher, "fingerprint", lambda self: "rehearsed")
        patch.setattr(Loader, "workers", property(lambda self: 0, lambda self, count: None), raising=False)
        patch.setattr(nn.Module, "__call__", run_plainly(nn.Module.__call__))
        patch.setattr(randomness, "torch", CpuGenerators())
        patch.setenv("STILLHOUSE_CACHE", str(cache))
        for check in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):  # which look into every mask
            patch.setattr(f"transformers.masking_utils.{check}", lambda *a, **k: False, raising=False)
        patch.setattr(torch, "_sample_dirichlet", lambda x, generator=None: torch.rand_like(x))  # has no meta kernel
        patch.setattr(cost, "file_size", lambda path: 0)
        patch.setattr(cost, "_seconds", lambda work, device: 1.0)
        patch.setattr(cost, "peak_of_tensors", lambda work, device: (work(), 0)[1])
        patch.setattr(cost, "latency", lambda *a, **k: {"median": 1.0, "low": 1.0, "high": 1.0})
        patch.setattr(stages, "_tensor_hash", lambda x: "rehearsed")
        yield


def rehearse(config: MethodConfig, folder: Path, made_up: bool, reads_in_steps: bool = False) -> list[str]:
    """Run a recipe so; the names of the stages that took a step.

    Args:
        made_up: whether data that has a row in `made_up_data` is made up, not read.
        reads_in_steps: whether steps may read tensors.
    """
    run = Rehearsal(folder, config, made_up, reads_in_steps)
    method = catalog.method(config.method)
    with on_meta(folder / "cache"), run.reads:
        product = method.run(config, run)
        if product.kind != "student":  # judged by plain evaluation, which the trainings above have had
            run.evaluated(product)
    return run.trained_stages
