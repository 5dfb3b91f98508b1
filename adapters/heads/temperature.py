"""The temperature head: temperature as uncertainty (TaU) on a frozen embedding."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbone import BackboneOutput
from ..losses.tau import TaU, temperature
from ..positives import PairSource
from ..training import TrainResult, epochs_for, train
from .base import FeatureDims, FitData, Head
from .common import MAX_DEPTH, ScalarNet, check_positive, check_whole, fit_key, held_out_loss, moments, pair_sources

STEPS = 500
BASE_TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2)
DEFAULT_BASE = {"labels": 0.1, "soft-labels": 0.1, "ids": 0.1, "views": 0.01}
PROBE_ROWS = 256
LIMIT = 15.0


class TemperatureHead(Head):
    """Aleatoric uncertainty tau = t / sigmoid(r): the temperature at which an image's neighbourhood is best told apart.

    On a frozen embedding the SIGN of the score depends on the base temperature t and on the positives (docs/results.md
    has the table). With `base_temperature=None` the fit therefore tries several and keeps the one whose uncertainty
    rises most clearly with blur on held-out images of the data itself (no labels, no OOD rows); when none rises, it
    warns that the score is not an uncertainty.

    Args:
        base_temperature: t, or None to choose it by blur.
        width, depth: of the network's hidden layers; depth 0 is the paper's linear layer.
        reference: the loss of the paper's code: view 1's temperature in both numerators, and every other image a negative,
            also one of the same class. The training (AdamW, stored views) stays ours.
        gather: whether the processes of a launch take the loss of the whole batch, so that it does not depend on their number;
            else each contrasts its own share of the rows, which is faster and has fewer negatives.

    Outputs: "uncertainty" = "temperature" = tau in (t, t * (1 + e^15)).
    Source: Zhang et al., arXiv 2110.04403, with the loss made symmetric.
    """

    name = "temperature"
    kind = "aleatoric"
    fields = ("temperature",)
    uses_pairs = True

    def __init__(
        self,
        base_temperature: float | None = None,
        width: int = 64,
        depth: int = 1,
        reference: bool = False,
        gather: bool = True,
    ) -> None:
        super().__init__(
            base_temperature=base_temperature,
            width=width,
            depth=depth,
            reference=reference,
            gather=gather,
        )
        check_positive(self.name, base_temperature=base_temperature)
        check_whole(self.name, width=width)
        check_whole(self.name, low=0, high=MAX_DEPTH, depth=depth)

    base: Tensor

    def build(self, dims: FeatureDims) -> None:
        self.dims = dims
        self.network = ScalarNet(dims.embedding, self._config["width"], self._config["depth"])
        self.register_buffer("base", torch.tensor(self._config["base_temperature"] or DEFAULT_BASE["labels"]))

    def raw(self, embedding: Tensor) -> Tensor:
        """[B, D] -> r [B], higher = more certain."""
        return self.network(embedding)

    def forward(self, features: BackboneOutput) -> dict[str, Tensor]:
        self.require_built()
        tau = temperature(self.raw(features.embedding.float()).clamp(-LIMIT, LIMIT), self.base)
        return {"uncertainty": tau, "temperature": tau}

    def at_bound(self, outputs: dict[str, Tensor]) -> Tensor:
        ratio = outputs["temperature"] / self.base - 1.0  # e^-r
        return ratio.log().abs() > 0.99 * LIMIT

    def fit(self, data: FitData) -> dict[str, Any]:
        table, fitting, held_out = pair_sources(data)
        mean, std = moments(table.array, data.train)
        chosen = self._config["base_temperature"]
        blurred = None if chosen is not None or data.blurred is None else self._blurred(data)
        candidates = [chosen] if chosen is not None else list(BASE_TEMPERATURES)
        if chosen is None and blurred is None:
            candidates = [DEFAULT_BASE[data.positives]]
            warnings.warn(
                "the base temperature could not be chosen by blur, since the data are features without images: "
                f"t={candidates[0]} is used and the sign of the score is unverified; give images or base_temperature",
                UserWarning,
                stacklevel=2,
            )
        tried: dict[float, float | None] = {}
        best: tuple[float, TrainResult, dict[str, Tensor], float] | None = None
        for t in candidates:
            result = self._train(t, data, fitting, held_out, mean, std)
            rise = None if blurred is None else self._rise(*blurred)
            tried[t] = rise
            if best is None or (rise is not None and rise > best[0]):
                best = (rise if rise is not None else 0.0, result, copy.deepcopy(self.state_dict()), t)
        assert best is not None
        self.load_state_dict(best[2])
        if blurred is not None and best[0] <= 0.0:
            warnings.warn(
                "the temperature head is NOT an uncertainty on this data: for no base temperature in "
                f"{candidates} does it rise with blur (rank correlations {tried}); use another head or positives",
                UserWarning,
                stacklevel=2,
            )
        return best[1].summary() | {"base_temperature": best[3], "rank_correlation_with_blur": tried}

    def _train(
        self, t: float, data: FitData, fitting: PairSource, held_out: PairSource, mean: Tensor, std: Tensor
    ) -> TrainResult:
        options = data.options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.build(data.dims)
        self.base.fill_(t)
        self.network.standardise(mean, std)
        self.to(data.device)
        loss = TaU(t, reference=self._config["reference"])
        step, evaluation = _Step(self, loss, fitting), _Step(self, loss, held_out)
        return train(
            step,
            data.train,
            lambda: held_out_loss(evaluation, data.held_out, options.batch_size, options.seed),
            name=f"{self.name} t={t:g}",
            key=fit_key(self, data),
            options=options,
            epochs=options.epochs or epochs_for(len(data.train), options.batch_size, STEPS),
            lr=options.lr or 1e-3,
            # every other row is a negative, so their number would be that of processes'; other heads take a fixed number
            shared=self._config["gather"],
        )

    def _blurred(self, data: FitData) -> tuple[np.ndarray, Tensor] | None:
        assert data.blurred is not None
        severity, embedding = data.blurred(data.held_out[:PROBE_ROWS])
        return severity, torch.from_numpy(np.ascontiguousarray(embedding, dtype=np.float32)).to(data.device)

    @torch.no_grad()
    def _rise(self, severity: np.ndarray, embedding: Tensor) -> float:
        """Spearman of the uncertainty with blur severity within images, averaged. embedding [S, n, D]."""
        from scipy.stats import rankdata  # a second to import, for what only a search needs

        s, n, d = embedding.shape
        certain = self.raw(embedding.reshape(s * n, d)).reshape(s, n).cpu().numpy()
        certain = certain.round(4)  # what differs by rounding only is a tie
        ranks = rankdata(-certain, axis=0) - (s + 1) / 2
        order = (rankdata(severity) - (s + 1) / 2)[:, None]
        length = np.sqrt((ranks**2).sum(0) * (order**2).sum())
        return float(np.mean((ranks * order).sum(0) / np.maximum(length, 1e-12)))


class _Step(nn.Module):
    """TaU's loss of one batch of pairs; images of one class are no negatives of each other, but in the reference's loss."""

    def __init__(self, head: TemperatureHead, loss: TaU, source: PairSource) -> None:
        super().__init__()
        self.head, self.loss, self.source = head, loss, source

    def forward(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        batch = self.source.draw(rows, generator)
        z1, z2 = functional.normalize(batch.anchor, dim=-1), functional.normalize(batch.positive, dim=-1)
        exclude = None
        if not self.loss.reference:
            same = torch.rand(batch.negative.shape, generator=generator).to(batch.negative.device) >= batch.negative
            exclude = same.repeat(2, 2)
        return self.loss(z1, z2, self.head.raw(batch.anchor), self.head.raw(batch.positive), exclude=exclude)
