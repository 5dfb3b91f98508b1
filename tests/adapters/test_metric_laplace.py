"""The metric posterior: golden numbers, its predictive against sampling, its scales, and the edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from posthoc.adapters.errors import DataError, NotFittedError, OptionError
from posthoc.adapters.metric_laplace import MetricPosterior
from posthoc.adapters.metric_predictive import delta_moments, direction_moments, summarise
from posthoc.adapters.metric_prior import choose_prior, vote_risk


def flat_posterior(mean: np.ndarray, hessian: np.ndarray, outputs: int, **options: object) -> MetricPosterior:
    """With the given flat parameters (weight row by row, then bias) and curvature."""
    inputs = len(mean) // outputs - 1
    posterior = MetricPosterior(inputs, outputs, **options).double()  # type: ignore[arg-type]
    size = inputs * outputs
    theta, h = torch.from_numpy(mean), torch.from_numpy(hessian)
    posterior.take(theta[:size].view(outputs, inputs), theta[size:])
    posterior.curvature_weight.copy_(h[:size].view(outputs, inputs))
    posterior.curvature_bias.copy_(h[size:])
    return posterior


def test_scale_samples_and_evidence_match_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/laplace_a.npz")
    posterior = flat_posterior(golden["mu"], golden["hessian"], 4)
    assert (golden["hessian"] < 0).any()
    for prior in (0.1, 1.0, 10.0):
        found = torch.cat([part.flatten() for part in posterior.scale(prior, eps=1e-6)])
        np.testing.assert_allclose(found.numpy(), golden[f"scale_prior{prior}"], rtol=1e-9)
    weight, bias = posterior.sample_weights(torch.from_numpy(golden["eps"]))
    samples = torch.cat([weight.flatten(1), bias], 1).numpy()  # golden's scale has eps 1e-6
    np.testing.assert_allclose(samples, golden["samples"], rtol=1e-5, atol=1e-5)
    for prior in (0.5, 1.0, 4.0):
        found = posterior.log_marginal_likelihood(prior)
        assert found.item() == pytest.approx(float(golden[f"logmarglik_prior{prior}"][0]), rel=1e-9)
    for steps in (1, 10, 100):
        found = posterior.optimize_prior_precision(steps=steps)
        assert found == pytest.approx(float(golden[f"prior_opt_{steps}steps"][0]), rel=1e-6)
    best = posterior.optimize_prior_precision()
    values = [posterior.log_marginal_likelihood(best * f).item() for f in (0.98, 1.0, 1.02)]
    assert values[1] == max(values)
    assert float(posterior.prior_precision) == pytest.approx(best)


def test_the_online_recursion_matches_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/laplace_a.npz")
    rows, limit = int(golden["online_dataset_size"]), int(golden["online_max_pairs"])
    trace = golden["online_trace"]
    posterior = flat_posterior(golden["mu"], trace[0], 4, pair_count="all", max_triplets=limit)
    for k, (h, triplets) in enumerate(zip(golden["online_raw_h"], golden["online_ntriplets"], strict=True)):
        scaled = torch.from_numpy(h) * posterior.count_factor(min(int(triplets), limit), rows)
        posterior.remember(scaled[:16].view(4, 4), scaled[16:], float(golden["online_memory"]))
        state = torch.cat([posterior.curvature_weight.flatten(), posterior.curvature_bias])
        np.testing.assert_allclose(state.numpy(), trace[k + 1], rtol=1e-9)


def test_the_predictive_matches_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/predictive_a.npz")
    mean = np.concatenate([golden["W"].ravel(), golden["b"]])
    posterior = flat_posterior(mean, golden["hessian"], 3)
    found = torch.cat([part.flatten() for part in posterior.scale(eps=1e-6)])
    np.testing.assert_allclose(found.numpy(), golden["post_scale"], rtol=1e-9)
    noise = torch.from_numpy(golden["eps"])
    # the golden draws with eps 1e-6 in the scale: noise that undoes the difference
    exact = torch.cat([part.flatten() for part in posterior.scale()])
    noise = noise * (torch.from_numpy(golden["post_scale"]) / exact)
    for name, suffix in (("x", ""), ("x_ood", "_ood")):
        samples = posterior.embeddings(torch.from_numpy(golden[name]), noise)
        answer = summarise(samples, debiased=False)
        np.testing.assert_allclose(answer.expected.numpy(), golden[f"z_mu_raw{suffix}"], rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(answer.spread.numpy(), golden[f"z_sigma{suffix}"], rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(answer.kappa.numpy(), golden[f"vmf_kappa{suffix}"], rtol=1e-7)
        if not suffix:
            np.testing.assert_allclose(samples.transpose(0, 1).numpy(), golden["z_samples"], atol=1e-6)
            np.testing.assert_allclose(answer.mean_direction.numpy(), golden["z_mu"], rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(answer.resultant.numpy(), golden["resultant_length"], rtol=1e-8)


@pytest.mark.parametrize("ratio", [1e-6, 9e-4, 1.1e-3, 0.05, 0.5, 5.0, 100.0])
@pytest.mark.parametrize("dim", [2, 3, 32])
def test_the_closed_form_agrees_with_sampling(generator: torch.Generator, dim: int, ratio: float) -> None:
    mean = torch.randn(1, dim, generator=generator, dtype=torch.float64)
    variance = torch.rand(1, dim, generator=generator, dtype=torch.float64).square() + 0.01
    variance *= ratio * mean.square().sum() / variance.sum()
    answer = direction_moments(mean, variance)
    count = 40_000
    z = mean + variance.sqrt() * torch.randn(count, dim, generator=generator, dtype=torch.float64)
    drawn = summarise(functional.normalize(z, dim=-1)[:, None])
    error = drawn.spread / count**0.5
    assert ((answer.expected - drawn.expected).abs() < 4.5 * error + 1e-3 * ratio * answer.spread).all()
    # a standard deviation from n draws errs by sqrt((kurtosis - 1) / n) / 2
    fourth = (drawn.samples[:, 0] - drawn.expected[0]).pow(4).mean(0) / drawn.spread[0].pow(4)
    error = 0.5 * ((fourth - 1) / count).sqrt()
    narrow = 2.0 * ratio if ratio < 1e-3 else 0.003
    assert ((answer.spread / drawn.spread - 1)[0].abs() < 4.5 * error + narrow).all()
    assert answer.uncertainty.item() == pytest.approx(drawn.uncertainty.item(), rel=0.03)


def test_the_delta_method_agrees_where_the_spread_is_small(generator: torch.Generator) -> None:
    mean = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    variance = torch.rand(50, 16, generator=generator, dtype=torch.float64)
    for ratio, close in ((2e-3, 0.005), (0.05, 0.1)):
        v = variance * (ratio * mean.square().sum(-1) / variance.sum(-1))[:, None]
        answer, (expected, of_delta) = direction_moments(mean, v), delta_moments(mean, v)
        torch.testing.assert_close(answer.spread.square(), of_delta, rtol=close, atol=0)
        assert (answer.expected - expected).abs().max() < ratio**2


def test_closed_form_answers_are_an_images_own_and_differentiable(generator: torch.Generator) -> None:
    posterior = MetricPosterior(6, 4)
    posterior.take(torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator))
    x = torch.randn(9, 6, generator=generator, requires_grad=True)
    whole = posterior.predict(x)
    assert torch.equal(whole.uncertainty[:3], posterior.predict(x[:3]).uncertainty)
    assert whole.samples is None
    (grad,) = torch.autograd.grad(whole.uncertainty.sum(), x)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
    drawn = posterior.predict(x, samples=400, generator=generator)
    assert drawn.samples is not None
    assert drawn.samples.shape == (400, 9, 4)
    assert (whole.uncertainty - drawn.uncertainty).abs().max() < 0.12
    same = posterior.predict(torch.ones(9, 6))
    torch.testing.assert_close(same.uncertainty, same.uncertainty[:1].expand(9), rtol=1e-6, atol=0)


def test_debiasing_takes_the_samples_own_share_away(generator: torch.Generator) -> None:
    """A true kappa of 102 in 2048 dimensions reads more than twice as much from 100 draws."""
    resultant = torch.tensor(0.05)
    mean = torch.zeros(1, 2048)
    mean[0, 0] = 1.0
    found = []
    for _ in range(4):
        z = resultant * mean + (1 - resultant**2).sqrt() * functional.normalize(
            torch.randn(100, 1, 2048, generator=generator), dim=-1
        )
        unit = functional.normalize(z, dim=-1)
        found.append([summarise(unit, debiased).kappa.item() for debiased in (True, False)])
    debiased, raw = np.mean(found, axis=0)
    assert debiased == pytest.approx(102, rel=0.15)
    assert raw > 200
    spread_out = torch.stack([mean, -mean])  # R = 0: never below it
    assert summarise(spread_out).resultant.item() == 0.0


def clusters(n: int = 120, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    label = torch.arange(n) % 4
    x = 3.0 * torch.eye(6)[label] + torch.randn(n, 6, generator=generator)
    return x, label


def fitted(x: Tensor, label: Tensor, batch_size: int = 40, **options: object) -> MetricPosterior:
    posterior = MetricPosterior(6, 4, **options)  # type: ignore[arg-type]
    posterior.take(torch.eye(4, 6), torch.full((4,), 0.1))
    return posterior.fit(x, label, batch_size=batch_size, generator=torch.Generator().manual_seed(1))


def test_pair_counts_scale_as_they_say(generator: torch.Generator) -> None:
    x, label = clusters(generator=generator)
    options = {"miner": "none"}
    twice = torch.cat([x, x]), torch.cat([label, label])
    ratio = {}
    for count in ("observed", "images", "all"):
        once = fitted(x, label, 120, pair_count=count, **options).curvature_weight
        double = fitted(*twice, 240, pair_count=count, **options).curvature_weight
        ratio[count] = float((double / once).median())
    # of each image, twice as many positives and negatives: 2^3 triplets, 2 x the images, 2^2 x the square of their number
    assert ratio["observed"] == pytest.approx(8, rel=0.1)
    assert ratio["images"] == pytest.approx(2, rel=0.1)
    assert ratio["all"] == pytest.approx(4, rel=0.1)
    small, large = (fitted(x, label, size, pair_count="images", **options).curvature_weight for size in (30, 120))
    assert float((small / large).median()) == pytest.approx(1, rel=0.15)


def test_a_pass_sums_what_each_batch_has(generator: torch.Generator) -> None:
    x, label = clusters(40, generator)
    posterior = fitted(x, label, batch_size=40, pair_count="observed", approximation="full", loss="arccos")
    part = posterior.batch_curvature(x, label)
    torch.testing.assert_close(posterior.curvature_weight, part[0].float(), rtol=1e-4, atol=1e-3)
    position = torch.stack([100.0 * label, torch.zeros(40)], 1)
    of_places = MetricPosterior(6, 4, pair_count="observed", approximation="full", loss="arccos")
    of_places.take(posterior.weight, posterior.bias)
    of_places.fit(x, position=position, batch_size=40)
    torch.testing.assert_close(of_places.curvature_weight, posterior.curvature_weight, rtol=1e-4, atol=1e-3)
    few = fitted(x, label, pair_count="observed", max_triplets=50)
    assert 0 < few.curvature_weight.sum() < fitted(x, label, pair_count="observed").curvature_weight.sum()


@pytest.mark.parametrize("approximation", ["positives", "fixed", "full"])
def test_batches_without_triplets_add_nothing(approximation: str) -> None:
    x, label = torch.randn(8, 6), torch.zeros(8, dtype=torch.int64)
    for labels in (label, torch.arange(8)):
        for count in ("observed", "images", "all"):
            posterior = fitted(x, labels, pair_count=count, approximation=approximation)
            assert (posterior.curvature_weight == 0).all()
    pair = fitted(x[:2], torch.tensor([0, 0]), approximation=approximation)
    assert (pair.curvature_weight == 0).all()
    assert pair.predict(x).uncertainty.isfinite().all()


def test_duplicates_and_a_layer_without_bias(generator: torch.Generator) -> None:
    x, label = clusters(40, generator)
    posterior = MetricPosterior(6, 4)
    posterior.take(torch.randn(4, 6, generator=generator), None)
    posterior.fit(torch.cat([x, x]), torch.cat([label, label]))
    assert posterior.curvature_weight.isfinite().all()
    assert (posterior.scale()[1] == 0).all()
    assert posterior.optimize_prior_precision() > 0
    weights, biases = posterior.sample_weights(posterior.noise(3))
    assert (biases == 0).all()
    assert (weights != posterior.weight).any()


def test_the_prior_is_chosen_by_retrieval(generator: torch.Generator) -> None:
    x, label = clusters(400, generator)
    posterior = fitted(x[:200], label[:200], approximation="full", pair_count="observed")
    report = choose_prior(posterior, x[200:], label[200:], x[:200], label[:200], torch.Generator().manual_seed(3))
    risks = {float(tau): risk for tau, risk in report["retrieval_risk"].items()}
    assert len(risks) == 8
    assert report["prior_precision"] == pytest.approx(min(risks, key=risks.__getitem__))
    assert float(posterior.prior_precision) == pytest.approx(report["prior_precision"])
    taus = sorted(risks)
    assert risks[report["prior_precision"]] < min(risks[taus[0]], risks[taus[-1]])  # neither chaos nor certainty
    with pytest.raises(DataError, match="no held-out label"):
        choose_prior(posterior, x[:5], label[:5] + 9, x[5:], label[5:])


def test_the_vote_risk_is_the_brier_score(generator: torch.Generator) -> None:
    x, label = clusters(60, generator)
    posterior = fitted(x[:30], label[:30])
    noise = posterior.noise(7, generator)
    u = posterior.embeddings(x, noise)
    total = 0.0
    for q in range(30, 60):
        shares = torch.zeros(4)
        for s in range(7):
            shares[label[int((u[s, :30] @ u[s, q]).argmax())]] += 1 / 7
        total += float((shares - functional.one_hot(label[q], 4)).square().sum()) / 30
    votes = label[:30][(u[:, 30:] @ u[:, :30].mT).argmax(-1)]
    assert vote_risk(votes, label[30:]) == pytest.approx(total, rel=1e-5)


def test_wrong_arguments_are_named(generator: torch.Generator) -> None:
    for approximation, loss in (("fixed", "euclidean"), ("full", "euclidean"), ("positives", "arccos")):
        with pytest.raises(OptionError, match="choose_prior"):
            MetricPosterior(3, 2, approximation=approximation, loss=loss).optimize_prior_precision()
    with pytest.raises(OptionError, match=r"pair_count='pairs'.*observed, images, all"):
        MetricPosterior(3, 2, pair_count="pairs")
    with pytest.raises(OptionError, match="prior_precision=0"):
        MetricPosterior(3, 2, prior_precision=0.0)
    with pytest.raises(OptionError, match="outputs=1"):
        MetricPosterior(3, 1)
    posterior = MetricPosterior(3, 2)
    with pytest.raises(OptionError, match=r"\(2, 3\); given \(3, 3\)"):
        posterior.take(torch.zeros(3, 3), None)
    x = torch.randn(5, 3, generator=generator)
    with pytest.raises(NotFittedError, match="call take"):
        posterior.fit(x, torch.tensor([0, 1, 0, 1, 0]))
    posterior.take(torch.eye(2, 3), None)
    with pytest.raises(DataError, match="no rows"):
        posterior.fit(x, torch.tensor([0, 1, 0, 1, 0]), subset=[])
    with pytest.raises(DataError, match="either labels"):
        posterior.fit(x)
    with pytest.raises(DataError, match="given \\(5, 3\\) and 4"):
        posterior.fit(x, torch.zeros(4, dtype=torch.int64))
    x[3, 1] = float("nan")
    with pytest.raises(DataError, match=r"rows \[3\]"):
        posterior.fit(x, torch.tensor([0, 1, 0, 1, 0]))
    with pytest.raises(OptionError, match=r"S >= 2; given \(1, 5, 2\)"):
        summarise(torch.zeros(1, 5, 2))
