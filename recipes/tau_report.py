"""What the recipe `tau` draws and prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from ..adapters.training_loop import Record
from ..eval.plots import COLOURS, DASHES, MARKERS, legend, page
from .pretraining import told_throughput
from .pretraining_evaluation import auroc, scores_in


def draw(folder: Path, records: Sequence[Sequence[Record]], results: Mapping[str, Any]) -> None:
    """Learning curves of every member into `training.png`, AUROCs into `ood.png`."""
    figures = [name for name in records[0][0] if name not in ("step", "train_loss")]
    shares = [name for name in figures if not name.startswith("tau_")]
    temperatures = [name for name in figures if name.startswith("tau_")]
    with page(folder / "training.png", 12.5 if temperatures else 8.5, 3.6) as figure:
        axes = figure.subplots(1, 3 if temperatures else 2)
        for number, one in enumerate(records):
            steps, colour = [record["step"] for record in one], COLOURS[number % 6]
            axes[0].plot(steps, [record["train_loss"] for record in one], color=colour, marker=MARKERS[number % 6])
            for name in shares:
                axes[1].plot(steps, [record[name] for record in one], color=colour, marker=MARKERS[number % 6])
        axes[0].set(title="Loss", xlabel="step")
        axes[1].set(title=shares[0].replace("_", " "), xlabel="step", ylim=(0, None))
        for place, name in enumerate(temperatures):
            line = [record[name] for record in records[0]]
            look = {"color": COLOURS[place], "linestyle": ("-", *DASHES)[place], "marker": MARKERS[place]}
            axes[2].plot([record["step"] for record in records[0]], line, **look, label=f"{name[4:]} %")
        if temperatures:
            axes[2].set(title="Temperatures of held-out views", xlabel="step")
            axes[2].legend(title="quantile")
    draw_ood(folder, results["ood"])


def draw_ood(folder: Path, tables: Mapping[str, Any]) -> None:
    """The AUROC of each score against each other set, with intervals, into `ood.png`; nothing where there is no such set."""
    if not tables:
        return
    names = scores_in(tables)
    with page(folder / "ood.png", 2.2 + 1.5 * len(tables), 4.2) as figure:
        axis = figure.subplots()
        for place, name in enumerate(names):
            rows = [(k, table["scores"][name]) for k, table in enumerate(tables.values()) if name in table["scores"]]
            x, cells = [k + 0.7 * (place + 0.5) / len(names) - 0.35 for k, _ in rows], [row["auroc"] for _, row in rows]
            value = [cell["value"] for cell in cells]
            ends = [[v - c["low"] for v, c in zip(value, cells, strict=True)]]
            ends.append([c["high"] - v for v, c in zip(value, cells, strict=True)])
            axis.errorbar(x, value, ends, fmt=MARKERS[place % 6], color=COLOURS[place % 6], label=name)
        axis.axhline(0.5, color="#8C8C8C", linewidth=0.8)
        axis.set_xticks(range(len(tables)), list(tables))
        axis.set(title="Other sets told from its own (AUROC)", ylim=(0, 1))
        axis.grid(axis="x", visible=False)
        legend(figure, axis, 4)


def ood_lines(tables: Mapping[str, Any]) -> list[str]:
    """AUROCs as Markdown: scores down, sets across; below, which scores were left out, and why."""
    if not tables:
        return ["no other set is at hand: no AUROC"]
    lines = ["| AUROC | " + " | ".join(tables) + " |", "|---" * (len(tables) + 1) + "|"]
    for name in scores_in(tables):
        values = [auroc(tables, one, name) for one in tables]
        lines.append(f"| {name} | " + " | ".join("-" if isnan(value) else f"{value:.3f}" for value in values) + " |")
    left_out = [f"{one}: {why}" for one, table in tables.items() for why in table["left_out"].values()]
    return [*lines, "", *left_out] if left_out else lines


def table(results: Mapping[str, Any]) -> str:
    """What the features are worth, and the AUROCs, as Markdown."""
    columns = list(results["worth"])
    lines = ["| features | " + " | ".join(column.replace("_", " ") for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, row in ((results["method"], results["worth"]), ("random", results["random_features"])):
        lines.append(f"| {name} | " + " | ".join(f"{100 * row[column]:.1f} %" for column in columns) + " |")
    lines += told_throughput(results["throughput"])
    return "\n".join([*lines, "", *ood_lines(results["ood"])])
