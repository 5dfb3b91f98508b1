"""Metrics, detectors and retrieval of `posthoc.eval` beside pytorch-ood, torchmetrics, scikit-learn and pytorch-metric-learning.

    python benchmarks/eval.py --threads 1 --output eval.json >table.md
    python benchmarks/eval.py --only detector          # cases whose names begin so

Each side of each case runs in a process of its own, on the same seeded numbers, after one small call that is not timed.
Times are CPU and wall seconds of one call, memory is the peak of the process beyond imports and inputs, "ratio" is their
CPU time over ours, "gap" the largest difference of the numbers (relative to the largest of theirs). Where a side is given
fewer rows (column "theirs N") its time is projected to the case's own number, linear in the rows. pytorch-metric-learning is
needed for the retrieval cases alone (`pip install pytorch-metric-learning`); without it these are skipped. What was measured
is kept in --output, and only what is missing there is run: some 5 minutes on an idle core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beside import run_cases

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """`build(side, rows)` gives a call that answers numbers; `theirs`: rows the other side gets, where it is slow."""

    name: str
    other: str
    build: Callable[[str, int], Call]
    rows: int
    theirs: int | None = None
    small: int = 500


def ood_scores(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=rows), rng.normal(size=rows) + 1


def ood_metrics(side: str, rows: int) -> Call:
    """AUROC, both AUPR and FPR95 of N ID and N OOD scores."""
    inside, outside = ood_scores(rows)
    if side == "ours":
        from posthoc.eval.ood_statistics import OodMetrics

        wanted = [OodMetrics.NAMES.index(name) for name in ("auroc", "aupr_in", "aupr_out", "fpr95")]
        return lambda: OodMetrics(inside, outside).value()[wanted]
    from pytorch_ood.metrics import OODMetrics

    scores = torch.from_numpy(np.concatenate([inside, outside]))
    label = torch.from_numpy(np.repeat([0, -1], rows))

    def theirs() -> list[float]:
        metrics = OODMetrics()
        metrics.update(scores, label)
        found = metrics.compute()
        return [float(found[key]) for key in ("AUROC", "AUPR-IN", "AUPR-OUT", "FPR95TPR")]

    return theirs


def interval(side: str, rows: int) -> Call:
    """AUROC's bootstrap interval, 1000 resamples; theirs: scikit-learn in a loop, 20 resamples, projected by the caller."""
    inside, outside = ood_scores(2000)
    if side == "ours":
        from posthoc.eval.bootstrap import bootstrap
        from posthoc.eval.statistics import Auroc

        return lambda: [bootstrap(Auroc(inside, outside), resamples=max(rows, 2)).value]
    from sklearn.metrics import roc_auc_score

    def theirs() -> list[float]:
        rng = np.random.default_rng(0)
        label = np.repeat([0, 1], 2000)
        for _ in range(rows):
            a, b = rng.integers(0, 2000, (2, 2000))
            roc_auc_score(label, np.concatenate([inside[a], outside[b]]))
        return [float(roc_auc_score(label, np.concatenate([inside, outside])))]

    return theirs


def calibration(side: str, rows: int) -> Call:
    """ECE of N images of 100 classes, from logits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, 100)).astype(np.float32) * 3
    label = rng.integers(0, 100, rows)
    if side == "ours":
        from posthoc.eval import metrics

        return lambda: [metrics.ece(*metrics.confidence_and_correct(logits, label))]
    from torchmetrics.functional.classification import multiclass_calibration_error

    z, y = torch.from_numpy(logits), torch.from_numpy(label)
    return lambda: [float(multiclass_calibration_error(z.softmax(1), y, 100, n_bins=15))]


def network(rows: int, dim: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rectified features of classes that differ, and their labels."""
    means = np.random.default_rng(9).normal(size=(classes, dim)).astype(np.float32)
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % classes
    return np.maximum(means[label] + rng.standard_normal((rows, dim), dtype=np.float32), 0), label


def detector(name: str, dim: int, classes: int, training: int) -> Callable[[str, int], Call]:
    """Scores of N images by a detector that is fitted beforehand."""

    def build(side: str, rows: int) -> Call:
        f, label = network(training, dim, classes, 1)
        x = network(rows, dim, classes, 2)[0]
        weight = np.random.default_rng(3).standard_normal((classes, dim), dtype=np.float32) / dim**0.5
        if side == "ours":
            from posthoc.eval import baselines
            from posthoc.eval.detectors import Training, fit_detectors

            if name == "kNN":  # as the distance of unit vectors
                return lambda: np.sqrt(2 * baselines.knn(x, f, k=50))
            fitted = fit_detectors(Training(f, label, weight, np.zeros(classes, np.float32)), [name])
            return lambda: fitted.scores(x)[name]
        from pytorch_ood import detector as module

        head = torch.nn.Linear(dim, classes)
        head.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.zeros(classes)})
        made = {
            "kNN": lambda: module.KNN(None, k=50),
            "DICE": lambda: module.DICE(None, head.weight, head.bias, 0.7),
            "Mahalanobis": lambda: module.Mahalanobis(None),
            "GMM": lambda: module.GMM(None),
            "GradNorm": lambda: module.GradNorm(head, lambda part: part == "weight"),
        }[name]()
        images = torch.from_numpy(x)
        if name == "GradNorm":
            return lambda: made.predict(images).numpy()
        made.fit_features(torch.from_numpy(f), torch.from_numpy(label))
        return lambda: made.predict_features(images).numpy()

    return build


