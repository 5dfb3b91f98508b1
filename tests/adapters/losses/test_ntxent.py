"""NT-Xent, and what it shares with TaU and AnInfoNCE: slabs of rows, precision, memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import AnInfoNCE, NTXent, TaU, contrast
from posthoc.adapters.losses.contrast import Terms

from .tools import peak_bytes

CASES = ["n4_d8_t0.1_s100", "n16_d32_t0.07_s101", "n64_d128_t0.1_s102"]
TAU = [
    "n4_d8_t0.1_mask0_s110",
    "n4_d8_t0.1_mask1_s111",
    "n16_d32_t0.07_mask0_s112",
    "n32_d64_t0.1_mask1_s113",
    "n64_d128_t0.1_mask0_s114",
]


def _views(n: int, dim: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two noisy views of n random directions."""
    base = torch.randn(n, dim, generator=generator, dtype=dtype)
    return [(base + 0.5 * torch.randn(n, dim, generator=generator, dtype=dtype)).requires_grad_() for _ in range(2)]


def _plain(z1: Tensor, z2: Tensor, t: float, include_positive: bool) -> Tensor:
    """The loss from its formula, one row at a time."""
    z = functional.normalize(torch.cat([z1, z2]), dim=-1)
    rows = len(z)
    total = z.new_zeros(())
    for i in range(rows):
        partner = (i + rows // 2) % rows
        columns = [j for j in range(rows) if j != i and (include_positive or j != partner)]
        total = total + torch.logsumexp(z[columns] @ z[i] / t, 0) - z[i] @ z[partner] / t
    return total / rows


@pytest.mark.parametrize("case", CASES)
def test_reference_form_matches_the_papers_code(shared: Path, case: str) -> None:
    golden = np.load(shared / f"golden/tau/simclr_ntxent_{case}.npz")
    loss = NTXent(float(golden["t"]), reference=True)
    truth = float(golden["loss_f64"])
    for dtype, absolute, relative, gradient in ((torch.float64, 1e-10, 1e-8, 1e-8), (torch.float32, 1e-6, 1e-5, 1e-4)):
        z = [torch.tensor(golden[name], dtype=dtype, requires_grad=True) for name in ("outputs1", "outputs2")]
        value = loss(*z)
        assert value.item() == pytest.approx(truth, abs=absolute, rel=relative)
        for name, grad in zip(("grad_outputs1", "grad_outputs2"), torch.autograd.grad(value, z), strict=True):
            double = f"{name}_f64" in golden
            expected = golden[f"{name}_f64"] if double else golden[name]  # the largest case has single ones only
            limit = (absolute, gradient) if double else (1e-6, 1e-4)
            assert np.abs(grad.numpy() - expected).max() <= limit[0] + limit[1] * np.abs(expected).max()


def test_golden_infonce_of_the_uncertainty_benchmark(shared: Path) -> None:
    """No loss of this library: its positive is not in the denominator, and a row's masked cosine with itself adds exp(0) to
    both of its sums (spec, section 8.1). The pieces make it all the same."""
    golden = np.load(shared / "golden/mcinfonce/url_losses.npz")
    tau = json.loads(str(golden["meta"]))["temp"]
    features = torch.tensor(golden["features"]).double().requires_grad_()
    u = functional.normalize(features, dim=-1)
    z = torch.cat([u[::2], u[1::2]])
    close = (z * z.roll(len(z) // 2, 0)).sum(-1) * tau
    terms = Terms(include_positive=False, floor=1.0)
    value = contrast.contrast(z, torch.full_like(close, tau).detach(), torch.log1p(close.exp()), terms)
    assert value.item() == pytest.approx(float(golden["infonce_ssl"]), rel=1e-6)
    (grad,) = torch.autograd.grad(value, features)
    expected = golden["infonce_ssl_grad_features"]
    assert np.abs(grad.numpy() - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    "case", [*(f"simclr_ntxent_{case}" for case in CASES), *(f"tau_simclr_{case}" for case in TAU)]
)
def test_golden_sums_of_each_row(shared: Path, case: str) -> None:
    """Row by row, the only one with a negative: log D_i - close_i. In the paper's code P of view 2 has view 1's scale."""
    golden = np.load(shared / f"golden/tau/{case}.npz")
    t, plain = float(golden["t"]), case.startswith("simclr")
    z1, z2 = (torch.tensor(golden[name]).double() for name in (("outputs1", "outputs2") if plain else ("loc1", "loc2")))
    z = functional.normalize(torch.cat([z1, z2]), dim=-1)
    rows = len(z)
    scale = torch.full((rows,), 1.0 / t, dtype=torch.float64)
    if not plain:
        scale = torch.sigmoid(torch.tensor(np.concatenate([golden["raw1"], golden["raw2"]])[:, 0]).double()) / t
    close = (z * z.roll(rows // 2, 0)).sum(-1) * scale
    terms = contrast.Terms(include_positive=plain or bool(golden["simclr_mask"]), floor=float(golden["eps"]))
    for i in range(0, rows, 5):
        exclude = torch.ones(rows, rows, dtype=torch.bool)
        exclude[i] = False
        value = contrast.contrast(z, scale, close, terms, exclude)
        assert float((value + close[i]).exp()) == pytest.approx(float(golden["denominator"][i]), rel=1e-4)
        published = close[i] / scale[i] * scale[i % (rows // 2)]
        assert float(published.exp()) == pytest.approx(float(golden["numerator"][i]), rel=1e-4)


@pytest.mark.parametrize("include_positive", [False, True])
@pytest.mark.parametrize("n", [2, 5])
def test_equals_the_formula(generator: torch.Generator, n: int, include_positive: bool) -> None:
    z = _views(n, 4, generator)
    loss = NTXent(0.2, include_positive)
    expected = _plain(*z, 0.2, include_positive)
    torch.testing.assert_close(loss(*z), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(z[1], z[0]), expected, rtol=1e-12, atol=0)
    grads, truth = (torch.autograd.grad(value, z) for value in (loss(*z), expected))
    torch.testing.assert_close(grads, truth, rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradcheck(loss, z)


def test_without_the_positive_it_may_be_negative(generator: torch.Generator) -> None:
    z = torch.eye(4)
    assert NTXent(0.1, include_positive=False)(z, z).item() == pytest.approx(math.log(6.0) - 10.0, rel=1e-6)
    assert NTXent(0.1)(z, z).item() == pytest.approx(math.log1p(6.0 * math.exp(-10.0)), rel=1e-5)


@pytest.mark.parametrize("n", [37, 64])
def test_slabs_of_rows_change_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    z = _views(n, 6, generator)
    r = [torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    exclude = torch.rand(2 * n, 2 * n, generator=generator) < 0.3
    exclude[5] = True
    aninfonce = AnInfoNCE(6, torch.arange(1.0, 7.0), hard_negatives=0.7).double()

    def outcome() -> list[Tensor]:
        found: list[Tensor] = []
        for value, inputs in (
            (NTXent(0.1)(*z), z),
            (TaU(0.1, include_positive=True)(*z, *r, exclude=exclude), [*z, *r]),
            (aninfonce(*z), [*z, aninfonce.raw_precision]),
        ):
            found += [value, *torch.autograd.grad(value, inputs)]
        return found

    whole = outcome()
    monkeypatch.setattr(contrast, "CHUNK", 1)  # slabs of 32 rows, the last one shorter; none is aligned with the views
    torch.testing.assert_close(outcome(), whole, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(whole[0], _plain(*z, 0.1, True), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0.01, 0.1])
def test_single_precision_at_low_temperature(generator: torch.Generator, t: float) -> None:
    z = _views(32, 16, generator)
    loss = NTXent(t)
    grads = torch.autograd.grad(loss(*z), z)
    single = [x.detach().float().requires_grad_() for x in z]
    value = loss(*single)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(*z).item(), rel=1e-4)
    for grad, truth in zip(torch.autograd.grad(value, single), grads, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-3, atol=1e-4 * truth.abs().max().item())
    far = torch.eye(2, 4)  # the nearest negative is 2 / t away: exp of that is beyond float32
    assert loss(far, far).item() == pytest.approx(math.log1p(2.0 * math.exp(-1.0 / t)), abs=1e-7)
    apart = loss(far, -far)
    assert apart.item() == pytest.approx(1.0 / t + math.log(2.0), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(generator: torch.Generator, dtype: torch.dtype) -> None:
    z = [x.detach().to(dtype).requires_grad_() for x in _views(8, 5, generator)]
    full = NTXent(0.01)(*(x.detach().float() for x in z))
    with torch.autocast("cpu", dtype=dtype):
        mixed = NTXent(0.01)(*z)
    torch.testing.assert_close(mixed, full, rtol=0, atol=0)
    assert all(g.dtype == dtype and g.isfinite().all() for g in torch.autograd.grad(mixed, z))


def test_one_matrix_is_held_and_none_for_frozen_embeddings(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 512
    z = _views(n, 4, generator, torch.float32)
    r = [torch.zeros(n, requires_grad=True) for _ in range(2)]
    monkeypatch.setattr(contrast, "CHUNK", 1 << 15)
    matrix, chunk = 4 * (2 * n) ** 2, 4 * contrast.CHUNK
    trained = peak_bytes(lambda: torch.autograd.grad(TaU()(*z, *r), [*z, *r]))
    assert matrix < trained < 1.25 * matrix
    frozen = [x.detach() for x in z]
    assert chunk < peak_bytes(lambda: torch.autograd.grad(TaU()(*frozen, *r), r)) < 6 * chunk < 0.25 * matrix


def test_one_trained_view_and_no_gradient(generator: torch.Generator) -> None:
    z1, z2 = _views(6, 4, generator)
    loss = NTXent(0.3)
    both = torch.autograd.grad(loss(z1, z2), (z1, z2))
    torch.testing.assert_close(torch.autograd.grad(loss(z1.detach(), z2), z2)[0], both[1])
    with torch.no_grad():
        silent = loss(z1, z2)
    assert not silent.requires_grad
    torch.testing.assert_close(silent, loss(z1, z2), rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(3.0 * loss(z1, z2), z1)[0], 3.0 * both[0])


def test_wrong_arguments_are_named() -> None:
    for t in (0.0, -1.0, 1e-40, math.inf, math.nan):
        with pytest.raises(OptionError, match=f"temperature={t}"):
            NTXent(t)
    for shapes in (((1, 3), (1, 3)), ((4, 3), (5, 3)), ((4,), (4,))):
        with pytest.raises(OptionError, match=r"N >= 2.*\(" + str(shapes[0][0])):
            NTXent(0.1)(torch.ones(shapes[0]), torch.ones(shapes[1]))


def test_a_learnable_temperature(generator: torch.Generator) -> None:
    z = [view.detach() for view in _views(6, 4, generator)]
    loss, fixed = NTXent(0.3, learnable=True).double(), NTXent(0.3)
    assert list(fixed.parameters()) == []
    torch.testing.assert_close(loss(*z), fixed(*z))
    (grad,) = torch.autograd.grad(loss(*z), loss.parameters())
    step = 1e-6
    slope = [_plain(*z, 0.3 * math.exp(sign * step), True) for sign in (1, -1)]
    assert float(grad) == pytest.approx(float(slope[0] - slope[1]) / (2 * step), rel=1e-6)
    isotropic = AnInfoNCE(4, 1 / float(loss.temperature.detach())).double()
    torch.testing.assert_close(loss(*z), isotropic(*z))
