"""Last-layer posteriors: priors of all kinds, merging, regression, and a fit shared by two processes."""

import os
import re
import socket
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.heldout_search import held_out_losses
from posthoc.adapters.laplace import LastLayerPosterior

from .posterior_problem import STRUCTURES, dense, jacobians, problem


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_a_precision_for_each_parameter_is_where_the_marginal_likelihood_is_stationary(structure: str) -> None:
    phi, weight, bias, labels = problem()
    posterior = LastLayerPosterior(structure, temperature=0.8).fit(phi, weight, bias, labels)
    scalar = posterior.log_marginal_likelihood(posterior.optimize_prior_precision())
    found = posterior.optimize_prior_precision(prior_structure="diagonal")
    assert found.shape == (4, 6)
    log_prior = found.log().requires_grad_()
    (slope,) = torch.autograd.grad(posterior.log_marginal_likelihood(log_prior.exp()), log_prior)
    inside = (found > 1e-9) & (found < 1e9)
    assert inside.float().mean() > 0.5
    assert float(slope[inside].abs().max()) < 1e-4
    assert posterior.log_marginal_likelihood() > scalar
    expected = torch.linalg.inv(_dense_precision(structure, phi, weight, bias, found, 0.8))
    jac = jacobians(phi[:5], 4)
    variance = (jac @ expected @ jac.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(posterior.functional_variance(phi[:5]), variance, rtol=1e-6, atol=0)


def _dense_precision(
    structure: str, phi: Tensor, weight: Tensor, bias: Tensor, prior: Tensor, temperature: float
) -> Tensor:
    one = (1.0, 1.0)
    curvature = torch.linalg.inv(dense(structure, phi, weight, bias, one)) - torch.eye(24, dtype=torch.float64)
    return curvature / temperature + torch.cat([prior[:, :5].flatten(), prior[:, 5]]).diag()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_merging_halves_is_fitting_the_whole(structure: str, bias: bool) -> None:
    phi, weight, offset, labels = problem(rows=90)
    layer = (weight, offset if bias else None)
    whole = LastLayerPosterior(structure, 0.7).fit(phi, *layer, labels)
    half = LastLayerPosterior(structure, 0.7).fit(phi[:30], *layer, labels[:30])
    other = LastLayerPosterior(structure, 3.0).fit(phi[30:], *layer, labels[30:])
    both = half.merge(other)
    assert both.n_data == 90
    assert half.n_data == 30
    torch.testing.assert_close(both.functional_variance(phi), whole.functional_variance(phi), rtol=1e-10, atol=0)
    assert float(both.log_marginal_likelihood()) == pytest.approx(float(whole.log_marginal_likelihood()), rel=1e-12)
    another = LastLayerPosterior(structure).fit(phi, 2.0 * weight, layer[1], labels)
    with pytest.raises(OptionError, match="other parameters"):
        half.merge(another)
    with pytest.raises(OptionError, match="same"):
        half.merge(LastLayerPosterior(structure).fit(phi, *layer, labels, rows="heldout"))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_held_out_search_is_the_best_of_its_grid(structure: str) -> None:
    phi, weight, bias, labels = problem(rows=200)
    posterior = LastLayerPosterior(structure).fit(phi[:100], 4.0 * weight, bias, labels[:100], rows="heldout")
    grid, temperatures = torch.logspace(-5, 3, 14, dtype=torch.float64), torch.tensor([0.3, 1.0, 9.0])
    held_out = {"penultimate": phi[100:].numpy(), "labels": labels[100:].numpy()}
    # the diagonal's variance never gets large enough for these logits: its best prior is the weakest
    weakest = pytest.warns(UserWarning, match="end of the grid") if structure == "diag" else nullcontext()
    with weakest:
        found = posterior.optimize_prior_precision("gridsearch", **held_out, grid=grid, temperatures=temperatures)

    def loss(tau: float, temperature: float) -> float:
        one = LastLayerPosterior(structure, tau, temperature).fit(phi[:100], 4.0 * weight, bias)
        return float(torch.nn.functional.nll_loss(one.predict(phi[100:]).log(), labels[100:]))

    every = {(float(t), float(c)): loss(float(t), float(c)) for t in grid for c in temperatures}
    assert every[(float(found[0]), posterior.temperature)] == pytest.approx(min(every.values()), abs=1e-6)
    dense = torch.cartesian_prod(torch.logspace(-4, 4, 100, dtype=torch.float64), temperatures.double())
    combined = held_out_losses(posterior, **held_out, pairs=dense)  # of 33 variances or so, not of 300
    for row in (0, 7, 150, 151, 299):
        assert float(combined[row]) == pytest.approx(loss(*dense[row].tolist()), abs=2e-5)
    wide = torch.cartesian_prod(grid, torch.logspace(-2, 4, 7, dtype=torch.float64))
    combined = held_out_losses(posterior, **held_out, pairs=wide)
    for row in (0, 6, 40, 97):
        assert float(combined[row]) == pytest.approx(loss(*wide[row].tolist()), abs=1e-4)
    assert min(every.values()) < loss(1e6, 1.0) - 0.05  # it is worth searching for
    with pytest.raises(OptionError, match="rows='heldout'"):
        posterior.optimize_prior_precision()
    with pytest.raises(DataError, match="those the posterior was fitted on"):
        posterior.optimize_prior_precision("heldout", penultimate=phi[:100], labels=labels[:100])
    with pytest.raises(OptionError, match="rows of its own"):
        posterior.optimize_prior_precision("heldout")
    with pytest.raises(OptionError, match="positive"):
        posterior.optimize_prior_precision("heldout", **held_out, grid=torch.tensor([-1.0, 1.0]))
    with pytest.warns(UserWarning, match="end of the grid"):
        posterior.optimize_prior_precision("heldout", **held_out, grid=torch.tensor([1e4, 1e5, 1e6]))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_regression_is_bayesian_linear_regression(structure: str, temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    phi = torch.randn(80, 3, generator=g, dtype=torch.float64)
    truth = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 3.0]], dtype=torch.float64)
    y = phi @ truth.T + 0.3 * torch.randn(80, 2, generator=g, dtype=torch.float64)
    tau, sigma = 0.7, 0.4
    wide = torch.cat([phi, torch.ones(80, 1, dtype=torch.float64)], 1)
    map_ = torch.linalg.solve(wide.T @ wide / sigma**2 + tau * torch.eye(4).double(), wide.T @ y / sigma**2).T
    posterior = LastLayerPosterior(structure, tau, likelihood="regression", sigma_noise=sigma)
    posterior.fit(phi, map_[:, :3], map_[:, 3], y)
    torch.testing.assert_close(posterior.predict(phi), wide @ map_.T)
    if structure == "full":  # exact: the variance of the predictive, and the evidence of a Gaussian process
        covariance = torch.linalg.inv(wide.T @ wide / sigma**2 + tau * torch.eye(4).double())
        exact = ((wide @ covariance) * wide).sum(1, keepdim=True).expand(80, 2)
        torch.testing.assert_close(posterior.functional_variance(phi), exact)
        kernel = wide @ wide.T / tau + sigma**2 * torch.eye(80).double()
        evidence = sum(
            torch.distributions.MultivariateNormal(torch.zeros(80).double(), kernel).log_prob(y[:, k]) for k in range(2)
        )
        assert float(posterior.log_marginal_likelihood()) == pytest.approx(float(evidence), rel=1e-10)
    posterior.temperature = temperature
    noise = posterior.optimize_sigma_noise()
    best = posterior.log_marginal_likelihood()
    for factor in (0.95, 1.05):
        posterior.sigma_noise = noise * factor
        assert posterior.log_marginal_likelihood() < best
    assert noise * temperature**0.5 == pytest.approx(0.3, rel=0.2)
    with pytest.raises(OptionError, match="functional_variance"):
        posterior.uncertainties(phi)
    with pytest.raises(DataError, match=re.escape("expected (80, 2)")):
        LastLayerPosterior(structure, likelihood="regression").fit(phi, map_[:, :3], map_[:, 3], y[:, 0])


