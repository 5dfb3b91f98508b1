"""Experiments and the demo, each one readable file with its launch line, its cost and the result to expect."""
