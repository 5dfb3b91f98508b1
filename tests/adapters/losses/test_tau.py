from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import TaU
from posthoc.adapters.losses.tau import temperature

CASES = [
    "n4_d8_t0.1_mask0_s110",
    "n4_d8_t0.1_mask1_s111",
    "n16_d32_t0.07_mask0_s112",
    "n32_d64_t0.1_mask1_s113",
    "n64_d128_t0.1_mask0_s114",
]


def _inputs(golden: np.lib.npyio.NpzFile, dtype: torch.dtype) -> list[torch.Tensor]:
    arrays = [golden["loc1"], golden["loc2"], golden["raw1"][:, 0], golden["raw2"][:, 0]]
    return [torch.tensor(a, dtype=dtype, requires_grad=True) for a in arrays]


def _plain(z1, z2, r1, r2, t, include_positive, exclude=None):
    """The loss from its formula, one anchor at a time."""
    z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=-1)
    s = torch.sigmoid(torch.cat([r1, r2]))
    n = len(z1)
    total, used = 0.0, 0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        columns = [j for j in range(2 * n) if j not in (i, partner) and (exclude is None or not exclude[i, j])]
        if not columns:
            continue
        used += 1
        columns += [partner] if include_positive else []
        total = total - s[i] * (z[i] @ z[partner]) / t
        total = total + torch.log(1e-6 + torch.exp(s[i] * (z[columns] @ z[i]) / t).sum())
    return total / used


@pytest.mark.parametrize("case", CASES)
def test_reference_form_matches_the_papers_code(shared: Path, case: str) -> None:
    golden = np.load(shared / f"golden/tau/tau_simclr_{case}.npz")
    loss = TaU(float(golden["t"]), bool(golden["simclr_mask"]), reference=True)
    inputs = _inputs(golden, torch.float64)
    value = loss(*inputs)
    assert value.item() == pytest.approx(float(golden["loss_f64"]), abs=1e-10, rel=1e-8)
    for name, grad in zip(("loc1", "loc2", "raw1", "raw2"), torch.autograd.grad(value, inputs), strict=True):
        if f"grad_{name}_f64" in golden:
            truth = golden[f"grad_{name}_f64"].reshape(grad.shape)
            assert np.abs(grad.numpy() - truth).max() <= 1e-10 + 1e-8 * np.abs(truth).max()
    rough = _inputs(golden, torch.float32)
    single = loss(*rough)
    assert single.item() == pytest.approx(float(golden["loss_f64"]), abs=1e-6, rel=1e-5)
    for name, grad in zip(("loc1", "loc2", "raw1", "raw2"), torch.autograd.grad(single, rough), strict=True):
        truth = golden[f"grad_{name}_f64" if f"grad_{name}_f64" in golden else f"grad_{name}"].reshape(grad.shape)
        assert np.abs(grad.numpy() - truth).max() <= 1e-6 + 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("include_positive", [False, True])
