"""Adapters at any fsspec address (`memory://`, `s3://`, `file://`, ...), by the same calls as folders.

The library asks for nothing more than reading, writing and renaming; a driver such as s3fs is the user's to install.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from .errors import AdapterError
from .files import (
    CARD_NAME,
    CONFIG_NAME,
    MAX_CARD_BYTES,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_NAME,
    read_config,
    replace_file,
)
from .store import default_cache_dir


def fetch(address: str) -> Path:
    """A folder of this machine with the adapter of that address; `file://` names one itself.

    The config is checked before the weights are read, and no more bytes are read than any adapter has. Raises AdapterError
    for an address without an adapter, an unknown protocol and a missing driver.
    """
    with _told(address, "read"):
        files, root = fsspec.url_to_fs(address)
        if "file" in _protocols(files):
            return Path(root)
        folder = default_cache_dir() / ".adapters" / hashlib.sha256(address.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        config = _content(files, f"{root}/{CONFIG_NAME}", MAX_CONFIG_BYTES, address)
        replace_file(folder / CONFIG_NAME, config)
        read_config(folder)
        replace_file(folder / WEIGHTS_NAME, _content(files, f"{root}/{WEIGHTS_NAME}", MAX_WEIGHTS_BYTES, address))
        if files.exists(f"{root}/{CARD_NAME}"):
            replace_file(folder / CARD_NAME, _content(files, f"{root}/{CARD_NAME}", MAX_CARD_BYTES, address))
        return folder


def store(folder: Path, address: str) -> str:
    """Copies a folder's adapter to an address, the config last: half an adapter does not load. Returns the address."""
    with _told(address, "write"):
        files, root = fsspec.url_to_fs(address)
        files.makedirs(root, exist_ok=True)
        for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
            part = f"{root}/.{name}.{os.getpid()}.part"
            files.pipe_file(part, (folder / name).read_bytes())
            files.mv(part, f"{root}/{name}")
    return address


def _content(files: Any, path: str, largest: int, address: str) -> bytes:
    if not files.exists(path):
        raise AdapterError(
            f"{address} has no {path.rpartition('/')[2]}: an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as "
            "save_pretrained writes it"
        )
    size = files.size(path)
    if size is None or size > largest:
        raise AdapterError(
            f"{path} of {address} has {size} bytes, more than any adapter needs ({largest}); it was not read"
        )
    with files.open(path, "rb") as file:
        return file.read(largest)


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


@contextmanager
def _told(address: str, action: str) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except ImportError as error:
        raise AdapterError(f"cannot {action} {address}: {error}") from error
    except Exception as error:  # every driver has errors of its own
        raise AdapterError(f"cannot {action} {address}: {type(error).__name__}: {error}") from error
