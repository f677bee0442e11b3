"""MaKD (arXiv 2501.13341): `method.py` has the card and the procedure."""

from stillhouse.methods.classification.makd.method import AspectClassifier, Config, MaKD

__all__ = ["AspectClassifier", "Config", "MaKD"]
