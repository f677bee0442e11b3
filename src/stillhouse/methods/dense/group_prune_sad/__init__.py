"""Group channel pruning and spatial attention distillation: `method.py` tells the story."""

from stillhouse.methods.dense.group_prune_sad.method import Config, GroupPruning

__all__ = ["Config", "GroupPruning"]
