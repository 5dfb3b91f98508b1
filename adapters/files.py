"""An adapter's three files, written so that no half is left behind and read as if a stranger had sent them."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load, save
from torch import Tensor

from .config import AdapterConfig, WeightsConfig
from .errors import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter.safetensors"
CARD_NAME = "README.md"
MAX_CONFIG_BYTES = 2**20
MAX_WEIGHTS_BYTES = 2**30
MAX_CARD_BYTES = 2**20
MAX_HEADER_BYTES = 2**20  # some 10,000 tensors; an adapter has dozens
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
CACHED = re.compile(r"(models|datasets|spaces)--.+/snapshots/[0-9a-f]{40}")  # a commit's folder in the hub's cache


def write_adapter(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Callable[[WeightsConfig], AdapterConfig],
    card: Callable[[AdapterConfig], str],
) -> Path:
    """Write the weights, the card and the config, each under a temporary name and then renamed; returns the folder.

    `config` is called with the length and SHA-256 of the weights, `card` with the config. The config goes last: without
    it, or with an older one, the folder does not load.

    Raises AdapterError when the folder cannot be written, or the weights are larger than what is read.
    """
    folder = Path(folder)
    weights = save({name: value.detach().cpu().contiguous().clone() for name, value in sorted(tensors.items())})
    described = config(WeightsConfig(len(weights), hashlib.sha256(weights).hexdigest()))
    if len(weights) > MAX_WEIGHTS_BYTES:
        raise AdapterError(
            f"this adapter's tensors take {len(weights)} bytes, and none of more than {MAX_WEIGHTS_BYTES} is read: give its "
            "heads smaller options, such as structure='diag' for laplace"
        )
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
    content = _content(path, MAX_CONFIG_BYTES)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path} ({len(content)} bytes) cannot be read as text: {error}") from error
    return AdapterConfig.from_json(text, str(path))


def read_weights(folder: str | os.PathLike[str], expected: WeightsConfig) -> dict[str, Tensor]:
    """The tensors of a folder's adapter.safetensors, after its length and SHA-256 were found as in the config.

    Raises AdapterError when the file is missing, of another length (truncated), changed, not safetensors, or holds
    values that are not finite.
    """
    path = Path(folder) / WEIGHTS_NAME
    content = _content(path, MAX_WEIGHTS_BYTES, expected.bytes)
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected.sha256:
        raise AdapterError(
            f"{path} was changed after it was written: its SHA-256 is {digest}, its config says {expected.sha256}; "
            "do not use it, get the adapter again"
        )
    try:
        tensors = load(content)  # the very bytes that were checked, not the file once more
    except Exception as error:  # safetensors' own error, and KeyError or TypeError for dtypes torch has not
        raise AdapterError(f"{path} is not a safetensors file: {type(error).__name__}: {error}") from error
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            raise AdapterError(f"{path}: the tensor {name!r} is {value.dtype}, which no adapter holds")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AdapterError(f"{path}: the tensor {name!r} holds values that are not finite: fit the adapter again")
    return tensors


def read_card(folder: str | os.PathLike[str]) -> str | None:
    """The text of a folder's README.md; None without one. Raises AdapterError when it is no text or far too large."""
    path = Path(folder) / CARD_NAME
    if not os.path.lexists(path):
        return None
    try:
        return _content(path, MAX_CARD_BYTES).decode()
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path} cannot be read as text: {error}") from error


def commit_of(folder: Path) -> str | None:
    """The commit that a folder in the hub's cache holds; None for another folder."""
    return folder.name if CACHED.fullmatch("/".join(folder.absolute().parts[-3:])) else None


def _content(path: Path, largest: int, expected: int | None = None) -> bytes:
    """The bytes of a file of an adapter: a regular file, at most `largest` bytes long, that lies in the folder.

    With `expected` it is a safetensors file of that length, with a header of a reasonable one.
    """
    try:
        with _opened(path) as (file, size):
            if size > largest:
                raise AdapterError(f"{path} has {size} bytes, more than any adapter needs ({largest}); it was not read")
            if expected is not None:
                _check_length(file, size, expected, path)
            return file.read(size)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file, open, and its length. A link is followed in the folder, and in the hub's cache to the repository's blobs."""
    if not os.path.lexists(path):
        raise AdapterError(
            f"{path} is missing: an adapter is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, as save_pretrained "
            "writes it"
        )
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(home) for home in _homes(Path(os.path.realpath(path.parent)))):
        raise AdapterError(
            f"{path} is a link to a file outside the adapter's folder, and is not followed: put a copy of the file there"
        )
    # what is there now may be no file any more: not waiting for a pipe, not following a link
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(target, flags)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise AdapterError(f"{path} is no regular file (but a folder, a pipe or a device), and was not read")
        with open(handle, "rb", closefd=False) as file:
            yield file, found.st_size
    finally:
        os.close(handle)


def _homes(folder: Path) -> list[Path]:
    """Where the files of an adapter may lie. The hub's cache links a commit's files to blobs that commits share, of the
    repository or (with Xet) of the whole cache."""
    if not CACHED.fullmatch("/".join(folder.parts[-3:])):
        return [folder]
    repository = folder.parents[1]
    return [folder, repository / "blobs", repository.parent / "blobs"]


def _check_length(file: BinaryIO, size: int, expected: int, path: Path) -> None:
    if size != expected:
        raise AdapterError(
            f"{path} has {size} bytes, its config says {expected}: the file is truncated or of another adapter; "
            "copy or download it again"
        )
    header = int.from_bytes(file.read(8), "little")
    if header > min(
        size, MAX_HEADER_BYTES
    ):  # parsing one of 100 MB, which safetensors allows, takes seconds and gigabytes
        raise AdapterError(f"{path} is not a safetensors file: its header is said to have {header} bytes")
    file.seek(0)
