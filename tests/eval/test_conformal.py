"""`posthoc eval conformal`: the promised coverage, tables against the sets themselves, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from posthoc.eval.conformal import ClassCoverage, conformal_table, main, worst_class_interval
from posthoc.eval.conformal_sets import ClassSetReport, fit_conformal, set_report

FEW = ["--resamples", "40"]


def arrays(n: int = 1000, seed: int = 0, classes: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    return {"label": label, "logits": 3.0 * np.eye(classes)[label] + 1.5 * rng.normal(size=(n, classes))}


def save(folder: Path, **sets: dict[str, np.ndarray]) -> dict[str, str]:
    for name, one in sets.items():
        np.savez(folder / f"{name}.npz", **one)
    return {name: str(folder / f"{name}.npz") for name in sets}


def test_every_rule_covers_what_it_promises(tmp_path, capsys) -> None:
    one, kept = arrays(), arrays(seed=1)
    places = save(tmp_path, one=one, kept=kept)
    main(["--data", places["one"], "--held-out", places["kept"], "--alpha", "0.2", "--format", "json", *FEW])
    (table,) = json.loads(capsys.readouterr().out)
    assert len(table["scores"]) == 10
    for name, row in table["scores"].items():
        over = 0.11 if name.startswith(("APS", "RAPS")) and "randomised" not in name else 0.05
        assert 0.8 - 0.05 < row["coverage"]["value"] < 0.8 + over, name
        assert row["worst_class_coverage"]["value"] <= row["mean_class_coverage"]["value"]
    report = set_report(
        fit_conformal(kept["logits"], kept["label"], method="lac", alpha=0.2).sets(one["logits"]), one["label"]
    )
    row = table["scores"]["LAC"]
    for key in ("coverage", "size", "empty", "worst_class_coverage", "mean_class_coverage"):
        assert row[key]["value"] == pytest.approx(report.summary()[key])
    assert table["scores"]["APS"]["size"]["minus_reference"]["value"] == pytest.approx(
        table["scores"]["APS"]["size"]["value"] - report.size.mean()
    )
    main(["--data", places["one"], "--held-out", places["kept"], *FEW])
    assert "*" not in capsys.readouterr().out  # no coverage is better for being higher


def test_rare_classes_have_no_sets_of_their_own(tmp_path, capsys) -> None:
    places = save(tmp_path, one=arrays(), kept=arrays(30, seed=1))
    main(["--data", places["one"], "--held-out", places["kept"], "--format", "json", *FEW])
    (table,) = json.loads(capsys.readouterr().out)
    assert len(table["scores"]) == 5
    assert any(note.startswith("no class-conditional sets: ") for note in table["notes"])


def test_coverage_by_class_one_at_a_time() -> None:
    rng = np.random.default_rng(0)
    covered, label = rng.random(50) < 0.7, rng.integers(0, 4, 50) * 3
    counts = rng.integers(0, 3, (5, 50)).astype(float)
    found = ClassCoverage(covered, label)([counts])
    for row, (worst, mean) in zip(counts, found, strict=True):
        share = [(row * covered)[label == c].sum() / row[label == c].sum() for c in (0, 3, 6, 9)]
        assert (worst, mean) == pytest.approx((min(share), np.mean(share)))


def test_bounds_of_the_worst_class_are_scipys() -> None:
    label = np.repeat([2, 5, 9], [40, 10, 3])
    covered = np.concatenate([np.arange(40) < 30, np.arange(10) < 8, np.ones(3, bool)])
    parts = [(30, 40), (8, 10), (3, 3)]
    low = min(binomtest(hits, rows).proportion_ci(0.95).low for hits, rows in parts)
    high = min(binomtest(hits, rows).proportion_ci(1 - 0.05 / 3).high for hits, rows in parts)
    found = worst_class_interval(covered, label)
    assert (found.value, found.low, found.high) == pytest.approx((0.75, low, high))
    none, every = (worst_class_interval(np.full(6, to), np.arange(6) % 2) for to in (False, True))
    assert (none.value, none.low) == (0.0, 0.0)
    assert (every.value, every.high) == (1.0, 1.0)
    assert none.high == pytest.approx(1 - every.low, abs=0.2)


WORST = {
    "all alike": np.full(10, 0.9),
    "one differs": np.r_[np.full(9, 0.95), 0.75],
    "spread": np.linspace(0.85, 0.99, 10),
    "hundred classes": np.full(100, 0.9),
}


@pytest.mark.parametrize("name", WORST)
def test_the_interval_of_the_worst_class_holds_it(name: str) -> None:
    true = WORST[name]
    rng = np.random.default_rng(3)
    hits = []
    for _ in range(400):
        label = rng.integers(0, len(true), 2000)
        found = worst_class_interval(rng.random(2000) < true[label], label)
        assert found.low <= found.value <= found.high
        hits.append(found.low <= true.min() <= found.high)
    assert np.mean(hits) >= 0.95 - 3 * (0.05 * 0.95 / 400) ** 0.5  # exact and conservative: at least what it says
    if name == "one differs":
        assert found.high - found.low < 0.2  # 200 rows of the class that is the worst


def test_coverage_and_size_hold_the_truth_as_often_as_they_say() -> None:
    """The columns of the table: sets of 1, 2 or 3 classes that hold the label with .7, .85 and 1."""
    rng = np.random.default_rng(4)
    truth = {"coverage": 0.85, "size": 2.0, "single": 1 / 3, "mean_class_coverage": 0.85}
    hits: dict[str, list[bool]] = {key: [] for key in truth}
    for i in range(120):
        size = rng.integers(1, 4, 300)
        report = ClassSetReport(rng.random(300) < 0.55 + 0.15 * size, size, rng.integers(0, 5, 300))
        row = conformal_table({"LAC": report}, resamples=100, seed=i).cells["LAC"]
        for key, found in truth.items():
            hits[key].append(row[key].value.low <= found <= row[key].value.high)
    for key, each in hits.items():
        assert 0.90 <= np.mean(each) <= 0.985, key


@pytest.mark.parametrize(
    ("one", "kept", "words", "message"),
    [
        (arrays(50), arrays(50), [], "50 images of one are also in kept"),
        ({"u": np.arange(4.0)}, arrays(50), [], "one has no label"),
        (arrays(50), arrays(50, seed=1, classes=4), [], "logits [N, 4] are expected"),
        (arrays(50), {**arrays(50, seed=1), "label": np.full(50, 9)}, [], "from 0 to 5"),
        (arrays(50), arrays(50, seed=1), ["--alpha", "1"], "alpha=1.0 was given"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(one, kept, words, message, tmp_path, capsys) -> None:
    places = save(tmp_path, one=one, kept=kept)
    with pytest.raises(SystemExit) as stopped:
        main(["--data", places["one"], "--held-out", places["kept"], *words, *FEW])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