def test_each_anchor_uses_its_own_temperature(generator: torch.Generator, include_positive: bool) -> None:
    z1, z2 = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    r1, r2 = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = TaU(0.2, include_positive)
    expected = _plain(z1, z2, r1, r2, 0.2, include_positive)
    torch.testing.assert_close(loss(z1, z2, r1, r2), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(z2, z1, r2, r1), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("include_positive", [False, True])
def test_exclusion_equals_the_formula(generator: torch.Generator, include_positive: bool) -> None:
    z = [torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    r = [torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    exclude = torch.rand(10, 10, generator=generator) < 0.5  # not symmetric
    exclude[3] = True
    value = TaU(0.1, include_positive)(*z, *r, exclude=exclude)
    expected = _plain(*z, *r, 0.1, include_positive, exclude)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    grads, truth = (torch.autograd.grad(x, (*z, *r)) for x in (value, expected))
    torch.testing.assert_close(grads, truth, rtol=1e-10, atol=1e-13)
    assert grads[2][3] == 0


def test_two_images_and_frozen_embeddings(generator: torch.Generator) -> None:
    z = [torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    r = [torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    value = TaU(0.1)(*z, *r)
    torch.testing.assert_close(value, _plain(*z, *r, 0.1, False), rtol=1e-12, atol=0)
    frozen = torch.autograd.grad(TaU(0.1)(*(x.detach() for x in z), *r), r)
    torch.testing.assert_close(frozen, torch.autograd.grad(value, r), rtol=1e-12, atol=0)


def test_gradients(generator: torch.Generator) -> None:
    z = [torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    r = [torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    exclude = torch.zeros(8, 8, dtype=torch.bool)
    exclude[0, 1] = exclude[1, 0] = True
    assert torch.autograd.gradcheck(lambda *x: TaU(0.3)(*x, exclude=exclude), (*z, *r))
    assert torch.autograd.gradcheck(TaU(0.3, include_positive=True), (*z, *r))


def test_excluded_columns_have_no_say(generator: torch.Generator) -> None:
    z1, z2 = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    r = torch.zeros(4, dtype=torch.float64)
    label = torch.tensor([0, 0, 1, 2]).repeat(2)
    exclude = label[:, None] == label[None, :]
    loss = TaU()(z1, z2, r, r, exclude=exclude)
    moved = z1.clone()
    moved[1] = -moved[1]  # a same-class column of row 0, and a negative of rows 2 and 3
    only_first = exclude.clone()
    only_first[torch.tensor([1, 2, 3, 5, 6, 7])] = True  # rows 0 and 4 alone are left in the mean
    first = TaU()(z1, z2, r, r, exclude=only_first)
    torch.testing.assert_close(TaU()(moved, z2, r, r, exclude=only_first), first)
    assert not torch.isclose(TaU()(moved, z2, r, r, exclude=exclude), loss)


def test_rows_without_negatives_are_left_out(generator: torch.Generator) -> None:
    z1, z2 = (torch.randn(3, 4, generator=generator, requires_grad=True) for _ in range(2))
    r1, r2 = (torch.zeros(3, requires_grad=True) for _ in range(2))
    exclude = torch.ones(6, 6, dtype=torch.bool)
    grads = torch.autograd.grad(TaU()(z1, z2, r1, r2, exclude=exclude), (z1, z2, r1, r2))
    assert all((g == 0).all() for g in grads)


def test_extreme_temperatures_stay_finite(generator: torch.Generator) -> None:
    z1 = torch.randn(8, 5, generator=generator, requires_grad=True)
    for raw in (-1e4, -50.0, 50.0, 1e4):
        r = torch.full((8,), raw, requires_grad=True)
        for t in (1e-3, 0.1):
            value = TaU(t)(z1, z1.flip(1), r, r)
            grads = torch.autograd.grad(value, (z1, r))
            assert value.isfinite()
            assert all(g.isfinite().all() for g in grads)
    half = temperature(torch.tensor([-6e4, 0.0], dtype=torch.float16), 0.1)
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    tau = temperature(torch.tensor([-1e30, -5.0, 0.0, 5.0, 1e30]), 0.1)
    assert tau.isfinite().all()
    assert (tau.diff() < 0).all()
    torch.testing.assert_close(tau[1:4], 0.1 / torch.sigmoid(torch.tensor([-5.0, 0.0, 5.0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_loss(generator: torch.Generator, dtype: torch.dtype) -> None:
    z1, z2 = (torch.randn(8, 5, generator=generator) for _ in range(2))
    r = torch.randn(8, generator=generator)
    with torch.autocast("cpu", dtype=dtype):
        mixed = TaU(0.01)(z1, z2, r, r)
        half = TaU(0.01)(z1.to(dtype), z2.to(dtype), r.to(dtype), r.to(dtype))
    torch.testing.assert_close(mixed, TaU(0.01)(z1, z2, r, r), rtol=0, atol=0)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(mixed.item(), rel=0.1)  # exp(1 / 0.01) is far beyond either type


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(OptionError, match="base_temperature=0"):
        TaU(0)
    with pytest.raises(OptionError, match=r"\[N, D\].*\(4, 1\)"):
        TaU()(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 1), torch.ones(4, 1))
    z, r, exclude = torch.ones(4, 2), torch.ones(4), torch.zeros(8, 8, dtype=torch.bool)
    with pytest.raises(OptionError, match=r"exclude \(8, 8\).*reference=True"):
        TaU(reference=True)(z, z, r, r, exclude=exclude)
    with pytest.raises(OptionError, match=r"exclude \(4, 8\).*expected bool \[2N, 2N\]"):
        TaU()(z, z, r, r, exclude=exclude[:4])
    with pytest.raises(OptionError, match=r"\(8, 8\) torch.float32.*expected bool"):
        TaU()(z, z, r, r, exclude=exclude.float())
