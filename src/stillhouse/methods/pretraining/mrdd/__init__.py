"""MRDD (arXiv 2403.10897): `method.py` has the card and the procedure."""

from stillhouse.methods.pretraining.mrdd.method import Config, DistilledDisentangling, MultiViewEncoder

__all__ = ["Config", "DistilledDisentangling", "MultiViewEncoder"]
