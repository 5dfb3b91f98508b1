"""The kappa head: a von Mises-Fisher posterior for each image, trained with MCInfoNCE on stored features."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbone import BackboneOutput
from ..losses.mcinfonce import MCInfoNCE
from ..positives import FeatureTable, PairSource, draw_negatives
from ..training import epochs_for, step_generator, train
from ..vmf import VonMisesFisher, concentration_from_resultant, mean_resultant_length
from .base import FeatureDims, FitData, Head
from .common import (
    LogSumExpNet,
    check_choice,
    check_positive,
    check_whole,
    fit_key,
    held_out_loss,
    moments,
    pair_sources,
)

LOWEST_RESULTANT, HIGHEST_RESULTANT, INITIAL_RESULTANT = 0.02, 0.9999, 0.9
CONE_RESULTANT = 0.3
STEPS = 1200


@functools.cache
def _log_kappas(dim: int) -> tuple[float, ...]:
    """log kappa at the lowest, the highest and the initial resultant: thousands of small operations, the same for a dim."""
    places = torch.tensor([LOWEST_RESULTANT, HIGHEST_RESULTANT, INITIAL_RESULTANT], dtype=torch.float64)
    return tuple(concentration_from_resultant(places, dim).log().tolist())


class KappaHead(Head):
    """Aleatoric uncertainty 1/kappa of the posterior vMF(mu, kappa) of an image's embedding.

    mu is the centred embedding, by default projected to few dimensions by a linear map that is trained with the head,
    and normalised. The mean that is subtracted belongs to the fitting rows and is stored. kappa answers how widely the
    images spread that could be this one's positives: its order is meaningful as trained; its size is, after
    `calibrate`, which scales kappa so that 95 % caps of held-out pairs hold 95 % of them.

    Args:
        projection: dimensions of the trained projection, 2 to 128; None keeps the embedding as it is (centred), with a
            warning when the features sit in a cone (mean resultant above 0.3), where kappa runs away.
        parametrization: "network" (kappa from a small network on the embedding, `LogSumExpNet`) or "norm" (from the
            length of the projected embedding).
        width: of that network's one hidden layer.
        concentration: of the loss, its inverse temperature; another quantity than the posterior's kappa.
        learnable: whether the loss's concentration is trained too.
        n_samples, n_negatives: Monte-Carlo samples and negatives per anchor.
        calibrate: whether to scale kappa on held-out pairs.

    Outputs: "uncertainty" 1/kappa, "kappa" in (0, inf), "resultant" A_d(kappa) in [0.02, 0.9999] before calibration.
    Source: Kirchhof et al., ICML 2023, arXiv 2302.02865.
    """

    name = "kappa"
    kind = "aleatoric"
    fields = ("kappa", "resultant")
    uses_pairs = True

    def __init__(
        self,
        projection: int | None = 8,
        parametrization: str = "network",
        width: int = 64,
        concentration: float = 16.0,
        learnable: bool = False,
        n_samples: int = 32,
        n_negatives: int = 16,
        calibrate: bool = True,
    ) -> None:
        super().__init__(
            projection=projection,
            parametrization=parametrization,
            width=width,
            concentration=concentration,
            learnable=learnable,
            n_samples=n_samples,
            n_negatives=n_negatives,
            calibrate=calibrate,
        )
        check_choice(self.name, "parametrization", parametrization, ("network", "norm"))
        check_positive(self.name, concentration=concentration)
        check_whole(self.name, low=2, projection=projection)
        check_whole(self.name, width=width, n_samples=n_samples, n_negatives=n_negatives)

    mean: Tensor
    log_range: Tensor
    calibration: Tensor

    def build(self, dims: FeatureDims) -> None:
        self.dims = dims
        c = self._config
        d = dims.embedding if c["projection"] is None else min(c["projection"], dims.embedding)
        self.sphere_dim = d
        self.register_buffer("mean", torch.zeros(dims.embedding))
        self.projection = nn.Linear(dims.embedding, d, bias=False) if c["projection"] is not None else nn.Identity()
        *bounds, start = _log_kappas(d)
        self.register_buffer("log_range", torch.tensor(bounds, dtype=torch.float32))
        self.register_buffer("calibration", torch.ones(()))
        if c["parametrization"] == "network":
            self.network: LogSumExpNet | None = LogSumExpNet(dims.embedding, c["width"])
        else:
            self.network = None
            self.norm_gain, self.norm_bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        low, high = self.log_range.tolist()
        fraction = (start - low) / (high - low)
        self.offset = math.log(fraction / (1.0 - fraction))  # a raw output of 0 gives A_d(kappa) = 0.9

    def posterior(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Mean direction [B, d] and uncalibrated kappa [B] of each embedding [B, D]."""
        projected = self.projection(embedding - self.mean)
        if self.network is not None:
            raw = self.network(embedding)
        else:
            raw = self.norm_gain * (projected.norm(dim=-1).clamp(min=1e-12).log() + self.norm_bias)
        low, high = self.log_range[0], self.log_range[1]
        # log kappa moves between the bounds on a sigmoid: bounded, smooth, and of slope about 1 in the middle
        share = torch.sigmoid(raw * (4.0 / (high - low)) + self.offset)
        return functional.normalize(projected, dim=-1), torch.exp(low + (high - low) * share)

    def forward(self, features: BackboneOutput) -> dict[str, Tensor]:
        self.require_built()
        _, kappa = self.posterior(features.embedding.float())
        kappa = kappa * self.calibration
        return {
            "uncertainty": 1.0 / kappa,
            "kappa": kappa,
            "resultant": mean_resultant_length(kappa, self.sphere_dim),
        }

    def at_bound(self, outputs: dict[str, Tensor]) -> Tensor:
        log_kappa = (outputs["kappa"] / self.calibration).log()
        low, high = self.log_range[0], self.log_range[1]
        share = (log_kappa - low) / (high - low)
        return (share < 0.01) | (share > 0.99)

    def fit(self, data: FitData) -> dict[str, Any]:
        options = data.options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.build(data.dims)
        table, fitting, held_out = pair_sources(data)
        resultant = self._start(table, data)
        self.to(data.device)
        c = self._config
        loss = MCInfoNCE(c["concentration"], c["n_samples"], learnable=c["learnable"]).to(data.device)
        step = _Step(self, loss, fitting)
        evaluation = _Step(self, loss, held_out)
        result = train(
            step,
            data.train,
            lambda: held_out_loss(evaluation, data.held_out, options.batch_size, options.seed),
            name=self.name,
            key=fit_key(self, data),
            options=options,
            epochs=options.epochs or epochs_for(len(data.train), options.batch_size, STEPS),
            lr=options.lr or 1e-3,
        )
        report = result.summary() | {"feature_resultant": resultant, "loss_concentration": float(loss.concentration)}
        if c["calibrate"]:
            report["calibration"] = self._calibrate(held_out, data.held_out, options.seed)
        return report

    @torch.no_grad()
    def _start(self, table: FeatureTable, data: FitData) -> float:
        """Centre, and begin the projection at the principal directions; gives the features' mean resultant length."""
        array = table.array
        mean, std = moments(array, data.train)
        self.mean.copy_(mean)
        if self.network is not None:
            self.network.standardise(mean, std)
        sample = data.train[:: max(1, len(data.train) // 20_000)]
        x = torch.from_numpy(np.asarray(array[sample], dtype=np.float32)).reshape(-1, array.shape[-1])
        resultant = float(functional.normalize(x, dim=-1).mean(0).norm())
        if isinstance(self.projection, nn.Linear):
            centred = (x - mean).double()
            _, vectors = torch.linalg.eigh(centred.T @ centred)
            self.projection.weight.copy_(vectors[:, -self.sphere_dim :].T.flip(0).float())
        elif resultant > CONE_RESULTANT:
            warnings.warn(
                f"the features sit in a cone (mean resultant length {resultant:.2f} > {CONE_RESULTANT}) and the kappa "
                "head is told not to project: kappa may run to its bounds; use projection=8 to 128",
                UserWarning,
                stacklevel=2,
            )
        if self.network is None:
            projected = self.projection(x - mean)
            self.norm_bias.copy_(-projected.norm(dim=-1).clamp(min=1e-12).log().mean())
        return resultant

    @torch.no_grad()
    def _calibrate(self, source: PairSource, rows: np.ndarray, seed: int, mass: float = 0.95) -> float:
        """The factor on kappa with which caps of the given mass round an anchor hold that share of its positives."""
        cosines, kappas = [], []
        for start in range(0, len(rows), 1024):
            batch = source.draw(torch.from_numpy(rows[start : start + 1024]), step_generator(seed, 1, start))
            mu, kappa = self.posterior(batch.anchor)
            other, _ = self.posterior(batch.positive)
            cosines.append((mu * other).sum(-1))
            kappas.append(kappa)
        cosine, kappa = torch.cat(cosines).double(), torch.cat(kappas).double()
        axis = torch.zeros(self.sphere_dim, dtype=torch.float64, device=cosine.device)
        axis[0] = 1.0
        low, high = math.log(1e-4), math.log(1e4)
        for _ in range(40):  # coverage falls as the factor grows, so halving finds it
            middle = 0.5 * (low + high)
            caps = VonMisesFisher(axis.expand(len(kappa), -1), kappa * math.exp(middle)).cosine_quantile(1.0 - mass)
            low, high = (middle, high) if float((cosine >= caps).double().mean()) > mass else (low, middle)
        self.calibration.fill_(math.exp(low))
        return math.exp(low)


class _Step(nn.Module):
    """Loss of one batch of pairs: each anchor against its positive and negatives drawn from the batch."""

    def __init__(self, head: KappaHead, loss: MCInfoNCE, source: PairSource) -> None:
        super().__init__()
        self.head, self.loss, self.source = head, loss, source
        self.n_negatives = head.config()["n_negatives"]

    def forward(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        batch = self.source.draw(rows, generator)
        columns, has = draw_negatives(batch.negative, self.n_negatives, generator)
        mu, kappa = self.head.posterior(batch.anchor)
        mu_p, kappa_p = self.head.posterior(batch.positive)
        if not has.any():  # a batch of one class asks for nothing
            return 0.0 * (mu.sum() + kappa.sum())
        columns = columns[has]
        return self.loss(
            VonMisesFisher(mu[has], kappa[has], validate_args=False),
            VonMisesFisher(mu_p[has], kappa_p[has], validate_args=False),
            VonMisesFisher(mu_p[columns], kappa_p[columns], validate_args=False),
            generator=generator,
        )
