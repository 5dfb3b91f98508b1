"""timm networks: building them by name, their preprocessing, and reading embedding, last-layer input and logits in one pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import is_model
from torch import Tensor, nn

from .errors import BackboneError
from .reading import NO_LINEAR, BackboneOutput, Structure, as_linear, pooled, record, same_tensor, tapped
from .weights import load_strictly, read_checkpoint

HUB_PREFIX = "hf-hub:"


def is_timm(module: nn.Module) -> bool:
    """Whether a module offers what `TimmReader` needs."""
    return all(hasattr(module, name) for name in ("forward_features", "forward_head", "pretrained_cfg", "num_classes"))


def create_timm(name: str, pretrained: bool, checkpoint: str | Path | None) -> nn.Module:
    """A timm network by name or `hf-hub:` id, with pretrained, local or random weights.

    A checkpoint with another number of classes decides that number. Raises BackboneError: unknown name or tag (the nearest is
    suggested), failed download, weights that do not fit.
    """
    if not name.startswith(HUB_PREFIX):
        _check_name(name)
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    try:
        model = timm.create_model(name, pretrained=pretrained and state is None)
        if state is not None:
            classes = _checkpoint_classes(model, state)
            if classes not in (None, model.num_classes):
                model = timm.create_model(name, pretrained=False, num_classes=classes)
    except Exception as error:  # timm, huggingface_hub and urllib raise many kinds
        raise BackboneError(
            f"the backbone {name!r} could not be {'fetched' if pretrained or name.startswith(HUB_PREFIX) else 'built'}: {error} "
            "Without a network, pass its weights with checkpoint=FILE (.safetensors or .pth), or pretrained=False for random ones."
        ) from error
    if state is not None and checkpoint is not None:
        load_strictly(model, state, checkpoint, name)
    return model


def _check_name(name: str) -> None:
    base, _, tag = name.partition(".")
    if ":" in name or "/" in name:
        raise BackboneError(
            f"{name!r} is not a timm name; a model of the Hugging Face hub is written 'hf-hub:ORGANISATION/NAME'."
        )
    if not is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=5, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? Also near: {', '.join(near[1:])}. " if near else ""
        raise BackboneError(
            f"timm {timm.__version__} has no model {base!r}; {hint}timm.list_models('*{base[:4]}*') lists more."
        )
    known = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in known:
        near = difflib.get_close_matches(tag, known, n=1, cutoff=0.3)
        hint = f"did you mean {base}.{near[0]}? " if near else ""
        raise BackboneError(
            f"timm {timm.__version__} has no weights {tag!r} for {base!r}; {hint}Known: {', '.join(known) or 'none'}."
        )


def _checkpoint_classes(model: nn.Module, state: dict[str, Tensor]) -> int | None:
    for name in _classifier_names(model):
        weight = state.get(f"{name}.weight")
        if weight is not None:
            return int(weight.shape[0])
    return None


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return (names,) if isinstance(names, str) else tuple(names)


def timm_preprocessing(model: nn.Module) -> tuple[dict[str, Any], Callable[[Image.Image], Tensor]]:
    """timm's evaluation preprocessing for this network: its settings (JSON-able) and the transform PIL -> [3,H,W]."""
    config = resolve_model_data_config(model)
    fixed = bool(model.pretrained_cfg.get("fixed_input_size"))  # type: ignore[union-attr, operator]
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if fixed and built_for is not None:  # a network built with img_size= keeps the configuration of the original size
        config["input_size"] = (config["input_size"][0], *built_for)
    transform = create_transform(**config, is_training=False)
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    return {**settings, "fixed_input_size": fixed}, transform


def probe_size(preprocessing: dict[str, Any]) -> tuple[int, ...]:
    """The shape [3,H,W] a network is probed with: its own, or at most 224 pixels where it takes any size (cheaper)."""
    channels, *size = preprocessing["input_size"]
    return (channels, *(size if preprocessing["fixed_input_size"] else [min(side, 224) for side in size]))