def test_halves_of_features_of_length_one_are_not_taken_for_the_same_rows() -> None:
    phi, weight, bias, labels = problem(rows=80)
    phi = torch.nn.functional.normalize(phi, dim=1)
    posterior = LastLayerPosterior().fit(phi[:40], weight, bias, rows="heldout")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the grid's end
        posterior.optimize_prior_precision("heldout", penultimate=phi[40:], labels=labels[40:])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="those the posterior was fitted on"):
        posterior.optimize_prior_precision("heldout", penultimate=phi[:40][order], labels=labels[:40][order])


PROGRAM = """
import sys, numpy as np, torch
from accelerate import PartialState
from posthoc.adapters.laplace import LastLayerPosterior

state = PartialState(cpu=True)
arrays = np.load(sys.argv[1])
rank, world = state.process_index, state.num_processes
for structure in ("kron", "diag", "full"):
    posterior = LastLayerPosterior(structure, 0.7).fit(
        *(arrays["phi"][rank::world], arrays["weight"], arrays["bias"], arrays["labels"][rank::world]),
        across_processes=True,
    )
    found = posterior.functional_variance(torch.from_numpy(arrays["phi"])).numpy()
    evidence = float(posterior.log_marginal_likelihood())
    np.savez(f"{structure}-{rank}.npz", world=world, variance=found, n=posterior.n_data, evidence=evidence)
"""


def test_two_processes_with_half_the_rows_each_know_what_one_with_all_knows(tmp_path: Path) -> None:
    phi, weight, bias, labels = problem(rows=51)
    np.savez(tmp_path / "data.npz", phi=phi, weight=weight, bias=bias, labels=labels)
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)]
    command = [sys.executable, "-m", *launch, "program.py", "data.npz"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for structure in STRUCTURES:
        whole = LastLayerPosterior(structure, 0.7).fit(phi, weight, bias, labels)
        for rank in range(2):
            found = np.load(tmp_path / f"{structure}-{rank}.npz")
            assert int(found["world"]) == 2
            assert int(found["n"]) == 51
            np.testing.assert_allclose(found["variance"], whole.functional_variance(phi), rtol=1e-9)
            assert float(found["evidence"]) == pytest.approx(float(whole.log_marginal_likelihood()), rel=1e-12)
