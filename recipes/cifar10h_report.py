"""What the CIFAR-10H recipe measures on test images, each scored by a network that has not seen it, and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.distributed import Launch
from ..adapters.features import Features
from ..adapters.training_loop import History, Record
from ..eval.ambiguity import vote_entropy
from ..eval.baselines import energy, entropy, inverse_norm
from ..eval.bootstrap import bootstrap, bootstrap_curve
from ..eval.credible import CredibleSets, SetReport
from ..eval.plots import COLOURS, INK, Look, curves, intervals, legend, looks, page
from ..eval.retrieval import Retrieved, retrieve
from ..eval.retrieval_statistics import KnownMeans
from ..eval.search import directions
from ..eval.selective import selective_table
from ..eval.selective_statistics import AccuracyAtCoverage
from ..eval.statistics import Mean, Spearman, Statistic
from ..eval.table import Cell, Table, fill, render
from .cifar10h_data import CifarH
from .cifar10h_training import Answer, rank_correlation

ENTROPY, ENERGY, NORM = "entropy", "energy", "1/feature-norm"
TWO_VIEWS = "two views"
LEARNED, FREE = "embedding", "backbone's features"
ALPHA = 0.05
BINS = 5
"""Groups of equal numbers of queries, by kappa, in which credible sets are looked at."""


@dataclass(frozen=True)
class Fold:
    """Rows, what was watched, how many seconds the training took, and what the fold's network
    says of validation images, test images and their crops.

    mirrored: what it says of validation and test images mirrored, where it is given images.
    """

    validation: np.ndarray
    test: np.ndarray
    first: Record
    history: History
    seconds: float
    on_validation: Answer
    on_test: Answer
    on_crops: Answer
    mirrored: list[Answer] | None = None


@dataclass(frozen=True)
class Judged:
    """What is judged: the folds, and the features of the backbone as it was (images, crops, mirrored images) to compare
    with, if it was a trained one.

    score: name of the networks' own uncertainty.
    """

    data: CifarH
    fractions: np.ndarray
    folds: list[Fold]
    free: tuple[Features, ...] | None
    score: str

    @property
    def rows(self) -> np.ndarray:
        """Test rows of all folds, in their order."""
        return np.concatenate([fold.test for fold in self.folds])


def comparable(ones: list[Answer], validation: list[Answer]) -> np.ndarray:
    """Uncertainties on a scale that folds share, [N], from one or two views of each image: the mean of the entropies as
    they are; of kappas the mean logarithm, less its mean over the fold's validation images, by its deviation there."""
    if ones[0].kappa is None:
        return np.mean([one.uncertainty for one in ones], 0)
    mine, known = (np.mean([np.log(one.uncertainty) for one in some], 0) for some in (ones, validation))
    return (mine - known.mean()) / known.std()


def all_scores(judged: Judged) -> dict[str, np.ndarray]:
    """By score, float [N, 2]: of the test images and of their crops, higher = less certain; [N, 1] of two views."""
    own = [
        np.stack([comparable([one], [fold.on_validation]) for one in (fold.on_test, fold.on_crops)], 1)
        for fold in judged.folds
    ]
    scores = {judged.score: np.concatenate(own)}
    views = [
        comparable([fold.on_test, fold.mirrored[1]], [fold.on_validation, fold.mirrored[0]])
        for fold in judged.folds
        if fold.mirrored is not None
    ]
    if views:
        scores[f"{judged.score}, {TWO_VIEWS}"] = np.concatenate(views)[:, None]
    if judged.free is None:
        return scores
    for name, of in ((ENTROPY, entropy), (ENERGY, energy), (NORM, None)):
        both = []
        for one in judged.free[:2]:
            assert one.logits is not None
            both.append(inverse_norm(one.embedding) if of is None else of(one.logits))
        scores[name] = np.stack(both, 1)[judged.rows]
    if views:
        mean = np.mean([np.asarray(one.logits) for one in (judged.free[0], judged.free[2])], 0)
        scores[f"{ENTROPY}, {TWO_VIEWS}"] = entropy(mean)[judged.rows, None]
    return scores


