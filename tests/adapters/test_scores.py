"""Held-out scores: percentiles, and thresholds whose promises are checked by simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import beta

from posthoc.adapters.errors import DataError, NotFittedError, OptionError
from posthoc.adapters.scores import HeldOutScores


def draw(rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(rows, generator=generator).exp()


@pytest.mark.parametrize("rows", [1, 2, 7, 999, 1000, 1001, 4321])
def test_percentile_is_the_empirical_distribution_rounded_down(rows: int, generator: torch.Generator) -> None:
    scores = draw(rows, generator)
    asked = torch.cat([scores, draw(200, generator), torch.tensor([0.0, 1e9])])
    below = (scores[None, :] <= asked[:, None]).sum(1).numpy()
    expected = (below * 1000 // rows) / 10
    got = HeldOutScores().fit(scores).percentile(asked)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_percentile_of_tied_scores() -> None:
    held_out = HeldOutScores().fit(torch.tensor([1.0, 1.0, 1.0, 2.0]))
    assert held_out.percentile(torch.tensor([0.5, 1.0, 1.5, 2.0])).tolist() == pytest.approx([0, 75, 75, 100])


@pytest.mark.parametrize("rows", [19, 100, 999, 2500])
@pytest.mark.parametrize("coverage", [0.05, 0.5, 0.9, 0.95])
def test_coverage_threshold_is_the_conformal_order_statistic(
    rows: int, coverage: float, generator: torch.Generator
) -> None:
    scores = draw(rows, generator).sort().values
    threshold = HeldOutScores().fit(scores).threshold(coverage=coverage)
    exact = int(np.ceil(round((rows + 1) * coverage, 6))) - 1
    at = int(torch.searchsorted(scores, threshold))
    assert exact <= at <= exact + rows // 1000  # the very one up to 1,000 rows, then the next stored quantile
    assert float(scores[at]) == threshold


@pytest.mark.parametrize(("rows", "coverage"), [(19, 0.95), (99, 0.9), (1500, 0.95)])
def test_coverage_holds_for_new_images(rows: int, coverage: float) -> None:
    """Given the threshold X_(r), a new uniform score lies below it with probability X_(r), whose mean is r/(n+1)."""
    generator = torch.Generator().manual_seed(1)
    repetitions = 1000
    reached = np.array(
        [
            HeldOutScores().fit(torch.rand(rows, generator=generator)).threshold(coverage=coverage)
            for _ in range(repetitions)
        ]
    )
    standard_error = reached.std() / repetitions**0.5
    assert reached.mean() >= coverage - 4 * standard_error
    assert reached.mean() <= coverage + 0.001 + 4 * standard_error


def test_too_few_rows_names_the_largest_coverage(generator: torch.Generator) -> None:
    held_out = HeldOutScores().fit(draw(9, generator))
    with pytest.raises(OptionError, match=r"largest possible is 0\.9 "):
        held_out.threshold(coverage=0.95)
    assert held_out.threshold(coverage=0.9) == float(held_out.quantiles[-1])
    with pytest.raises(OptionError, match="largest possible"):
        held_out.threshold(coverage=1.0)


def risky(rows: int, slope: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores u in [0, 1]; P(wrong | u) = slope * u, so that the risk below t is slope * t / 2."""
    scores = torch.rand(rows, generator=generator)
    return scores, torch.rand(rows, generator=generator) < slope * scores


def test_risk_holds_in_at_least_the_promised_share_of_fits() -> None:
    generator = torch.Generator().manual_seed(2)
    slope, risk, delta, fits = 0.5, 0.18, 0.1, 300
    thresholds = []
    for _ in range(fits):
        scores, wrong = risky(500, slope, generator)
        held_out = HeldOutScores().fit(scores, wrong)
        refused = bool((held_out.risk_bounds(delta) > risk).all())
        thresholds.append(0.0 if refused else held_out.threshold(risk=risk, delta=delta))
    assert np.mean(slope * np.array(thresholds) / 2 <= risk) >= 1 - delta
    assert np.median(thresholds) > 0.3  # not valid by accepting nothing: the oracle's coverage is 0.72


