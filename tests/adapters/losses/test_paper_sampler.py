"""The papers' sampler, which is kept for comparisons: what it gets wrong is as wrong here."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from posthoc.adapters.losses.paper_sampler import paper_rsample
from posthoc.adapters.vmf import VonMisesFisher


def test_golden_cosines_and_their_gradient(shared: Path) -> None:
    """Means, shares below the stored quantiles, and the pathwise gradient for kappa, which leaves the rejection out."""
    golden = np.load(shared / "golden/mcinfonce/vmf_sampler_stats.npz")
    generator = torch.Generator().manual_seed(0)
    n, stored, probs = 2000, 20_000, golden["probs"]
    wrong = biased = 0
    for i, dim in enumerate(golden["dims"].tolist()):
        axis = torch.eye(dim, dtype=torch.float64)[0]
        kappa = torch.tensor(golden["kappas"], dtype=torch.float64).expand(n, -1).clone().requires_grad_()
        cosine = paper_rsample(VonMisesFisher(axis, kappa), 1, generator)[0, ..., 0]
        (grad,) = torch.autograd.grad(cosine.sum(), kappa)
        seen, slope = cosine.detach().numpy(), grad.numpy()
        error = np.hypot(seen.std(0) / math.sqrt(n), golden["ref_se"][i])
        assert (np.abs(seen.mean(0) - golden["ref_mean_cos"][i]) < 4.0 * error).all(), dim
        wrong += int((np.abs(seen.mean(0) - golden["A"][i]) > 8.0 * error).sum())
        share = (seen[..., None] < golden["ref_q"][i]).mean(0)
        spread = np.sqrt(probs * (1.0 - probs) * (1.0 / n + 1.0 / stored))
        assert (np.abs(share - probs) < 4.5 * spread).all(), dim
        error = slope.std(0) * math.sqrt(1.0 / n + 1.0 / stored)
        assert (np.abs(slope.mean(0) - golden["ref_pathwise_grad"][i]) < 4.5 * error + 1e-6).all(), dim
        biased += int((np.abs(slope.mean(0) - golden["dA"][i]) > 8.0 * error).sum())
    assert wrong >= 5, "were the sampler right there would be no need for it"
    assert biased >= 5


def test_a_concentration_that_is_no_number_ends(generator: torch.Generator) -> None:
    kappa = torch.tensor([math.nan, 5.0])
    z = paper_rsample(VonMisesFisher(torch.eye(4)[:2], kappa, validate_args=False), 3, generator)
    assert z[:, 0].isnan().all()
    assert z[:, 1].isfinite().all()
