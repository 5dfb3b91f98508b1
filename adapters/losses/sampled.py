"""Losses of sampled cosines, value and gradients in one pass over blocks of rows; MCInfoNCE and HedgedInstance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from ..numerics import block_rows, first_order
from ..vmf import VonMisesFisher
from .cosines import Block, prepare
from .draws import Draws, SobolDraws
from .paper_sampler import paper_cosines
from .posteriors import check_posteriors, columns

# Elements of a block of rows: what a cache holds and a call of an operation is worth, and what fills a GPU. On the CPU
# larger blocks, 1 MB a tensor, are returned to the system and fetched again each time.
CHUNK, CHUNK_GPU = 1 << 17, 1 << 22
PREPARED = 1 << 11  # columns of at most 128 dimensions whose tables and frames are looked up at once

# Rows take cosines [R, J, S] (the positives first) and parameters (scalars), and give the summed loss of the rows, its
# gradient for the cosines, and those for the parameters.
Rows = Callable[..., tuple[Tensor, ...]]
Evaluate = Callable[..., tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]]  # as `evaluate_block`


class Sampling(NamedTuple):
    """How a loss draws samples: their number, whether in opposite pairs, or by Sobol points, or as the paper's code."""

    samples: int
    antithetic: bool = True
    sobol: bool = False
    positives: int = 1
    reference: bool = False


def sampled_loss(
    name: str,
    rows: Rows,
    parameters: tuple[Tensor | float, ...],
    posteriors: tuple[VonMisesFisher, VonMisesFisher, VonMisesFisher | None],
    sampling: Sampling,
    generator: torch.Generator | None,
    compiled: bool = False,
) -> Tensor:
    """Mean over the rows of a loss of sampled cosines, for posteriors of batch shapes [B], [B] and [B, M] or None."""
    check_posteriors(name, *posteriors)
    anchor, positive, negatives = posteriors
    mu, kappa = columns(positive, negatives, sampling.positives)
    scalars = [torch.as_tensor(p, dtype=mu.dtype, device=mu.device) for p in parameters]
    with torch.autocast(mu.device.type, enabled=False):
        if sampling.reference:
            return _GivenLoss.apply(paper_cosines(*posteriors, sampling.samples, generator), rows, *scalars)
        inputs = Inputs(anchor.mean_direction.to(mu), anchor.concentration.to(kappa), mu, kappa)
        evaluate = Compiled(name) if compiled else evaluate_block
        return _SampledLoss.apply(rows, sampling, evaluate, generator, torch.is_grad_enabled(), *inputs, *scalars)


class Inputs(NamedTuple):
    """Mean directions and concentrations of anchors, [B, d] and [B], and of columns, [B, J, d] and [B, J]."""

    anchor_mu: Tensor
    anchor_kappa: Tensor
    mu: Tensor
    kappa: Tensor


