"""DistillDIFT (arXiv 2412.03512): `method.py` has the card and the procedure."""

from stillhouse.methods.correspondence.distilldift.method import Config, DistillDIFT
from stillhouse.methods.correspondence.distilldift.product import ImageMatcher

__all__ = ["Config", "DistillDIFT", "ImageMatcher"]
