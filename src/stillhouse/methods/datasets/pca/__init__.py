"""PCA (arXiv 2502.06434): `method.py` has the card and the procedure."""

from stillhouse.methods.datasets.pca.method import Config, PruneCombineAugment
from stillhouse.methods.datasets.pca.product import PackedSet

__all__ = ["Config", "PackedSet", "PruneCombineAugment"]
