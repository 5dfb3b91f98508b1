"""posthoc: honest uncertainty for any pretrained vision model, after the fact.

>>> import posthoc
>>> model = posthoc.wrap("resnet50.a1_in1k", head="kappa").fit(data)  # doctest: +SKIP
>>> model(images).uncertainty  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters.errors import NotFittedError, PosthocError
from .adapters.locate import register_hub

if TYPE_CHECKING:
    from . import hub as hub
    from .adapters import heads as heads
    from .adapters.model import UncertainModel, list_heads, load, wrap
    from .adapters.prediction import Prediction
    from .hub.searching import list_adapters

__version__ = version("posthoc")
__all__ = [
    "NotFittedError",
    "PosthocError",
    "Prediction",
    "UncertainModel",
    "heads",
    "list_adapters",
    "list_heads",
    "load",
    "wrap",
]

# torch and timm take seconds to import: what needs them is imported when it is first asked for.
_HOMES = {
    "Prediction": ".adapters.prediction",
    "UncertainModel": ".adapters.model",
    "list_adapters": ".hub.searching",
    "list_heads": ".adapters.model",
    "load": ".adapters.model",
    "wrap": ".adapters.model",
}
_MODULES = {"heads": ".adapters.heads", "hub": ".hub"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = import_module(_MODULES[name], __name__)
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


def _pull(repo_id: str, revision: str | None) -> Path:
    from .hub import pull

    return pull(repo_id, revision, card=False)


def _push(model: Any, repo_id: str, **options: Any) -> str:
    from .hub.pushing import push_model

    return push_model(model, repo_id, **options)


register_hub(_pull, _push)
