"""Parts of the recipe `lam` against brute force and golden numbers: losses, states, networks, answers, figures."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributions import Normal
from torch.nn import functional

from posthoc.adapters.distributed import Launch
from posthoc.adapters.embedding_baselines import Deterministic
from posthoc.adapters.losses import ContrastiveMetric, HedgedGaussian
from posthoc.adapters.metric_curvature import pair_diagonal, signed_pairs
from posthoc.adapters.metric_laplace import MetricPosterior
from posthoc.adapters.metric_predictive import MetricEmbedding, summarise
from posthoc.adapters.metric_training import MetricObjective
from posthoc.adapters.mining import mine_triplets
from posthoc.adapters.positives import label_masks
from posthoc.adapters.training_loop import step_generator
from posthoc.eval.retrieval_statistics import lam_aupr
from posthoc.recipes import lam, lam_methods
from posthoc.recipes.lam import LamConfig
from posthoc.recipes.lam_data import Part, Sets
from posthoc.recipes.lam_methods import (
    DropoutHead,
    EnsembleHead,
    Group,
    Head,
    Inputs,
    PosteriorHead,
    answer,
    noise_precision,
)
from posthoc.recipes.lam_networks import EmbeddingNetwork, GeneralisedMean, make_network
from posthoc.recipes.lam_report import found_images, judge, table
from posthoc.recipes.lam_training import TRIPLETS, Batches, FaceObjective, HedgedObjective, Step, Watch, train
from posthoc.recipes.masked_dropout import dropouts
from posthoc.recipes.running import seeded
from posthoc.recipes.view_batches import Images

from .test_lam import SIZE

# losses and states of a training


def labelled(rows: int = 48, features: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    label = torch.arange(rows) % classes
    return torch.randn(classes, features, generator=rng)[label] + torch.randn(rows, features, generator=rng), label


def test_an_online_step_remembers_the_curvature_at_the_drawn_weights() -> None:
    x, label = labelled()
    layer = nn.Linear(6, 3)
    posterior = MetricPosterior(6, 3, approximation="fixed", margin=0.5)
    posterior.take(layer.weight, layer.bias, 2.0)
    objective = MetricObjective(layer, ContrastiveMetric(0.5), posterior, memory=0.9, rows=480, precision=3.0)
    loss = objective.of_inputs(x, label, step_generator(5))
    noise = torch.randn(21, generator=step_generator(5), dtype=torch.float64).float() / 5.0**0.5
    weight, bias = layer.weight + noise[:18].view(3, 6), layer.bias + noise[18:]
    assert float(loss.detach()) == pytest.approx(
        float(ContrastiveMetric(0.5)(functional.linear(x, weight, bias), label).detach())
    )
    found = posterior.batch_curvature(x, label, weight.detach(), bias.detach())
    expected = 0.9 * 2.0 + (480 / 48 * 0.1 * found[0]).clamp(min=0)
    torch.testing.assert_close(posterior.curvature_weight.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert layer.weight.grad is not None


def test_reference_has_the_sign_of_the_papers_code(shared: Path) -> None:
    golden = np.load(shared / "golden/lam/hess_arccos_linear.npz")
    weight, bias = (torch.from_numpy(golden["theta"])[part] for part in (slice(0, 20), slice(20, 24)))
    x = torch.from_numpy(golden["x"])
    index = {name: torch.from_numpy(golden[f"idx_{name}"]) for name in "apn"}
    for short, approximation in (("pos", "positives"), ("full", "full"), ("fix", "fixed")):
        pairs, cross = signed_pairs((index["a"], index["p"]), (index["a"], index["n"]), approximation)
        parts = pair_diagonal(x, weight.view(4, 5), bias, pairs, loss="arccos", cross=cross, reference=True)
        np.testing.assert_allclose(
            torch.cat([part.flatten() for part in parts]), golden[f"ref_{short}"], rtol=1e-9, atol=1e-9
        )
    posteriors = [MetricPosterior(5, 4, loss="arccos", reference=one) for one in (True, False)]
    label = torch.arange(9) % 3
    values = [one.double().batch_curvature(x, label, weight.view(4, 5), bias)[0] for one in posteriors]
    assert not torch.allclose(*values)


def test_hib_is_its_loss_of_the_mined_triplets() -> None:
    config = LamConfig(margin=0.5, miner="semihard", kl_weight=1e-3)
    x, label = labelled(rows=16)
    objective = HedgedObjective(gaussian_of(x), config)
    found = objective.of_inputs(x, label, step_generator(1))
    mean, log_variance = objective.gaussian.posterior(x)
    a, p, n = mine_triplets(mean.detach(), *label_masks(label), 0.5, "semihard")
    assert 0 < len(a) < TRIPLETS
    parts = [Normal(mean[i], (0.5 * log_variance[i]).exp()) for i in (a, p)]
    far = Normal(mean[n][:, None], (0.5 * log_variance[n]).exp()[:, None])
    loss = HedgedGaussian(kl_weight=1e-3, squared=True, normalized=True, reading="mean-log")
    expected = loss(*parts, far, generator=step_generator(1))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_reference_hib_has_the_papers_scale_and_the_divergence_of_all_triplets() -> None:
    """spec/lam.md sections 9 and 11.5: a sum over all mined triplets, of which 512 are drawn."""
    config = LamConfig(kl_weight=1e-4, reference=True)
    x, label = labelled(rows=32)
    objective = HedgedObjective(gaussian_of(x), config)
    assert float(torch.as_tensor(objective.loss.scale).detach()) == pytest.approx(
        float(functional.softplus(torch.tensor(1.0)))
    )
    with torch.no_grad():
        mean, log_variance = objective.gaussian.posterior(x)
        std = (0.5 * log_variance).exp()
        a, p, _ = mine_triplets(mean, *label_masks(label), config.margin)
        assert len(a) > 4 * TRIPLETS
        each = -0.5 * ((std + 1e-6).log() + (1 + mean**2) / (std**2 + 1e-6)).sum(1)
        whole = float(each[a].sum() + each[p].sum())
        found = []
        for seed in range(30):
            loss = float(objective.of_inputs(x, label, step_generator(seed)))
            objective.kl_weight = 0.0  # the same draw without its divergence
            found.append((loss - float(objective.of_inputs(x, label, step_generator(seed)))) / 1e-4)
            objective.kl_weight = 1e-4
    error = np.std(found, ddof=1) / 30**0.5
    assert error < 0.02 * abs(whole)
    assert np.mean(found) == pytest.approx(whole, abs=4 * error)


def test_pfe_is_the_mean_over_positive_pairs() -> None:
    x, label = labelled(rows=12)
    objective = FaceObjective(gaussian_of(x))
    with torch.no_grad():
        mean, log_variance = objective.gaussian.posterior(x)
        terms = []
        for i in range(12):
            for j in range(i):
                if label[i] == label[j]:
                    v = log_variance[i].exp() + log_variance[j].exp()
                    terms.append(((mean[i] - mean[j]) ** 2 / v + v.log()).mean())
        assert float(objective.of_inputs(x, label, step_generator(0))) == pytest.approx(
            float(torch.stack(terms).mean()), rel=1e-5
        )


@pytest.mark.parametrize("kind", ["hib", "pfe"])
def test_a_batch_with_nothing_to_compare_can_be_gone_back_through(kind: str) -> None:
    x, label = labelled(rows=4)
    objective: Any = HedgedObjective(gaussian_of(x), LamConfig()) if kind == "hib" else FaceObjective(gaussian_of(x))
    loss = objective.of_inputs(x, label, step_generator(0))
    loss.backward()
    assert float(loss.detach()) == 0.0


def pictures_of(pixels: np.ndarray, target: np.ndarray) -> Images:
    return Images(torch.from_numpy(pixels), target)


def gaussian_of(x: torch.Tensor) -> Any:
    from posthoc.adapters.embedding_baselines import GaussianEmbedding

    gaussian = GaussianEmbedding(samples=4)
    with seeded(0):
        gaussian.network = nn.Linear(x.shape[1], 3)
    gaussian.start(x.shape[1], 3, 0)
    with torch.no_grad():
        gaussian.variance[-1].weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return gaussian


def test_small_images_lie_on_the_device_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8), np.uint8)
    part = Part(Images(torch.from_numpy(pixels), np.arange(7)), np.arange(7) > 2)
    np.testing.assert_array_equal(part.pictures.fingerprint(), pixels)
    plain = part.pictures.plain(np.arange(3))
    np.testing.assert_allclose(plain, pixels[:3] / 255, rtol=1e-6)
    there = Sets(part, part, part, {"other": part.pictures}).to(torch.device("meta"))
    for one in (*there.parts, Part(there.ood["other"])):
        pictures: Any = one.pictures
        assert (pictures.pixels.device.type, pictures.pixels.dtype) == ("meta", torch.uint8)
        made = one.some(4).pictures.plain(np.arange(3))
        assert (made.device.type, made.dtype, made.shape) == ("meta", plain.dtype, plain.shape)
    assert there.test.some(3).target.tolist() == [0, 3, 6]
    assert there.test.some(3).query is not None


def test_batches_are_made_while_the_network_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, in their order, and each of them once."""
    part = Part(pictures_of(np.zeros((32, *SIZE), np.uint8), np.arange(32) % 4))
    config: Any = LamConfig(batch_size=16, epochs=2)
    network = network_of()
    batches, made = Batches(part, network, config, Launch(0, 1), 0), []
    call = Batches.__call__

    def watched(self: Batches, step: int) -> Any:
        made.append((step, threading.current_thread() is threading.main_thread()))
        return call(self, step)

    monkeypatch.setattr(Batches, "__call__", watched)
    step = Step(network, MetricObjective(network.head, ContrastiveMetric(0.7)), gather=True)
    run: Any = SimpleNamespace(folder=None, signature="", observe=lambda *_: None)
    train(run, "alone", step, batches, Watch(network, part, torch.device("cpu")), config)
    assert made == [(step, False) for step in range(5)], "one more than is trained on: it was not known to be the last"