class TimmReader:
    """Calls a timm network in one pass: `forward_features`, then `forward_head` before and after the classifier.

    What the classifier is, is found with one probe batch: the linear layer whose very output the logits are, if there is one.
    Raises BackboneError if the network is not usable this way.
    """

    def __init__(self, model: nn.Module, images: Tensor, use_classifier: bool = True) -> None:
        self.model = model
        linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        owned = dict(_owned_modules(model))
        probe = tapped(model, {**owned, **linears})
        with torch.no_grad():
            features = probe.forward_features(images)  # type: ignore[operator]
            before, used = record(lambda: probe.forward_head(features, pre_logits=True))  # type: ignore[operator]
            logits, calls = record(lambda: probe.forward_head(features))  # type: ignore[operator]
            expected = model(images)
        # what runs before the classifier is no part of it
        own = tuple(name for name in owned if name not in used)
        embedding = pooled(before, "the network before its classifier")
        self._pools = before.ndim != 2
        self._deep: nn.Module | None = None
        self._direct: nn.Module | None = None
        common = {"embedding_dim": embedding.shape[1], "embedding_layer": "forward_head(pre_logits=True)", "own": own}
        if not use_classifier or not model.num_classes or not isinstance(logits, Tensor) or logits.ndim != 2:
            why = (
                "classifier_layer=False was given" if not use_classifier else "it was built without one (num_classes=0)"
            )
            self.structure = Structure(**common, **_without(why))
            return
        if not (isinstance(expected, Tensor) and torch.allclose(expected, logits, rtol=1e-4, atol=1e-5)):
            raise BackboneError(
                f"{type(model).__name__}: forward() and forward_head(forward_features()) differ, so the embedding cannot be told. "
                "Name the layer that gives it with feature_layer=."
            )
        self._read_classifier(linears, calls, before, logits, common)

    def _read_classifier(
        self,
        linears: dict[str, nn.Module],
        calls: dict[str, Any],
        before: Tensor,
        logits: Tensor,
        common: dict[str, Any],
    ) -> None:
        classes = int(logits.shape[1])
        for name, layer in linears.items():
            call = calls.get(name)
            if call is None or not same_tensor(call.output, logits) or call.input.ndim != 2:
                continue
            direct = before.ndim == 2 and call.input.shape == before.shape and torch.equal(call.input, before)
            if direct:
                self._direct = layer
            else:
                self._deep = tapped(self.model, {name: layer})
                self._name = name
            kind = "linear" if direct else "deep linear"
            self.structure = Structure(
                **common,
                penultimate_dim=call.input.shape[1],
                num_classes=classes,
                kind=kind,
                linear=layer,
                linear_name=name,
            )
            return
        self.structure = self._without_linear(before, logits, common)

    def _without_linear(self, before: Tensor, logits: Tensor, common: dict[str, Any]) -> Structure:
        names = _classifier_names(self.model)
        common = {**common, "num_classes": int(logits.shape[1])}
        layer = dict(self.model.named_modules()).get(names[0]) if len(names) == 1 else None
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and before.ndim == 2:
            if torch.allclose(as_linear(layer)(before), logits, rtol=1e-4, atol=1e-5):
                return Structure(
                    **common,
                    penultimate_dim=before.shape[1],
                    kind="1x1 convolution",
                    linear=layer,
                    linear_name=names[0],
                )
        if len(names) > 1:
            kind, why = "two classifiers", f"its logits are made of {len(names)} classifiers ({', '.join(names)})"
        else:
            kind, why = "other", f"its logits are not the output of one linear layer (classifier: {names})"
        return Structure(
            **common, penultimate_dim=None, kind=kind, refusal=f"{type(self.model).__name__}: {why}. {NO_LINEAR}"
        )

    def __call__(self, images: Tensor) -> BackboneOutput:
        model: Any = self.model if self._deep is None else self._deep
        features = model.forward_features(images)
        embedding = model.forward_head(features, pre_logits=True)
        if self._pools:
            embedding = pooled(embedding, "the network before its classifier")
        if self.structure.num_classes == 0:
            return BackboneOutput(embedding, None, None)
        if self._direct is not None:
            return BackboneOutput(embedding, embedding, self._direct(embedding))
        if self._deep is not None:
            logits, calls = record(model.forward_head, features)
            return BackboneOutput(embedding, calls[self._name].input, logits)
        penultimate = None if self.structure.linear is None else embedding
        return BackboneOutput(embedding, penultimate, model.forward_head(features))


def _owned_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The classifier's modules by name: those of the configuration and those timm itself calls the classifier."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    parts = list(found) if isinstance(found, tuple | list) else [found]
    names = _classifier_names(model)
    return [
        (name, part)
        for name, part in model.named_modules()
        if name and (name in names or any(part is other for other in parts)) and not isinstance(part, nn.Identity)
    ]


def _without(why: str) -> dict[str, Any]:
    refusal = f"this backbone has no classifier: {why}. {NO_LINEAR}"
    return {"penultimate_dim": None, "num_classes": 0, "kind": "none", "refusal": refusal}
