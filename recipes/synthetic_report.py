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
from ..adapters.vmf import concentration_from_resultant
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
from .synthetic_process import Family, Numbers, Process

ALPHA = 0.05
PROXY_DRAWS = 100
"""Of the paper's stand-in for a concentration."""
FAMILY_DRAWS = 1000
"""Latents of an image by which a posterior that is no vMF is known."""
AT_ONCE = 1 << 22  # numbers of them
ON_CIRCLE, CIRCLE_POINTS, RADII = 6, 400, 4000


@dataclass(frozen=True)
class Truth:
    """Images [N, D] with what is true of them.

    Attributes:
        mu, parameter, family: the posteriors' mean directions [N, d], concentrations as the family has them [N], and family.
        latent: one [N, d] each.
        kappa: [N], the concentration itself for vMF; else that of the vMF with the same mean cosine, found by draws.
        cap: the cosine [N] that bounds the posterior's 95 % cap round its mean. proxy: mean |mu.z| over 100 draws [N], the
            paper's stand-in for a concentration. Both from the family's own draws; for vMF, whatever the process's sampler,
            the exact cap and an exact sampler's draws.
    """

    x: Tensor
    mu: np.ndarray
    parameter: np.ndarray
    family: Family
    latent: np.ndarray
    kappa: np.ndarray
    cap: np.ndarray
    proxy: np.ndarray

    @classmethod
    @torch.no_grad()
    def of(cls, process: Process, rows: int, generator: torch.Generator) -> Truth:
        x = process.images_alone(rows, generator)
        posterior, family = process.encoder(x), process.config.family
        numbers = Numbers([generator], rows)
        latent = process.latents(x[:, None], numbers, numbers.rows)[:, 0]
        drawn = (posterior.mean_direction, posterior.concentration, latent)
        mu, parameter, latents = (v.cpu().numpy() for v in drawn)
        if family != "vmf":
            return cls(x, mu, parameter, family, latents, *_by_draws(process, x, generator))
        cap = cap_cosine(parameter, process.config.dim, ALPHA)
        proxy = spread_proxy(parameter, process.config.dim, draws=PROXY_DRAWS, generator=generator)
        return cls(x, mu, parameter, family, latents, parameter, cap, proxy)

    @property
    def ambiguous(self) -> bool:
        """Whether there are concentrations to find."""
        return bool(np.isfinite(self.parameter).all())


def _by_draws(process: Process, x: Tensor, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`kappa`, `cap` and `proxy` of images [N, D] by latents of the process's own."""
    parts = []
    for some in x.split(max(1, AT_ONCE // (FAMILY_DRAWS * process.config.dim))):
        numbers = Numbers([generator], len(some))
        z = process.latents(some[:, None].expand(-1, FAMILY_DRAWS, -1), numbers, numbers.rows)
        # of unit vectors: by their product, small angles would be lost in float32
        parts.append(1.0 - (z - process.encoder.direction(some)[:, None]).double().square().sum(-1) / 2.0)
    cosine = torch.cat(parts).cpu()
    kappa = concentration_from_resultant(cosine.mean(1).clamp(0.0, 1.0), process.config.dim)
    # a further draw lies above the k-th lowest of n with probability 1 - k / (n + 1)
    cap = cosine.kthvalue(round(ALPHA * (FAMILY_DRAWS + 1)), 1).values
    return kappa.numpy(), cap.numpy(), cosine[:, :PROXY_DRAWS].abs().mean(1).numpy()


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
        found |= _named("proxy", concentration_agreement(learned, truth.proxy))
        found["kappa_ratio"] = float(np.median(kappa / truth.kappa))
    if mu.shape[1] == truth.mu.shape[1]:
        found["coverage"] = cap_coverage(mu, kappa, truth)
        found["coverage_of_the_true_posteriors"] = _covered(truth.mu, truth.cap, truth.latent)
    return found


def cap_coverage(mu: np.ndarray, kappa: np.ndarray, truth: Truth) -> float:
    """Share of images whose latent lies in the encoder's 95 % cap, turned onto the truth by the other half of the images.

    The encoder's posteriors are vMFs, and so are its caps, of whatever family the true ones are.
    """
    fitted = random_half(len(mu), np.random.default_rng(0))
    # the means of a process of many dimensions lie in a subspace, as wide as its networks: any turn of it will do
    turn = orthogonal_alignment(mu[fitted], truth.mu[fitted], unique=False)
    return _covered(mu[~fitted] @ turn, cap_cosine(kappa[~fitted], mu.shape[1], ALPHA), truth.latent[~fitted])


def _covered(mu: np.ndarray, cap: np.ndarray, latent: np.ndarray) -> float:
    # a latent that is the mean itself lies in its cap, whatever the rounding
    return float(((mu * latent).sum(1) >= cap - 1e-6).mean())


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
        _draw_concentrations(folder / "concentrations.png", kappa, truth)
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


def _draw_concentrations(path: Path, kappa: np.ndarray, truth: Truth) -> None:
    true, label = truth.kappa, "true" if truth.family == "vmf" else "true (of the vMF with the same mean cosine)"
    with page(path, 4.6, 4.4) as figure:
        axis = figure.subplots()
        axis.plot(true, kappa, ".", color=COLOURS[0], alpha=0.35, markersize=3.5)
        ends = [true.min(), true.max()]
        axis.plot(ends, ends, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label="equal")
        axis.set(title="Concentrations", xlabel=label, ylabel="predicted")
        axis.legend()


def _draw_circle(path: Path, mu: np.ndarray, kappa: np.ndarray, truth: Truth) -> None:
    """The densities of a few posteriors over the angle, true ones filled, found ones as lines."""
    angle = np.linspace(-math.pi, math.pi, CIRCLE_POINTS)
    chosen = np.linspace(0, len(mu) - 1, ON_CIRCLE).astype(int)
    with page(path, 6.4, 3.8) as figure:
        axis = figure.subplots()
        for row, colour in zip(chosen, COLOURS, strict=True):
            true = _on_circle(angle, truth.mu[row], truth.parameter[row], truth.family)
            axis.fill_between(angle, true, color=colour, alpha=0.25, lw=0)
            axis.plot(angle, _on_circle(angle, mu[row], kappa[row]), color=colour, linewidth=1.4)
        axis.set(
            title="Posteriors on the circle: true (filled) and found (lines)",
            xlabel="angle of the latent", ylabel="density", ylim=(0, None),
        )  # fmt: skip


def _on_circle(angle: np.ndarray, mu: np.ndarray, kappa: Any, family: Family = "vmf") -> np.ndarray:
    """The density over angles [A]; that of a family in the plane is gathered along each ray, by the midpoint rule."""
    if family == "vmf":
        off = np.cos(angle - math.atan2(mu[1], mu[0]))
        return np.exp(kappa * (off - 1.0)) / (2.0 * math.pi * float(torch.special.i0e(torch.as_tensor(float(kappa)))))
    reach = 1.0 + (8.0 / math.sqrt(kappa) if family == "gaussian" else 30.0 / kappa)  # nothing lies beyond
    radius = (np.arange(RADII)[:, None] + 0.5) * reach / RADII
    apart = [radius * side - centre for side, centre in zip((np.cos(angle), np.sin(angle)), mu, strict=True)]
    if family == "gaussian":
        density = kappa / (2.0 * math.pi) * np.exp(-kappa / 2.0 * (apart[0] ** 2 + apart[1] ** 2))
    else:
        density = kappa**2 / 4.0 * np.exp(-kappa * (np.abs(apart[0]) + np.abs(apart[1])))
    return (density * radius).sum(0) * reach / RADII