def retrieval(side: str, rows: int) -> Call:
    """Recall@1 and MAP@R of N x 128 unit vectors of 200 classes, each query among all the others."""
    rng = np.random.default_rng(0)
    label = np.arange(rows) % 200
    x = rng.normal(size=(200, 128))[label] * 0.5 + rng.normal(size=(rows, 128))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    if side == "ours":
        from posthoc.eval.retrieval_statistics import label_hits, map_at_r, recall_at
        from posthoc.eval.search import neighbours

        def ours() -> list[float]:
            most = int(np.bincount(label).max()) - 1
            hits, positives = label_hits(neighbours(x, k=most), label)
            return [recall_at(hits, 1), map_at_r(hits, positives)]

        return ours
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    vectors, classes = torch.from_numpy(x), torch.from_numpy(label)

    def theirs() -> list[float]:
        found = calculator.get_accuracy(vectors, classes)
        return [float(found[name]) for name in names]

    return theirs


def cases() -> list[Case]:
    big, wide = (512, 100, 20_000), (1280, 1000, 5_000)
    return [
        Case("metrics auroc, aupr, fpr95 N100000", "pytorch-ood", ood_metrics, 100_000),
        Case("metrics ece N50000 C100", "torchmetrics", calibration, 50_000),
        Case("metrics auroc interval N2000, 1000 resamples", "scikit-learn", interval, 1000, 20, small=2),
        Case("detector kNN N2000 M20000 D512", "pytorch-ood", detector("kNN", *big), 2000),
        Case("detector Mahalanobis N2000 D512 C100", "pytorch-ood", detector("Mahalanobis", *big), 2000),
        Case("detector DICE N2000 D1280 C1000", "pytorch-ood", detector("DICE", *wide), 2000, 500, small=50),
        Case(
            "detector GMM N2000 M2400 D1280 C200", "pytorch-ood", detector("GMM", 1280, 200, 2400), 2000, 200, small=50
        ),
        Case("detector GradNorm N2000 D1280 C1000", "pytorch-ood", detector("GradNorm", *wide), 2000, 200, small=50),
        Case("retrieval recall@1, MAP@R 20000 x 128", "pytorch-metric-learning", retrieval, 20_000, small=2000),
    ]


def peak_mb(start_anew: bool = False) -> float:
    """Largest resident memory since it was last started anew (Linux)."""
    if start_anew:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure(case: Case, side: str) -> dict[str, Any]:
    rows = case.rows if side == "ours" or case.theirs is None else case.theirs
    case.build(side, case.small)()  # imports and first calls
    call = case.build(side, rows)
    before, cpu, wall = peak_mb(start_anew=True), time.process_time(), time.perf_counter()
    values = np.asarray(call(), dtype=np.float64)
    cpu, wall, scale = time.process_time() - cpu, time.perf_counter() - wall, case.rows / rows
    kept = values[: min(len(values), case.theirs or len(values))]
    return {"cpu": cpu * scale, "wall": wall * scale, "memory": peak_mb() - before, "values": kept.tolist()}


def line(case: Case, found: dict[str, Any]) -> str:
    cells = [case.name, case.other]
    for side in ("ours", "theirs"):
        one = found.get(side)
        if isinstance(one, dict):
            cells += [f"{one['cpu']:.3g}", f"{one['wall']:.3g}", f"{one['memory']:.0f}"]
        else:
            cells += [str(one), "", ""]
    ours, theirs = found.get("ours"), found.get("theirs")
    if isinstance(ours, dict) and isinstance(theirs, dict):
        a, b = (np.array(one["values"]) for one in (ours, theirs))
        a, b = a[: len(b)], b[: len(a)]
        if case.name.startswith("detector Mahalanobis"):
            a = a * (b @ a) / (a @ a)  # up to a factor, which ranks alike
        gap = f"{np.abs(a - b).max() / np.abs(b).max():.0e}"
        cells += [str(case.theirs or case.rows), f"{theirs['cpu'] / max(ours['cpu'], 1e-9):.1f}", gap]
    else:
        cells += ["", "", ""]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    run_cases(
        __file__,
        __doc__,
        cases(),
        measure,
        sides=lambda _: ("ours", "theirs"),
        header="seconds, and MB beyond imports and inputs",
        columns=[
            "case",
            "beside",
            "ours CPU",
            "wall",
            "memory",
            "theirs CPU",
            "wall",
            "memory",
            "theirs N",
            "ratio",
            "gap",
        ],
        line=line,
        threads=1,
    )


if __name__ == "__main__":
    main()
