"""MCInfoNCE: InfoNCE averaged over samples of probabilistic embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import OptionError
from ..vmf import VonMisesFisher


class MCInfoNCE(nn.Module):
    """Negative log-likelihood that the positive matches the anchor, averaged over posterior samples.

    With z ~ vMF(mu, kappa) drawn n_samples times for every image,
    loss = -mean_i log mean_s exp(a) / (exp(a) + mean_m exp(c_m)), a = tau z_i.z_i+ and c_m = tau z_i.z_m-.
    The logarithm of a mean biases it upward by O(1/n_samples).

    Args:
        concentration: tau > 0, the inverse temperature; another quantity than the posteriors' kappa.
        n_samples: Monte-Carlo samples for each posterior.
        learnable: whether tau is a parameter (through its logarithm).
    Source: Kirchhof et al., ICML 2023, arXiv 2302.02865.
    """

    def __init__(self, concentration: float = 16.0, n_samples: int = 16, learnable: bool = False) -> None:
        super().__init__()
        if not 0 < concentration < math.inf or n_samples < 1:
            raise OptionError(
                f"MCInfoNCE(concentration={concentration}, n_samples={n_samples}): both must be positive and finite"
            )
        self.n_samples = n_samples
        log = torch.tensor(float(concentration)).log()
        self.log_concentration = nn.Parameter(log) if learnable else None
        self.fixed_concentration = float(concentration)

    @property
    def concentration(self) -> Tensor | float:
        return self.fixed_concentration if self.log_concentration is None else self.log_concentration.exp()

    def forward(
        self,
        anchor: VonMisesFisher,
        positive: VonMisesFisher,
        negatives: VonMisesFisher | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scalar loss; batch shapes [B], [B] and [B, M] (None: the positives rolled by one row)."""
        s = (self.n_samples,)
        z = anchor.rsample(s, generator)
        p = positive.rsample(s, generator)
        n = p.roll(1, 1).unsqueeze(2) if negatives is None else negatives.rsample(s, generator)
        tau = self.concentration
        close = tau * (z * p).sum(-1)
        far = tau * torch.einsum("sbd,sbmd->sbm", z, n)
        log = functional.logsigmoid(close - far.logsumexp(-1) + math.log(far.shape[-1]))
        return (math.log(self.n_samples) - log.logsumexp(0)).mean()
