"""Adapters on the hub: publish, find, download.

>>> from posthoc import hub
>>> hub.push("adapter/", "org/resnet50-kappa")  # doctest: +SKIP
>>> hub.search(backbone="resnet50.a1_in1k", head="kappa")  # doctest: +SKIP
>>> hub.pull("org/resnet50-kappa", revision="v1.0")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pulling import pull
    from .pushing import push
    from .searching import list_adapters as search

__all__ = ["pull", "push", "search"]

# The hub's client and torch take seconds to import, and the command line asks for them only when it needs them.
_HOMES = {"pull": (".pulling", "pull"), "push": (".pushing", "push"), "search": (".searching", "list_adapters")}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, called = _HOMES[name]
    value = getattr(import_module(home, __name__), called)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
