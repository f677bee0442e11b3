"""JEPA bias (arXiv 2407.03475): `method.py` has the card and the procedure."""

from stillhouse.methods.pretraining.jepa_bias.method import Config, LinearDynamics
from stillhouse.methods.pretraining.jepa_bias.study import DynamicsStudy

__all__ = ["Config", "DynamicsStudy", "LinearDynamics"]
