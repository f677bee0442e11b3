"""Dynamic Y-KD: `method.py` tells the story."""

from stillhouse.methods.dense.dynamic_ykd.method import Config, ContinualStudent, DynamicYKD

__all__ = ["Config", "ContinualStudent", "DynamicYKD"]
