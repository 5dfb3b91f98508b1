"""Time and memory of every objective beside a straightforward PyTorch version of it, and how time grows with size.

    python benchmarks/losses.py --threads 2 --output losses.json >table.md
    python benchmarks/losses.py --only tau aninfonce          # cases whose names begin so

Each side of each case runs in a process of its own: loss and gradients for all inputs, first once (the library's first
call on von Mises-Fisher posteriors builds the table of its dimension), then again and again; times are medians of the
later calls, memory is the peak of the process beyond imports and inputs. CPU time is that of all threads. The cases
"-compiled" go through torch.compile: their first call, of which wall time is told, compiles (caches are off), and the
compiler's own modules count to their memory; they stand beside the plain version of the same case without it. What was
measured is kept in --output, and only what is missing there is run: the whole takes some 15 minutes on 2 idle cores, most
of it in sampling full vectors, and 6 GB. Where there is a GPU, all is run on it too (times are then wall times).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import losses_plain as plain
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn import functional

from posthoc.adapters import losses
from posthoc.adapters.vmf import VonMisesFisher

Step = Callable[[], object]
SECONDS, CALLS = 8.0, 40  # a side stops after so long, or so many calls


@dataclass
class Case:
    """A loss at one size, from `build(side, device, **size)`; without `plain` only the library's side is run."""

    name: str
    build: Callable[..., Step]
    size: dict[str, Any] = field(default_factory=dict)
    plain: bool = True


def gradients(loss: Callable[[], Tensor], inputs: list[Tensor]) -> Step:
    return lambda: torch.autograd.grad(loss(), inputs)


def posteriors(side: str, device: str, loss: str, B: int, S: int = 0, M: int = 0, d: int = 10, **options: bool) -> Step:
    """M = 0: rolled negatives. Concentrations 16 to 32, scaled with the dimension."""
    shapes = [(B,), (B,)] + ([(B, M)] if M else [])
    mu = [functional.normalize(torch.randn(*s, d, device=device), dim=-1).requires_grad_() for s in shapes]
    kappa = [((16 + 16 * torch.rand(s, device=device)) * d / 10).requires_grad_() for s in shapes]
    pairs = list(zip(mu, kappa, strict=True))
    if side == "plain":
        three = (*pairs, None)[:3]
        calls: dict[str, Callable[[], Tensor]] = {
            "mcinfonce": lambda: plain.mcinfonce(*three, S),
            "hedged": lambda: plain.hedged_instance(*three, S, 5.0, 0.0),
            "elk": lambda: plain.expected_likelihood(*pairs),
        }
        return gradients(calls[loss], [*mu, *kappa])
    made = {
        "mcinfonce": lambda: losses.MCInfoNCE(16.0, S, **options),
        "hedged": lambda: losses.HedgedInstance(5.0, 0.0, S, **options),
        "elk": lambda: losses.ExpectedLikelihoodKernel(20.0),
    }[loss]()
    return gradients(lambda: made(*(VonMisesFisher(*pair, validate_args=False) for pair in pairs)), [*mu, *kappa])


def two_views(side: str, device: str, loss: str, N: int, D: int = 128, frozen: bool = False, **options: Any) -> Step:
    z = [torch.randn(N, D, device=device).requires_grad_(not frozen) for _ in range(2)]
    r = [torch.randn(N, device=device).requires_grad_() for _ in range(2)]
    raw = torch.zeros(D, device=device, requires_grad=True)
    if loss == "aninfonce":
        made = losses.AnInfoNCE(D, **options).to(device)
        ours, inputs = (lambda: made(*z)), [*z, made.raw_precision if side == "ours" else raw]
        theirs = lambda: plain.aninfonce(*z, raw)  # noqa: E731
    elif loss == "tau":
        tau = losses.TaU(0.1)
        ours, theirs = (lambda: tau(*z, *r)), (lambda: plain.tau(*z, *r, 0.1))
        inputs = r if frozen else [*z, *r]
    else:
        ntxent = losses.NTXent(0.1)
        ours, theirs, inputs = (lambda: ntxent(*z)), (lambda: plain.ntxent(*z, 0.1)), z
    return gradients(ours if side == "ours" else theirs, inputs)


def families(side: str, device: str, N: int, D: int, families: int) -> Step:
    pairs = [tuple(torch.randn(N, D, device=device, requires_grad=True) for _ in range(2)) for _ in range(families)]
    raw = torch.zeros(families, D, device=device, requires_grad=True)
    made = losses.AnInfoNCEEnsemble(D, families).to(device)
    z = [x for pair in pairs for x in pair]
    if side == "ours":
        return gradients(lambda: made(pairs), [*z, *made.parameters()])
    return gradients(lambda: plain.aninfonce_ensemble(pairs, raw), [*z, raw])


