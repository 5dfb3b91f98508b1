"""MCInfoNCE: InfoNCE averaged over samples of probabilistic embeddings."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import OptionError
from ..vmf import VonMisesFisher
from .common import check_counts, check_positive, log_parameter, number
from .sampled import Sampling, sampled_loss


class MCInfoNCE(nn.Module):
    """Negative log-likelihood that the positive matches the anchor, averaged over posterior samples.

    With z ~ vMF(mu, kappa) drawn n_samples times for every image,
    loss = -mean_i log mean_s exp(a) / (exp(a) + w sum_m exp(c_m)), a = tau z_i.z_i+ and c_m = tau z_i.z_m-.
    The logarithm of a mean biases it upward by O(1/n_samples).

    How many negatives there are, and w, decide which concentrations the loss wants. On data whose positives are exp(tau cosine)
    times as likely as negatives, up to a factor, it finds beside the true means 1.9, 1.5, 1.3 and 1.0 times the true ones with
    w = 1 and M = 1, 4, 8, 32; with the paper's average w = 1 / M 1.8, 1.7 and 1.4 times with M = 4, 8, 32, and it prefers
    cosines that are shrunk (docs/objectives.md; measured by benchmarks/synthetic_negatives.py).

    Args:
        concentration: tau > 0, the inverse temperature; another quantity than the posteriors' kappa.
        n_samples: Monte-Carlo samples for each posterior.
        learnable: whether tau is a parameter (through its logarithm).
        antithetic: whether samples come in pairs of opposite directions, and in other pairs of opposite quantiles. At 256
            to 512 samples this lowers the variance of the loss 1.5 to 4.3 times and of gradients 1.2 to 2.8 times, and
            the bias in n_samples with it, so at few samples the mean is not the paper's. Without effect beside `sobol`.
        sobol: whether samples come from randomly shifted Sobol points instead. The variance of the loss falls 1.8 to 8.4
            times and of gradients 1.4 to 2.8 times from independent samples, for 1.3 times the time. A power of two
            of them, 64 or more.
        negative_weight: w > 0; None is 1 / M.
        positive_draws: samples of the positive for each of the anchor; the mean over samples then runs over all of
            them, which lowers variance and bias where negatives are many, for one more column each.
        reference: as the paper's code, whose sampler misses its concentration above kappa = 10 unless kappa >> d, and
            whose gradient for kappa is biased (`paper_sampler`). Full vectors: slow, and memory grows with all of them.
        compiled: whether blocks of rows go through torch.compile: the same samples, and the same results up to rounding, in
            about half the time (docs/speed.md). On a CPU it needs a C++ compiler (g++, or what the variable CXX names); on a
            GPU it would take Triton, and has not been tried. The first call takes some 20 s and 200 MB for the compiler,
            and again for another dimension, number of samples or columns, or without gradients (torch compiles 8 of these,
            `torch._dynamo.config.recompile_limit`, and runs others as they are); other batch sizes are free.
    Source: Kirchhof et al., ICML 2023, arXiv 2302.02865.
    """

    def __init__(
        self,
        concentration: float = 16.0,
        n_samples: int = 16,
        learnable: bool = False,
        antithetic: bool = True,
        *,
        negative_weight: float | None = None,
        sobol: bool = False,
        positive_draws: int = 1,
        reference: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        check_positive("MCInfoNCE", concentration=concentration)
        if negative_weight is not None:
            check_positive("MCInfoNCE", negative_weight=negative_weight)
        check_counts("MCInfoNCE", n_samples=n_samples, positive_draws=positive_draws)
        if reference and (positive_draws > 1 or sobol or compiled):
            raise OptionError(
                f"MCInfoNCE(positive_draws={positive_draws}, sobol={sobol}, compiled={compiled}, reference=True): the paper's "
                "code has neither extra draws nor Sobol points, and is not compiled; leave these as they are by default"
            )
        self.negative_weight = negative_weight
        self.n_samples, self.antithetic = n_samples, antithetic
        self.sobol, self.positive_draws, self.reference, self.compiled = sobol, positive_draws, reference, compiled
        self.log_concentration = log_parameter(concentration, learnable)
        self.fixed_concentration = float(concentration)

    @property
    def concentration(self) -> Tensor | float:
        return number(self.log_concentration, self.fixed_concentration)

    def forward(
        self,
        anchor: VonMisesFisher,
        positive: VonMisesFisher,
        negatives: VonMisesFisher | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scalar loss; batch shapes [B], [B] and [B, M] (None: the positives rolled by one row)."""
        sampling = Sampling(self.n_samples, self.antithetic, self.sobol, self.positive_draws, self.reference)
        # shapes are checked further on; none may end in another error here
        count = 1 if negatives is None else max((1, *negatives.batch_shape[-1:]))
        weight = 1.0 / count if self.negative_weight is None else self.negative_weight
        rows = partial(_rows, weight=weight, positives=self.positive_draws)
        posteriors = (anchor, positive, negatives)
        return sampled_loss("MCInfoNCE", rows, (self.concentration,), posteriors, sampling, generator, self.compiled)


def _rows(cosine: Tensor, tau: Tensor, *, weight: float, positives: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of the rows of sampled cosines [R, J, S], and its gradients for the cosines and for tau.

    The first columns are the positive's. A row's loss is -log mean_s exp(l), the mean over the positive's columns too,
    l = logsigmoid(tau c_0 - log(weight sum_m exp(tau c_m))).
    """
    close, far = cosine[:, :positives], cosine[:, positives:]
    top = far.amax(1, keepdim=True).mul_(tau)
    grad = torch.addcmul(-top, cosine, tau).exp_()  # the positive's are overwritten
    mass = grad[:, positives:].sum(1, keepdim=True)
    odds = (close * tau - (top + mass.log()) - math.log(weight)).flatten(1)
    log = functional.logsigmoid(odds)
    loss = math.log(odds.shape[1]) - log.logsumexp(-1)
    pull = (torch.softmax(log, -1) * torch.sigmoid(-odds)).mul_(tau).reshape(close.shape)
    grad.mul_(pull.sum(1, keepdim=True).div_(mass))
    grad[:, :positives] = -pull
    by_tau = (grad * cosine).sum(-1).sum() / tau  # the loss is a function of tau times the cosines
    return loss.sum(), grad, by_tau