def ambiguity(judged: Judged, scores: Mapping[str, np.ndarray], resamples: int, seed: int) -> Table:
    """Scores against the votes' entropy and against what was cut away. Differences: from the entropy (of as many views of
    each image), from 1/feature-norm."""
    doubt, cut = vote_entropy(judged.data.votes[judged.rows]), 1 - judged.fractions[judged.rows]
    cropped = {name: u for name, u in scores.items() if u.shape[1] > 1}
    human: dict[str, Statistic] = {name: Spearman(u[:, 0], doubt) for name, u in scores.items()}
    made: list[tuple[str, str, dict[str, Statistic]]] = [
        ("human_spearman", ENTROPY, {name: human[name] for name in cropped}),
        ("human_spearman", f"{ENTROPY}, {TWO_VIEWS}", {name: human[name] for name in scores if name not in cropped}),
        ("crop_spearman", NORM, {name: Spearman(u[:, 1], cut) for name, u in cropped.items()}),
        ("crop_less_certain", NORM, {name: Mean(u[:, 1] > u[:, 0]) for name, u in cropped.items()}),
    ]
    cells: dict[str, dict[str, Cell]] = {name: {} for name in scores}
    for metric, reference, statistics in made:
        if not statistics:  # one view of each image only
            continue
        for name, row in fill(statistics, [metric], (), reference, resamples, seed).items():
            cells[name].update(row)
    notes = (
        f"{len(judged.rows)} test images in {len(judged.folds)} folds, each scored by a network that has not seen it",
        "human_spearman: rank correlation with the votes' entropy, bold above the entropy's beyond the paired interval; "
        "crop_spearman: of the score of the image's centre crop with the share cut away, bold above 1/feature-norm's",
        f"{TWO_VIEWS}: the mean of log kappa, or of the logits, over the image and its mirror image; compared with that entropy",
    )
    return Table("cifar10h: ambiguity", tuple(dict.fromkeys(metric for metric, *_ in made)), cells, notes)


def found_by(judged: Judged, which: str, crop: bool) -> list[Retrieved]:
    """Each fold's test images searched among themselves, by the learned embedding or by the backbone's features."""
    result = []
    for fold in judged.folds:
        if which == LEARNED:
            unit = (fold.on_crops if crop else fold.on_test).embedding
        else:
            assert judged.free is not None
            unit = directions(which, np.asarray(judged.free[int(crop)].embedding)[fold.test])
        result.append(retrieve(unit, judged.data.label[fold.test]))
    return result


def retrieval(judged: Judged, resamples: int, seed: int) -> tuple[Table, np.ndarray]:
    """Recall@1 and MAP@R of whole and of cropped images, and whether each test image's neighbour is of its class, bool [N]."""
    metrics = ("recall_at_1", "map_at_r")
    names = (LEARNED,) if judged.free is None else (LEARNED, FREE)
    cells: dict[str, dict[str, Cell]] = {name: {} for name in names}
    hit = np.empty(0, bool)
    for crop in (False, True):
        made: dict[str, Statistic] = {}
        for name in names:
            found = found_by(judged, name, crop)
            values = [np.stack([one.values[metric] for metric in metrics], 1) for one in found]
            made[name] = KnownMeans(np.concatenate(values))
            if name == LEARNED and not crop:
                hit = np.concatenate([one.hit for one in found])
        columns = [f"{'crop_' if crop else ''}{metric}" for metric in metrics]
        for name, row in fill(made, columns, (), FREE, resamples, seed).items():
            cells[name].update(row)
    note = f"each fold's test images are searched among themselves; bold above the {FREE}' beyond the paired interval"
    return Table("cifar10h: retrieval", tuple(cells[LEARNED]), cells, (note,)), hit


@dataclass(frozen=True)
class Credible:
    """Sets of the nominal and of the calibrated radius, of all folds' test queries, with their kappas [N]."""

    kappa: np.ndarray
    nominal: SetReport
    calibrated: SetReport
    radii: list[float]


