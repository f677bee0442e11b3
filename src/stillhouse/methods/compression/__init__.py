"""Procedures that make what a model holds smaller: its embedding tables."""
