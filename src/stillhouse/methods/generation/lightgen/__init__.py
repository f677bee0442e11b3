"""LightGen (arXiv 2503.08619): `method.py` has the card and the procedure."""

from stillhouse.methods.generation.lightgen.method import Config, LightGen
from stillhouse.methods.generation.lightgen.product import CaptionGenerator

__all__ = ["CaptionGenerator", "Config", "LightGen"]
