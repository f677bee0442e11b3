"""Stillhouse."""
