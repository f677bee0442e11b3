"""`Splits`: what every bundle is, whatever its samples are: a data set in parts with fixed names, of which some are
absent."""

from __future__ import annotations

from collections.abc import Collection

from stillhouse.errors import UserError, unknown

SPLITS = ("train", "holdout", "val", "test", "unlabelled")


class Splits:
    """The base of bundles.

    Attributes:
        name: of the data set, as in the recipe.
        splits: the names of those that are there, or a mapping of them.
    """

    name: str
    splits: Collection[str]

    def has(self, split: str) -> bool:
        """Whether there is such a split. Raises `UserError` for a word that is no split's."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        return split in self.splits

    def require(self, split: str) -> None:
        """Raises `UserError` for a split that this data set does not have."""
        if not self.has(split):
            how = f"; set data.{split}, such as data.{split}=0.1" if split in ("holdout", "val") else ""
            raise UserError(f"The data set '{self.name}' has no {split} split{how}.")
