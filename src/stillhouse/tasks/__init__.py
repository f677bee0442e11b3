"""Tasks: what is predicted and all that follows from it, without samples. A file a task; `base` has what they share."""
