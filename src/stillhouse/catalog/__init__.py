"""The catalogue: slug -> file -> card, objective or method; and the listing of all of them."""

from stillhouse.catalog.finding import (
    Card,
    card,
    cards,
    data_format,
    list_methods,
    load_file,
    method,
    objective,
    options,
    read_card,
    task,
)

__all__ = [
    "Card",
    "card",
    "cards",
    "data_format",
    "list_methods",
    "load_file",
    "method",
    "objective",
    "options",
    "read_card",
    "task",
]
