"""The closed form against laplace-torch's own fit, and the way there and back."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from posthoc.adapters.errors import OptionError
from posthoc.adapters.laplace import LastLayerPosterior

pytestmark = pytest.mark.filterwarnings(  # by importing laplace-torch 0.3
    "ignore:`torch.jit.script` is deprecated:FutureWarning", "ignore:`torch.jit.script_method` is deprecated"
)
STRUCTURES = ["kron", "diag", "full"]
LINKS = ["probit", "bridge", "bridge_norm"]


def problem(likelihood: str, bias: bool, seed: int = 0) -> tuple[Tensor, nn.Linear, Tensor]:
    """Inputs of a layer, the layer, and labels or targets, in float64."""
    g = torch.Generator().manual_seed(seed)
    phi = torch.randn(60, 5, generator=g, dtype=torch.float64)
    layer = nn.Linear(5, 4, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) / 5**0.5)
        outputs = layer(phi)
    if likelihood == "regression":
        return phi, layer, outputs + 0.3 * torch.randn(60, 4, generator=g, dtype=torch.float64)
    return phi, layer, torch.multinomial(torch.softmax(outputs, -1), 1, generator=g).flatten()


def theirs(structure: str, likelihood: str, phi: Tensor, layer: nn.Linear, target: Tensor):
    from laplace import Laplace

    other = Laplace(
        nn.Sequential(nn.Identity(), layer),
        likelihood,
        subset_of_weights="last_layer",
        hessian_structure=structure,
        prior_precision=0.7,
        temperature=1.7,
        sigma_noise=0.4 if likelihood == "regression" else 1.0,
        last_layer_name="1",
    )
    other.fit(DataLoader(TensorDataset(phi, target), batch_size=20))
    return other


def ours(structure: str, likelihood: str, phi: Tensor, layer: nn.Linear, target: Tensor) -> LastLayerPosterior:
    noise = 0.4 if likelihood == "regression" else 1.0
    posterior = LastLayerPosterior(structure, 0.7, 1.7, likelihood, noise)
    return posterior.fit(phi, layer.weight, layer.bias, target)


def same(a: LastLayerPosterior, other, new: Tensor, tolerance: float) -> None:
    """Variance, predictive by every link both have, and marginal likelihood."""
    _, covariance = other._glm_predictive_distribution(new)
    torch.testing.assert_close(
        a.functional_variance(new), covariance.diagonal(dim1=1, dim2=2), rtol=tolerance, atol=tolerance
    )
    for link in LINKS if a.likelihood == "classification" else ():
        expected = other(new, pred_type="glm", link_approx=link)
        torch.testing.assert_close(a.predict(new, link), expected, rtol=0, atol=tolerance)
    if a.structure == "kron" and len(other.prior_precision) == 2:
        return  # laplace-torch 0.3 refuses the marginal likelihood of last layers with two priors
    mine, his = float(a.log_marginal_likelihood()), float(other.log_marginal_likelihood())
    assert mine == pytest.approx(his, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_agrees_with_a_fit_of_laplace_torch(structure: str, likelihood: str, bias: bool) -> None:
    data = problem(likelihood, bias)
    other, posterior, new = (
        theirs(structure, likelihood, *data),
        ours(structure, likelihood, *data),
        problem("", bias, 1)[0],
    )
    # laplace-torch 0.3 accumulates the full matrix in less than float64: 3e-7 off the sum over rows
    same(posterior, other, new, 1e-9 if structure != "full" else 3e-6)
    changed = float(posterior.log_marginal_likelihood(3.3))
    given = torch.tensor(3.3, dtype=torch.float64)
    assert changed == pytest.approx(
        float(other.log_marginal_likelihood(given)), abs=1e-9 if structure != "full" else 1e-5
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_to_laplace_has_the_same_numbers_also_after_changes(structure: str, likelihood: str, bias: bool) -> None:
    posterior = ours(structure, likelihood, *problem(likelihood, bias))
    other, new = posterior.to_laplace(), problem("", bias, 1)[0]
    same(posterior, other, new, 1e-12)
    posterior.prior_precision, other.prior_precision = posterior.prior_precision * 5.0, 3.5
    posterior.temperature = other.temperature = 0.6
    same(posterior, other, new, 1e-12)
    two = torch.tensor([0.3, 4.0], dtype=torch.float64)
    each = torch.cat([two[:1].expand(20), two[1:].expand(4)])[: 24 if bias else 20]
    posterior.prior_precision = two
    other.prior_precision = (two if bias else two[:1]) if structure == "kron" else each
    same(posterior, other, new, 1e-12)
    again = posterior.to_laplace()
    same(posterior, again, new, 1e-12)
    samples = again.predictive_samples(new, pred_type="glm", n_samples=5)  # works on its own
    assert samples.shape == (5, 60, 4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_from_laplace_takes_what_laplace_torch_fitted(structure: str, bias: bool) -> None:
    data = problem("classification", bias)
    other, new = theirs(structure, "classification", *data), problem("", bias, 1)[0]
    posterior = LastLayerPosterior.from_laplace(other)
    tolerance = 1e-9 if structure != "full" else 3e-6  # laplace-torch's full matrix is not symmetric to 1e-7
    same(posterior, other, new, tolerance)
    if structure != "kron":
        other.prior_precision = torch.linspace(0.5, 2.0, 24 if bias else 20, dtype=torch.float64)
        same(LastLayerPosterior.from_laplace(other), other, new, tolerance)
    back = LastLayerPosterior.from_laplace(posterior.to_laplace(), rows="heldout")
    torch.testing.assert_close(back.predict(new), posterior.predict(new), rtol=0, atol=1e-12)
    mine = ours(structure, "classification", *data)
    torch.testing.assert_close(mine.merge(posterior).predict(new), mine.merge(mine).predict(new), rtol=0, atol=1e-6)
    assert back.rows == "heldout"
    assert back.merge(back).n_data == 120


def test_nothing_of_the_data_is_in_what_to_laplace_gives() -> None:
    data = problem("classification", True)
    given = ours("kron", "classification", *data).to_laplace()
    assert given.state_dict()["data"] is None
    fitted = theirs("kron", "classification", *data)
    sizes = {tuple(value.shape) for value in vars(given).values() if isinstance(value, Tensor)}
    assert (60, 5) not in sizes
    assert fitted.n_data == given.n_data == 60


def test_from_laplace_refuses_what_has_no_closed_form() -> None:
    from laplace import Laplace

    phi, layer, target = problem("classification", True)
    network = nn.Sequential(nn.Linear(5, 5, dtype=torch.float64), layer)
    every = Laplace(network, "classification", subset_of_weights="all", hessian_structure="diag")
    every.fit(DataLoader(TensorDataset(phi, target), batch_size=20))
    with pytest.raises(OptionError, match="given DiagLaplace"):
        LastLayerPosterior.from_laplace(every)
    fitted = theirs("kron", "classification", phi, layer, target)
    with pytest.raises(OptionError, match="rows='test'"):
        LastLayerPosterior.from_laplace(fitted, rows="test")
    fitted.prior_mean = 0.5
    with pytest.raises(OptionError, match="mean 0"):
        LastLayerPosterior.from_laplace(fitted)
    unfitted = Laplace(network, "classification", subset_of_weights="last_layer", hessian_structure="diag")
    with pytest.raises(OptionError, match="not fitted"):
        LastLayerPosterior.from_laplace(unfitted)
