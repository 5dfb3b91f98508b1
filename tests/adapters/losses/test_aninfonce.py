"""AnInfoNCE: golden numbers, loops straight from the formula, NT-Xent as its special case, a precision recovered."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import AnInfoNCE, AnInfoNCEEnsemble, NTXent, aninfonce

CASES = ["n3", "n10", "bimodal", "linspace", "extreme"]


def _views(n: int, dim: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(n, dim, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def _plain(z1: Tensor, z2: Tensor, precision: Tensor, beta: float = 0.0, published: bool = False) -> Tensor:
    """The loss from its formula, one row at a time."""
    a, b = functional.normalize(z1, dim=-1), functional.normalize(z2, dim=-1)

    def s(u: Tensor, v: Tensor) -> Tensor:
        return -(precision * (u - v) ** 2).sum() / 2

    n, total = len(a), a.new_zeros(())
    for own, other in ((a, b), (b, a)):
        for i in range(n):
            far = [s(own[i], own[j]) for j in range(n) if j != i]
            if published:
                far += [s(a[i], b[j]) for j in range(n) if j != i]
            else:
                far += [s(own[i], other[j]) for j in range(n) if j != i]
            similarity = torch.stack(far)
            weight = torch.softmax(beta * similarity.detach(), 0)
            negatives = len(far) * (weight * similarity.exp()).sum()
            close = s(a[i], b[i])
            total = total + torch.log(close.exp() + negatives) - close
    return total / (2 * n)


def _golden(golden: np.lib.npyio.NpzFile, reference: bool, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    z = [torch.tensor(golden[name], dtype=dtype, requires_grad=True) for name in ("z1", "z2")]
    loss = AnInfoNCE(z[0].shape[1], reference=reference).to(dtype)
    loss.load_state_dict({"raw_precision": torch.tensor(golden["lambda_raw"], dtype=dtype)})
    np.testing.assert_allclose(loss.precision.detach().double(), golden["lambda_hat"], rtol=1e-6)
    value = loss(*z)
    return value, list(torch.autograd.grad(value, [*z, loss.raw_precision]))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_golden_numbers(shared: Path, case: str, reference: bool) -> None:
    golden = np.load(shared / f"golden/aninfonce/loss_{case}.npz")
    suffix = "" if reference else "_symmetric"
    value, grads = _golden(golden, reference, torch.float64)
    assert value.item() == pytest.approx(float(golden[f"loss{suffix}"]), abs=1e-9, rel=0)
    single, single_grads = _golden(golden, reference, torch.float32)
    assert single.item() == pytest.approx(float(golden[f"loss{suffix}"]), rel=1e-5)
    for name, grad, rough in zip(("z1", "z2", "lambda_raw"), grads, single_grads, strict=True):
        truth = golden[f"grad_{name}{suffix}"]
        assert np.abs(grad.numpy() - truth).max() <= 1e-8
        assert np.abs(rough.numpy() - truth).max() <= 1e-6 + 1e-4 * np.abs(truth).max()
    if not reference:
        assert value.item() != pytest.approx(float(golden["loss"]), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_golden_rows_of_the_papers_code(shared: Path, case: str) -> None:
    """It adds [2N] and [2N, 1], so that its "losses per item" are each row's sum minus each row's positive [2N, 2N]."""
    golden = np.load(shared / f"golden/aninfonce/loss_{case}.npz")
    root = torch.tensor(golden["lambda_hat"]).sqrt()
    x1, x2 = (functional.normalize(torch.tensor(golden[name]), dim=-1) * root for name in ("z1", "z2"))
    close = (x1 - x2).square().sum(-1) / -2
    rows = aninfonce._rows_as_published(x1, x2, close)
    np.testing.assert_allclose(rows, golden["loss_per_item"].diagonal(), rtol=0, atol=1e-9)
    assert -close.mean().item() == pytest.approx(float(golden["loss_pos_mean"]), abs=1e-9)
    assert (rows + close.repeat(2)).mean().item() == pytest.approx(float(golden["loss_neg_mean"]), abs=1e-9)


def _isotropic(dim: int, precision: float, reference: bool = False) -> AnInfoNCE:
    """In float64 from the start: the library's parameter has the default dtype."""
    loss = AnInfoNCE(dim, reference=reference).double()
    raw = precision + math.log(-math.expm1(-precision))
    loss.load_state_dict({"raw_precision": torch.full((dim,), raw, dtype=torch.float64)})
    return loss


