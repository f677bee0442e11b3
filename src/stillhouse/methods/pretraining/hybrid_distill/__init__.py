"""Hybrid Distill (arXiv 2306.15876): `method.py` has the card and the procedure."""

from stillhouse.methods.pretraining.hybrid_distill.method import Config, HybridDistillation

__all__ = ["Config", "HybridDistillation"]
