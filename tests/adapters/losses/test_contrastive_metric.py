from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import ContrastiveMetric
from posthoc.adapters.mining import MINERS, mine_triplets
from posthoc.adapters.positives import label_masks, place_masks


def _keeps(miner: str, near: float, far: float, margin: float) -> bool:
    gap = far - near
    return {
        "all": gap <= margin,
        "semihard": 0 < gap <= margin,
        "hard": gap <= margin and gap <= 0,
        "easy": gap > margin,
        "none": True,
    }[miner]


def _from_formula(embedding: Tensor, label: list[int], margin: float, miner: str) -> tuple[list, Tensor]:
    """Triplets and loss, one triplet at a time."""
    u = [row / row.norm() for row in embedding]
    triplets, pulls, pushes = [], [], []
    for a, p, n in itertools.product(range(len(u)), repeat=3):
        if a == p or label[a] != label[p] or label[a] == label[n]:
            continue
        near, far = (u[a] - u[p]).norm(), (u[a] - u[n]).norm()
        if not _keeps(miner, near.item(), far.item(), margin):
            continue
        triplets.append((a, p, n))
        pulls += [near] if near > 0 else []
        pushes += [margin - far] if far < margin else []
    means = [torch.stack(terms).mean() for terms in (pulls, pushes) if terms]
    return triplets, sum(means, embedding.sum() * 0)


@pytest.mark.parametrize("miner", ["all", "semihard", "hard", "easy"])
@pytest.mark.parametrize("name", ["loss_a", "loss_b"])
def test_matches_golden(shared: Path, name: str, miner: str) -> None:
    golden = np.load(shared / f"golden/lam/{name}.npz")
    embedding = torch.tensor(golden["emb"], requires_grad=True)
    label = torch.tensor(golden["labels"])
    loss = ContrastiveMetric(float(golden["margin"]), miner)
    for mined, letter in zip(loss.mine(embedding, label), "apn", strict=True):
        np.testing.assert_array_equal(mined.numpy(), golden[f"{miner}_{letter}"])
    value = loss(embedding, label)
    assert value.item() == pytest.approx(float(golden[f"{miner}_loss"]), rel=1e-9)
    (grad,) = torch.autograd.grad(value, embedding)
    np.testing.assert_allclose(grad.numpy(), golden[f"{miner}_grad"], rtol=1e-8, atol=1e-10)
    single = embedding.detach().float().requires_grad_()
    assert loss(single, label).item() == pytest.approx(float(golden[f"{miner}_loss"]), rel=1e-5)
    (grad,) = torch.autograd.grad(loss(single, label), single)
    truth = golden[f"{miner}_grad"]
    assert np.abs(grad.numpy() - truth).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("miner", MINERS)
def test_places_match_golden(shared: Path, miner: str) -> None:
    golden = np.load(shared / "golden/lam/miner_place_a.npz")
    embedding = torch.tensor(golden["emb"])
    positive, negative = place_masks(torch.tensor(golden["utm"]))
    loss = ContrastiveMetric(float(golden["margin"]), miner)
    for mined, letter in zip(loss.mine(embedding, positive=positive, negative=negative), "apn", strict=True):
        np.testing.assert_array_equal(mined.numpy(), golden[f"{miner}_{letter}"])


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
def test_equals_its_formula(generator: torch.Generator, miner: str, margin: float) -> None:
    label = [0, 1, 0, 2, 1, 0, 3, 1, 1, 0]
    embedding = torch.randn(10, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    triplets, truth = _from_formula(embedding, label, margin, miner)
    loss = ContrastiveMetric(margin, miner)
    assert list(zip(*(x.tolist() for x in loss.mine(embedding, torch.tensor(label))), strict=True)) == triplets
    value = loss(embedding, torch.tensor(label))
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-15)
    grads = [torch.autograd.grad(x, embedding)[0] for x in (value, truth)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("miner", MINERS)
def test_gradients(generator: torch.Generator, miner: str) -> None:
    embedding = torch.randn(8, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])
    assert torch.autograd.gradcheck(lambda x: ContrastiveMetric(0.7, miner)(x, label), (embedding,))