def gaussians(side: str, device: str, loss: str, N: int, K: int = 0, D: int = 128) -> Step:
    """Means and raw deviations of anchors and positives; the negatives are rolled."""
    x = [torch.randn(N, D, device=device, requires_grad=True) for _ in range(4)]
    if loss == "mutual":
        mutual = losses.MutualLikelihood()
        return gradients(lambda: (mutual if side == "ours" else plain.mutual_likelihood)(*x), x)
    hedged = losses.HedgedGaussian(0.1, 1.0, K, learnable=False)

    def moments() -> list[Tensor]:
        return [x[0], functional.softplus(x[1]), x[2], functional.softplus(x[3])]

    def ours() -> Tensor:
        m1, s1, m2, s2 = moments()
        return hedged(Normal(m1, s1, validate_args=False), Normal(m2, s2, validate_args=False))

    return gradients(ours if side == "ours" else lambda: plain.hedged_gaussian(moments(), K, 0.1, 1.0), x)


def prediction(side: str, device: str, loss: str, N: int) -> Step:
    u, target = torch.randn(N, device=device, requires_grad=True), torch.rand(N, device=device)
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("ranking", "ours"): lambda: losses.LossRanking(0.1)(u, target),
        ("ranking", "plain"): lambda: plain.loss_ranking(u, target, 0.1),
        ("mse", "ours"): lambda: losses.LossMSE()(u, target),
        ("mse", "plain"): lambda: plain.loss_mse(u, target),
    }
    return gradients(calls[loss, side], [u])


def queue(side: str, device: str, N: int, K: int, D: int = 128) -> Step:
    query, key, keys = (torch.randn(n, D, device=device) for n in (N, N, K))
    r = torch.randn(N, device=device, requires_grad=True)
    query.requires_grad_()
    loss = losses.TaUMoCo(0.1)
    if side == "ours":
        return gradients(lambda: loss(query, key, keys, r), [query, r])
    return gradients(lambda: plain.tau_moco(query, key, keys, r, 0.1), [query, r])


def uniformity(side: str, device: str, N: int, P: int = 0, D: int = 128) -> Step:
    views = torch.randn(N, 2, D, device=device, requires_grad=True)
    prior = (torch.rand(N, P, device=device) < 0.1).float() if P else None
    loss = losses.DecoupledUniformity(kernel="rbf" if P else None, sigma=20.0, gather=False)
    if side == "ours":
        return gradients(lambda: loss(views, prior), [views])
    return gradients(lambda: plain.decoupled_uniformity(views, prior), [views])


def metric(side: str, device: str, N: int, D: int = 128, classes: int = 10) -> Step:
    z = torch.randn(N, D, device=device, requires_grad=True)
    label = torch.arange(N, device=device) % classes
    loss = losses.ContrastiveMetric(0.7)
    if side == "ours":
        return gradients(lambda: loss(z, label), [z])
    return gradients(lambda: plain.contrastive_metric(z, label, 0.7), [z])


