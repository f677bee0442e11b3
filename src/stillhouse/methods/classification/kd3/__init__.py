"""KD^3 (arXiv 2307.11469): `method.py` has the card and the procedure."""

from stillhouse.methods.classification.kd3.method import KD3, Config
from stillhouse.methods.classification.kd3.student import SharedStudent

__all__ = ["KD3", "Config", "SharedStudent"]
