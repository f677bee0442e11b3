"""Procedures for image classifiers: one paper, one file."""
