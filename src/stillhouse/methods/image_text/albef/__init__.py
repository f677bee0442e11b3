"""ALBEF; `method.py` tells the story."""

from stillhouse.methods.image_text.albef.method import Albef
from stillhouse.methods.image_text.albef.training import FusionTraining

__all__ = ["Albef", "FusionTraining"]