def credible_sets(judged: Judged) -> Credible | None:
    """A fold's gallery is half of its validation images; the other half calibrates; its test images are the queries."""
    kappas, nominal, calibrated, radii = [], [], [], []
    for fold in judged.folds:
        known, kappa = fold.on_validation, fold.on_validation.kappa
        if fold.on_test.kappa is None or kappa is None:
            return None
        label, half = judged.data.label, len(fold.validation) // 2
        sets = CredibleSets(known.embedding[:half], label[fold.validation[:half]], alpha=ALPHA)
        others = known.embedding[half:], kappa[half:], label[fold.validation[half:]]
        mended = sets.calibrate(*others, alpha=ALPHA)
        query = fold.on_test.embedding, fold.on_test.kappa, label[fold.test]
        kappas.append(fold.on_test.kappa)
        nominal.append(sets.evaluate(*query))
        calibrated.append(mended.evaluate(*query))
        radii.append(mended.radius)
    return Credible(np.concatenate(kappas), _joined(nominal), _joined(calibrated), radii)


def _joined(parts: list[SetReport]) -> SetReport:
    missed, none, size = (np.concatenate([getattr(one, name) for one in parts]) for name in ("missed", "none", "size"))
    return SetReport(missed, none, size, parts[0].gallery)


def set_figures(report: SetReport, resamples: int, seed: int) -> dict[str, float]:
    """Means over the queries, and the ends of the coverage's interval: by bootstrap over queries, galleries as they are."""
    coverage = bootstrap(KnownMeans(1 - report.missed), resamples=resamples, seed=seed)
    return report.summary() | {"coverage_low": coverage.low, "coverage_high": coverage.high}


def credible_rows(found: Credible) -> list[dict[str, float]]:
    """Coverage (share of the images of the query's class inside) and size by group of kappa, least certain first."""
    order = np.argsort(found.kappa, kind="stable")
    rows = []
    for part in np.array_split(order, BINS):
        row = {"kappa": float(np.median(found.kappa[part]))}
        for name, one in (("nominal", found.nominal), ("calibrated", found.calibrated)):
            row[f"{name}_coverage"] = 1 - float(np.nanmean(one.missed[part]))
            row[f"{name}_share"] = float(one.size[part].mean() / one.gallery)
        rows.append(row)
    return rows


def judge(judged: Judged, folder: Path, launch: Launch, resamples: int, seed: int) -> dict[str, Any]:
    """All tables and figures for results.json; writes results.md, scores.npz and cifar10h.png, and prints the tables."""
    scores = all_scores(judged)
    table = ambiguity(judged, scores, resamples, seed)
    embedding, hit = retrieval(judged, resamples, seed)
    tables = [table, embedding]
    if hit.any() and not hit.all():
        whole = {name: u[:, 0] for name, u in scores.items()}
        name = "cifar10h: whether the nearest neighbour is of the image's class"
        tables.append(selective_table(whole, ~hit, name=name, resamples=resamples, seed=seed))
    found = credible_sets(judged)
    results: dict[str, Any] = {"tables": [one.as_dict() for one in tables], "folds": _fold_figures(judged, scores)}
    text = render(tables, "markdown")
    if found is not None:
        rows = credible_rows(found)
        sizes = rank_correlation(found.kappa, found.nominal.size)
        both = {name: set_figures(getattr(found, name), resamples, seed) for name in ("nominal", "calibrated")}
        results["credible_sets"] = {
            "alpha": ALPHA, **both, "radii": found.radii, "by_kappa": rows, "spearman_of_size_and_kappa": sizes,
        }  # fmt: skip
        text += "\n\n" + _credible_text(rows, list(both.values()))

    def write() -> None:
        kept: dict[str, Any] = {"rows": judged.rows, "fraction": judged.fractions[judged.rows], **scores}
        np.savez(folder / "scores.npz", **kept)
        (folder / "results.md").write_text(text + "\n")
        draw(folder / "cifar10h.png", judged, scores, table, hit, found, resamples, seed)
        print(text, flush=True)

    launch.on_main(write)
    return results


