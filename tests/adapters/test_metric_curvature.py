"""Curvature of metric losses: golden files, brute force by autograd, and the edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from posthoc.adapters import metric_curvature
from posthoc.adapters.errors import OptionError
from posthoc.adapters.metric_curvature import APPROXIMATIONS, Pairs, mine_counts, pair_diagonal, signed_pairs
from posthoc.adapters.metric_laplace import hessian_diagonal
from posthoc.adapters.metric_network import network_diagonal
from posthoc.adapters.mining import draw_triplets, mine_triplets
from posthoc.adapters.positives import label_masks

SHORT = {"positives": "pos", "fixed": "fix", "full": "full"}
LINEAR = ["contr_linear", "contr_linear_l2", "contr_linear_l2_pairs4", "contr_linear_l2_wide"]
LINEAR += ["arccos_linear", "arccos_linear_pairs4", "arccos_linear_wide"]
NETWORKS = ["contr_mlp", "contr_mlp_l2", "arccos_mlp", "conv_a"]


class Normaliser(nn.Module):
    def __init__(self, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, z: Tensor) -> Tensor:
        return z / (z.norm(dim=-1, keepdim=True) + self.eps)


def golden_pairs(golden: Any, approximation: str) -> tuple[Pairs, bool]:
    index = {name: torch.from_numpy(golden[name]) for name in golden.files if name.startswith("idx")}
    positive = (index.get("idx_ap", index.get("idx_a")), index["idx_p"])
    negative = (index.get("idx_an", index.get("idx_a")), index["idx_n"])
    return signed_pairs(positive, negative, approximation)


def golden_network(golden: Any) -> nn.Module:
    layers: list[nn.Module] = []
    if "conv_out" in golden:
        out, kernel, latent = (int(golden[name]) for name in ("conv_out", "kernel", "latent"))
        channels, side = golden["x"].shape[1], golden["x"].shape[2] - kernel + 1
        layers = [nn.Conv2d(channels, out, kernel), nn.Tanh(), nn.Flatten(), nn.Linear(out * side * side, latent)]
        normalise = True
    else:
        for i, (wide, narrow) in enumerate(golden["dims"].tolist()):
            layers += ([nn.Tanh()] if i else []) + [nn.Linear(wide, narrow)]
        normalise = bool(golden["l2norm"])
    network = nn.Sequential(*layers, *([Normaliser(1e-6)] if normalise else [])).double()
    nn.utils.vector_to_parameters(torch.from_numpy(golden["theta"]), network.parameters())
    return network


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_layer_matches_golden(shared: Path, name: str, approximation: str) -> None:
    golden = np.load(shared / f"golden/lam/hess_{name}.npz")
    network = golden_network(golden)
    x = torch.from_numpy(golden["x"])
    pairs, cross = golden_pairs(golden, approximation)
    loss = "arccos" if "arccos" in name else "euclidean"
    parts = pair_diagonal(
        x, network[0].weight, network[0].bias, pairs, loss=loss, normalized="l2" in name, cross=cross, eps=1e-6
    )
    found = torch.cat([part.flatten() for part in parts]).numpy()
    short = SHORT[approximation]
    np.testing.assert_allclose(found, golden[f"brute_{short}_diag"], rtol=1e-9, atol=1e-9)
    if f"corrected_{short}" in golden:
        np.testing.assert_allclose(found, golden[f"corrected_{short}"], rtol=1e-9, atol=1e-9)
    elif loss == "euclidean" or approximation == "fixed":
        np.testing.assert_allclose(found, golden[f"ref_{short}"], rtol=1e-4, atol=1e-4)
    if loss == "arccos" and approximation != "fixed":  # the paper's code has the wrong sign there
        assert np.abs(found - golden[f"ref_{short}"]).max() > 0.1 * np.abs(found).max()


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("name", [*NETWORKS, *LINEAR])
def test_networks_match_golden(shared: Path, name: str, approximation: str) -> None:
    golden = np.load(shared / f"golden/lam/hess_{name}.npz")
    pairs, cross = golden_pairs(golden, approximation)
    loss = "arccos" if "arccos" in name else "euclidean"
    found = network_diagonal(golden_network(golden), torch.from_numpy(golden["x"]), pairs, loss=loss, cross=cross)
    flat = torch.cat([part.flatten() for part in found.values()]).numpy()
    np.testing.assert_allclose(flat, golden[f"brute_{SHORT[approximation]}_diag"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["contr_linear", "arccos_linear", "arccos_linear_wide", "arccos_linear_pairs4"])
def test_it_is_the_true_hessian_where_the_layer_is_linear(shared: Path, name: str) -> None:
    golden = np.load(shared / f"golden/lam/hess_{name}.npz")
    network, (pairs, cross) = golden_network(golden), golden_pairs(golden, "full")
    loss = "arccos" if "arccos" in name else "euclidean"
    x = torch.from_numpy(golden["x"])
    parts = pair_diagonal(x, network[0].weight, network[0].bias, pairs, loss=loss, normalized=False, cross=cross)
    found = torch.cat([part.flatten() for part in parts]).numpy()
    np.testing.assert_allclose(found, golden["brute_exact_hessian_diag"], rtol=1e-9, atol=1e-9)


def brute_force(
    x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor, loss: str, normalized: bool, cross: bool
) -> Tensor:
    """One pair after the other: both Jacobians and the loss's Hessian by autograd, matrices multiplied out."""
    flat = torch.cat([weight.flatten(), bias])

    def layer(theta: Tensor, x: Tensor) -> Tensor:
        z = theta[: weight.numel()].view_as(weight) @ x + theta[weight.numel() :]
        return z / z.norm() if normalized and loss == "euclidean" else z

    def pair_loss(both: Tensor) -> Tensor:
        z1, z2 = both
        if loss == "euclidean":
            return 0.5 * (z1 - z2).square().sum()
        return 1 - (z1 / z1.norm()) @ (z2 / z2.norm())

    total = torch.zeros_like(flat)
    d = len(bias)
    for a, b in zip(x1, x2, strict=True):
        j1, j2 = (torch.autograd.functional.jacobian(lambda t, x=x: layer(t, x), flat) for x in (a, b))
        h = torch.autograd.functional.hessian(pair_loss, torch.stack([layer(flat, a), layer(flat, b)]))
        h = h.reshape(2 * d, 2 * d)
        if not cross:
            h = torch.block_diag(h[:d, :d], h[d:, d:])
        j = torch.cat([j1, j2])
        total += (j.T @ h @ j).diagonal()
    return total


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize(("loss", "normalized"), [("euclidean", True), ("euclidean", False), ("arccos", True)])
def test_equals_brute_force(generator: torch.Generator, loss: str, normalized: bool, cross: bool) -> None:
    x1, x2 = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(4, 6, generator=generator, dtype=torch.float64), torch.randn(4).double()
    truth = brute_force(x1, x2, weight, bias, loss, normalized, cross)
    found = hessian_diagonal(x1, x2, weight, bias, loss=loss, normalized=normalized, cross=cross)
    torch.testing.assert_close(torch.cat([found[0].flatten(), found[1]]), truth, rtol=1e-10, atol=1e-10)
    single = hessian_diagonal(
        x1.float(), x2.float(), weight.float(), bias.float(), loss=loss, normalized=normalized, cross=cross
    )
    assert single[0].dtype == torch.float32
    torch.testing.assert_close(single[0].double(), found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["euclidean", "arccos"])
