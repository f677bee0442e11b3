"""Mirage (arXiv 2310.09486): `method.py` has the card and the procedure."""

from stillhouse.methods.graphs.mirage.method import Config, GraphSet, Mirage

__all__ = ["Config", "GraphSet", "Mirage"]
