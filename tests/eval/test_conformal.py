"""`posthoc eval conformal`: the promised coverage, tables against the sets themselves, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from posthoc.eval.conformal import ClassCoverage, main
from posthoc.eval.conformal_sets import fit_conformal, set_report

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
