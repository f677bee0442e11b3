"""TinyCLIP; `method.py` tells the story."""

from stillhouse.methods.image_text.tinyclip.method import TinyClip, affinity_losses, mimicking_loss

__all__ = ["TinyClip", "affinity_losses", "mimicking_loss"]
