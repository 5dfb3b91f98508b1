"""Multinomial logistic regression on stored features, where a backbone has no classifier for the classes at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .splits import row_uniform

STRENGTHS = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
CHUNK_BYTES = 64 * 2**20
HELD_OUT_SHARE = 0.2
PATH_STEPS, FINAL_STEPS = 50, 500


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on raw (not standardised) features.

    Attributes:
        weight, bias: float32 [C, P] and [C], on the CPU.
        strength: the L2 strength that was chosen: of lambda in mean cross-entropy + lambda/2 |W|^2, where W acts on
            standardised features; scikit-learn's C is 1 / (N lambda). The bias is not penalised.
        held_out_nll: mean cross-entropy in nats on the held-out rows, of the fit without them that won.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    held_out_nll: float


def fit_linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    train: np.ndarray | None = None,
    held_out: np.ndarray | None = None,
    classes: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LinearProbe:
    """Fit by L-BFGS, with the L2 strength that does best on held-out rows from a path of seven (1 to 1e-6).

    Args:
        features: [N, P], memory maps welcome: read in chunks; float64 ones are worked on in float64, others in float32.
        labels: int [N] or soft [N, C].
        train: positions of the rows to fit; None: all (that are not held out).
        held_out: positions of rows that only choose the strength; the probe never sees them. None: a seeded fifth of
            the rows chooses, and the probe is then fitted on all of them.
        classes: C when it is more than the labels show.

    Raises DataError on a single class, shapes that do not fit, labels out of range, non-finite features.
    """
    classes = _check(features, labels, classes)
    rows = np.arange(len(features)) if train is None else np.asarray(train)
    chosen = held_out_by_seed(rows, seed) if held_out is None else np.isin(rows, held_out)
    checks = rows[chosen] if held_out is None else np.asarray(held_out)
    if chosen.all() or len(checks) == 0:
        raise DataError(f"{len(checks)} of {len(rows)} rows are held out: a linear probe needs rows on either side")
    fitting = _Problem(features, labels, rows[~chosen], classes, torch.device(device))
    checking = _Problem(features, labels, checks, classes, torch.device(device))
    best: tuple[float, float, Tensor] | None = None
    theta = fitting.start()
    for strength in STRENGTHS:
        theta = fitting.minimise(theta, strength, PATH_STEPS)
        nll = checking.loss(*fitting.fold(theta))
        if best is None or nll < best[0]:
            best = nll, strength, theta
        elif strength < best[1] / 10.5:  # two in a row were worse: weaker ones only overfit more
            break
    assert best is not None
    nll, strength, theta = best
    if held_out is None:
        fitting = _Problem(features, labels, rows, classes, torch.device(device))
        fitting.start()
    weight, bias = fitting.fold(fitting.minimise(theta, strength, FINAL_STEPS))
    return LinearProbe(weight.float().cpu(), bias.float().cpu(), strength, nll)


def held_out_by_seed(rows: np.ndarray, seed: int) -> np.ndarray:
    """Which of the rows, by their positions, choose the strength where the caller names none, bool [n]."""
    return row_uniform(rows, seed) < HELD_OUT_SHARE


class _Problem:
    """Penalised cross-entropy on some rows. Parameters [C, P + 1] act on standardised features, last the bias."""

    def __init__(
        self, features: np.ndarray, labels: np.ndarray, rows: np.ndarray, classes: int, device: torch.device
    ) -> None:
        self.features, self.labels, self.rows = features, labels, rows
        self.classes, self.device = classes, device
        self.dtype = torch.float64 if features.dtype == np.float64 else torch.float32
        self.mean = self.scale = torch.zeros(0)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [n, P] and target probabilities [n, C] of consecutive rows."""
        size = max(64, CHUNK_BYTES // (self.dtype.itemsize * (self.features.shape[1] + self.classes)))
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            x = torch.from_numpy(np.ascontiguousarray(self.features[rows])).to(self.device, self.dtype)
            y = torch.from_numpy(np.ascontiguousarray(self.labels[rows])).to(self.device)
            if y.ndim == 1:
                y = torch.nn.functional.one_hot(y.long(), self.classes)
            yield x, y.to(self.dtype)

    def start(self) -> Tensor:
        """Moments of the features (refusing non-finite ones), and parameters of zero."""
        total = squares = torch.zeros(self.features.shape[1], dtype=torch.float64, device=self.device)
        for x, _ in self.chunks():
            total, squares = total + x.double().sum(0), squares + x.double().square().sum(0)
        if not bool(torch.isfinite(squares).all()):
            raise DataError("features hold NaN or infinite values: leave these images out, or extract in float32")
        self.mean = total / len(self.rows)
        std = (squares / len(self.rows) - self.mean.square()).clamp(min=0.0).sqrt()
        self.scale = inverse_deviation(std)
        return torch.zeros(self.classes, self.features.shape[1] + 1, dtype=torch.float64, device=self.device)

    def fold(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias on raw features."""
        weight = theta[:, :-1] * self.scale
        return weight, theta[:, -1] - weight @ self.mean

    def loss(self, weight: Tensor, bias: Tensor) -> float:
        """Mean cross-entropy in nats."""
        total = 0.0
        for x, y in self.chunks():
            total -= float((torch.log_softmax(_linear(x, weight, bias), dim=-1) * y).sum())
        return total / len(self.rows)

    def minimise(self, theta: Tensor, strength: float, steps: int) -> Tensor:
        """L-BFGS from `theta`, whose gradient (p - y) x^T is summed in float64 over chunks."""
        theta = theta.clone()
        optimizer = torch.optim.LBFGS(
            [theta],
            max_iter=steps,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
        )

        def closure() -> Tensor:
            weight, bias = self.fold(theta)
            value = 0.5 * strength * theta[:, :-1].square().sum()
            grad = torch.zeros_like(theta)
            for x, y in self.chunks():
                log_p = torch.log_softmax(_linear(x, weight, bias), dim=-1)
                value -= (log_p * y).sum().double() / len(self.rows)
                residual = (log_p.exp() * y.sum(1, keepdim=True) - y) / len(self.rows)
                grad[:, :-1] += (residual.T @ x).double()
                grad[:, -1] += residual.sum(0).double()
            grad[:, :-1] = (grad[:, :-1] - torch.outer(grad[:, -1], self.mean)) * self.scale
            grad[:, :-1] += strength * theta[:, :-1]
            theta.grad = grad
            return value

        with torch.no_grad():
            optimizer.step(closure)
        return theta


def inverse_deviation(std: Tensor) -> Tensor:
    """What centred features are multiplied by to be standardised, [P], from their standard deviations.

    Deviations below a tenth of the median are taken for that tenth: a channel that fires on a few fitting rows would
    otherwise be blown up on other images (8 such channels of 1280 cost .16 nats on digits). 0 for a dimension that
    never moves, which switches it off.
    """
    floor = (0.1 * std.median()).clamp(min=1e-12)
    return torch.where(std > 1e-6 * std.max().clamp(min=1e-12), 1.0 / std.clamp(min=floor), 0.0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight.to(x), bias.to(x))


def _check(features: np.ndarray, labels: np.ndarray, classes: int | None) -> int:
    """Shapes and range; gives the number of classes."""
    if features.ndim != 2 or labels.ndim not in (1, 2) or len(labels) != len(features):
        raise DataError(
            f"features of shape {features.shape} and labels of shape {labels.shape} were given; "
            "expected [N, P], and [N] or [N, C]"
        )
    if labels.ndim == 2:
        if not np.isfinite(labels).all() or (labels < 0).any():
            raise DataError("soft labels hold negative or non-finite values; expected probabilities")
        present, found = int((labels.sum(0) > 0).sum()), labels.shape[1]
    else:
        if not np.issubdtype(labels.dtype, np.integer) or int(labels.min()) < 0:
            raise DataError(f"labels from {labels.min()} ({labels.dtype}) were given; expected whole numbers from 0")
        present, found = len(np.unique(labels)), int(labels.max()) + 1
    if present < 2:
        raise DataError(f"the labels hold {present} class: a classifier needs at least two")
    if classes is not None and classes < found:
        raise DataError(f"the labels need {found} classes and classes={classes} was given")
    return classes or found
