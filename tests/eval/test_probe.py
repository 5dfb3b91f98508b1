"""`posthoc eval probe`: accuracies of the probes themselves, their notes, protocols, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from posthoc.adapters.errors import OptionError
from posthoc.adapters.linear_probe import fit_linear_probe
from posthoc.eval.probe import main, probe_table, run_probes
from posthoc.eval.probes import nearest_label, neighbour_votes, top_k_accuracy

FEW = ["--resamples", "40"]


def arrays(n: int = 140, seed: int = 0, classes: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % classes
    return {"label": label, "embedding": (2.0 * np.eye(9)[label] + rng.normal(size=(n, 9))).astype(np.float32)}


def save(folder: Path, **sets: dict[str, np.ndarray]) -> dict[str, str]:
    for name, one in sets.items():
        np.savez(folder / f"{name}.npz", **one)
    return {name: str(folder / f"{name}.npz") for name in sets}


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    main([*words, "--format", "json", *FEW])
    (table,) = json.loads(capsys.readouterr().out)
    return table


def test_accuracies_are_those_of_the_probes(tmp_path, capsys) -> None:
    train, test = arrays(), arrays(105, seed=1)
    places = save(tmp_path, train=train, test=test)
    table = run(["--train", places["train"], "--data", places["test"], "--k", "15"], capsys)
    x, y, other, label = train["embedding"], train["label"], test["embedding"], test["label"]
    probe = fit_linear_probe(x, y, seed=0)
    logits = other @ probe.weight.numpy().T + probe.bias.numpy()
    votes = neighbour_votes(x, y, other, k=15)
    for name, scores in (("linear", logits), ("kNN (k=15)", votes)):
        row = table["scores"][name]
        assert row["accuracy"]["value"] == pytest.approx(top_k_accuracy(scores, label))
        assert row["top_5"]["value"] == pytest.approx(top_k_accuracy(scores, label, 5))
    one = table["scores"]["1-NN"]
    assert one["accuracy"]["value"] == pytest.approx((nearest_label(x, y, other) == label).mean())
    assert "top_5" not in one
    assert one["accuracy"]["minus_reference"]["value"] == pytest.approx(
        one["accuracy"]["value"] - table["scores"]["linear"]["accuracy"]["value"]
    )
    assert any(f"L2 strength {probe.strength:g} " in note for note in table["notes"])


def test_protocols_labels_of_any_kind_and_unseen_classes(tmp_path, capsys) -> None:
    train, test = arrays(classes=3), arrays(60, seed=1, classes=4)
    for one in (train, test):
        one["label"] = 10 * one["label"] + 5
    places = save(tmp_path, train=train, test=test)
    words = ["--train", places["train"], "--data", places["test"]]
    table = run([*words, "--protocol", "tau-1nn", "decoupled-uniformity"], capsys)
    assert set(table["scores"]) == {"linear", "kNN (k=20)", "1-NN", "tau-1nn", "decoupled-uniformity"}
    assert "15 test images are of classes without a training image, and always wrong" in table["notes"]
    for row in table["scores"].values():
        assert 0.4 < row["accuracy"]["value"] <= 0.75
    x, y = train["embedding"], train["label"] // 10
    by_hand = y[(test["embedding"] @ x.T).argmax(1)] == test["label"] // 10
    assert table["scores"]["tau-1nn"]["accuracy"]["value"] == pytest.approx(by_hand.mean())
    with pytest.raises(OptionError, match="protocol 'moco' is unknown"):
        run_probes(x, y, x, protocols=["moco"])


def test_sgd_protocols_are_seeded() -> None:
    one = arrays(60, classes=3)
    x, y = one["embedding"], one["label"]
    for protocol in ("tau", "decoupled-uniformity-imagenet100"):
        first, second = (run_probes(x, y, x, protocols=[protocol], seed=s)[0][protocol] for s in (1, 1))
        np.testing.assert_array_equal(first, second)
    assert top_k_accuracy(first, y) > 0.9


def test_only_a_difference_beyond_its_interval_is_marked() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 300)
    right = np.where(rng.random(300) < 0.6, label, (label + 1) % 3)
    table = probe_table({"linear": right, "same": right, "better": label}, label, resamples=50)
    assert [row["accuracy"].better for row in table.cells.values()] == [False, False, True]


@pytest.mark.parametrize(
    ("train", "test", "words", "message"),
    [
        (arrays(), arrays(), [], "every image of test is also in train"),
        (arrays(), {"embedding": np.ones((4, 3)), "label": np.arange(4)}, [], "9 dimensions and test 3"),
        (arrays(), {**arrays(20, 1), "label": np.arange(20) + 50}, [], "no class of test occurs in train"),
        (arrays(), {**arrays(20, 1), "label": np.arange(20) / 7}, [], "label is no whole number"),
        (arrays(), {"u": np.arange(4.0)}, [], "test has no embedding"),
        (arrays(), arrays(20, 1), ["--features", "penultimate"], "has no penultimate"),
        ({**arrays(), "label": np.zeros(140, int)}, arrays(20, 1), [], "at least two"),
        (arrays(), arrays(20, 1), ["--protocol", "x"], "'x' is unknown"),
        (arrays(), arrays(20, 1), ["--k", "0"], "at least 1"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(train, test, words, message, tmp_path, capsys) -> None:
    places = save(tmp_path, train=train, test=test)
    with pytest.raises(SystemExit) as stopped:
        main(["--train", places["train"], "--data", places["test"], *words, *FEW])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("posthoc: ")
    assert message in told
