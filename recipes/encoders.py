"""Perceptrons of the controlled experiments: plain, and as a probabilistic encoder with a mean and a concentration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.errors import DataError
from ..adapters.vmf import VonMisesFisher


def mlp(sizes: Sequence[int], slope: float = 0.01, bias: bool = True) -> nn.Sequential:
    """Linear layers of these sizes with leaky ReLU between them and none at the end: [..., sizes[0]] -> [..., sizes[-1]].

    >>> len(mlp([10, 100, 10]))
    3
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.LeakyReLU(slope)]
    return nn.Sequential(*layers[:-1])


class RangedConcentration(nn.Module):
    """kappa(x) = exp(u softplus(net(x)) + v) > exp(v); `calibrate` fixes u and v. Infinite everywhere until then.

    Inputs [..., D] -> [...]. Source: Kirchhof et al., ICML 2023, arXiv 2302.02865 (code).
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", torch.tensor(math.inf))
        self.register_buffer("offset", torch.tensor(math.inf))

    @torch.no_grad()
    def calibrate(self, inputs: Tensor, lowest: float, highest: float) -> None:
        """Set u and v so that the concentrations of these inputs [N, D] run from `lowest` to `highest`, above 0.

        Infinite ones make every concentration infinite, and the network has no part in it. Raises DataError where the
        network is the same for all inputs.
        """
        if math.isinf(lowest) or math.isinf(highest):
            self.scale.fill_(math.inf)
            self.offset.fill_(math.inf)
            return
        least, most = functional.softplus(self.net(inputs)).aminmax()
        if most <= least:
            raise DataError(
                f"the network of the concentrations is constant ({float(least):g}) on {len(inputs)} inputs: no range of "
                "concentrations can be given to it; take another seed"
            )
        self.scale.copy_((math.log(highest) - math.log(lowest)) / (most - least))
        self.offset.copy_(math.log(highest) - self.scale * most)

    def forward(self, inputs: Tensor) -> Tensor:
        if bool(torch.isinf(self.offset)):
            return inputs.new_full(inputs.shape[:-1], math.inf)
        return torch.exp(self.scale * functional.softplus(self.net(inputs)[..., 0]) + self.offset)


class VmfEncoder(nn.Module):
    """Two networks, one for the mean direction and one for the concentration: inputs [..., D] -> vMF(mu, kappa).

    Attributes: mean, concentration: the networks. shared: whether the second looks at the first's answer, not at the inputs.
    """

    def __init__(self, mean: nn.Module, concentration: RangedConcentration, shared: bool = False) -> None:
        super().__init__()
        self.mean, self.concentration, self.shared = mean, concentration, shared

    def direction(self, inputs: Tensor) -> Tensor:
        """mu, unit length, [..., d]."""
        return functional.normalize(self.mean(inputs), dim=-1)

    def forward(self, inputs: Tensor) -> VonMisesFisher:
        mu = self.direction(inputs)
        # in float32 under mixed precision as well: its exponential would overflow float16
        with torch.autocast(inputs.device.type, enabled=False):
            kappa = self.concentration((mu if self.shared else inputs).float())
        return VonMisesFisher(mu.float(), kappa, validate_args=False)

    def calibrate(self, inputs: Tensor, lowest: float, highest: float) -> None:
        """See `RangedConcentration.calibrate`; inputs [N, D]."""
        with torch.no_grad():
            self.concentration.calibrate(self.direction(inputs) if self.shared else inputs, lowest, highest)


def paper_encoder(inputs: int, outputs: int, width: int = 0, hidden: int = 6, shared: bool = False) -> VmfEncoder:
    """The paper's encoder from `inputs` to `outputs` dimensions; its concentrations want `calibrate`.

    Args:
        width: of the hidden layers. 0: 10, 50 and 10 times what a network gives out for the first, the middle and the last
            one, so the mean's is `outputs` times as wide as the concentration's.
        hidden: layers between the first and the last linear one.
    """

    def sizes(inputs: int, outputs: int) -> list[int]:
        first, middle = (width, width) if width else (10 * outputs, 50 * outputs)
        return [inputs, first, *[middle] * (hidden - 1), first, outputs]

    make: Callable[[int, int], nn.Module] = lambda i, o: mlp(sizes(i, o))  # noqa: E731
    return VmfEncoder(make(inputs, outputs), RangedConcentration(make(outputs if shared else inputs, 1)), shared)
