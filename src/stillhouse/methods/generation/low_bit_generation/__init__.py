"""Generators of few bits, the study of TopKLD (arXiv 2501.06218): `method.py` has the card and the procedure."""

from stillhouse.methods.generation.low_bit_generation.method import Config, LowBitGeneration
from stillhouse.methods.generation.low_bit_generation.product import LowBitGenerator

__all__ = ["Config", "LowBitGeneration", "LowBitGenerator"]
