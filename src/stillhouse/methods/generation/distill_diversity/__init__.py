"""Distilling diversity and control (arXiv 2503.10637): `method.py` has the card and the procedure."""

from stillhouse.methods.generation.distill_diversity.method import Config, DistillDiversity
from stillhouse.methods.generation.distill_diversity.product import HybridGenerator

__all__ = ["Config", "DistillDiversity", "HybridGenerator"]
