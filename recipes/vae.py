"""A small variational autoencoder, and its codes as what is known of each image: a prior that no label has touched.

    pixels, others = (small(images, run.device) for images in (train, held_out))
    model, seen = train_vae(run, pixels, others, batch_size=256, epochs=10, dim=32)
    code = codes(model, pixels)                     # float32 [N, dim]

Images are looked at in 32 x 32 pixels. The likelihood is Gaussian with one learned deviation for all pixels, so that no
weight stands between the two terms (Rybkin, Daniilidis, Levine, arXiv 2006.13202).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.training_loop import Plan, Record, run_plan, step_generator
from .running import Run, scheduled, seeded_module
from .view_batches import BLOCK, BlockRows, Labelled, as_floats

SIDE, WIDTH = 32, 16
WEIGHTS, BATCHES, NOISE = 720, 721, 722  # places of the random numbers
LR, WARMUP = 2e-3, 0.05
USED = 0.01
"""Nats from which on a dimension of the code counts as used."""


class ConvVAE(nn.Module):
    """Images [B, channels, 32, 32] in 0..1 <-> codes [B, dim]; `forward` is the negative ELBO in nats a number of an image.

    Group normalisation, so that processes need no common statistics.
    """

    def __init__(self, channels: int, dim: int, width: int = WIDTH) -> None:
        super().__init__()
        sizes = (width, 2 * width, 4 * width)
        down: list[nn.Module] = []
        for inputs, outputs in pairwise((channels, *sizes)):
            down += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(sizes[2] * 16, 2 * dim))
        up: list[nn.Module] = [nn.Linear(dim, sizes[2] * 16), nn.Unflatten(1, (sizes[2], 4, 4))]
        for inputs, outputs in pairwise((*sizes[::-1], width)):
            up += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.GroupNorm(8, outputs),
                nn.SiLU(),
            ]
        self.decoder = nn.Sequential(*up, nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid())
        self.log_sigma = nn.Parameter(torch.tensor(-1.0))

    def code(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the codes' posterior, [B, dim] each."""
        mean, log_variance = self.encoder(images).float().chunk(2, 1)
        return mean, log_variance.clamp(-12.0, 12.0)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = self.code(images)
        decoded = self.decoder(mean + (0.5 * log_variance).exp() * noise).float()
        squared = (decoded - images).square().mean()
        likelihood = 0.5 * squared * (-2.0 * self.log_sigma).exp() + self.log_sigma + 0.5 * math.log(2.0 * math.pi)
        return likelihood + divergence(mean, log_variance).sum(1).mean() / images[0].numel()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of N(mean, variance) from N(0, 1) in nats, elementwise."""
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)


def small(images: Labelled, device: torch.device) -> Tensor:
    """All images in 32 x 32 pixels, uint8 [N, C, 32, 32], on the device."""
    parts = []
    for x in images.chunks(device):
        if x.shape[2] != SIDE:
            x = functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        parts.append((255.0 * x.clamp(0.0, 1.0)).round().byte())
    return torch.cat(parts)


def train_vae(
    run: Run, pixels: Tensor, held_out: Tensor, batch_size: int, epochs: int, dim: int
) -> tuple[ConvVAE, Record]:
    """Train on images as `small` makes them, uint8 [N, C, 32, 32]; the model, and what it makes of the held-out ones."""
    seed, launch, device = run.config.seed, run.launch, run.device
    others = as_floats(held_out, device)
    model: ConvVAE = seeded_module(lambda: ConvVAE(pixels.shape[1], dim), seed, WEIGHTS).to(device)
    rows = BlockRows(len(pixels), batch_size, step_generator(seed, BATCHES).initial_seed(), launch)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = as_floats(pixels[rows(step).to(device)], device)
        noise = torch.cat([torch.randn(BLOCK, dim, generator=one) for one in rows.generators(step, NOISE)])
        return x, noise.to(device)

    @torch.no_grad()
    def watch() -> Record:
        mean, log_variance = model.code(others)
        error = (model.decoder(mean) - others).square().mean().sqrt()
        used = divergence(mean, log_variance).mean(0) > USED
        return {
            "held_out_error": float(error),
            "dimensions_used": float(used.sum()),
            "sigma": float(model.log_sigma.exp()),
        }

    steps = epochs * rows.each
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    plan = Plan(
        name="vae",
        steps=steps,
        every=rows.each,
        batch=batch,
        evaluate=watch,
        folder=run.folder,
        signature=f"{run.signature} vae",
        observe=run.observe("vae", steps),
    )
    history = run_plan(model, optimizer, scheduled("cosine", optimizer, steps, WARMUP), plan)
    return model, {**history.records[-1], "seconds": round(history.seconds, 1)}


@torch.no_grad()
def codes(model: ConvVAE, pixels: Tensor) -> np.ndarray:
    """The mean code of each image of `small`, float32 [N, dim]."""
    model.eval()
    return torch.cat([model.code(as_floats(part, part.device))[0].cpu() for part in pixels.split(512)]).numpy()
