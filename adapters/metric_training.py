"""Training of an embedding on stored features: the step for the one training loop, plain or under sampled weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .distributed import check_launch
from .errors import DataError
from .gathering import sum_over_launch
from .losses.contrastive_metric import ContrastiveMetric
from .metric_laplace import MetricPosterior
from .positives import target_masks
from .training import TrainOptions, TrainResult, epochs_for, step_generator, train

if TYPE_CHECKING:
    from .laplace_rows import RowArray

STEPS = 1500


class MetricObjective(nn.Module):
    """Contrastive loss of a batch of inputs [n, d_in] under a network that embeds them; targets are labels [n] or positions.

    With `posterior` the network is its linear layer, trained as the paper's online code does: each step draws weights from
    N(theta, 1 / (max(H, 0) + precision)), takes the loss under them, and lets the curvature of the same batch at the drawn
    weights run into H (`MetricPosterior.remember`). With `pair_count="images"` a step's curvature is that of all `rows` times
    1 - memory, so that H settles at the rows' curvature instead of 1 / (1 - memory) times as much. Processes that hold
    different inputs take the mean of their curvatures. precision: of the prior while it trains, 1 in the paper's code.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: ContrastiveMetric,
        posterior: MetricPosterior | None = None,
        memory: float = 0.999,
        rows: int = 0,
        precision: float = 1.0,
    ) -> None:
        super().__init__()
        self.network, self.loss, self.posterior, self.memory, self.rows = network, loss, posterior, memory, rows
        self.precision = precision

    def of_inputs(self, x: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar loss."""
        if self.posterior is None or not self.training:
            return self._loss(self.network(x), target)
        assert isinstance(self.network, nn.Linear)
        noise = self.posterior.noise(1, generator)[0].split([self.network.weight.numel(), self.network.bias.numel()])
        of_weight, of_bias = self.posterior.scale(self.precision)
        weight = self.network.weight + noise[0].view_as(of_weight) * of_weight
        bias = self.network.bias + noise[1] * of_bias
        self._remember(x.detach(), target, weight.detach(), bias.detach(), generator)
        return self._loss(functional.linear(x, weight, bias), target)

    def _loss(self, embedding: Tensor, target: Tensor) -> Tensor:
        positive, negative = target_masks(target)
        return self.loss(embedding, positive=positive, negative=negative)

    @torch.no_grad()
    def _remember(self, x: Tensor, target: Tensor, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        assert self.posterior is not None
        of_weight, of_bias, triplets = self.posterior.batch_curvature(x, target, weight, bias, generator)
        factor = self.posterior.count_factor(triplets, self.rows)
        if self.posterior.pair_count == "images":
            factor = self.rows / len(x) * (1.0 - self.memory)
        factor /= check_launch().world
        both = sum_over_launch([of_weight * factor, of_bias * factor])
        self.posterior.remember(both[0], both[1], self.memory)


class MetricStep(MetricObjective):
    """The same of a batch of rows, whose inputs are looked up (`inputs`: rows [n] -> [n, d_in]), as are their labels."""

    def __init__(
        self,
        network: nn.Module,
        inputs: Callable[[Tensor], Tensor],
        label: Tensor,
        loss: ContrastiveMetric,
        posterior: MetricPosterior | None = None,
        memory: float = 0.999,
        rows: int = 0,
    ) -> None:
        super().__init__(network, loss, posterior, memory, rows)
        self.inputs, self.label = inputs, label

    def forward(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return self.of_inputs(self.inputs(rows), self.label[rows.to(self.label.device)], generator)


def start_online(
    posterior: MetricPosterior,
    layer: nn.Linear,
    x: np.ndarray | RowArray,
    label: np.ndarray,
    rows: np.ndarray,
    generator: torch.Generator,
) -> None:
    """What an online fit begins with: the layer, and its curvature on these rows of the inputs x [N, d_in].

    With another pair_count than "images" the curvature starts, as the paper's, at the number of rows. The paper's start
    fades by the memory factor: after 700 steps half of it is there still, and all variants answer alike.
    """
    posterior.take(layer.weight, layer.bias, float(len(rows)))
    if posterior.pair_count == "images":
        posterior.fit(x, label, subset=rows, generator=generator)


def train_metric(
    step: nn.Module,
    rows: np.ndarray,
    held_out: np.ndarray,
    *,
    name: str,
    options: TrainOptions,
    key: str = "",
    weight_decay: float = 1e-4,
) -> TrainResult:
    """Train a step on rows with the one training loop; the held-out loss is that of fixed batches in a shuffled order."""
    order = held_out[torch.randperm(len(held_out), generator=step_generator(options.seed, 2)).numpy()]
    batches = [torch.from_numpy(order[i : i + options.batch_size]) for i in range(0, len(order), options.batch_size)]
    if not len(order):
        raise DataError(f"{name}: there are no held-out rows: hold out some, with a larger validation share")

    def evaluate() -> float:
        losses = [float(step(b, step_generator(options.seed, 0, i))) * len(b) for i, b in enumerate(batches)]
        return sum(losses) / len(order)

    epochs = options.epochs or epochs_for(len(rows), options.batch_size, STEPS)
    return train(
        step,
        rows,
        evaluate,
        name=name,
        key=key,
        options=options,
        epochs=epochs,
        lr=options.lr or 1e-3,
        weight_decay=weight_decay,
    )


def principal_layer(x: Tensor, outputs: int) -> nn.Linear:
    """A linear layer that starts at the principal directions of centred inputs [N, d_in]; further outputs at small noise."""
    layer = nn.Linear(x.shape[1], outputs)
    _, vectors = torch.linalg.eigh(x.double().T @ x.double())
    count = min(outputs, x.shape[1])
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.weight[:count] = vectors[:, -count:].T.flip(0).float()
        layer.bias.zero_()
    return layer
