"""timm networks: building them by name, their preprocessing, and reading one pass of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from .errors import BackboneError
from .files import commit_of
from .reading import NO_LINEAR, BackboneOutput, Call, Structure, as_linear, close, pooled, record, same_tensor, tapped
from .weights import load_strictly, read_checkpoint

HUB_PREFIX = "hf-hub:"
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
"""What timm looks for in a repository of the hub."""
_BEFORE = "forward_head(pre_logits=True)"


def is_timm(module: nn.Module) -> bool:
    """Whether a module offers what `TimmReader` needs."""
    return all(hasattr(module, name) for name in ("forward_features", "forward_head", "pretrained_cfg", "num_classes"))


def create_timm(name: str, pretrained: bool, checkpoint: str | Path | None) -> nn.Module:
    """A timm network by name or `hf-hub:` id, with pretrained, local or random weights.

    A timm name may end in @REVISION, of the repository timm/NAME on the hub that its pretrained weights are in. A checkpoint
    with another number of classes decides that number. Raises BackboneError: unknown name or tag (the nearest is
    suggested), failed download, weights that do not fit.
    """
    more: dict[str, Any] = {}
    if not name.startswith(HUB_PREFIX):
        name, _, revision = name.partition("@")
        _check_name(name)
        if revision and pretrained and checkpoint is None:
            more["pretrained_cfg_overlay"] = {"hf_hub_id": f"timm/{name}@{revision}"}
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    try:
        model = timm.create_model(name, pretrained=pretrained and state is None, **more)
        classes = model.num_classes if state is None else _checkpoint_classes(model, state)
        if classes != model.num_classes:
            model = timm.create_model(name, pretrained=False, num_classes=classes)
    except Exception as error:  # timm, huggingface_hub and urllib raise many kinds
        fetched = (state is None and pretrained) or name.startswith(HUB_PREFIX)
        raise BackboneError(
            f"the backbone {name!r} could not be {'fetched' if fetched else 'built'} ({type(error).__name__}: "
            f"{error}). Without a network, give a timm name with its weights in checkpoint=FILE (.safetensors or "
            ".pth), or pretrained=False for random ones."
        ) from error
    if state is not None and checkpoint is not None:
        load_strictly(model, state, checkpoint, name)
    return model


def cached_commit(repo_id: str, revision: str | None = None) -> str | None:
    """The commit in the hub's cache that weights of this repository were just read from; None where none is there."""
    for name in (*WEIGHTS, "config.json"):
        try:
            found = try_to_load_from_cache(repo_id, name, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str) and (commit := commit_of(Path(found).parent)) is not None:
            return commit
    return None


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
    # a network built with img_size= keeps the configuration of the original size; older timm do not keep the option
    size = getattr(model, "_model_args", {}).get("img_size") or (getattr(patches, "img_size", None) if fixed else None)
    if size is not None:
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
        self._tapped: tuple[Any, str] | None = None
        linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        owned = _owned_modules(model)
        probe: Any = tapped(model, {**owned, **linears})
        with torch.no_grad():
            features = probe.forward_features(images)
            before, used = record(_before_classifier, probe, features)
            none = Structure(
                embedding_dim=pooled(before, _BEFORE).shape[1],
                penultimate_dim=None,
                num_classes=0,
                kind="none",
                embedding_layer=_BEFORE if before.ndim == 2 else f"mean of {_BEFORE}",
                own=tuple(
                    name for name in owned if name not in used
                ),  # what runs before it is no part of the classifier
            )
            if not use_classifier or not model.num_classes:
                why = "it was built with num_classes=0" if use_classifier else "classifier_layer=False was given"
                self.structure = replace(none, refusal=f"there is no classifier: {why}. {NO_LINEAR}")
                return
            logits, calls = record(probe.forward_head, features)
            whole = model(images)
            if not (same_tensor(whole, logits) or (isinstance(whole, Tensor) and close(logits, whole))):
                raise BackboneError(
                    f"{type(model).__name__}: forward() is not forward_head(forward_features()), so the embedding "
                    "cannot be told. Name the layer that gives it with feature_layer=."
                )
            found = replace(none, num_classes=int(logits.shape[1]))
            self.structure = self._linear(found, linears, calls, before, logits) or self._other(found, before, logits)

    def _linear(
        self, found: Structure, linears: dict[str, nn.Linear], calls: dict[str, Call], before: Tensor, logits: Tensor
    ) -> Structure | None:
        """The classifier is the linear layer that made the logits."""
        for name, layer in linears.items():
            call = calls.get(name)
            if call is None or not same_tensor(call.output, logits) or not close(layer(call.input), logits):
                continue
            direct = before.shape == call.input.shape and torch.equal(before, call.input)
            if not direct:
                self._tapped = tapped(self.model, {name: layer}), name
            return replace(
                found,
                penultimate_dim=int(call.input.shape[1]),
                kind="linear" if direct else "deep linear",
                linear=layer,
                linear_name=name,
                own=tuple(dict.fromkeys((*found.own, name))),
            )
        return None

    def _other(self, found: Structure, before: Tensor, logits: Tensor) -> Structure:
        """The logits come from a 1x1 convolution, from several classifiers, or from something else."""
        names = _classifier_names(self.model)
        layer = dict(self.model.named_modules()).get(names[0]) if len(names) == 1 else None
        pointwise = (
            isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1 and before.ndim == 2
        )
        if pointwise and isinstance(layer, nn.Conv2d) and close(as_linear(layer)(before), logits):
            width = found.embedding_dim
            return replace(found, penultimate_dim=width, kind="1x1 convolution", linear=layer, linear_name=names[0])
        listed = ", ".join(names) or "unknown"
        if len(names) > 1:
            kind, why = "several classifiers", f"the logits are made of {len(names)} classifiers ({listed})"
            last = [name for name, part in self.model.named_modules() if name in names and isinstance(part, nn.Linear)]
            mend = f" To use one of them alone: classifier_layer={last[0]!r}." if last else ""
        else:
            kind, why, mend = "other", f"the logits are not the output of one linear layer (classifier: {listed})", ""
        return replace(found, kind=kind, refusal=f"there is no single linear classifier: {why}. {NO_LINEAR}{mend}")

    def __call__(self, images: Tensor) -> BackboneOutput:
        model, structure = self.model if self._tapped is None else self._tapped[0], self.structure
        features = model.forward_features(images)
        embedding = pooled(_before_classifier(model, features), _BEFORE)
        if structure.kind == "none":
            return BackboneOutput(embedding, None, None)
        if structure.kind == "linear" and structure.linear is not None:
            return BackboneOutput(embedding, embedding, structure.linear(embedding))
        logits, calls = record(model.forward_head, features)
        if self._tapped is not None:
            return BackboneOutput(embedding, calls[self._tapped[1]].input, logits)
        return BackboneOutput(embedding, None if structure.linear is None else embedding, logits)


def _before_classifier(model: Any, features: Any) -> Tensor:
    """What timm feeds the classifier. Raises BackboneError for networks that have no such thing."""
    try:
        before = model.forward_head(features, pre_logits=True)
    except NotImplementedError:
        before = None
    if not isinstance(before, Tensor):
        raise BackboneError(
            f"{type(model).__name__} gives no embedding ({_BEFORE} returns no tensor); name the layer that gives one "
            "with feature_layer=."
        )
    return before


def _owned_modules(model: Any) -> dict[str, nn.Module]:
    """The classifier's modules by name: those of the configuration and those timm itself calls the classifier."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()
    parts = found if isinstance(found, tuple | list) else (found,)
    names = _classifier_names(model)
    return {
        name: part
        for name, part in model.named_modules()
        if name and (name in names or any(part is other for other in parts)) and not isinstance(part, nn.Identity)
    }
