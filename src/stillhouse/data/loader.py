"""`Loader`: batches that are a function of (seed, epoch, index), the same for any number of workers and from any
starting point; `adapt` for others' loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stillhouse.data.dataset import BatchKey
from stillhouse.errors import UserError
from stillhouse.models.token_labels import TOKEN_LABELS, are_of_tokens, place
from stillhouse.randomness import key as keys
from stillhouse.randomness import keyed, permutation
from stillhouse.signals import Batch


class BatchDataset(Protocol):
    """What `Loader` needs of a data set; `IndexedDataset` is one."""

    def __len__(self) -> int: ...

    def batch(self, key: BatchKey, seed: int) -> Batch: ...

    def labels(self) -> Tensor: ...


class BatchLoader:
    """What training reads: batches that can be begun anywhere. `Loader`, `AdaptedLoader` and `Streams` are such."""

    def __len__(self) -> int:
        """Batches an epoch."""
        raise NotImplementedError

    def labels(self) -> Tensor:
        """Labels in index order."""
        raise NotImplementedError

    def batches(self, epoch: int = 0, batch: int = 0, epochs: int | None = None) -> Iterator[Batch]:
        """One stream of batches from (epoch, batch) to the end of `epochs` (None: without end)."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch (epoch 0)."""
        return self.batches(epochs=1)


class Loader(BatchLoader):
    """Batches of a data set for one process.

    Args:
        dataset: an `IndexedDataset`, or any object with its `__len__`, `batch` and `labels`.
        batch_size: samples of one batch over all processes; process `rank` of `world` gets its contiguous share.
        seed: the run's seed: of the order and the augmentation.
        shuffle: a new order every epoch; else index order.
        drop_last: drop the last, smaller batch of an epoch, unless it is the only one.
        workers: processes that make batches ahead; 0: made here, which is faster for small images in memory (about 1 ms
            a batch of CIFAR-10).

    Raises:
        UserError: a batch size that `world` does not divide.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise UserError(
                f"The batch size {batch_size} is over all {world} processes, so it must be a multiple of {world}."
            )
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.drop_last, self.workers, self.rank, self.world = drop_last, workers, rank, world

    @property
    def count(self) -> int:
        """Samples of the data set, over all processes."""
        return len(self.dataset)

    def labels(self) -> Tensor:
        """(count,) int64 labels in index order."""
        return self.dataset.labels()

    @property
    def usual_size(self) -> int:
        """Samples of a full batch in one process."""
        return self.batch_size // self.world

    @property
    def even(self) -> bool:
        """Whether all batches, in all processes, hold equally many samples."""
        return self.count % self.batch_size == 0 or (self.drop_last and self.count >= self.batch_size)

    def __len__(self) -> int:
        """Batches an epoch."""
        full, rest = divmod(self.count, self.batch_size)
        return full if full and (self.drop_last or not rest) else full + bool(rest)

    def batches(self, epoch: int = 0, batch: int = 0, epochs: int | None = None) -> Iterator[Batch]:
        """One stream of batches, over all epochs from (epoch, batch) to the end of `epochs` (None: without end);
        workers live as long as it.

        Raises:
            UserError: an empty data set, or a starting batch beyond the epoch.
        """
        if not self.count:
            raise UserError("The data set holds no samples.")
        if not 0 <= batch <= len(self):
            raise UserError(
                f"Cannot start at batch {batch} of an epoch of {len(self)} batches; were the data or the batch size "
                "changed?"
            )
        return self._stream(_Stream(self, epoch, batch, epochs))

    def _stream(self, stream: _Stream) -> Iterator[Batch]:
        if not self.workers:
            for key in stream:
                yield self.dataset.batch(key, self.seed)
            return
        made: DataLoader[Any] = DataLoader(
            _Make(self.dataset, self.seed),  # type: ignore[arg-type]
            batch_sampler=stream,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_as_made,
            generator=torch.Generator(),  # its own, so that the default generator is not drawn from
            pin_memory=torch.cuda.is_available(),
        )
        for batch in made:
            if isinstance(batch, UserError):
                raise batch
            yield batch


class _Stream:
    """The keys of a process's batches, in order."""

    def __init__(self, loader: Loader, epoch: int, batch: int, epochs: int | None) -> None:
        self._loader, self._start, self._epochs = loader, (epoch, batch), epochs

    def __iter__(self) -> Iterator[BatchKey]:
        loader, (epoch, first) = self._loader, self._start
        count, size, share = loader.count, loader.batch_size, loader.batch_size // loader.world
        while self._epochs is None or epoch < self._epochs:
            order = np.array(
                permutation(count, loader.seed, "order", epoch) if loader.shuffle else range(count), dtype=np.int64
            )
            for number in range(first, len(loader)):
                indices = order[number * size : (number + 1) * size]
                if len(indices) == size:
                    yield BatchKey(epoch, indices, loader.rank * share, (loader.rank + 1) * share)
                else:
                    yield BatchKey(epoch, indices, *_part(len(indices), loader.rank, loader.world))
            epoch, first = epoch + 1, 0


