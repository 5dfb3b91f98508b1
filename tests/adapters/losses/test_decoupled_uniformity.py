from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.gathering import gather_rows
from posthoc.adapters.losses import DecoupledUniformity
from posthoc.adapters.losses.decoupled_uniformity import alignment, uniformity
from posthoc.adapters.losses.kernels import cosine, gram_matrix, rbf

PLAIN = ["n4_v2_d8_t2.0_s200", "n16_v2_d32_t2.0_s201", "n32_v4_d16_t1.0_s202", "n64_v2_d128_t2.0_s203"]
KERNEL = [
    "rbf_float_n8_v2_d8_p5_sig1.0_lam0.01_t2.0_s220",
    "rbf_float_n16_v2_d16_p12_sig3.0_lam0.01_t2.0_s221",
    "rbf_float_n16_v2_d16_p12_sig3.0_lamNone_t2.0_s222",
    "rbf_binary_n24_v2_d16_p30_sig2.0_lam0.01_t2.0_s223",
    "rbf_binary_n24_v2_d16_p30_sig20.0_lam0.01_t2.0_s224",
    "rbf_dup_n24_v3_d8_p10_sig1.0_lam0.1_t2.0_s225",
    "rbf_label_n16_v2_d8_p1_sig1.0_lam0.01_t2.0_s226",
    "rbf_large_n32_v2_d32_p64_sig100.0_lam0.01_t2.0_s227",
    "cosine_float_n16_v2_d16_p12_sigNone_lam0.01_t2.0_s228",
    "cosine_binary_n24_v2_d12_p30_sigNone_lam1.0_t1.0_s229",
]


def _close(value: Tensor, truth: np.ndarray, absolute: float, relative: float) -> None:
    """Within the golden README's absolute + relative * max|truth|."""
    limit = absolute + relative * np.abs(truth).max()
    assert np.abs(value.detach().double().numpy() - truth).max() <= limit


def _from_formula(views: Tensor, t: float, gram: Tensor | None = None, ridge: float = 0.01) -> Tensor:
    """The loss by loops over images, views and pairs, with an explicit inverse."""
    n = len(views)
    centroids = torch.stack([torch.stack([view / view.norm() for view in image]).mean(0) for image in views])
    if gram is not None:
        centroids = torch.linalg.inv(gram + ridge * torch.eye(n).to(gram)) @ gram @ centroids
    pairs = [torch.exp(-t * (centroids[i] - centroids[j]).square().sum()) for i in range(n) for j in range(i)]
    return torch.stack(pairs).mean().log()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", PLAIN)
