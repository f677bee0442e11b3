"""Procedures that learn representations without labels, and the theory of what they learn: one paper, one file or one
folder."""
