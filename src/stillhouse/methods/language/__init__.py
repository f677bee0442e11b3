"""Papers about language models: the student learns from its own writing, or from what the teacher writes."""
