"""Procedures that distil networks which embed images and texts, or that learn from them: one paper, one file or one
folder."""
