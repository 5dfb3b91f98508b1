"""Heads: one method, one file, the same small surface."""
