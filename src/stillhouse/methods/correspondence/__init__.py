"""Correspondence: which point of one shape, or of one image, is which of another."""
