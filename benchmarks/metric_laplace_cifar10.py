"""Uncertain embeddings on CIFAR-10: retrieval, unseen data, calibration of votes, and what the posterior's scale does.

    python benchmarks/metric_laplace_cifar10.py --shared ../shared --data DATA --output metric_cifar10.json

Prints the tables of docs/metric_learning.md; on one core some 3 minutes a seed. DATA is where `shared/data/get_data.py` has
put CIFAR-10 (it is called when the file is missing), and where features are kept.

Features of the 10,000 TEST images come from the pretrained ResNet-20 (D = 64). Each seed puts half of each class aside:
all methods are trained on the one half (a tenth of it held out for early stopping and the prior precision) and
evaluated on the other, where every image queries all the others. No OOD image plays any part in a fit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import extract_all, resnet

from posthoc.adapters.embedding_baselines import (
    DeepEnsemble,
    Deterministic,
    EmbeddingData,
    HedgedInstance,
    Laplace,
    MCDropout,
    ProbabilisticFace,
)
from posthoc.adapters.metric_curvature import APPROXIMATIONS, LOSSES
from posthoc.adapters.metric_predictive import MetricEmbedding
from posthoc.adapters.training import TrainOptions
from posthoc.eval import metrics, search
from posthoc.eval import retrieval_statistics as retrieval

SCALES = [10.0**k for k in range(-3, 4)]
COLUMNS = ("mAP@5", "mAP@10", "recall@1", "vote ECE", "AUSC")


def split(label: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on and rows to evaluate on: half of each class."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.flatnonzero(label == c)) for c in np.unique(label)])
    return np.sort(order[::2]), np.sort(order[1::2])


def prepare(
    x: np.ndarray, label: np.ndarray, fitting: np.ndarray, seed: int
) -> tuple[EmbeddingData, np.ndarray, float]:
    """Training data on centred features of unit mean square; with the centre and the factor."""
    center = x[fitting].mean(0)
    gain = 1.0 / float(np.sqrt(np.square(x[fitting] - center).mean()))
    shuffled = np.random.default_rng(seed + 1000).permutation(fitting)
    held_out, train = np.split(shuffled, [len(shuffled) // 10])
    options = TrainOptions(batch_size=256, seed=seed, progress=False, epochs=40)
    data = EmbeddingData((x - center) * gain, label, np.sort(train), np.sort(held_out), dim=32, options=options)
    return data, center, gain


def methods(data: EmbeddingData) -> Iterator[tuple[str, Any]]:
    """Fitted methods by name; post-hoc Laplace variants stand on the deterministic embedding."""
    plain = Deterministic()
    plain.fit(data)
    yield "deterministic", plain
    others = {
        "MC dropout": MCDropout(),
        "deep ensemble": DeepEnsemble(),
        "PFE": ProbabilisticFace(),
        "HIB": HedgedInstance(),
    }
    for name, made in others.items():
        made.fit(data)
        yield name, made
        if isinstance(made, DeepEnsemble):
            made.align = False
            yield "deep ensemble, not aligned", made
    for loss in LOSSES:
        for approximation in APPROXIMATIONS:
            made = Laplace(network=plain.network, loss=loss, approximation=approximation)
            made.fit(data)
            yield f"Laplace {approximation}, {loss}", made
            made = Laplace(online=True, loss=loss, approximation=approximation)
            made.fit(data)
            yield f"Laplace {approximation}, {loss}, online", made


def embed(method: Any, x: np.ndarray) -> MetricEmbedding:
    return method.embed(torch.from_numpy(x))


def judge(answer: MetricEmbedding, label: np.ndarray, ood: dict[str, MetricEmbedding]) -> dict[str, float]:
    """All columns of the table; uncertainty in two forms: 1 - R^2, and the paper's sum of standard deviations."""
    nearest = search.neighbours(answer.mean_direction, k=10)
    hits, positives = retrieval.label_hits(nearest, label)
    row = {
        "mAP@5": retrieval.map_at(hits, positives, 5),
        "mAP@10": retrieval.map_at(hits, positives, 10),
        "recall@1": retrieval.recall_at(hits, 1),
    }
    assert answer.samples is not None
    predicted, confidence = retrieval.vote_confidence(retrieval.votes(answer.samples, label))
    row["vote ECE"] = retrieval.vote_ece(confidence, predicted == label)
    row["vote accuracy"], row["vote confidence"] = float((predicted == label).mean()), float(confidence.mean())
    row["AUSC"] = retrieval.ausc(retrieval.retrieval_uncertainty(answer.uncertainty, nearest), hits[:, 0])
    if float(answer.uncertainty.max()) > float(answer.uncertainty.min()):
        for name, other in ood.items():
            row[f"AUROC {name}"] = metrics.auroc(answer.uncertainty, other.uncertainty)
            row[f"AUROC (sum of std) {name}"] = metrics.auroc(answer.spread.sum(-1), other.spread.sum(-1))
    return row


