"""The linear probe against scikit-learn, and what it does with rows it must not see."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from posthoc.adapters import linear_probe
from posthoc.adapters.errors import DataError
from posthoc.adapters.linear_probe import STRENGTHS, LinearProbe, fit_linear_probe, inverse_deviation


def problem(rows: int = 400, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 6] of different scales and offsets, and labels of 4 classes that depend on them."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(rows, 6))
    labels = (z @ rng.normal(size=(6, 4)) + noise * rng.gumbel(size=(rows, 4))).argmax(1)
    scale = 3.0 ** np.arange(-2, 4)  # all above a tenth of the median, where standardising begins to be limited
    return z * scale + 5.0 * scale, labels


def logits(probe: LinearProbe, features: np.ndarray) -> np.ndarray:
    found = features @ probe.weight.double().numpy().T + probe.bias.double().numpy()
    return found - found.mean(1, keepdims=True)


def reference(
    features: np.ndarray, labels: np.ndarray, strength: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """Centred logits of scikit-learn's logistic regression on standardised features, at the same objective."""
    z = (features - features.mean(0)) / features.std(0)
    total = len(labels) if weights is None else weights.sum()
    model = LogisticRegression(C=1.0 / (total * strength), tol=1e-10, max_iter=10_000)
    found = model.fit(z, labels, sample_weight=weights).decision_function(z)
    return found - found.mean(1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_agrees_with_scikit_learn_at_the_strength_it_chose(dtype: type) -> None:
    features, labels = problem()
    probe = fit_linear_probe(features.astype(dtype), labels)
    assert probe.strength in STRENGTHS
    assert probe.weight.dtype == torch.float32
    expected = reference(features, labels, probe.strength)
    np.testing.assert_allclose(logits(probe, features), expected, atol=1e-3 if dtype is np.float64 else 2e-2)


def test_soft_labels_weigh_the_classes() -> None:
    features, labels = problem(200)
    other = (labels + 1) % 4
    soft = 0.7 * np.eye(4)[labels] + 0.3 * np.eye(4)[other]
    probe = fit_linear_probe(features, soft)
    twice, weights = np.concatenate([labels, other]), np.repeat([0.7, 0.3], 200)
    expected = reference(np.concatenate([features, features]), twice, probe.strength, weights)[:200]
    np.testing.assert_allclose(logits(probe, features), expected, atol=1e-3)


def test_held_out_rows_choose_the_strength_and_nothing_else() -> None:
    features, labels = problem()
    held_out = np.arange(0, 400, 4)
    rest = np.setdiff1d(np.arange(400), held_out)
    probe = fit_linear_probe(features, labels, held_out=held_out)
    np.testing.assert_allclose(
        logits(probe, features[rest]), reference(features[rest], labels[rest], probe.strength), atol=1e-3
    )
    other = fit_linear_probe(features, labels, train=rest, held_out=held_out)
    assert torch.equal(other.weight, probe.weight)
    nll = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits(probe, features[held_out])), torch.from_numpy(labels[held_out])
    )
    assert probe.held_out_nll == pytest.approx(float(nll), abs=2e-3)


def test_labels_that_are_noise_call_for_more_strength_than_labels_that_are_not() -> None:
    features, labels = problem()
    clean = fit_linear_probe(features, labels)
    noise = fit_linear_probe(features, np.random.default_rng(1).permutation(labels))
    assert noise.strength > clean.strength
    assert clean.held_out_nll < 1.0 < noise.held_out_nll


def test_separable_labels_stay_finite() -> None:
    features, labels = problem(noise=0.0)
    probe = fit_linear_probe(features, labels)
    assert torch.isfinite(probe.weight).all()
    assert (logits(probe, features).argmax(1) == labels).mean() > 0.97


def test_a_dimension_that_never_moves_is_switched_off() -> None:
    features, labels = problem()
    features = np.concatenate([features, np.full((400, 1), 3.0)], 1)
    probe = fit_linear_probe(features, labels)
    assert (probe.weight[:, -1] == 0).all()


def test_chunks_and_memory_maps_change_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    features, labels = problem()
    np.save(tmp_path / "f.npy", features)
    whole = fit_linear_probe(features, labels)
    monkeypatch.setattr(linear_probe, "CHUNK_BYTES", 1)
    pieces = fit_linear_probe(np.load(tmp_path / "f.npy", mmap_mode="r"), labels)
    assert pieces.strength == whole.strength
    np.testing.assert_allclose(logits(pieces, features), logits(whole, features), atol=1e-4)


def test_the_seed_chooses_the_rows_that_choose() -> None:
    features, labels = problem(100)
    a, b, c = (fit_linear_probe(features, labels, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.weight, b.weight)
    assert a.held_out_nll == b.held_out_nll != c.held_out_nll


def test_classes_without_rows_are_made_room_for() -> None:
    features, labels = problem()
    probe = fit_linear_probe(features, labels, classes=6)
    assert probe.weight.shape == (6, 6)
    assert logits(probe, features).argmax(1).max() < 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": lambda y: y * 0}, "1 class"),
        ({"labels": lambda y: y - 1}, "from -1"),
        ({"labels": lambda y: y.astype(float)}, "float64"),
        ({"labels": lambda y: y[:5]}, "labels of shape"),
        ({"labels": lambda y: -np.eye(4)[y]}, "soft labels"),
        ({"labels": lambda y: np.eye(4)[y * 0]}, "1 class"),
        ({"features": lambda x: np.where(np.arange(6) == 2, np.nan, x)}, "NaN"),
        ({"features": lambda x: x[..., None]}, "expected"),
        ({"classes": lambda _: 3}, "classes=3"),
        ({"held_out": lambda _: np.arange(400)}, "rows on either side"),
        ({"held_out": lambda _: np.arange(0)}, "rows on either side"),
    ],
)
def test_unusable_data_is_refused(change: dict, message: str) -> None:
    features, labels = problem()
    values: dict = {"features": features, "labels": labels, "classes": None, "held_out": None}
    values |= {name: edit(values[name]) for name, edit in change.items()}
    with pytest.raises(DataError, match=message):
        fit_linear_probe(values["features"], values["labels"], classes=values["classes"], held_out=values["held_out"])


def test_small_deviations_are_floored_and_dead_dimensions_switched_off() -> None:
    std = torch.tensor([1.0, 2.0, 0.001, 0.0, 3.0])
    assert inverse_deviation(std).tolist() == pytest.approx([1.0, 0.5, 1.0 / 0.1, 0.0, 1.0 / 3.0])
