"""CPU time and memory of a metric loss's curvature at a last layer, beside back-propagating D x D matrices for each pair.

    python benchmarks/metric_laplace.py --output metric_laplace.json

512 -> 128 with 1,000 triplets by default; each side of each case runs in a process of its own. Times are the least CPU
seconds (all threads) of several calls, memory is the peak of the process beyond imports and inputs. The plain side follows
the formulas: for each pair the loss's Hessian blocks [P, D, D] go back through the normaliser by matrix products, and the
diagonal is taken at each weight [P, D, d_in]. Both sides' results are compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posthoc.adapters.metric_curvature import APPROXIMATIONS, LOSSES, pair_diagonal, signed_pairs

SECONDS, CALLS = 6.0, 20


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, p: Tensor, n: Tensor, loss: str, approximation: str
) -> Tensor:
    """[D, d_in], every pair by itself."""
    lists = [(a, p, 1.0)] if approximation == "positives" else [(a, p, 1.0), (a, n, -1.0)]
    total = torch.zeros_like(weight)
    eye = torch.eye(len(weight))
    for first, second, sign in lists:
        x1, x2 = x[first], x[second]
        z1, z2 = x1 @ weight.T + bias, x2 @ weight.T + bias
        r1, r2 = z1.norm(dim=1)[:, None, None], z2.norm(dim=1)[:, None, None]
        u, v = z1 / r1[:, 0], z2 / r2[:, 0]
        uu, vv, uv = u[:, :, None] * u[:, None], v[:, :, None] * v[:, None], u[:, :, None] * v[:, None]
        if loss == "euclidean":
            j1, j2 = (eye - uu) / r1, (eye - vv) / r2
            own = eye.expand_as(j1)
            h11, h12, h22 = j1.mT @ own @ j1, -(j1.mT @ own @ j2), j2.mT @ own @ j2
        else:
            c = (u * v).sum(1)[:, None, None]
            h11 = (c * eye + uv + uv.mT - 3 * c * uu) / r1**2
            h22 = (c * eye + uv + uv.mT - 3 * c * vv) / r2**2
            h12 = (uu + vv - eye - c * uv) / (r1 * r2)
        each = h11.diagonal(dim1=1, dim2=2)[:, :, None] * x1.square()[:, None]
        each = each + h22.diagonal(dim1=1, dim2=2)[:, :, None] * x2.square()[:, None]
        if approximation != "fixed":
            each = each + 2 * h12.diagonal(dim1=1, dim2=2)[:, :, None] * (x1 * x2)[:, None]
        total += sign * each.sum(0)
    return total


def ours(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, p: Tensor, n: Tensor, loss: str, approximation: str
) -> Tensor:
    pairs, cross = signed_pairs((a, p), (a, n), approximation)
    return pair_diagonal(x, weight, bias, pairs, loss=loss, cross=cross)[0].float()


def inputs(triplets: int, rows: int, inputs: int, outputs: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    index = torch.randint(rows // 2, (3, triplets), generator=generator)
    index[1] += rows // 2  # no row is its own positive
    return x, weight, torch.randn(outputs, generator=generator), *index


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(side: str, loss: str, approximation: str, size: list[int]) -> dict[str, float]:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    given = inputs(*size)
    step = ours if side == "ours" else plain
    step(*(g[:64] if g.ndim == 1 and g.dtype == torch.int64 else g for g in given), loss, approximation)  # warm up
    before, times, started = peak(), [], time.perf_counter()
    result = torch.zeros(1)
    while len(times) < 2 or (time.perf_counter() - started < SECONDS and len(times) < CALLS):
        start = time.process_time()
        result = step(*given, loss, approximation)
        times.append(time.process_time() - start)
    return {"cpu": min(times), "peak MB": peak() - before, "sum": float(result.sum()), "norm": float(result.norm())}


def run(side: str, loss: str, approximation: str, size: list[int]) -> dict[str, Any]:
    asked = json.dumps([side, loss, approximation, size])
    done = subprocess.run([sys.executable, __file__, "--measure", asked], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=4, default=[1000, 512, 512, 128], help="triplets, rows, d_in, D")
    parser.add_argument("--output", type=Path, default=Path("metric_laplace.json"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return
    results: dict[str, Any] = {}
    print("| loss | approximation | ours, CPU s | plain, CPU s | ratio | ours, peak MB | plain, peak MB |")
    print("|---|---|---|---|---|---|---|")
    for loss in LOSSES:
        for approximation in APPROXIMATIONS:
            sides = {side: run(side, loss, approximation, arguments.size) for side in ("ours", "plain")}
            a, b = sides["ours"], sides["plain"]
            assert abs(a["norm"] - b["norm"]) < 1e-3 * b["norm"], sides
            print(
                f"| {loss} | {approximation} | {a['cpu']:.4f} | {b['cpu']:.3f} | {b['cpu'] / a['cpu']:.0f} | "
                f"{a['peak MB']:.0f} | {b['peak MB']:.0f} |",
                flush=True,
            )
            results[f"{loss} {approximation}"] = sides
    large = [100_000, *arguments.size[1:]]
    print(f"\nOurs with {large[0]} triplets:\n")
    for approximation in APPROXIMATIONS:
        found = run("ours", "euclidean", approximation, large)
        print(f"- {approximation}: {found['cpu']:.2f} CPU s, {found['peak MB']:.0f} MB")
        results[f"large {approximation}"] = found
    arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
