"""The CIFAR-10H recipe's networks and steps: what trains, the loss of a batch against that of its pairs, phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from posthoc.adapters.errors import PosthocError
from posthoc.adapters.positives import draw_negatives
from posthoc.adapters.training_loop import step_generator
from posthoc.adapters.vmf import VonMisesFisher
from posthoc.recipes.cifar10h import Cifar10HConfig
from posthoc.recipes.cifar10h_data import FeatureInputs
from posthoc.recipes.cifar10h_networks import PosteriorNetwork, cifar_backbone, trainable_copy
from posthoc.recipes.cifar10h_training import Answer, Step, answer, check_distinct, make_loss, rank_correlation
from posthoc.recipes.networks import CifarResNet
from posthoc.recipes.running import seeded


class Table(nn.Module):
    """Inputs that are posteriors already: the last column is log kappa."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.scale = nn.Identity(), nn.Parameter(torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> VonMisesFisher:
        return VonMisesFisher(inputs[:, :-1] * self.scale, inputs[:, -1].exp())


def _step(loss: str, pairs: str = "drawn", **options: Any) -> Step:
    config = Cifar10HConfig(loss=loss, pairs=pairs, batch_size=32, block=16, negatives=4, samples=16, **options)  # type: ignore[arg-type]
    rng = np.random.default_rng(2)
    table = rng.normal(size=(90, 6)).astype(np.float32)
    labels = rng.dirichlet(np.full(4, 0.3), 90).astype(np.float32)
    return Step(Table(), make_loss(config), FeatureInputs(table, table, table), labels, np.arange(90), config)  # type: ignore[arg-type]


def _posterior(step: Step, rows: torch.Tensor) -> VonMisesFisher:
    table = step.inputs.whole(np.arange(90))[rows]
    return VonMisesFisher(table[..., :-1], table[..., -1].exp())


@pytest.mark.parametrize(
    ("loss", "pairs", "directions_only"),
    [(loss, "drawn", only) for loss in ("mcinfonce", "elk", "hib") for only in (False, True)] + [("elk", "all", False)],
)
def test_a_batch_is_the_mean_of_its_blocks(loss: str, pairs: str, directions_only: bool) -> None:
    """So that the processes of a launch, each with blocks of its own, have one process's gradient in the mean."""
    step = _step(loss, pairs)
    rows, places = torch.arange(32).view(2, 16), [(0, 1), (0, 2)]
    whole = step(rows, places, directions_only)
    parts = [step(rows[i : i + 1], places[i : i + 1], directions_only) for i in range(2)]
    assert float(parts[0].detach()) != float(parts[1].detach())
    assert float(whole.detach()) == pytest.approx(float(sum(parts).detach()) / 2, rel=1e-5)


def test_a_block_of_all_pairs_has_the_probabilities_of_one_class() -> None:
    step = _step("elk", "all")
    rows = torch.arange(20, 36)
    together = torch.einsum("ic,jc->ij", step.labels[rows], step.labels[rows])
    expected = step.loss.all_pairs(_posterior(step, rows), together)  # type: ignore[union-attr,operator]
    assert float(step(rows[None], [(7,)], False).detach()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "pairs"), [("elk", "all"), ("elk", "drawn"), ("mcinfonce", "drawn"), ("hib", "drawn")]
)
def test_what_labels_say_and_what_is_drawn_is_of_full_precision(loss: str, pairs: str) -> None:
    """The network has nothing here that mixed precision rounds, so whatever changed would be drawn or of the labels."""
    step, rows = _step(loss, pairs), torch.arange(32).view(2, 16)
    plain = step(rows, [(0, 1), (0, 2)], False)
    with torch.autocast("cpu", torch.bfloat16):
        assert (step.labels @ step.labels.T).dtype == torch.bfloat16
        mixed = step(rows, [(0, 1), (0, 2)], False)
    assert torch.equal(mixed, plain)


def test_a_block_is_its_loss_with_drawn_pairs() -> None:
    step = _step("elk", symmetric=False)
    value = step(torch.arange(16)[None], [(7,)], False)
    generator = step_generator(7)
    batch = step.pairs.draw(torch.arange(16), generator)
    for _ in range(2):
        torch.rand(16, generator=generator)  # which images of either side are cropped
    columns, _ = draw_negatives(batch.negative, 4, generator)
    expected = step.loss(*(_posterior(step, side) for side in (batch.anchor, batch.positive, batch.positive[columns])))  # type: ignore[misc]
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_first_phase_moves_no_kappa() -> None:
    step = _step("mcinfonce")
    network = step.network
    kappas: list[torch.Tensor] = []
    network.register_forward_hook(lambda *call: kappas.append(call[2].concentration))
    step.inputs.features.requires_grad_(True)  # type: ignore[union-attr]
    loss = step(torch.arange(32).view(2, 16), [(0, 1), (0, 2)], True)
    (gradient,) = torch.autograd.grad(loss, step.inputs.features)  # type: ignore[union-attr]
    assert not gradient[:, -1].any()
    assert gradient[:, :-1].any()


