"""The data of the anisotropic recipe: the conditional's two samplers, precisions, the mixing, batches of any launch."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest
from torch import Tensor

from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import AnInfoNCE
from posthoc.adapters.vmf import mean_resultant_length
from posthoc.eval.identifiability import linear_r2, mean_correlation
from posthoc.recipes import anisotropic_process
from posthoc.recipes.anisotropic_process import (
    Conditional,
    Pairs,
    RadialIntegral,
    mixing,
    precisions,
    uniform_directions,
)
from posthoc.recipes.encoders import mlp

CASES = ["n2", "n3", "n10"]
ROWS = 100_000


def _golden(shared: Path, case: str) -> dict[str, np.ndarray]:
    return dict(np.load(shared / f"golden/aninfonce/conditional_{case}.npz"))


def _draws(conditional: Conditional, direction: np.ndarray, generator: torch.Generator) -> np.ndarray:
    anchor = torch.from_numpy(direction).expand(ROWS, -1)
    return conditional.sample(anchor, generator).numpy()


def _form(y: np.ndarray, direction: np.ndarray, precision: np.ndarray) -> np.ndarray:
    return ((y - direction) ** 2 * precision).sum(-1)


@pytest.mark.parametrize("case", CASES)
def test_the_shell_sampler_has_the_reference_moments(shared: Path, case: str, generator: torch.Generator) -> None:
    golden = _golden(shared, case)
    z, precision = golden["mean_dir"], golden["lam"]
    conditional = Conditional(torch.from_numpy(precision), "shell", float(golden["threshold"]))
    y = _draws(conditional, z, generator)
    own = y.std(0) / math.sqrt(ROWS)
    assert (np.abs(y.mean(0) - golden["ref_mean"]) < 5 * np.hypot(own, golden["ref_mean_se"])).all()
    values, count = _form(y, z, precision), float(golden["n_samples"])
    error = values.std() * math.sqrt(1 / ROWS + 1 / count)
    assert abs(values.mean() - golden["ref_E_quad"]) < 5 * error
    assert conditional.acceptance == pytest.approx(float(golden["acceptance_rate"]), rel=0.03)
    assert np.abs(np.linalg.norm(y, axis=1) - 1).max() < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_the_shell_sampler_draws_as_the_reference_does(
    shared: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = _golden(shared, case)
    conditional = Conditional(torch.from_numpy(golden["lam"]), "shell", float(golden["threshold"]))
    numpy = np.random.RandomState(int(golden["small_seed"]))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.from_numpy(numpy.standard_normal(shape)))
    y = conditional.sample(torch.from_numpy(golden["small_means"]))
    np.testing.assert_allclose(y.numpy(), golden["small_samples"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_exact_sampler_has_the_moments_of_the_density(shared: Path, case: str, generator: torch.Generator) -> None:
    golden = _golden(shared, case)
    z, precision = golden["mean_dir"], golden["lam"]
    conditional = Conditional(torch.from_numpy(precision))
    y = _draws(conditional, z, generator)
    values, effective = _form(y, z, precision), float(golden["is_ess_ideal"])
    spread = math.sqrt(1 / ROWS + 1 / effective)
    assert (np.abs(y.mean(0) - golden["is_mean_ideal"]) < 5 * spread * y.std(0)).all()
    assert abs(values.mean() - golden["is_E_quad_ideal"]) < 5 * spread * values.std()
    assert conditional.acceptance > 0.45
    points = torch.from_numpy(golden["points"])
    found = conditional.log_density(points, torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(found, golden["log_density_ideal_unnorm"], rtol=0, atol=1e-9)


def test_the_exact_sampler_is_told_from_the_shell_where_that_is_wide(generator: torch.Generator) -> None:
    """On the circle, where the density is one integral: no test of 100,000 draws refuses the one, any the other."""
    z, precision = np.array([0.6, 0.8]), np.array([30.0, 2.0])

    def density(angle: float) -> float:
        return math.exp(-float(_form(np.array([math.cos(angle), math.sin(angle)]), z, precision)) / 2)

    grid = np.linspace(-math.pi, math.pi, 4001)
    steps = [density(x) for x in grid]
    cumulative = np.concatenate([[0.0], np.cumsum([(a + b) / 2 for a, b in pairwise(steps)])])
    chance = {}
    for sampler in ("exact", "shell"):
        y = _draws(Conditional(torch.from_numpy(precision), sampler, 0.2), z, generator)
        place = np.interp(np.arctan2(y[:, 1], y[:, 0]), grid, cumulative / cumulative[-1])
        chance[sampler] = kstest(place, "uniform").pvalue
    assert chance["exact"] > 1e-3
    assert chance["shell"] < 1e-9


@pytest.mark.parametrize(("dim", "kappa"), [(2, 0.5), (4, 25.0), (10, 5.0), (50, 5.0)])
def test_one_precision_for_all_is_von_mises_fisher(dim: int, kappa: float, generator: torch.Generator) -> None:
    conditional = Conditional(torch.full((dim,), kappa))
    z = uniform_directions(40_000, dim, generator)
    cosine = (conditional.sample(z, generator) * z).sum(-1)
    expected = mean_resultant_length(torch.tensor(kappa, dtype=torch.float64), dim)
    assert abs(cosine.mean() - expected) < 5 * cosine.std() / math.sqrt(len(z))


@pytest.mark.parametrize(("dim", "largest"), [(2, 30.0), (4, 27.0), (10, 31.0), (10, 2000.0), (50, 39.3), (50, 60.0)])
def test_the_radial_integral_is_right_and_its_bound_holds(dim: int, largest: float) -> None:
    integral, rng = RadialIntegral(dim, largest), np.random.default_rng(0)
    for _ in range(20):
        a = rng.uniform(0.1, 1) * largest
        b = rng.uniform(-1, 1) * math.sqrt(a * largest)
        mode = (b + math.sqrt(b * b + 4 * a * (dim - 1))) / (2 * a)
        top = _exponent(mode, dim, a, b)
        reach = 12 / math.sqrt(a)
        value = quad(
            lambda r, a=a, b=b, top=top: math.exp(_exponent(r, dim, a, b) - top),
            max(mode - reach, 1e-12), mode + reach, epsabs=0, epsrel=1e-11, limit=400,
        )[0]  # fmt: skip
        assert float(integral(np.array(a), np.array(b))) == pytest.approx(math.log(value) + top, abs=1e-9)
    a, b = np.meshgrid(np.linspace(largest / 50, largest, 200), np.linspace(-1, 1, 401))
    values = integral(a, b * np.sqrt(a * largest))
    assert values.min() >= integral.least
    on_edge = integral(np.full(20_001, largest), np.linspace(-largest, largest, 20_001))
    assert on_edge.min() == pytest.approx(integral.least, abs=1e-5)  # no smaller than it has to be


def _exponent(r: float, dim: int, a: float, b: float) -> float:
    return (dim - 1) * math.log(r) - a * (r * r - 1) / 2 + b * (r - 1)


@pytest.mark.parametrize("sampler", ["exact", "shell"])
@pytest.mark.parametrize("layout", ["bimodal", "linear"])
def test_the_loss_finds_the_precision_of_both_samplers(sampler: str, layout: str) -> None:
    """With the latents themselves for embeddings; the shell's error is below what so few draws show."""
    true = precisions(layout, 4, 5.0, 25.0)[0]
    learned = _learned(Conditional(true, sampler), AnInfoNCE(4, 10.0))
    np.testing.assert_allclose(learned, true, rtol=0.05)


