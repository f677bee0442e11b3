"""Efficient feature distillation for detection of classes without boxes: `method.py` tells the story."""

from stillhouse.methods.dense.ezad.method import EZAD, Config

__all__ = ["EZAD", "Config"]
