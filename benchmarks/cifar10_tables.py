"""Tables of docs/results.md from what `benchmarks/cifar10.py` has stored.

    python benchmarks/cifar10_tables.py outputs/cifar10 >tables.md

Values are the mean over seeds +- their standard deviation (a seed changes folds, draws and starts). Intervals are
bootstraps over images within seed 0, 1,000 resamples; differences are paired: both scores on the same resampled images.
Beside a difference stands in how many of the seeds its interval lies above 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from recipe_runs import spread

from posthoc.adapters.perturbations import CROP_FRACTIONS
from posthoc.eval.bootstrap import Interval, bootstrap_difference
from posthoc.eval.metrics import aurc, confidence_and_correct, ece, nll
from posthoc.eval.statistics import Auroc, Mean, Spearman, Statistic

FREE = ("max-softmax", "entropy", "energy", "max-logit", "1/feature-norm", "kNN", "entropy, T scaled")
PROBE = ("entropy of a vote probe",)
HEADS = ("kappa (soft)", "kappa", "temperature", "loss", "laplace", "laplace (diag)")
OUTPUTS = ("laplace mutual information", "laplace variance")
OOD_HEAD = "laplace"
"""The head that is to beat max-softmax on unseen data; chosen before any test row was looked at, for it is the one
whose score grows with what the model has not seen."""
AMBIGUITY_HEAD = "kappa (soft)"
RESAMPLES = 1000

Seed = dict[str, np.ndarray]


class FoldAuroc(Statistic):
    """Mean over folds of the AUROC of a fold's images against the OOD images, each by the heads of that fold."""

    def __init__(self, inside: Sequence[np.ndarray], outside: np.ndarray) -> None:
        self.parts = [Auroc(a, b) for a, b in zip(inside, outside, strict=True)]
        self.sizes = (*map(len, inside), outside.shape[1])

    def __call__(self, counts: Sequence[np.ndarray]) -> np.ndarray:
        values = [part([mine, counts[-1]]) for part, mine in zip(self.parts, counts[:-1], strict=True)]
        return np.asarray(np.mean(values, axis=0))


def vote_entropy(votes: np.ndarray) -> np.ndarray:
    return -(votes * np.log(np.maximum(votes, 1e-12))).sum(1)


def ambiguity(run: Seed, name: str) -> Statistic:
    return Spearman(run[f"test/{name}"], vote_entropy(run["votes"]))


def crops(run: Seed, name: str) -> Statistic:
    score = run[f"crops/{name}"]
    return Spearman(score, np.broadcast_to(1.0 - np.array(CROP_FRACTIONS), score.shape))


def unseen(place: str, without_overlap: bool = False) -> Callable[[Seed, str], Statistic]:
    def statistic(run: Seed, name: str) -> Statistic:
        inside, outside = run[f"raw/{name}"], run[f"{place}/{name}"]
        outside = outside[:, ~run["overlap"]] if without_overlap else outside
        return FoldAuroc([inside[run["fold"] == k] for k in range(len(outside))], outside)

    return statistic


def difference(runs: Sequence[Seed], make: Callable[[Seed, str], Statistic], name: str, other: str) -> str:
    """name - other on seed 0 with its interval, and in how many of all seeds the interval lies above 0."""
    found: list[Interval] = [
        bootstrap_difference(make(run, name), make(run, other), resamples=RESAMPLES) for run in runs
    ]
    first = found[0]
    return f"{first.value:+.3f} [{first.low:+.3f}, {first.high:+.3f}], {sum(one.low > 0 for one in found)}/{len(found)}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def rank_table(
    runs: Sequence[Seed],
    make: Callable[[Seed, str], Statistic],
    names: Sequence[str],
    others: Sequence[str],
    judged: str,
) -> str:
    """One metric for each score, and the paired difference of the one head named beforehand to the scores in `others`."""
    rows = []
    for name in names:
        value = spread([float(make(run, name).value()) for run in runs], 3)
        gaps = [difference(runs, make, name, other) if name == judged else "" for other in others]
        rows.append([f"**{name}**" if name in HEADS + OUTPUTS else name, value, *gaps])
    return table(["score", "value", *(f"minus {other}" for other in others)], rows)


def calibration_table(runs: Sequence[Seed]) -> str:
    rows = []
    for name in ("softmax", "T scaled", "laplace", "laplace (diag)"):
        kind = f"test/log-p {name}"
        losses = [nll(run[kind], run["label"]) for run in runs]
        errors = [ece(*confidence_and_correct(run[kind], run["label"])) for run in runs]
        rows.append([f"**{name}**" if name in HEADS else name, spread(losses, 3), spread(errors, 3)])
    return table(["probabilities", "NLL", "ECE, 15 bins"], rows)


def error_table(runs: Sequence[Seed]) -> str:
    """How well scores tell right from wrong decisions of the backbone."""
    rows = []
    for name in FREE + HEADS + OUTPUTS:
        areas, kept = [], []
        for run in runs:
            score, wrong = run[f"test/{name}"], run["test/log-p softmax"].argmax(1) != run["label"]
            areas.append(1e3 * aurc(score, wrong))
            kept.append(float(1.0 - wrong[np.argsort(score, kind="stable")[: int(0.8 * len(score))]].mean()))
        rows.append([f"**{name}**" if name in HEADS + OUTPUTS else name, spread(areas, 3), spread(kept, 3)])
    return table(["score", "AURC, 1e-3 (lower is better)", "accuracy on the most certain 80 %"], rows)


def load(folder: Path) -> list[Seed]:
    """Runs by seed. Heads of different folds are put on one scale by their percentile among held-out scores."""
    runs = []
    for path in sorted(folder.glob("seed?.npz")):
        run = dict(np.load(path))
        run |= {f"raw/{key.removeprefix('test/')}": run[key] for key in list(run) if key.startswith("test/")}
        for key in [key for key in run if "/percentile " in key]:
            run[key.replace("/percentile ", "/")] = run[key]
        runs.append(run)
    if not runs:
        raise SystemExit(f"{folder} holds no seed?.npz: run benchmarks/cifar10.py first")
    return runs


def accuracy(run: Seed) -> Mean:
    return Mean(run["test/log-p softmax"].argmax(1) == run["label"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for folder in sorted(parser.parse_args().folder.glob("resnet*")):
        runs = load(folder)
        every = FREE + PROBE + HEADS
        print(f"## {folder.name}, accuracy {float(accuracy(runs[0]).value()):.4f}, {len(runs)} seeds\n")
        print("### Ambiguity: Spearman with the entropy of CIFAR-10H votes\n")
        print(rank_table(runs, ambiguity, every, ["entropy"], AMBIGUITY_HEAD) + "\n")
        for title, make in {
            "Tiny ImageNet": unseen("tiny-imagenet"),
            "Tiny ImageNet without the 24 shared classes": unseen("tiny-imagenet", True),
            "DTD": unseen("dtd"),
            "notMNIST": unseen("notmnist"),
        }.items():
            print(f"### Unseen data: AUROC against {title}\n")
            print(rank_table(runs, make, every + OUTPUTS, ["max-softmax", "entropy"], OOD_HEAD) + "\n")
        print("### Calibration\n")
        print(calibration_table(runs) + "\n")
        print("### Crops: Spearman with 1 - crop fraction\n")
        print(rank_table(runs, crops, every, [], "") + "\n")
        print("### Errors of the backbone\n")
        print(error_table(runs) + "\n")


if __name__ == "__main__":
    main()
