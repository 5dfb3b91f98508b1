"""The process of the controlled experiment: its formulas, its law by brute force, and whose random numbers are whose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.training_loop import step_generator
from posthoc.adapters.vmf import mean_resultant_length
from posthoc.recipes import synthetic_process
from posthoc.recipes.encoders import RangedConcentration, mlp, paper_encoder
from posthoc.recipes.running import seeded_module
from posthoc.recipes.synthetic_process import (
    AHEAD,
    Batches,
    Numbers,
    Process,
    ProcessConfig,
    acceptance_offset,
    make_process,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A tenth of the smoothing, for processes of few dimensions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_process, "SMOOTHING_STEPS", 500)
        yield


@pytest.fixture(scope="module")
def process(cache: Path) -> Process:
    return make_process(ProcessConfig(inputs=4, dim=4, seed=1), cache, progress=False)


def numbers(blocks: int, block: int, seed: int = 0) -> Numbers:
    return Numbers([torch.Generator().manual_seed(seed + i) for i in range(blocks)], block)


@pytest.mark.parametrize(("dim", "offset"), [(2, 17.590), (10, 11.148), (16, 8.753), (64, 2.993), (512, 0.390)])
def test_the_acceptance_constant_is_the_exact_one(dim: int, offset: float) -> None:
    assert acceptance_offset(ProcessConfig(dim=dim)) == pytest.approx(offset, abs=6e-4)


def test_the_papers_acceptance_constant() -> None:
    assert acceptance_offset(ProcessConfig(dim=10, constant="paper")) == pytest.approx(9.501, abs=1e-3)
    with pytest.raises(OptionError, match="take the exact one"):
        ProcessConfig(dim=11, constant="paper")


def test_means_are_spread_and_concentrations_fill_their_range(process: Process) -> None:
    x = process.images_alone(1000, torch.Generator().manual_seed(3))
    found = process.encoder(x)
    assert float((found.mean_direction @ found.mean_direction.T).min()) < 0.55  # 0.5 on the images it was judged by
    assert 14 < float(found.concentration.min()) < 18
    assert 28 < float(found.concentration.max()) < 34
    apart = torch.cdist(x, x).flatten()
    near = stats.spearmanr(apart, -(found.mean_direction @ found.mean_direction.T).flatten()).statistic
    assert near > 0.7  # near images have near means: what the smoothing is for


def test_a_process_is_built_once(process: Process, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_process, "_smooth", None)  # it would fail
    again = make_process(ProcessConfig(inputs=4, dim=4, seed=1), cache, progress=False)
    for name, value in process.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    (cache / "broken").mkdir()
    (stored,) = cache.glob("*.safetensors")
    (cache / "broken" / stored.name).write_bytes(stored.read_bytes()[:-5])
    with pytest.raises(DataError, match="delete it"):
        make_process(ProcessConfig(inputs=4, dim=4, seed=1), cache / "broken", progress=False)


def brute_force(process: Process, z: Tensor, matching: bool, rng: np.random.Generator) -> np.ndarray:
    """Images drawn one by one until one is taken, for each latent [N, d]; with another sampler of the posteriors."""
    taken = []
    config = process.config
    for latent in z.numpy():
        while True:
            x = rng.uniform(size=config.inputs).astype(np.float32)
            posterior = process.encoder(torch.from_numpy(x)[None])
            kappa = float(posterior.concentration)
            draw = stats.vonmises_fisher(posterior.mean_direction[0].double().numpy(), kappa).rvs(random_state=rng)
            chance = 1.0 / (1.0 + math.exp(process.offset - config.positive * float(draw.ravel() @ latent)))
            if (rng.uniform() < chance) == matching:
                taken.append(x)
                break
    return np.stack(taken)


@pytest.mark.parametrize("matching", [True, False])
def test_positives_and_negatives_follow_the_law(process: Process, matching: bool) -> None:
    start = numbers(1, 40)
    z = process.latents(process.images(start, start.rows, 1), start, start.rows)[:, 0]
    many = numbers(1, 4000, 7)
    with torch.no_grad():
        fast = process._fill(z.repeat_interleave(100, 0), many, many.rows, matching)
        slow = torch.from_numpy(brute_force(process, z.repeat_interleave(8, 0), matching, np.random.default_rng(0)))
        mean = process.encoder.direction
        cosines = [(mean(x).reshape(40, -1, 4) * z[:, None]).sum(-1).flatten().double().numpy() for x in (fast, slow)]
    assert stats.ks_2samp(*cosines).pvalue > 0.01
    for column in range(4):
        assert stats.ks_2samp(fast[:, column].numpy(), slow[:, column].numpy()).pvalue > 0.001


@pytest.mark.parametrize("family", ["vmf", "gaussian", "laplace"])
def test_latents_follow_their_family(family: str) -> None:
    made = Process(ProcessConfig(inputs=3, dim=5, family=family, lowest=9, highest=9.001))  # type: ignore[arg-type]
    made.encoder.calibrate(torch.rand(100, 3), 9.0, 9.001)
    many = numbers(1, 20_000)
    x = torch.full((20_000, 1, 3), 0.3)
    with torch.no_grad():
        mu = made.encoder.direction(x[0])
        found = (made.latents(x, many, many.rows)[:, 0] @ mu[0]).double().numpy()
    rng = np.random.default_rng(0)
    if family == "vmf":
        expected = float(mean_resultant_length(torch.tensor(9.0), 5))
        assert found.mean() == pytest.approx(expected, abs=5 * found.std() / 20_000**0.5)
        return
    noise = rng.normal(0, 9**-0.5, (20_000, 5)) if family == "gaussian" else rng.laplace(0, 1 / 9, (20_000, 5))
    other = mu.numpy() + noise
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    assert stats.ks_2samp(found, other @ mu[0].double().numpy()).pvalue > 0.01


def test_the_papers_sampler_is_another_one() -> None:
    spread = []
    for sampler in ("exact", "paper"):
        made = Process(ProcessConfig(inputs=3, dim=64, sampler=sampler))  # type: ignore[arg-type]
        made.encoder.calibrate(torch.rand(100, 3, generator=torch.Generator().manual_seed(0)), 16.0, 16.001)
        many = numbers(2, 1000)
        x = torch.full((2000, 1, 3), 0.3)
        with torch.no_grad():
            spread.append(float((made.latents(x, many, many.rows)[:, 0] @ made.encoder.direction(x[0, 0])).mean()))
    assert spread[0] == pytest.approx(0.236, abs=0.01)
    assert spread[1] == pytest.approx(0.009, abs=0.02)  # spec: what the reference's sampler measures


def test_a_blocks_numbers_do_not_depend_on_the_others(process: Process) -> None:
    whole = process.draw(numbers(4, 8), 3)
    for block in range(4):
        alone = process.draw(numbers(1, 8, block), 3)
        for all_rows, rows in zip(whole, alone, strict=True):
            assert all_rows is not None
            assert rows is not None
            torch.testing.assert_close(all_rows[block * 8 : block * 8 + 8], rows, rtol=0, atol=0)
    shapes = [None if v is None else tuple(v.shape) for v in process.draw(numbers(2, 3), 0)]
    assert shapes == [(6, 4), (6, 4), None]


@pytest.mark.parametrize("negatives", [0, 4, 32])
def test_batches_drawn_ahead_are_those_of_single_steps(negatives: int, cache: Path) -> None:
    made = make_process(ProcessConfig(inputs=10, dim=10, seed=1, spread=1.0), cache, progress=False)
    batches = Batches(made, range(1, 3), 64, (5, 101))  # the second share of two
    # in a run, and as a resumed one would ask for them; another stage has others
    for stage, step in [*((0, i) for i in range(2 * AHEAD + 1)), (0, AHEAD - 1), (1, AHEAD - 1), (0, 7 * AHEAD + 3)]:
        generators = [step_generator(5, 101, stage, step, block, 0) for block in (1, 2)]
        expected = made.draw(Numbers(generators, 64), negatives)
        for one, other in zip(batches(stage, step, negatives), expected, strict=True):
            assert (one is None and other is None) if other is None else torch.equal(one, other)


@pytest.mark.parametrize("sampler", ["exact", "paper"])
def test_mixed_precision_leaves_the_data_as_they_are(sampler: Any) -> None:
    config = ProcessConfig(inputs=4, dim=3, lowest=4.0, highest=64.0, sampler=sampler)
    made = seeded_module(lambda: Process(config), 0)
    whole = made.draw(numbers(2, 16), 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = made.draw(numbers(2, 16), 3)
    for one, other in zip(whole, mixed, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def test_infinite_concentrations_give_the_means(cache: Path) -> None:
    made = make_process(ProcessConfig(inputs=3, dim=3, lowest=math.inf, highest=math.inf), cache, progress=False)
    few = numbers(1, 9)
    x = made.images(few, few.rows, 1)
    torch.testing.assert_close(made.latents(x, few, few.rows), made.encoder.direction(x))


def test_shared_concentrations_are_a_function_of_the_mean(cache: Path) -> None:
    made = make_process(ProcessConfig(inputs=3, dim=5, shared=True), cache, progress=False)
    x = made.images_alone(50, torch.Generator().manual_seed(0))
    mu = made.encoder.direction(x)
    torch.testing.assert_close(made.encoder(x).concentration, made.encoder.concentration(mu))
    assert float(made.encoder(x).concentration.min()) > 12  # its range holds, unlike in the paper's code


def test_a_process_that_cannot_be_conditioned(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(synthetic_process, "TRIES", 1)
    monkeypatch.setattr(synthetic_process, "SMOOTHING_STEPS", 1)
    with pytest.raises(DataError, match=r"below -0\.999, the lowest was -?0\.\d+: give a larger spread"):
        make_process(ProcessConfig(spread=-0.999), cache, progress=False)


@pytest.mark.parametrize(
    "wrong", [{"dim": 1}, {"lowest": 0.0}, {"lowest": 3.0, "highest": 2.0}, {"positive": math.inf}, {"spread": -1.0}]
)
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="given"):
        ProcessConfig(**wrong)  # type: ignore[arg-type]


def test_the_papers_encoder_has_its_sizes_and_its_range() -> None:
    encoder = paper_encoder(10, 10)
    sizes = [
        [layer.out_features for layer in net if hasattr(layer, "out_features")]
        for net in (encoder.mean, encoder.concentration.net)
    ]
    assert sizes == [[100, 500, 500, 500, 500, 500, 100, 10], [10, 50, 50, 50, 50, 50, 10, 1]]
    x = torch.rand(1000, 10, generator=torch.Generator().manual_seed(0))
    encoder.calibrate(x, 16.0, 32.0)
    kappa = encoder(x).concentration.detach()
    assert float(kappa.min()) == pytest.approx(16.0, rel=2e-3)
    assert float(kappa.max()) == pytest.approx(32.0, rel=2e-3)


def test_a_constant_network_has_no_range() -> None:
    net = mlp([2, 1])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    with pytest.raises(DataError, match="constant"):
        RangedConcentration(net).calibrate(torch.rand(5, 2), 1.0, 2.0)
