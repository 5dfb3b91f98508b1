"""The closed-form posterior against laplace-torch, dense matrices, autograd and brute-force sampling."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from posthoc.adapters import laplace_rows, predictive
from posthoc.adapters.errors import DataError, NotFittedError, OptionError
from posthoc.adapters.laplace import KINDS, LINKS, LastLayerPosterior
from posthoc.adapters.predictive import entropy, monte_carlo, normal_draws, probit

from .posterior_problem import STRUCTURES, dense, jacobians, problem


@pytest.mark.parametrize("structure", STRUCTURES)
def test_variance_is_that_of_the_dense_posterior(structure: str) -> None:
    phi, weight, bias, _ = problem()
    posterior = LastLayerPosterior(structure, torch.tensor([0.3, 4.0])).fit(phi, weight, bias)
    jac = jacobians(phi[:7], 4)
    expected = jac @ dense(structure, phi, weight, bias, (0.3, 4.0)) @ jac.transpose(1, 2)
    torch.testing.assert_close(
        posterior.functional_variance(phi[:7]), expected.diagonal(dim1=1, dim2=2), rtol=1e-6, atol=0
    )
    # what the mutual information draws from: the whole covariance across classes
    curvature = posterior.fitted()
    spread = curvature.spread(curvature.project(phi[:7]), posterior.prior_precision, 1.0)
    root = curvature.deviations(spread, torch.eye(4, dtype=torch.float64))  # row k: what draw k moves
    torch.testing.assert_close(root.transpose(1, 2) @ root, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(curvature.covariance_sums(spread), expected.sum(2), rtol=1e-6, atol=1e-9)


def test_diagonal_curvature_is_the_diagonal_of_the_hessian() -> None:
    phi, weight, bias, labels = problem()

    def loss(w: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(phi @ w.T + b, labels, reduction="sum")

    hessian = torch.autograd.functional.hessian(loss, (weight, bias))
    found_weight, found_bias = LastLayerPosterior("diag").fit(phi, weight, bias).fitted().eigenvalues()
    torch.testing.assert_close(found_weight.flatten(), hessian[0][0].reshape(20, 20).diagonal())
    torch.testing.assert_close(found_bias, hessian[1][1].diagonal())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_marginal_likelihood_is_that_of_the_dense_posterior_and_differentiable(structure: str) -> None:
    phi, weight, bias, labels = problem()
    posterior = LastLayerPosterior(structure).fit(phi, weight, bias, labels)
    prior = torch.tensor([0.3, 4.0], dtype=torch.float64, requires_grad=True)
    covariance = dense(structure, phi, weight, bias, (0.3, 4.0))
    log_prior = 20 * np.log(0.3) + 4 * np.log(4.0)
    scatter = 0.3 * weight.square().sum() + 4.0 * bias.square().sum()
    fit = -torch.nn.functional.cross_entropy(phi @ weight.T + bias, labels, reduction="sum")
    expected = fit - 0.5 * (-torch.logdet(covariance) - log_prior + scatter)
    assert float(posterior.log_marginal_likelihood(prior).detach()) == pytest.approx(float(expected), rel=1e-6)
    assert torch.autograd.gradcheck(posterior.log_marginal_likelihood, (prior,))


@pytest.mark.parametrize("prior_structure", ["scalar", "layerwise"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_prior_found_is_where_the_marginal_likelihood_is_stationary(structure: str, prior_structure: str) -> None:
    phi, weight, bias, labels = problem()
    posterior = LastLayerPosterior(structure, temperature=0.8).fit(phi, weight, bias, labels)
    found = posterior.optimize_prior_precision("marglik", prior_structure)
    assert torch.equal(found, posterior.prior_precision)
    assert (found[0] == found[1]) == (prior_structure == "scalar")
    tolerance = 1e-8 if structure != "full" or prior_structure == "scalar" else 1e-5
    log_prior = found.log().requires_grad_()
    (slope,) = torch.autograd.grad(posterior.log_marginal_likelihood(log_prior.exp()), log_prior)
    slope = slope.sum() if prior_structure == "scalar" else slope.abs().max()
    assert abs(float(slope)) < tolerance
    best = posterior.log_marginal_likelihood()
    assert all(posterior.log_marginal_likelihood(found * factor) < best for factor in (1e-4, 0.9, 1.1, 1e4))


def test_a_classifier_of_zeros_has_no_best_prior_and_says_so() -> None:
    phi, weight, bias, _ = problem()
    posterior = LastLayerPosterior().fit(phi, torch.zeros_like(weight), torch.zeros_like(bias))
    with pytest.warns(UserWarning, match="no maximum in the prior precision"):
        posterior.optimize_prior_precision()
    assert torch.isfinite(posterior.functional_variance(phi)).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_mutual_information_is_that_of_sampled_weights(structure: str) -> None:
    phi, weight, bias, _ = problem()
    posterior = LastLayerPosterior(structure, 1.5).fit(phi, weight, bias)
    new = 2.0 * problem(seed=3)[0][:8]
    covariance = dense(structure, phi, weight, bias, (1.5, 1.5))
    noise = torch.randn(40_000, len(covariance), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = torch.cat([weight.flatten(), bias]) + noise @ torch.linalg.cholesky(covariance).T
    p = torch.softmax(torch.einsum("bcp,sp->bsc", jacobians(new, 4), theta), -1)
    expected = entropy(p.mean(1)) - entropy(p).mean(1)
    found = posterior.uncertainties(new)
    torch.testing.assert_close(found["mutual_information"], expected, rtol=0.08, atol=0)
    many = posterior.uncertainties(new, normal_draws(4, 8192))
    torch.testing.assert_close(many["mutual_information"], expected, rtol=0.02, atol=0)
    torch.testing.assert_close(many["expected_entropy"], entropy(p).mean(1), rtol=0.01, atol=0)
    torch.testing.assert_close(many["predictive_entropy"], entropy(p.mean(1)), rtol=0.01, atol=0)
    torch.testing.assert_close(many["max_probability"], 1.0 - p.mean(1).amax(1), rtol=0.01, atol=0)
    torch.testing.assert_close(posterior.predict(new, "mc"), p.mean(1), rtol=0.03, atol=2e-3)


def test_mutual_information_of_nearly_certain_logits_is_small_accurate_and_not_negative() -> None:
    logits = torch.tensor([[0.5, 0.0, -0.5], [40.0, 0.0, -40.0]])
    variance = torch.full((2, 3), 1e-6)
    draws = normal_draws(3, 8192).float()
    found = monte_carlo(logits, variance, lambda v, d: v.sqrt().unsqueeze(1) * d, draws).mutual_information
    p = torch.softmax(logits, -1)
    second_order = 0.5 * 1e-6 * (p - 2 * p**2 + p * (p**2).sum(-1, keepdim=True)).sum(-1)  # tr(G) v / 2
    assert float(found[0]) == pytest.approx(float(second_order[0]), rel=0.05)
    assert 0.0 <= float(found[1]) < 1e-12


def test_draws_are_mirrored_scaled_and_seeded() -> None:
    before = torch.get_rng_state()
    draws = normal_draws(10)
    assert torch.equal(torch.get_rng_state(), before)
    assert draws.shape == (256, 10)
    assert normal_draws(1000).shape == (32, 1000)
    assert torch.equal(draws, normal_draws(10))
    assert not torch.equal(draws, normal_draws(10, seed=1))
    torch.testing.assert_close(draws.mean(0), torch.zeros(10, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(draws.square().mean(0), torch.ones(10, dtype=torch.float64))
    for odd in (0, 3):
        with pytest.raises(OptionError, match="even"):
            normal_draws(10, odd)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_chunks_memory_maps_and_subsets_change_nothing(
    structure: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    phi, weight, bias, labels = problem(rows=500)
    keep = np.arange(0, 500, 2)[::-1].copy()
    whole = LastLayerPosterior(structure).fit(phi[keep], weight, bias, labels[keep])
    monkeypatch.setattr(laplace_rows, "CHUNK_BYTES", 64)
    monkeypatch.setattr(predictive, "CHUNK_BYTES", 64)
    np.save(tmp_path / "phi.npy", phi.numpy())
    mapped = np.load(tmp_path / "phi.npy", mmap_mode="r")
    pieces = LastLayerPosterior(structure).fit(mapped, weight.numpy(), bias.numpy(), labels.numpy(), subset=keep)
    assert pieces.n_data == 250
    for a, b in zip(whole.fitted().eigenvalues(), pieces.fitted().eigenvalues(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert float(whole.log_marginal_likelihood()) == pytest.approx(float(pieces.log_marginal_likelihood()), rel=1e-12)
    torch.testing.assert_close(whole.functional_variance(phi), pieces.functional_variance(phi), rtol=1e-9, atol=0)
    in_pieces = pieces.uncertainties(phi), pieces.predict(phi, "mean-field")
    monkeypatch.undo()
    torch.testing.assert_close(
        (pieces.uncertainties(phi), pieces.predict(phi, "mean-field")), in_pieces, rtol=1e-9, atol=1e-12
    )


def test_soft_labels_of_one_class_are_labels() -> None:
    phi, weight, bias, labels = problem()
    hard = LastLayerPosterior().fit(phi, weight, bias, labels).log_marginal_likelihood()
    soft = LastLayerPosterior().fit(phi, weight, bias, torch.eye(4)[labels]).log_marginal_likelihood()
    assert float(hard) == pytest.approx(float(soft), rel=1e-12)


@pytest.mark.parametrize(
    ("classes", "structure"), [(2, "kron"), (2, "diag"), (2, "full"), (1000, "kron"), (1000, "diag")]
)
def test_two_and_a_thousand_classes_in_float32(classes: int, structure: str) -> None:
    phi, weight, bias, labels = problem(rows=1500, inputs=64, classes=classes)
    posterior = LastLayerPosterior(structure).fit(phi, weight, bias, labels)
    posterior.optimize_prior_precision()
    exact, exact_information = posterior.predict(phi[:50]), posterior.uncertainties(phi[:50])["mutual_information"]
    torch.testing.assert_close(exact.sum(-1), torch.ones(50, dtype=torch.float64))
    posterior.float()
    assert posterior.predict(phi[:50]).dtype == torch.float32
    torch.testing.assert_close(posterior.predict(phi[:50].float()).double(), exact, rtol=1e-4, atol=1e-7)
    information = posterior.uncertainties(phi[:50].float())["mutual_information"].double()
    torch.testing.assert_close(information, exact_information, rtol=1e-3, atol=1e-6)
    smaller = LastLayerPosterior(structure, posterior.prior_precision).fit(phi.float(), weight.float(), bias.float())
    torch.testing.assert_close(smaller.predict(phi[:50].float()), exact, rtol=1e-4, atol=1e-7)


def test_outputs_are_differentiable_in_the_features() -> None:
    phi, weight, bias, _ = problem()
    posterior = LastLayerPosterior().fit(phi, weight, bias)
    x = phi[:3].clone().requires_grad_()
    draws = normal_draws(4)
    for link in LINKS:
        assert torch.autograd.gradcheck(lambda x, link=link: posterior.predict(x, link), (x,))
    assert torch.autograd.gradcheck(lambda x: tuple(posterior.uncertainties(x, draws).values()), (x,))
    certain = torch.tensor([[1.0, 0.0]], requires_grad=True)
    entropy(certain).backward()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


def test_more_variance_means_less_confidence() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    confidence = [float(probit(logits, torch.full((1, 3), v)).max()) for v in (0.0, 1.0, 100.0, 1e8)]
    assert confidence == sorted(confidence, reverse=True)
    assert confidence[0] == pytest.approx(float(torch.softmax(logits, -1).max()))
    assert confidence[-1] == pytest.approx(1 / 3, abs=1e-3)


NAN = torch.tensor(float("nan"), dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": lambda w: w[:1], "bias": lambda b: b[:1]}, "at least 2 classes"),
        ({"weight": lambda w: w[:, :3]}, r"penultimate of shape \(60, 5\)"),
        ({"bias": lambda b: b[:3]}, "bias of shape"),
        ({"weight": lambda w: w * NAN}, "weight or bias holds NaN"),
        ({"phi": lambda x: x.index_fill(0, torch.tensor([7, 41]), float("nan"))}, "2 rows.*rows 7, 41"),
        ({"phi": lambda x: x[:0], "labels": lambda y: y[:0]}, "N of at least 1"),
        ({"labels": lambda y: y + 1}, "labels from 1 to 4.*0 to 3"),
        ({"labels": lambda y: y.double()}, "float64"),
        ({"labels": lambda y: y[:9]}, r"labels of shape \(9,\)"),
        ({"labels": lambda y: -torch.eye(4)[y]}, "soft labels"),
    ],
)
def test_unusable_data_is_refused(change: dict, message: str) -> None:
    values = dict(zip(("phi", "weight", "bias", "labels"), problem(), strict=True))
    values |= {name: edit(values[name]) for name, edit in change.items()}
    with pytest.raises(DataError, match=message):
        LastLayerPosterior().fit(values["phi"], values["weight"], values["bias"], values["labels"])


def test_what_needs_labels_or_a_fit_says_so() -> None:
    phi, weight, bias, _ = problem()
    with pytest.raises(NotFittedError, match="call fit"):
        LastLayerPosterior().functional_variance(phi)
    unlabelled = LastLayerPosterior().fit(phi, weight, bias)
    with pytest.raises(DataError, match="needs labels"):
        unlabelled.log_marginal_likelihood()
    unlabelled.optimize_prior_precision()  # needs none
    with pytest.raises(OptionError, match=r"link='probbit'.*did you mean 'probit'"):
        unlabelled.predict(phi, link="probbit")
    with pytest.raises(OptionError, match="method='cv'"):
        unlabelled.optimize_prior_precision("cv")
    with pytest.raises(OptionError, match="prior_structure='diag'"):
        unlabelled.optimize_prior_precision(prior_structure="diag")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "cron"}, "did you mean 'kron'"),
        ({"prior_precision": 0.0}, "prior_precision=0.0"),
        ({"prior_precision": torch.ones(3)}, "one positive number, or two"),
        ({"structure": "subnetwork"}, "live_posterior"),
        ({"likelihood": "classify"}, "likelihood='classify'"),
        ({"sigma_noise": 0.0}, "sigma_noise=0.0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LastLayerPosterior(**options)


def test_full_refuses_what_does_not_fit_and_says_the_size() -> None:
    weight = torch.zeros(1000, 1280)
    with pytest.raises(OptionError, match=r"1281000 parameters.*73356.7 GiB.*'kron'"):
        LastLayerPosterior("full").fit(torch.zeros(2, 1280), weight, torch.zeros(1000))


def test_the_words_of_laplace_torch_are_understood() -> None:
    phi, weight, bias, labels = problem()
    ours = LastLayerPosterior("diag").fit(phi, weight, bias, labels)
    theirs = LastLayerPosterior(hessian_structure="diag").fit(phi, weight, bias, labels)
    torch.testing.assert_close(ours.predict(phi, "bridge"), theirs.predict(phi, link_approx="bridge"))
    assert set(ours.uncertainties(phi)) == set(KINDS)


def test_a_prior_of_another_shape_is_refused() -> None:
    phi, weight, bias, labels = problem()
    with pytest.raises(OptionError, match=re.escape("shape (4, 6) here")):
        LastLayerPosterior("diag", torch.ones(4, 5)).fit(phi, weight, bias, labels)
    with pytest.raises(OptionError, match="needs structure 'diag' or 'full'"):
        LastLayerPosterior("kron", torch.ones(4, 6)).fit(phi, weight, bias, labels)
    with pytest.raises(OptionError, match="rows='test'"):
        LastLayerPosterior().fit(phi, weight, bias, labels, rows="test")


def test_images_without_variance_have_the_classifiers_own_probabilities() -> None:
    phi, weight, _, _ = problem()
    nothing = torch.zeros(2, 5, dtype=torch.float64)
    for structure in STRUCTURES:
        posterior = LastLayerPosterior(structure).fit(phi, weight)
        for link in LINKS:
            torch.testing.assert_close(posterior.predict(nothing, link), torch.full((2, 4), 0.25).double(), msg=link)
        assert float(posterior.uncertainties(nothing)["mutual_information"].max()) < 1e-9


def test_arrays_are_taken_where_tensors_are_and_no_rows_are_refused() -> None:
    phi, weight, bias, _ = problem()
    posterior = LastLayerPosterior().fit(phi.numpy(), weight.numpy(), bias.numpy())
    torch.testing.assert_close(posterior.predict(phi.numpy()), posterior.predict(phi))
    with pytest.raises(DataError, match="holds no rows"):
        posterior.fit(phi, weight, bias, subset=np.arange(0))


def test_the_full_covariance_stands_single_precision() -> None:
    """The direction that moves all logits alike has only the prior: its variance, 1 / prior, must not swamp the others."""
    phi, weight, bias, _ = problem()
    posterior = LastLayerPosterior("full", 1e-6).fit(phi, weight, bias)
    exact = posterior.uncertainties(phi[:9])
    found = posterior.float().uncertainties(phi[:9].float())
    torch.testing.assert_close(found["mutual_information"].double(), exact["mutual_information"], rtol=5e-3, atol=1e-4)
