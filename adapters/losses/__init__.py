"""Training objectives: one objective, one file, pure torch."""
