"""Whether a representation recovers the latents that made the data, and its concentrations the true ones.

For synthetic data, where the truth is known. Latents and representations are rows [N, D] and [N, E] of the same images.
The papers: Kirchhof et al., ICML 2023, arXiv 2302.02865 (MCInfoNCE); Rusak et al., arXiv 2407.00143 (AnInfoNCE).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..adapters.errors import DataError, OptionError
from ..adapters.vmf import VonMisesFisher, mean_resultant_length
from .arrays import Array, finite, same_rows
from .caps import concentrations
from .extras import require
from .metrics import spearman
from .search import directions

NODES = 1 << 11  # of the quadrature over the angle
DRAWS = 1 << 21  # numbers drawn at a time


@dataclass(frozen=True)
class Agreement:
    """How near two arrays of numbers are: mean absolute error, and Pearson's and Spearman's correlation."""

    mae: float
    pearson: float
    spearman: float


def linear_r2(representation: Array, latent: Array, *, fitted: Array | None = None) -> float:
    """R^2 of the least-squares linear map, with intercept, from the representation to the latent; averaged over latents.

    Args:
        fitted: bool [N], rows the map is fitted on; the others score it, and it may then be negative. None: all rows
            do both, as in the papers, which is optimistic by about E / N.

    At most 1. Raises DataError for shapes, numbers that are not finite, constant latents among the scored rows, or fewer
    than E + 2 rows to fit (any map fits them).
    """
    return float(linear_r2_each(representation, latent, fitted=fitted).mean())


def linear_r2_each(representation: Array, latent: Array, *, fitted: Array | None = None) -> np.ndarray:
    """`linear_r2` of every latent, float64 [D]."""
    h, z = _pair(representation, latent)
    fit = np.ones(len(z), bool) if fitted is None else np.asarray(fitted)
    if fit.dtype != bool or fit.shape != (len(z),):
        raise DataError(f"fitted must be bool [{len(z)}]; it is {fit.dtype} {fit.shape}")
    scored = fit if fitted is None else ~fit
    if fit.sum() < h.shape[1] + 2 or scored.sum() < 2:
        raise DataError(
            f"{fit.sum()} rows to fit and {scored.sum()} to score were given; a map from {h.shape[1]} dimensions needs "
            f"{h.shape[1] + 2} or more to fit, and 2 or more to score"
        )
    _not_constant("latent", z[scored])
    linear, score = require("sklearn.linear_model", "scikit-learn"), require("sklearn.metrics", "scikit-learn")
    model = linear.LinearRegression().fit(h[fit], z[fit])
    return score.r2_score(z[scored], model.predict(h[scored]), multioutput="raw_values")


def orthogonal_alignment(source: Array, target: Array, unique: bool = True) -> np.ndarray:
    """The orthogonal matrix Q, float64 [D, D], that brings `source @ Q` nearest to `target` in least squares.

    source, target: [N, D], the same images in two frames, such as learned mean directions and true ones; a reflection is
    allowed. Fit it on rows that are not judged afterwards. Raises DataError for shapes, for numbers that are not finite,
    and where rows span too few dimensions for one answer, unless `unique` is False: any of the nearest is good then for rows
    of that span. Schönemann, Psychometrika 1966.
    """
    a, b = _pair(source, target)
    if a.shape != b.shape:
        raise DataError(
            f"source {a.shape} and target {b.shape} must have the same dimensions to be turned onto each other"
        )
    left, size, right = np.linalg.svd(a.T @ b)
    if unique and size[-1] <= 1e-12 * size[0]:
        raise DataError(f"{len(a)} rows span fewer than {a.shape[1]} dimensions: give more to find one alignment")
    return left @ right


def random_half(rows: int, generator: np.random.Generator) -> np.ndarray:
    """A random half of the rows, bool [N], for `linear_r2`'s `fitted`."""
    return generator.permutation(rows) < rows // 2