def test_a_risk_just_out_of_reach_is_promised_in_at_most_delta_of_the_fits() -> None:
    """The hardest case: every coverage has the same risk, a hair above the one asked for, and 20 chances to err."""
    generator = torch.Generator().manual_seed(3)
    promised, fits, delta = 0, 300, 0.2
    for _ in range(fits):
        scores, wrong = torch.rand(300, generator=generator), torch.rand(300, generator=generator) < 0.2
        promised += bool((HeldOutScores().fit(scores, wrong).risk_bounds(delta) <= 0.1999).any())
    assert promised / fits <= delta


def test_the_risk_bound_is_the_tabulated_clopper_pearson(generator: torch.Generator) -> None:
    scores, wrong = risky(1000, 0.3, generator)
    held_out = HeldOutScores().fit(scores, wrong)
    ordered = wrong[scores.argsort()].numpy()
    for place, accepted in ((0, 50), (9, 500), (19, 1000)):
        errors = ordered[:accepted].sum()
        assert held_out.errors[place] == errors
        expected = beta.ppf(1 - 0.1 / 20, errors + 1, accepted - 1 - errors)
        assert held_out.risk_bounds()[place] == pytest.approx(expected, rel=1e-9)


def test_risk_that_cannot_be_promised_names_the_smallest(generator: torch.Generator) -> None:
    held_out = HeldOutScores().fit(*risky(100, 0.9, generator))
    with pytest.raises(OptionError, match=r"smallest bound is 0\.\d+, at coverage \d+%"):
        held_out.threshold(risk=0.001)
    assert HeldOutScores().fit(torch.rand(3), torch.tensor([True] * 3)).risk_bounds().tolist() == [1.0] * 20


def test_risk_without_labels_says_what_is_missing(generator: torch.Generator) -> None:
    with pytest.raises(OptionError, match="labelled rows"):
        HeldOutScores().fit(draw(50, generator)).threshold(risk=0.1)


@pytest.mark.parametrize("asked", [{}, {"coverage": 0.9, "risk": 0.1}, {"coverage": 0.0}, {"risk": 1.5}])
def test_a_threshold_needs_one_promise_in_range(asked: dict[str, float], generator: torch.Generator) -> None:
    with pytest.raises(OptionError):
        HeldOutScores().fit(draw(50, generator)).threshold(**asked)


def test_scores_must_be_there_and_finite() -> None:
    with pytest.raises(NotFittedError):
        HeldOutScores().threshold(coverage=0.9)
    with pytest.raises(DataError, match="No held-out rows"):
        HeldOutScores().fit(torch.empty(0))
    with pytest.raises(DataError, match="1 of 2"):
        HeldOutScores().fit(torch.tensor([1.0, torch.nan]))


def test_what_no_fit_stores_is_refused(generator: torch.Generator) -> None:
    for name, change in (("quantiles", -1), ("accepted", -1), ("accepted", 10**6), ("rows", 0), ("errors", 10**6)):
        held_out = HeldOutScores().fit(*risky(100, 0.5, generator))
        held_out.check()
        buffer = getattr(held_out, name)
        buffer.copy_(buffer.flip(0) if name == "quantiles" else torch.full_like(buffer, change))
        with pytest.raises(DataError, match="not what a fit stores"):
            held_out.check()


def test_the_summary_tells_the_range(generator: torch.Generator) -> None:
    scores = draw(777, generator)
    summary = HeldOutScores().fit(scores).summary()
    assert summary["rows"] == 777
    assert summary["min"] == scores.min()
    assert summary["max"] == scores.max()
    assert summary["median"] == scores.median()


def test_survives_safetensors_identically(tmp_path: Path, generator: torch.Generator) -> None:
    held_out = HeldOutScores().fit(*risky(1234, 0.4, generator))
    save_file(held_out.state_dict(), tmp_path / "scores.safetensors")
    again = HeldOutScores()
    again.load_state_dict(load_file(tmp_path / "scores.safetensors"))
    assert again.threshold(coverage=0.9) == held_out.threshold(coverage=0.9)
    assert again.threshold(risk=0.3) == held_out.threshold(risk=0.3)
    asked = torch.rand(50, generator=generator)
    assert torch.equal(again.percentile(asked), held_out.percentile(asked))
