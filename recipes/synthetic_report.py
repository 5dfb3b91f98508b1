"""What the controlled experiment measures and draws: the encoder's posteriors beside the true ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.training_loop import History, Record
from ..eval.caps import cap_cosine
from ..eval.identifiability import (
    Agreement,
    concentration_agreement,
    cosine_agreement,
    orthogonal_alignment,
    random_half,
    spread_proxy,
)
from ..eval.plots import COLOURS, FAINT, INK, page
from .encoders import VmfEncoder
from .synthetic_process import Numbers, Process

ALPHA = 0.05
PROXY_DRAWS = 100
"""Of the paper's stand-in for a concentration."""
ON_CIRCLE, CIRCLE_POINTS = 6, 400


@dataclass(frozen=True)
class Truth:
    """Images [N, D] with their true posteriors, mean directions [N, d] and concentrations [N], and a latent [N, d] each."""

    x: Tensor
    mu: np.ndarray
    kappa: np.ndarray
    latent: np.ndarray

    @classmethod
    @torch.no_grad()
    def of(cls, process: Process, rows: int, generator: torch.Generator) -> Truth:
        x = process.images_alone(rows, generator)
        posterior = process.encoder(x)
        numbers = Numbers([generator], rows)
        latent = process.latents(x[:, None], numbers, numbers.rows)[:, 0]
        return cls(x, *(v.cpu().numpy() for v in (posterior.mean_direction, posterior.concentration, latent)))

    @property
    def ambiguous(self) -> bool:
        """Whether there are concentrations to find."""
        return bool(np.isfinite(self.kappa).all())


