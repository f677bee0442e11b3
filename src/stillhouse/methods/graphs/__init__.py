"""Procedures for graphs: networks on them distilled into students that need none, and small graphs in place of large
ones."""
