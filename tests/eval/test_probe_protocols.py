"""The papers' protocols: golden accuracies, their constants, and a plain torch loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc.adapters.errors import DataError, OptionError
from posthoc.eval import probe_protocols
from posthoc.eval.probe import _protocol
from posthoc.eval.probe_protocols import (
    IMAGENET100,
    TAU,
    SgdProbe,
    decoupled_uniformity_probe,
    sgd_probe,
    tau_nearest_label,
)
from posthoc.eval.probes import top_k_accuracy


def images(n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, n)
    return 2.0 * np.eye(4)[label] + 0.5 * rng.normal(size=(n, 4)), label


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_nearest_neighbour_accuracies_are_golden(shared: Path) -> None:
    golden = np.load(shared / "golden/tau/nn1_acc_tr120_va50_d8_c5_s185.npz")
    train, val = ([golden[f"{part}_view{i}"] for i in (1, 2)] for part in ("train", "val"))
    two = tau_nearest_label(train, golden["train_label"], val)
    assert (two == golden["val_label"]).mean() == pytest.approx(float(golden["acc_two_view"]), abs=1e-6)
    one = tau_nearest_label(train[:1], golden["train_label"], val[:1])
    assert (one == golden["val_label"]).mean() == pytest.approx(float(golden["acc_one_view_baseline"]), abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_the_probe_is_torchs_linear_layer_under_sgd(schedule: str) -> None:
    features, label = images(64)
    protocol = SgdProbe(lr=0.5, epochs=60, batch_size=64, weight_decay=0.01, schedule=schedule)  # whole batches
    found = sgd_probe(features, label, features, protocol, seeded())
    generator = seeded()
    layer = torch.nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(3, 4, generator=generator) - 0.5)
        layer.bias.copy_(torch.rand(3, generator=generator) - 0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    x, y = torch.from_numpy(features).float(), torch.from_numpy(label)
    best, bad = np.inf, 0
    for epoch in range(60):
        if schedule == "cosine":
            optimizer.param_groups[0]["lr"] = 0.25 * (1 + np.cos(np.pi * epoch / 60))
        loss = torch.nn.functional.cross_entropy(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule == "plateau":
            better = float(loss.detach()) < best * (1 - 1e-4)
            best, bad = (float(loss.detach()), 0) if better else (best, bad + 1)
            if bad > 10:
                optimizer.param_groups[0]["lr"] *= 0.1
                bad = 0
    assert optimizer.param_groups[0]["lr"] < 0.1  # either schedule has taken it down
    np.testing.assert_allclose(found, layer(x).detach(), rtol=1e-4, atol=1e-4)


def test_settled_losses_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    features, label = images()
    steps = []
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, n: steps.append(n) or split(self, n))
    sgd_probe(features, label, features, replace(IMAGENET100, settled=1e9), seeded())
    assert len(steps) == 21
    steps.clear()
    sgd_probe(features, label, features, replace(IMAGENET100, epochs=25), seeded())
    assert len(steps) == 25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    features, label = images()
    for probe in (
        lambda device: sgd_probe(features, label, features, IMAGENET100, seeded(), device),
        lambda device: decoupled_uniformity_probe(features, label, features, seeded(), device),
    ):
        np.testing.assert_allclose(probe("cuda"), probe("cpu"), rtol=1e-3, atol=1e-3)


def test_the_protocols_compute_where_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    features, label = images()
    monkeypatch.setattr(probe_protocols, "LARGE", 50)
    monkeypatch.setattr(probe_protocols, "DECAYS", (1e-3,))
    for protocol in ("tau", "decoupled-uniformity", "decoupled-uniformity-imagenet100"):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # a device that holds no numbers
            _protocol(protocol, features, label, features, 0, "meta")


def test_the_papers_constants() -> None:
    assert (TAU.lr, TAU.momentum, TAU.weight_decay, TAU.epochs, TAU.batch_size) == (1e-4, 0.9, 1e-6, 100, 256)
    assert TAU.schedule == "cosine"
    assert (IMAGENET100.lr, IMAGENET100.weight_decay, IMAGENET100.epochs) == (0.1 * 512 / 256, 0.0, 150)
    assert probe_protocols.STRENGTHS == (0.1, 1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6)


@pytest.mark.parametrize("large", [False, True])
def test_decoupled_uniformity_chooses_from_its_grid(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    features, label = images()
    if large:
        monkeypatch.setattr(probe_protocols, "LARGE", 50)
        monkeypatch.setattr(probe_protocols, "DECAYS", (1.0, 1e-3))
        monkeypatch.setattr(probe_protocols, "DECOUPLED_LARGE", replace(IMAGENET100, epochs=15))
    else:
        monkeypatch.setattr(probe_protocols, "STRENGTHS", (1e-6, 1.0))
    scores = decoupled_uniformity_probe(features[:80], label[:80] * 2, features[80:], seeded())
    assert scores.shape == (40, 5)
    assert np.isfinite(scores).all()
    assert top_k_accuracy(scores, label[80:] * 2) > 0.9
    if not large:
        assert np.exp(scores).sum(1) == pytest.approx(np.ones(40))


X, Y = images(30)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sgd_probe(X, Y[:4], X, TAU, seeded()), DataError, "lengths differ"),
        (lambda: sgd_probe(X, Y * 0, X, TAU, seeded()), DataError, "two classes"),
        (lambda: sgd_probe(X, Y, X[:, :2], TAU, seeded()), DataError, "4 dimensions"),
        (lambda: sgd_probe(X * 1e30, Y, X, IMAGENET100, seeded()), DataError, "scale the features"),
        (lambda: decoupled_uniformity_probe(X, np.arange(30) // 29, X, seeded()), DataError, r"classes \[1\]"),
        (lambda: sgd_probe(X, Y, X, replace(TAU, schedule="step"), seeded()), OptionError, "'cosine' or 'plateau'"),
        (lambda: tau_nearest_label([X] * 3, Y, [X] * 3), OptionError, "3 and 3 views"),
        (lambda: tau_nearest_label([X, X[:3]], Y, [X, X]), DataError, "view_1 30, view_2 3"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
