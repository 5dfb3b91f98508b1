"""What the recipe `decoupled_uniformity` draws and prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.training_loop import Record
from ..eval.plots import COLOURS, MARKERS, page
from .pretraining import told_throughput

SEEN = {True: "seen by the prior", False: "not seen", None: "unknown", "annotations": "people's annotations"}


def seen_by(prior: Mapping[str, Any] | None) -> str:
    """What is to be read beside every figure: whether the prior of a run's results has seen labels."""
    if prior is None:
        return SEEN[False]
    return "the classes themselves" if prior["holds_classes"] else SEEN[prior["seen_labels"]]


def draw(folder: Path, records: Sequence[Record], results: Mapping[str, Any]) -> None:
    """Learning curves, and the smoother at several widths of the kernel, into `training.png`."""
    steps = [record["step"] for record in records]
    widths = (results["prior"] or {}).get("smoother", {}).get("by_sigma")
    with page(folder / "training.png", 12.5 if widths else 9.0, 3.6) as figure:
        axes = figure.subplots(1, 3 if widths else 2)
        axes[0].plot(steps, [record["train_loss"] for record in records], color=COLOURS[0], marker=MARKERS[0])
        axes[0].set(title="Loss", xlabel="step")
        lines = {
            "other view found": [record["own_view_found"] for record in records],
            "squared length of centroids": [-record["alignment"] for record in records],
        }
        for place, (name, line) in enumerate(lines.items()):
            axes[1].plot(steps, line, color=COLOURS[place], marker=MARKERS[place], label=name)
        axes[1].set(title="Held-out images", xlabel="step", ylim=(0, 1))
        axes[1].legend()
        if widths:
            median = results["prior"]["smoother"]["median_distance"]
            x, y = ([one[key] for one in widths] for key in ("sigma", "diagonal"))
            axes[2].plot([value / median for value in x], y, color=COLOURS[0], marker=MARKERS[0])
            axes[2].set_xscale("log", base=2)
            axes[2].set(title="Weight of an image on itself", xlabel="sigma, in median distances", ylim=(0, 1))


def table(results: Mapping[str, Any]) -> str:
    """What the features are worth beside random ones, and the prior, as Markdown."""
    prior = results["prior"]
    columns = [name for name, value in results["worth"].items() if isinstance(value, float)]
    several = "auc" in results["worth"]
    heads = [name.replace("auc", "AUC").replace("_", " ") for name in columns]
    lines = ["| features | prior | labels | " + " | ".join(heads) + " |", "|---" * (len(columns) + 3) + "|"]
    named = (prior["name"] if prior else "none", seen_by(prior))
    for name, told, row in (
        ("decoupled uniformity", named, results["worth"]),
        ("random", ("-", SEEN[False]), results["random_features"]),
    ):
        cells = " | ".join(f"{row[column]:.3f}" if several else f"{100 * row[column]:.1f} %" for column in columns)
        lines.append(f"| {name} | {told[0]} | {told[1]} | {cells} |")
    if several:
        lines += ["", "| label | AUC | random features |", "|---|---|---|"]
        for label, value in results["worth"]["auc"].items():
            both = (value, results["random_features"]["auc"][label])
            lines.append(f"| {label} | " + " | ".join("-" if one is None else f"{one:.3f}" for one in both) + " |")
    if prior:
        found = prior["smoother"]
        lines.append("")
        lines.append(
            f"smoother of {found['images']} images: an image's weight on itself {found['diagonal']:.3f} on average, rows sum to "
            f"{found['row_sum']:.3f}, other weights from {found['lowest']:.3f} to {found['highest']:.3f}"
        )
        if prior.get("order_checked_by") == "labels":
            lines += [
                "",
                f"the order of {prior['name']} was checked by its labels alone, which do not tell images of a class apart",
            ]
    lines += told_throughput(results["throughput"])
    return "\n".join(lines)