def test_isotropic_precision_is_ntxent(shared: Path, generator: torch.Generator) -> None:
    """The file's `simclr_*` and `lp*` are other losses of the paper's repository, which this library has not."""
    golden = np.load(shared / "golden/aninfonce/isotropic_a.npz")
    z = [torch.tensor(golden[name]) for name in ("z1", "z2")]
    tau, precision, dim = float(golden["tau"]), float(golden["lambda_hat"]), z[0].shape[1]
    assert _isotropic(dim, precision)(*z).item() == pytest.approx(float(golden["aninfonce_symmetric"]), abs=1e-9)
    assert _isotropic(dim, precision, True)(*z).item() == pytest.approx(float(golden["aninfonce"]), abs=1e-9)
    assert NTXent(tau)(*z).item() == pytest.approx(float(golden["nt_xent"]), abs=1e-9)
    z = _views(7, 4, generator)
    for t in (0.07, 0.5, 2.0):
        ours, theirs = _isotropic(4, 1.0 / t)(*z), NTXent(t)(*z)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)
        torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("n", [2, 5])
def test_equals_the_formula(generator: torch.Generator, n: int, beta: float) -> None:
    z = _views(n, 3, generator)
    loss = AnInfoNCE(3, torch.tensor([0.5, 4.0, 20.0]), hard_negatives=beta).double()
    value = loss(*z)
    expected = _plain(*z, loss.precision, beta)
    inputs = [*z, loss.raw_precision]
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    grads, truth = torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(grads, truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss(z[1], z[0]), expected, rtol=1e-12, atol=0)
    if beta == 0:
        published = AnInfoNCE(3, torch.tensor([0.5, 4.0, 20.0]), reference=True).double()
        torch.testing.assert_close(published(*z), _plain(*z, loss.precision, published=True), rtol=1e-12, atol=0)


def test_gradients(generator: torch.Generator) -> None:
    z = _views(4, 3, generator)
    raw = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    for loss in (AnInfoNCE(3).double(), AnInfoNCE(3, reference=True).double()):
        call = lambda a, b, w, loss=loss: torch.func.functional_call(loss, {"raw_precision": w}, (a, b))  # noqa: E731
        assert torch.autograd.gradcheck(call, (*z, raw))


def test_hard_negatives_weigh_the_near_ones(generator: torch.Generator) -> None:
    z = [x.detach() for x in _views(6, 3, generator)]
    values = [AnInfoNCE(3, 5.0, hard_negatives=beta)(*z).item() for beta in (0.0, 1.0, 10.0, 1e4)]
    assert values == sorted(values)
    assert len(set(values)) == 4
    a, b = (functional.normalize(x, dim=-1) for x in z)
    every = torch.cat([a, b])
    similarity = -5.0 * (every[:, None] - every[None]).square().sum(-1) / 2
    close = similarity.diagonal(6).repeat(2)
    barred = torch.eye(6, dtype=torch.bool).repeat(2, 2)
    hardest = similarity.masked_fill(barred, -math.inf).amax(1)  # what an infinite beta leaves
    assert values[3] == pytest.approx(functional.softplus(math.log(10.0) + hardest - close).mean().item(), rel=1e-4)


