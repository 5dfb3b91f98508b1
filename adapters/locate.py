"""From what a user gives to `load` to a folder on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from .errors import AdapterError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
Puller = Callable[[str, str | None], Path]
_pullers: list[Puller] = []


def register_puller(pull: Puller) -> None:
    """Say how a hub id becomes a folder. The public face does; adapters themselves know no hub."""
    _pullers[:] = [pull]


def locate(folder_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The adapter's folder: an existing folder as it is, else the folder the hub id was downloaded to.

    Raises AdapterError when it is neither, or cannot be downloaded.
    """
    folder = Path(folder_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(folder_or_hub_id)
    if not HUB_ID.fullmatch(name) or not _pullers:
        raise AdapterError(
            f"{name!r} is neither an existing folder nor a hub id like 'org/resnet50-kappa': give the folder that "
            "save_pretrained wrote, or the id"
        )
    return _pullers[0](name, revision)