def test_the_blocks_of_a_batch_are_those_of_any_process() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, *SIZE), np.uint8)
    part = Part(pictures_of(pixels, np.arange(100) % 5))
    config, network = LamConfig(batch_size=64), network_of(0.4)
    whole = Batches(part, network, config, Launch(0, 1), 0)(4)
    halves = [Batches(part, network, config, Launch(rank, 2), 0)(4) for rank in (0, 1)]
    assert torch.equal(torch.cat([half[0] for half in halves]), whole[0])
    assert all(torch.equal(half[1], whole[1]) for half in halves), "the targets are all processes'"
    alone = LamConfig(batch_size=64, gather=False)
    apart = [Batches(part, network, alone, Launch(rank, 2), 0)(4) for rank in (0, 1)]
    assert torch.equal(torch.cat([half[1] for half in apart]), whole[1])
    assert whole[2] is not None
    assert whole[2].shape == (64, 32 + 64 + 64)
    assert torch.equal(torch.cat([half[2] for half in halves if half[2] is not None]), whole[2])
    assert len({tuple(row.tolist()) for row in whole[2]}) == 64, "a mask for each image"
    assert Batches(part, network_of(), config, Launch(0, 1), 0)(4)[2] is None, "nothing is dropped"


# networks and answers


def network_of(rate: float = 0.0) -> EmbeddingNetwork:
    with seeded(0):
        return make_network("pooled", SIZE, 5, rate=rate)


