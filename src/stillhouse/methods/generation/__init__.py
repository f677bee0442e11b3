"""Papers whose student generates: images, clips."""
