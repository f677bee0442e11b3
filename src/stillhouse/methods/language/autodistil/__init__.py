"""AutoDistil (arXiv 2201.12507): `method.py` has the card and the procedure."""

from stillhouse.methods.language.autodistil.method import AutoDistil, Config, SubNetStudent

__all__ = ["AutoDistil", "Config", "SubNetStudent"]
