"""What a head keeps of its held-out scores: percentiles, and thresholds that hold in finite samples."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .errors import DataError, NotFittedError, OptionError

LEVELS = 1000  # quantile levels 0, 1/1000, ..., 1: 1,001 stored values
MAX_ROWS = 2**50  # n LEVELS stays a 64-bit number
GRID = torch.arange(50, LEVELS + 1, 50)  # coverages 5 %, 10 %, ..., 100 % of the risk table, in levels


class HeldOutScores(nn.Module):
    """The distribution of a head's scores on images it was not fitted on, small enough to travel with the adapter.

    Buffers: `quantiles` [1001] float32, the order statistics ceil(n k/1000) for k = 0..1000, so nothing is interpolated
    and the empirical distribution is known exactly to 0.1 %; `rows`, how many scores there were (n); `accepted` and
    `errors` [20], how many of them, and how many wrong decisions among those, do not exceed the quantiles at 5 %, 10 %,
    ..., 100 %; `errors` is -1 when it could not be counted (no labels, or no classifier that names them).
    """

    quantiles: Tensor
    rows: Tensor
    accepted: Tensor
    errors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("quantiles", torch.zeros(LEVELS + 1))
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("accepted", torch.zeros(len(GRID), dtype=torch.int64))
        self.register_buffer("errors", torch.full((len(GRID),), -1, dtype=torch.int64))

    @torch.no_grad()
    def fit(self, scores: Tensor, wrong: Tensor | None = None) -> HeldOutScores:
        """Store the distribution of `scores` [n] and, if known, of the decisions that are `wrong` [n] bool.

        Raises DataError for no scores or non-finite ones.
        """
        scores = scores.detach().flatten().float().cpu()
        if not len(scores):
            raise DataError("No held-out rows to score: give more rows, or a larger `validation` share.")
        if not bool(scores.isfinite().all()):
            raise DataError(f"{int((~scores.isfinite()).sum())} of {len(scores)} held-out scores are not finite.")
        ordered, order = scores.sort()
        n = len(ordered)
        rank = -(-n * torch.arange(LEVELS + 1) // LEVELS)  # ceil(n k / 1000), in integers
        quantiles = ordered[(rank - 1).clamp_min(0)]
        accepted = torch.searchsorted(ordered, quantiles[GRID], right=True)
        errors = torch.full_like(accepted, -1)
        if wrong is not None:
            errors = wrong.cpu().flatten()[order].long().cumsum(0)[accepted - 1]
        values = {"quantiles": quantiles, "rows": torch.tensor(n), "accepted": accepted, "errors": errors}
        for name, value in values.items():
            self.register_buffer(name, value.to(self.quantiles.device))
        return self

    def summary(self) -> dict[str, float | int]:
        """How many held-out scores there were, and their 0, 5, 50, 95 and 100 % quantiles."""
        places = {"min": 0, "q05": 50, "median": 500, "q95": 950, "max": LEVELS}
        return {"rows": int(self.rows), **{name: float(self.quantiles[place]) for name, place in places.items()}}

    def check(self) -> None:
        """Raises DataError unless the buffers can have come from `fit` (they may come from a stranger's file)."""
        n, counts, errors = int(self.rows), self.accepted, self.errors
        right = 1 <= n <= MAX_ROWS and bool((self.quantiles.diff() >= 0).all())
        # as many scores do not exceed a quantile as its level says, or more where scores are equal
        right = right and bool((counts * LEVELS >= n * GRID.to(counts.device)).all()) and int(counts.max()) <= n
        right = right and bool((counts.diff() >= 0).all())
        unknown = bool((errors == -1).all())
        counted = bool((errors >= 0).all()) and bool((errors <= counts).all()) and bool((errors.diff() >= 0).all())
        if not (right and (unknown or counted)):
            raise DataError("the held-out scores are not what a fit stores: quantiles must rise, counts must fit them")

    def percentile(self, uncertainty: Tensor) -> Tensor:
        """Percent of the held-out scores not above `uncertainty` [...]: float32 in 0..100, rounded down to 0.1."""
        quantiles = self.quantiles.float()
        count = torch.searchsorted(quantiles, uncertainty.detach().float().contiguous(), right=True)
        return (count - 1).clamp_min(0).float() * (100 / LEVELS)

    def threshold(self, *, coverage: float | None = None, risk: float | None = None, delta: float = 0.1) -> float:
        """The score to abstain above; give exactly one of `coverage` and `risk`, in (0, 1].

        coverage: a new image's score exceeds the threshold with probability at most 1 - coverage, over the draw of the
        n held-out images and the new one, if they are exchangeable (the ceil((n+1) coverage)-th order statistic; Vovk,
        Gammerman & Shafer 2005). Above n = 1000 the next stored quantile is taken, never a lower one.

        risk: with probability at least 1 - delta over the draw of the held-out images, the backbone's decision is
        wrong on at most a share `risk` of the images that are not abstained from. The largest of 20 coverages (5 %,
        10 %, ..., 100 %) whose Clopper-Pearson bound at level delta/20 does not exceed `risk` (selection with
        guaranteed risk, Geifman & El-Yaniv 2017; the row that sets the threshold counts among the errors but not among
        the trials). Holds for scores without ties.

        Raises OptionError when the promise cannot be kept with these held-out rows, NotFittedError before fit.
        """
        if int(self.rows) == 0:
            raise NotFittedError("There are no held-out scores yet: call fit first.")
        if (coverage is None) == (risk is None):
            raise OptionError("Give exactly one of coverage= and risk=, for example threshold(coverage=0.95).")
        for name, value in (("coverage", coverage), ("risk", risk), ("delta", delta)):
            if value is not None and not 0 < value <= 1:
                raise OptionError(f"{name}={value} must lie above 0 and not above 1.")
        return self._at_coverage(coverage) if coverage is not None else self._at_risk(float(risk or 0), delta)

    def _at_coverage(self, coverage: float) -> float:
        n = int(self.rows)
        # A coverage typed as 0.95 is a little above or below 19/20 in binary: the guard keeps ceil from adding a row.
        rank = max(1, math.ceil((n + 1) * coverage - 1e-9))
        if rank > n:
            largest = math.floor(n / (n + 1) * 1e4) / 1e4
            raise OptionError(
                f"coverage={coverage} cannot be promised from {n} held-out scores: the largest possible is {largest} "
                f"(n/(n+1)). Ask for less, or fit with more held-out rows (`validation`)."
            )
        return float(self.quantiles[(rank - 1) * LEVELS // n + 1])

    def _at_risk(self, risk: float, delta: float) -> float:
        bounds = self.risk_bounds(delta)
        allowed = np.flatnonzero(bounds <= risk)
        if not len(allowed):
            best = int(bounds.argmin())
            raise OptionError(
                f"risk={risk} cannot be promised from {int(self.rows)} held-out rows: the smallest bound is "
                f"{bounds[best]:.4f}, at coverage {int(GRID[best]) / LEVELS:.0%}. Ask for a higher risk, give more "
                f"held-out rows, or use a head that ranks errors better."
            )
        return float(self.quantiles[GRID[allowed[-1]]])

    def risk_bounds(self, delta: float = 0.1) -> np.ndarray:
        """Upper bounds [20] on the selective risk at coverages 5 %, ..., 100 %, all valid at once with 1 - delta.

        Raises OptionError when the errors were not counted at fit time.
        """
        from scipy.stats import beta

        errors, trials = self.errors.cpu().numpy(), self.accepted.cpu().numpy() - 1
        if errors[0] < 0:
            raise OptionError(
                "A risk threshold needs the backbone's decisions and the true classes: fit on labelled rows with a "
                "backbone whose classifier has those classes. threshold(coverage=...) works without."
            )
        trials = np.maximum(trials, 0)
        certain = errors >= trials  # no bound below 1, an empty set included
        bounds = beta.ppf(1 - delta / len(GRID), errors + 1, np.maximum(trials - errors, 1))
        return np.where(certain, 1.0, bounds)
