"""Configs of older schemas: one function from each version to the next, applied before anything is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import AdapterError

Migration = Callable[[dict[str, Any]], dict[str, Any]]
MIGRATIONS: dict[int, Migration] = {}
"""By the version it starts from, what makes the raw JSON of that version one of the next. Empty: there is only schema 1."""


def migrate(raw: dict[str, Any], current: int, where: str) -> dict[str, Any]:
    """The raw JSON of a config as schema `current` would have it, by as many steps as its `schema_version` is behind.

    Raises AdapterError for a version that is newer, that no step starts from, or whose JSON a step cannot read.
    """
    version, oldest = raw.get("schema_version"), min(MIGRATIONS, default=current)
    if type(version) is not int or not oldest <= version <= current:
        newer = type(version) is int and version > current
        hint = "it was written by a newer posthoc: upgrade with `pip install -U posthoc`" if newer else "damaged?"
        known = str(current) if oldest == current else f"{oldest} to {current}"
        raise AdapterError(
            f"{where}: schema_version is {str(version)[:20]}, this posthoc reads {known} ({hint}), or fit the adapter again"
        )
    for start in range(version, current):
        try:
            raw = {**MIGRATIONS[start](raw), "schema_version": start + 1}
        except Exception as error:  # a stranger's file may hold anything where a step expects its field
            raise AdapterError(
                f"{where}: schema {start} cannot be read as {start + 1} ({type(error).__name__}: {error}): the file is "
                "damaged or not ours"
            ) from error
    return raw
