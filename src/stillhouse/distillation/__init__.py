"""Signals of students and teachers turned into losses: objectives, their weights, teachers, and `Distillation`, the
module that is trained."""