def images(count: int = 6) -> torch.Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "size", "features"), [("pooled", SIZE, 576), ("pooled", (3, 32, 32), 1024), ("wide", SIZE, 9216)]
)
def test_the_papers_networks(name: str, size: tuple[int, int, int], features: int) -> None:
    """spec/lam.md section 7: sizes of the last layer's inputs."""
    network = make_network(name, size, 3)
    assert network.head.in_features == features
    assert network(torch.rand(2, *size)).shape == (2, 3)


def test_dropout_has_one_mask_for_all_images_of_a_draw() -> None:
    network = network_of(0.5)
    head = DropoutHead(network, 3, seed=0)
    with torch.no_grad():
        both, alone = head(images()), head(images()[2:3])
        assert both.samples is not None
        assert alone.samples is not None
        torch.testing.assert_close(both.samples[:, 2], alone.samples[:, 0])
        assert not torch.allclose(both.samples[0], both.samples[1])
        assert all(layer.kept is None for layer in dropouts(network))


def point_of(network: nn.Module) -> Head:
    point = Deterministic()
    point.network = network
    return point.embed


@pytest.mark.parametrize("places", [False, True])
def test_the_draws_of_one_method_are_kept_at_a_time(monkeypatch: pytest.MonkeyPatch, places: bool) -> None:
    """And none where nothing can vote; all images get the answers of one pass."""
    monkeypatch.setattr(lam_methods, "ROWS", 16)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, *SIZE), np.uint8)
    pictures = pictures_of(pixels, rng.uniform(0, 200, (40, 2)) if places else np.arange(40) % 10)
    test = Part(pictures, np.arange(40) % 3 == 0 if places else None)
    networks = [network_of(0.5), network_of(0.5)]
    heads = {str(seed): DropoutHead(networks[0], 3, seed) for seed in (1, 2)}
    groups = [Group(nn.Identity(), {"deterministic": point_of(networks[0]), **heads})]
    groups.append(Group(networks[1].trunk, {"alone": point_of(networks[1].head)}))
    alive: list[weakref.ref[torch.Tensor]] = []

    def watched(own: MetricEmbedding, *rest: Any) -> Any:
        assert not any(draws() is not None for draws in alive)
        assert (own.samples is None) == places
        if own.samples is not None:
            alive.append(weakref.ref(own.samples))
        return judge(own, *rest)

    monkeypatch.setattr(lam, "judge", watched)
    stub: Any = SimpleNamespace(
        config=SimpleNamespace(methods=("2", "alone", "1"), reference=False), device=torch.device("cpu"),
        sets=SimpleNamespace(test=test, ood={"other": pictures.first(30)}), groups=lambda: groups,
    )  # fmt: skip
    found = lam.judge_all(stub)
    assert list(found) == ["deterministic", "2", "alone", "1"]
    assert len(alive) == (0 if places else 4)
    whole = heads["2"](pictures.plain(np.arange(40)))
    apart = answer(heads["2"], Inputs(groups[0], pictures, torch.device("cpu")), with_samples=True)
    assert whole.samples is not None
    torch.testing.assert_close(apart.samples, whole.samples.detach())
    torch.testing.assert_close(apart.uncertainty, whole.uncertainty.detach())


