"""Any other network: which layer gives the embedding and which the logits, found by watching one pass."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import BackboneError
from .reading import NO_LINEAR, BackboneOutput, Call, Structure, close, pooled, record, same_tensor, tapped

_EMBEDDING_KEYS = ("image_embeds", "pooler_output", "embedding", "embeddings")  # transformers' names, then plain words


def find_layer(module: nn.Module, name: str, option: str) -> nn.Module:
    """The part of `module` with this dotted name; BackboneError suggests the nearest names."""
    parts = {known: part for known, part in module.named_modules() if known}
    if name in parts:
        return parts[name]
    near = difflib.get_close_matches(name, parts, n=5, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    children = ", ".join(near or [child for child, _ in module.named_children()][:10])
    raise BackboneError(
        f"{option}={name!r}: {type(module).__name__} has no layer of that name; {hint}It has: {children or 'none'}."
    )


class ModuleReader:
    """Calls any network once and takes embedding, last-layer input and logits out of that pass.

    feature_layer: dotted name of the layer whose output is the embedding (maps [B,D,H,W] and tokens [B,T,D] are
    averaged). classifier_layer: dotted name of the linear layer whose output is the logits; False: there is none;
    None: the layer whose very output the network returns, if it is linear. The embedding is the feature layer's
    output, else the classifier's input, else what the network returns. Raises BackboneError where this cannot be
    told.
    """

    def __init__(
        self,
        module: nn.Module,
        images: Tensor,
        feature_layer: str | None = None,
        classifier_layer: str | bool | None = None,
    ) -> None:
        self.module = module
        self._feature = feature_layer
        linears: dict[str, Any] = {
            name: part for name, part in module.named_modules() if isinstance(part, nn.Linear) and name
        }
        feature = {} if feature_layer is None else {feature_layer: find_layer(module, feature_layer, "feature_layer")}
        if isinstance(classifier_layer, str):
            self._check_classifier_name(classifier_layer)
        with torch.no_grad():
            output, calls = record(tapped(module, {**linears, **feature}), images)
        returned = _returned_tensors(output)
        self._classifier = _find_classifier(classifier_layer, returned, calls, linears)
        self._key = None if feature or self._classifier else self._embedding_key(returned, classifier_layer)
        self._logits_key = None if classifier_layer is False or self._classifier else self._logits(returned)
        kept = {} if self._classifier is None else {self._classifier: linears[self._classifier]}
        self._twin = tapped(module, {**kept, **feature}, copies=True)
        self.structure = self._structure(images, calls, linears, classifier_layer)

    def _check_classifier_name(self, name: str) -> None:
        layer = find_layer(self.module, name, "classifier_layer")
        if not isinstance(layer, nn.Linear):
            linears = [known for known, part in self.module.named_modules() if isinstance(part, nn.Linear)]
            raise BackboneError(
                f"classifier_layer={name!r} is a {type(layer).__name__}; expected an nn.Linear. "
                f"The last linear layers are: {', '.join(linears[-5:]) or 'none'}."
            )

    def _embedding_key(self, returned: dict[str, Tensor], classifier_layer: str | bool | None) -> str:
        """The key of the returned tensor that is the embedding."""
        keys = ["", *_EMBEDDING_KEYS]
        if len(returned) == 1 and "logits" not in returned:
            keys += list(returned)
        if classifier_layer is False:
            keys.append("logits")
        for key in keys:
            value = returned.get(key)
            if value is not None and (value.ndim == 2 or (value.ndim == 4 and value.shape[2:] == (1, 1))):
                return key
        found = ", ".join(f"{key or 'a tensor'} {tuple(value.shape)}" for key, value in returned.items()) or "no tensor"
        parts = [name for name, _ in self.module.named_children()]
        raise BackboneError(
            f"{type(self.module).__name__} returns {found}: which of it is the embedding [B, D] cannot be told. "
            f"Name the layer that gives it with feature_layer= (parts: {', '.join(parts[-8:])})."
        )

    def _logits(self, returned: dict[str, Tensor]) -> str | None:
        """The key of returned class scores that no single linear layer made."""
        if "logits" in returned:
            return "logits"
        output, classes = returned.get(""), getattr(self.module, "num_classes", None)
        known = self._feature is not None and output is not None and output.ndim == 2 and output.shape[1] == classes
        return "" if known else None

    def _structure(
        self, images: Tensor, calls: dict[str, Call], linears: dict[str, nn.Module], classifier_layer: str | bool | None
    ) -> Structure:
        with torch.no_grad():
            output = self(images)
        width = int(output.embedding.shape[1])
        classes = 0 if output.logits is None else int(output.logits.shape[1])
        if self._classifier is not None and output.penultimate is not None:
            layer = linears[self._classifier]
            order = list(calls)  # a feature layer after (or around) the classifier makes the embedding depend on it
            alone = self._feature is None or order.index(self._feature) < order.index(self._classifier)
            return Structure(
                embedding_dim=width,
                penultimate_dim=int(output.penultimate.shape[1]),
                num_classes=classes,
                kind="linear" if self._feature is None else "deep linear",
                embedding_layer=self._feature or f"input of {self._classifier}",
                linear=cast(nn.Linear, layer),
                linear_name=self._classifier,
                own=(self._classifier,) if alone else (),
            )
        where = self._feature or (f"output[{self._key!r}]" if self._key else "output")
        kind = "other" if classes else "none"
        return Structure(width, None, classes, kind, where, refusal=self._refusal(classifier_layer, linears))

    def _refusal(self, classifier_layer: str | bool | None, linears: dict[str, nn.Module]) -> str:
        name = type(self.module).__name__
        if classifier_layer is False:
            return f"{name} has no classifier: classifier_layer=False was given. {NO_LINEAR}"
        last = ", ".join(list(linears)[-3:])
        mend = f" If one of its last linear layers ({last}) gives class scores, name it in classifier_layer=."
        why = f"no linear layer made what {name} returns, so no classifier was recognised"
        return f"{why}. {NO_LINEAR}{mend if last else ''}"

    def __call__(self, images: Tensor) -> BackboneOutput:
        output, calls = record(self._twin, images)
        penultimate = logits = None
        if self._classifier is not None:
            penultimate, logits = calls[self._classifier]
        elif self._logits_key is not None:
            logits = output[self._logits_key] if self._logits_key else output
        if self._feature is not None:
            embedding = pooled(_first_tensor(calls[self._feature].output), f"feature_layer={self._feature!r}")
        elif penultimate is not None:
            embedding = penultimate
        else:
            embedding = pooled(output[self._key] if self._key else output, "the network")
        return BackboneOutput(embedding, penultimate, logits)


def _find_classifier(
    named: str | bool | None, returned: dict[str, Tensor], calls: dict[str, Call], linears: dict[str, nn.Module]
) -> str | None:
    """The name of the linear classifier: the one asked for, or the one whose very output the network returns."""
    if named is False:
        return None
    if isinstance(named, str):
        call = calls.get(named)
        if call is None or call.input.ndim != 2:
            found = "is not called" if call is None else f"gets {tuple(call.input.shape)}, expected [B, features]"
            raise BackboneError(f"classifier_layer={named!r} {found}, so it does not give logits; name another layer.")
        return named
    logits = returned.get("logits", returned.get(""))
    for name, layer in linears.items():
        call = calls.get(name)
        # the numbers are checked too: what the layer gave may have been changed in place afterwards
        if call is not None and same_tensor(call.output, logits) and call.input.ndim == 2:
            with torch.no_grad():
                if close(layer(call.input), call.output):
                    return name
    return None


def _returned_tensors(output: Any) -> dict[str, Tensor]:
    """The tensors of a forward's return value by key; "" for a plain tensor."""
    if isinstance(output, Tensor):
        return {"": output}
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
    return {}


def _first_tensor(output: Any) -> Tensor:
    """A layer's output, or the first tensor of a tuple or mapping (a transformers layer returns either)."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else list(output)
    return _first_tensor(values[0])
