"""Video-BLADE (arXiv 2508.10774): `method.py` has the card and the procedure."""

from stillhouse.methods.generation.video_blade.method import Config, VideoBlade
from stillhouse.methods.generation.video_blade.product import SparseGenerator

__all__ = ["Config", "SparseGenerator", "VideoBlade"]