def test_answers_are_of_the_rows_asked_for() -> None:
    step = _step("elk")
    found = answer(step.network, step.inputs, np.array([5, 3]))
    table = step.inputs.whole(np.array([5, 3])).numpy()
    np.testing.assert_allclose(found.kappa, np.exp(table[:, -1]), rtol=1e-6)
    np.testing.assert_allclose(
        found.embedding, table[:, :-1] / np.linalg.norm(table[:, :-1], axis=1)[:, None], rtol=1e-5
    )


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "vit_tiny_patch16_224", "convnext_atto"])
def test_four_families_take_small_images_and_learn_a_kappa(name: str) -> None:
    """A step of the norm and of the network's kappa moves every weight below the classifier, and kappa as it was told to."""
    backbone = cifar_backbone(name, scratch=True, seed=0)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in backbone.modules())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for parametrization in ("norm", "network"):
        with seeded(1):
            network = PosteriorNetwork(trainable_copy(backbone), backbone.embedding_dim, 8, parametrization, kappa=10.0)
        network.start(backbone(images).embedding)
        kappa = network(images).concentration
        if parametrization == "norm":
            assert float(kappa.detach().mean()) == pytest.approx(10.0, rel=1e-3)
        trained = [p for p in network.parameters() if p.requires_grad]
        kappa.log().mean().backward()
        idle = {name for name, p in network.named_parameters() if p.requires_grad and p.grad is None}
        assert idle <= {"projection.weight", "projection.bias"}, "the network's kappa does not depend on the projection"
        steepness = sum(float(p.grad.square().sum()) for p in trained if p.grad is not None)
        torch.optim.SGD(trained, lr=1e-3 / steepness).step()  # log kappa should fall by .001
        assert float(network(images).concentration.detach().log().mean()) < float(kappa.detach().log().mean())


def test_the_copy_trains_and_its_statistics_do_not(tmp_path: Path) -> None:
    save_file(CifarResNet(20).state_dict(), tmp_path / "weights.safetensors")
    backbone = cifar_backbone("resnet20", tmp_path / "weights.safetensors")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    network = PosteriorNetwork(trainable_copy(backbone), 64, 4, "norm", 16.0)
    network.start(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)))
    network.train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    network(torch.randn(4, 3, 32, 32)).concentration.sum().backward()
    optimizer.step()
    after = network.backbone.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) == ("running" in name or "num_batches" in name or "linear" in name), name
        assert torch.equal(backbone.state_dict()[name], value), "the backbone that is compared with stays as it is"


def test_the_start_is_at_the_principal_directions() -> None:
    rng = torch.Generator().manual_seed(0)
    features = 5 + torch.randn(500, 6, generator=rng) * torch.tensor([9.0, 0.1, 5.0, 0.1, 0.1, 0.1])
    network = PosteriorNetwork(nn.Identity(), 6, 2, "norm", kappa=16.0)
    network.start(features)
    weight = network.projection.weight.detach()
    assert weight[:, [0, 2]].abs().max() > 20 * weight[:, [1, 3, 4, 5]].abs().max()
    projected = network.projection(features).detach()
    assert projected.mean(0).abs().max() < 1e-4
    assert float(projected.norm(dim=1).mean()) == pytest.approx(16.0, rel=1e-5)


def test_a_kappa_at_its_bound_is_told() -> None:
    """It ranks nothing: 0 while it trains, one clear error when the fold is done."""
    direction = np.eye(4, dtype=np.float32)
    found = Answer(direction, np.full(4, 1 / 4.5e4), np.full(4, 4.5e4))
    with pytest.raises(PosthocError, match=r"fold 2: kappa, 4.5e\+04, is the same for all images.*--lr"):
        check_distinct(found, 2)
    check_distinct(Answer(direction, np.array([0.1, 0.1, 0.1, 0.11]), np.array([10.0, 10.0, 10.0, 9.0])), 2)
    with pytest.raises(PosthocError, match="the entropy is the same"):
        check_distinct(Answer(direction, np.zeros(4), logits=np.zeros((4, 10))), 0)
    assert rank_correlation(found.uncertainty, np.arange(4.0)) == 0.0
    assert rank_correlation(np.array([1.0, 2.0, 4.0, 8.0]), np.arange(4.0)) == pytest.approx(1.0)


def test_untrained_backbones_features_are_normalised_image_by_image() -> None:
    """Features that move as far as a training moves them leave kappa inside its bounds; standardised at the start they do not."""
    generator = torch.Generator().manual_seed(0)
    start = 1 + 0.02 * torch.randn(200, 32, generator=generator)
    later = 1 + 0.5 * torch.randn(200, 32, generator=generator)
    spread = {}
    for untrained in (False, True):
        with seeded(1):
            network = PosteriorNetwork(nn.Identity(), 32, 4, kappa=8.0, untrained=untrained)
        network.start(start)
        kappa = network(later).concentration.detach()
        at_bound = torch.isclose(kappa, torch.tensor(np.exp(network.high), dtype=torch.float32), rtol=1e-2)
        spread[untrained] = float(at_bound.float().mean())
    assert spread[False] > 0.5
    assert spread[True] == 0.0
