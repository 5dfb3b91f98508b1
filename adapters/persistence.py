"""A model to an adapter on disk, and back onto its backbone."""

from __future__ import annotations

import functools
import json
import math
import os
import typing
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .addresses import store
from .backbone import Backbone, BackboneOutput, build_backbone
from .card import render_card
from .config import AdapterConfig, BackboneConfig, HeadConfig, WeightsConfig
from .distributed import check_launch
from .errors import AdapterError, BackboneError, PosthocError, suggest
from .files import read_card, read_config, read_weights, replace_file, write_adapter
from .heads import HEADS, FeatureDims, Head, make_head
from .images import Transform
from .locate import is_address
from .scores import HeldOutScores

if TYPE_CHECKING:
    from .model import UncertainModel

HELD_OUT = "held_out"  # the scores of HEAD are the tensors HEAD.held_out.NAME
MAX_PIXELS = 3 * 1024 * 1024  # of an image of noise: its size is the config's word
LIBRARIES = ("posthoc", "torch", "torchvision", "timm", "numpy", "safetensors")


def save(model: UncertainModel, folder: str | os.PathLike[str], address: str | None = None) -> Path | str:
    """See `UncertainModel.save_pretrained`; `address`: what the card's example loads, if not the folder."""
    if is_address(folder):
        with TemporaryDirectory() as place:
            save(model, place, str(folder))
            return store(Path(place), str(folder))
    folder = Path(folder)
    if address is None:  # no path of this machine in what may be published
        address = folder.name if folder.is_absolute() else folder.as_posix()
    card = functools.partial(render_card, address=address, previous=read_card(folder))
    return write_adapter(folder, _tensors(model), lambda weights: _describe(model, weights), card)


def _tensors(model: UncertainModel) -> dict[str, Tensor]:
    """Every tensor of the adapter by its name in the file, sharing memory with the model's."""
    tensors: dict[str, Tensor] = {}
    for name, head, scores in model.each_head():
        tensors |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
        tensors |= {f"{name}.{HELD_OUT}.{key}": value for key, value in scores.state_dict().items()}
    return tensors


def _describe(model: UncertainModel, weights: WeightsConfig) -> AdapterConfig:
    backbone = model.backbone
    _look(backbone, plain(model.fitted_on["preprocessing"]))  # all its features may have come from the store
    scopes = sorted({head.scope for _, head, _ in model.each_head()})
    described = AdapterConfig(
        backbone=BackboneConfig(
            source=backbone.source,
            name=backbone.name,
            fingerprints={scope: backbone.fingerprint(scope) for scope in scopes},
            embedding_dim=backbone.embedding_dim,
            penultimate_dim=backbone.penultimate_dim,
            num_classes=backbone.num_classes,
            weights=backbone.weights,
            revision=backbone.revision,
            feature_layer=backbone.feature_layer,
            classifier_layer=backbone.classifier_layer,
        ),
        heads=[_describe_head(head, scores, model.report[name]) for name, head, scores in model.each_head()],
        weights=weights,
        preprocessing=plain(model.fitted_on["preprocessing"]),
        data=plain(model.fitted_on["data"]),
        fit=plain(model.fitted_on["fit"]),
        versions=_versions(),
    )
    return AdapterConfig.from_json(described.to_json())  # what could not be read again is not written


def _describe_head(head: Head, scores: HeldOutScores, report: dict[str, Any]) -> HeadConfig:
    return HeadConfig(
        name=head.name,
        kind=head.kind,
        scope=head.scope,
        classes=head.require_built().classes,
        options=head.config(),
        held_out=scores.summary(),
        report=plain({key: value for key, value in report.items() if key != "held_out"}),
    )


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy and torch numbers and arrays by value, what is not finite as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def write_run(folder: Path | None, name: str, content: Any) -> None:
    """Write one JSON file of a run, from the main process; nothing without a folder."""
    if folder is None:
        return

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, (json.dumps(plain(content), indent=2) + "\n").encode())

    try:
        check_launch().on_main(write)
    except OSError as error:
        raise PosthocError(f"cannot write {folder / name}: {error}") from error


def load(
    cls: type[UncertainModel],
    folder: Path,
    backbone: str | nn.Module | Backbone | None,
    transform: Transform | None = None,
    device: str | torch.device | None = None,
) -> UncertainModel:
    """See `posthoc.load`. Heads are built only after the backbone was found to be the right one."""
    config = read_config(folder)
    for described in config.heads:
        if described.name not in HEADS:
            raise AdapterError(
                f"{folder}: this posthoc has no head {described.name!r}: {suggest(described.name, HEADS)}"
            )
        _check_options(described, f"{folder}: head {described.name!r}")
    tensors = read_weights(folder, config.weights)
    frozen = _attach(config, backbone, folder, transform, device)
    dims = {h.name: FeatureDims(frozen.embedding_dim, config.backbone.penultimate_dim, h.classes) for h in config.heads}
    heads = [_build(described, dims[described.name], config.weights.bytes, folder) for described in config.heads]
    model = cls(frozen, heads)
    _fill(model, tensors, folder)
    for described in config.heads:
        _check_answers(model, described, folder)
    model.report = {head.name: {**head.report, "held_out": head.held_out} for head in config.heads}
    model.fitted_on = {"data": config.data, "fit": config.fit, "preprocessing": config.preprocessing}
    model.fitted_heads.update(model.heads)
    model.loaded_from = {"weights": config.weights.sha256}
    return model


