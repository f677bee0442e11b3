"""Distiller (arXiv 2109.11105): `method.py` has the card and the procedure."""

from stillhouse.methods.language.distiller.method import Config, Distiller

__all__ = ["Config", "Distiller"]