@torch.no_grad()
def posteriors(encoder: VmfEncoder, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean directions [N, e] and concentrations [N] of images [N, D]."""
    found = encoder(x)
    return found.mean_direction.cpu().numpy(), found.concentration.cpu().numpy()


def round_figures(encoder: VmfEncoder, truth: Truth) -> Record:
    """How well the means agree by all pairwise cosines, and the concentrations where both are finite."""
    mu, kappa = posteriors(encoder, truth.x)
    found = _named("cosines", cosine_agreement(mu, truth.mu))
    if truth.ambiguous and np.isfinite(kappa).all():
        found |= _named("kappa", concentration_agreement(kappa, truth.kappa))
    return found


def final_figures(encoder: VmfEncoder, truth: Truth, generator: torch.Generator) -> Record:
    """`round_figures`, the paper's proxy for the concentrations, and how often credible caps hold the true latent."""
    mu, kappa = posteriors(encoder, truth.x)
    found = round_figures(encoder, truth)
    if truth.ambiguous and np.isfinite(kappa).all():
        learned = spread_proxy(kappa, mu.shape[1], draws=PROXY_DRAWS, generator=generator)
        true = spread_proxy(truth.kappa, truth.mu.shape[1], draws=PROXY_DRAWS, generator=generator)
        found |= _named("proxy", concentration_agreement(learned, true))
        found["kappa_ratio"] = float(np.median(kappa / truth.kappa))
    if mu.shape[1] == truth.mu.shape[1]:
        found["coverage"] = cap_coverage(mu, kappa, truth)
        found["coverage_of_the_true_posteriors"] = _covered(truth.mu, truth.kappa, truth.latent)
    return found


def cap_coverage(mu: np.ndarray, kappa: np.ndarray, truth: Truth) -> float:
    """Share of images whose latent lies in the encoder's 95 % cap, turned onto the truth by the other half of the images."""
    fitted = random_half(len(mu), np.random.default_rng(0))
    # the means of a process of many dimensions lie in a subspace, as wide as its networks: any turn of it will do
    turn = orthogonal_alignment(mu[fitted], truth.mu[fitted], unique=False)
    return _covered(mu[~fitted] @ turn, kappa[~fitted], truth.latent[~fitted])


def _covered(mu: np.ndarray, kappa: np.ndarray, latent: np.ndarray) -> float:
    # a latent that is the mean itself lies in its cap, whatever the rounding
    return float(((mu * latent).sum(1) >= cap_cosine(kappa, mu.shape[1], ALPHA) - 1e-6).mean())


def _named(name: str, found: Agreement) -> Record:
    return {f"{name}_{metric}": value for metric, value in vars(found).items()}


SAID = {
    "cosines_spearman": "all pairwise cosines, rank correlation with the true ones",
    "kappa_spearman": "concentrations, rank correlation",
    "kappa_ratio": "concentrations, found over true, median",
    "proxy_spearman": "the paper's proxy of them, rank correlation",
    "coverage": "true latents in 95 % caps, aligned by the other half",
    "coverage_of_the_true_posteriors": "the same of the true posteriors",
}


def table(start: Record, figures: Record) -> str:
    """What a run prints at its end: the main figures before and after training, as Markdown."""
    rows = [(text, start.get(name), figures[name]) for name, text in SAID.items() if name in figures]
    cells = [[text, "" if before is None else f"{before:.3f}", f"{after:.3f}"] for text, before, after in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [["", "at the start", "at the end"], ["---"] * 3, *cells])


def draw_plots(
    folder: Path, encoder: VmfEncoder, truth: Truth, start: Record, histories: Mapping[str, History]
) -> None:
    """learning.png, concentrations.png where there are any, and on the circle posteriors.png."""
    mu, kappa = posteriors(encoder, truth.x)
    _draw_learning(folder / "learning.png", start, histories)
    if truth.ambiguous and np.isfinite(kappa).all():
        _draw_concentrations(folder / "concentrations.png", kappa, truth.kappa)
    if mu.shape[1] == truth.mu.shape[1] == 2:
        turn = orthogonal_alignment(mu, truth.mu)
        _draw_circle(folder / "posteriors.png", mu @ turn, kappa, truth)


def _draw_learning(path: Path, start: Record, histories: Mapping[str, History]) -> None:
    """The agreement over all steps; that of concentrations from where they begin to be trained."""
    drawn = {"cosines_spearman": ("pairwise cosines", "mean"), "kappa_spearman": ("concentrations", "kappa")}
    with page(path, 6.4, 3.8) as figure:
        axis = figure.subplots()
        for (name, (label, half)), colour in zip(drawn.items(), COLOURS, strict=False):
            if name in start:
                axis.plot(*_learning_curve(name, half, start, histories), color=colour, label=label)
        ends = np.cumsum([history.records[-1]["step"] for history in histories.values()])
        for end in ends[:-1]:
            axis.axvline(end, color=FAINT, zorder=0)
        axis.set(title="Agreement with the truth", xlabel="optimiser step", ylabel="rank correlation", ylim=(None, 1.0))
        axis.legend()


def _learning_curve(name: str, half: str, start: Record, histories: Mapping[str, History]) -> tuple[list[float], ...]:
    """Steps and values of a figure, from the first training that moves it on: one called so, or of both at once."""
    before, x, y = 0.0, [0.0], [start[name]]
    moved = False
    for training, history in histories.items():
        moved = moved or training == "joint" or training.endswith(half)
        values = history.column(name)
        if moved:
            x += [before + record["step"] for record in history.records]
            y += values
        before += history.records[-1]["step"]
        if not moved:
            x, y = [before], [values[-1]]
    return x, y


def _draw_concentrations(path: Path, kappa: np.ndarray, true: np.ndarray) -> None:
    with page(path, 4.6, 4.4) as figure:
        axis = figure.subplots()
        axis.plot(true, kappa, ".", color=COLOURS[0], alpha=0.35, markersize=3.5)
        ends = [true.min(), true.max()]
        axis.plot(ends, ends, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label="equal")
        axis.set(title="Concentrations", xlabel="true", ylabel="predicted")
        axis.legend()


def _draw_circle(path: Path, mu: np.ndarray, kappa: np.ndarray, truth: Truth) -> None:
    """The densities of a few posteriors over the angle, true ones filled, found ones as lines."""
    angle = np.linspace(-math.pi, math.pi, CIRCLE_POINTS)
    chosen = np.linspace(0, len(mu) - 1, ON_CIRCLE).astype(int)
    with page(path, 6.4, 3.8) as figure:
        axis = figure.subplots()
        for row, colour in zip(chosen, COLOURS, strict=True):
            axis.fill_between(angle, _on_circle(angle, truth.mu[row], truth.kappa[row]), color=colour, alpha=0.25, lw=0)
            axis.plot(angle, _on_circle(angle, mu[row], kappa[row]), color=colour, linewidth=1.4)
        axis.set(
            title="Posteriors on the circle: true (filled) and found (lines)",
            xlabel="angle of the latent", ylabel="density", ylim=(0, None),
        )  # fmt: skip


def _on_circle(angle: np.ndarray, mu: np.ndarray, kappa: Any) -> np.ndarray:
    off = np.cos(angle - math.atan2(mu[1], mu[0]))
    return np.exp(kappa * (off - 1.0)) / (2.0 * math.pi * float(torch.special.i0e(torch.as_tensor(float(kappa)))))
