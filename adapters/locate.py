"""From what a user gives to `load` to a folder on disk, and from a model to the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import AdapterError, OptionError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://.*", re.I)
Puller = Callable[[str, str | None], Path]
Pusher = Callable[..., str]
_hubs: list[tuple[Puller, Pusher]] = []


def register_hub(pull: Puller, push: Pusher) -> None:
    """Say how a hub id becomes a folder, and how a model gets there. The public face does; adapters themselves know no hub."""
    _hubs[:] = [(pull, push)]


def publish(model: Any, repo_id: str, **options: Any) -> str:
    """A model to the hub, by what `register_hub` was given."""
    if not _hubs:
        raise AdapterError("no hub is known: import posthoc, which brings it")
    return _hubs[0][1](model, repo_id, **options)


def is_address(name: str | os.PathLike[str]) -> bool:
    """Whether it is an address with a protocol (fsspec's), not a path of this machine."""
    return isinstance(name, str) and ADDRESS.fullmatch(name) is not None


def locate(folder_or_hub_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The adapter's folder: an existing folder as it is, else the folder an address or a hub id was downloaded to.

    Raises AdapterError when it is neither, or cannot be downloaded, OptionError for a `revision` of what is on no hub.
    """
    folder = _folder(folder_or_hub_id)
    name = os.fspath(folder_or_hub_id)
    if revision is not None and (folder is not None or is_address(name)):
        raise OptionError(
            f"revision {revision!r} was given, which only an id on the hub has; {name!r} is "
            f"{'a folder here' if folder is not None else 'an address'}"
        )
    if folder is not None:
        return folder
    if is_address(name):
        from .addresses import fetch  # it needs torch, and the face of the library does not

        return fetch(name)
    if not HUB_ID.fullmatch(name) or not _hubs:
        raise AdapterError(
            f"{name[:200]!r} is neither an existing folder nor a hub id like 'org/resnet50-kappa': give the folder that "
            "save_pretrained wrote, the id, or an address such as s3://bucket/adapter"
        )
    return _hubs[0][0](name, revision)


def _folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder of that name, if there is one; a name no file system takes (too long, an unknown ~user) is none."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None
