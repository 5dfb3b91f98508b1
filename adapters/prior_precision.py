"""The prior precision that maximises a Laplace marginal likelihood, for one number, one each for two blocks, or many.

Maximised over u = log precision is -1/2 [log det(A + prior) - log det prior + theta^T prior theta], A the likelihood's
curvature and theta the parameters. Source: MacKay, Neural Computation 4 (1992).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from .curvature import Curvature, DiagCurvature, FullCurvature
from .errors import OptionError

LOG_PRIOR_RANGE = (math.log(1e-10), math.log(1e10))


def check_prior(value: float | Tensor) -> Tensor:
    """A prior as `curvature` takes it: [2] (weight, bias) from one or two positive numbers, [C, n] as it is.

    Keeps the gradient. Raises OptionError for anything else.
    """
    prior: Any = value
    if not (isinstance(prior, Tensor) and prior.is_floating_point()):
        prior = torch.as_tensor(prior, dtype=torch.float64)
    fits = prior.ndim == 2 or prior.numel() in (1, 2)
    if not fits or not bool(((prior > 0) & torch.isfinite(prior)).all()):
        raise OptionError(
            f"prior_precision={value} was given; expected one positive number, or two (weight, bias), or one for each "
            "parameter: [C, P + 1] with the biases last, [C, P] without a bias"
        )
    return prior if prior.ndim == 2 else prior.reshape(-1).expand(2)


def check_prior_fits(prior: Tensor, curvature: Curvature) -> None:
    """Raises OptionError for a precision of each parameter where the curvature has no such parameters, or has others."""
    if prior.ndim == 1:
        return
    shape = (curvature.classes, curvature.inputs + curvature.bias)
    if not isinstance(curvature, DiagCurvature | FullCurvature) or tuple(prior.shape) != shape:
        raise OptionError(
            f"prior_precision of shape {tuple(prior.shape)} was given; a precision for each parameter has the shape "
            f"{shape} here, and needs structure 'diag' or 'full'"
        )


def evidence_precision(
    curvature: Curvature, factor: float, weight: Tensor, bias: Tensor | None, prior_structure: str
) -> Tensor:
    """The best prior of a layer's weight [C, P] and bias [C] or None: [2] if "scalar" or "layerwise", else [C, P + 1].

    `factor` scales the curvature. Raises OptionError for a structure of prior that the curvature does not have.
    """
    full = isinstance(curvature, FullCurvature)
    many = isinstance(curvature, DiagCurvature | FullCurvature)
    if prior_structure not in ("scalar", "layerwise", "diagonal") or (prior_structure == "diagonal" and not many):
        raise OptionError(
            f"prior_structure={prior_structure!r} was given; expected 'scalar' or 'layerwise', or 'diagonal' with "
            "structure 'diag' or 'full'"
        )
    values, bias_values = curvature.eigenvalues()
    theta = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    if isinstance(curvature, FullCurvature) and prior_structure != "scalar":
        groups = torch.arange(theta.numel(), device=theta.device).view(theta.shape)
        if prior_structure == "layerwise":
            groups = (groups % theta.shape[1] >= curvature.inputs).long()
        found = joint_precisions(curvature, factor, theta, groups)
        return found if prior_structure == "diagonal" else found[0, [0, -1]]
    blocks = [(factor * values, theta if full else weight)]
    if bias is not None and bias_values is not None:
        blocks.append((factor * bias_values, bias))
    if prior_structure == "diagonal":
        return torch.cat([own_precisions(*block).view(len(weight), -1) for block in blocks], 1)
    together = [blocks] if prior_structure == "scalar" else [[block] for block in blocks]
    best = torch.tensor([shared_precision(one) for one in together], dtype=torch.float64)
    return check_prior(best).to(weight)


def shared_precision(blocks: list[tuple[Tensor, Tensor]]) -> float:
    """The one precision of blocks with eigenvalues l and parameters theta.

    The derivative in u is half of the sum over blocks of [sum l/(l + e^u) - e^u |theta|^2], effective parameters less
    their size; it falls strictly, so the maximum is unique. A safeguarded Newton iteration finds it to 1e-10.
    """
    low, high = LOG_PRIOR_RANGE
    sized = [(eigenvalues, theta.square().sum()) for eigenvalues, theta in blocks]
    u = 0.0
    for _ in range(200):
        tau = math.exp(u)
        value = slope = 0.0
        for eigenvalues, square in sized:
            share = eigenvalues / (eigenvalues + tau)
            value += float(share.sum() - tau * square)
            slope -= float((share * (1.0 - share)).sum() + tau * square)
        low, high = (u, high) if value > 0 else (low, u)
        newton = u - value / slope if slope < 0 else low
        step = (newton if low < newton < high else 0.5 * (low + high)) - u
        u += step
        if abs(step) < 1e-10:
            break
    _warn_at_ends(np.array([u]))
    return math.exp(u)


def own_precisions(curvature: Tensor, theta: Tensor) -> Tensor:
    """Each parameter's own precision under a diagonal curvature h, the root of h = tau theta^2 (h + tau)."""
    square = theta.double().square().clamp(min=1e-300)
    ratio = curvature.double() * square  # tau = 2 / (theta^2 (1 + sqrt(1 + 4 / (h theta^2)))), which does not cancel
    tau = 2.0 / (square * (1.0 + torch.sqrt(1.0 + 4.0 / ratio.clamp(min=1e-300))))
    return tau.clamp(math.exp(LOG_PRIOR_RANGE[0]), math.exp(LOG_PRIOR_RANGE[1])).to(theta)


def joint_precisions(curvature: FullCurvature, factor: float, theta: Tensor, groups: Tensor) -> Tensor:
    """Precision of every parameter [C, n] under the full curvature, the same within a group: int64 [C, n].

    By L-BFGS from 1 to convergence; a step takes a Cholesky factor of [K, K] and its inverse. With a precision for
    each parameter the maximum need not be the only one.
    """
    member, square = groups.flatten(), theta.flatten().square()

    def objective(u: np.ndarray) -> tuple[float, np.ndarray]:
        tau = torch.from_numpy(u).to(theta).exp()[member]
        lower = torch.linalg.cholesky(curvature.precision(tau.view(theta.shape), factor))
        value = 2.0 * lower.diagonal().log().sum() - tau.log().sum() + (tau * square).sum()
        slope = tau * torch.cholesky_inverse(lower).diagonal() - 1.0 + tau * square
        by_group = torch.zeros(len(u), dtype=theta.dtype, device=theta.device).index_add_(0, member, slope)
        return 0.5 * float(value), 0.5 * by_group.cpu().numpy()

    start = np.zeros(int(member.max()) + 1)
    found = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[LOG_PRIOR_RANGE] * len(start),
        options={"maxiter": 1000, "maxfun": 2000, "ftol": 1e-15, "gtol": 1e-9},
    )
    if len(start) <= 2:  # single parameters without a say do run to the ends
        _warn_at_ends(found.x)
    return torch.from_numpy(found.x).to(theta).exp()[member].view(theta.shape)


def _warn_at_ends(u: np.ndarray) -> None:
    if min(float(u.min()) - LOG_PRIOR_RANGE[0], LOG_PRIOR_RANGE[1] - float(u.max())) < 1e-3:
        warnings.warn(
            f"the marginal likelihood has no maximum in the prior precision between 1e-10 and 1e10 (stopped at "
            f"{', '.join(f'{math.exp(x):.1e}' for x in u)}): the weights or the curvature are zero; give "
            "prior_precision yourself",
            UserWarning,
            stacklevel=5,
        )
