"""Adaptive computation modules (arXiv 2312.10193): `method.py` has the card and the procedure."""

from stillhouse.methods.compression.acm.method import AdaptiveComputation, AdaptiveStudent, Config

__all__ = ["AdaptiveComputation", "AdaptiveStudent", "Config"]
