"""Optional packages: imported where they are used, missed with one clear sentence."""

from __future__ import annotations

import importlib
from typing import Any

from ..adapters.errors import PosthocError


def require(module: str, package: str, extra: str = "eval") -> Any:
    """The module, imported; raises PosthocError naming the extra of posthoc that brings it.

    >>> require("math", "math").sqrt(4.0)
    2.0
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PosthocError(f"This needs {package}, which is not installed: pip install 'posthoc[{extra}]'") from error