def _fold_figures(judged: Judged, scores: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """What was watched in each fold, and the rank correlations with the votes' entropy on its test images."""
    figures, start = [], 0
    for fold in judged.folds:
        rows = slice(start, start := start + len(fold.test))
        doubt = vote_entropy(judged.data.votes[fold.test])
        history = fold.history
        figures.append({
            "before": fold.first, "best": history.records[history.best], "seconds": fold.seconds,
            "human_spearman": {name: rank_correlation(u[rows, 0], doubt) for name, u in scores.items()},
        })  # fmt: skip
    return figures


def _credible_text(rows: list[dict[str, float]], summaries: list[dict[str, float]]) -> str:
    lines = [f"### cifar10h: credible sets of {1 - ALPHA:.0%}, queries by kappa", ""]
    lines += [
        "| kappa | nominal: coverage | share of the gallery | calibrated: coverage | share |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['kappa']:.3g} | {row['nominal_coverage']:.3f} | {row['nominal_share']:.3f} | "
        f"{row['calibrated_coverage']:.3f} | {row['calibrated_share']:.3f} |"
        for row in rows
    ]
    both = " | ".join(
        f"{one['coverage']:.3f} [{one['coverage_low']:.3f}, {one['coverage_high']:.3f}] | {one['share_of_gallery']:.3f}"
        for one in summaries
    )
    return "\n".join([*lines, f"| all | {both} |"])


def draw(
    path: Path, judged: Judged, scores: Mapping[str, np.ndarray], table: Table, hit: np.ndarray, found: Credible | None,
    resamples: int, seed: int,
) -> None:  # fmt: skip
    """Rank correlations, people's doubt by decile of the scores, error against reject, and credible sets against kappa."""
    own = [name for name in scores if name.startswith(judged.score)]
    look = looks(own, [name for name in scores if name not in own])
    with page(path, 12, 8) as figure:
        axes = figure.subplots(2, 2)
        _draw_correlations(axes[0, 0], table, look)
        _draw_tenths(axes[0, 1], scores, vote_entropy(judged.data.votes[judged.rows]), look)
        if hit.any() and not hit.all():
            _draw_reject(axes[1, 0], scores, hit, look, resamples, seed)
        if found is not None:
            _draw_sets(axes[1, 1], credible_rows(found))
        legend(figure, axes[0, 1], 4)


def _draw_correlations(axis: Any, table: Table, look: Mapping[str, Look]) -> None:
    values = {name: row["human_spearman"].value for name, row in table.cells.items()}
    reference = ENTROPY if ENTROPY in values else None
    intervals(axis, values, look, title="People's doubt", label="Spearman with the votes' entropy", reference=reference)


def _draw_tenths(axis: Any, scores: Mapping[str, np.ndarray], doubt: np.ndarray, look: Mapping[str, Look]) -> None:
    for name, u in scores.items():
        tenths = np.array_split(np.argsort(u[:, 0], kind="stable"), 10)
        means = [float(doubt[part].mean()) for part in tenths]
        axis.plot(range(1, 11), means, color=look[name].colour, linestyle=look[name].dash, label=name)
    axis.set(title="By tenth of the score", xlabel="tenth, least certain last", ylabel="entropy of the votes, nats")


def _draw_reject(
    axis: Any, scores: Mapping[str, np.ndarray], hit: np.ndarray, look: Mapping[str, Look], resamples: int, seed: int
) -> None:
    kept = np.linspace(0.5, 1.0, 11)
    lines = {
        name: bootstrap_curve(AccuracyAtCoverage(u[:, 0], hit, kept), resamples=min(resamples, 200), seed=seed)
        for name, u in scores.items()
    }
    curves(
        axis,
        1 - kept,
        lines,
        look,
        title="Error against reject",
        xlabel="share rejected",
        ylabel="recall@1 of the rest",
    )


def _draw_sets(axis: Any, rows: list[dict[str, float]]) -> None:
    """In other colours than the scores', whose legend is that of the whole figure."""
    kappa = [row["kappa"] for row in rows]
    axis.axhline(1 - ALPHA, color=INK, linewidth=1, linestyle=(0, (5, 4)), label=f"{1 - ALPHA:.2f}")
    for name, colour, marker in (("nominal", COLOURS[2], "o"), ("calibrated", COLOURS[3], "s")):
        for key, dash, what in (("coverage", "-", "coverage"), ("share", ":", "share of the gallery")):
            values = [row[f"{name}_{key}"] for row in rows]
            axis.plot(kappa, values, dash, color=colour, marker=marker, label=f"{name}: {what}")
    axis.set(title=f"Credible sets of {1 - ALPHA:.0%}", xlabel="kappa, median of each fifth of the queries",
             ylabel="share of the images", ylim=(0, 1))  # fmt: skip
    axis.legend(fontsize=8, loc="center right")
