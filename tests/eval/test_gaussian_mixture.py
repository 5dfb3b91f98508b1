"""The Gaussian mixture beside pytorch-ood's, and beside the densities themselves."""

import numpy as np
import pytest
import torch

from posthoc.eval.gaussian_mixture import gaussian_mixture


def rows(classes: int, each: int, dim: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(classes).repeat_interleave(each)[torch.randperm(classes * each, generator=generator)]
    means = torch.randn(classes, dim, generator=generator)
    z = means[label] + torch.randn(len(label), dim, generator=generator)
    return z, label, torch.randn(50, dim, generator=generator)


@pytest.mark.parametrize(("classes", "each", "dim"), [(4, 40, 12), (4, 12, 12), (5, 7, 60), (3, 1, 20)])
@pytest.mark.parametrize("regularizer", [1e-6, 1e-2])
def test_it_is_pytorch_oods_mixture(classes, each, dim, regularizer):
    module = pytest.importorskip("pytorch_ood.detector", reason="pytorch-ood (extra `eval`) is not installed")
    z, label, x = rows(classes, each, dim)
    theirs = module.GMM(None, regularizer).fit_features(z, label).predict_features(x)
    assert gaussian_mixture(z, label, regularizer)(x).numpy() == pytest.approx(theirs.numpy(), rel=1e-7)


def test_classes_of_different_sizes_weigh_as_their_shares():
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    z, label, x = rows(3, 20, 6)
    keep = (label != 1) | (torch.arange(len(label)) < 25)
    z, label = z[keep], label[keep] * 7  # not every number is a class
    parts = []
    for c in label.unique():
        own = z[label == c].double().numpy()
        density = multivariate_normal(own.mean(0), np.cov(own.T, bias=True) + 0.1 * np.eye(6))
        parts.append(density.logpdf(x.double().numpy()) + np.log(len(own) / len(z)))
    assert gaussian_mixture(z, label, 0.1)(x).numpy() == pytest.approx(-logsumexp(np.stack(parts), axis=0), rel=1e-9)


def test_rows_are_scored_alike_in_parts_and_together(monkeypatch):
    z, label, x = rows(4, 10, 30)
    whole = gaussian_mixture(z, label, 1e-3)(x)
    monkeypatch.setattr("posthoc.eval.gaussian_mixture.NUMBERS", 300)
    assert torch.allclose(gaussian_mixture(z, label, 1e-3)(x), whole, rtol=1e-12)
