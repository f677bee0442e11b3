"""PVD (arXiv 2211.15977): `method.py` has the card and the procedure."""

from stillhouse.methods.scenes.pvd.method import PVD, Config
from stillhouse.methods.scenes.pvd.product import SceneField

__all__ = ["PVD", "Config", "SceneField"]
