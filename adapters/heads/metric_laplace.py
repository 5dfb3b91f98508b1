"""The metric-laplace head: how uncertain the direction of an image's embedding is when the last layer's weights are."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone import BackboneOutput
from ..errors import BackboneError, DataError, OptionError
from ..losses.contrastive_metric import ContrastiveMetric
from ..metric_curvature import APPROXIMATIONS, LOSSES
from ..metric_laplace import PAIR_COUNTS, MetricPosterior
from ..metric_predictive import direction_moments
from ..metric_prior import GALLERY, QUERIES, choose_prior, some_rows
from ..metric_training import MetricStep, principal_layer, start_online, train_metric
from ..mining import MINERS, check_miner
from ..positives import FeatureTable
from ..training import step_generator
from .base import FeatureDims, FitData, Head
from .common import Standardised, check_choice, check_positive, check_whole, fit_key, moments

MOSTLY = 0.95


class MetricLaplaceHead(Head):
    """Epistemic uncertainty for retrieval: the spread of an image's embedding under a posterior over the last layer.

    A linear projection of the frozen embedding (centred, and scaled by one number) is trained by the contrastive loss on
    mined triplets of the labels, and a `MetricPosterior` fitted at it on the same rows. Its prior precision has the least
    retrieval risk on the held-out rows (`metric_prior.choose_prior`). Answers are in closed form: deterministic, and an
    image's own whatever the batch.

    Args:
        dim: of the projection.
        layer: "projection", or "backbone": the posterior stands on the backbone's own last linear layer, and nothing is
            trained. That is for networks whose output is the embedding; a classifier's logits are compared by
            direction too, but were not trained for it, which is why it is not the default.
        loss, approximation, pair_count: of the curvature, see `MetricPosterior`.
        margin, miner: of the triplets, in training and for the curvature.
        prior_precision: given, it is left as it is.
        online: fit the curvature while the projection trains, under sampled weights (`MetricStep`), with the factor
            `memory` on what was.

    Needs labels (or, as `positives`, a column of ids). Outputs: "uncertainty" 1 - R^2 in [0, 1], R being the length of the
    expected unit embedding: the summed variance of its dimensions; "kappa" [B], the von Mises-Fisher concentration with
    that R; "expected_embedding" [B, dim] of length 1, to retrieve with; "spread" [B, dim], the standard deviation of each
    dimension, whose sum over dimensions is the paper's score.
    Source: Warburg et al., NeurIPS 2023, arXiv 2302.01332.
    """

    name = "metric-laplace"
    kind = "epistemic"
    fields = ("kappa", "expected_embedding", "spread")

    center: Tensor
    gain: Tensor

    def __init__(
        self,
        dim: int = 32,
        layer: str = "projection",
        loss: str = "euclidean",
        approximation: str = "positives",
        pair_count: str = "images",
        margin: float = 0.7,
        miner: str = "all",
        prior_precision: float | None = None,
        online: bool = False,
        memory: float = 0.999,
    ) -> None:
        super().__init__(
            dim=dim,
            layer=layer,
            loss=loss,
            approximation=approximation,
            pair_count=pair_count,
            margin=margin,
            miner=miner,
            prior_precision=prior_precision,
            online=online,
            memory=memory,
        )
        check_whole(self.name, low=2, dim=dim)
        check_choice(self.name, "layer", layer, ("projection", "backbone"))
        check_choice(self.name, "loss", loss, LOSSES)
        check_choice(self.name, "approximation", approximation, APPROXIMATIONS)
        check_choice(self.name, "pair_count", pair_count, PAIR_COUNTS)
        check_choice(self.name, "miner", miner, MINERS)
        check_miner(f"head {self.name!r}", margin, miner)
        check_positive(self.name, prior_precision=prior_precision, memory=memory)
        if not memory < 1:
            raise OptionError(f"head {self.name!r}: memory={memory!r} was given; expected a number below 1")
        if online and layer == "backbone":
            raise OptionError(f"head {self.name!r}: online=True trains a projection; expected layer='projection'")
        self._found: dict[str, Any] = {}

    def config(self) -> dict[str, Any]:
        """Options; after `fit` on the backbone's layer, with its width as `dim`."""
        return self._config | self._found

    @property
    def scope(self) -> str:
        return "logits" if self._config["layer"] == "backbone" else "embedding"

    def build(self, dims: FeatureDims) -> None:
        self.dims = dims
        c = self.config()
        inputs = dims.penultimate if c["layer"] == "backbone" else dims.embedding
        if not inputs:
            raise BackboneError("head 'metric-laplace' with layer='backbone' needs the input of one last linear layer")
        shared = {name: c[name] for name in ("loss", "approximation", "margin", "miner", "pair_count")}
        self.posterior = MetricPosterior(inputs, c["dim"], **shared)
        self.register_buffer("center", torch.zeros(inputs))
        self.register_buffer("gain", torch.ones(()))

    def inputs(self, features: BackboneOutput) -> Tensor:
        """What the layer takes, [B, d_in]."""
        if self._config["layer"] == "projection":
            return (features.embedding.float() - self.center) * self.gain
        if features.penultimate is None:
            raise BackboneError(
                "head 'metric-laplace' was fitted on the backbone's last linear layer, and these features have no "
                "penultimate input: extract them with this backbone"
            )
        return features.penultimate.float()

    def forward(self, features: BackboneOutput) -> dict[str, Tensor]:
        self.require_built()
        found = direction_moments(*self.posterior.gaussian(self.inputs(features)))
        return {
            "uncertainty": found.uncertainty,
            "kappa": found.kappa,
            "expected_embedding": found.mean_direction,
            "spread": found.spread,
        }

    def fit(self, data: FitData) -> dict[str, Any]:
        started = time.perf_counter()
        label = _labels(data)
        self._found = {}
        report: dict[str, Any] = {}
        if self._config["layer"] == "backbone":
            array = self._take_backbone(data)
        else:
            array = data.features.embedding
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(data.options.seed)
                self.build(data.dims)
                report |= self._train(data, label)
        generator = step_generator(data.options.seed, 3)
        rows = Standardised(array, self.center.cpu().numpy(), np.float32(self.gain))
        if not self._config["online"]:
            self.posterior.fit(rows, label, subset=data.train, generator=generator)
        negative = float((self.posterior.curvature_weight < 0).float().mean())
        report["negative_curvature"] = negative
        if negative > MOSTLY:
            warnings.warn(
                f"{negative:.0%} of the curvature is negative and set to 0: with approximation="
                f"{self._config['approximation']!r} the posterior is hardly more than its prior here",
                UserWarning,
                stacklevel=2,
            )
        report |= self._prior(rows, label, data, generator)
        return report | {"seconds": round(time.perf_counter() - started, 3)}

    def _take_backbone(self, data: FitData) -> np.ndarray:
        """The posterior stands on the backbone's own layer; returns that layer's inputs [N, P]."""
        if data.classifier is None or data.features.penultimate is None:
            raise BackboneError(
                f"layer='backbone' was asked for, and there is no last linear layer to take: {data.classifier_reason}"
            )
        weight, bias = data.classifier
        self._found = {"dim": len(weight)}
        self.build(data.dims)
        self.to(data.device)
        self.posterior.take(weight, bias)
        return data.features.penultimate

    @torch.no_grad()
    def _keep(self, layer: nn.Linear) -> None:
        """The trained layer; an online fit has its curvature already."""
        if not self._config["online"]:
            self.posterior.take(layer.weight, layer.bias)
        self.posterior.weight.copy_(layer.weight)
        self.posterior.bias.copy_(layer.bias)

    def _train(self, data: FitData, label: np.ndarray) -> dict[str, Any]:
        """Train the projection, and with it the curvature when it is online."""
        c, array = self._config, data.features.embedding
        mean, std = moments(array, data.train)
        self.center.copy_(mean)
        self.gain.copy_(1.0 / std.square().mean().sqrt().clamp(min=1e-12))
        sample = Standardised(array, mean.numpy(), np.float32(self.gain))[
            data.train[:: max(1, len(data.train) // 20_000)]
        ]
        layer = principal_layer(torch.from_numpy(sample), c["dim"]).to(data.device)
        self.to(data.device)
        table = FeatureTable(array, data.device)
        if c["online"]:
            inputs = Standardised(array, mean.numpy(), np.float32(self.gain))
            start_online(self.posterior, layer, inputs, label, data.train, step_generator(data.options.seed, 5))
        step = MetricStep(
            layer,
            lambda rows: (table[rows] - self.center) * self.gain,
            torch.from_numpy(label).to(data.device),
            ContrastiveMetric(c["margin"], c["miner"]),
            self.posterior if c["online"] else None,
            memory=c["memory"],
            rows=len(data.train),
        )
        result = train_metric(
            step, data.train, data.held_out, name=self.name, key=fit_key(self, data), options=data.options
        )
        self._keep(layer)
        return result.summary()

    def _prior(
        self, array: Standardised, label: np.ndarray, data: FitData, generator: torch.Generator
    ) -> dict[str, Any]:
        given = self._config["prior_precision"]
        if given is not None:
            self.posterior.prior_precision.fill_(given)
            return {"prior_precision": given}
        device = self.posterior.weight.device
        sides = []
        for rows, count in ((data.held_out, QUERIES), (data.train, GALLERY)):
            some = some_rows(rows, count, generator)
            sides += [torch.from_numpy(array[some]).to(device), torch.from_numpy(label[some]).to(device)]
        return choose_prior(self.posterior, sides[0], sides[1], sides[2], sides[3], generator)


def _labels(data: FitData) -> np.ndarray:
    """int64 [N]: ids where they are the positives, else classes, soft ones by their largest share."""
    if data.positives == "ids" and data.ids is not None:
        return np.array(data.ids, dtype=np.int64)
    label = data.features.label
    if label is None:
        raise DataError(
            "the metric-laplace head compares images of the same and of other classes and needs labels: give (images, "
            "labels), or positives='COLUMN' with a column of ids"
        )
    return np.array(label if label.ndim == 1 else label.argmax(1), dtype=np.int64)