def test_chunks_change_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    x1, x2 = torch.randn(2, 50, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    whole = hessian_diagonal(x1, x2, weight, loss=loss)
    network = nn.Linear(6, 4, bias=False).double()
    network.weight.data.copy_(weight)
    pairs = Pairs(torch.arange(50), torch.arange(50, 100), torch.ones(50))
    monkeypatch.setattr(metric_curvature, "CHUNK_NUMBERS", 70)
    monkeypatch.setattr("posthoc.adapters.metric_network.CHUNK_NUMBERS", 700)
    torch.testing.assert_close(hessian_diagonal(x1, x2, weight, loss=loss), whole, rtol=1e-12, atol=1e-12)
    modules = nn.Sequential(network, *([Normaliser()] if loss == "euclidean" else []))
    split = network_diagonal(modules, torch.cat([x1, x2]), pairs, loss=loss)
    torch.testing.assert_close(split["0.weight"], whole[0], rtol=1e-9, atol=1e-9)


def test_relu_networks_are_the_brute_force_too(generator: torch.Generator) -> None:
    network = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3), Normaliser()).double()
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    pairs = Pairs(torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5]), torch.tensor([1.0, 2.0, -1.0]))
    found = torch.cat([p.flatten() for p in network_diagonal(network, x, pairs).values()])
    flat = nn.utils.parameters_to_vector(network.parameters()).detach()
    names = [(n, p.shape, p.numel()) for n, p in network.named_parameters()]

    def embed(theta: Tensor, row: Tensor) -> Tensor:
        parts = theta.split([size for *_, size in names])
        values = {n: part.view(s) for (n, s, _), part in zip(names, parts, strict=True)}
        return torch.func.functional_call(network, values, (row[None],))[0]

    j = [torch.autograd.functional.jacobian(lambda t, row=row: embed(t, row), flat) for row in x]
    truth = (j[0] - j[1]).square().sum(0) + 2 * (j[2] - j[3]).square().sum(0) - (j[4] - j[5]).square().sum(0)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


