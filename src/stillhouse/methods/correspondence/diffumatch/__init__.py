"""DiffuMatch (arXiv 2507.23715): `method.py` has the card and the procedure."""

from stillhouse.methods.correspondence.diffumatch.method import Config, DiffuMatch
from stillhouse.methods.correspondence.diffumatch.product import ShapeMatcher

__all__ = ["Config", "DiffuMatch", "ShapeMatcher"]
