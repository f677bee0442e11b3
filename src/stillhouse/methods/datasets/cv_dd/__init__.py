"""CV-DD (arXiv 2501.07575): `method.py` has the card and the procedure."""

from stillhouse.methods.datasets.cv_dd.method import CommitteeVoting, Config
from stillhouse.methods.datasets.cv_dd.training import CommitteeSet

__all__ = ["CommitteeSet", "CommitteeVoting", "Config"]
