"""Each objective as one would first write it: vectorised PyTorch straight from the formula, gradients by autograd.

They are right (no error of a paper's code is repeated), and they are what `losses.py` compares the library's with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

Posterior = tuple[Tensor, Tensor]  # mean directions [..., d] and concentrations [...]


def von_mises_fisher(mu: Tensor, kappa: Tensor, samples: int) -> Tensor:
    """Full vectors [samples, ..., d], by rejection (Wood 1994) that redraws the rejected ones only.

    The gradient for kappa is that of the accepted proposals.
    """
    n = mu.shape[-1] - 1
    b = n / (2 * kappa + (4 * kappa**2 + n**2).sqrt())
    x0 = (1 - b) / (1 + b)
    c = kappa * x0 + n * torch.log1p(-(x0**2))
    with torch.no_grad():
        shape = (samples, *kappa.shape)
        left = torch.arange(math.prod(shape), device=mu.device)
        flat = [x.expand(shape).reshape(-1) for x in (b, x0, c, kappa)]
        proposal = torch.empty(len(left), device=mu.device)
        half = torch.tensor(n / 2, device=mu.device)
        beta = torch.distributions.Beta(half, half)
        while len(left):
            bl, xl, cl, kl = (x[left] for x in flat)
            draw = beta.sample((len(left),))
            w = (1 - (1 + bl) * draw) / (1 - (1 - bl) * draw)
            accepted = kl * w + n * torch.log1p(-xl * w) - cl >= torch.rand_like(w).log()
            proposal[left[accepted]] = draw[accepted]
            left = left[~accepted]
    draw = proposal.view(shape)
    w = (1 - (1 + b) * draw) / (1 - (1 - b) * draw)
    tangent = torch.randn(*shape, n, device=mu.device)
    tangent = functional.normalize(tangent, dim=-1) * (1 - w**2).clamp(min=1e-10).sqrt()[..., None]
    z = torch.cat([w[..., None], tangent], -1)
    first = functional.one_hot(torch.zeros((), dtype=torch.long, device=mu.device), n + 1).to(mu)
    mirror = functional.normalize(first - mu, dim=-1)  # the reflection that takes the first axis to mu
    return z - 2 * (z * mirror).sum(-1, keepdim=True) * mirror


def _sampled(
    anchor: Posterior, positive: Posterior, negatives: Posterior | None, samples: int
) -> tuple[Tensor, Tensor]:
    """Cosines of the anchor's samples with the positive's [S, B] and the negatives' [S, B, M]."""
    a, p = von_mises_fisher(*anchor, samples), von_mises_fisher(*positive, samples)
    far = p.roll(1, 1)[:, :, None] if negatives is None else von_mises_fisher(*negatives, samples)
    return (a * p).sum(-1), (a[:, :, None] * far).sum(-1)


def mcinfonce(
    anchor: Posterior, positive: Posterior, negatives: Posterior | None, samples: int, tau: float = 16.0
) -> Tensor:
    close, far = _sampled(anchor, positive, negatives, samples)
    negative = torch.logsumexp(tau * far, -1) - math.log(far.shape[-1])
    share = functional.logsigmoid(tau * close - negative)
    return (math.log(samples) - torch.logsumexp(share, 0)).mean()


def hedged_instance(
    anchor: Posterior, positive: Posterior, negatives: Posterior | None, samples: int, scale: float, shift: float
) -> Tensor:
    close, far = _sampled(anchor, positive, negatives, samples)
    match = functional.logsigmoid(scale * close + shift).mean(0)
    other = functional.logsigmoid(-scale * far - shift).mean((0, 2)) / far.shape[-1]
    return -(match + other).mean()


def expected_likelihood(anchor: Posterior, positive: Posterior, negatives: Posterior, tau: float = 20.0) -> Tensor:
    from posthoc.adapters.vmf import log_normalizer

    dim = anchor[0].shape[-1]
    mu = torch.cat([positive[0][:, None], negatives[0]], 1)
    kappa = torch.cat([positive[1][:, None], negatives[1]], 1)
    both = (anchor[1][:, None, None] * anchor[0][:, None] + kappa[..., None] * mu).norm(dim=-1)
    log_c = [log_normalizer(k.double(), dim) for k in (anchor[1][:, None], kappa, both)]
    kernel = (tau * (log_c[0] + log_c[1] - log_c[2])).float()
    return (torch.logsumexp(kernel, 1) - kernel[:, 0]).mean()


def _unit(*views: Tensor) -> list[Tensor]:
    return [functional.normalize(x, dim=-1) for x in views]


def ntxent(z1: Tensor, z2: Tensor, t: float) -> Tensor:
    n, z = len(z1), torch.cat(_unit(z1, z2))
    other = ~torch.eye(2 * n, dtype=torch.bool, device=z.device)
    denominator = torch.exp(z @ z.T / t).masked_select(other).view(2 * n, -1).sum(-1)
    positive = torch.exp((z[:n] * z[n:]).sum(-1) / t).repeat(2)
    return -torch.log(positive / denominator).mean()


