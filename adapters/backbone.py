"""A frozen network: embedding, last-layer input and logits in one pass, its preprocessing and its fingerprint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import BackboneError, DataError, OptionError
from .images import Transform, apply_transform, check_ready, is_ready, ready_batch, split_images, transform_settings
from .module_backbone import ModuleReader
from .probing import first_reader, free_probes, noise, read_network, settled_reader, timm_probes, transform_probe
from .reading import BackboneOutput, Structure, as_linear
from .timm_backbone import HUB_PREFIX, TimmReader, cached_commit, create_timm, is_timm, timm_preprocessing
from .weights import dependent_tensors, load_strictly, read_checkpoint, tensor_fingerprint, weights_state

if TYPE_CHECKING:
    from .features import Features

__all__ = ["Backbone", "BackboneOutput", "build_backbone"]


class Backbone(nn.Module):
    """A frozen network; build it with `build_backbone`.

    `module` is frozen in place: eval mode, no parameter requires a gradient, and its weights and buffers never change
    by a bit; gradients with respect to the images still flow. `train()` leaves it in eval mode.

    source: "timm", "hub" or "module". name: timm name with tag, hub id, or class name. weights: "pretrained",
    "checkpoint", "random" or "as given". transform: PIL -> [3,H,W], None if unknown. preprocessing: its settings,
    JSON-able. A network of unknown input size that accepts no probe is read at its first batch; until then its
    dimensions raise BackboneError.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        source: str,
        name: str,
        revision: str | None,
        weights: str,
        transform: Transform | None,
        preprocessing: dict[str, Any],
        feature_layer: str | None,
        classifier_layer: str | bool | None,
    ) -> None:
        super().__init__()
        self.module = module.eval().requires_grad_(False)
        self.source, self.name, self.revision, self.weights = source, name, revision, weights
        self.transform, self.preprocessing = transform, preprocessing
        self.feature_layer, self.classifier_layer = feature_layer, classifier_layer
        self._reader: TimmReader | ModuleReader | None = None
        self._fingerprints: dict[str, tuple[Any, str]] = {}

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode, whatever is asked: the backbone is frozen."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        for parameter in self.parameters():
            return parameter.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point parameter."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return torch.float32

    @property
    def is_read(self) -> bool:
        """Whether embedding and classifier have been found; without a usable probe the first batch finds them."""
        return self._reader is not None

    @property
    def structure(self) -> Structure:
        """What the probe found. Raises BackboneError where only a first batch can tell."""
        if self._reader is None:
            raise BackboneError(
                f"the dimensions of {self.name} are not known before its first batch: it accepted no probe, or they "
                "follow the image size. Call it once on a batch, or wrap it with a transform= that gives one size."
            )
        return self._reader.structure

    @property
    def embedding_dim(self) -> int:
        """D of `embedding` [B, D]."""
        return self.structure.embedding_dim

    @property
    def penultimate_dim(self) -> int | None:
        """P of `penultimate` [B, P]; None without a single linear classifier."""
        return self.structure.penultimate_dim

    @property
    def num_classes(self) -> int:
        """C of `logits` [B, C]; 0 without a classifier."""
        return self.structure.num_classes

    def forward(self, images: Tensor) -> BackboneOutput:
        """One pass over preprocessed images [B,3,H,W]; see `BackboneOutput`. Raises DataError for other shapes."""
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise DataError(
                f"a backbone takes preprocessed images [B,3,H,W], but {found} was given; `prepare` makes them."
            )
        if self._reader is None:
            if torch.compiler.is_compiling():
                raise BackboneError(f"call {self.name} once on a batch before compiling it.")
            self._reader = self._read(images[:2])
        return self._reader(images)

    def _read(self, images: Tensor) -> TimmReader | ModuleReader:
        images = images.to(self.device, self.dtype)
        return read_network(self.module, images, self.feature_layer, self.classifier_layer)

    def _probe(self, custom_transform: bool) -> None:
        """Reads the network with noise, where its input size is known or can be found."""
        probes = None if custom_transform or not self.preprocessing else timm_probes(self.preprocessing)
        if custom_transform and self.transform is not None:
            made = transform_probe(self.transform)
            self.preprocessing = transform_settings(self.transform, made, self.preprocessing)
            probes = iter([made]) if len(made) == 2 else None
        if probes is not None:
            self._reader = first_reader(self._read, probes)
        else:
            self._reader = settled_reader(self._read, free_probes(self.transform))

    def require_transform(self) -> Transform:
        """The transform, or BackboneError saying how to give one."""
        if self.transform is None:
            raise BackboneError(
                f"the preprocessing of {self.name} is not known, so PIL and uint8 images cannot be used; "
                "pass transform= (PIL image -> float tensor [3,H,W]) when wrapping it."
            )
        return self.transform

    def prepare(self, images: Any) -> Tensor:
        """Images as the network takes them: [B,3,H,W] on its device and in its dtype.

        PIL images and uint8 images ([B,H,W,3], [B,H,W], [H,W,3], [B,3,H,W], lists) go through `transform`. Float
        tensors [B,3,H,W] are taken as preprocessed; they are checked, with a UserWarning if the normalisation seems
        to be missing. Raises DataError.
        """
        if is_ready(images):
            batch = ready_batch(images)
            check_ready(batch, self.preprocessing)
        else:
            batch = apply_transform(self.require_transform(), split_images(images))
        return batch.to(device=self.device, dtype=self.dtype)

    def classifier(self) -> nn.Linear:
        """The one linear classifier: `classifier()(penultimate) == logits`. BackboneError says why there is none."""
        structure = self.structure
        if structure.linear is None:
            raise BackboneError(f"{self.name}: {structure.refusal}")
        return as_linear(structure.linear)

    def fingerprint(self, scope: str = "embedding") -> str:
        """SHA-256 (hex) over names, shapes, dtypes and bytes of the weights and buffers an adapter depends on.

        scope "embedding" leaves out the classifier's own weights, "logits" takes all. The same on every device, for
        every memory layout, and after saving and loading. Raises OptionError for another scope.
        """
        if scope not in ("embedding", "logits"):
            raise OptionError(f"fingerprint scope {scope!r} is unknown; expected 'embedding' or 'logits'.")
        tensors = dependent_tensors(self.module, self.structure.own if scope == "embedding" else ())
        state = weights_state(tensors)
        known = self._fingerprints.get(scope)
        if known is None or known[0] != state:
            known = (state, tensor_fingerprint(tensors))
            self._fingerprints[scope] = known
        return known[1]

    def extract(self, data: Any, **options: Any) -> Features:
        """The stored features of a data set; see `features.extract`."""
        from .features import extract

        return extract(self, data, **options)

    def describe(self) -> dict[str, Any]:
        """What was found: names, dimensions, classifier (or why there is none), preprocessing, parameters, cost.

        The cost is measured: billions of multiply-accumulates for one image, and milliseconds per image on this device;
        None where the input size is not known.
        """
        structure = self.structure
        return {
            "name": self.name,
            "source": self.source,
            "revision": self.revision,
            "weights": self.weights,
            "network": type(self.module).__name__,
            "embedding_dim": structure.embedding_dim,
            "embedding_layer": structure.embedding_layer,
            "penultimate_dim": structure.penultimate_dim,
            "num_classes": structure.num_classes,
            "classifier": structure.linear_name,
            "classifier_kind": structure.kind,
            "classifier_refused": structure.refusal,
            "preprocessing": self.preprocessing,
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "cost": self._cost(),
        }

    def _cost(self) -> dict[str, Any] | None:
        size = self.preprocessing.get("input_size")
        if size is None or None in size:
            return None
        images = noise(size).to(self.device, self.dtype)
        with torch.inference_mode():
            with FlopCounterMode(display=False) as counter:
                self(images[:1])
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                self(images).embedding.sum().item()  # the number waits for the device
                seconds.append(time.perf_counter() - start)
        return {"gmacs": counter.get_total_flops() / 2e9, "ms_per_image": 1e3 * min(seconds) / len(images)}