def test_members_are_turned_onto_the_first() -> None:
    network, turned = network_of(), network_of()
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0))).Q
    with torch.no_grad():
        turned.head.weight.copy_(rotation @ network.head.weight)
        turned.head.bias.copy_(rotation @ network.head.bias)
        training = images(40)
        one = EnsembleHead([network, turned], training, align=True)(images())
        other = EnsembleHead([network, turned], training, align=False)(images())
    assert float(one.uncertainty.max()) < 1e-5
    assert float(other.uncertainty.min()) > 1e-3
    torch.testing.assert_close(
        one.mean_direction, functional.normalize(network(images()), dim=-1).detach(), atol=1e-4, rtol=0
    )


def test_the_noise_of_an_online_start_is_a_tenth() -> None:
    network, x = network_of(), torch.rand(200, 576, generator=torch.Generator().manual_seed(0))
    precision = noise_precision(network, x)
    posterior = MetricPosterior(576, 5, prior_precision=precision)
    posterior.take(network.head.weight, network.head.bias)
    with torch.no_grad():
        share = posterior.gaussian(x)[1].sum(-1) / network.head(x).square().sum(-1)
    assert float(share.median()) == pytest.approx(0.1, rel=0.01)


def test_a_posterior_answers_in_closed_form_or_as_the_paper() -> None:
    x, label = labelled(rows=200)
    posterior = MetricPosterior(6, 4, prior_precision=30.0)
    with seeded(0):
        layer = nn.Linear(6, 4)
    posterior.take(layer.weight, layer.bias)
    posterior.fit(x, label)
    noise = posterior.noise(400, torch.Generator().manual_seed(0))
    ours, theirs = (PosteriorHead(posterior, noise, reference)(x) for reference in (False, True))
    assert ours.samples is not None
    torch.testing.assert_close(ours.uncertainty, summarise(ours.samples).uncertainty, atol=0.02, rtol=0.2)
    torch.testing.assert_close(theirs.spread, ours.samples.std(0))


