"""Entropic Student (arXiv 2108.11898): `method.py` has the card and the procedure."""

from stillhouse.methods.compression.entropic_student.method import Config, EntropicStudent, SplitStudent

__all__ = ["Config", "EntropicStudent", "SplitStudent"]