def build_backbone(
    backbone: str | nn.Module | Backbone,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    transform: Transform | None = None,
    feature_layer: str | None = None,
    classifier_layer: str | bool | None = None,
    device: str | torch.device | None = None,
) -> Backbone:
    """A frozen backbone from a timm name, a hub id ("hf-hub:..."), any nn.Module, or a Backbone (returned as it is).

    checkpoint: local weights (.safetensors, or .pth read with `weights_only=True`), loaded strictly. transform: PIL
    image -> float [3,H,W]; overrides timm's. feature_layer, classifier_layer: dotted names, where embedding and
    classifier cannot be told; `classifier_layer=False`: the output is the embedding. device: None leaves the network
    where it is. A module given is frozen in place: eval mode, no parameter requires a gradient. Raises BackboneError.
    """
    if isinstance(backbone, Backbone):
        _refuse_changes(backbone, checkpoint, transform, feature_layer, classifier_layer)
        return backbone if device is None else backbone.to(device)
    if isinstance(backbone, str):
        module = create_timm(backbone, pretrained, checkpoint)
    elif isinstance(backbone, nn.Module):
        module = _unwrapped(backbone)
        if checkpoint is not None:
            load_strictly(module, read_checkpoint(checkpoint), checkpoint, type(module).__name__)
    else:
        raise BackboneError(
            f"a backbone of type {type(backbone).__name__} was given; expected a timm name, 'hf-hub:ID' or nn.Module."
        )
    weights = "checkpoint" if checkpoint is not None else "as given"
    if isinstance(backbone, str) and checkpoint is None:
        weights = "pretrained" if pretrained else "random"
    preprocessing, own_transform = timm_preprocessing(module) if is_timm(module) else ({}, None)
    source, name, revision = _identity(backbone, module, weights)
    result = Backbone(
        module if device is None else module.to(device),
        source=source,
        name=name,
        revision=revision,
        weights=weights,
        transform=transform or own_transform,
        preprocessing=preprocessing,
        feature_layer=feature_layer,
        classifier_layer=classifier_layer,
    )
    result._probe(custom_transform=transform is not None)
    return result


