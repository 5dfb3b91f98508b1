"""Conformal sets: one class at a time by brute force, coverage over many splits, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import softmax

from posthoc.adapters.errors import DataError, OptionError
from posthoc.eval import conformal_sets as conformal
from posthoc.eval.conformal_sets import class_scores, conformal_quantile, fit_conformal, set_report, true_class_scores

METHODS = ["lac", "aps", "raps"]


def images(n: int, classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a classifier that is often wrong and, for the last classes, too sure."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    logits = 2.0 * np.eye(classes)[label] + rng.normal(size=(n, classes)) * (1.0 + 0.3 * label[:, None])
    return logits, label


def one_score(p: np.ndarray, c: int, method: str, u: float, penalty: float, free: int) -> float:
    if method == "lac":
        return 1.0 - p[c]
    before = [k for k in range(len(p)) if p[k] > p[c] or (p[k] == p[c] and k < c)]
    score = sum(p[k] for k in before) + (1.0 - u) * p[c]
    return score + (penalty * max(0, len(before) + 1 - free) if method == "raps" else 0.0)


@pytest.mark.parametrize(
    ("method", "randomised"), [("lac", False), ("aps", False), ("aps", True), ("raps", False), ("raps", True)]
)
def test_sets_one_class_at_a_time(method: str, randomised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformal, "NUMBERS", 50)  # several chunks
    logits, label = images(60)
    logits[5] = 0.0  # equal probabilities rank by class
    rule = {"method": method, "randomised": randomised, "penalty": 0.05, "free_ranks": 2}
    fitted = fit_conformal(logits[:40], label[:40], alpha=0.2, generator=np.random.default_rng(1), **rule)
    sets = fitted.sets(logits[40:], generator=np.random.default_rng(2))
    first, second = (np.random.default_rng(s).random(40) if randomised else np.zeros(40) for s in (1, 2))
    p = softmax(logits, axis=1)
    own = sorted(one_score(p[i], label[i], method, first[i], 0.05, 2) for i in range(40))
    threshold = own[math.ceil(41 * 0.8) - 1]
    np.testing.assert_allclose(fitted.threshold, threshold)
    for i in range(20):
        for c in range(6):
            assert sets[i, c] == (one_score(p[40 + i], c, method, second[i], 0.05, 2) <= threshold)
    report = set_report(sets, label[40:])
    assert report.size.tolist() == [int(row.sum()) for row in sets]
    assert report.covered.tolist() == [bool(row[y]) for row, y in zip(sets, label[40:], strict=True)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_coverage_over_many_splits(method: str, alpha: float) -> None:
    logits, label = images(4000)
    randomised = method != "lac"
    rng, n = np.random.default_rng(3), 150
    scores = true_class_scores(logits, label, method=method, randomised=randomised, generator=rng)
    covered = []
    for _ in range(800):
        order = rng.permutation(4000)
        covered.append((scores[order[n:]] <= conformal_quantile(scores[order[:n]], alpha)).mean())
    error = np.std(covered) / 800**0.5
    assert np.mean(covered) >= 1 - alpha - 3 * error
    assert np.mean(covered) <= 1 - alpha + 1 / (n + 1) + 3 * error


@pytest.mark.parametrize("method", METHODS)
def test_the_rule_covers_what_its_scores_do(method: str) -> None:
    logits, label = images(1200)
    fitted = fit_conformal(logits[:800], label[:800], method=method, alpha=0.1)
    scores = true_class_scores(logits[800:], label[800:], method=method)
    report = set_report(fitted.sets(logits[800:]), label[800:])
    np.testing.assert_array_equal(report.covered, scores <= fitted.threshold[0])
    assert report.summary()["coverage"] == pytest.approx(0.9, abs=0.05)
    assert 1.0 < report.summary()["size"] < 5.0


def test_class_conditional_sets_cover_every_class() -> None:
    logits, label = images(12_000)
    half = slice(0, 6000), slice(6000, None)
    plain = fit_conformal(logits[half[0]], label[half[0]], method="lac")
    within = fit_conformal(logits[half[0]], label[half[0]], method="lac", class_conditional=True)
    assert len(set(plain.threshold)) == 1
    reports = [set_report(rule.sets(logits[half[1]]), label[half[1]]).summary() for rule in (plain, within)]
    assert reports[0]["coverage"] == pytest.approx(0.9, abs=0.02)
    assert reports[0]["worst_class_coverage"] < 0.83  # the marginal promise is kept at the last classes' cost
    assert reports[1]["worst_class_coverage"] > 0.9 - 3 * (0.09 * 2 / 1000) ** 0.5
    for c in range(6):
        own = true_class_scores(logits[half[0]], label[half[0]], method="lac")[label[half[0]] == c]
        assert within.threshold[c] == conformal_quantile(own, 0.1)


def test_rare_classes_are_refused_by_name() -> None:
    logits, label = images(400)
    label[label == 4] = 3
    label[np.flatnonzero(label == 2)[8:]] = 1
    with pytest.raises(DataError, match=r"2 of 6 classes .* 9 calibration rows .*: class \(rows\) 2 \(8\), 4 \(0\)\."):
        fit_conformal(logits, label, class_conditional=True)
    label[np.flatnonzero(label == 1)[:1]] = 2
    label[np.flatnonzero(label == 3)[:9]] = 4
    assert np.isfinite(fit_conformal(logits, label, class_conditional=True).threshold).all()


def test_the_quantile_counts_the_new_image() -> None:
    scores = np.arange(1.0, 20.0)[::-1]  # 19
    assert conformal_quantile(scores, 0.1) == 18.0
    assert conformal_quantile(scores, 0.05) == 19.0
    assert conformal_quantile(scores, 0.049) == math.inf
    logits, label = images(8)
    assert fit_conformal(logits, label, alpha=0.1).sets(logits).all()  # eight rows: every class


def test_aps_gives_hard_images_more_classes_than_lac_does() -> None:
    p = np.array([[0.9, 0.06, 0.04], [0.4, 0.35, 0.25]])
    np.testing.assert_allclose(class_scores(p, "aps", None, 0.0, 0), [[0.9, 0.96, 1.0], [0.4, 0.75, 1.0]])
    np.testing.assert_allclose(class_scores(p, "raps", None, 0.1, 1), [[0.9, 1.06, 1.2], [0.4, 0.85, 1.2]])
    np.testing.assert_allclose(class_scores(p, "aps", np.array([1.0, 0.5]), 0.0, 0)[1], [0.2, 0.575, 0.875])
    np.testing.assert_allclose(class_scores(p, "lac", None, 0.0, 0), 1 - p)


def test_the_penalty_makes_large_sets_smaller() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 100, 4000)
    logits = 4.0 * np.eye(100)[label] + rng.normal(size=(4000, 100))
    size = {}
    for method in ("aps", "raps"):
        rule = fit_conformal(logits[:2000], label[:2000], method=method, penalty=0.05, free_ranks=3)
        size[method] = set_report(rule.sets(logits[2000:]), label[2000:]).summary()["size"]
    assert size["raps"] < size["aps"] - 1


X, Y = images(30)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit_conformal(X, Y, method="best"), OptionError, "'lac', 'aps', 'raps'"),
        (lambda: fit_conformal(X, Y, alpha=1.0), OptionError, "alpha=1"),
        (lambda: fit_conformal(X, Y, randomised=True), OptionError, "default_rng"),
        (lambda: fit_conformal(X, Y, penalty=-1.0), OptionError, "penalty=-1"),
        (lambda: fit_conformal(X, Y + 1), DataError, "from 0 to 5"),
        (lambda: fit_conformal(X, Y[:9]), DataError, "expected"),
        (lambda: fit_conformal(X[:0], Y[:0]), DataError, "no calibration rows"),
        (lambda: fit_conformal(np.where(X > 4, np.nan, X), Y), DataError, "rows"),
        (lambda: fit_conformal(X, Y).sets(X[:, :4]), DataError, r"\[N, 6\]"),
        (lambda: set_report(X, Y), DataError, "bool"),
        (lambda: set_report(X > 0, Y[:3]), DataError, "expected"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