def _attach(
    config: AdapterConfig,
    backbone: str | nn.Module | Backbone | None,
    folder: Path,
    transform: Transform | None,
    device: str | torch.device | None,
) -> Backbone:
    described = config.backbone
    if backbone is None and described.source == "module":
        raise AdapterError(
            f"{folder} was fitted on a module of your own ({described.name}), which an adapter cannot name: give it "
            "with load(..., backbone=your_model, transform=its_preprocessing)"
        )
    if backbone is None and described.weights in ("random", "checkpoint"):
        raise AdapterError(
            f"{folder} was fitted on {described.name} with weights of your own ({described.weights}), which no hub has: "
            "give the network with load(..., backbone=...), or its file with `posthoc predict --checkpoint`"
        )
    build = functools.partial(
        build_backbone,
        transform=transform,
        device=device,
        feature_layer=described.feature_layer,
        classifier_layer=described.classifier_layer,
    )
    frozen = build(backbone) if backbone is not None else _fetched(described, build)
    _look(frozen, config.preprocessing)
    for scope, expected in described.fingerprints.items():
        found = frozen.fingerprint(scope)
        if found != expected:
            raise BackboneError(
                f"{folder} was fitted on {described.name}{_at(described)} with the fingerprint {expected} ({scope}); this "
                f"backbone, {frozen.name}, has {found}. Give the weights it was fitted on with load(..., backbone=...), or fit "
                "the adapter again on these."
            )
    # what only heads on the classifier depend on may differ where there are none: the classifier may be another's
    dims = ["embedding_dim", *(["penultimate_dim", "num_classes"] if "logits" in described.fingerprints else [])]
    for name in dims:
        said, found = getattr(described, name), getattr(frozen, name)
        if said != found:
            raise AdapterError(f"{folder}: its config says {name} {said}, the backbone has {found}")
    _check_preprocessing(config.preprocessing, frozen.preprocessing, folder)
    return frozen


def _fetched(described: BackboneConfig, build: Callable[..., Backbone]) -> Backbone:
    """The backbone at the commit it was fitted on; the newest where its repository has that no more: the fingerprint decides."""
    try:
        return build(_address(described))
    except BackboneError:
        if described.revision is None:
            raise
        frozen = build(_address(replace(described, revision=None)))
        warnings.warn(
            f"{described.name} could not be had at revision {described.revision}, the newest was taken",
            UserWarning,
            stacklevel=3,
        )
        return frozen


def _at(described: BackboneConfig) -> str:
    return "" if described.revision is None else f" (revision {described.revision} on the hub)"


def _address(described: BackboneConfig) -> str:
    name = described.name
    if described.source != "timm":
        name = "hf-hub:" + described.name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    return name if described.revision is None else f"{name}@{described.revision}"


