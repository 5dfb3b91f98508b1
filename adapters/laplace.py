"""Laplace posterior over the last linear layer of a classifier, in closed form on stored features.

For a linear classifier f = W phi + b with softmax cross-entropy, the generalised Gauss-Newton matrix needs nothing but
the layer's inputs phi and the class probabilities p: its blocks are G_n (x) phi_n phi_n^T with G_n = diag(p_n) - p_n
p_n^T. No Jacobian, no backward pass and no [N, C, C] array is ever formed.

Source: Daxberger et al., "Laplace Redux", NeurIPS 2021, arXiv 2106.14806; MacKay, "The evidence framework applied to
classification networks", Neural Computation 4 (1992). Conventions (blocks of weight and bias, prior, temperature,
marginal likelihood) are laplace-torch's, so that numbers can be compared.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .curvature import Curvature, curvature_class
from .errors import DataError, NotFittedError, OptionError, suggest
from .gathering import sum_over_launch
from .heldout_search import best_on_held_out
from .laplace_rows import Rows, check_layer, check_targets, chunks, loss_sum, signature
from .predictive import entropy, laplace_bridge, mean_field, monte_carlo, normal_draws, probit
from .prior_precision import check_prior, check_prior_fits, evidence_precision

LINKS = ("probit", "bridge", "bridge_norm", "mean-field", "mc")
LIKELIHOODS = ("classification", "regression")
KINDS = {
    "predictive_entropy": "total",
    "mutual_information": "epistemic",
    "expected_entropy": "aleatoric",
    "max_probability": "total",
}
"""What each of `LastLayerPosterior.uncertainties` means."""


class LastLayerPosterior(nn.Module):
    """Gaussian posterior over weight and bias of a linear layer, at the layer's own parameters.

    Args:
        structure: of the curvature: "kron", "diag", or "full" (weights and biases together, small layers only; it
            refuses, with the size, what would take more than 2 GiB). laplace-torch's word `hessian_structure` is
            taken too. Its structures over other weights than the last layer's need the live network:
            `posthoc.adapters.live_laplace`.
        prior_precision: of the zero-mean Gaussian prior; a number, two (weight, bias), or for "diag" and "full" one
            for each parameter [C, P + 1], biases last.
        temperature: of the likelihood, as in laplace-torch: the log likelihood and its curvature are divided by it;
            below 1 the posterior is more concentrated. It leaves the classifier's logits alone. For a tempered softmax
            p(y | f / T), fit with weight / T and bias / T.
        likelihood: "classification" (softmax) or "regression" (Gaussian noise of standard deviation `sigma_noise`).

    `fit` takes logits in the precision of the rows (at least float32), all else in float64; `.float()` makes it small
    and quick. Outputs are differentiable in their inputs.
    """

    weight: Tensor
    bias: Tensor | None
    prior_precision: Tensor
    loss: Tensor

    def __init__(
        self,
        structure: str = "kron",
        prior_precision: float | Tensor = 1.0,
        temperature: float = 1.0,
        likelihood: str = "classification",
        sigma_noise: float = 1.0,
        *,
        hessian_structure: str | None = None,
    ) -> None:
        super().__init__()
        self.structure = hessian_structure or structure
        if self.structure in ("all", "subnetwork", "functional"):
            raise OptionError(
                f"structure={self.structure!r} needs the live network, not stored features: use "
                "posthoc.adapters.live_laplace.live_posterior(backbone, data, structure=...), which is slow"
            )
        curvature_class(self.structure)
        if not (0 < temperature < math.inf and 0 < sigma_noise < math.inf):
            raise OptionError(
                f"temperature={temperature}, sigma_noise={sigma_noise} were given; expected positive numbers"
            )
        if likelihood not in LIKELIHOODS:
            raise OptionError(f"likelihood={likelihood!r} is not known: {suggest(likelihood, LIKELIHOODS)}")
        self.temperature, self.likelihood, self.sigma_noise = float(temperature), likelihood, float(sigma_noise)
        self.n_data, self.rows, self.signature = 0, "train", 0.0
        self.curvature: Curvature | None = None
        self.register_buffer("prior_precision", check_prior(prior_precision))
        self.register_buffer("loss", torch.tensor(math.nan, dtype=torch.float64))

    @torch.no_grad()
    def fit(
        self,
        penultimate: Rows,
        weight: np.ndarray | Tensor,
        bias: np.ndarray | Tensor | None = None,
        labels: np.ndarray | Tensor | None = None,
        subset: np.ndarray | None = None,
        *,
        rows: str = "train",
        across_processes: bool = False,
    ) -> LastLayerPosterior:
        """Curvature at (weight, bias) on stored inputs of the layer, streamed in chunks; returns itself.

        Args:
            penultimate: [N, P] inputs of the linear layer, memory maps welcome.
            weight, bias: [C, P], [C] or None. C >= 2 for classes.
            labels: int [N] or soft [N, C]; for regression the targets [N, C] or [N]. Only the marginal likelihood
                needs them.
            subset: positions of the rows to use (default all), so that a memory map need not be copied.
            rows: "train", those the layer was trained on, or "heldout", others. The marginal likelihood is one of the
                rows that the parameters are the optimum of, so it is refused on others.
            across_processes: whether the rows are this process's share of a launch's; one all-reduce adds all up.

        Raises DataError on shapes that do not fit, non-finite values (naming rows), labels out of range.
        """
        if rows not in ("train", "heldout"):
            raise OptionError(f"rows={rows!r} was given; expected 'train' (the layer was trained on them) or 'heldout'")
        weight = torch.as_tensor(weight).detach().double()
        bias = None if bias is None else torch.as_tensor(bias).detach().double()
        softmax = self.likelihood == "classification"
        classes, inputs = check_layer(weight, bias, 2 if softmax else 1)
        targets = check_targets(penultimate, labels, inputs, classes, softmax)
        curvature = curvature_class(self.structure)(inputs, classes, bias is not None).to(weight)
        check_prior_fits(self.prior_precision, curvature)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.prior_precision = self.prior_precision.to(weight)
        total: list[Tensor] = []
        signed = weight.new_zeros(())
        loss = weight.new_zeros(()) if targets is not None else weight.new_tensor(math.nan)
        subset = np.arange(len(penultimate)) if subset is None else np.asarray(subset)
        if len(subset) == 0:
            raise DataError("subset holds no rows: a posterior needs at least one")
        for at, phi in chunks(penultimate, subset, curvature.width, weight.device):
            logits = nn.functional.linear(phi, weight.to(phi), None if bias is None else bias.to(phi)).double()
            phi = phi.double()  # directions without curvature would show the rounding of single precision, times N
            signed += signature(phi)
            sums = curvature.sums(phi, torch.softmax(logits, dim=-1) if softmax else None)
            total = list(sums) if not total else [a.add_(b) for a, b in zip(total, sums, strict=True)]
            if targets is not None:
                loss += loss_sum(logits, targets[at].to(logits.device), softmax)
        count = weight.new_tensor(float(len(subset)))
        if across_processes:
            *total, loss, signed, count = sum_over_launch([*total, loss, signed, count])
        self.curvature, self.rows, self.loss = curvature, rows, loss
        self.n_data, self.signature = int(count), float(signed)
        curvature.assign(tuple(total), self.n_data)
        return self

    def merge(self, other: LastLayerPosterior) -> LastLayerPosterior:
        """The posterior fitted on this one's rows and the other's, as if on all of them; both are left as they are.

        Prior and temperature are this one's. Raises OptionError unless both stand on the same layer.
        """
        mine, theirs = self.fitted(), other.fitted()
        same = self.structure == other.structure and self.likelihood == other.likelihood and self.rows == other.rows
        if same:
            same = torch.equal(self.weight, other.weight)
            same = same and (self.bias is None) == (other.bias is None)
            same = same and (self.bias is None or other.bias is None or torch.equal(self.bias, other.bias))
        if not same:
            raise OptionError(
                "merge adds statistics of one layer on different rows: structure, likelihood, weight, bias and the "
                f"kind of rows must be the same; got {self.structure} {self.rows} {tuple(self.weight.shape)} and "
                f"{other.structure} {other.rows} {tuple(other.weight.shape)}, or other parameters"
            )
        both = LastLayerPosterior(
            self.structure, self.prior_precision, self.temperature, self.likelihood, self.sigma_noise
        )
        both.register_buffer("weight", self.weight)
        both.register_buffer("bias", self.bias)
        sums = zip(mine.totals(self.n_data), theirs.totals(other.n_data), strict=True)
        both.n_data, both.rows, both.loss = self.n_data + other.n_data, self.rows, self.loss + other.loss
        both.curvature = curvature_class(self.structure)(mine.inputs, mine.classes, mine.bias).to(self.weight)
        both.signature = self.signature + other.signature
        both.fitted().assign(tuple(a + b for a, b in sums), both.n_data)
        return both

    def fitted(self) -> Curvature:
        """The curvature; NotFittedError before `fit`."""
        if self.curvature is None:
            raise NotFittedError("this LastLayerPosterior has no data yet: call fit(penultimate, weight, bias) first")
        return self.curvature

    @property
    def factor(self) -> float:
        """What the curvature of the unit likelihood is multiplied by: 1 / (sigma_noise^2 temperature)."""
        return 1.0 / (self.sigma_noise**2 * self.temperature)

    def logits(self, penultimate: np.ndarray | Tensor) -> Tensor:
        """[B, C] outputs of the layer."""
        return nn.functional.linear(self._inputs(penultimate), self.weight, self.bias)

    def log_likelihood(self) -> Tensor:
        """Of the fitting rows, tempered, in nats. Raises DataError when `fit` had no labels."""
        self.fitted()
        if torch.isnan(self.loss):
            raise DataError(
                "the marginal likelihood needs labels: none were given to fit(penultimate, weight, bias, labels)"
            )
        if self.likelihood == "classification":
            return -self.loss * self.factor
        each = math.log(self.sigma_noise * math.sqrt(2.0 * math.pi))
        return -self.loss * self.factor - self.n_data * len(self.weight) * each

    def log_marginal_likelihood(self, prior_precision: float | Tensor | None = None) -> Tensor:
        """Laplace's log evidence of the fitting rows, in nats; differentiable in `prior_precision`.

        log p(y | MAP) / temperature - 1/2 [log det(H / temperature + prior) - log det prior + |MAP|^2_prior], from the
        eigenvalues. Raises DataError when `fit` had no labels, OptionError when its rows were not the layer's own.
        """
        curvature = self._own_rows()
        likelihood = self.log_likelihood()
        prior = self.prior_precision if prior_precision is None else check_prior(prior_precision).to(self.weight)
        check_prior_fits(prior, curvature)
        weight, bias = curvature.split(prior)
        scatter = (weight * self.weight.square()).sum()
        if self.bias is not None:
            scatter = scatter + (bias * self.bias.square()).sum()
        return likelihood - 0.5 * (curvature.log_det_ratio(prior, self.factor) + scatter)

    def effective_parameters(self) -> float:
        """MacKay's number of parameters that the rows determine: tr[A (A + prior)^-1], A their curvature."""
        one = torch.ones((), dtype=self.weight.dtype, device=self.weight.device, requires_grad=True)
        with torch.enable_grad():
            ratio = self.fitted().log_det_ratio(self.prior_precision, self.factor * one)
        return float(torch.autograd.grad(ratio, one)[0])

    @torch.no_grad()
    def optimize_prior_precision(
        self,
        method: str = "marglik",
        prior_structure: str = "scalar",
        *,
        penultimate: Rows | None = None,
        labels: np.ndarray | Tensor | None = None,
        grid: Tensor | None = None,
        temperatures: Tensor | None = None,
    ) -> Tensor:
        """Set the best prior precision (and return it): [2] (weight, bias), or [C, P + 1] if "diagonal".

        Args:
            method: "marglik", the maximum of the marginal likelihood, found to convergence; for rows the layer was
                trained on. Or "heldout" (laplace-torch: "gridsearch"), the least cross-entropy of the probit
                predictive (of the Gaussian one for regression) on other rows, over a grid.
            prior_structure: "scalar", "layerwise" (one for weights, one for biases) or "diagonal" (each parameter,
                with structures "diag" and "full"); "heldout" chooses a scalar.
            penultimate, labels: [N, P], [N] of the rows for "heldout": neither the layer's training rows nor those of
                `fit`.
            grid: precisions, by default 100 from 1e-4 to 1e4.
            temperatures: likelihood temperatures to choose from too, by default only the one that is set.

        Warns when it runs to the ends of its range.
        """
        if method in ("heldout", "gridsearch"):
            if penultimate is None or labels is None or prior_structure != "scalar":
                raise OptionError(
                    f"method={method!r} with prior_structure={prior_structure!r} was given; it chooses one number on "
                    "rows of its own: optimize_prior_precision('heldout', penultimate=..., labels=...)"
                )
            tau, self.temperature = best_on_held_out(self, penultimate, labels, grid, temperatures)
            self.prior_precision = check_prior(tau).to(self.weight)
        elif method == "marglik":
            self._own_rows()
            self.prior_precision = self.evidence_precision(prior_structure)
        else:
            raise OptionError(
                f"method={method!r} is not a way to choose the prior: {suggest(method, ['marglik', 'heldout'])}"
            )
        return self.prior_precision

    def evidence_precision(self, prior_structure: str = "scalar") -> Tensor:
        """Where the marginal likelihood has its maximum, whatever the rows: on held-out ones the centre of a search.

        Labels play no part in it. For "scalar" and "layerwise" the maximum is unique.
        """
        return evidence_precision(self.fitted(), self.factor, self.weight, self.bias, prior_structure)

    @torch.no_grad()
    def optimize_sigma_noise(self, prior_structure: str = "scalar") -> float:
        """For regression: set noise and prior that maximise the marginal likelihood together; returns the noise.

        In turns to convergence: the prior as above, sigma^2 = |residuals|^2 / temperature / (N C - effective parameters).
        """
        if self.likelihood != "regression":
            raise OptionError("a classifier has no sigma_noise: it is for LastLayerPosterior(likelihood='regression')")
        self.log_likelihood()  # needs the targets
        for _ in range(500):
            before = self.sigma_noise
            self.optimize_prior_precision("marglik", prior_structure)
            free = self.n_data * len(self.weight) - self.effective_parameters()
            self.sigma_noise = math.sqrt(max(2.0 * float(self.loss) / (self.temperature * free), 1e-24))
            if abs(math.log(self.sigma_noise / before)) < 1e-10:
                break
        return self.sigma_noise

    def functional_variance(self, penultimate: np.ndarray | Tensor) -> Tensor:
        """[B, C] exact variance of each logit under the posterior, for inputs [B, P] of the layer.

        Not an uncertainty to rank images by: it grows with |phi|^2, and images a network has not seen often have
        SHORTER features. On CIFAR-10 ResNet-20 features it ranks unseen data as more certain (AUROC .17, .20, .03).
        Fitted and asked with features of length 1 it does not (docs/laplace.md), at a price in calibration.
        """
        return self.fitted().logit_variance(self._spread(penultimate))

    def predict(
        self, penultimate: np.ndarray | Tensor, link: str = "probit", *, link_approx: str | None = None
    ) -> Tensor:
        """[B, C] predictive probabilities for inputs [B, P] of the layer (for regression: the means).

        link (laplace-torch: `link_approx`): "probit", "bridge" (Dirichlet), "bridge_norm", "mean-field" or "mc", by
        draws of logits; see `predictive`. The variance of regression's predictive is `functional_variance` +
        sigma_noise^2.
        """
        link = link_approx or link
        if link not in LINKS:
            raise OptionError(f"link={link!r} is not a link approximation: {suggest(link, LINKS)}")
        logits, curvature = self.logits(penultimate), self.fitted()
        if self.likelihood == "regression":
            return logits
        spread = self._spread(penultimate)
        if link == "mc":
            return monte_carlo(logits, spread, curvature.deviations, self._draws()).probabilities
        variance = curvature.logit_variance(spread)
        if link == "probit":
            return probit(logits, variance)
        if link == "mean-field":
            return mean_field(logits, variance)
        return laplace_bridge(logits, variance, curvature.covariance_sums(spread), link == "bridge_norm")

    def uncertainties(self, penultimate: np.ndarray | Tensor, draws: Tensor | None = None) -> dict[str, Tensor]:
        """Uncertainties [B] of inputs [B, P], higher = less certain, by the names of `KINDS`, from draws of logits.

        "predictive_entropy" in nats, the sum of "mutual_information" and "expected_entropy"; "max_probability" is 1
        minus the largest. `draws`: [S, C] standard normal numbers, by default `normal_draws(C)`.
        """
        draws = self._draws() if draws is None else draws.to(self.weight)
        if self.likelihood == "regression":
            raise OptionError("regression has no class probabilities: its uncertainty is functional_variance")
        logits, spread = self.logits(penultimate), self._spread(penultimate)
        mean, information = monte_carlo(logits, spread, self.fitted().deviations, draws)
        total = entropy(mean)
        return {
            "predictive_entropy": total,
            "mutual_information": information,
            "expected_entropy": (total - information).clamp(min=0.0),
            "max_probability": 1.0 - mean.amax(1),
        }

    def to_laplace(self) -> Any:
        """A laplace-torch posterior with the same numbers, see `laplace_torch.to_laplace`."""
        from .laplace_torch import to_laplace

        return to_laplace(self)

    @classmethod
    def from_laplace(cls, other: Any, rows: str = "train") -> LastLayerPosterior:
        """The posterior of a fitted last-layer one of laplace-torch, see `laplace_torch.from_laplace`."""
        from .laplace_torch import from_laplace

        return from_laplace(other, rows)

    def _spread(self, penultimate: np.ndarray | Tensor) -> Tensor:
        curvature = self.fitted()
        return curvature.spread(curvature.project(self._inputs(penultimate)), self.prior_precision, self.factor)

    def _inputs(self, penultimate: np.ndarray | Tensor) -> Tensor:
        given = penultimate if isinstance(penultimate, Tensor) else torch.from_numpy(np.array(penultimate))
        return given.to(self.weight)

    def _draws(self) -> Tensor:
        return normal_draws(len(self.weight)).to(self.weight)

    def _own_rows(self) -> Curvature:
        """The curvature, if it is of rows the layer was trained on."""
        curvature = self.fitted()
        if self.rows != "train":
            raise OptionError(
                "the marginal likelihood is defined on the rows the layer was trained on, and fit(..., rows='heldout') "
                "says that these are others: choose the prior with optimize_prior_precision('heldout', "
                "penultimate=..., labels=...) on rows apart from both"
            )
        return curvature
