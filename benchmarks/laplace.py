"""Time and memory of last-layer posteriors from stored features, beside laplace-torch where that can run.

    python benchmarks/laplace.py --threads 2 --output laplace.json >table.md
    python benchmarks/laplace.py --only kron-1280          # cases whose names begin so

Each case runs in a process of its own. CPU time is that of all threads, in seconds, of one run after the imports;
memory is the peak resident size of the whole process, imports included. Rows are random features of a linear classifier
with a bias. laplace-torch makes one backward pass for each class and row, so it gets fewer rows (column N), and a
projected time for the case's own number, linear in the rows. What was measured is kept in --output, and only what is
missing there is run: some 10 minutes on 2 idle cores.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beside import run_cases
from torch import Tensor

from posthoc.adapters.laplace import LastLayerPosterior

NEW = 1000  # rows that are predicted


@dataclass(frozen=True)
class Case:
    """A layer of P inputs and C classes, fitted on N rows; `theirs`: how many laplace-torch is given (0: none)."""

    structure: str
    inputs: int
    classes: int
    rows: int = 10_000
    search: bool = False  # whether the prior is searched too: 100 precisions on as many other rows
    theirs: int = 0

    @property
    def name(self) -> str:
        return f"{self.structure}-{self.inputs}-{self.classes} N{self.rows}" + (" search" if self.search else "")


def cases() -> list[Case]:
    sizes = [
        Case("kron", 1280, 1000),
        Case("kron", 512, 100, search=True),
        Case("kron", 512, 100, theirs=200),
        Case("kron", 512, 10, theirs=2000),
        Case("diag", 512, 10, theirs=2000),
        Case("diag", 1280, 1000),
        Case("full", 64, 10, theirs=2000),
        Case("full", 512, 10),
    ]
    grown = [Case("kron", 512, classes) for classes in (200, 400, 800, 1600)]
    grown += [Case("kron", inputs, 100) for inputs in (256, 1024, 2048)]
    grown += [Case("kron", 512, 100, rows) for rows in (2_500, 40_000, 160_000)]
    return sizes + grown


def data(case: Case, rows: int, seed: int) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """Features [rows, P] as they are stored (float32), weight, bias and labels drawn from the classifier."""
    layer = torch.Generator().manual_seed(0)
    weight = 4.0 * torch.randn(case.classes, case.inputs, generator=layer) / case.inputs**0.5
    bias = torch.randn(case.classes, generator=layer)
    g = torch.Generator().manual_seed(seed)
    phi = torch.randn(rows, case.inputs, generator=g)
    labels = torch.multinomial(torch.softmax(phi @ weight.T + bias, 1), 1, generator=g).flatten()
    return phi.numpy(), weight, bias, labels


class Clock:
    def __enter__(self) -> Clock:
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall


def ours(case: Case) -> dict[str, float]:
    phi, weight, bias, labels = data(case, case.rows, 1)
    other, _, _, other_labels = data(case, case.rows if case.search else 1, 2)
    new = torch.from_numpy(data(case, NEW, 3)[0])
    imports = peak()
    with Clock() as fit:
        posterior = LastLayerPosterior(case.structure)
        posterior.fit(phi, weight, bias, labels, rows="heldout" if case.search else "train")
        if case.search:
            posterior.optimize_prior_precision("heldout", penultimate=other, labels=other_labels)
    with Clock() as predict:
        posterior.predict(new)
    found = {"fit": fit.cpu, "fit wall": fit.wall, "predict": predict.cpu, "predict wall": predict.wall}
    return found | {"memory": peak(), "before": imports}


def theirs(case: Case) -> dict[str, float]:
    """The same by laplace-torch, on fewer rows, with the largest difference of its variances from ours."""
    warnings.simplefilter("ignore")
    sys.path.remove(str(Path(__file__).resolve().parent))  # where this file would be taken for laplace-torch
    from laplace import Laplace
    from torch.utils.data import DataLoader, TensorDataset

    phi, weight, bias, labels = data(case, case.theirs, 1)
    new = torch.from_numpy(data(case, 100, 3)[0])
    layer = torch.nn.Linear(case.inputs, case.classes)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    model = torch.nn.Sequential(torch.nn.Identity(), layer).double()
    loader = DataLoader(TensorDataset(torch.from_numpy(phi).double(), labels), batch_size=100)
    with Clock() as fit:
        other = Laplace(model, "classification", "last_layer", case.structure, last_layer_name="1")
        other.fit(loader)
    with Clock() as predict:
        theirs = other(new.double(), pred_type="glm", link_approx="probit")
    mine = LastLayerPosterior(case.structure).fit(phi, weight, bias, labels)
    scale = case.rows / case.theirs
    return {
        "fit": fit.cpu,
        "projected fit": fit.cpu * scale,
        "projected predict": predict.cpu * NEW / len(new),
        "memory": peak(),
        "difference": float((mine.predict(new) - theirs).abs().max()),
    }


def peak() -> float:
    """Peak resident size of this process in GiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def line(case: Case, found: dict[str, Any]) -> str:
    mine, other = found.get("ours"), found.get("theirs")
    cells = [case.name]
    if isinstance(mine, dict):
        cells += [f"{mine[key]:.3g}" for key in ("fit", "fit wall", "predict")] + [f"{mine['memory']:.2f}"]
    else:
        cells += [str(mine), "", "", ""]
    if isinstance(mine, dict) and isinstance(other, dict):
        cells += [str(case.theirs)] + [f"{other[k]:.3g}" for k in ("projected fit", "projected predict")]
        cells += [f"{other['memory']:.2f}", f"{other['projected fit'] / mine['fit']:.0f}", f"{other['difference']:.0e}"]
    else:
        cells += [str(other or ""), *[""] * 5]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    run_cases(
        __file__,
        __doc__,
        cases(),
        lambda case, side: (ours if side == "ours" else theirs)(case),
        sides=lambda case: ("ours", "theirs") if case.theirs else ("ours",),
        header=f"CPU seconds, GiB; {NEW} rows predicted",
        columns=[
            "case",
            "fit",
            "wall",
            "predict",
            "peak",
            "laplace-torch N",
            "its fit",
            "its predict",
            "peak",
            "ratio",
            "difference",
        ],
        line=line,
        threads=2,
    )


if __name__ == "__main__":
    main()
