"""The controlled experiment as a recipe: what it trains when, what it measures, launches, kills and bad input."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import PosthocError
from posthoc.adapters.training_loop import History
from posthoc.adapters.vmf import VonMisesFisher, mean_resultant_length
from posthoc.eval.caps import cap_cosine
from posthoc.eval.identifiability import orthogonal_alignment
from posthoc.recipes import options, running, synthetic, synthetic_process, synthetic_report
from posthoc.recipes.encoders import paper_encoder
from posthoc.recipes.synthetic import PRESETS, SyntheticConfig, SyntheticStep, make_criterion, stages
from posthoc.recipes.synthetic_process import Numbers, Process, make_process
from posthoc.recipes.synthetic_report import Truth, _covered, cap_coverage, final_figures, round_figures

from .recipe_children import kill_at_checkpoint, metrics, records, results, results_of_two

TINY = {
    "input_dim": 3, "latent_dim": 3, "encoder_dim": 3, "encoder_width": 12, "encoder_hidden": 1, "batch_size": 128,
    "samples": 8, "negatives": 2, "every": 5, "eval_rows": 60, "steps": 10, "kappa_steps": 10, "lr": 3e-3, "spread": 1.0,
}  # fmt: skip
NO_AMBIGUITY = {"kappa_low": math.inf, "kappa_high": math.inf}
CIRCLE = {"input_dim": 2, "latent_dim": 2, "encoder_dim": 2, "sampler": "paper"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Processes of the tiny experiments, seeds 0 and 3, with little smoothing: children find them there."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_process, "SMOOTHING_STEPS", 300)
        for options in ({}, {"seed": 3}, NO_AMBIGUITY, CIRCLE):
            config = SyntheticConfig(**{**TINY, **options})  # type: ignore[arg-type]
            make_process(config.process(), folder, progress=False)
    return folder


def words(**options: object) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def unbuilt(config: SyntheticConfig) -> Process:
    """A process with random weights, not conditioned."""
    process = running.seeded_module(lambda: Process(config.process()), 0)
    process.encoder.calibrate(torch.rand(200, config.input_dim, generator=torch.Generator().manual_seed(0)), 16.0, 32.0)
    return process.requires_grad_(False)


def step_of(config: SyntheticConfig, launch: Launch) -> SyntheticStep:
    encoder = running.seeded_module(lambda: paper_encoder(config.input_dim, config.encoder_dim, 12, 1), 1)
    encoder.calibrate(torch.rand(200, config.input_dim, generator=torch.Generator().manual_seed(1)), 16.0, 32.0)
    return SyntheticStep(encoder, make_criterion(config), unbuilt(config), config, launch)


@pytest.mark.parametrize("loss", ["mcinfonce", "elk", "hib"])
@pytest.mark.parametrize("negatives", [0, 2])
def test_the_shares_of_two_processes_are_the_batch_of_one(loss: str, negatives: int) -> None:
    config = SyntheticConfig(loss=loss, **{**TINY, "batch_size": 256})  # type: ignore[arg-type]
    whole = step_of(config, Launch(0, 1))
    total = whole(0, 3, negatives)
    total.backward()
    halves = [step_of(config, Launch(rank, 2)) for rank in (0, 1)]
    losses = [half(0, 3, negatives) for half in halves]
    values = [float(loss.detach()) for loss in (*losses, total)]
    assert values[0] != values[1]
    assert (values[0] + values[1]) / 2 == pytest.approx(values[2], rel=1e-5)
    for half_loss in losses:
        half_loss.backward()
    parameters = zip(whole.parameters(), *(half.parameters() for half in halves), strict=True)
    for one, *others in parameters:
        torch.testing.assert_close(one.grad, sum(other.grad for other in others) / 2, rtol=2e-4, atol=1e-6)


def test_steps_draw_other_batches_and_the_same_ones_again() -> None:
    config = SyntheticConfig(**TINY)  # type: ignore[arg-type]
    step = step_of(config, Launch(0, 1))
    values = [float(step(*place).detach()) for place in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 0))]
    assert values[0] == values[3]
    assert len(set(values)) == 3


def test_the_papers_half_phases() -> None:
    config = SyntheticConfig(phases=2, steps=100, lr=1e-4, negatives=16)
    found = stages(config)
    assert [(s.name, s.trained, s.negatives) for s in found] == [
        ("phase-1-mean", ("mean",), 0), ("phase-1-kappa", ("concentration",), 16),
        ("phase-2-mean", ("mean",), 0), ("phase-2-kappa", ("concentration",), 16),
    ]  # fmt: skip
    rates = []
    for stage in found:
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=config.lr * stage.rate)
        schedule = running.scheduled(config.schedule, optimizer, stage.steps)
        for _ in range(stage.steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    at = [rates[i] for i in (0, 49, 50, 100, 150, 200, 300)]
    root = 0.5**0.5
    assert at == pytest.approx([1e-4 * f for f in (1, 1, 0.5, root, root / 2, 0.5, root / 2)])
    assert stages(SyntheticConfig(**PRESETS["2d"]))[0].negatives == 1  # in 2 dimensions the means see them too
    (joint,) = stages(SyntheticConfig(phases=0, steps=7))
    assert (joint.trained, joint.steps) == (("mean", "concentration"), 14)


def known(mu: np.ndarray, kappa: np.ndarray) -> Truth:
    """vMF posteriors, whose latents are their means."""
    cap = cap_cosine(kappa, mu.shape[1])
    return Truth(torch.zeros(len(mu), 1), mu, kappa, "vmf", latent=mu, kappa=kappa, cap=cap, proxy=kappa)


class Turned(torch.nn.Module):
    """An encoder that knows the truth, its concentrations times a factor, in a frame of its own."""

    def __init__(self, truth: Truth, factor: float) -> None:
        super().__init__()
        self.truth, self.factor = truth, factor
        dim = truth.mu.shape[1]
        generator = torch.Generator().manual_seed(5)
        self.turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]

    def forward(self, x: torch.Tensor) -> torch.distributions.Distribution:
        assert x is self.truth.x
        kappa = torch.from_numpy(self.truth.kappa).float()
        return VonMisesFisher(torch.from_numpy(self.truth.mu) @ self.turn, kappa * self.factor)


@pytest.mark.parametrize("family", ["vmf", "gaussian", "laplace"])
def test_figures_of_an_encoder_that_knows_the_truth(family: str) -> None:
    process = unbuilt(SyntheticConfig(**TINY, family=family))  # type: ignore[arg-type]
    truth = Truth.of(process, 1500, torch.Generator().manual_seed(0))
    right = final_figures(Turned(truth, 1.0), truth, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert right["cosines_spearman"] == pytest.approx(1.0, abs=1e-4)
    assert right["kappa_spearman"] == pytest.approx(1.0)
    assert right["kappa_mae"] == pytest.approx(0.0, abs=1e-3)
    assert right["kappa_ratio"] == pytest.approx(1.0)
    assert right["proxy_spearman"] < 0.95  # the noise of 100 samples
    assert right["proxy_mae"] < 0.01
    assert right["coverage"] == pytest.approx(0.95, abs=0.04)  # 750 images: five standard errors
    assert right["coverage_of_the_true_posteriors"] == pytest.approx(0.95, abs=0.03)
    if family != "vmf":
        return
    sure = final_figures(Turned(truth, 4.0), truth, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    # half the width: the cap of 95 % of kappa 4 k holds the share of k that lies within half the angle
    assert sure["coverage"] == pytest.approx(1 - 0.05**0.25, abs=0.04)


@pytest.mark.parametrize("family", ["vmf", "gaussian", "laplace"])
def test_true_concentrations_are_those_of_the_vmf_with_the_same_mean_cosine(family: str) -> None:
    process = unbuilt(SyntheticConfig(**TINY, family=family))  # type: ignore[arg-type]
    truth = Truth.of(process, 1500, torch.Generator().manual_seed(0))
    assert np.corrcoef(np.log(truth.kappa), np.log(truth.parameter))[0, 1] > 0.95
    cosine = (truth.mu * truth.latent).sum(1)  # of draws that it was not found by
    off = cosine - mean_resultant_length(torch.from_numpy(truth.kappa).double(), 3).numpy()
    assert off.mean() == pytest.approx(0.0, abs=5 * off.std() / 1500**0.5)
    few = Truth.of(process, 1500, torch.Generator().manual_seed(0))
    assert np.array_equal(few.proxy, truth.proxy)
    assert np.array_equal(few.kappa, truth.kappa)


@pytest.mark.parametrize("family", ["vmf", "gaussian", "laplace"])
@pytest.mark.parametrize("kappa", [0.7, 24.0])
def test_the_density_on_the_circle_is_the_familys(family: str, kappa: float) -> None:
    process = unbuilt(SyntheticConfig(**{**TINY, **CIRCLE, "sampler": "exact"}, family=family))  # type: ignore[arg-type]
    process.encoder.calibrate(torch.rand(200, 2, generator=torch.Generator().manual_seed(0)), kappa, kappa * 1.0001)
    numbers = Numbers([torch.Generator().manual_seed(0)], 1)
    x = torch.full((1, 1, 2), 0.3)
    mu = process.encoder.direction(x[0, 0]).numpy()
    z = process.latents(x.expand(1, 50_000, 2), numbers, numbers.rows)[0].double().numpy()
    angle = (np.arange(4000) + 0.5) * (2 * math.pi / 4000) - math.pi
    density = synthetic_report._on_circle(angle, mu, kappa, family)  # type: ignore[arg-type]
    assert density.sum() * (2 * math.pi / 4000) == pytest.approx(1.0, abs=2e-3)
    whole = np.concatenate([[0.0], np.cumsum(density) / density.sum()])
    edges = np.linspace(-math.pi, math.pi, 4001)
    assert stats.kstest(np.arctan2(z[:, 1], z[:, 0]), lambda a: np.interp(a, edges, whole)).pvalue > 0.01


def test_coverage_is_judged_on_images_the_turn_was_not_fitted_on() -> None:
    noise = np.random.default_rng(0).normal(size=(2, 40, 16)).astype(np.float32)
    nonsense, mu = noise / np.linalg.norm(noise, axis=-1, keepdims=True)
    kappa = np.full(40, 16.0, np.float32)
    truth = known(mu, kappa)
    # 16 dimensions, 20 images: a turn that has seen the images fits nonsense to them
    assert _covered(nonsense @ orthogonal_alignment(nonsense, mu), truth.cap, mu) > 0.6
    assert cap_coverage(nonsense, kappa, truth) < 0.2


def test_coverage_where_means_lie_in_a_subspace() -> None:
    rng = np.random.default_rng(0)
    mu = np.zeros((400, 12))
    mu[:, :4] = rng.normal(size=(400, 4))
    mu /= np.linalg.norm(mu, axis=1, keepdims=True)
    frame = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    truth = known(mu, np.full(400, 1e6))
    assert cap_coverage(mu @ frame, np.full(400, 1e6), truth) == 1.0
    assert cap_coverage(rng.permutation(mu) @ frame, np.full(400, 1e6), truth) < 0.5


def test_round_figures_are_those_of_the_library() -> None:
    process = unbuilt(SyntheticConfig(**TINY))  # type: ignore[arg-type]
    truth = Truth.of(process, 30, torch.Generator().manual_seed(0))
    found = round_figures(Turned(truth, 2.0), truth)  # type: ignore[arg-type]
    assert found["kappa_mae"] == pytest.approx(float(truth.kappa.mean()), rel=1e-5)


def test_without_ambiguity_only_directions_are_judged(cache: Path, tmp_path: Path) -> None:
    options = {**TINY, **NO_AMBIGUITY, "steps": 5}
    found = synthetic.run(SyntheticConfig(output=tmp_path / "a", cache_dir=cache, **options))  # type: ignore[arg-type]
    assert not [name for name in found if name.startswith(("kappa", "proxy"))]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json", "results.json", "learning.png", "phase-1-mean", "phase-1-kappa",
    }  # fmt: skip


def test_on_the_circle_posteriors_are_drawn(cache: Path, tmp_path: Path) -> None:
    options = {**TINY, **CIRCLE, "steps": 5}
    found = synthetic.run(SyntheticConfig(output=tmp_path / "a", cache_dir=cache, **options))  # type: ignore[arg-type]
    assert (tmp_path / "a" / "posteriors.png").stat().st_size > 5000
    assert 0.0 <= found["coverage"] <= 1.0


SCRIPTS = {  # of the paper's table: what differs from its code's defaults
    "ambiguous": {"batch_size": 512, "samples": 512, "negatives": 32},
    "clear": {"kappa_low": 64.0, "kappa_high": 128.0},
    "injective": {"kappa_low": math.inf, "kappa_high": math.inf},
    "paper-elk": {"loss": "elk", "phases": 0, "negatives": 1},
    "paper-hib": {"loss": "hib", "phases": 0, "negatives": 0},
    "2d": {"input_dim": 2, "latent_dim": 2, "encoder_dim": 2, "negatives": 1, "mean_negatives": 1, "steps": 4096},
    "encoder-8": {"encoder_dim": 8, "batch_size": 512, "samples": 512, "negatives": 32},
    "encoder-64": {"encoder_dim": 64, "batch_size": 512, "samples": 256, "negatives": 8},
    "encoder-128": {"encoder_dim": 128, "batch_size": 256, "samples": 256, "negatives": 8},
    "samples-4": {"samples": 4},
    "dim-16": {
        "input_dim": 16,
        "latent_dim": 16,
        "encoder_dim": 16,
        "batch_size": 256,
        "samples": 256,
        "negatives": 32,
    },
    "dim-128": {
        "input_dim": 128,
        "latent_dim": 128,
        "encoder_dim": 128,
        "batch_size": 256,
        "samples": 256,
        "negatives": 8,
    },
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_papers_scripts_are_presets_on_its_defaults(name: str) -> None:
    found = options.parse("synthetic", SyntheticConfig, PRESETS, None, ["--preset", "paper", name])
    defaults = {
        "batch_size": 128, "samples": 128, "negatives": 16, "lr": 1e-4, "phases": 1, "steps": 50_000, "loss": "mcinfonce",
        "kappa_positive": 20.0, "kappa_low": 16.0, "kappa_high": 32.0, "encoder_kappa_low": 16.0, "encoder_kappa_high": 32.0,
        "encoder_width": 0, "encoder_hidden": 6, "mean_negatives": 0, "negative_weight": None, "schedule": "halved",
        "acceptance": "paper", "sampler": "paper", "reference": True, "antithetic": False,
        "hib_scale": 1.0, "hib_shift": 0.0, "learnable": False,
        "eval_rows": 10_000, "every": 500, "family": "vmf", "spread": 0.5,
    }  # fmt: skip
    expected = {**defaults, **SCRIPTS[name]}
    assert {option: getattr(found, option) for option in expected} == expected
    assert getattr(make_criterion(found), "reference", True)


def test_elk_and_hib_on_the_default_are_the_tables_runs() -> None:
    plain, elk, hib = (
        options.parse("synthetic", SyntheticConfig, PRESETS, None, words)
        for words in ([], ["--preset", "elk"], ["--preset", "hib"])
    )
    assert elk == dataclasses.replace(plain, loss="elk", concentration=1.0)
    assert hib == dataclasses.replace(plain, loss="hib", hib_scale=20.0, hib_shift=-8.0)
    assert [stage.trained for stage in stages(elk)] == [("mean",), ("concentration",)]


def test_the_learning_curve_of_concentrations_begins_where_they_are_trained() -> None:
    def history(*values: float) -> History:
        return History([{"step": 5 * (i + 1), "kappa_spearman": value} for i, value in enumerate(values)])

    halves = {"phase-1-mean": history(0.2, 0.2), "phase-1-kappa": history(0.4, 0.9)}
    curve = synthetic_report._learning_curve
    assert curve("kappa_spearman", "kappa", {"kappa_spearman": 0.2}, halves) == ([10, 15, 20], [0.2, 0.4, 0.9])
    assert curve("kappa_spearman", "mean", {"kappa_spearman": 0.1}, halves)[0] == [0, 5, 10, 15, 20]
    assert curve("kappa_spearman", "kappa", {"kappa_spearman": 0.1}, {"joint": history(0.3)}) == ([0, 5], [0.1, 0.3])


def test_the_table_at_the_end_has_start_and_end() -> None:
    found = synthetic_report.table({"cosines_spearman": 0.1}, {"cosines_spearman": 0.98765, "coverage": 0.5})
    _, _, cosines, coverage = found.splitlines()
    assert cosines.endswith("| 0.100 | 0.988 |")
    assert coverage.endswith("|  | 0.500 |")


def test_concentrations_that_are_infinite_are_not_trained() -> None:
    found = stages(SyntheticConfig(encoder_kappa_low=math.inf, encoder_kappa_high=math.inf))
    assert [stage.name for stage in found] == ["phase-1-mean"]


def test_two_gloo_processes_are_one(cache: Path, tmp_path: Path) -> None:
    # small steps: noise of rounding stays noise
    options = words(**{**TINY, "lr": 3e-4, "steps": 5, "kappa_steps": 5}, cache_dir=cache, seed=3)
    one = results("synthetic", [*options, "--output", "one"], tmp_path)
    two = results_of_two("synthetic", [*options, "--output", "two"], tmp_path)
    assert one["figures"] == pytest.approx(two["figures"], rel=1e-3)
    for name in ("phase-1-mean", "phase-1-kappa"):
        losses = [[record["train_loss"] for record in records(tmp_path / run, name)] for run in ("one", "two")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(cache: Path, tmp_path: Path) -> None:
    options = words(**{**TINY, "steps": 30, "kappa_steps": 60}, cache_dir=cache, seed=3)
    whole = results("synthetic", [*options, "--output", "whole"], tmp_path)
    broken = [*options, "--output", "broken"]
    killed = kill_at_checkpoint("synthetic", broken, tmp_path, "phase-1-kappa/checkpoint.pt")
    assert killed != metrics(tmp_path / "whole")
    with pytest.raises(SystemExit):
        synthetic.command([*options, "--output", str(tmp_path / "broken")])  # it does not go on unasked
    resumed = results("synthetic", [*broken, "--resume"], tmp_path)
    assert resumed["figures"] == whole["figures"]
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--encoder-kappa-low", "40"], "low <= high"),
        (["--eval-rows", "10"], "24 or more"),
        (["--batch-size", "100"], "multiple of 64"),
        (["--kappa-low", "0"], "lowest <= highest"),
        (["--lr", "0"], "positive lr"),
        (["--spread", "-1"], "above -1 and at most 1"),
        (["--loss", "elk", "--reference", "--encoder-dim", "6"], "4, 8, 10, 16, 32, 64 dimensions"),
    ],
)
def test_bad_input_is_one_line(given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        synthetic.command([*given, "--output", str(tmp_path / "run"), "--cache-dir", str(tmp_path)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.glob("*.safetensors"))  # nothing was built


def test_too_many_images_to_evaluate_are_told_by_their_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: SyntheticConfig) -> None:
        raise MemoryError("Unable to allocate 37.3 GiB")

    monkeypatch.setattr(synthetic, "run", run)
    with pytest.raises(SystemExit):
        synthetic.command(["--output", str(tmp_path / "run")])
    assert capsys.readouterr().err.endswith("--samples or --eval-rows\n")


@pytest.mark.parametrize(("part", "count"), [("losses", 17), ("samplers", 27), ("variants", 14)])
def test_the_benchmarks_table_has_every_seed(
    part: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And every run of it has options of its own."""
    place = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(place))
    spec = importlib.util.spec_from_file_location("benchmarks_synthetic", place / "synthetic.py")
    assert spec
    assert spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    seen = []

    def carried_out(recipe: str, words: Sequence[str], folder: Path, threads: int) -> dict[str, Any]:
        seen.append(words)
        seed = int(words[-1])
        figures = dict.fromkeys(benchmark.COLUMNS, seed / 100)
        return {"figures": figures, "training_seconds": {"a": 90.0, "b": 60.0 * seed}}

    monkeypatch.setattr(benchmark, "carried_out", carried_out)
    monkeypatch.setattr("sys.argv", ["synthetic.py", part, "--output", str(tmp_path)])
    benchmark.main()
    configs = {repr(options.parse("synthetic", SyntheticConfig, PRESETS, None, words)) for words in seen}
    assert len(configs) == len(seen) == count
    printed = capsys.readouterr().out
    assert "cosines, mean abs. error" in printed
    if part == "losses":
        means = " 0.060 ± 0.016 |" * 7
        assert f"| ELK |{means} 5 | 7.5 ± 1.6 |\n| ELK, seed 4 |{' 0.040 |' * 7} 1 | 5.5 |" in printed


def test_a_run_that_does_not_learn_says_so(cache: Path, tmp_path: Path) -> None:
    config = SyntheticConfig(**{**TINY, "steps": 1, "lr": 1e-9}, check=True, output=tmp_path / "a", cache_dir=cache)  # type: ignore[arg-type]
    with pytest.raises(PosthocError, match="nothing was learnt"):
        synthetic.run(config)