def test_no_pairs_have_no_curvature() -> None:
    empty, weight = torch.zeros(0, 5), torch.randn(3, 5)
    for loss in ("euclidean", "arccos"):
        found = hessian_diagonal(empty, empty, weight, torch.zeros(3), loss=loss)
        assert [tuple(part.shape) for part in found] == [(3, 5), (3,)]
        assert all((part == 0).all() for part in found)
        pairs, cross = signed_pairs(
            (torch.zeros(0, dtype=torch.int64),) * 2, (torch.zeros(0, dtype=torch.int64),) * 2, "full"
        )
        assert len(pairs) == 0
        of_network = network_diagonal(nn.Linear(5, 3), torch.randn(4, 5), pairs, loss=loss, cross=cross)
        assert of_network["weight"].shape == (3, 5)
        assert (of_network["weight"] == 0).all()


def test_equal_images_and_embeddings_of_length_zero_have_finite_curvature(generator: torch.Generator) -> None:
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    same = hessian_diagonal(x, x, weight)
    assert same[0].abs().max() < 1e-12  # both move alike
    zero = hessian_diagonal(torch.zeros_like(x), x, weight)
    alone = hessian_diagonal(x, torch.zeros_like(x), weight, cross=False)
    torch.testing.assert_close(zero, alone, rtol=1e-12, atol=1e-12)
    assert zero[0].abs().max() > 0


def test_repeated_pairs_count_as_often_as_they_are_listed(generator: torch.Generator) -> None:
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    a, p, n = torch.tensor([0, 0, 1, 0]), torch.tensor([1, 1, 0, 2]), torch.tensor([3, 4, 3, 4])
    for approximation in APPROXIMATIONS:
        pairs, cross = signed_pairs((a, p), (a, n), approximation)
        found = pair_diagonal(x, weight, None, pairs, cross=cross)[0]
        truth = hessian_diagonal(x[a], x[p], weight, cross=cross)[0]
        if approximation != "positives":
            truth = truth - hessian_diagonal(x[a], x[n], weight, cross=cross)[0]
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    assert len(signed_pairs((a, p), (a, n), "positives")[0]) == 2