def _look(backbone: Backbone, preprocessing: dict[str, Any]) -> None:
    """Show a network that took no probe one batch of noise of the size it was fitted with: its parts are found so."""
    size = preprocessing.get("input_size")
    if not backbone.is_read and _is_size(size):
        images = torch.randn((2, *size), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            backbone(images.to(backbone.device, backbone.dtype))


def _is_size(size: Any) -> TypeGuard[list[int]]:
    whole = isinstance(size, list) and len(size) == 3 and all(type(n) is int and 1 <= n <= 2048 for n in size)
    return whole and math.prod(size) <= MAX_PIXELS


def _check_preprocessing(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    now = plain(now)
    changed = [name for name in ("input_size", "mean", "std") if name in then and _differs(then[name], now.get(name))]
    if changed:
        told = "; ".join(f"{name} {str(then[name])[:60]}, now {now[name]}" for name in changed)
        warnings.warn(
            f"{folder} was fitted with another preprocessing than this backbone's ({told}): scores may shift",
            UserWarning,
            stacklevel=2,
        )


def _differs(then: Any, now: Any) -> bool:
    """Whether a setting is known to be another one; None, and None for a side of the image, is not known."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return any(_differs(a, b) for a, b in zip(then, now, strict=True))
    return now is not None and then != now


class _Budget(TorchDispatchMode):
    """Refuses to build tensors of more bytes than an adapter's file can fill: a config's numbers are not trusted."""

    def __init__(self, limit: int, where: str) -> None:
        super().__init__()
        self.left, self.where = limit, where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], list | tuple) and all(type(n) is int for n in args[0]):
            self._spend(0, math.prod(args[0]))  # zeros and their like: asked before they fill the memory
        result = func(*args, **(kwargs or {}))
        tensors = [result] if isinstance(result, Tensor) else tree_leaves(result)
        self._spend(sum(leaf.nbytes for leaf in tensors if isinstance(leaf, Tensor)))
        return result

    def _spend(self, size: int, planned: int = 0) -> None:
        self.left -= size
        if self.left < planned:
            raise AdapterError(f"{self.where}: the head's options ask for far larger tensors than its file holds")


@functools.cache
def _option_types(name: str) -> dict[str, Any]:
    hints = typing.get_type_hints(HEADS[name].__init__)
    return {option: kind for option, kind in hints.items() if option != "return"}


def _check_options(described: HeadConfig, where: str) -> None:
    """Each option is of a type that its head's constructor names: a head may use it without asking."""
    hints = _option_types(described.name)
    for option, value in described.options.items():
        if option not in hints:
            raise AdapterError(f"{where} has no option {option[:60]!r}: {suggest(option, hints)}")
        allowed = typing.get_args(hints[option]) or (hints[option],)
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
            raise AdapterError(f"{where} cannot be built: its option {option} is {value!r}, expected {names}")


def _check_answers(model: UncertainModel, described: HeadConfig, folder: Path) -> None:
    """What the config says of the held-out scores is what the tensors say, and two images of noise get finite scores.

    Tensors of the right shapes can still be ones that no fit gives: negative precisions, a temperature of 0.
    """
    where = f"{folder}: head {described.name!r}"
    if described.held_out != model.held_out[described.name].summary():
        raise AdapterError(f"{where}: its config tells other held-out scores than its tensors hold: it was changed")
    backbone, generator = model.backbone, torch.Generator().manual_seed(0)
    widths = (backbone.embedding_dim, backbone.penultimate_dim, backbone.num_classes or None)
    embedding, penultimate, logits = (
        None if width is None else torch.randn(2, width, generator=generator).to(model.device) for width in widths
    )
    assert embedding is not None
    try:
        with torch.no_grad():
            scores = model.heads[described.name](BackboneOutput(embedding, penultimate, logits))["uncertainty"]
    except Exception as error:  # whatever tensors that do not go together make torch raise
        raise AdapterError(f"{where} does not work on this backbone ({type(error).__name__}: {error})") from error
    if scores.shape != (2,) or not bool((scores.isfinite() & (scores >= -1e-3)).all()):
        raise AdapterError(
            f"{where}: its tensors give scores that are no uncertainties: {scores.flatten()[:4].tolist()}"
        )


def _build(described: HeadConfig, dims: FeatureDims, file_bytes: int, folder: Path) -> Head:
    where = f"{folder}: head {described.name!r}"
    try:
        with torch.random.fork_rng(devices=[]), _Budget(8 * file_bytes + 2**25, where):
            head = make_head(described.name, **described.options)
            head.build(dims)
    except AdapterError:
        raise
    except Exception as error:  # whatever numbers that do not go together make torch raise
        told = ", ".join(f"{option}={value!r}" for option, value in described.options.items())
        raise AdapterError(f"{where} cannot be built from its options {told}: {error}") from error
    if (head.kind, head.scope) != (described.kind, described.scope):
        raise AdapterError(
            f"{where} is of kind {head.kind!r} and scope {head.scope!r}, its config says {described.kind[:60]!r} and "
            f"{described.scope!r}"
        )
    return head


def _fill(model: UncertainModel, tensors: dict[str, Tensor], folder: Path) -> None:
    targets = _tensors(model)
    missing, unknown = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    if missing or unknown:
        raise AdapterError(
            f"{folder}: the weights do not fit the config: missing {missing[:3]}, unknown {unknown[:3]} "
            f"({len(missing)} and {len(unknown)} tensors)"
        )
    for name, target in targets.items():
        found = tensors[name]
        if found.shape != target.shape or found.dtype != target.dtype:
            raise AdapterError(
                f"{folder}: the tensor {name!r} is {found.dtype} {list(found.shape)}, expected {target.dtype} "
                f"{list(target.shape)}"
            )
    for name, head, scores in model.each_head():
        of_head = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        of_scores = {key: of_head.pop(f"{HELD_OUT}.{key}") for key in scores.state_dict()}
        head.load_state_dict(of_head)
        scores.load_state_dict(of_scores)
        try:
            scores.check()
        except PosthocError as error:
            raise AdapterError(f"{folder}: head {name!r}: {error}") from error