def test_hard_negatives_find_the_precision_over_one_plus_beta() -> None:
    true = precisions("bimodal", 4, 5.0, 25.0)[0]
    learned = _learned(Conditional(true), AnInfoNCE(4, 10.0, hard_negatives=1.0))
    np.testing.assert_allclose(learned, true / 2, rtol=0.06)


def _learned(conditional: Conditional, loss: AnInfoNCE, steps: int = 150, rows: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        z = uniform_directions(rows, len(conditional.precision), generator)
        value = loss(z.float(), conditional.sample(z, generator).float())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return loss.precision.detach()


def test_layouts() -> None:
    assert precisions("bimodal", 5, 1.0, 2.0).tolist() == [[2.0, 2.0, 2.0, 1.0, 1.0]]
    assert precisions("linear", 4, 5.0, 11.0).tolist() == [[5.0, 7.0, 9.0, 11.0]]
    for dim in (2, 3, 4, 7, 10, 16):
        families = math.ceil(math.log2(dim))
        both = precisions("bimodal", dim, 5.0, 25.0, families)
        assert both.shape == (families, dim)
        assert len({tuple(column) for column in both.T.tolist()}) == dim  # together they tell all dimensions apart


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("bimodal", 1, 5.0, 25.0), "1 dimensions"),
        (("bimodal", 4, 25.0, 5.0), "range above 0"),
        (("linear", 4, 0.0, 5.0), "range above 0"),
        (("linear", 4, 5.0, 25.0, 2), "from 1 to 1"),
        (("bimodal", 4, 5.0, 25.0, 3), "from 1 to 2"),
    ],
)
def test_layouts_that_cannot_be(options: tuple, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        precisions(*options)


def test_a_shell_needs_a_width() -> None:
    with pytest.raises(OptionError, match=r"threshold=0\.0"):
        Conditional(torch.ones(3), "shell", 0.0)


def test_the_mixing_and_its_metrics_are_the_references(shared: Path) -> None:
    golden = np.load(shared / "golden/aninfonce/mixing_metrics_a.npz")
    network = mlp([4] * 4, slope=float(golden["negative_slope"]), bias=False).double()
    for k in range(3):
        network[2 * k].weight.data = torch.from_numpy(golden[f"W{k}"])
    with torch.no_grad():
        x = network(torch.from_numpy(golden["z"])).numpy()
    np.testing.assert_allclose(x, golden["x"], rtol=0, atol=1e-9)
    assert linear_r2(x, golden["z"]) == pytest.approx(float(golden["r2_mix"]), abs=1e-9)
    assert mean_correlation(x, golden["z"])[0] == pytest.approx(float(golden["mcc_mix"]), abs=1e-9)


def test_the_mixing_is_well_conditioned_frozen_and_of_its_seed() -> None:
    network = mixing(5, 3, torch.Generator().manual_seed(1), pool=400)
    again = mixing(5, 3, torch.Generator().manual_seed(1), pool=400)
    weights = [layer.weight for layer in network[::2]]
    assert [layer.negative_slope for layer in network[1::2]] == [0.2, 0.2]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert not any(p.requires_grad for p in network.parameters())
    typical = torch.rand(400, 5, 5, generator=torch.Generator().manual_seed(7)).double() * 2 - 1
    typical = torch.linalg.cond(typical / typical.norm(dim=1, keepdim=True))
    for weight in weights:
        torch.testing.assert_close(weight.norm(dim=0), torch.ones(5))
        assert torch.linalg.cond(weight) < typical.quantile(0.02)
    with pytest.raises(OptionError, match="0 layers"):
        mixing(5, 0, torch.Generator())


def _pairs(launch: Launch = Launch(0, 1), batch_size: int = 32, families: int = 2) -> Pairs:  # noqa: B008
    network = mixing(4, 2, torch.Generator().manual_seed(0), pool=50)
    return Pairs(precisions("bimodal", 4, 5.0, 25.0, families), network, batch_size, launch, (3, 1))


def test_batches_are_the_same_for_any_number_of_processes_and_in_any_order() -> None:
    whole = _pairs()
    steps = (0, 1, anisotropic_process.AHEAD + 2)
    batches = {step: whole(step) for step in steps}
    anchor, positive = batches[0]
    assert anchor.shape == positive.shape == (32, 2, 4)
    assert len(torch.cat([*batches[0], *batches[1]]).flatten(0, 1).unique(dim=0)) == 4 * 32 * 2  # nothing comes twice
    for world in (2, 8):
        parts = [_pairs(Launch(rank, world)) for rank in range(world)]
        for step in reversed(steps):
            for i in range(2):
                together = torch.cat([part(step)[i] for part in parts])
                # products of other shapes may round otherwise
                torch.testing.assert_close(together, batches[step][i], rtol=1e-5, atol=1e-6)


def test_mixed_precision_leaves_the_batch_as_it_is() -> None:
    expected = _pairs()(0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _pairs()(0)
    for one, other in zip(mixed, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_each_family_has_its_own_positives() -> None:
    pairs = _pairs(batch_size=512)
    pairs.network = torch.nn.Identity()
    gap = torch.stack([(a - b).square().mean(0) for a, b in (pairs(step) for step in range(8))]).mean(0)
    assert gap[0, :2].max() < gap[0, 2:].min()
    assert gap[1, ::2].max() < gap[1, 1::2].min()
    assert 0.5 < pairs.acceptance < 0.9


@pytest.mark.parametrize(("batch_size", "world"), [(8, 1), (100, 1), (32, 3), (64, 16)])
def test_batches_that_cannot_be_shared(batch_size: int, world: int) -> None:
    with pytest.raises(OptionError, match=f"a batch of {batch_size} pairs for {world}"):
        _pairs(Launch(0, world), batch_size)