class _SampledLoss(torch.autograd.Function):
    """The loss and its gradients in one pass over blocks of rows, each with all its samples: nothing is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Rows,
        sampling: Sampling,
        evaluate: Evaluate,
        generator: torch.Generator | None,
        recorded: bool,
        *tensors: Tensor,
    ) -> Tensor:
        plain = [x.detach() for x in tensors]  # a compiler would trace what hangs on gradients
        inputs, parameters = Inputs(*plain[:4]), tuple(plain[4:])
        needed = recorded and any(ctx.needs_input_grad)
        grads = [torch.empty_like(x) for x in inputs] if needed else []
        by_parameters = [torch.zeros_like(p) for p in parameters]
        total = inputs.mu.new_zeros(())
        count = len(inputs.mu)
        with _one_thread():
            for part, block in _blocks(inputs, sampling, generator):
                value, slopes, gradients = evaluate(block, rows, parameters, needed)
                total += value
                for sum_, slope in zip(by_parameters, slopes, strict=True):
                    sum_ += slope
                for out, g in zip(grads, gradients, strict=True):
                    out[part] = g
            ctx.save_for_backward(*(g.div_(count) for g in [*grads, *by_parameters]))
        return total / count

    @staticmethod
    @first_order("a loss of sampled cosines (MCInfoNCE, HedgedInstance)")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, None, *(grads[0] * g for g in ctx.saved_tensors)


def _blocks(inputs: Inputs, sampling: Sampling, generator: torch.Generator | None) -> Iterator[tuple[slice, Block]]:
    """Rows, and all that their loss is computed from, block after block."""
    count, others = inputs.kappa.shape
    draws = (
        SobolDraws(inputs.mu, sampling.samples, others, generator)
        if sampling.sobol
        else Draws(inputs.mu, sampling.samples, sampling.antithetic, generator)
    )
    group, size = _sizes(inputs.mu, sampling.samples)
    for start in range(0, count, size):
        first = start % group
        if first == 0:
            anchor_mu, anchor_kappa, mu, kappa = (x[start : start + group] for x in inputs)
            ready = prepare(anchor_mu, anchor_kappa, mu, kappa, draws)
        draws.restart()
        yield slice(start, start + size), ready.draw(slice(first, first + size))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations on what fits a cache take microseconds: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evaluate_block(
    block: Block, rows: Rows, parameters: tuple[Tensor, ...], needed: bool
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Summed loss of a block's rows, its gradients for the parameters, and where `needed` those for the posteriors."""
    sampled = block.sample()
    value, grad, *slopes = rows(sampled.cosine, *parameters)
    return value, tuple(slopes), sampled.pull_back(grad) if needed else ()


class Compiled:
    """`evaluate_block` by torch.compile, for one call of a loss: the rows of blocks may vary, all else is fixed."""

    def __init__(self, name: str) -> None:
        self.name, self.most_rows = name, 0

    def __call__(self, block: Block, *rest: Any) -> Any:
        rows = len(block.scores.scores)
        if self.most_rows == 0:
            self.most_rows = rows
            if rows > 1:
                _let_rows_vary(block)
        if rows < 2 <= self.most_rows:
            return evaluate_block(block, *rest)  # torch compiles a single row apart: not worth it for a last one
        try:
            return _compiler()(block, *rest)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise OptionError(
                f"{self.name}(compiled=True) could not be compiled: {str(error).strip().splitlines()[0]}. torch.compile needs a "
                "C++ compiler on a CPU (g++, or what CXX names, with its headers) and Triton on a GPU: install it, or leave "
                "compiled=False"
            ) from error


@lru_cache(maxsize=1)
def _compiler() -> Evaluate:
    # what takes more than 10 operations (by default 30) is kept and not computed again: a tenth less time on a CPU
    return torch.compile(evaluate_block, dynamic=False, options={"realize_opcount_threshold": 10})


def _let_rows_vary(part: object) -> None:
    """Tells torch.compile that tensors of a block, but for its constants, may have other rows in other calls."""
    if isinstance(part, Tensor) and part.ndim > 1:
        torch._dynamo.mark_dynamic(part, 0)
    elif isinstance(part, tuple):
        for each in part:
            _let_rows_vary(each)


def _sizes(mu: Tensor, samples: int) -> tuple[int, int]:
    """Rows that are prepared at once, and rows of a block, for columns [B, J, d]."""
    _, others, dim = mu.shape
    block = block_rows(mu, others * max(samples, dim), CHUNK, CHUNK_GPU)
    prepared = PREPARED * 128 // (others * max(dim, 128))
    return max(1, prepared // block) * block, block


class _GivenLoss(torch.autograd.Function):
    """The same loss for cosines [B, J, S] that were sampled elsewhere."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, rows: Rows, *parameters: Tensor) -> Tensor:
        value, *grads = (x / len(cosine) for x in rows(cosine, *parameters))
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @first_order("a loss of sampled cosines (MCInfoNCE, HedgedInstance)")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, *parameters = (grads[0] * g for g in ctx.saved_tensors)
        return cosine, None, *parameters
