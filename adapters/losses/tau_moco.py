"""TaU-MoCo: temperature as uncertainty against a queue of keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import OptionError
from ..numerics import block_rows, first_order, full, unit_rows
from .common import check_positive
from .contrast import CHUNK, CHUNK_GPU


class TaUMoCo(nn.Module):
    """MoCo's loss with a temperature for each query, t / sigmoid(r): it scales the query's whole row of cosines.

    loss = mean_i -log exp(s_i q_i.k_i) / (exp(s_i q_i.k_i) + sum_m exp(s_i q_i.n_m)), s_i = sigmoid(r_i) / t, n_m the rows
    of the queue. The positive is in the denominator, so the loss is not below 0. Of the temperatures only the query's
    enters. (The paper's code takes 1 from every cosine, which changes nothing.)

    Args:
        base_temperature: t > 0, the lowest temperature.
    Source: Zhang et al., arXiv 2110.04403; `MomentumContrast` has the queue and the keys' encoder.
    """

    def __init__(self, base_temperature: float = 0.1) -> None:
        super().__init__()
        check_positive("TaUMoCo", base_temperature=base_temperature)
        self.base_temperature = base_temperature

    def forward(self, query: Tensor, key: Tensor, queue: Tensor, r_query: Tensor) -> Tensor:
        """Scalar loss, at least float32; key and queue get no gradient.

        Args:
            query, key: embeddings of an image's two views [N, D], the key of the momentum encoder, of any length.
            queue: other images' keys [K, D], K >= 1, of any length.
            r_query: raw outputs [N]; `temperature` of posthoc.adapters.losses.tau makes temperatures of them.
        Raises: OptionError if the shapes do not fit.
        """
        n = len(query)
        fits = query.ndim == 2 and n > 0 and key.shape == query.shape and r_query.shape == (n,)
        if not fits or queue.ndim != 2 or len(queue) < 1 or queue.shape[1] != query.shape[1]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, queue, r_query))
            raise OptionError(f"TaUMoCo expects [N, D], [N, D], [K, D], [N]; the shapes given are {shapes}")
        with torch.autocast(query.device.type, enabled=False):
            q = unit_rows(query)
            k = functional.normalize(key.detach().to(q), dim=-1)
            scale = torch.sigmoid(full(r_query)).to(q) / self.base_temperature
            scaled = q * scale[:, None]
            far = _LogSumExp.apply(scaled, queue.detach(), torch.is_grad_enabled())
            close = (scaled * k).sum(-1)
            return -functional.logsigmoid(close - far).mean()


class _LogSumExp(torch.autograd.Function):
    """log sum_m exp(q_i . n_m / |n_m|), [N, D] and [K, D] to [N], with its gradient for q in one pass over the keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, recorded: bool) -> Tensor:
        needed = recorded and ctx.needs_input_grad[0]
        size = max(32, block_rows(q, max(q.shape), CHUNK, CHUNK_GPU))
        top = q.new_full((len(q),), -math.inf)
        mass, mean = torch.zeros_like(top), torch.zeros_like(q)
        for block in keys.split(size):
            n = functional.normalize(block.to(q), dim=-1)
            logit = q @ n.T
            higher = torch.maximum(top, logit.amax(1))
            share = logit.sub_(higher[:, None]).exp_()
            fade = (top - higher).exp_()
            mass = mass * fade + share.sum(1)
            if needed:
                mean = torch.addmm(mean * fade[:, None], share, n)
            top = higher
        ctx.save_for_backward(mean / mass[:, None] if needed else None)
        return top + mass.log()

    @staticmethod
    @first_order("TaUMoCo")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mean,) = ctx.saved_tensors
        return grads[0][:, None] * mean, None, None