def test_plain_matches_golden(shared: Path, case: str, dtype: torch.dtype) -> None:
    golden = np.load(shared / f"golden/decoupled_uniformity/plain_{case}.npz")
    views = torch.tensor(golden["z"], dtype=dtype, requires_grad=True)
    loss = DecoupledUniformity(float(golden["t"]))
    exact = dtype == torch.float64
    value = loss(views)
    _close(value, golden["loss_f64"], *((1e-9, 1e-7) if exact else (1e-6, 1e-5)))
    for result, name in ((loss.centroids(views), "centroids"), (alignment(loss.centroids(views)), "align_metric")):
        _close(result, golden[f"{name}_f64"], *((1e-9, 1e-7) if exact else (1e-6, 1e-4)))
    if "grad_z_f64" in golden:
        (grad,) = torch.autograd.grad(value, views)
        _close(grad, golden["grad_z_f64"], *((1e-9, 1e-7) if exact else (1e-6, 1e-4)))
    else:  # the largest file has its gradient in float32 only
        (grad,) = torch.autograd.grad(value, views)
        _close(grad, golden["grad_z"], 1e-6, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", KERNEL)
def test_kernels_match_golden(shared: Path, case: str, dtype: torch.dtype) -> None:
    golden = np.load(shared / f"golden/decoupled_uniformity/kernel_{case}.npz")
    views = torch.tensor(golden["z"], dtype=dtype, requires_grad=True)
    prior = torch.tensor(golden["prior"], dtype=dtype)
    ridge = None if np.isnan(golden["lambda_"]) else float(golden["lambda_"])
    sigma = "median" if np.isnan(golden["sigma"]) else float(golden["sigma"])
    loss = DecoupledUniformity(float(golden["t"]), case.split("_")[0], ridge, sigma=sigma)
    value = loss(views, prior)
    (grad,) = torch.autograd.grad(value, views)
    exact = dtype == torch.float64
    _close(value, golden["loss_f64"], *((1e-9, 1e-7) if exact else (1e-5, 2e-4)))
    _close(grad, golden["grad_z_f64"], *((1e-9, 1e-7) if exact else (0.0, 3e-3)))
    centroids = loss.centroids(views, prior)
    _close(centroids, golden["centroids_f64"], *((1e-9, 1e-7) if exact else (0.0, 3e-3)))
    _close(alignment(centroids), golden["align_metric_f64"], *((1e-9, 1e-7) if exact else (1e-6, 1e-4)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gram_matrices_match_golden(shared: Path, dtype: torch.dtype) -> None:
    golden = np.load(shared / "golden/decoupled_uniformity/kernels_n9_m6_p7_s250.npz")
    x, y = (torch.tensor(golden[name], dtype=dtype) for name in "XY")
    exact = (1e-9, 1e-7) if dtype == torch.float64 else (1e-6, 1e-5)
    for i, sigma in enumerate(golden["sigmas"]):
        _close(rbf(x, x, float(sigma)), golden[f"rbf_xx_{i}_f64"], *exact)
        _close(rbf(x, y, float(sigma)), golden[f"rbf_xy_{i}"], 1e-6, 1e-5)
        below = gram_matrix(x, "rbf", float(sigma)).tril()
        _close(below, np.tril(golden[f"rbf_xx_{i}_f64"]), *exact)
    _close(cosine(x, x), golden["cos_xx"], 1e-6, 1e-5)
    _close(cosine(x, y), golden["cos_xy"], 1e-6, 1e-5)
    _close(gram_matrix(x, "cosine", 1.0).tril(), np.tril(golden["cos_xx"]), 1e-6, 1e-5)
    assert (cosine(torch.zeros(2, 7, dtype=dtype), x) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["n12_d8_t2.0_s260", "n30_d16_t1.0_s261"])
def test_uniformity_and_alignment_match_golden(shared: Path, case: str, dtype: torch.dtype) -> None:
    golden = np.load(shared / f"golden/decoupled_uniformity/uniform_align_{case}.npz")
    centroids = torch.tensor(golden["centroids"], dtype=dtype, requires_grad=True)
    exact = dtype == torch.float64
    for value, name, grad_name in (
        (uniformity(centroids, float(golden["t"])), "uniform", "grad"),
        (alignment(centroids), "align", "align_grad"),
    ):
        _close(value, golden[f"{name}_f64"], *((1e-9, 1e-7) if exact else (1e-6, 1e-5)))
        (grad,) = torch.autograd.grad(value, centroids)
        _close(grad, golden[f"{grad_name}_f64"], *((1e-9, 1e-7) if exact else (1e-6, 1e-4)))


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kernel", [None, "rbf", "cosine", lambda x, y: (1 + x @ y.T).square()])
def test_equals_its_formula(generator: torch.Generator, views: int, kernel) -> None:
    z = torch.randn(7, views, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    prior = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    gram = None
    if kernel == "rbf":
        squared = torch.stack([torch.stack([(a - b).square().sum() for b in prior]) for a in prior])
        gram = torch.exp(-squared / (2 * 1.7**2))
    elif kernel == "cosine":
        gram = torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in prior]) for a in prior])
    elif kernel is not None:
        gram = (1 + prior @ prior.T).square()
    truth = _from_formula(z, 1.5, gram, 0.3)
    value = DecoupledUniformity(1.5, kernel, 0.3, sigma=1.7)(z, None if kernel is None else prior)
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=0)
    grads = [torch.autograd.grad(x, z)[0] for x in (value, truth)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_gradients(generator: torch.Generator) -> None:
    z = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    prior = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(DecoupledUniformity(), (z,))
    loss = DecoupledUniformity(kernel="rbf", ridge=0.1, sigma=1.0)
    assert torch.autograd.gradcheck(lambda x: loss(x, prior), (z,))
    loss(z, prior).backward()
    assert prior.grad is None, "the averaging is fixed: no gradient reaches the prior"


def test_value_and_gradient_do_not_depend_on_the_blocks(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = torch.randn(21, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    prior = torch.randn(21, 3, generator=generator, dtype=torch.float64)
    results = []
    for chunk, block in ((1 << 18, 256), (21 * 5, 4), (1, 1)):
        monkeypatch.setattr("posthoc.adapters.losses.decoupled_uniformity.CHUNK", chunk)
        monkeypatch.setattr("posthoc.adapters.losses.kernels.BLOCK", block)
        value = DecoupledUniformity(kernel="rbf")(z, prior)
        results.append((value, *torch.autograd.grad(value, z)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-15)


def test_far_and_collapsed_centroids_stay_finite() -> None:
    far = torch.eye(6).reshape(6, 1, 6).requires_grad_()
    value = DecoupledUniformity(t=500.0)(far)  # exp(-1000) is 0 in float32
    assert value.item() == pytest.approx(-1000.0)
    assert torch.autograd.grad(value, far)[0].isfinite().all()
    collapsed = torch.ones(6, 2, 4, requires_grad=True)
    value = DecoupledUniformity()(collapsed)
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.autograd.grad(value, collapsed)[0].abs().max() < 1e-6
    assert DecoupledUniformity()(torch.zeros(3, 2, 4)).item() == 0.0  # vectors without a direction


def test_large_priors_do_not_cancel(generator: torch.Generator) -> None:
    """Positive features of norm 2000 in 4096 dimensions: the plain expansion of squared distances is off by 1.5 here."""
    prior = 30 + torch.rand(12, 4096, generator=generator)
    truth = torch.exp(-torch.cdist(prior.double(), prior.double()).square() / (2 * 20.0**2))
    torch.testing.assert_close(gram_matrix(prior, "rbf", 20.0), truth, rtol=1e-4, atol=0)
    assert (gram_matrix(prior, "rbf", 20.0).diagonal() == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_width_averages_nothing(generator: torch.Generator, dtype: torch.dtype) -> None:
    prior = torch.randn(5, 3, generator=generator, dtype=dtype)
    for sigma in (1e-3, 1e-30, 1e-200, 1e-310):
        assert torch.equal(rbf(prior, prior, sigma), torch.eye(5, dtype=dtype))
        assert torch.equal(gram_matrix(prior, "rbf", sigma), torch.eye(5).double())


def test_a_callable_is_asked_for_blocks_of_rows(generator: torch.Generator) -> None:
    prior = torch.randn(300, 3, generator=generator)
    asked = []

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        asked.append((len(x), len(y)))
        return rbf(x, y, 1.5)

    torch.testing.assert_close(gram_matrix(prior, kernel, 1.0), rbf(prior, prior, 1.5).double())
    assert max(rows for rows, _ in asked) == 128


def test_float32_centroids_of_an_ill_conditioned_kernel(generator: torch.Generator) -> None:
    """300 images, sigma 100: an inverse in float32 is off by 7e-3 of the largest centroid."""
    views = torch.randn(300, 2, 16, generator=generator)
    prior = (torch.rand(300, 312, generator=generator) < 0.1).float()
    loss = DecoupledUniformity(kernel="rbf", sigma=100.0)
    truth = loss.centroids(views.double(), prior.double())
    assert (loss.centroids(views, prior) - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_diagonal_and_median_width(generator: torch.Generator) -> None:
    prior = (torch.rand(256, 312, generator=generator) < 0.1).double()
    views = torch.randn(256, 2, 8, generator=generator, dtype=torch.float64)
    distances = [(prior[i] - prior[j]).norm() for i, j in itertools.combinations(range(256), 2)]
    median = torch.stack(distances).median().item()
    squared = torch.cdist(prior, prior).square()
    for sigma, expected in ((1.0, 0.990), (20.0, 0.751), (100.0, 0.194), ("median", None)):  # the specification's table
        gram = torch.exp(-squared / (2 * (median if isinstance(sigma, str) else sigma) ** 2))
        a = torch.linalg.solve(gram + 0.01 * torch.eye(256).double(), gram)
        loss = DecoupledUniformity(kernel="rbf", sigma=sigma)
        assert loss.mean_diagonal(prior) == pytest.approx(a.diagonal().mean().item(), rel=1e-9)
        if expected is not None:
            assert loss.mean_diagonal(prior) == pytest.approx(expected, abs=0.01)
        m = torch.nn.functional.normalize(views, dim=-1).mean(1)
        torch.testing.assert_close(loss.centroids(views, prior), a @ m, rtol=1e-8, atol=1e-10)
    assert DecoupledUniformity().mean_diagonal(prior) == 1.0
    twice = torch.tensor([[0.0], [0.0], [0.0], [0.0], [3.0]])  # equal rows have no say in the median
    one = DecoupledUniformity(kernel="rbf", sigma=3.0)
    assert DecoupledUniformity(kernel="rbf").mean_diagonal(twice) == pytest.approx(one.mean_diagonal(twice), rel=1e-6)
    same = torch.ones(4, 2)
    assert DecoupledUniformity(kernel="rbf").mean_diagonal(same) == pytest.approx(1 / 4.01, rel=1e-6)


def test_half_precision_and_autocast_are_computed_in_float32(generator: torch.Generator) -> None:
    views, prior = torch.randn(6, 2, 5, generator=generator), torch.randn(6, 3, generator=generator)
    loss = DecoupledUniformity(kernel="rbf", sigma=1.0)
    truth = loss(views.bfloat16().float(), prior)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(views.bfloat16(), prior)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, truth, rtol=0, atol=0)


def test_integer_and_boolean_rows_are_priors(generator: torch.Generator) -> None:
    views = torch.randn(6, 2, 5, generator=generator)
    attributes = torch.rand(6, 9, generator=generator) < 0.4
    loss = DecoupledUniformity(kernel="rbf", sigma=1.0)
    truth = loss(views, attributes.float())
    for dtype in (torch.bool, torch.uint8, torch.int64):
        torch.testing.assert_close(loss(views, attributes.to(dtype)), truth, rtol=0, atol=0)


def test_wrong_arguments_are_named() -> None:
    views, prior = torch.randn(4, 2, 3), torch.randn(4, 2)
    for option, match in (
        ({"t": 0}, "t=0"),
        ({"kernel": "linear"}, "kernel='linear'.*'rbf', 'cosine' or a callable"),
        ({"ridge": 0}, r"ridge=0.*1/sqrt\(N\)"),
        ({"kernel": "rbf", "sigma": "mean"}, "sigma='mean'.*'median'"),
        ({"kernel": "rbf", "sigma": -1.0}, "sigma=-1"),
    ):
        with pytest.raises(OptionError, match=match):
            DecoupledUniformity(**option)
    with pytest.raises(OptionError, match="compares images and was given 1"):
        DecoupledUniformity()(views[:1])
    with pytest.raises(OptionError, match=r"\[N, V, D\].*\(4, 3\)"):
        DecoupledUniformity()(views[:, 0])
    with pytest.raises(OptionError, match="without a kernel a prior has no say"):
        DecoupledUniformity()(views, prior)
    with pytest.raises(OptionError, match=r"kernel='rbf'.*no prior"):
        DecoupledUniformity(kernel="rbf")(views)
    with pytest.raises(OptionError, match="one-hot"):
        DecoupledUniformity(kernel="rbf")(views, torch.arange(4))
    with pytest.raises(OptionError, match=r"N = 4; given \(3, 2\)"):
        DecoupledUniformity(kernel="rbf")(views, prior[:3])
    with pytest.raises(OptionError, match=r"answered rows \(4, 2\) and \(4, 2\) with \(2, 2\)"):
        DecoupledUniformity(kernel=lambda x, y: x.T @ y)(views, prior)
    with pytest.raises(OptionError, match=r"not symmetric.*differ by"):
        DecoupledUniformity(kernel=lambda x, y: x @ y.T + x[:, :1])(views, prior)
    with pytest.raises(DataError, match=r"not positive definite.*larger ridge"):
        DecoupledUniformity(kernel=lambda x, y: -torch.eye(4))(views, prior)
    with pytest.raises(DataError, match="prior finite"):
        DecoupledUniformity(kernel="rbf", sigma=1.0)(views, prior * math.nan)


# Each process has its own rows of one batch; gradients are averaged over processes as DistributedDataParallel does
# (without its start-up time).
PROGRAM = """
import json, sys
import torch
from torch import distributed, nn
from posthoc.adapters.gathering import gather_rows
from posthoc.adapters.losses import DecoupledUniformity

cuts, rank, store = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=len(cuts))
rows = slice(sum(cuts[:rank]), sum(cuts[: rank + 1]))
g = torch.Generator().manual_seed(0)
images, prior = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((7, 2, 5), (7, 3)))
said = {"gathered": gather_rows(torch.arange(7.0)[rows]).tolist()}
for name, options, given in (
    ("plain", {}, None),
    ("rbf", {"kernel": "rbf"}, prior[rows]),
    ("alone", {"gather": False}, None),
):
    torch.manual_seed(0)
    encoder = nn.Linear(5, 4, dtype=torch.float64)
    loss = DecoupledUniformity(**options)
    value = loss(encoder(images[rows]), given)
    value.backward()
    distributed.all_reduce(encoder.weight.grad)
    said[name] = [value.item(), (encoder.weight.grad / len(cuts)).tolist()]
    if given is not None:
        said["diagonal"] = loss.mean_diagonal(given)
print(json.dumps(said))
distributed.destroy_process_group()
"""


def _launch(folder: Path, cuts: list[int]) -> list[dict]:
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-W", "error::FutureWarning", "program.py", json.dumps(cuts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "meeting")],
            env=environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=folder,
        )
        for rank in range(len(cuts))
    ]
    try:
        outputs = [run.communicate(timeout=600) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    assert [run.returncode for run in runs] == [0] * len(cuts), [errors for _, errors in outputs]
    return [json.loads(output) for output, _ in outputs]


def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    said = _launch(tmp_path, [4, 3])
    g = torch.Generator().manual_seed(0)
    images, prior = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((7, 2, 5), (7, 3)))
    for name, kernel, given in (("plain", None, None), ("rbf", "rbf", prior)):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(5, 4, dtype=torch.float64)
        loss = DecoupledUniformity(kernel=kernel)
        value = loss(encoder(images), given)
        (grad,) = torch.autograd.grad(value, encoder.weight)
        for one in said:
            assert one[name][0] == pytest.approx(value.item(), rel=1e-12)
            np.testing.assert_allclose(one[name][1], grad.numpy(), rtol=1e-9, atol=1e-12)
    for rank, rows in enumerate((slice(0, 4), slice(4, 7))):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(5, 4, dtype=torch.float64)
        own = DecoupledUniformity()(encoder(images[rows])).item()
        assert said[rank]["alone"][0] == pytest.approx(own, rel=1e-12)
        assert said[rank]["gathered"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        assert said[rank]["diagonal"] == pytest.approx(
            DecoupledUniformity(kernel="rbf").mean_diagonal(prior), rel=1e-12
        )


def test_without_a_launch_nothing_is_gathered() -> None:
    x = torch.randn(3, 2)
    assert gather_rows(x) is x