def mean_correlation(representation: Array, latent: Array, *, ranks: bool = False) -> tuple[float, np.ndarray]:
    """MCC: mean |correlation| of latents with the dimensions matched to them (Hungarian), and the matching, int64 [D].

    Args:
        representation: [N, E], E >= D, a permutation of the latents (up to sign and scale) when it is perfect.
        ranks: Spearman's correlation instead of Pearson's.

    From 0 to 1. Latent j is matched to dimension `matching[j]`. Raises DataError for shapes, or constant columns.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import rankdata

    h, z = _pair(representation, latent)
    if h.shape[1] < z.shape[1]:
        raise DataError(f"{z.shape[1]} latents cannot be matched to {h.shape[1]} dimensions one to one")
    _not_constant("latent", z)
    _not_constant("representation", h)
    x, y = (rankdata(v, axis=0) if ranks else v for v in (z, h))
    strength = np.abs(np.corrcoef(x, y, rowvar=False)[: z.shape[1], z.shape[1] :])
    row, column = linear_sum_assignment(-strength)
    return float(strength[row, column].mean()), column


def cosine_agreement(direction: Array, latent: Array, *, diagonal: bool = False) -> Agreement:
    """Agreement of all pairwise cosines of two sets of directions, which a rotation of either leaves as it is.

    Args:
        direction: [N, E]. latent: [N, D], N >= 3. Any lengths but 0.
        diagonal: whether the pairs of an image with itself count, which always agree; the paper's code counts them.

    N (N - 1) / 2 pairs, about 100 bytes each at the peak: 5 GB for 10,000 images. Raises DataError for shapes, rows of
    zeros, or cosines that are all equal.
    """
    h, z = _pair(direction, latent)
    if len(z) < 3:
        raise DataError(f"{len(z)} images were given; pairwise cosines need 3 or more")
    below = np.tril_indices(len(z), 0 if diagonal else -1)
    units = directions("the representation", h), directions("the latent", z)
    return _agreement("cosines", *((unit @ unit.T)[below] for unit in units))


def concentration_agreement(concentration: Array, true: Array) -> Agreement:
    """Agreement of estimated and true concentrations, [N] or [N, 1], finite and >= 0. `mae` is a mean ABSOLUTE error.

    Raises DataError when either is constant: a correlation is not defined then.
    """
    both = [concentrations(v) for v in (concentration, true)]
    flat = [v[:, 0] if v.ndim == 2 and v.shape[1] == 1 else v for v in both]
    return _agreement("concentrations", *(finite("a concentration", v) for v in flat))


def spread_proxy(
    concentration: Array, dim: int, *, draws: int | None = None, generator: torch.Generator | None = None
) -> np.ndarray:
    """E|mu.z| under vMF(mu, concentration) on S^(dim-1): the paper's stand-in for a concentration, float64 [N] in (0, 1].

    Args:
        draws: the mean over so many samples for each image, drawn by `generator`; the paper takes 100, whose noise
            lowers correlations. None: the expectation, by quadrature.

    concentration: [N] or [N, 1], >= 0. Raises DataError for other concentrations, OptionError for draws < 1.
    """
    kappa = concentrations(concentration).reshape(-1)
    if draws is not None and draws < 1:
        raise OptionError(f"draws={draws} was given; expected at least 1, or None")
    resultant = mean_resultant_length(torch.from_numpy(kappa), dim).numpy()  # refuses dim < 2
    if draws is None:
        return np.concatenate([_expected(k, r, dim) for k, r in _parts(kappa, resultant, DRAWS // NODES)])
    pole = torch.nn.functional.one_hot(torch.tensor(0), dim).double()
    means = [
        VonMisesFisher(pole, torch.from_numpy(k)).sample((draws,), generator)[..., 0].abs().mean(0)
        for k, _ in _parts(kappa, resultant, max(1, DRAWS // (draws * dim)))
    ]
    return torch.cat(means).numpy()


def paper_metrics(direction: Array, concentration: Array, latent: Array, true: Array) -> dict[str, float]:
    """MCInfoNCE's six numbers by the names of its code, on raw concentrations: its `mse` is a mean absolute error.

    Arguments as in `cosine_agreement` (here with the diagonal) and `concentration_agreement`. With the proxy, its
    default, give `spread_proxy(kappa, dim, draws=100)` in place of the concentrations.
    """
    cosine = cosine_agreement(direction, latent, diagonal=True)
    kappa = concentration_agreement(concentration, true)
    return {
        f"{name}_{metric}": value
        for name, found in (("cosdist", cosine), ("kappa", kappa))
        for metric, value in (("mse", found.mae), ("corr", found.pearson), ("rankcorr", found.spearman))
    }


@dataclass(frozen=True)
class PrecisionRecovery:
    """Learned precisions beside the true ones they are matched to, float64 [D] each, ascending."""

    learned: np.ndarray
    true: np.ndarray

    @property
    def relative_error(self) -> np.ndarray:
        """|learned - true| / true, [D]."""
        return np.abs(self.learned - self.true) / self.true

    def summary(self) -> dict[str, float]:
        return {"mean_relative_error": float(self.relative_error.mean()), "worst": float(self.relative_error.max())}


def precision_recovery(learned: Array, true: Array) -> PrecisionRecovery:
    """Diagonal precisions [D], > 0, compared up to a permutation of the dimensions: both in ascending order.

    That is the matching with the least absolute (and squared) error. Raises DataError for others or other lengths.
    """
    found, wanted = finite("the learned precision", learned), finite("the true precision", true)
    same_rows(learned=found, true=wanted)
    if min(found.min(), wanted.min()) <= 0:
        raise DataError(f"a precision is above 0; the smallest are {found.min():g} (learned), {wanted.min():g} (true)")
    return PrecisionRecovery(np.sort(found), np.sort(wanted))


def _expected(kappa: np.ndarray, resultant: np.ndarray, dim: int) -> np.ndarray:
    """E|w| = A_d + 2 E[max(-w, 0)], the second by the midpoint rule over the angle."""
    angle = (np.arange(NODES) + 0.5) * (np.pi / NODES)
    cosine = np.cos(angle)
    sharp = kappa > 100.0 + 4.0 * dim  # less than e^-100 lies beyond the equator
    log = np.where(sharp, 0.0, kappa)[:, None] * cosine + (dim - 2) * np.log(np.sin(angle))
    weight = np.exp(log - log.max(1, keepdims=True))
    below = weight @ np.maximum(-cosine, 0.0) / weight.sum(1)
    return resultant + np.where(sharp, 0.0, 2.0 * below)


def _parts(kappa: np.ndarray, resultant: np.ndarray, rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    starts = range(0, len(kappa), rows)
    return [(kappa[i : i + rows], resultant[i : i + rows]) for i in starts]


def _agreement(name: str, estimate: np.ndarray, true: np.ndarray) -> Agreement:
    same_rows(estimate=estimate, true=true)
    for which, values in (("estimated", estimate), ("true", true)):
        if np.ptp(values) <= 1e-12 * np.abs(values).max():
            raise DataError(f"the {which} {name} are constant ({values[0]:g}): a correlation is not defined")
    correlation = float(np.corrcoef(estimate, true)[0, 1])
    return Agreement(float(np.abs(estimate - true).mean()), correlation, spearman(estimate, true))


def _pair(representation: Array, latent: Array) -> tuple[np.ndarray, np.ndarray]:
    h, z = finite("the representation", representation, 2), finite("the latent", latent, 2)
    same_rows(representation=h, latent=z)
    return h, z


def _not_constant(name: str, columns: np.ndarray) -> None:
    flat = np.flatnonzero(np.ptp(columns, axis=0) == 0)
    if len(flat):
        raise DataError(f"{name} is constant in {len(flat)} of {columns.shape[1]} columns: {flat[:5].tolist()}")