def tau(z1: Tensor, z2: Tensor, r1: Tensor, r2: Tensor, t: float) -> Tensor:
    """The masked-select version."""
    n, z = len(z1), torch.cat(_unit(z1, z2))
    scale = torch.sigmoid(torch.cat([r1, r2]))
    every = torch.exp(z @ z.T * scale[:, None].repeat(1, 2 * n) / t)
    negative = ~torch.eye(n, dtype=torch.bool, device=z.device).repeat(2, 2)
    denominator = every.masked_select(negative).view(2 * n, -1).sum(-1) + 1e-6
    positive = torch.exp((z[:n] * z[n:]).sum(-1).repeat(2) * scale / t)
    return -torch.log(positive / denominator).mean()


def tau_moco(query: Tensor, key: Tensor, queue: Tensor, r: Tensor, t: float) -> Tensor:
    q, k, u = _unit(query, key, queue)
    scale = torch.sigmoid(r)[:, None] / t
    logits = torch.cat([(q * k).sum(-1, keepdim=True), q @ u.T], 1) * scale
    return functional.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def aninfonce(z1: Tensor, z2: Tensor, raw: Tensor) -> Tensor:
    """Three N x N products, with boolean gathering of what is off the diagonal."""
    a, b = _unit(z1, z2)
    n, precision = len(a), functional.softplus(raw)
    other = ~torch.eye(n, dtype=torch.bool, device=a.device)

    def similarity(u: Tensor, v: Tensor) -> Tensor:
        return (u * precision) @ v.T - (u**2 * precision).sum(-1)[:, None] / 2 - (v**2 * precision).sum(-1) / 2

    within_a, within_b, across = similarity(a, a), similarity(b, b), similarity(a, b)
    positive = across.diagonal()[:, None]
    rows = [
        torch.cat([positive, within[other].view(n, n - 1), cross[other].view(n, n - 1)], 1)
        for within, cross in ((within_a, across), (within_b, across.T))
    ]
    return torch.cat([row.logsumexp(1) - row[:, 0] for row in rows]).mean()


def aninfonce_ensemble(pairs: list[tuple[Tensor, Tensor]], raw: Tensor) -> Tensor:
    """The sum over families; raw [families, D]."""
    return torch.stack([aninfonce(*pair, one) for pair, one in zip(pairs, raw, strict=True)]).sum()


def hedged_gaussian(moments: list[Tensor], S: int, scale: float, shift: float, weight: float = 1e-4) -> Tensor:
    """Mean and deviation of anchors and positives [N, D], with rolled negatives: all differences of samples at once."""
    m1, s1, m2, s2 = moments

    def chance(mean: Tensor, std: Tensor) -> Tensor:
        a, b = (m[:, None] + s[:, None] * torch.randn(len(m), S, m.shape[1]).to(m) for m, s in ((m1, s1), (mean, std)))
        return torch.sigmoid(shift - scale * (a[:, :, None] - b[:, None]).norm(dim=-1)).mean((1, 2))

    loss = -chance(m2, s2).log().mean() - (1.0 - chance(m2.roll(1, 0), s2.roll(1, 0))).log().mean()
    kl = [0.5 * (m**2 + s**2 - 1.0 - 2.0 * s.log()).sum(-1).mean() for m, s in ((m1, s1), (m2, s2))]
    return loss + weight * (kl[0] + kl[1])


def mutual_likelihood(m1: Tensor, log1: Tensor, m2: Tensor, log2: Tensor) -> Tensor:
    variance = log1.exp() + log2.exp()
    return ((m1 - m2) ** 2 / variance + variance.log()).mean()


def loss_ranking(u: Tensor, target: Tensor, margin: float) -> Tensor:
    sign = torch.where(target[0::2] > target[1::2], 1.0, -1.0)
    return torch.clamp(margin - sign * (u[0::2] - u[1::2]), min=0.0).mean()


def loss_mse(u: Tensor, target: Tensor) -> Tensor:
    return ((u - target) ** 2).mean()


def decoupled_uniformity(views: Tensor, prior: Tensor | None, t: float = 2.0, sigma: float = 20.0) -> Tensor:
    """With an explicit inverse and pdist."""
    mean = functional.normalize(views, dim=-1).mean(1)
    if prior is not None:
        gram = torch.exp(-(torch.cdist(prior, prior) ** 2) / (2 * sigma**2))
        mean = torch.linalg.inv(gram + 0.01 * torch.eye(len(gram), device=gram.device)) @ gram @ mean
    return torch.exp(-t * functional.pdist(mean) ** 2).mean().log()


def contrastive_metric(embedding: Tensor, label: Tensor, margin: float) -> Tensor:
    """Every triplet that d_an <= d_ap + margin keeps, as a list."""
    z = functional.normalize(embedding, dim=-1)
    distance = torch.cdist(z, z)
    with torch.no_grad():
        same = label[:, None] == label[None, :]
        positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
        kept = distance[:, None, :] <= distance[:, :, None] + margin  # [anchor, positive, negative]
        a, p, n = (kept & positive[:, :, None] & ~same[:, None, :]).nonzero(as_tuple=True)
    close, far = distance[a, p], distance[a, n]
    pull, push = close[close > 0], margin - far[far < margin]
    return pull.sum() / max(len(pull), 1) + push.sum() / max(len(push), 1)
