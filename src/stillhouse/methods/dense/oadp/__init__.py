"""An object-aware distillation pyramid for open-vocabulary detection: `method.py` tells the story."""

from stillhouse.methods.dense.oadp.method import OADP, Config

__all__ = ["OADP", "Config"]
