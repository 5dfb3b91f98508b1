"""What NT-Xent, TaU and AnInfoNCE share: each row of two stacked views against all other rows, loss and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import OptionError
from ..numerics import block_rows, first_order, unit_rows

CHUNK, CHUNK_GPU = 1 << 19, 1 << 22  # similarities of a slab of rows: what a cache holds, what fills a GPU


class Terms(NamedTuple):
    """What stands in a row's denominator.

    Attributes:
        distance: whether the similarity of rows is -|z_i - z_j|^2 / 2, not z_i.z_j.
        include_positive: whether the positive's term is added to those of the negatives.
        floor: a constant that is added too (0: none).
        hardness: beta >= 0. Negatives are weighted in proportion to exp(beta l_ij), and the weights get no gradient.
    """

    distance: bool = False
    include_positive: bool = True
    floor: float = 0.0
    hardness: float = 0.0


def contrast(z: Tensor, scale: Tensor, close: Tensor, terms: Terms, exclude: Tensor | None = None) -> Tensor:
    """Scalar loss mean_i (log D_i - close_i) of the rows of two views, one below the other.

    D_i sums exp(l_ij), l_ij = scale_i s_ij, over the negatives of row i: all rows but itself and its positive.
    One matrix [2N, 2N] at most is held, and none where z needs no gradient. Differentiable once.

    Args:
        z: [2N, D]; rows i and i + N are each other's positive. s_ij is their similarity.
        scale: [2N], >= 0.
        close: [2N], the logarithm of the positive's term.
        exclude: bool [2N, 2N], True where a column is no negative of a row; rows without any are left out of the mean.
    """
    # a scale of 0 times a barred similarity must stay what it is: the smallest number is as good
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return _Contrast.apply(z, scale, close, terms, exclude, torch.is_grad_enabled())


def unit_views(name: str, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows, float32 or float64, of two views [N, D]. Raises OptionError unless N >= 2 and the shapes agree."""
    if z1.ndim != 2 or len(z1) < 2 or z2.shape != z1.shape:
        shapes = f"{tuple(z1.shape)} and {tuple(z2.shape)}"
        raise OptionError(f"{name} expects two views [N, D] of the same N >= 2 images; the shapes given are {shapes}")
    return unit_rows(z1), unit_rows(z2)


class _Slab(NamedTuple):
    """Rows start..stop against the columns from `start` on, and those columns beyond `stop` against these rows.

    exp(l - shift) of both sides, [R, C] and [R, C - (stop - start)], their shifts, and the sums of exp(l - shift) s.
    """

    start: int
    stop: int
    row: Tensor
    row_shift: Tensor
    row_dot: Tensor
    column: Tensor
    column_shift: Tensor
    column_dot: Tensor


