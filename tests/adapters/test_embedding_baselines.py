"""Every method under the one contract, and what each must do that the others need not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from posthoc.adapters.embedding_baselines import (
    DeepEnsemble,
    Deterministic,
    EmbeddingData,
    HedgedInstance,
    Laplace,
    MCDropout,
    ProbabilisticFace,
    SharedDropout,
    procrustes,
)
from posthoc.adapters.errors import OptionError
from posthoc.adapters.training import TrainOptions
from posthoc.eval import retrieval_statistics, search

METHODS = [Deterministic, MCDropout, DeepEnsemble, ProbabilisticFace, HedgedInstance, Laplace]


def clusters(hidden: int | None = None, epochs: int = 12) -> EmbeddingData:
    rng = np.random.default_rng(0)
    label = rng.integers(5, size=300)
    x = (np.eye(5, 10)[label] * 2 + 0.35 * rng.normal(size=(300, 10))).astype(np.float32)
    rows = np.arange(300)
    options = TrainOptions(batch_size=60, epochs=epochs, lr=1e-2, progress=False)
    return EmbeddingData(x - x.mean(0), label, rows[:220], rows[220:], dim=4, hidden=hidden, options=options)


@pytest.mark.parametrize("hidden", [None, 16], ids=["linear", "perceptron"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_by_the_same_contract(method: type[nn.Module], hidden: int | None) -> None:
    data = clusters(hidden)
    before = torch.get_rng_state()
    made = method()
    assert made.fit(data)
    x = torch.from_numpy(data.inputs)
    answer = made.embed(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert answer.mean_direction.shape == answer.spread.shape == (300, 4)
    torch.testing.assert_close(answer.mean_direction.norm(dim=-1), torch.ones(300))
    assert answer.uncertainty.shape == answer.kappa.shape == (300,)
    assert answer.uncertainty.isfinite().all()
    assert (answer.uncertainty.std() > 0) == (method is not Deterministic)
    assert answer.samples.shape[1:] == (300, 4)
    torch.testing.assert_close(answer.samples.norm(dim=-1), torch.ones(answer.samples.shape[:2]))
    hits, _ = retrieval_statistics.label_hits(search.neighbours(answer.mean_direction), data.label)
    assert retrieval_statistics.recall_at(hits, 1) > 0.9
    again = made.embed(x[:7])
    if method not in (ProbabilisticFace, HedgedInstance):  # whose samples are drawn for a place in the batch
        torch.testing.assert_close(again.samples, answer.samples[:, :7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.uncertainty, answer.uncertainty[:7], rtol=1e-3, atol=1e-6)


def test_members_are_turned_onto_the_first(generator: torch.Generator) -> None:
    u = nn.functional.normalize(torch.randn(50, 6, generator=generator, dtype=torch.float64), dim=-1)
    turn = torch.linalg.qr(torch.randn(2, 6, 6, generator=generator, dtype=torch.float64))[0]
    frames = torch.cat([u[None], u @ turn])
    aligned = frames @ procrustes(frames)
    torch.testing.assert_close(aligned, u.expand(3, -1, -1), rtol=1e-9, atol=1e-9)


def test_without_alignment_a_mean_over_members_says_nothing() -> None:
    data = clusters()
    x = torch.from_numpy(data.inputs)
    ensemble = DeepEnsemble(3)
    ensemble.fit(data)
    aligned = ensemble.embed(x)
    ensemble.align = False
    frames = ensemble.embed(x)
    assert aligned.resultant.mean() > 0.75 > 0.55 > frames.resultant.mean()


def test_dropout_masks_are_shared_by_all_images() -> None:
    layer = SharedDropout(0.5)
    layer.mask = torch.tensor([2.0, 0.0, 2.0])
    assert layer(torch.ones(4, 3)).tolist() == [[2.0, 0.0, 2.0]] * 4
    layer.mask = None
    layer.eval()
    assert layer(torch.ones(2, 3)).eq(1).all()
    layer.train()
    assert not layer(torch.ones(50, 3)).eq(1).any()
    with pytest.raises(OptionError, match="dropout=1"):
        SharedDropout(1.0)
    with pytest.raises(OptionError, match="members=1"):
        DeepEnsemble(1)


def test_pfe_gives_images_that_differ_from_their_class_more_variance() -> None:
    data = clusters(epochs=40)
    noisy = np.arange(300) % 2 == 1
    flag = np.where(noisy, 1.0, -1.0)[:, None]
    blurred = data.inputs + noisy[:, None] * np.random.default_rng(1).normal(size=data.inputs.shape)
    data.inputs = np.c_[blurred, flag].astype(np.float32)
    method = ProbabilisticFace()
    method.fit(data)
    u = method.embed(torch.from_numpy(data.inputs)).uncertainty.numpy()
    assert np.median(u[noisy]) > 1.3 * np.median(u[~noisy])


def test_hib_needs_no_negative_of_the_anchors_class(generator: torch.Generator) -> None:
    data = clusters(epochs=1)
    method = HedgedInstance()
    method.fit(data)
    x = torch.from_numpy(data.inputs[:6])
    none = torch.zeros(6, 6)
    none[:2, 2:] = 1.0  # only the first two anchors have negatives
    loss = method.pair_loss(x, x, none, generator)
    assert loss.isfinite()
    nothing = method.pair_loss(x, x, torch.zeros(6, 6), generator)  # a batch of one class
    assert nothing.item() == 0.0
    nothing.backward()


def test_an_online_posterior_has_the_curvature_of_its_rows() -> None:
    data = clusters(epochs=60)
    data.options.lr = 1e-4  # the layer hardly moves, so that the running curvature is that of the layer it ends at
    online, after = Laplace(online=True, memory=0.95), Laplace()
    online.fit(data)
    after.trained = nn.Sequential(online.body, nn.Linear(10, 4))
    with torch.no_grad():
        after.trained[-1].weight.copy_(online.posterior.weight)
        after.trained[-1].bias.copy_(online.posterior.bias)
    after.fit(data)
    running, exact = (one.posterior.curvature_weight.clamp(min=0) for one in (online, after))
    assert not torch.equal(running, exact)  # taken under drawn weights
    assert np.corrcoef(running.flatten(), exact.flatten())[0, 1] > 0.9
    assert 0.8 < float(running.mean() / exact.mean()) < 1.5
    answer = online.embed(torch.from_numpy(data.inputs))
    hits, _ = retrieval_statistics.label_hits(search.neighbours(answer.mean_direction), data.label)
    assert retrieval_statistics.recall_at(hits, 1) > 0.9
    with pytest.raises(OptionError, match="hidden=16"):
        Laplace(online=True).fit(clusters(hidden=16))
    with pytest.raises(OptionError, match="give no network"):
        Laplace(online=True, network=after.trained)
