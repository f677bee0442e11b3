"""The same objectives inside somebody else's loop: `integrations.lightning` and `integrations.transformers`; for a loop
of your own, `Distillation` itself."""
