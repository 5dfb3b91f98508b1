"""Adapters on the hub."""

from .pull import pull

__all__ = ["pull"]