def test_an_ensemble_is_the_sum_over_its_families(generator: torch.Generator) -> None:
    ensemble = AnInfoNCEEnsemble(3, families=2, initial_precision=torch.tensor([1.0, 2.0, 3.0]), hard_negatives=0.5)
    with torch.no_grad():
        list(ensemble.parameters())[1].add_(1.0)
    pairs = [tuple(_views(n, 3, generator)) for n in (4, 6)]
    assert ensemble.precision.shape == (2, 3)
    torch.testing.assert_close(ensemble.precision[0], torch.tensor([1.0, 2.0, 3.0]))
    assert (ensemble.precision[1] > ensemble.precision[0]).all()
    expected = sum(_plain(*pair, p.double(), 0.5) for pair, p in zip(pairs, ensemble.precision, strict=True))
    torch.testing.assert_close(ensemble(pairs), expected, rtol=1e-6, atol=0)
    ensemble(pairs).backward()
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in ensemble.parameters())
    with pytest.raises(OptionError, match=r"2 families was given 1 pairs"):
        ensemble(pairs[:1])


def test_extremes_stay_finite(generator: torch.Generator) -> None:
    z = [x.detach().float().requires_grad_() for x in _views(8, 4, generator)]
    for raw in ([-200.0, -30.0, 0.0, 5.0], [1e4, 1e4, -1e4, 1.0], [-1e4] * 4):
        for beta in (0.0, 2.0):
            loss = AnInfoNCE(4, hard_negatives=beta)
            with torch.no_grad():
                loss.raw_precision.copy_(torch.tensor(raw))
            value = loss(*z)
            assert value.isfinite()
            assert all(g.isfinite().all() for g in torch.autograd.grad(value, [*z, loss.raw_precision]))
    # no precision at all: nothing tells the rows apart
    assert value.item() == pytest.approx(math.log(15.0), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(generator: torch.Generator, dtype: torch.dtype) -> None:
    z = [x.detach().to(dtype) for x in _views(8, 4, generator)]
    loss = AnInfoNCE(4, 1e3)
    full = loss(*(x.float() for x in z))
    with torch.autocast("cpu", dtype=dtype):
        mixed = loss(*z)
    torch.testing.assert_close(mixed, full, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(mixed, loss.raw_precision)
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()


def test_the_precision_of_the_data_is_found(generator: torch.Generator) -> None:
    truth = torch.tensor([30.0, 30.0, 5.0])
    anchors = functional.normalize(torch.randn(40_000, 3, generator=generator), dim=-1)
    moved = anchors + torch.randn(anchors.shape, generator=generator) / truth.sqrt()
    kept = (moved.norm(dim=-1) - 1).abs() < 0.05  # a thin shell: close to exp(-1/2 (v-u)' Lambda (v-u)) on the sphere
    u, v = anchors[kept], functional.normalize(moved[kept], dim=-1)
    loss = AnInfoNCE(3, 10.0)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.5)
    for _ in range(120):
        rows = torch.randint(len(u), (128,), generator=generator)
        optimizer.zero_grad()
        loss(u[rows], v[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(loss.precision.detach(), truth, rtol=0.25, atol=0)


def test_start_and_state(generator: torch.Generator) -> None:
    for start in (1e-4, 0.3, 50.0):
        torch.testing.assert_close(AnInfoNCE(2, start).precision.detach(), torch.full((2,), start), rtol=1e-3, atol=0)
    assert AnInfoNCE(2).raw_precision.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    assert list(AnInfoNCE(2).state_dict()) == ["raw_precision"]


def test_wrong_arguments_are_named() -> None:
    for options in ({"dim": 0}, {"dim": 2, "initial_precision": -1.0}, {"dim": 2, "initial_precision": torch.ones(3)}):
        with pytest.raises(OptionError, match=f"dim={options['dim']}.*expected dim >= 1"):
            AnInfoNCE(**options)
    with pytest.raises(OptionError, match=r"hard_negatives=-1"):
        AnInfoNCE(2, hard_negatives=-1)
    with pytest.raises(OptionError, match=r"hard_negatives=1.0.*0 with reference"):
        AnInfoNCE(2, hard_negatives=1.0, reference=True)
    with pytest.raises(OptionError, match=r"families=0"):
        AnInfoNCEEnsemble(2, 0)
    with pytest.raises(OptionError, match=r"\[N, 3\].*\(4, 2\)"):
        AnInfoNCE(3)(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(OptionError, match=r"N >= 2.*\(1, 3\)"):
        AnInfoNCE(3)(torch.ones(1, 3), torch.ones(1, 3))
