"""Procedures for graphs: networks on them taught to students without one, and small graphs in place of large ones."""
