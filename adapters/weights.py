"""Weights: their fingerprint, and reading them from a local file without unpickling anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import BackboneError

_WRAPPERS = ("state_dict", "model", "model_state_dict", "online_backbone")
"""The keys under which training scripts put the weights; the last is BYOL's."""


def dependent_tensors(module: nn.Module, without: Iterable[str] = ()) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, sorted, but not those of the parts named in `without`.

    BatchNorm's `num_batches_tracked` is left out: a frozen network never reads it, and converted weights often lack it.
    """
    prefixes = tuple(f"{name}." for name in without)
    state = module.state_dict()
    return {
        name: value
        for name, value in sorted(state.items())
        if isinstance(value, Tensor) and not name.startswith(prefixes) and not name.endswith("num_batches_tracked")
    }


def tensor_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes; the same on every device and for every memory layout."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        if value.is_meta:
            raise BackboneError(f"the weight {name!r} is on the meta device and has no values; load the weights first.")
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def weights_state(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """A cheap mark that changes whenever a weight does: version counters miss edits through `.data`, sums do not."""
    keys = tuple((name, value.data_ptr(), value._version, value.dtype) for name, value in tensors.items())
    sums = [value.detach().sum(dtype=torch.float64).cpu() for value in tensors.values()]
    return keys, tuple(torch.stack(sums).tolist()) if sums else ()


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth file read with `weights_only=True`.

    A "state_dict" or "model" around the weights and a "module." before every name are taken off. Raises BackboneError.
    """
    path = Path(path)
    if not path.is_file():
        raise BackboneError(
            f"checkpoint={str(path)!r} is not a file; expected a .safetensors or .pth file with a state_dict."
        )
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise BackboneError(
            f"checkpoint={str(path)!r} cannot be read: it is damaged or not a weights file ({error})."
        ) from error
    except Exception as error:  # torch raises pickle.UnpicklingError for anything but plain tensors
        raise BackboneError(
            f"checkpoint={str(path)!r} holds more than tensors and is not opened, because unpickling runs code. "
            "Save the weights alone: torch.save(model.state_dict(), path), or safetensors."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise BackboneError(
            f"checkpoint={str(path)!r} holds no state_dict (a mapping of names to tensors). Save model.state_dict()."
        )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], path: str | Path, owner: str) -> None:
    """Loads `state` into `module`; every name and shape must fit, else BackboneError naming what does not."""
    expected = module.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - state.keys() - counters)
    unexpected = sorted(state.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
        for name, value in sorted(state.items())
        if name in expected and value.shape != expected[name].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(found)} {what}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
            for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if found
        ]
        raise BackboneError(
            f"checkpoint={str(path)!r} does not fit {owner}: {'; '.join(parts)}. "
            "Name the architecture the weights were saved from, or rename the tensors."
        )
    module.load_state_dict(dict(state), strict=False)  # all but BatchNorm's counters has just been checked
