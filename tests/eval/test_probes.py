"""Probes against scikit-learn, brute force and golden numbers, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.linear_probe import fit_linear_probe
from posthoc.eval import probes
from posthoc.eval.probes import linear_probe, nearest_label, neighbour_votes, top_k_accuracy


def images(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, n)
    return 1.2 * np.eye(6)[label] + 0.5 * rng.normal(size=(n, 6)), label


def test_top_k_accuracy_is_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/decoupled_uniformity/topk_accuracy_n60_c12_s270.npz")
    for k, percent in zip(golden["topk"], golden["acc"], strict=True):
        assert 100 * top_k_accuracy(golden["scores"], golden["target"], int(k)) == pytest.approx(percent, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(3, 6), st.data())
def test_top_k_accuracy_is_scikit_learns(n: int, classes: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    scores, label = rng.normal(size=(n, classes)), rng.integers(0, classes, n)
    for k in range(1, classes):
        theirs = top_k_accuracy_score(label, scores, k=k, labels=np.arange(classes))
        assert top_k_accuracy(scores, label, k) == pytest.approx(theirs)
    assert top_k_accuracy(scores, label, classes) == 1.0
    assert top_k_accuracy(np.zeros((2, 3)), np.array([0, 2]), 2) == 0.5  # of equal ones the smaller class


@pytest.mark.parametrize("temperature", [None, 0.07, 1.0])
def test_votes_are_scikit_learns(temperature: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "VOTES", 1000)  # several chunks
    features, label = images()

    def weigh(distance: np.ndarray) -> np.ndarray:  # of unit vectors: |u - v|^2 = 2 - 2 cos
        return np.exp(-(distance**2) / 2 / temperature) if temperature else np.ones_like(distance)

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    theirs = KNeighborsClassifier(15, weights=weigh, algorithm="brute").fit(unit[:200], label[:200])
    votes = neighbour_votes(7.0 * features[:200], label[:200], features[200:], k=15, temperature=temperature)
    np.testing.assert_allclose(votes / votes.sum(1, keepdims=True), theirs.predict_proba(unit[200:]), atol=1e-9)
    assert top_k_accuracy(votes, label[200:]) > 0.6
    one = neighbour_votes(features[:200], label[:200], features[200:], k=1)
    np.testing.assert_array_equal(one.argmax(1), nearest_label(features[:200], label[:200], features[200:]))


def test_the_nearest_one_by_cosine_or_by_dot_product() -> None:
    train, label = np.array([[1.0, 0.0], [3.0, 3.0]]), np.array([0, 1])
    assert nearest_label(train, label, [[1.0, 0.1]]).tolist() == [0]
    assert nearest_label(train, label, [[1.0, 0.1]], normalise=False).tolist() == [1]


def test_the_linear_probe_is_the_adapters() -> None:
    features, label = images(240)
    logits, probe = linear_probe(features[:120], label[:120], features[120:], seed=3)
    again = fit_linear_probe(features[:120], label[:120], seed=3)
    np.testing.assert_array_equal(probe.weight, again.weight)
    assert probe.strength == again.strength
    np.testing.assert_allclose(
        logits, features[120:] @ again.weight.numpy().T + again.bias.numpy(), rtol=1e-4, atol=1e-5
    )
    assert top_k_accuracy(logits, label[120:]) > 0.7


X, Y = images(30)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: neighbour_votes(X, Y[:5], X), DataError, "lengths differ"),
        (lambda: neighbour_votes(X, Y * 0.5, X), DataError, "whole numbers"),
        (lambda: neighbour_votes(X, Y, X[:, :3]), DataError, "6 dimensions and the test features 3"),
        (lambda: neighbour_votes(X, Y, X, k=31), DataError, "k <= 30"),
        (lambda: neighbour_votes(X, Y, X, temperature=0.0), OptionError, "temperature=0"),
        (lambda: neighbour_votes(X, Y, X * (np.arange(30) != 4)[:, None]), DataError, r"1 of 30 rows .*\(rows 4\)"),
        (lambda: nearest_label(np.where(X > 1.5, np.nan, X), Y, X), DataError, "not finite"),
        (lambda: nearest_label(X[:0], Y[:0], X), DataError, "at least one row"),
        (lambda: linear_probe(X, Y * 0, X), DataError, "two"),
        (lambda: linear_probe(X, Y, X[:, :2]), DataError, "2 dimensions"),
        (lambda: top_k_accuracy(X, Y, 7), OptionError, "1 to 6"),
        (lambda: top_k_accuracy(X, Y + 9), DataError, "from 0 to 5"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
