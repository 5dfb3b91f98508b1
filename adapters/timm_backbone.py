"""timm networks: building them by name, their preprocessing, and reading one pass of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from .errors import BackboneError
from .reading import NO_LINEAR, BackboneOutput, Call, Structure, as_linear, close, pooled, record, same_tensor, tapped
from .weights import load_strictly, read_checkpoint

HUB_PREFIX = "hf-hub:"
_BEFORE = "forward_head(pre_logits=True)"


def is_timm(module: nn.Module) -> bool:
    """Whether a module offers what `TimmReader` needs."""
    return all(hasattr(module, name) for name in ("forward_features", "forward_head", "pretrained_cfg", "num_classes"))


def create_timm(name: str, pretrained: bool, checkpoint: str | Path | None) -> nn.Module:
    """A timm network by name or `hf-hub:` id, with pretrained, local or random weights.

    A checkpoint with another number of classes decides that number. Raises BackboneError: unknown name or tag (the
    nearest is suggested), failed download, weights that do not fit.
    """
    if not name.startswith(HUB_PREFIX):
        _check_name(name)
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    try:
        model = timm.create_model(name, pretrained=pretrained and state is None)
        classes = model.num_classes if state is None else _checkpoint_classes(model, state)
        if classes != model.num_classes:
            model = timm.create_model(name, pretrained=False, num_classes=classes)
    except Exception as error:  # timm, huggingface_hub and urllib raise many kinds
        fetched = state is None and pretrained or name.startswith(HUB_PREFIX)
        raise BackboneError(
            f"the backbone {name!r} could not be {'fetched' if fetched else 'built'} ({type(error).__name__}: {error}). "
            "Without a network, give a timm name with its weights in checkpoint=FILE (.safetensors or .pth), or "
            "pretrained=False for random ones."
        ) from error
    if state is not None and checkpoint is not None:
        load_strictly(model, state, checkpoint, name)
    return model


def _check_name(name: str) -> None:
    base, _, tag = name.partition(".")
    if ":" in name or "/" in name:
        raise BackboneError(f"{name!r} is not a timm name; a model of the hub is written 'hf-hub:ORGANISATION/NAME'.")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=5, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? Near: {', '.join(near)}. " if near else ""
        raise BackboneError(
            f"timm {timm.__version__} has no model {base!r}; {hint}timm.list_models('*{base[:4]}*') lists more."
        )
    known = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in known:
        near = difflib.get_close_matches(tag, known, n=1, cutoff=0.3)
        hint = f"did you mean '{base}.{near[0]}'? " if near else ""
        raise BackboneError(
            f"timm {timm.__version__} has no weights {tag!r} for {base!r}; {hint}Known: {', '.join(known) or 'none'}."
        )


def _checkpoint_classes(model: Any, state: dict[str, Tensor]) -> int:
    for name in _classifier_names(model):
        weight = state.get(f"{name}.weight")
        if weight is not None:
            return int(weight.shape[0])
    return int(model.num_classes)


def _classifier_names(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def timm_preprocessing(model: Any) -> tuple[dict[str, Any], Callable[[Image.Image], Tensor]]:
    """timm's evaluation preprocessing for this network: its settings (JSON-able) and the transform PIL -> [3,H,W]."""
    config = resolve_model_data_config(model)
    patches = getattr(model, "patch_embed", None)
    # dynamic_img_size= lifts the restriction that the configuration of the weights states
    fixed = bool(model.pretrained_cfg.get("fixed_input_size")) and getattr(patches, "strict_img_size", True)
    # a network built with img_size= keeps the configuration of the original size
    size = getattr(model, "_model_args", {}).get("img_size") or getattr(patches, "img_size", None)
    if fixed and size is not None:
        config["input_size"] = (config["input_size"][0], *((size, size) if isinstance(size, int) else size))
    transform = create_transform(**config, is_training=False)
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    return {**settings, "fixed_input_size": fixed}, transform


class TimmReader:
    """Calls a timm network in one pass: `forward_features`, then `forward_head` before and after the classifier.

    The classifier is found with one probe batch: the linear layer whose very output the logits are, if there is one.
    Raises BackboneError if the network is not usable this way.
    """

    def __init__(self, model: Any, images: Tensor, use_classifier: bool = True) -> None:
        self.model = model
        linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        owned = _owned_modules(model)
        probe: Any = tapped(model, {**owned, **linears})
        with torch.no_grad():
            features = probe.forward_features(images)
            self._check_supported(probe, features)
            before, used = record(lambda: probe.forward_head(features, pre_logits=True))
            logits, calls = record(probe.forward_head, features)
            whole = model(images)
        if not isinstance(before, Tensor):
            raise _no_embedding(model, f"{_BEFORE} gives a {type(before).__name__}")
        self._direct: nn.Linear | None = None
        self._deep: tuple[Any, str] | None = None
        self.structure = Structure(
            embedding_dim=pooled(before, _BEFORE).shape[1],
            penultimate_dim=None,
            num_classes=0,
            kind="none",
            embedding_layer=_BEFORE if before.ndim == 2 else f"{_BEFORE}, mean over {'tokens' if before.ndim == 3 else 'H, W'}",
            own=tuple(name for name in owned if name not in used),  # what runs before the classifier is no part of it
        )
