"""What the recipe `anisotropic` draws and prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.training_loop import Record
from ..eval.plots import COLOURS, DASHES, GREYS, page


def draw(folder: Path, records: Sequence[Record], learned: Tensor, expected: Tensor) -> None:
    """Learning curves and precisions into `recovery.png`; learned and expected are [families, n]."""
    steps = [record["step"] for record in records]
    with page(folder / "recovery.png", 12.5, 4.0) as figure:
        scores, curves, ends = figure.subplots(1, 3)
        for i, (name, word) in enumerate((("r2_held_out", "R², held-out rows"), ("mcc", "MCC"))):
            line = [record[name] for record in records]
            scores.plot(steps, line, color=COLOURS[i], linestyle=("-", DASHES[0])[i], label=word)
        scores.set(title="Latents recovered", xlabel="step", ylim=(None, 1.0))
        scores.legend()  # where there is room: MCC may lie far below or close to R²
        for k, truth in enumerate(expected.sort().values):
            colour, dash = COLOURS[k % 6], ("-", *DASHES)[k % 7]
            for value in truth.unique().tolist():
                curves.axhline(value, color=GREYS[2], linestyle=DASHES[1], linewidth=1.2)
            for i in range(len(truth)):
                line = [record[f"precision_{k}_{i}"] for record in records]
                curves.plot(steps, line, color=colour, linestyle=dash, linewidth=1.2)
            found = learned[k].sort().values.tolist()
            ends.plot(truth.tolist(), found, "osD^vP"[k % 6], color=colour, label=f"family {k + 1}", alpha=0.8)
        curves.set(title="Learned precisions (dotted: truth)", xlabel="step", ylim=(0, None))
        top = 1.1 * max(float(learned.max()), float(expected.max()))
        ends.plot([0, top], [0, top], color=GREYS[2], linestyle=DASHES[1], linewidth=1.2)
        ends.set(title="True against learned", xlabel="true precision", ylabel="learned", xlim=(0, top), ylim=(0, top))
        if len(expected) > 1:
            ends.legend(loc="upper left")


def table(results: Mapping[str, Any]) -> str:
    """The results in a few lines of Markdown."""
    latents, inputs, precision = results["latents"], results["inputs"], results["precision"]
    lines = ["| | embedding | inputs |", "|---|---|---|"]
    words = {"r2": "R² in-sample", "r2_held_out": "R² held-out rows", "mcc": "MCC"}
    for name, word in words.items():
        lines.append(f"| {word} | {latents[name]['mean']:.4f} ± {latents[name]['std']:.4f} | {inputs[name]:.4f} |")
    for learned, expected in zip(precision["learned"], precision["expected"], strict=True):
        lines.append(f"| Lambda learned | {_numbers(learned)} | |")
        lines.append(f"| Lambda true | {_numbers(expected)} | |")
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
