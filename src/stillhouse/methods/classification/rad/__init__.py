"""RAD (arXiv 2210.01213): `method.py` has the card and the procedure."""

from stillhouse.methods.classification.rad.method import Config, QueriedStudent, RobustActiveDistillation

__all__ = ["Config", "QueriedStudent", "RobustActiveDistillation"]
