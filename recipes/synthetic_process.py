"""The process that makes the data of MCInfoNCE's controlled experiment: images of ambiguous latents, and which of them match.

x is uniform on [0, 1]^D, its latent z lies on the sphere S^(d-1) round mu(x) with concentration kappa(x). Two images
match with probability P(z.z') = sigmoid(kappa_pos z.z' - r), the posterior of vMF(kappa_pos) against uniform.

Source: Kirchhof et al., ICML 2023, arXiv 2302.02865, and its code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..adapters.errors import DataError, OptionError
from ..adapters.files import replace_file
from ..adapters.losses.paper_sampler import paper_rsample
from ..adapters.store import default_cache_dir
from ..adapters.training_loop import step_generator
from ..adapters.vmf import VonMisesFisher, log_normalizer
from .encoders import RangedConcentration, VmfEncoder, mlp
from .running import seeded_module

Family = Literal["vmf", "gaussian", "laplace"]
PAPER_ERROR = {
    2: -0.198, 4: -0.585, 8: -1.310, 10: -1.647, 12: -1.969, 16: -2.572, 32: -4.394, 40: -5.008, 48: -5.468,
    56: -5.805, 64: -6.025, 96: -6.221, 128: -5.826, 256: -3.136, 512: -0.12,
}  # fmt: skip
"""By dimension: how far the paper's fitted constant r lies off at kappa_pos = 20."""
CALIBRATION = 1000
"""Inputs on which ranges of concentrations are fixed, and the spread of the mean directions is judged."""
SMOOTHING_STEPS, SMOOTHING_BATCH, SMOOTHING_LR = 5000, 64, 0.01
TRIES = 50
CANDIDATES = 32
"""Images looked at at once for a positive."""
AHEAD = 8
"""Steps drawn in one call: half the time of a call does not depend on the rows."""


@dataclass(frozen=True)
class ProcessConfig:
    """Of a process.

    Attributes:
        inputs, dim: dimensions of x and z. family: of z round mu(x); "gaussian" and "laplace" are projected on the sphere.
        lowest, highest: range of kappa(x); infinite: z is mu(x). spread: cosine that some pair of means must fall below.
        hidden, width: layers and width of the networks. shared: kappa is a function of mu(x) instead of x.
        positive: kappa_pos. constant: r, exact, or the paper's fit. sampler: exact, or the paper's.
    """

    inputs: int = 10
    dim: int = 10
    family: Family = "vmf"
    lowest: float = 16.0
    highest: float = 32.0
    spread: float = 0.5
    hidden: int = 1
    width: int = 10
    shared: bool = False
    positive: float = 20.0
    constant: Literal["exact", "paper"] = "exact"
    sampler: Literal["exact", "paper"] = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.inputs < 1 or self.dim < 2 or self.hidden < 1 or self.width < 1:
            raise OptionError(
                f"inputs={self.inputs}, dim={self.dim}, hidden={self.hidden}, width={self.width} were given; a process needs "
                "an input, a latent space of 2 dimensions, a hidden layer and a width of 1 or more"
            )
        if not 0 < self.lowest <= self.highest or not 0 < self.positive < math.inf:
            raise OptionError(
                f"concentrations from {self.lowest} to {self.highest} and kappa_pos={self.positive} were given; expected "
                "0 < lowest <= highest, and a positive number for kappa_pos"
            )
        if not -1 < self.spread <= 1:
            raise OptionError(f"spread={self.spread} was given; expected a cosine above -1 and at most 1")
        if self.constant == "paper" and (self.positive != 20.0 or self.dim not in PAPER_ERROR):
            raise OptionError(
                f"the paper's acceptance constant is known for kappa_pos=20 in dimensions {sorted(PAPER_ERROR)}; given "
                f"kappa_pos={self.positive:g}, dim={self.dim}: take the exact one"
            )


