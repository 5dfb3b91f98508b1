"""The networks of the CIFAR-10H recipe: backbones for 32 px with what was learned on CIFAR-10, and posteriors on top."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torchvision import transforms

from ..adapters.backbone import Backbone, build_backbone
from ..adapters.errors import BackboneError, OptionError, suggest
from ..adapters.heads.common import LogSumExpNet
from ..adapters.vmf import VonMisesFisher, concentration_from_resultant
from ..eval.datasets import default_data_dir
from .running import seeded
from .small_image_networks import DEPTHS, group_normalised, small_image_network, statistics

Parametrization = Literal["network", "norm"]
BOUNDS = torch.tensor([0.02, 0.9999])
"""Mean resultant lengths of the least and the most certain posterior that the network can answer with."""
WIDTH = 64
"""Of the network that answers with kappa."""


def cifar_backbone(
    name: str, checkpoint: Path | None = None, data_dir: Path | None = None, scratch: bool = False, seed: int = 0,
    size: int | None = None,
) -> Backbone:  # fmt: skip
    """A classifier of 32 px images: "resnet20", "resnet56", or a timm network with a stem for small images.

    Args:
        checkpoint: its weights on CIFAR-10; None: those of ResNet-20 and 56 are looked for in `data_dir`, itself by default
            `default_data_dir()`.
        scratch: random weights by the seed, and GroupNorm in the place of BatchNorm.
        size: what images of other sizes are brought to, by their shorter side and cut to the middle; None: they stay as they are.

    Raises BackboneError, and OptionError for a checkpoint and `scratch` at once.
    """
    if scratch and checkpoint is not None:
        raise OptionError(f"--scratch and --checkpoint {checkpoint} were given; expected one of them")
    if name not in DEPTHS and not timm.is_model(name):
        raise BackboneError(f"--backbone {name!r} is unknown; {suggest(name, [*DEPTHS, *timm.list_models()])}")
    if not scratch and checkpoint is None:
        checkpoint = _known_weights(name, Path(data_dir or default_data_dir()).expanduser())
    with seeded(seed):
        module = small_image_network(name)
        if scratch:
            group_normalised(module)
    mean, std = statistics(name)
    sized = [] if size is None else [transforms.Resize(size), transforms.CenterCrop(size)]
    transform = transforms.Compose([*sized, transforms.ToTensor(), transforms.Normalize(mean, std)])
    return build_backbone(module, checkpoint=checkpoint, transform=transform)


def _known_weights(name: str, data_dir: Path) -> Path:
    path = data_dir / f"cifar10_{name}.safetensors"
    if name in DEPTHS and path.is_file():
        return path
    where = f"{path} is not there: lay it there, or " if name in DEPTHS else ""
    raise BackboneError(
        f"--backbone {name} needs weights that were trained on CIFAR-10: {where}give them with --checkpoint FILE "
        "(.safetensors or .pth), or start from random ones with --scratch"
    )


def log_kappa_range(dim: int, kappa: float) -> tuple[float, float]:
    """Between which logarithms of concentrations the network answers. Raises OptionError where `kappa` is beyond them."""
    low, high = (float(bound.log()) for bound in concentration_from_resultant(BOUNDS.double(), dim))
    if not low < math.log(kappa) < high:
        raise OptionError(
            f"--kappa {kappa:g} was given; in {dim} dimensions expected {math.exp(low):.3g} to {math.exp(high):.3g}"
        )
    return low, high


class PosteriorNetwork(nn.Module):
    """Inputs -> posteriors vMF(mu, kappa) on S^(dim-1): a backbone, a linear projection, and a concentration.

    parametrization "network": kappa from a small network on the backbone's features; "norm": the length of the projected
    features, with weight norm on the projection (the paper's implicit kappa). kappa: its size before training. centred:
    whether the projection has a bias and begins at the principal directions; else at Xavier's numbers (the paper).
    untrained: the backbone has random weights. Its features of different images differ by some hundredths, and training moves
    all of them much farther, so that a network on features standardised at the start ends at its bound of kappa, which is
    then the same for all images: each image's features are normalised instead (LayerNorm), and not standardised.
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        dim: int,
        parametrization: Parametrization = "network",
        kappa: float = 16.0,
        centred: bool = True,
        untrained: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features, elementwise_affine=False) if untrained else nn.Identity()
        self.backbone, self.dim, self.kappa, self.centred = backbone, dim, kappa, centred
        self.projection: nn.Module = nn.Linear(features, dim, bias=centred)
        self.network: LogSumExpNet | None = None
        if parametrization == "norm":
            self.projection = parametrizations.weight_norm(self.projection, dim=0)
        else:
            self.network = LogSumExpNet(features, WIDTH)
            self.low, self.high = log_kappa_range(dim, kappa)
            self.level = nn.Parameter(
                torch.tensor(math.log((math.log(kappa) - self.low) / (self.high - math.log(kappa))))
            )

    @torch.no_grad()
    def start(self, features: Tensor) -> None:
        """The projection and the network's scales before training, from fitting rows' features [N, F].

        Where kappa is the norm, the centred projection has kappa as its mean length.
        """
        features = self.norm(features)
        mean = features.mean(0)
        if self.network is not None and isinstance(self.norm, nn.Identity):
            self.network.standardise(mean, features.std(0))
        layer: Any = self.projection
        weight = torch.empty_like(layer.weight)
        if self.centred:
            away = features - mean
            _, vectors = torch.linalg.eigh(away.double().T @ away.double())
            weight.copy_(vectors.flip(1)[:, : self.dim].T)
            if self.network is None:
                weight *= self.kappa / (away @ weight.T).norm(dim=1).mean()
            layer.bias.copy_(-weight @ mean)
        else:
            nn.init.xavier_normal_(weight, gain=self.kappa)
        layer.weight = nn.Parameter(weight) if self.network is not None else weight

    def forward(self, inputs: Tensor) -> VonMisesFisher:
        features = features_of(self.backbone, inputs)
        with torch.autocast(features.device.type, enabled=False):  # 8 bits of a large log kappa are too few
            features = self.norm(features)
            projected = self.projection(features)
            kappa = projected.norm(dim=-1) if self.network is None else self._kappa(self.network(features))
            return VonMisesFisher(functional.normalize(projected, dim=-1), kappa, validate_args=False)

    def _kappa(self, score: Tensor) -> Tensor:
        """log kappa between its bounds on a sigmoid, of slope about 1 in the middle, as in the kappa head."""
        width = self.high - self.low
        return (self.low + width * torch.sigmoid(self.level + 4.0 / width * score)).exp()


class SoftClassifier(nn.Module):
    """Inputs -> features [B, F] and logits [B, C]: fine-tuned by cross-entropy with the votes, it is what to compare with."""

    def __init__(self, backbone: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.linear = backbone, copy.deepcopy(linear).requires_grad_(True)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        features = features_of(self.backbone, inputs)
        return features, self.linear(features).float()


def features_of(backbone: nn.Module, inputs: Tensor) -> Tensor:
    """The embedding [B, F], float32; inputs that are features already stay."""
    return (backbone(inputs).embedding if isinstance(backbone, Backbone) else backbone(inputs)).float()


def trainable_copy(backbone: Backbone) -> Backbone:
    """A copy whose weights train; its BatchNorm keeps its statistics, and its classifier, which is not used, its weights."""
    own = copy.deepcopy(backbone)
    own.module.requires_grad_(True)
    for name in own.structure.own:
        own.module.get_submodule(name).requires_grad_(False)
    return own.to(memory_format=torch.channels_last)