@pytest.mark.parametrize("miner", ["all", "semihard", "hard", "easy", "none"])
def test_counts_are_those_of_the_listed_triplets(generator: torch.Generator, miner: str) -> None:
    z = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    positive, negative = label_masks(torch.randint(4, (20,), generator=generator))
    counts = mine_counts(z, positive, negative, 0.5, miner)
    anchors = mine_triplets(z, positive, negative, 0.5, miner)[0]
    listed = mine_counts(z, positive, negative, 0.5, miner, max_triplets=10**6)
    assert counts.positive.sum() == len(anchors) > 0
    torch.testing.assert_close(counts.positive, listed.positive)
    torch.testing.assert_close(counts.negative, listed.negative)
    some = mine_counts(z, positive, negative, 0.5, miner, max_triplets=10, generator=generator)
    assert some.positive.sum() == some.negative.sum() == 10
    assert (some.positive <= counts.positive).all()
    means = counts.mean_per_anchor()
    has = counts.per_anchor > 0
    torch.testing.assert_close(means.positive.sum(1), has.double())
    torch.testing.assert_close(means.negative.sum(1), has.double())


@pytest.mark.parametrize("miner", ["all", "semihard", "hard", "easy", "none"])
def test_drawn_triplets_are_some_of_the_listed_ones_each_as_often(generator: torch.Generator, miner: str) -> None:
    z = torch.randn(9, 3, generator=generator)
    z[4] = z[2]  # equal distances
    positive, negative = label_masks(torch.arange(9) % 3)
    listed = torch.stack(mine_triplets(z, positive, negative, 0.3, miner))
    count = listed.shape[1]
    for limit in (count, count + 5):
        found, total = draw_triplets(z, positive, negative, 0.3, miner, limit)
        assert total == count
        assert torch.equal(found, listed), "all of them, in their order"
    place = {tuple(one): i for i, one in enumerate(listed.T.tolist())}
    times, limit = np.zeros(count), count // 3
    for _ in range(600):
        found, total = draw_triplets(z, positive, negative, 0.3, miner, limit, generator)
        rows = [place[tuple(one)] for one in found.T.tolist()]
        assert rows == sorted(set(rows))
        assert (len(rows), total) == (limit, count)
        times[rows] += 1
    share = limit / count
    apart = (times - 600 * share) / (600 * share * (1 - share)) ** 0.5
    assert (apart**2).mean() == pytest.approx(1.0, abs=0.6)
    assert np.abs(apart).max() < 4.5
    one, other = (
        draw_triplets(z, positive, negative, 0.3, miner, 5, torch.Generator().manual_seed(3))[0] for _ in "ab"
    )
    assert torch.equal(one, other), "the generator decides"


def test_of_no_triplets_none_is_drawn() -> None:
    positive, negative = label_masks(torch.arange(4))
    found, total = draw_triplets(torch.randn(4, 2), positive, negative, 0.3, "all", 5)
    assert (found.shape, total) == ((3, 0), 0)


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    with pytest.raises(OptionError, match=r"x1, x2 \[P, d_in\].*\(4, 5\), \(3, 5\)"):
        hessian_diagonal(x, x[:3], weight)
    with pytest.raises(OptionError, match=r"given \(8, 5\), \(3, 4\)|given \(4, 5\), \(3, 4\)"):
        hessian_diagonal(x, x, weight[:, :4])
    with pytest.raises(OptionError, match=r"\(4,\)"):
        hessian_diagonal(x, x, weight, torch.zeros(4))
    with pytest.raises(OptionError, match=r"torch\.float64"):
        hessian_diagonal(x.double(), x.double(), weight)
    with pytest.raises(OptionError, match="did you mean 'arccos'"):
        hessian_diagonal(x, x, weight, loss="arcos")
    with pytest.raises(OptionError, match="did you mean 'fixed'"):
        signed_pairs((torch.tensor([0]),) * 2, (torch.tensor([0]),) * 2, "fix")
