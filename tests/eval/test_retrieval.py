"""`posthoc eval retrieval`: tables against single metrics, galleries, copies, posteriors, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import posthoc
from posthoc.adapters.errors import DataError
from posthoc.adapters.features import Features
from posthoc.eval import retrieval, search
from posthoc.eval.credible_table import posterior
from posthoc.eval.inputs import Scored
from posthoc.eval.retrieval import main, retrieve

FEW = ["--resamples", "40"]


def arrays(n: int = 150, seed: int = 0, classes: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % classes
    kappa = rng.uniform(5, 60, n)
    z = 1.5 * np.eye(8)[label] + rng.normal(size=(n, 8)) / np.sqrt(kappa)[:, None] * 2
    return {"label": label, "embedding": z, "mine": 1 / kappa, "noise": rng.random(n), "concentration": kappa}


def save(folder: Path, **sets: dict[str, np.ndarray]) -> dict[str, str]:
    for name, one in sets.items():
        np.savez(folder / f"{name}.npz", **one)
    return {name: str(folder / f"{name}.npz") for name in sets}


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict]:
    main([*words, "--format", "json", *FEW])
    return json.loads(capsys.readouterr().out)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*words, *FEW])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("posthoc: ")
    assert told.count("\n") == 1
    return told


def by_hand(query, label, gallery, gallery_label, itself: bool) -> dict[str, list[float]]:
    """The metrics of each query, one at a time."""
    found: dict[str, list[float]] = {}
    for q in range(len(query)):
        cosine = gallery @ query[q] / np.linalg.norm(gallery, axis=1) / np.linalg.norm(query[q])
        order = [j for j in np.argsort(-cosine, kind="stable") if not (itself and j == q)]
        right = [bool(gallery_label[j] == label[q]) for j in order]
        r = sum(right)
        precision = [sum(right[: i + 1]) / (i + 1) * right[i] for i in range(len(right))]
        for k in (1, 5, 10):
            found.setdefault(f"recall_at_{k}", []).append(float(any(right[:k])) if r else np.nan)
        found.setdefault("map_at_r", []).append(sum(precision[:r]) / r if r else np.nan)
        at_10 = sum(precision[:10]) / min(10, r) if r else np.nan
        found.setdefault("map_at_10", []).append(at_10)
        found.setdefault("lam_map_at_10", []).append(at_10 if r else 1.0)
    return found


@pytest.mark.parametrize("itself", [True, False])
def test_tables_are_the_metrics_one_query_at_a_time(itself, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(retrieval, "HITS", 1000)  # several chunks of queries
    one, other = arrays(), arrays(90, seed=1)
    one["label"] = np.where(np.arange(150) == 7, 99, one["label"])  # a query without a true neighbour
    gallery = one if itself else other
    places = save(tmp_path, one=one, other=other)
    words = ["--data", places["one"], *([] if itself else ["--gallery", places["other"]])]
    first, second = run(words, capsys)
    wanted = by_hand(one["embedding"], one["label"], gallery["embedding"], gallery["label"], itself)
    row = first["scores"]["embedding"]
    assert set(row) == set(wanted)
    for key, values in wanted.items():
        assert row[key]["value"] == pytest.approx(np.nanmean(values)), key
        assert row[key]["low"] <= row[key]["value"] <= row[key]["high"]
    assert any(note.startswith("1 queries have no true neighbour") for note in first["notes"])
    assert any("were normalised" in note for note in first["notes"])
    assert first["with_truth"] == 149
    known = np.arange(150) != 7
    hit = np.array(wanted["recall_at_1"])[known].astype(bool)
    assert second["scores"]["mine"]["r_auroc"]["value"] == pytest.approx(roc_auc_score(~hit, one["mine"][known]))
    assert {"mine", "noise", "distance", "1/feature-norm"} <= set(second["scores"])
    assert "concentration" not in second["scores"]
    z = search.directions("z", one["embedding"])
    columns = z if itself else search.directions("z", gallery["embedding"])
    found = retrieve(z, one["label"], *([] if itself else [columns, other["label"]]))
    both = (one["mine"] + gallery["mine"][found.nearest])[known]
    order = np.argsort(both)
    assert second["scores"]["mine"]["lam_ausc"]["value"] == pytest.approx(_ausc(hit[order]), abs=0.01)
    near = np.einsum("qd,qd->q", z, columns[found.nearest])
    np.testing.assert_allclose(found.distance, 1 - near)


def _ausc(hit: np.ndarray) -> float:
    kept = [hit[: max(1, len(hit) - len(hit) * drop // 100)].mean() for drop in range(99)]
    return float(np.trapezoid(kept) / 98)


def test_map_at_r_is_that_of_pytorch_metric_learning() -> None:
    calculator = pytest.importorskip(
        "pytorch_metric_learning.utils.accuracy_calculator", reason="needs pytorch-metric-learning"
    )
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    one = arrays(200)
    z = search.directions("z", one["embedding"].astype(np.float32))
    theirs = calculator.AccuracyCalculator(include=("precision_at_1", "mean_average_precision_at_r"), k="max_bin_count")
    label = torch.from_numpy(one["label"])
    wanted = theirs.get_accuracy(torch.from_numpy(z), label)
    found = retrieve(z, one["label"]).values
    assert found["recall_at_1"].mean() == pytest.approx(wanted["precision_at_1"])
    assert found["map_at_r"].mean() == pytest.approx(wanted["mean_average_precision_at_r"])


def test_raw_pixels_of_omniglot(shared: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = shared / "data/omniglot_8_alphabets.parquet"
    if not path.is_file():
        pytest.skip("needs the Omniglot file of shared/data")
    table = parquet.read_table(path).to_pylist()
    for split, wanted in (("background_small1", 0.394), ("background_small2", 0.372)):
        rows = [row for row in table if row["split"] == split]
        pictures = [
            image.open(io.BytesIO(row["image"]["bytes"])).convert("L").resize((28, 28), image.BILINEAR) for row in rows
        ]
        pixels = 255.0 - np.stack([np.asarray(one, dtype=np.float32).ravel() for one in pictures])
        label = np.array([row["label"] for row in rows])
        found = retrieve(search.directions("pixels", pixels), label)
        assert found.values["recall_at_1"].mean() == pytest.approx(wanted, abs=0.01)  # their resize is not known


def test_credible_sets_and_votes(tmp_path, capsys) -> None:
    one, gallery, held_out = arrays(300), arrays(200, seed=1), arrays(400, seed=2)
    one["label"][:3] = 77
    places = save(tmp_path, one=one, gallery=gallery, held=held_out)
    words = ["--data", places["one"], "--gallery", places["gallery"], "--credible", "0.9"]
    *_, nominal = run(words, capsys)
    assert list(nominal["scores"]) == ["posterior cap (uncalibrated)"]
    assert any("none claims coverage" in note for note in nominal["notes"])
    *_, votes, sets = run([*words, "--held-out", places["held"], "--draws", "10", "--loss", "none"], capsys)
    assert list(sets["scores"]) == ["posterior cap (uncalibrated)", "conformal", "pac"]
    assert sets["scores"]["posterior cap (uncalibrated)"] == nominal["scores"]["posterior cap (uncalibrated)"]
    for mode in ("conformal", "pac"):
        assert sets["scores"][mode]["none"]["value"] <= 0.1 + 0.06
        assert sets["scores"][mode]["everything"]["value"] < 1
    assert any(note.startswith("3 queries without a true neighbour") for note in sets["notes"])
    assert votes["rows"] == 297
    assert 0.5 < votes["scores"]["votes"]["accuracy"]["value"] < 1
    assert votes["scores"]["votes"]["vote_ece"]["high"] > 0
    *_, both = run([*words, "--uncertain-gallery"], capsys)
    size = [t["scores"]["posterior cap (uncalibrated)"]["size"]["value"] for t in (nominal, both)]
    assert size[0] < size[1]  # a wider cap


def test_posteriors_of_a_fitted_head() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(120) % 4
    features = Features.from_arrays(
        (3 * np.eye(192)[label] + rng.normal(size=(120, 192))).astype(np.float32), label=label
    )

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(192, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(1))

    model = posthoc.wrap(Flat(), "kappa", transform=lambda _: torch.zeros(3, 8, 8))
    model.fit(features, epochs=1, batch_size=40)
    mean, kappa, whose = posterior(Scored("x", {}, label, embedding=features.embedding, features=features, model=model))
    assert whose == "kappa"
    assert mean.shape == (120, mean.shape[1])
    np.testing.assert_allclose(np.linalg.norm(mean, axis=1), 1, rtol=1e-5)
    assert (kappa > 0).all()
    with pytest.raises(DataError, match="has no posteriors"):
        posterior(Scored("x", {}, label, embedding=features.embedding))


def test_copies_are_reported(tmp_path, capsys) -> None:
    one, other = arrays(60), arrays(60, seed=1)
    one["embedding"][1] = one["embedding"][0]
    other["embedding"][:4] = one["embedding"][:4]
    places = save(tmp_path, one=one, other=other)
    first = run(["--data", places["one"]], capsys)[0]
    assert "2 queries have a first neighbour with an equal embedding: copies?" in first["notes"]
    first = run(["--data", places["one"], "--gallery", places["other"]], capsys)[0]
    assert "4 queries are also in the gallery, and find themselves (first: row 0)" in first["notes"]
    assert "every image of one is also in" in refused(["--data", places["one"], "--gallery", places["one"]], capsys)


def changed(**new: np.ndarray) -> dict[str, np.ndarray]:
    return {**arrays(40), **new}


@pytest.mark.parametrize(
    ("one", "words", "message"),
    [
        (
            changed(embedding=np.zeros((40, 8))),
            [],
            "40 of 40 rows are 0 and have no direction (rows 0, 1, 2, 3, 4, ...)",
        ),
        (changed(embedding=np.where(np.arange(320).reshape(40, 8) == 24, np.nan, 1.0)), [], "(rows 3)"),
        (changed(embedding=np.ones((40, 8))), [], "is the same: nothing"),
        (changed(label=np.arange(40)), [], "no query has a true neighbour"),
        (changed(label=np.eye(40)), [], "one class for each image"),
        ({"u": np.arange(5.0)}, [], "has no embedding"),
        ({k: v[:1] for k, v in arrays(40).items()}, [], "at least two images"),
        (arrays(40), ["--credible", "0.9"], "needs --gallery"),
        (arrays(40), ["--held-out", "x.npz"], "give --credible"),
        (arrays(40), ["--draws", "1"], "expected at least 2"),
        (arrays(40), ["--gallery", "{wide}"], "shape (40, 8) and (30, 9)"),
        (arrays(40), ["--gallery", "{other}", "--credible", "1.5"], "between 0 and 1"),
        (arrays(40), ["--gallery", "{other}", "--credible", "0.9", "--held-out", "{other}"], "are also in other"),
        ({k: v for k, v in arrays(40).items() if k != "concentration"}, ["--draws", "5"], "has no posteriors"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(one, words, message, tmp_path, capsys) -> None:
    wide = {"label": np.arange(30) % 3, "embedding": np.random.default_rng(0).normal(size=(30, 9))}
    places = save(tmp_path, one=one, wide=wide, other=arrays(30, seed=3))
    assert message in refused(["--data", places["one"], *(word.format(**places) for word in words)], capsys)


def test_constant_scores_and_perfect_retrieval(tmp_path, capsys) -> None:
    one = changed(mine=np.ones(40))
    _, second = run(["--data", save(tmp_path, one=one)["one"]], capsys)
    assert "left out mine: the same for every query" in second["notes"]
    sure = {"label": np.arange(40) % 4, "embedding": np.eye(4)[np.arange(40) % 4] + 0.01 * one["embedding"][:, :4]}
    (only,) = run(["--data", save(tmp_path, sure=sure)["sure"]], capsys)
    assert only["scores"]["embedding"]["recall_at_1"]["value"] == 1
    with pytest.raises(DataError, match="a gallery and its labels"):
        retrieve(np.eye(2), np.arange(2), np.eye(2))
    with pytest.raises(DataError, match="one for each of 2 rows"):
        retrieve(np.eye(2), np.arange(3))
