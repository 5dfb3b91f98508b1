"""Adapters on the Hugging Face hub."""
