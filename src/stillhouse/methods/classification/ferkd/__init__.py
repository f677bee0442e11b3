"""FerKD (arXiv 2312.17473): `method.py` has the card and the procedure."""

from stillhouse.methods.classification.ferkd.method import Config, FerKD

__all__ = ["Config", "FerKD"]
