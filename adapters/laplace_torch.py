"""From and to laplace-torch: the same last-layer posterior as an object of that library.

Its own state is not for keeping: it pickles the first training batch with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .curvature import FullCurvature, KronCurvature, curvature_class
from .errors import OptionError
from .laplace import LastLayerPosterior


def to_laplace(posterior: LastLayerPosterior) -> Any:
    """A fitted laplace-torch last-layer posterior (`KronLLLaplace`, `DiagLLLaplace`, `FullLLLaplace`).

    Its model is the linear layer, so it takes the layer's inputs [B, P]. Predictive distribution, marginal likelihood
    and changes of prior, temperature or noise are laplace-torch's own from there on, which forms [B, C, C (P + 1)]
    Jacobians. Without labels its marginal likelihood is NaN; with one prior for weights and one for biases and structure
    "kron", it has none (laplace-torch 0.3 refuses).
    """
    from laplace import Laplace

    laplace_torch: Any = Laplace  # its types do not say what a last-layer posterior has
    curvature = posterior.fitted()
    layer = nn.Linear(curvature.inputs, curvature.classes, curvature.bias).to(posterior.weight)
    with torch.no_grad():
        layer.weight.copy_(posterior.weight)
        if posterior.bias is not None:
            layer.bias.copy_(posterior.bias)
    other = laplace_torch(
        nn.Sequential(nn.Identity(), layer),
        posterior.likelihood,
        subset_of_weights="last_layer",
        hessian_structure=posterior.structure,
        prior_precision=_their_prior(posterior),
        temperature=posterior.temperature,
        sigma_noise=posterior.sigma_noise,
        last_layer_name="1",
    )
    other.mean = nn.utils.parameters_to_vector(layer.parameters()).detach()
    other.n_data, other.n_outputs, other.loss = posterior.n_data, curvature.classes, posterior.loss.clone()
    other.model.output_size = curvature.classes
    if isinstance(curvature, KronCurvature):
        _give_factors(other, curvature, posterior.n_data)
    elif isinstance(curvature, FullCurvature):
        order = _order(curvature)
        other.H = curvature.totals(posterior.n_data)[0][order][:, order]
    else:
        weight, bias = curvature.eigenvalues()
        other.H = torch.cat([weight.flatten(), *([] if bias is None else [bias])])
    return other


def from_laplace(other: Any, rows: str = "train") -> LastLayerPosterior:
    """Ours from a fitted last-layer posterior of laplace-torch with GGN curvature; `rows` as in `fit`.

    Raises OptionError for its posteriors over other weights or of other structures, or if it is not fitted.
    """
    from laplace import DiagLLLaplace, FullLLLaplace, KronLLLaplace

    structures = {KronLLLaplace: "kron", DiagLLLaplace: "diag", FullLLLaplace: "full"}
    structure = structures.get(type(other))
    if structure is None or not getattr(other, "n_data", 0):
        raise OptionError(
            f"from_laplace takes a fitted KronLLLaplace, DiagLLLaplace or FullLLLaplace; given {type(other).__name__}"
            f"{'' if structure is None else ', which is not fitted'}"
        )
    if rows not in ("train", "heldout"):
        raise OptionError(f"rows={rows!r} was given; expected 'train' or 'heldout'")
    centred = bool((torch.as_tensor(other.prior_mean) == 0).all())
    if not centred or getattr(other, "damping", False):
        raise OptionError("from_laplace takes priors of mean 0, and no damping: here every prior has mean 0")
    layer = other.model.last_layer
    weight, bias = layer.weight.detach().double(), None if layer.bias is None else layer.bias.detach().double()
    posterior = LastLayerPosterior(
        structure,
        temperature=float(other.temperature),
        likelihood=str(getattr(other.likelihood, "value", other.likelihood)),
        sigma_noise=float(other.sigma_noise),
    )
    posterior.register_buffer("weight", weight)
    posterior.register_buffer("bias", bias)
    curvature = curvature_class(structure)(weight.shape[1], len(weight), bias is not None).to(weight)
    curvature.assign(_their_sums(other, curvature), int(other.n_data))
    posterior.curvature, posterior.n_data, posterior.rows = curvature, int(other.n_data), rows
    posterior.loss = torch.as_tensor(other.loss).detach().to(weight)
    posterior.prior_precision = _our_prior(other, curvature).to(weight)
    return posterior


def _give_factors(other: Any, curvature: KronCurvature, count: int) -> None:
    """Blocks weight [sum G, mean phi phi^T] and bias [sum G], whole and as their eigenvectors."""
    from laplace.utils.matrix import Kron, KronDecomposed

    inner, outer = curvature.totals(count)
    blocks = 2 if curvature.bias else 1
    factors: list[Any] = [[outer, inner / count], [outer]]
    other.H_facs = Kron(factors[:blocks])
    vectors: list[Any] = [[curvature.output_vectors, curvature.input_vectors], [curvature.output_vectors]]
    values: list[Any] = [[curvature.output_values, curvature.input_values], [curvature.output_values]]
    other.H = KronDecomposed(vectors[:blocks], values[:blocks])


def _their_sums(other: Any, curvature: Any) -> tuple[Tensor, ...]:
    if isinstance(curvature, KronCurvature):
        factors = [[factor.detach().double() for factor in block] for block in other.H_facs.kfacs]
        outer, inner = factors[0][0], other.n_data * factors[0][1]
        if curvature.bias:  # of the weight's two factors the scale of one is a convention; the bias's is not
            scale = factors[1][0].trace() / outer.trace()
            outer, inner = scale * outer, inner / scale
            if not torch.allclose(outer, factors[1][0], rtol=1e-4, atol=1e-6 * float(outer.abs().max())):
                raise OptionError(
                    "the weight's and the bias's factors of this posterior are not proportional: it was not made of "
                    "the generalised Gauss-Newton matrix (another backend?), so it has no closed form here"
                )
        return inner, outer
    matrix = other.H.detach().double()
    if isinstance(curvature, FullCurvature):
        back = torch.argsort(_order(curvature))
        return (matrix[back][:, back],)
    size = curvature.classes * curvature.inputs
    bias = matrix[size:] if curvature.bias else matrix.new_zeros(curvature.classes)
    return matrix[:size].view(curvature.classes, -1), bias


def _order(curvature: Any) -> Tensor:
    """Positions in our order [C, P + 1] of laplace-torch's parameters: all weights, row by row, then the biases."""
    ours = torch.arange(curvature.classes * (curvature.inputs + curvature.bias)).view(curvature.classes, -1)
    return torch.cat([ours[:, : curvature.inputs].flatten(), ours[:, curvature.inputs :].flatten()])


def _their_prior(posterior: LastLayerPosterior) -> Tensor:
    curvature, prior = posterior.fitted(), posterior.prior_precision
    if prior.ndim == 1 and bool(prior[0] == prior[1]):
        return prior[:1]
    if posterior.structure == "kron":
        return prior if curvature.bias else prior[:1]
    weight, bias = curvature.split(prior)
    parts = [weight.expand(curvature.classes, curvature.inputs).flatten()]
    return torch.cat([*parts, *([bias.expand(curvature.classes)] if curvature.bias else [])])


def _our_prior(other: Any, curvature: Any) -> Tensor:
    prior = torch.as_tensor(other.prior_precision).detach().double().reshape(-1)
    if len(prior) <= 2 and (len(prior) == 1 or isinstance(curvature, KronCurvature)):
        return prior.expand(2)
    size = curvature.classes * curvature.inputs
    return torch.cat([prior[:size].view(curvature.classes, -1), prior[size:].view(curvature.classes, -1)], 1)
