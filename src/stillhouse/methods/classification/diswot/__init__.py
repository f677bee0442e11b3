"""DisWOT (arXiv 2303.15678): `method.py` has the card and the procedure."""

from stillhouse.methods.classification.diswot.method import Config, FoundStudent, SearchWithoutTraining

__all__ = ["Config", "FoundStudent", "SearchWithoutTraining"]
