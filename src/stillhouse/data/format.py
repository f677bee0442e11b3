"""`load`: the data set that a spec names, by the format that its scheme stands for.

A format is a module of `stillhouse.data.formats`, or one of another package by an entry point of the group
`stillhouse.data` (scheme = module). It has what `Format` lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from stillhouse import catalog
from stillhouse.config.messages import spell
from stillhouse.config.specs import DataSpec, NamedSpec, Spec
from stillhouse.data.source import find_root
from stillhouse.errors import UserError
from stillhouse.tasks.base import Task

EVERY_FORMAT = frozenset({"name", "root", "size", "test_size", "holdout", "val", "seed", "workers", "options"})
"""Keys of `DataSpec` that every format heeds; the others are heeded by those that list them in `KEYS`."""


class Bundle(Protocol):
    """A data set ready for use: samples of a task, in splits.

    Attributes:
        name: as in the recipe.
        task: what is predicted.
        fingerprint: a hash of the samples, their splits and labels.
        evaluation_batch: samples of a batch for judging.
    """

    name: str
    fingerprint: str

    @property
    def task(self) -> Task: ...

    @property
    def evaluation_batch(self) -> int: ...

    def has(self, split: str) -> bool: ...

    def dataset(self, split: str, *, train: bool) -> Any:
        """A split as a `BatchDataset` (see `stillhouse.data.Loader`), with training augmentation or without."""
        ...


class Format(Protocol):
    """What the module of a data format holds.

    Attributes:
        KEYS: keys of `DataSpec` that it heeds besides those of every format.
        REST: what follows the scheme and a colon in data.name, such as PATH; "" for a data set known by one word.
        Options: its data.options.
        load: (what follows the colon, the recipe's `data`, its options, the folder that holds data) -> a bundle.
    """

    KEYS: frozenset[str]
    REST: str
    Options: type[Spec]

    @staticmethod
    def load(rest: str, spec: DataSpec, options: Any, root: Path) -> Bundle: ...


class NoOptions(Spec):
    """data.options of a format that has none."""


def load(spec: NamedSpec, data_root: str | Path | None = None, seed: int = 0) -> Any:
    """The data set that a spec describes, a `Bundle` of the kind that its format makes: of labelled images a
    `DataBundle`.

    Args:
        spec: the recipe's `data`.
        data_root: the folder that holds the data, where the spec names none; default: STILLHOUSE_DATA, then the user's
            cache.
        seed: the run's, by which a graph's random split is drawn.

    Raises:
        UserError: what was asked for is not there or does not fit; the message says what and where.
    """
    if not isinstance(spec, DataSpec):
        return spec.bundle(data_root, seed)
    scheme, _, rest = spec.name.partition(":")
    found = _format(scheme)
    if found.REST and not rest:
        raise UserError(f"data.name: '{scheme}' stands for many data sets; name one as '{scheme}:{found.REST}'.")
    if rest and not found.REST:
        raise UserError(f"data.name: '{scheme}' is one data set; leave out ':{rest}'.")
    refuse_unheeded(spec, found.KEYS)
    try:
        options = found.Options.model_validate(spec.options)
    except ValidationError as error:
        raise spell(error, found.Options, "data.options") from None
    return found.load(rest, spec, options, find_root(spec, data_root))


def _format(scheme: str) -> Format:
    found: Any = catalog.data_format(scheme)
    lacking = [name for name in ("KEYS", "REST", "Options", "load") if name not in vars(found)]
    if lacking:
        raise UserError(f"The module '{found.__name__}' of data '{scheme}:' lacks {', '.join(lacking)}.")
    checked: Format = found
    return checked


def refuse_unheeded(spec: DataSpec, keys: frozenset[str]) -> None:
    """Raises `UserError` for a key that is set and does nothing; `augment: plain` is what every format can do."""
    for key in type(spec).model_fields:
        value = getattr(spec, key)
        without = (type(spec).model_fields[key].get_default(call_default_factory=True), "plain")
        if key not in EVERY_FORMAT | keys and value not in without:
            others = f"; besides size, val and the like it takes {', '.join(sorted(keys))}" if keys else ""
            raise UserError(f"data.{key} does nothing for '{spec.name}'; leave it out{others}.")
