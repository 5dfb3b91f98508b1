"""Ways to change a good adapter into a hostile one; the list of them is in hostile_adapters.py."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from posthoc.adapters import files

Change = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """`change` is applied to a copy of the good adapter and may answer with another address; `intact`: it must load to the
    same scores; `other`: it may load, to other scores, which are finite; `own`: whether a backbone is given to `load`."""

    name: str
    change: Change
    intact: bool = False
    other: bool = False
    own: bool = True


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / files.CONFIG_NAME).read_text())


def write_config(folder: Path, raw: Any) -> None:
    (folder / files.CONFIG_NAME).write_text(raw if isinstance(raw, str) else json.dumps(raw))


def write_weights(folder: Path, content: bytes, repair: bool = True) -> None:
    """New weights, by default with a config that knows their length and digest."""
    (folder / files.WEIGHTS_NAME).write_bytes(content)
    if repair:
        raw = config(folder)
        raw["weights"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_config(folder, raw)


def weights(folder: Path) -> bytes:
    return (folder / files.WEIGHTS_NAME).read_bytes()


# Weights: damaged


def truncated(share: float, repair: bool) -> Change:
    def change(folder: Path) -> None:
        content = weights(folder)
        write_weights(folder, content[: int(len(content) * share)], repair)

    return change


def flipped(place: float | int, bit: int, repair: bool, header: bool = False) -> Change:
    def change(folder: Path) -> None:
        content = bytearray(weights(folder))
        length = int.from_bytes(content[:8], "little") if header else len(content)
        at = place if isinstance(place, int) else 8 * header + int(length * place)
        content[at] ^= 1 << bit
        write_weights(folder, bytes(content), repair)

    return change


def headed(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """The header edited as JSON, the data as it was."""

    def change(folder: Path) -> None:
        content = weights(folder)
        end = 8 + int.from_bytes(content[:8], "little")
        raw = json.loads(content[8:end])
        answer = edit(raw)
        header = answer if isinstance(answer, bytes) else json.dumps(raw if answer is None else answer).encode()
        write_weights(folder, struct.pack("<Q", len(header)) + header + content[end:])

    return change


def length(number: int, size: int = 64) -> Change:
    return lambda folder: write_weights(folder, struct.pack("<Q", number) + b" " * size)


def first(**fields: Any) -> Change:
    return headed(lambda raw: raw[MEAN].update(fields))


def million(raw: dict[str, Any]) -> bytes:
    inner = ",".join(f'"t{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    return f"{{{inner}}}".encode()


def sparse_header(folder: Path) -> None:
    """A real file of 100 MB that is all header."""
    write_weights(folder, struct.pack("<Q", 99_999_000) + b" " * 99_999_000)


def giant(folder: Path) -> None:
    """A file of 1 TB, all hole."""
    with open(folder / files.WEIGHTS_NAME, "wb") as file:
        file.truncate(10**12)
    raw = config(folder)
    raw["weights"]["bytes"] = 10**12
    write_config(folder, raw)


MEAN = "kappa.mean"

# Tensors: of other numbers


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """The tensors edited, length and digest in the config as they then are."""

    def change(folder: Path) -> None:
        found = load_file(folder / files.WEIGHTS_NAME)
        edit(found)
        write_weights(folder, save({name: value.contiguous() for name, value in found.items()}))

    return change


def filled(name: str, value: float) -> Change:
    return tensors(lambda t: t[name].fill_(value))


def one(name: str, value: float) -> Change:
    return tensors(lambda t: t[name].view(-1)[-1:].fill_(value))


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return tensors(lambda t: t.update({name: make(t[name])}))


def held_out(name: str, value: Any) -> Change:
    return replaced(f"loss.held_out.{name}", lambda t: torch.tensor(value, dtype=t.dtype).expand(t.shape).clone())


# The config


def text(change: Callable[[str], str | bytes]) -> Change:
    def edit(folder: Path) -> None:
        answer = change((folder / files.CONFIG_NAME).read_text())
        (folder / files.CONFIG_NAME).write_bytes(answer if isinstance(answer, bytes) else answer.encode())

    return edit


def at(*path: Any, to: Any) -> Change:
    """One value of the config exchanged, or a field added."""

    def change(folder: Path) -> None:
        raw = config(folder)
        place = raw
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to
        write_config(folder, raw)

    return change


def literal(value: str) -> Change:
    """A value JSON's own writer would not write, in `data`, where any value may stand."""
    return text(lambda s: s.replace('"data": {', f'"data": {{"x": {value}, ', 1))


def backbone(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        raw = config(folder)
        raw["backbone"].update(fields)
        write_config(folder, raw)

    return change


def option(head: str, name: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        raw = config(folder)
        place = next(h for h in raw["heads"] if h["name"] == head)
        place["options"][name] = value
        write_config(folder, raw)

    return change


# Files


class Bomb:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def marker(folder: Path) -> Path:
    return folder.parent / "executed"


def as_pickle(repair: bool) -> Change:
    return lambda folder: write_weights(folder, pickle.dumps(Bomb(marker(folder))), repair)


def as_torch(folder: Path) -> None:
    torch.save({"kappa.mean": Bomb(marker(folder))}, folder / files.WEIGHTS_NAME)
    write_weights(folder, weights(folder))


def pickled_config(folder: Path) -> None:
    (folder / files.CONFIG_NAME).write_bytes(pickle.dumps(Bomb(marker(folder))))


def only_pickles(folder: Path) -> None:
    (folder / files.WEIGHTS_NAME).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker(folder))))


def outside(folder: Path) -> Path:
    """A good adapter that is not in the folder."""
    return folder.parent / "good"


def linked(name: str, target: Callable[[Path], str | Path]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target(folder))

    return change


def special(name: str, make: Callable[[Path], Any]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def cached(target: Callable[[Path, Path], Path]) -> Callable[[Path], Path]:
    """A repository in the hub's cache whose weights are a link to where `target(repository, folder)` says."""

    def change(folder: Path) -> Path:
        repository = folder / "models--org--x"
        commit = repository / "snapshots" / ("a" * 40)
        commit.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (folder / files.CONFIG_NAME).rename(commit / files.CONFIG_NAME)
        (folder / files.WEIGHTS_NAME).rename(repository / "blobs" / "abc")
        (commit / files.WEIGHTS_NAME).symlink_to(os.path.relpath(target(repository, folder), commit))
        return commit

    return change


def other_blobs(repository: Path, folder: Path) -> Path:
    """The blobs of the repository are a link themselves."""
    (repository / "blobs" / "abc").unlink()
    (repository / "blobs").rmdir()
    (repository / "blobs").symlink_to(outside(folder))
    return repository / "blobs" / files.WEIGHTS_NAME


def to(address: str) -> Callable[[Path], str]:
    return lambda folder: address


def only_more(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker(folder))))
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "__init__.py").write_text("raise SystemExit")


def inner_link(folder: Path) -> None:
    (folder / files.WEIGHTS_NAME).rename(folder / "blob")
    (folder / files.WEIGHTS_NAME).symlink_to("blob")


def folder_link(folder: Path) -> Path:
    link = folder.parent / f"{folder.name}-link"
    link.symlink_to(folder)
    return link
