"""Reading the inside of a frozen network: what a pass gives, what was found, and taps that leave no trace on it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import BackboneError

NO_LINEAR = (
    "Heads that need no classifier (kappa, temperature) work as they are; others can train a linear classifier of "
    "their own on the stored features."
)
_LOCAL = threading.local()  # the running record of this thread: two threads on one backbone do not mix


class BackboneOutput(NamedTuple):
    """What one pass of a backbone gives for B images.

    embedding: [B, D], pooled, before the classifier. penultimate: [B, P], the input of the one last linear layer;
    None where there is no single linear classifier. logits: [B, C], what the network itself gives; None without a
    classifier.
    """

    embedding: Tensor
    penultimate: Tensor | None
    logits: Tensor | None


@dataclass(frozen=True)
class Structure:
    """What a probe batch told about a network.

    kind: "linear" (logits = linear(embedding)), "deep linear" (more layers before the last linear one), "1x1
    convolution", "several classifiers", "other" or "none". linear: the one linear classifier. own: names of the
    modules whose parameters belong to the classifier alone, so that the embedding does not depend on them. refusal:
    why there is no one linear classifier, and what to do.
    """

    embedding_dim: int
    penultimate_dim: int | None
    num_classes: int
    kind: str
    embedding_layer: str
    linear: nn.Linear | nn.Conv2d | None = None
    linear_name: str | None = None
    own: tuple[str, ...] = ()
    refusal: str | None = None


class Call(NamedTuple):
    """One call of a tapped layer: its first argument and its output."""

    input: Any
    output: Any


def _keep(
    name: str, copies: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    calls = getattr(_LOCAL, "calls", None)
    if calls is None:
        return
    call = Call(args[0] if args else next(iter(kwargs.values()), None), output)
    calls.pop(name, None)  # so that the record is in the order of the last calls
    calls[name] = Call(*(value.clone() if copies and isinstance(value, Tensor) else value for value in call))


def tapped(module: nn.Module, layers: Mapping[str, nn.Module], copies: bool = False) -> nn.Module:
    """A twin of `module` that shares its parameters and buffers, and whose `layers` tell `record` of each call.

    Only the modules on the way to a tapped layer are copied (shallowly), so `module` itself never carries a hook. The
    twin follows moves to another device and in-place changes of the weights, and can be deep-copied together with the
    module, compiled and exported. copies: record copies, which later in-place operations of the network do not
    change.
    """
    names = {layer: name for name, layer in layers.items()}
    twins: dict[nn.Module, nn.Module] = {}

    def twin(part: nn.Module) -> nn.Module:
        if part in twins:  # a part reached by two names stays one part
            return twins[part]
        children = {name: None if child is None else twin(child) for name, child in part._modules.items()}
        if part not in names and all(children[name] is child for name, child in part._modules.items()):
            twins[part] = part
            return part
        other = copy.copy(part)
        other.__dict__["_modules"] = children
        if part in names:
            for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs"):
                other.__dict__[hooks] = copy.copy(part.__dict__[hooks])
            other.register_forward_hook(partial(_keep, names[part], copies), with_kwargs=True)
        twins[part] = other
        return other

    return twin(module)


def record(run: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, Call]]:
    """`run(*args)`, and the last call of every tapped layer in it by the layer's name."""
    outer = getattr(_LOCAL, "calls", None)
    calls: dict[str, Call] = {}
    _LOCAL.calls = calls
    try:
        return run(*args), calls
    finally:
        _LOCAL.calls = outer


def same_tensor(a: Any, b: Any) -> bool:
    """Whether both are the same numbers in the same memory (both must still be alive)."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same computation agree to rounding, in the precision of the device."""
    tolerance = max(5e-3, 32 * torch.finfo(b.dtype).eps)  # a GPU's TF32 has a thousandth; another layer is off by all
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def pooled(features: Tensor, what: str) -> Tensor:
    """[B, D] from [B, D], from maps [B, D, H, W] (mean over H and W) or from tokens [B, T, D] (mean over all tokens).

    Raises BackboneError for any other shape; `what` names the layer in it.
    """
    if features.ndim == 2:
        return features
    if features.ndim == 4:
        return features.mean((2, 3))
    if features.ndim == 3:
        return features.mean(1)
    raise BackboneError(
        f"{what} gives a tensor of shape {tuple(features.shape)}; an embedding is [B, D], maps [B, D, H, W] or tokens "
        "[B, T, D]. Name another layer in feature_layer=."
    )


def as_linear(layer: nn.Linear | nn.Conv2d) -> nn.Linear:
    """The layer itself, or the linear layer that a 1x1 convolution on pooled maps is (it shares the memory)."""
    if isinstance(layer, nn.Linear):
        return layer
    classes, width = layer.weight.shape[:2]
    linear = nn.Linear(width, classes, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().view(classes, width), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear.eval()
