"""The methods of the recipe tau by hand: losses, queues, masks of dropout, what processes contrast."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import BackboneError
from posthoc.adapters.losses import HedgedGaussian, NTXent, TaU, TaUMoCo
from posthoc.adapters.training_loop import step_generator
from posthoc.recipes.augmentations import Augmentation
from posthoc.recipes.masked_dropout import MaskedDropout, draw_masks, dropouts, dropping
from posthoc.recipes.networks import StridedConvNet
from posthoc.recipes.small_image_networks import small_image_network
from posthoc.recipes.tau import make_network
from posthoc.recipes.tau_methods import (
    SAMPLES,
    Batches,
    Hedged,
    Queue,
    make_method,
    posterior,
    with_dropout,
)
from posthoc.recipes.view_batches import BLOCK, ViewBatches

from .tau_runs import small, some_images

CPU, ALONE = torch.device("cpu"), Launch(0, 1)


def test_the_losses_are_the_librarys(generator: torch.Generator) -> None:
    views = [torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2)]
    images = some_images(64)
    for options, loss in (
        ({"method": "tau"}, TaU(0.1)),
        ({"method": "tau", "reference": True}, TaU(0.1, reference=True)),
        ({"method": "tau", "include_positive": True, "temperature": 0.3}, TaU(0.3, include_positive=True)),
        ({"method": "simclr"}, NTXent(0.1)),
    ):
        config = small(**options)
        method = make_method(make_network(config, images), config)
        one, other = (method.network(view)[1] for view in views)
        if config.method == "tau":
            theirs = loss(one[:, :6], other[:, :6], one[:, 6], other[:, 6])
        else:
            theirs = loss(one, other)
        torch.testing.assert_close(method(*views, 0, None), theirs)
    config = small(method="hib")
    method = make_method(make_network(config, images), config)
    assert isinstance(method, Hedged)
    one, other = (posterior(method.network(view)[1]) for view in views)
    theirs = HedgedGaussian(0.5, 0.0, 4, 1e-4)(one, other, generator=step_generator(0, SAMPLES, 7, 0))
    torch.testing.assert_close(method(*views, 7, None), theirs)
    assert isinstance(one, Normal)
    assert (one.stddev[:, :1] == one.stddev).all()


def test_mocos_keys_come_from_a_network_that_trails(generator: torch.Generator) -> None:
    config = small(method="tau-moco", queue=80, momentum=0.75)
    method = make_method(make_network(config, some_images(64)), config)
    assert isinstance(method, Queue)
    first, second = (torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2))
    queue = method.moco.queue.clone()
    query, key = method.network(first)[1], method.network(second)[1][:, :6].detach()
    theirs = TaUMoCo(0.1)(query[:, :6], key, queue, query[:, 6])
    torch.testing.assert_close(method(first, second, 0, None), theirs)
    torch.testing.assert_close(method.moco.queue[:32], nn.functional.normalize(key, dim=1))
    assert torch.equal(method.moco.queue[32:], queue[32:])
    old = {name: value.clone() for name, value in method.network.state_dict().items()}
    with torch.no_grad():
        for parameter in method.network.parameters():
            parameter.add_(1.0)
    method(first, second, 1, None)
    for name, value in method.moco.encoder.state_dict().items():
        torch.testing.assert_close(value, old[name] + 0.25)  # a quarter of the way


def test_dropout_drops_whole_channels_by_masks() -> None:
    layers = nn.Sequential(MaskedDropout(0.25, 50), MaskedDropout(0.5, 50))
    x = torch.ones(2 * BLOCK, 50, 3, 3)
    assert torch.equal(layers(x), x)
    kept = draw_masks(layers, BLOCK, [torch.Generator().manual_seed(k) for k in (0, 1)])
    assert kept.shape == (2 * BLOCK, 100)
    with dropping(layers, kept):
        first = layers[0](x)
        both = layers(x)
    assert torch.equal(layers(x), x)
    assert first.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (first == first[:, :, :1, :1]).all()
    assert (first == 0).double().mean() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(both, x * (kept[:, :50] / 0.75 * kept[:, 50:] / 0.5)[..., None, None])
    assert (both == 0).double().mean() == pytest.approx(1 - 0.75 * 0.5, abs=0.03)
    assert torch.equal(draw_masks(layers, BLOCK, [torch.Generator().manual_seed(1)]), kept[BLOCK:])  # a block's own


def test_dropout_stands_behind_the_first_activation_of_each_block(generator: torch.Generator) -> None:
    network = StridedConvNet(3, 8)
    with_dropout(network, 0.5)
    assert [layer.channels for layer in dropouts(network)] == [8, 16, 32, 64]
    resnet = small_image_network("resnet18", 0)
    with_dropout(resnet, 0.5)
    assert [name for name, part in resnet.named_modules() if isinstance(part, MaskedDropout)] == [
        f"layer{stage}.{block}.act1.1" for stage in (1, 2, 3, 4) for block in (0, 1)
    ]
    x = torch.rand(3, 3, 8, 8, generator=generator)
    whole = torch.ones(3, 2 * (64 + 128 + 256 + 512), dtype=torch.bool)
    for part in resnet.modules():
        if isinstance(part, nn.BatchNorm2d):  # timm's blocks begin as the identity
            nn.init.ones_(part.weight)
    with dropping(resnet.eval(), whole):
        nothing_dropped = resnet(x)  # the masks fit the channels of every layer
    assert nothing_dropped.shape == (3, 512)
    assert not torch.allclose(nothing_dropped, resnet(x))  # what stays counts twice
    with pytest.raises(BackboneError, match="no blocks of timm's ResNets"):
        with_dropout(nn.Sequential(nn.Linear(2, 2)), 0.5)


def test_a_queue_drops_other_channels_of_each_view(generator: torch.Generator) -> None:
    config = small(method="moco", queue=80, dropout=0.5)
    method = make_method(make_network(config, some_images(64)), config)
    first, second = (torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2))
    kept = draw_masks(method.network, 64, [generator])
    with dropping(method.network, kept[:32]):
        query = method.network(first)[1]
    with dropping(method.network, kept[32:]):
        key = method.network(second)[1].detach()
    assert isinstance(method, Queue)
    flat = torch.full((32,), torch.inf)
    theirs = TaUMoCo(0.1)(query, key, method.moco.queue.clone(), flat)
    torch.testing.assert_close(method(first, second, 0, kept), theirs)


def test_rows_are_gathered_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr("posthoc.recipes.tau_methods.gather_rows", lambda rows: (seen.append(rows.dtype), rows)[1])
    config = small(method="simclr")
    method = make_method(make_network(config, some_images(64)), config)
    with torch.autocast("cpu", torch.bfloat16):
        assert method.network(torch.rand(2, 3, 8, 8))[1].dtype == torch.bfloat16
        method(torch.rand(32, 3, 8, 8), torch.rand(32, 3, 8, 8), 0, None)
    assert seen == [torch.float32]


def test_processes_contrast_their_own_images_only_where_it_is_asked_for(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = [torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2)]

    def twice(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, rows + 0.1])

    monkeypatch.setattr("posthoc.recipes.tau_methods.gather_rows", twice)
    for gather in (True, False):
        config = small(method="simclr", gather=gather)
        method = make_method(make_network(config, some_images(64)), config)
        both = torch.stack([method.network(view)[1] for view in views], 1)
        rows = twice(both) if gather else both
        torch.testing.assert_close(method(*views, 0, None), NTXent(0.1)(rows[:, 0], rows[:, 1]))


def test_processes_that_contrast_their_own_images_draw_their_own_samples(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = [torch.rand(32, 3, 8, 8, generator=generator) for _ in range(2)]
    monkeypatch.setattr("posthoc.recipes.tau_methods.gather_rows", lambda rows: rows)
    for gather in (True, False):
        config, losses = small(method="hib", gather=gather), []
        for rank in (0, 1):
            monkeypatch.setattr("posthoc.recipes.tau_methods.check_launch", lambda rank=rank: Launch(rank, 2))
            losses.append(make_method(make_network(config, some_images(64)), config)(*views, 0, None).item())
        assert (losses[0] == losses[1]) == gather


def test_batches_hold_what_a_method_takes() -> None:
    images = some_images(70)
    network = nn.Sequential(MaskedDropout(0.5, 3), MaskedDropout(0.5, 4))
    views = ViewBatches(images, Augmentation(), BLOCK, 0, ALONE, CPU, 1)
    (view, label, kept) = Batches(views, images, True, network)(0)
    assert view.shape == (BLOCK, 3, 8, 8)
    assert label.tolist() == (views.rows(0) % 5).tolist()
    assert kept.shape == (BLOCK, 7)
    whole, *shares = (
        ViewBatches(images, Augmentation(), 2 * BLOCK, 0, launch, CPU) for launch in (ALONE, Launch(0, 2), Launch(1, 2))
    )
    (step, kept), *others = (Batches(one, images, False, network)(3)[2:] for one in (whole, *shares))
    assert step == 3
    assert kept.shape == (4 * BLOCK, 7)
    for view in (0, 1):  # two processes' masks are one's
        together = torch.cat([other[view * BLOCK : (view + 1) * BLOCK] for _, other in others])
        assert torch.equal(together, kept[2 * BLOCK * view : 2 * BLOCK * (view + 1)])
    assert not torch.equal(kept[: 2 * BLOCK], kept[2 * BLOCK :])
    assert Batches(whole, images, False, nn.Sequential(MaskedDropout(0.0, 3)))(3)[2:] == (3, None)
