"""Laplace metric learning: a Gaussian posterior over the last linear layer of an embedding, from mined pairs.

Source: Warburg et al., "Bayesian Metric Learning for Uncertainty Quantification in Image Retrieval", NeurIPS 2023, arXiv
2302.01332.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .curvature import CERTAIN
from .errors import DataError, NotFittedError, OptionError
from .metric_curvature import (
    check_curvature,
    check_scale,
    dense_pairs,
    hessian_diagonal,
    mine_counts,
    pair_diagonal,
)
from .metric_predictive import MetricEmbedding, direction_moments, summarise
from .mining import check_miner
from .positives import target_masks

if TYPE_CHECKING:
    from .laplace_rows import RowArray

PAIR_COUNTS = ("observed", "images", "all")
BATCH = 256

__all__ = ["MetricEmbedding", "MetricPosterior", "hessian_diagonal"]


class MetricPosterior(nn.Module):
    """Gaussian posterior with diagonal covariance over a linear layer z = W x + b whose directions are compared.

    Precision of each weight: the clamped curvature max(H, 0) plus the prior precision. H sums a metric loss over mined
    pairs (see `metric_curvature`): attraction of positives and, but for "positives", repulsion of negatives.

    Args:
        inputs, outputs: d_in and D, D >= 2.
        loss: "euclidean" (layer with normaliser) or "arccos".
        approximation: "positives" (the paper's pos), "fixed" (fix: partners held fixed, positives minus negatives) or
            "full". Only "positives" with "euclidean" is positive by construction; of the others a large part of the
            entries is negative, is set to 0 after summing, and keeps the prior's variance.
        margin, miner: which triplets of a batch count (`mining.mine_triplets`).
        pair_count: how much they count. "images": each image once, by the mean over the triplets it is anchor of, so
            that H neither grows with the batch size nor with the number of negatives. "observed": every triplet of the
            pass, as the paper's post-hoc code. "all": N^2 times the mean over triplets, as its online code.
        max_triplets: of a batch, a random subset; None: all of them, which costs no more.
        prior_precision: of the zero-mean prior; `choose_prior` and `optimize_prior_precision` set it.
        reference: the cross term of "arccos" with the sign of the paper's code, which is wrong.

    All state lies in buffers: `weight` [D, d_in], `bias` [D], `curvature_weight`, `curvature_bias` (before clamping),
    `prior_precision`.
    """

    weight: Tensor
    bias: Tensor
    curvature_weight: Tensor
    curvature_bias: Tensor
    prior_precision: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        loss: str = "euclidean",
        approximation: str = "positives",
        margin: float = 0.7,
        miner: str = "all",
        pair_count: str = "images",
        max_triplets: int | None = None,
        prior_precision: float = 1.0,
        reference: bool = False,
    ) -> None:
        super().__init__()
        check_curvature("MetricPosterior", loss, approximation)
        check_miner("MetricPosterior", margin, miner)
        check_scale("MetricPosterior", prior_precision=prior_precision, max_triplets=max_triplets)
        if pair_count not in PAIR_COUNTS:
            raise OptionError(f"MetricPosterior: pair_count={pair_count!r}; use one of {', '.join(PAIR_COUNTS)}")
        if outputs < 2:
            raise OptionError(f"MetricPosterior: a direction needs at least 2 dimensions; outputs={outputs} was given")
        self.loss, self.approximation, self.margin, self.miner = loss, approximation, margin, miner
        self.pair_count, self.max_triplets, self.reference = pair_count, max_triplets, reference
        self.register_buffer("weight", torch.zeros(outputs, inputs))
        self.register_buffer("bias", torch.zeros(outputs))
        self.register_buffer("curvature_weight", torch.zeros(outputs, inputs))
        self.register_buffer("curvature_bias", torch.zeros(outputs))
        self.register_buffer("prior_precision", torch.tensor(float(prior_precision)))

    @torch.no_grad()
    def take(self, weight: Tensor, bias: Tensor | None, curvature: float = 0.0) -> None:
        """Set the layer, and the curvature to a number. Raises OptionError for other shapes."""
        if weight.shape != self.weight.shape or (bias is not None and bias.shape != self.bias.shape):
            raise OptionError(f"expected a weight {tuple(self.weight.shape)}; given {tuple(weight.shape)}")
        self.weight.copy_(weight.detach())
        self.bias.copy_(torch.zeros_like(self.bias) if bias is None else bias.detach())
        self.curvature_weight.fill_(curvature)
        self.curvature_bias.fill_(CERTAIN if bias is None else curvature)

    @torch.no_grad()
    def fit(
        self,
        x: np.ndarray | Tensor | RowArray,
        label: np.ndarray | Tensor | None = None,
        *,
        position: np.ndarray | Tensor | None = None,
        subset: np.ndarray | None = None,
        batch_size: int = BATCH,
        generator: torch.Generator | None = None,
    ) -> MetricPosterior:
        """Curvature at the layer (`take` it first), in one pass over shuffled batches of stored inputs; returns itself.

        Args:
            x: [N, d_in], memory maps welcome.
            label: int [N]; or, instead of it,
            position: [N, K] in metres (positives nearer than 10, negatives farther than 25: `positives.place_masks`).
            subset: positions of the rows to use; default all.
            batch_size: rows among which triplets are mined.
        A batch without triplets adds nothing. Raises DataError on rows that do not fit or are not finite.
        """
        if not bool(self.weight.any()):
            raise NotFittedError("this MetricPosterior has no layer yet: call take(weight, bias) before fit")
        given = label if position is None else position
        if given is None or (label is not None and position is not None):
            raise DataError("MetricPosterior.fit expects either labels [N] or positions [N, K]")
        target = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
        if x.ndim != 2 or x.shape[1] != self.weight.shape[1] or len(target) != len(x):
            raise DataError(
                f"inputs [N, {self.weight.shape[1]}] and N labels or positions are expected; given {tuple(x.shape)} and "
                f"{len(target)}"
            )
        rows = torch.arange(len(x)) if subset is None else torch.as_tensor(np.asarray(subset))
        if len(rows) == 0:
            raise DataError("MetricPosterior.fit got no rows: subset is empty")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        of_weight, of_bias = torch.zeros_like(self.weight).double(), torch.zeros_like(self.bias).double()
        triplets = 0.0
        for batch in rows.split(max(2, batch_size)):
            part = self.batch_curvature(
                _rows(x, batch, self.weight), target[batch.to(target.device)], generator=generator
            )
            of_weight += part[0]
            of_bias += part[1]
            triplets += part[2]
        factor = self.count_factor(triplets, len(rows))
        self.curvature_weight.copy_(of_weight * factor)
        if self.has_bias:
            self.curvature_bias.copy_(of_bias * factor)
        return self

    def count_factor(self, triplets: float, rows: int) -> float:
        """What the curvature of so many triplets is multiplied by to stand for so many rows."""
        return rows**2 / max(triplets, 1.0) if self.pair_count == "all" else 1.0

    @property
    def has_bias(self) -> bool:
        return bool((self.curvature_bias < CERTAIN).all())

    def batch_curvature(
        self,
        x: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, float]:
        """Summed curvature of a batch's triplets, float64 [D, d_in] and [D], and how many triplets there were.

        x: [n, d_in]; target: labels int [n] or positions [n, K]; weight, bias: other than the posterior's mean.
        """
        weight, bias = self.weight if weight is None else weight, self.bias if bias is None else bias
        positive, negative = (mask.to(x.device) for mask in target_masks(target))
        z = functional.linear(x, weight, bias)
        counts = mine_counts(z, positive, negative, self.margin, self.miner, self.max_triplets, generator)
        triplets = float(counts.positive.sum())
        if self.pair_count == "images":
            counts = counts.mean_per_anchor()
        pairs, cross = dense_pairs(counts.positive, counts.negative, self.approximation)
        found = pair_diagonal(x, weight, bias, pairs, loss=self.loss, cross=cross, reference=self.reference)
        return *found, triplets

    @torch.no_grad()
    def remember(self, of_weight: Tensor, of_bias: Tensor, memory: float) -> None:
        """The online recursion H <- memory H + max(h, 0): the stationary level of a constant h is h / (1 - memory)."""
        self.curvature_weight.mul_(memory).add_(of_weight.clamp(min=0.0).to(self.curvature_weight))
        if self.has_bias:
            self.curvature_bias.mul_(memory).add_(of_bias.clamp(min=0.0).to(self.curvature_bias))

    def scale(self, prior_precision: float | Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Tensor]:
        """Standard deviations of weight [D, d_in] and bias [D]: 1 / (sqrt(max(H, 0) + prior) + eps).

        The paper's code has eps = 1e-6.
        """
        prior = self.prior_precision if prior_precision is None else prior_precision
        both = (self.curvature_weight, self.curvature_bias)
        of_weight, of_bias = (1.0 / ((h.clamp(min=0.0) + prior).sqrt() + eps) for h in both)
        return of_weight, torch.where(self.curvature_bias < CERTAIN, of_bias, 0.0)

    def sample_weights(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws [S, D, d_in] and [S, D] of weight and bias, from standard normal noise [S, D d_in + D]."""
        split = noise.split([self.weight.numel(), self.bias.numel()], dim=1)
        of_weight, of_bias = self.scale()
        return self.weight + split[0].view(-1, *self.weight.shape) * of_weight, self.bias + split[1] * of_bias

    def noise(self, samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal numbers for `sample_weights`, drawn on the CPU so that every device gives the same."""
        size = self.weight.numel() + self.bias.numel()
        result = torch.empty(samples, size, dtype=self.weight.dtype, device=self.weight.device)
        for row in result:
            row.copy_(torch.randn(size, generator=generator, dtype=torch.float64))
        return result

    def embeddings(self, x: Tensor, noise: Tensor) -> Tensor:
        """Unit embeddings [S, B, D] of inputs [B, d_in] under S draws of the weights, the same for all images.

        Retrieval needs such joint draws; what is asked of single images does not (`predict`).
        """
        layers = (self.sample_weights(one) for one in noise.split(1))  # one layer is held at a time
        return torch.stack([functional.normalize(functional.linear(x, w[0], b[0]), dim=-1) for w, b in layers])

    def gaussian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [B, D] of z for inputs [B, d_in]; its dimensions are independent."""
        of_weight, of_bias = self.scale()
        mean = functional.linear(x, self.weight, self.bias)
        return mean, functional.linear(x.square(), of_weight.square(), of_bias.square())

    def predict(
        self, x: Tensor, samples: int | None = None, generator: torch.Generator | None = None
    ) -> MetricEmbedding:
        """Embeddings of inputs [B, d_in] with their uncertainty.

        None: in closed form, deterministic. A number: from so many draws of the weights, shared by all images, debiased.
        """
        if samples is None:
            return direction_moments(*self.gaussian(x))
        if samples < 2:
            raise OptionError(f"predict expects samples >= 2, or None for the closed form; given {samples}")
        return summarise(torch.cat([self.embeddings(x, self.noise(1, generator)) for _ in range(samples)]))

    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """-1/2 [sum log(max(H, 0) + tau) - P log tau + tau |theta|^2], the evidence up to what tau does not change."""
        tau = torch.as_tensor(self.prior_precision if prior_precision is None else prior_precision).to(self.weight)
        curvature, theta = self._flat()
        penalty = tau * theta.square().sum()
        return -0.5 * ((curvature + tau).log().sum() - len(theta) * tau.log() + penalty)

    @torch.no_grad()
    def optimize_prior_precision(self, steps: int | None = None) -> float:
        """Set the prior precision that maximises the marginal likelihood; returns it.

        The maximum is where effective parameters equal tau |theta|^2 (MacKay 1992): unique, found by halving. `steps`:
        instead, so many Adam steps of .1 on log tau from 1, as the paper's code (which takes a single one and so ends at
        .905 or 1.105). Raises OptionError but for "positives" with "euclidean": clamped curvature is no likelihood.
        """
        if (self.approximation, self.loss) != ("positives", "euclidean"):
            raise OptionError(
                "the marginal likelihood needs approximation='positives' with loss='euclidean': curvature that was "
                f"negative and set to 0 ({self.approximation!r}, {self.loss!r}) is no likelihood's. Use choose_prior"
            )
        curvature, theta = (part.double() for part in self._flat())
        if steps is not None:
            found = _adam_precision(curvature, theta, steps)
        else:
            low, high = math.log(1e-12), math.log(1e12)
            for _ in range(80):
                middle = 0.5 * (low + high)
                tau = math.exp(middle)
                surplus = float((curvature / (curvature + tau)).sum() - tau * theta.square().sum())
                low, high = (middle, high) if surplus > 0 else (low, middle)
            found = math.exp(low)
        self.prior_precision.fill_(found)
        return found

    def _flat(self) -> tuple[Tensor, Tensor]:
        """Clamped curvature and means [P] of weight and bias (if the layer has one)."""
        curvature, theta = [self.curvature_weight.flatten()], [self.weight.flatten()]
        if self.has_bias:
            curvature.append(self.curvature_bias)
            theta.append(self.bias)
        return torch.cat(curvature).clamp(min=0.0), torch.cat(theta)


def _adam_precision(curvature: Tensor, theta: Tensor, steps: int) -> float:
    log_prior = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_prior], lr=0.1)
    with torch.enable_grad():
        for _ in range(steps):
            tau = log_prior.exp()
            loss = 0.5 * ((curvature + tau).log().sum() - len(theta) * log_prior + tau * theta.square().sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return float(log_prior.detach().exp())


def _rows(x: np.ndarray | Tensor | RowArray, rows: Tensor, like: Tensor) -> Tensor:
    """Rows of an array or tensor as a tensor of the layer's dtype and device; DataError if they are not finite."""
    picked = x[rows.to(x.device)] if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x[rows.numpy()]))
    picked = picked.to(like)
    if not bool(picked.isfinite().all()):
        bad = rows[(~picked.isfinite()).any(1).cpu()][:5].tolist()
        raise DataError(f"the inputs of the layer are not finite in rows {bad}")
    return picked