def test_generalised_mean_is_the_mean_of_powers() -> None:
    maps = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = maps.double().pow(3).mean((2, 3)).pow(1 / 3)
    torch.testing.assert_close(GeneralisedMean()(maps).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_timm_trunk_keeps_its_statistics_and_trains_all_else(tmp_path: Path) -> None:
    with seeded(0):
        save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
        network = make_network("test_resnet", (3, 64, 64), 4, checkpoint=tmp_path / "weights.safetensors")
        fresh = make_network("test_resnet", (3, 64, 64), 4)
    kinds = {type(part) for part in fresh.modules()}
    assert nn.GroupNorm in kinds, "statistics of nothing are not kept"
    assert not any(issubclass(kind, nn.BatchNorm2d) for kind in kinds)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    step = Step(network, MetricObjective(network.head, ContrastiveMetric(0.7)), gather=True).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pictures = torch.rand(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    step(pictures, torch.arange(32) % 4, None, step_generator(2)).backward()
    assert all(p.grad is not None for p in network.parameters())
    optimizer.step()
    still = [name for name, value in network.state_dict().items() if torch.equal(value, before[name])]
    assert {name for name in before if "running" in name or "batches" in name} <= set(still)
    assert "trunk.pool.power" not in still


# figures


@pytest.mark.parametrize("name", ["retrieval_a", "retrieval_b"])
def test_figures_are_the_references(shared: Path, name: str) -> None:
    golden = np.load(shared / f"golden/lam/{name}.npz")
    z, label = torch.from_numpy(golden["z"]), golden["labels"]
    part = Part(pictures_of(np.zeros((len(z), *SIZE), np.uint8), label))
    zeros = torch.zeros(len(z))
    samples = torch.from_numpy(golden["z_samples"]).transpose(0, 1)
    score = np.random.default_rng(0).random(len(z))
    own, ood = MetricEmbedding(z, z, 0 * z, zeros, zeros, zeros, samples), {"x": score[:40] + 0.2}
    found = judge(own, part, ood, score, reference=True).row
    assert found["reference AUPR x"] == lam_aupr(score, ood["x"]) != found["AUPR x"]
    assert "reference AUPR x" not in judge(own, part, ood, score, reference=False).row
    for k, value in zip((5, 10, 20), golden["map_at_5_10_20"], strict=True):
        assert found[f"reference mAP@{k}"] == pytest.approx(value, abs=1e-9)
    for k, value in zip((1, 5, 10, 20), golden["recall_at_1_5_10_20"], strict=True):
        assert found[f"recall@{k}"] == pytest.approx(value, abs=1e-9)
    assert found["vote ECE"] == pytest.approx(float(golden["ece_last_bin_inclusive"]), abs=1e-6)
    assert found["reference vote ECE"] == pytest.approx(float(golden["ece_ref"]), abs=1e-6)


def test_places_are_found_within_25_metres_of_a_query() -> None:
    rng = np.random.default_rng(0)
    target, query = rng.uniform(0, 200, (60, 2)), np.arange(60) % 3 == 0
    z = functional.normalize(torch.from_numpy(rng.normal(size=(60, 4))), dim=1).numpy()
    found = found_images(z, Part(pictures_of(np.zeros((60, *SIZE), np.uint8), target), query))
    rows, places = np.flatnonzero(query), np.flatnonzero(~query)
    for i, row in enumerate(rows):
        near = np.linalg.norm(target[places] - target[row], axis=1) < 25
        order = np.argsort(-(z[places] @ z[row]))[: found.hits.shape[1]]
        np.testing.assert_array_equal(found.hits[i], near[order])
        assert found.positives[i] == near.sum()


def test_the_table_names_what_every_set_has() -> None:
    rows = {"a": {"mAP@5": 0.5, "AUROC x y": 0.75, "AUPR x y": 0.25}, "b": {"mAP@5": 1.0}}
    assert table(rows).splitlines()[2:] == ["| a | 0.500 | 0.750 | 0.250 |", "| b | 1.000 |  |  |"]
