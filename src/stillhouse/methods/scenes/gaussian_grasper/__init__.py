"""GaussianGrasper (arXiv 2403.09637): `method.py` has the card and the procedure."""

from stillhouse.methods.scenes.gaussian_grasper.method import Config, GaussianGrasper
from stillhouse.methods.scenes.gaussian_grasper.product import GaussianScene

__all__ = ["Config", "GaussianGrasper", "GaussianScene"]