@pytest.mark.parametrize("miner", MINERS)
def test_blocks_do_not_change_triplets_or_loss(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, miner: str
) -> None:
    embedding = torch.randn(23, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    label = torch.randint(5, (23,), generator=generator)
    loss = ContrastiveMetric(0.7, miner)
    results = []
    for chunk in (1 << 20, 23 * 23 * 3, 1):
        monkeypatch.setattr("posthoc.adapters.mining.CHUNK", chunk)
        monkeypatch.setattr("posthoc.adapters.losses.contrastive_metric.CHUNK", chunk // 23)
        value = loss(embedding, label)
        results.append((*loss.mine(embedding, label), value, *torch.autograd.grad(value, embedding)))
    assert len(results[0][0]) > 0
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("label", [[1, 1, 1, 1], [0, 1, 2, 3]])
def test_a_batch_without_triplets_has_loss_zero(label: list[int]) -> None:
    network = torch.nn.Linear(3, 2)
    loss = ContrastiveMetric(0.7)
    value = loss(network(torch.randn(4, 3)), torch.tensor(label))
    value.backward()
    assert value.item() == 0.0
    assert network.weight.grad is not None
    assert (network.weight.grad == 0).all()
    assert [x.shape for x in loss.mine(torch.randn(4, 3), torch.tensor(label))] == [(0,)] * 3
    assert loss(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64)).item() == 0.0


def test_equal_images_have_no_direction_and_are_not_counted() -> None:
    """d = 0 is not a term of the positives' mean, and its gradient is 0 instead of NaN."""
    row = torch.tensor([1.0, 2.0, 3.0])
    embedding = torch.stack([row, row, 2 * row, torch.tensor([1.0, -1.0, 0.5])]).requires_grad_()
    value = ContrastiveMetric(3.0, "none")(embedding, torch.tensor([0, 0, 1, 1]))
    u = torch.nn.functional.normalize(embedding, dim=1)
    far = (u[0] - u[3]).norm()
    # positives: (0,1), (1,0) twice each at 0, (2,3), (3,2) twice each at `far`; negatives: half at 0 and half at `far`
    torch.testing.assert_close(value, far + (3.0 + (3.0 - far)) / 2)
    (grad,) = torch.autograd.grad(value, embedding)
    assert grad.isfinite().all()
    (truth,) = torch.autograd.grad(far / 2, embedding)
    torch.testing.assert_close(grad[3], truth[3])


def test_half_precision_and_autocast_are_computed_in_float32(generator: torch.Generator) -> None:
    embedding = torch.randn(12, 6, generator=generator).bfloat16()
    label = torch.randint(3, (12,), generator=generator)
    loss = ContrastiveMetric(0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(embedding, label)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, loss(embedding.float(), label), rtol=0, atol=0)


def test_masks_of_labels_and_places() -> None:
    positive, negative = label_masks(torch.tensor([300, 44, 300]))  # 300 is 44 in 8 bits
    assert positive.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    assert negative.tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    north = 5_812_345.0
    places = torch.tensor([[0.0, north], [0.0, north + 9.9], [0.0, north + 30]], dtype=torch.float64)
    positive, negative = place_masks(places)
    assert positive.tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    assert negative.tolist() == [[False, False, True], [False, False, False], [True, False, False]]


def test_wrong_arguments_are_named() -> None:
    embedding, label = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    positive, negative = label_masks(label)
    with pytest.raises(OptionError, match="margin=-1"):
        ContrastiveMetric(-1)
    with pytest.raises(OptionError, match=r"miner='soft'.*all, semihard, hard, easy, none"):
        ContrastiveMetric(1, "soft")
    with pytest.raises(OptionError, match="either labels"):
        ContrastiveMetric(1)(embedding)
    with pytest.raises(OptionError, match="either labels"):
        ContrastiveMetric(1)(embedding, positive=positive)
    with pytest.raises(OptionError, match="either labels"):
        ContrastiveMetric(1)(embedding, label, positive=positive, negative=negative)
    for mask in ({"positive": positive}, {"negative": negative}):  # it would have no say
        with pytest.raises(OptionError, match=f"given label and {next(iter(mask))}"):
            ContrastiveMetric(1)(embedding, label, **mask)
        with pytest.raises(OptionError, match=f"given label and {next(iter(mask))}"):
            ContrastiveMetric(1).mine(embedding, label, **mask)
    with pytest.raises(OptionError, match=r"given \(4, 2\) torch.float32, \(3, 3\) torch.bool"):
        ContrastiveMetric(1)(embedding, label[:3])
    with pytest.raises(OptionError, match=r"two bool \[N, N\]"):
        mine_triplets(embedding, positive.float(), negative, 1.0)
    with pytest.raises(OptionError, match=r"integer \[N\].*torch.float32 \(4,\)"):
        ContrastiveMetric(1)(embedding, label.float())
    with pytest.raises(OptionError, match="near=30, far=25"):
        place_masks(torch.zeros(3, 2), near=30)
