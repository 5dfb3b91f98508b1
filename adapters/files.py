"""An adapter's three files, written so that no half is left behind and read as if a stranger had sent them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import AdapterConfig, WeightsConfig
from .errors import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter.safetensors"
CARD_NAME = "README.md"
MAX_CONFIG_BYTES = 2**22
MAX_WEIGHTS_BYTES = 2**32


def write_adapter(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Callable[[WeightsConfig], AdapterConfig],
    card: Callable[[AdapterConfig], str],
) -> Path:
    """Write the weights, the card and the config, each under a temporary name and then renamed; returns the folder.

    `config` is called with the length and SHA-256 of the weights, `card` with the config. The config goes last: without
    it, or with an older one, the folder does not load.

    Raises AdapterError when the folder cannot be written.
    """
    folder = Path(folder)
    weights = save({name: value.detach().cpu().contiguous().clone() for name, value in sorted(tensors.items())})
    described = config(WeightsConfig(len(weights), hashlib.sha256(weights).hexdigest()))
    text = described.to_json()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / WEIGHTS_NAME, weights)
        replace_file(folder / CARD_NAME, card(described).encode())
        replace_file(folder / CONFIG_NAME, text.encode())
    except OSError as error:
        raise AdapterError(f"cannot write the adapter to {folder}: {error}") from error
    return folder


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to a temporary name beside `path`, then rename it there: the file is the old one or the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """The checked adapter_config.json of a folder.

    Raises AdapterError when it is missing, too large, or not a valid config of this schema.
    """
    path = Path(folder) / CONFIG_NAME
    size = _size(path, MAX_CONFIG_BYTES)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} ({size} bytes) cannot be read as text: {error}") from error
    return AdapterConfig.from_json(text, str(path))


def read_weights(folder: str | os.PathLike[str], expected: WeightsConfig) -> dict[str, Tensor]:
    """The tensors of a folder's adapter.safetensors, after its length and SHA-256 were found as in the config.

    Raises AdapterError when the file is missing, of another length (truncated), changed, not safetensors, or holds
    values that are not finite.
    """
    path = Path(folder) / WEIGHTS_NAME
    size = _size(path, MAX_WEIGHTS_BYTES)
    if size != expected.bytes:
        raise AdapterError(
            f"{path} has {size} bytes, its config says {expected.bytes}: the file is truncated or of another adapter; "
            "copy or download it again"
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected.sha256:
        raise AdapterError(
            f"{path} was changed after it was written: its SHA-256 is {digest}, its config says {expected.sha256}; "
            "do not use it, get the adapter again"
        )
    del content
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{path} is not a safetensors file: {error}") from error
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AdapterError(f"{path}: the tensor {name!r} holds values that are not finite: fit the adapter again")
    return tensors


def _size(path: Path, largest: int) -> int:
    if not path.is_file():
        raise AdapterError(
            f"{path} is missing: an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as save_pretrained "
            "writes it"
        )
    size = path.stat().st_size
    if size > largest:
        raise AdapterError(f"{path} has {size} bytes, more than any adapter needs ({largest}); it was not read")
    return size
