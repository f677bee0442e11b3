"""UniversalNER (arXiv 2308.03279): `method.py` has the card and the procedure."""

from stillhouse.methods.language.universal_ner.method import Config, UniversalNER

__all__ = ["Config", "UniversalNER"]
