"""HARD (arXiv 2305.14890): `method.py` has the card and the procedure."""

from stillhouse.methods.classification.hard.method import HARD, Config

__all__ = ["HARD", "Config"]