def _refuse_changes(backbone: Backbone, checkpoint: Any, transform: Any, feature: Any, classifier: Any) -> None:
    """A finished Backbone cannot be given other options."""
    given = {
        "checkpoint": checkpoint is not None,
        "transform": transform not in (None, backbone.transform),
        "feature_layer": feature not in (None, backbone.feature_layer),
        "classifier_layer": classifier not in (None, backbone.classifier_layer),
    }
    changed = [f"{name}=" for name, change in given.items() if change]
    if changed:
        raise BackboneError(
            f"{', '.join(changed)} was given with {backbone.name}, which is already wrapped; wrap its network anew: "
            "build_backbone(backbone.module, ...)."
        )


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network inside torch.compile's or a data-parallel wrapper, whose parts can be read."""
    inner = getattr(module, "_orig_mod", None)
    if inner is None and isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = module.module
    return module if inner is None else _unwrapped(inner)


def _identity(given: str | nn.Module, module: nn.Module, weights: str) -> tuple[str, str, str | None]:
    """source, name and revision: the commit of the hub that pretrained weights came from, where one can be told."""
    if isinstance(given, str) and given.startswith(HUB_PREFIX):
        name, _, revision = given.partition("@")
        commit = cached_commit(name.removeprefix(HUB_PREFIX), revision or None) if weights == "pretrained" else None
        return "hub", name, commit or revision or None
    if is_timm(module):
        config: Any = module.pretrained_cfg
        architecture, tag = config.get("architecture"), config.get("tag")
        if architecture:
            name = f"{architecture}.{tag}" if tag else architecture
            asked = given.partition("@")[2] or None if isinstance(given, str) else None
            return "timm", name, cached_commit(f"timm/{name}", asked) if weights == "pretrained" else None
    return "module", type(module).__name__, None
