"""How a synthetic set is judged: by networks trained on it from scratch."""
