"""The zoo's list (`zoo.toml`): which adapters there are, what each is fitted on, and where it is published.

posthoc.load("zoo/efficientnet-lite0-loss")
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from ..adapters.errors import AdapterError, OptionError, suggest

LIST = Path(__file__).with_name("zoo.toml")
PREFIX = "zoo/"
NAMESPACE = "POSTHOC_ZOO"
"""Environment variable: another user or organisation than the list's that has the zoo's adapters."""


@dataclass(frozen=True)
class Entry:
    """One adapter of the zoo: its name, backbone (timm's name), head, data, and the seed of all that is drawn."""

    name: str
    backbone: str
    head: str
    images: str
    split: str
    ood: tuple[str, ...]
    held_back: float
    seed: int


@cache
def _listed() -> dict[str, Any]:
    return tomllib.loads(LIST.read_text(encoding="utf-8"))


@cache
def entries() -> dict[str, Entry]:
    """All adapters by name."""
    listed = _listed()
    found = {}
    for short, backbone in listed["backbones"].items():
        data: dict[str, Any] = listed["data"][backbone["data"]]
        for head in listed["heads"]:
            name = f"{short}-{head}"
            found[name] = Entry(
                name,
                backbone["timm"],
                head,
                data["images"],
                data["split"],
                tuple(data["ood"]),
                listed["held_back"],
                listed["seed"],
            )
    return found


def chosen(names: Sequence[str]) -> list[Entry]:
    """The adapters of these names or patterns ("efficientnet-lite0-*"); all of them for none.

    Raises OptionError for a name that is in no entry.
    """
    known = entries()
    found: dict[str, Entry] = {}
    for name in names or ("*",):
        fitting = {key: entry for key, entry in known.items() if fnmatchcase(key, name)}
        if not fitting:
            raise OptionError(f"the zoo has no adapter {name!r}: {suggest(name, known)}")
        found |= fitting
    return list(found.values())


def namespace() -> str:
    """The user or organisation on the hub that has the zoo's adapters: $POSTHOC_ZOO, else the list's.

    Raises AdapterError while neither names one.
    """
    found = os.environ.get(NAMESPACE) or _listed()["namespace"]
    if not found:
        raise AdapterError(
            f"the zoo's adapters are not published yet: build them with `posthoc zoo build`, or set {NAMESPACE} to the user or "
            "organisation on the hub that has them"
        )
    return str(found)


def hub_id(name: str) -> str:
    """The id on the hub of "zoo/NAME"; any other id as it is.

    Raises AdapterError for a name that the zoo does not have.
    """
    if not name.startswith(PREFIX):
        return name
    short = name.removeprefix(PREFIX)
    if short not in entries():
        raise AdapterError(f"the zoo has no adapter {short!r}: {suggest(short, entries())}")
    return f"{namespace()}/{short}"
