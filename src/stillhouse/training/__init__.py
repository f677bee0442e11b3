"""Training: one resumable loop, `fit` on top of it, optimisers and schedules, metrics, progress."""
