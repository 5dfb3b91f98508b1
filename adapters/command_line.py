"""The command line that asks for what a command's dataclass says, to be kept with what it made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any


def command_words(
    command: Any, name: Sequence[str], positional: Sequence[str] = (), skip: Sequence[str] = ()
) -> list[str]:
    """Words of the command: its `name`, the `positional` fields, and options that are not at their defaults.

    `skip`: fields that are left out.
    """
    said = [*name]
    for place in positional:
        said += _words(getattr(command, place))
    for one in fields(command):
        value = getattr(command, one.name)
        if one.name in (*positional, *skip) or value == one.default:
            continue
        option = one.name.replace("_", "-")
        if isinstance(value, bool):
            said.append(f"--{option}" if value else f"--no-{option}")
        else:
            said += [f"--{option}", *_words(value)]
    return said


def _words(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, tuple) else (value,))]


def published(words: Sequence[str]) -> list[str]:
    """The words for what others will read: of a path of this machine its last part only."""
    return [Path(word).name if word.startswith(("/", "~")) else word for word in words]
