"""Export of a product for other programs, in the formats that its kind names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stillhouse.errors import UserError, unknown
from stillhouse.runs.products import Product, load_product


def export(
    folder: str | Path,
    to: str | None = None,
    out: str | Path | None = None,
    trust_code: bool = False,
    show: Callable[[str], None] = lambda sentence: None,
) -> Path:
    """Write the product of a run, by default in the first format of its kind and next to the product.

    Args:
        show: is given what was written and what a reader should know of it, a sentence each.

    Returns:
        the file or folder.

    Raises:
        UserError: a product that no format holds, a format that it does not have, files that are there already, or a
            missing extra.
    """
    product: Product = load_product(folder, trust_code)
    formats = product.formats
    if not formats:
        raise UserError(f"Nothing writes a product of kind '{product.kind}' for other programs; {folder} holds one.")
    to = to or next(iter(formats))
    if to not in formats:
        raise unknown("export format", to, formats)
    path = Path(out) if out is not None else Path(folder) / formats[to]
    for sentence in product.export(to, path):
        show(sentence)
    return path
