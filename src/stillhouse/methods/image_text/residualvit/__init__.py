"""ResidualViT; `method.py` tells the story."""

from stillhouse.methods.image_text.residualvit.encoder import VideoEncoder
from stillhouse.methods.image_text.residualvit.method import ResidualViT, VideoProduct

__all__ = ["ResidualViT", "VideoEncoder", "VideoProduct"]