def _part(n: int, rank: int, world: int) -> tuple[int, int]:
    """A process's part of a partial batch: sizes differ by one at most; with fewer samples than processes, each gets
    one and some are repeated."""
    if n < world:
        return rank % n, rank % n + 1
    return rank * n // world, (rank + 1) * n // world


class _Make:
    """What a worker runs; a user's error comes back as a value, so that its sentence arrives without the worker's
    traceback."""

    def __init__(self, dataset: BatchDataset, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitems__(self, key: BatchKey) -> Batch | UserError:
        try:
            return self._dataset.batch(key, self._seed)
        except UserError as error:
            return UserError(str(error))


def _as_made(batch: Any) -> Any:
    return batch


def adapt(loader: Iterable[Any], seed: int = 0, student: nn.Module | None = None) -> BatchLoader:
    """A user's own DataLoader, or any sized iterable of batches, with the interface of `Loader`.

    A batch may be a tuple (input, label), a tensor, or a mapping with `input` and `label` (and `index`), or one as
    transformers models take (`pixel_values` or `input_ids`, …, `labels`; token labels need the `student`, see
    `as_batch`).

    Raises:
        UserError: something that cannot be iterated, or only once.

    >>> next(adapt([(torch.zeros(2, 3), torch.tensor([0, 1]))]).batches())["label"]
    tensor([0, 1])
    """
    return loader if isinstance(loader, BatchLoader) else AdaptedLoader(loader, seed, student)


class AdaptedLoader(BatchLoader):
    """Batches of a loader made elsewhere.

    Its random numbers (order, augmentation) are drawn under keys of (seed, epoch, batch), so that they are the same
    from run to run and after a resume, whatever training draws in between; a start in mid-epoch makes and drops the
    batches before. Generators that the loader or its sampler hold are seeded again every epoch.
    """

    def __init__(self, loader: Iterable[Any], seed: int = 0, student: nn.Module | None = None) -> None:
        if not isinstance(loader, Iterable) or isinstance(loader, str | bytes | Mapping):
            raise UserError(
                f"Training data must be a DataLoader or another iterable of batches; given: {type(loader).__name__}."
            )
        if isinstance(loader, Iterator):
            raise UserError(
                f"A {type(loader).__name__} can be read only once; give a DataLoader, or a list of batches."
            )
        self.loader, self.seed, self.student = loader, seed, student

    def __len__(self) -> int:
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError:
            raise UserError(
                f"The length of the {type(self.loader).__name__} is not known; give a loader with a length (batches "
                "an epoch)."
            ) from None

    even = False  # not known
    usual_size = 1

    @property
    def batch_size(self) -> int | None:
        """The loader's own, where it says so."""
        return getattr(self.loader, "batch_size", None)

    @property
    def count(self) -> int:
        """Samples of the loader's data set. Raises `UserError` where it does not say."""
        try:
            return len(self.loader.dataset)  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            raise UserError(
                "This loader does not say how many samples it has; give a DataLoader over a data set with a length."
            ) from None

    def labels(self) -> Tensor:
        """(count,) int64 labels of the loader's data set. Raises `UserError` where it does not hold them as `targets`,
        `labels` or its last tensor."""
        dataset = getattr(self.loader, "dataset", None)
        tensors = getattr(dataset, "tensors", None)
        found = next(
            (getattr(dataset, n) for n in ("targets", "labels") if hasattr(dataset, n)),
            tensors[-1] if tensors else None,
        )
        if found is None or callable(found):
            raise UserError(
                "The labels of this loader's data set are not known without reading it; give the data set an "
                "attribute `targets`."
            )
        return torch.as_tensor(found).to(torch.int64)

    def batches(self, epoch: int = 0, batch: int = 0, epochs: int | None = None) -> Iterator[Batch]:
        """One stream of batches from (epoch, batch) to the end of `epochs` (None: without end)."""
        while epochs is None or epoch < epochs:
            self._reseed(epoch)
            number, source = 0, None
            while True:
                with keyed(self.seed, "order", epoch, number):
                    source = iter(self.loader) if source is None else source
                    made = next(source, None)
                if made is None:
                    break
                if number >= batch:
                    yield as_batch(made, self.student)
                number += 1
            if not number:
                raise UserError("The data set holds no samples.")
            epoch, batch = epoch + 1, 0

    def _reseed(self, epoch: int) -> None:
        sampler = getattr(self.loader, "sampler", None)
        for generator in {
            id(g): g for g in (getattr(self.loader, "generator", None), getattr(sampler, "generator", None))
        }.values():
            if isinstance(generator, torch.Generator):
                generator.manual_seed(keys(self.seed, "order", epoch))
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def as_batch(made: Any, student: nn.Module | None = None) -> Batch:
    """A batch as a mapping with `input` and, where there is one, `label`.

    Token labels of a transformers batch, (B, L) under `labels`, depend on the student (see
    `stillhouse.models.token_labels`): without it they stay under `labels` for `Distillation` to place.

    Raises:
        UserError: what cannot be read so, or (on the CPU) soft labels that are no probabilities, such as those of
            several classes at once.
    """
    batch = _as_batch(made, student)
    label = batch.get("label")
    if isinstance(label, Tensor) and label.device.type == "cpu" and label.ndim == 2 and label.is_floating_point():
        sums = label.float().sum(1)
        wrong = ((sums - 1).abs() > 1e-2).nonzero()
        if len(wrong):
            raise UserError(
                f"The labels of a batch have shape {tuple(label.shape)}, so each row must hold the probabilities of a "
                "sample's classes; row "
                f"{int(wrong[0])} sums to {float(sums[wrong[0]]):.3g}. Several classes a sample (multi-hot labels) "
                "are for recipes with data.name: multilabel:PATH, and real targets are not supported: give class ids, "
                "or hand them to an objective of your own under another key of the batch."
            )
    return batch


def _as_batch(made: Any, student: nn.Module | None) -> Batch:
    if isinstance(made, Mapping):
        return _placed(dict(made) if "input" in made else _by_keyword(made), student)
    if isinstance(made, Tensor):
        return {"input": made}
    if isinstance(made, tuple | list) and 1 <= len(made) <= 2:
        return dict(zip(("input", "label"), made))
    what = f"{type(made).__name__} of {len(made)}" if isinstance(made, tuple | list) else type(made).__name__
    raise UserError(
        f"A batch must be (input, label), or a mapping with 'input' and 'label'; the loader gives a {what}."
    )


def _by_keyword(made: Mapping[str, Any]) -> Batch:
    """A batch as transformers models take it: what is no label and no index is passed by keyword."""
    rest = dict(made)
    label = rest.pop("labels", rest.pop("label", None))
    index = rest.pop("index", None)
    named = {TOKEN_LABELS if are_of_tokens(label) and "labels" in made else "label": label, "index": index}
    return {"input": rest, **{key: value for key, value in named.items() if value is not None}}


def _placed(batch: Batch, student: nn.Module | None) -> Batch:
    return batch if student is None else place(batch, student)
