"""TaU-MoCo, its queue and its trailing encoder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from posthoc.adapters.errors import OptionError
from posthoc.adapters.losses import MomentumContrast, TaUMoCo, tau_moco

CASES = ["n8_d16_k32_t0.1_s130", "n16_d32_k64_t0.07_s131"]

# Two processes with 2 and 3 keys each, twice, into a queue of 7; each says what its queue holds.
PROGRAM = """
import json, sys, torch
from torch import nn
from posthoc.adapters.distributed import check_launch
from posthoc.adapters.losses import MomentumContrast

rank = check_launch().rank
moco = MomentumContrast(nn.Linear(1, 1), dim=1, queue_size=7)
for turn in (1, -1):
    moco.enqueue(torch.full((2 + rank, 1), float(turn * (1 if rank else -1))))
said = json.dumps([rank, moco.queue[:, 0].tolist(), int(moco.position)])
sys.stdout.write(said + "\\n")  # in one write: two processes share the pipe
torch.distributed.destroy_process_group()
"""


def _inputs(generator: torch.Generator, n: int = 5, k: int = 9, dim: int = 4) -> list[Tensor]:
    """query, key, queue, r_query."""
    shapes = ((n, dim), (n, dim), (k, dim), (n,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _plain(query: Tensor, key: Tensor, queue: Tensor, r: Tensor, t: float) -> Tensor:
    """The loss from its formula, one query at a time."""
    q, k, u = (functional.normalize(x, dim=-1) for x in (query, key, queue))
    total = q.new_zeros(())
    for i in range(len(q)):
        logit = torch.stack([q[i] @ other * torch.sigmoid(r[i]) / t for other in (k[i], *u)])
        total = total + torch.logsumexp(logit, 0) - logit[0]
    return total / len(q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_golden_numbers(shared: Path, case: str, dtype: torch.dtype) -> None:
    golden = np.load(shared / f"golden/tau/moco_{case}.npz")
    query, key, queue = (torch.tensor(golden[name], dtype=dtype) for name in ("q", "k", "queue"))
    r = torch.tensor(golden["raw_q"][:, 0], dtype=dtype)
    certain = torch.full_like(r, 1e3)  # every temperature is t: plain MoCo
    gradient = 1e-5 if dtype == torch.float64 else 1e-4
    for kind, raw in (("tau", r), ("moco", certain)):
        inputs = [query.clone().requires_grad_(), raw.clone().requires_grad_()]
        value = TaUMoCo(float(golden["t"]))(inputs[0], key, queue, inputs[1])
        assert value.item() == pytest.approx(float(golden[f"{kind}_loss_f64"]), abs=1e-6, rel=1e-5)
        grads = torch.autograd.grad(value, inputs)
        for name, grad in zip(("q", "raw_q"), grads, strict=True):
            if kind == "tau" or name == "q":
                truth = golden[f"{kind}_grad_{name}_f64"].reshape(grad.shape)
                assert np.abs(grad.numpy() - truth).max() <= 1e-6 + gradient * np.abs(truth).max()
        if kind == "moco":
            assert (grads[1] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(shared: Path, case: str) -> None:
    """Of a query alone: log sum exp over its row less its first; the paper's code takes 1 from every cosine."""
    golden = np.load(shared / f"golden/tau/moco_{case}.npz")
    query, key, queue, r = (torch.tensor(golden[name]).double() for name in ("q", "k", "queue", "raw_q"))
    logits = torch.tensor(golden["tau_logits"]).double()
    for i in range(len(query)):
        one = slice(i, i + 1)
        for columns in (slice(None), slice(3, 4), slice(7, 9)):  # and of some of the queue, so that each logit counts
            value = TaUMoCo(float(golden["t"]))(query[one], key[one], queue[columns], r[one, 0])
            row = torch.cat([logits[i, :1], logits[i, 1:][columns]])
            assert value.item() == pytest.approx((row.logsumexp(0) - row[0]).item(), rel=1e-4, abs=1e-6)