def scale_sweep(
    method: Laplace, x: np.ndarray, label: np.ndarray, ood: dict[str, np.ndarray], with_prior: bool
) -> list[dict[str, float]]:
    """The row of the table with the curvature, or curvature and prior alike, times each of seven powers of ten."""
    posterior = method.posterior
    kept = {name: buffer.clone() for name, buffer in posterior.state_dict().items()}
    rows = []
    for factor in SCALES:
        posterior.curvature_weight.copy_(kept["curvature_weight"] * factor)
        posterior.curvature_bias.copy_(kept["curvature_bias"] * factor)
        posterior.prior_precision.copy_(kept["prior_precision"] * (factor if with_prior else 1.0))
        rows.append(judge(embed(method, x), label, {name: embed(method, other) for name, other in ood.items()}))
    posterior.load_state_dict(kept)
    return rows


def one_seed(x: np.ndarray, label: np.ndarray, ood: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    fitting, scored = split(label, seed)
    data, center, gain = prepare(x, label, fitting, seed)
    inputs = ((x - center) * gain)[scored]
    outside = {name: (other - center) * gain for name, other in ood.items()}
    table, sweep = {}, {}
    for name, method in methods(data):
        start = time.process_time()
        answers = {place: embed(method, other) for place, other in outside.items()}
        table[name] = judge(embed(method, inputs), label[scored], answers)
        if isinstance(method, Laplace):
            table[name]["prior precision"] = float(method.posterior.prior_precision)
            table[name]["negative curvature"] = float((method.posterior.curvature_weight < 0).float().mean())
            if name.endswith("euclidean"):
                for what, with_prior in (("curvature and prior", True), ("curvature", False)):
                    sweep[f"{name}: {what}"] = scale_sweep(method, inputs, label[scored], outside, with_prior)
        print(f"seed {seed}: {name} ({time.process_time() - start:.0f} s): {table[name]}", flush=True)
    return {"table": table, "sweep": sweep}


def show(results: dict[str, Any], sets: list[str]) -> None:
    columns = [*COLUMNS, *(f"AUROC {name}" for name in sets)]
    print("\n| method | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
    runs = list(results.values())
    for name in runs[0]["table"]:
        cells = []
        for column in columns:
            values = np.array([run["table"][name].get(column, np.nan) for run in runs])
            cells.append(
                ""
                if np.isnan(values).any()
                else f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}"
            )
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name in runs[0]["sweep"]:
        print(f"\n{name}\n\n| times | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
        for k, factor in enumerate(SCALES):
            cells = [f"{np.mean([run['sweep'][name][k][column] for run in runs]):.3f}" for column in columns]
            print(f"| {factor:g} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with golden numbers and data")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="where CIFAR-10 and features are kept")
    parser.add_argument("--output", type=Path, default=Path("metric_cifar10.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stored, overlap = extract_all(resnet(20, arguments.shared), arguments.shared, arguments.data)
    x = np.asarray(stored.test.embedding, dtype=np.float32)
    label = np.array(stored.test.label, dtype=np.int64)
    ood = {name: np.asarray(features.embedding, dtype=np.float32) for name, features in stored.ood.items()}
    ood["tiny-imagenet"] = ood["tiny-imagenet"][~overlap]
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for seed in arguments.seeds:
        if str(seed) not in results:
            results[str(seed)] = one_seed(x, label, ood, seed)
            arguments.output.write_text(json.dumps(results, indent=1))
    show(results, list(ood))


if __name__ == "__main__":
    main()