class _Contrast(torch.autograd.Function):
    """The similarities are symmetric: half of them are computed, and one product gives both sides' gradient."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, scale: Tensor, close: Tensor, terms: Terms, exclude: Tensor | None, recorded: bool
    ) -> Tensor:
        by_z, by_scale, by_close = (recorded and x for x in ctx.needs_input_grad[:3])
        sharp = scale * (1.0 + terms.hardness)
        log_sum = torch.full_like(scale, -math.inf)
        log_mass = torch.full_like(scale, -math.inf)  # of the hard negatives' weights
        size = max(32, block_rows(z, len(z), CHUNK, CHUNK_GPU))
        room = z.new_empty(len(z) * (len(z) if by_z else min(2 * size, len(z))))  # all slabs, or one
        slabs = []
        for start, stop, similarity in _similarities(z, size, terms.distance):
            if terms.hardness:
                _add_slab(start, stop, similarity, scale * terms.hardness, log_mass, exclude, room, False)
            slabs.append(_add_slab(start, stop, similarity, sharp, log_sum, exclude, room, by_scale))
            room = room[slabs[-1].row.numel() + slabs[-1].column.numel() :] if by_z else room
        used = log_sum != -math.inf  # not `>`: what is no number is to be seen in the loss
        count = used.sum().clamp(min=1)
        plain = log_sum - log_mass + math.log(len(z) - 2) if terms.hardness else log_sum
        far = torch.logaddexp(plain, plain.new_tensor(terms.floor).log()) if terms.floor else plain
        gap = far - close
        share = torch.sigmoid(gap) if terms.include_positive else torch.ones_like(gap)  # of the negatives in D
        weight = torch.where(used, share * (plain - far).exp(), 0.0) / count
        ctx.save_for_backward(
            _by_rows(z, slabs, log_sum, weight * scale, terms.distance) if by_z else None,
            _by_scale(slabs, log_sum, weight) if by_scale else None,
            torch.where(used, -share, 0.0) / count if by_close else None,
        )
        loss = -functional.logsigmoid(-gap) if terms.include_positive else gap
        return torch.where(used, loss, 0.0).sum() / count

    @staticmethod
    @first_order("a contrastive loss (NTXent, TaU, AnInfoNCE)")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else grads[0] * g for g in ctx.saved_tensors), None, None, None


def _similarities(z: Tensor, size: int, distance: bool) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, similarity of rows start..stop to the rows from start on), `size` rows at a time.

    A row's own column and its positive hold a lower bound of all similarities: they never decide a row's largest.
    """
    rows = len(z)
    square = z.square().sum(1)
    lowest = -2.0 * square.max()
    buffer = z.new_empty(min(size, rows) * rows)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        similarity = buffer[: (stop - start) * (rows - start)].view(stop - start, rows - start)
        torch.mm(z[start:stop], z[start:].T, out=similarity)
        if distance:
            similarity.sub_(square[start:] / 2).sub_(square[start:stop, None] / 2)
        for offset in (0, rows // 2, -(rows // 2)):
            similarity.diagonal(offset).fill_(lowest)
        yield start, stop, similarity


def _add_slab(
    start: int,
    stop: int,
    similarity: Tensor,
    scale: Tensor,
    log_sum: Tensor,
    exclude: Tensor | None,
    room: Tensor,
    dots: bool,
) -> _Slab:
    """Adds the slab's terms exp(scale * similarity) to the rows' running log_sum [2N]; they are left in `room`."""
    own, half = stop - start, len(scale) // 2
    beyond = similarity[:, own:]
    row_room, column_room = room[: similarity.numel() + beyond.numel()].split([similarity.numel(), beyond.numel()])
    barred = (None, None) if exclude is None else (exclude[start:stop, start:], exclude[stop:, start:stop].T)
    row = _exponentials(similarity, scale[start:stop, None], 1, barred[0], row_room)
    column = _exponentials(beyond, scale[stop:], 0, barred[1], column_room)
    for offset in (0, half, -half):
        row[0].diagonal(offset).zero_()
    column[0].diagonal(half - own).zero_()
    for part, dim, (value, shift) in ((slice(start, stop), 1, row), (slice(stop, None), 0, column)):
        log_sum[part] = torch.logaddexp(log_sum[part], value.sum(dim).log() + shift)
    column_dot = (column[0] * beyond).sum(0) if dots else column[1]
    row_dot = similarity.mul_(row[0]).sum(1) if dots else row[1]  # the similarities are not needed any more
    return _Slab(start, stop, *row, row_dot, *column, column_dot)


def _exponentials(
    similarity: Tensor, scale: Tensor, dim: int, barred: Tensor | None, room: Tensor
) -> tuple[Tensor, Tensor]:
    """exp(scale * similarity - shift), in `room`, with the largest of each row (dim 1) or column (dim 0) as shift."""
    out = room.view(similarity.shape)
    if similarity.shape[1] == 0:
        return out, similarity.new_empty(similarity.shape[1 - dim])
    if barred is not None:
        similarity = torch.where(barred, similarity.amin(), similarity, out=out)
    shift = similarity.amax(dim, keepdim=True) * scale
    torch.mul(similarity, scale, out=out).sub_(shift).exp_()
    return out if barred is None else out.masked_fill_(barred, 0.0), shift.squeeze(dim)


def _by_scale(slabs: list[_Slab], log_sum: Tensor, weight: Tensor) -> Tensor:
    grad = torch.zeros_like(weight)
    for s in slabs:
        grad[s.start : s.stop] += _rescale(s.row_shift, log_sum[s.start : s.stop], weight[s.start : s.stop]) * s.row_dot
        grad[s.stop :] += _rescale(s.column_shift, log_sum[s.stop :], weight[s.stop :]) * s.column_dot
    return grad


def _by_rows(z: Tensor, slabs: list[_Slab], log_sum: Tensor, weight: Tensor, distance: bool) -> Tensor:
    """The slabs' exponentials are used up."""
    grad = torch.zeros_like(z)
    for s in slabs:
        own, after = slice(s.start, s.stop), slice(s.start, None)
        both = s.row.mul_(_rescale(s.row_shift, log_sum[own], weight[own])[:, None])
        mirrored = _rescale(s.column_shift, log_sum[s.stop :], weight[s.stop :])
        both[:, s.stop - s.start :].addcmul_(s.column, mirrored)
        grad[own].addmm_(both, z[after])
        grad[after].addmm_(both.T, z[own])
        if distance:
            grad[own] -= both.sum(1, keepdim=True) * z[own]
            grad[after] -= both.sum(0)[:, None] * z[after]
    return grad


def _rescale(shift: Tensor, log_sum: Tensor, weight: Tensor) -> Tensor:
    """weight * exp(shift - log_sum); rows without negatives have weight 0 and log_sum -inf."""
    return torch.where(weight > 0, weight * (shift - log_sum).exp(), 0.0)
