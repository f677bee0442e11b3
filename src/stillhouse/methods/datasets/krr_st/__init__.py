"""KRR-ST (arXiv 2310.06511): `method.py` has the card and the procedure."""

from stillhouse.methods.datasets.krr_st.method import Config, SelfSupervisedDistillation
from stillhouse.methods.datasets.krr_st.product import RepresentationSet

__all__ = ["Config", "RepresentationSet", "SelfSupervisedDistillation"]