def test_equals_the_formula_in_blocks_too(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, queue, r = _inputs(generator, n=4, k=75)
    inputs = [query.requires_grad_(), r.requires_grad_()]
    loss = TaUMoCo(0.05)
    expected = _plain(query, key, queue, r, 0.05)
    truth = torch.autograd.grad(expected, inputs)
    for chunk in (tau_moco.CHUNK, 1):  # one block of keys; 32, 32 and 11 of them
        monkeypatch.setattr(tau_moco, "CHUNK", chunk)
        value = loss(query, key, queue, r)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(value, inputs), truth, rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradcheck(lambda q, r: loss(q, key, queue, r), inputs)
    one = loss(query[:1], key[:1], queue[:1], r[:1])
    torch.testing.assert_close(one, _plain(query[:1], key[:1], queue[:1], r[:1], 0.05), rtol=1e-12, atol=0)


def test_keys_get_no_gradient_and_may_be_replaced_before_backward(generator: torch.Generator) -> None:
    query, key, queue, r = (x.requires_grad_() for x in _inputs(generator))
    value = TaUMoCo()(query, key, queue, r)
    truth = torch.autograd.grad(TaUMoCo()(query, key, queue, r), (query, r))
    with torch.no_grad():
        queue.zero_()
    value.backward()
    assert key.grad is None
    assert queue.grad is None
    torch.testing.assert_close((query.grad, r.grad), truth)


@pytest.mark.parametrize("t", [0.01, 1e-3])
def test_extremes_stay_finite(generator: torch.Generator, t: float) -> None:
    inputs = [x.float() for x in _inputs(generator)]
    for raw in (-1e4, 0.0, 1e4):
        query, r = inputs[0].clone().requires_grad_(), torch.full((5,), raw, requires_grad=True)
        value = TaUMoCo(t)(query, inputs[1], inputs[2], r)
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, (query, r)))
        truth = _plain(*(x.detach().double() for x in (query, inputs[1], inputs[2], r)), t)
        assert value.item() == pytest.approx(truth.item(), rel=1e-4)
    flat = TaUMoCo(t)(*inputs[:3], torch.full((5,), -1e4))
    assert flat.item() == pytest.approx(math.log(10.0), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(generator: torch.Generator, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in _inputs(generator)]
    query = inputs[0].requires_grad_()
    full = TaUMoCo(0.01)(*(x.detach().float() for x in inputs))
    with torch.autocast("cpu", dtype=dtype):
        mixed = TaUMoCo(0.01)(*inputs)
    torch.testing.assert_close(mixed, full, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(mixed, query)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


def test_wrong_arguments_are_named(generator: torch.Generator) -> None:
    with pytest.raises(OptionError, match="base_temperature=0"):
        TaUMoCo(0)
    query, key, queue, r = _inputs(generator)
    for wrong in ((query, key[:4], queue, r), (query, key, queue[:, :3], r), (query, key, queue[:0], r)):
        with pytest.raises(OptionError, match=r"\[K, D\], \[N\]; the shapes given are \(5, 4\)"):
            TaUMoCo()(*wrong)
    with pytest.raises(OptionError, match=r"\(5, 1\)"):
        TaUMoCo()(query, key, queue, r[:, None])
    for options in ({"dim": 0}, {"queue_size": 0}, {"momentum": 1.5}):
        with pytest.raises(OptionError, match=r"momentum in \[0, 1\]"):
            MomentumContrast(nn.Linear(1, 1), **({"dim": 2} | options))
    moco = MomentumContrast(nn.Linear(3, 2), dim=2, queue_size=4)
    with pytest.raises(OptionError, match=r"\[N, 2\].*\(4, 3\)"):
        moco.enqueue(torch.ones(4, 3))
    with pytest.raises(OptionError, match="2 tensors; expected the 2"):
        moco.update(nn.Linear(2, 3))


def _batch_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_the_trailing_encoder_follows_parameters_and_buffers(generator: torch.Generator) -> None:
    encoder = _batch_normed()
    moco = MomentumContrast(encoder, dim=2, queue_size=4, momentum=0.75)
    start = {name: x.clone() for name, x in moco.encoder.state_dict().items()}
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
        for _ in range(3):
            encoder(torch.randn(8, 3, generator=generator))  # moves the running statistics
    moco.update(encoder)
    moved = 0
    for name, now in moco.encoder.state_dict().items():
        target = encoder.state_dict()[name]
        if name.endswith("num_batches_tracked"):
            assert now == target == 3
        else:
            torch.testing.assert_close(now, 0.75 * start[name] + 0.25 * target)
            moved += not torch.equal(now, start[name])
    assert moved == 8, "two linear layers and a batch norm have 6 parameters, and 2 running statistics"
    moco.update(nn.ModuleDict({"module": encoder}))  # as a wrapper would hold it
    torch.testing.assert_close(moco.encoder[0].weight, start["0.weight"] + 1.0 - 0.75**2)
    assert not any(p.requires_grad for p in moco.parameters())
    assert not moco(torch.randn(8, 3, generator=generator).requires_grad_()).requires_grad


def test_the_queue_is_first_in_first_out(generator: torch.Generator) -> None:
    moco = MomentumContrast(nn.Linear(3, 3), dim=3, queue_size=10)
    torch.testing.assert_close(moco.queue.norm(dim=-1), torch.ones(10))
    held = list(moco.queue.clone())  # oldest first
    for batch in (4, 4, 4, 1, 10, 7, 23):
        keys = torch.randn(batch, 3, generator=generator)
        moco.enqueue(keys)
        held = [*held, *functional.normalize(keys, dim=-1)][-10:]
        position = int(moco.position)
        torch.testing.assert_close(moco.queue.roll(-position, 0), torch.stack(held))
    assert moco.position == 53 % 10
    moco.enqueue(torch.randn(2, 3, generator=generator, dtype=torch.float16))
    assert moco.queue.dtype == torch.float32


def test_state_is_saved_and_resumed(generator: torch.Generator) -> None:
    first = MomentumContrast(_batch_normed(), dim=2, queue_size=5)
    first.enqueue(torch.randn(3, 2, generator=generator))
    second = MomentumContrast(_batch_normed(), dim=2, queue_size=5)
    second.load_state_dict(first.state_dict())
    keys = torch.randn(4, 2, generator=generator)
    for moco in (first, second):
        moco.enqueue(keys)
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert first.position == 2


def test_the_queue_takes_the_keys_of_every_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    said = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    # rank 0 has 2 keys, rank 1 has 3; the second turn fills places 5, 6, 0, 1, 2
    expected = [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
    assert said == [[0, expected, 3], [1, expected, 3]]