def cases() -> list[Case]:
    """At the sizes of the papers' settings first, then one size after the other."""
    full = {"loss": "mcinfonce", "S": 512, "M": 32}
    listed = [
        Case("mcinfonce B512 S512 M32 d10", posteriors, full | {"B": 512}),
        Case("mcinfonce-reference B512 S512 M32 d10", posteriors, full | {"B": 512, "reference": True}, plain=False),
        Case("mcinfonce B64 S512 M32 d128", posteriors, full | {"B": 64, "d": 128}),
        Case("mcinfonce B512 S512 rolled d10", posteriors, full | {"B": 512, "M": 0}),
        Case("mcinfonce B512 S512 rolled d128", posteriors, full | {"B": 512, "M": 0, "d": 128}),
        Case("mcinfonce B128 S128 M16 d10", posteriors, full | {"B": 128, "S": 128, "M": 16}),
        Case("hedged B128 S128 M16 d10", posteriors, {"loss": "hedged", "B": 128, "S": 128, "M": 16}),
        *(
            Case(f"{loss}-compiled {name}", posteriors, {"loss": loss, "compiled": True} | size, plain=False)
            for loss, name, size in (
                ("mcinfonce", "B512 S512 M32 d10", {"B": 512, "S": 512, "M": 32}),
                ("mcinfonce", "B64 S512 M32 d128", {"B": 64, "S": 512, "M": 32, "d": 128}),
                ("mcinfonce", "B512 S512 rolled d10", {"B": 512, "S": 512}),
                ("hedged", "B128 S128 M16 d10", {"B": 128, "S": 128, "M": 16}),
            )
        ),
        Case("elk B512 M32 d10", posteriors, {"loss": "elk", "B": 512, "M": 32}),
        *(Case(f"ntxent N{n} D128", two_views, {"loss": "ntxent", "N": n}) for n in (256, 1024)),
        *(Case(f"tau N{n} D128", two_views, {"loss": "tau", "N": n}) for n in (256, 1024)),
        Case("tau-frozen N1024 D128", two_views, {"loss": "tau", "N": 1024, "frozen": True}),
        Case("tau-moco N256 K65536 D128", queue, {"N": 256, "K": 65536}),
        Case("aninfonce N1000 n10", two_views, {"loss": "aninfonce", "N": 1000, "D": 10}),
        *(Case(f"uniformity N{n} D128", uniformity, {"N": n}) for n in (256, 1024)),
        *(Case(f"uniformity-rbf N{n} D128 P312", uniformity, {"N": n, "P": 312}) for n in (256, 1024)),
        Case("metric N256 D128", metric, {"N": 256}),
        *(Case(f"gaussian N{n} K4 D128", gaussians, {"loss": "hedged", "N": n, "K": 4}) for n in (256, 1024)),
        Case("mutual N1024 D128", gaussians, {"loss": "mutual", "N": 1024}),
        Case("aninfonce-ensemble N1000 n10 families3", families, {"N": 1000, "D": 10, "families": 3}),
        Case("ranking N1024", prediction, {"loss": "ranking", "N": 1024}),
        Case("mse N1024", prediction, {"loss": "mse", "N": 1024}),
    ]
    hard = {"loss": "aninfonce", "N": 1000, "D": 10, "hard_negatives": 1.0}
    listed.append(Case("aninfonce-hard N1000 n10", two_views, hard, plain=False))
    start = {"loss": "mcinfonce", "B": 128, "S": 128, "M": 16, "d": 10}
    for key, values in (("B", (256, 512, 1024)), ("S", (256, 512)), ("M", (32, 64)), ("d", (64, 512, 2048))):
        for value in values:
            size = start | {key: value}
            name = "growth mcinfonce " + " ".join(f"{k}{v}" for k, v in size.items() if k != "loss")
            listed.append(Case(name, posteriors, size, plain=False))
    for n in (512, 2048, 4096):
        listed += [
            Case(f"growth ntxent N{n} D128", two_views, {"loss": "ntxent", "N": n}, plain=False),
            Case(f"growth tau N{n} D128", two_views, {"loss": "tau", "N": n}, plain=False),
            Case(f"growth aninfonce N{n} n10", two_views, {"loss": "aninfonce", "N": n, "D": 10}, plain=False),
            Case(f"growth uniformity N{n} D128", uniformity, {"N": n}, plain=False),
            Case(f"growth metric N{n // 2} D128", metric, {"N": n // 2}, plain=False),
        ]
    return listed


def memory(device: str, *, start: bool = False) -> float:
    """Peak MB since the last call with `start`, which itself answers what is held at its time."""
    if device == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if start:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports is forgotten (Linux)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def measure(case: Case, side: str, device: str) -> dict[str, float]:
    """In this process: milliseconds of the first call and of the later ones (medians), MB at the peak."""
    torch.manual_seed(0)
    step = case.build(side, device, **case.size)
    before = memory(device, start=True)
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(times) < 2 or (len(times) < CALLS and time.perf_counter() - began < SECONDS):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    later = times[1:]
    return {
        "wall": 1e3 * statistics.median(t[0] for t in later),
        "cpu": 1e3 * statistics.median(t[1] for t in later),
        "first": 1e3 * times[0][0 if device == "cuda" or "compiled" in case.size else 1],
        "memory": memory(device) - before,
    }


def run_apart(name: str, side: str, device: str, threads: int) -> dict[str, float] | str:
    """The measurement from a fresh process, or the last line of its error."""
    command = [sys.executable, __file__, "--child", name, side, device, "--threads", str(threads)]
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def line(name: str, device: str, found: dict[str, Any]) -> str:
    clock = "wall" if device == "cuda" else "cpu"
    cells = []
    for side in ("ours", "plain"):
        one = found.get(side)
        if isinstance(one, dict):
            cells += [f"{one[clock]:.3g}", f"{one['wall']:.3g}", f"{one['first']:.3g}", f"{one['memory']:.0f}"]
        else:
            cells += [str(one or ""), "", "", ""]
    ours, theirs = found.get("ours"), found.get("plain")
    both = isinstance(ours, dict) and isinstance(theirs, dict)
    cells.append(f"{theirs[clock] / ours[clock]:.1f}" if both else "")
    return f"| {name} | {device} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of cases to run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None, help="JSON file of what was measured, read and added to")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "SIDE", "DEVICE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        name, side, device = arguments.child
        case = next(case for case in cases() if case.name == name)
        print(json.dumps(measure(case, side, device)))
        return
    kept = arguments.output
    results: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    print(
        f"torch {torch.__version__}, {arguments.threads} threads; times in ms, memory in MB beyond imports and inputs\n"
    )
    print("| case | device | ours CPU | wall | first | memory | plain CPU | wall | first | memory | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for case in cases():
            if not case.name.startswith(tuple(arguments.only)):
                continue
            found = results.setdefault(f"{device} {case.name}", {})
            for side in ("ours", "plain") if case.plain else ("ours",):
                if not isinstance(found.get(side), dict):
                    found[side] = run_apart(case.name, side, device, arguments.threads)
                    if kept:
                        kept.write_text(json.dumps(results, indent=1) + "\n")
            beside = results.get(f"{device} {case.name.replace('-compiled', '')}", {})
            print(line(case.name, device, {"plain": beside.get("plain"), **found}), flush=True)


if __name__ == "__main__":
    main()
