"""Exact search in a large gallery: time and peak memory of `eval.search` against NumPy and faiss, in one run.

    python benchmarks/retrieval.py --threads 1                      # 1,000,000 x 128, 1,000 queries, k = 10 and 100
    python benchmarks/retrieval.py --queries 10000 --sides torch
    python benchmarks/retrieval.py --tune                           # sizes of the chunks
    python benchmarks/retrieval.py --device cuda --sides torch

Every side runs in a process of its own on the same seeded unit vectors: CPU seconds, wall seconds and the peak above the
vectors themselves. "numpy" is a matrix product of 64 queries with the whole gallery, argpartition and a sort; "faiss" its
flat inner-product index, which holds a copy of the gallery. Neighbours are compared with the first side's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

SIDES = ("torch", "faiss", "numpy")
TUNED = [(q, g) for q in (64, 256, 1024) for g in (1 << 12, 1 << 14, 1 << 16, 1 << 18)]


def unit_vectors(rows: int, dim: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def brute_force(query: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    found = np.empty((len(query), k), np.int64)
    for start in range(0, len(query), 64):
        similar = query[start : start + 64] @ gallery.T
        best = np.argpartition(-similar, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(similar, best, 1), axis=1)
        found[start : start + 64] = np.take_along_axis(best, order, 1)
    return found


def peak_mb(start_anew: bool = False) -> float:
    """Largest resident memory so far, or since it was last started anew (Linux)."""
    status = Path("/proc/self/status").read_text()
    if start_anew:
        Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def child(arguments: argparse.Namespace) -> None:
    """One side, measured; prints a line of JSON."""
    import torch

    from posthoc.eval import search

    torch.set_num_threads(arguments.threads)
    if arguments.chunks:
        search.QUERIES["cpu"], search.COLUMNS = arguments.chunks
        search.NUMBERS = 1 << 40
    gallery = unit_vectors(arguments.gallery, arguments.dim, 0)
    query = unit_vectors(arguments.queries, arguments.dim, 1)
    side = arguments.sides[0]

    def library(q: np.ndarray) -> np.ndarray:
        return search.neighbours(q, gallery, arguments.k[0], device=arguments.device, backend=side)

    run: Callable[[np.ndarray], np.ndarray] = library
    if side == "numpy":
        run = partial(brute_force, gallery=gallery, k=arguments.k[0])
    elif side == "faiss":
        import faiss

        faiss.omp_set_num_threads(arguments.threads)
    if arguments.device != "cpu":
        run(query[:2])  # the first call starts the device
    before, cpu, wall = peak_mb(start_anew=True), time.process_time(), time.perf_counter()
    found = run(query)
    spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    np.save(arguments.found, found)
    print(json.dumps({**spent, "mb": peak_mb() - before, "total_mb": peak_mb()}))


def measure(arguments: argparse.Namespace, side: str, k: int, chunks: tuple[int, int] | None = None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--child", "--sides", side, "--k", str(k), "--found", f"{folder}/found.npy"]
        for name in ("gallery", "queries", "dim", "threads", "device"):
            words += [f"--{name}", str(getattr(arguments, name))]
        if chunks:
            words += ["--chunks", *map(str, chunks)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1]}
        return json.loads(done.stdout.splitlines()[-1]) | {"found": np.load(f"{folder}/found.npy")}


def line(name: str, one: dict, first: dict | None) -> str:
    if "error" in one:
        return f"| {name} | {one['error']} |"
    same = "" if first is None else f"{(one['found'] == first['found']).mean():.5f}"
    ratio = "" if first is None else f"{one['cpu'] / first['cpu']:.2f}"
    cells = [f"{one[key]:.1f}" for key in ("cpu", "wall")] + [f"{one[key]:.0f}" for key in ("mb", "total_mb")]
    return f"| {name} | " + " | ".join([*cells, ratio, same]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tune", action="store_true", help="try sizes of the chunks instead")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--chunks", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    print("| search | CPU s | wall s | MB above the vectors | MB in all | ratio of CPU | equal neighbours |")
    print("|---|---|---|---|---|---|---|")
    for k in arguments.k:
        first = None
        tried = [(f"torch {q} x {g}", "torch", (q, g)) for q, g in TUNED]
        for name, side, chunks in tried if arguments.tune else [(s, s, None) for s in arguments.sides]:
            one = measure(arguments, side, k, chunks)
            print(line(f"{name} k={k}", one, first), flush=True)
            first = first or (one if "error" not in one else None)


if __name__ == "__main__":
    main()