class Process(nn.Module):
    """The process itself; `draw` gives batches. Its networks are fixed.

    Attributes: encoder, the true posterior's mean and concentration of x [..., inputs]; offset, r.
    """

    def __init__(self, config: ProcessConfig) -> None:
        super().__init__()
        self.config = config
        middle = [config.width] * config.hidden
        ambiguity = mlp([config.dim if config.shared else config.inputs, *middle, 1])
        mean = mlp([config.inputs, *middle, config.width, config.dim])
        self.encoder = VmfEncoder(mean, RangedConcentration(ambiguity), config.shared)
        self.offset = acceptance_offset(config)

    def images(self, numbers: Numbers, rows: Tensor, each: int) -> Tensor:
        """x, uniform on [0, 1]^inputs: `each` for each row, [R, each, inputs]."""
        return numbers.uniform(rows, each, self.config.inputs).to(next(self.parameters()).device)

    def images_alone(self, rows: int, generator: torch.Generator) -> Tensor:
        """x [rows, inputs], from one generator."""
        numbers = Numbers([generator], rows)
        return self.images(numbers, numbers.rows, 1)[:, 0]

    def latents(self, x: Tensor, numbers: Numbers, rows: Tensor) -> Tensor:
        """One latent z, unit length, for each image: [R, K, inputs] -> [R, K, d]."""
        posterior = self.encoder(x)
        mu, kappa = posterior.mean_direction, posterior.concentration
        if self.config.family == "vmf" and self.config.sampler == "paper":
            return numbers.by_block(rows, lambda part, generator: _paper_samples(mu[part], kappa[part], generator))
        noise = numbers.normal(rows, *mu.shape[1:]).to(mu)
        if self.config.family == "vmf":
            return posterior.from_normal(numbers.normal(rows, *kappa.shape[1:]).to(kappa), noise)
        if self.config.family == "gaussian":
            return functional.normalize(mu + noise * kappa.rsqrt()[..., None], dim=-1)
        tail = torch.special.log_ndtr(-noise.abs()) + math.log(2.0)  # the logarithm of a uniform number
        return functional.normalize(mu - noise.sign() * tail / kappa[..., None], dim=-1)

    def match_probability(self, cosine: Tensor) -> Tensor:
        """P(two images match | the cosine of their latents)."""
        return torch.sigmoid(self.config.positive * cosine - self.offset)

    @torch.no_grad()
    def draw(self, numbers: Numbers, negatives: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [R, inputs], a matching one each [R, inputs], and [R, negatives, inputs] that do not match (None: 0).

        All are compared with one latent for each row. Exact: candidates are drawn until one of them is taken.
        """
        rows = numbers.rows
        # mixed precision is for what is trained: these data are the same with it and without
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            x = self.images(numbers, rows, 1)
            z = self.latents(x, numbers, rows)[:, 0]
            positive = self._fill(z, numbers, rows, True)
            if not negatives:
                return x[:, 0], positive, None
            far = self._fill(z.repeat_interleave(negatives, 0), numbers, rows.repeat_interleave(negatives), False)
        return x[:, 0], positive, far.reshape(len(rows), negatives, -1)

    def _fill(self, z: Tensor, numbers: Numbers, rows: Tensor, matching: bool) -> Tensor:
        """For each latent [N, d], of rows [N], an image [N, inputs] that matches it, or one that does not."""
        taken = z.new_empty(len(z), self.config.inputs)
        left = torch.arange(len(z))
        each = CANDIDATES if matching else 2  # few images match, nearly all do not
        while len(left):
            now, latent = rows[left], z[left.to(z.device), None]
            x = self.images(numbers, now, each)
            chance = self.match_probability((self.latents(x, numbers, now) * latent).sum(-1))
            good = (numbers.uniform(now, each).to(chance) < chance) == matching
            found, place = (v.cpu() for v in good.max(1))  # the first good one
            taken[left[found].to(z.device)] = x[found.to(z.device), place[found].to(z.device)]
            left, each = left[~found], 4 * each  # the few that are left get more at a time
        return taken


class Numbers:
    """Random numbers for rows, in equal blocks with a generator each: a block's are the same whatever others are there.

    Attributes: rows, [0, 1, ...] of all blocks.
    """

    def __init__(self, generators: Sequence[torch.Generator], block: int) -> None:
        self.generators, self.block = generators, block
        self.rows = torch.arange(len(generators) * block)

    def uniform(self, rows: Tensor, *shape: int) -> Tensor:
        """Numbers [R, *shape] for rows [R] in ascending order; a row may stand there several times."""
        return self.by_block(rows, lambda part, g: torch.rand((part.stop - part.start, *shape), generator=g))

    def normal(self, rows: Tensor, *shape: int) -> Tensor:
        return self.by_block(rows, lambda part, g: torch.randn((part.stop - part.start, *shape), generator=g))

    def by_block(self, rows: Tensor, make: Callable[[slice, torch.Generator], Tensor]) -> Tensor:
        """What `make` gives for the places in `rows` of each block and its generator, one below the other."""
        ends = torch.bincount(rows // self.block, minlength=len(self.generators)).cumsum(0).tolist()
        parts = zip([0, *ends], ends, self.generators, strict=False)
        return torch.cat([make(slice(start, stop), g) for start, stop, g in parts if stop > start])


class Batches:
    """The batch of a step of a stage: what `Process.draw` gives for the rows of the step's own blocks, drawn ahead.

    Args: blocks: of these rows of the batch, this process's; `block` rows each. position: seed and stream of the numbers.
    """

    def __init__(self, process: Process, blocks: Sequence[int], block: int, position: tuple[int, ...]) -> None:
        self.process, self.blocks, self.block, self.position = process, blocks, block, position
        self.chunk: tuple[int, ...] = ()

    def __call__(self, stage: int, step: int, negatives: int) -> tuple[Tensor, Tensor, Tensor | None]:
        number, place = divmod(step, AHEAD)
        if self.chunk != (stage, number, negatives):
            self.drawn = self._draw(stage, range(number * AHEAD, (number + 1) * AHEAD), negatives)
            self.chunk = (stage, number, negatives)
        anchor, positive, far = self.drawn
        rows = slice(place * len(anchor) // AHEAD, (place + 1) * len(anchor) // AHEAD)
        return anchor[rows], positive[rows], None if far is None else far[rows]

    def _draw(self, stage: int, steps: range, negatives: int) -> tuple[Tensor, Tensor, Tensor | None]:
        places = [(*self.position, stage, step, block, 0) for step in steps for block in self.blocks]
        return self.process.draw(Numbers([step_generator(*place) for place in places], self.block), negatives)


def _paper_samples(mu: Tensor, kappa: Tensor, generator: torch.Generator) -> Tensor:
    return paper_rsample(VonMisesFisher(mu, kappa, validate_args=False), 1, generator)[0]


def acceptance_offset(config: ProcessConfig) -> float:
    """r = log C_d(0) - log C_d(kappa_pos), where vMF(kappa_pos) and the uniform distribution have equal density."""
    ends = log_normalizer(torch.tensor([0.0, config.positive], dtype=torch.float64), config.dim)
    return float(ends[0] - ends[1]) + (PAPER_ERROR[config.dim] if config.constant == "paper" else 0.0)


def make_process(config: ProcessConfig, cache_dir: Path | None = None, progress: bool = True) -> Process:
    """The process of `config`, conditioned as in the paper, from the cache or built (seconds).

    Weights are drawn and the mean's network is trained until distances of images and of their means agree, anew until
    some pair of means is farther apart than `spread`. Raises DataError when that fails again and again.
    """
    folder = cache_dir or default_cache_dir() / "processes"
    key = sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{key}.safetensors"
    process = Process(config)
    if path.exists():
        try:
            process.load_state_dict(load_tensors(path.read_bytes()))
        except Exception as error:  # safetensors' own error, or other tensors
            raise DataError(f"{path} is no stored process ({error}): delete it, and it is built again") from error
        return process.requires_grad_(False)
    reached = 1.0
    for attempt in range(TRIES):
        process = seeded_module(lambda: Process(config), config.seed, attempt)
        _smooth(process, config.seed, attempt, progress)
        x = process.images_alone(CALIBRATION, step_generator(config.seed, attempt, 1))
        with torch.no_grad():
            mu = process.encoder.direction(x)
        lowest = float((mu @ mu.T).min())
        if lowest <= config.spread:
            # last, as a shared network's concentrations depend on the mean's
            process.encoder.calibrate(x, config.lowest, config.highest)
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, save_tensors(process.state_dict()))
            return process.requires_grad_(False)
        reached = min(reached, lowest)
    raise DataError(
        f"none of {TRIES} processes had a pair of means with a cosine below {config.spread}, the lowest was {reached:.3f}: "
        "give a larger spread"
    )


def _smooth(process: Process, seed: int, attempt: int, progress: bool) -> None:
    """Train the mean's network so that distances of images and of their means agree, near ones above all."""
    optimizer = torch.optim.Adam(process.encoder.mean.parameters(), lr=SMOOTHING_LR)
    low = torch.tril_indices(SMOOTHING_BATCH, SMOOTHING_BATCH).unbind()
    x = process.images_alone(SMOOTHING_STEPS * SMOOTHING_BATCH, step_generator(seed, attempt, 0)).split(SMOOTHING_BATCH)
    for batch in tqdm(x, desc=f"process, try {attempt + 1}", unit="step", disable=not progress, leave=False):
        mu = process.encoder.direction(batch)
        between = torch.cdist(batch, batch)[low]
        apart = 1.0 - (mu @ mu.T)[low] / 2.0  # the paper's code; of a pair of one and the same image it is 1/2
        loss = ((between - apart).square() * (math.sqrt(2.0) - apart.detach()).pow(4)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
