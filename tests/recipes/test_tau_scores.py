"""The scores of the recipe tau by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from posthoc.adapters.losses.tau import temperature
from posthoc.recipes.pretraining import own_view_found
from posthoc.recipes.pretraining_evaluation import encode
from posthoc.recipes.pretraining_networks import PretrainingNetwork
from posthoc.recipes.tau import make_network, watched
from posthoc.recipes.tau_scores import own_scores, papers_neighbours, spread, uncertainties

from .tau_runs import small, some_images

CPU = torch.device("cpu")


def test_members_that_differ_by_a_rotation_agree(generator: torch.Generator) -> None:
    images, config = some_images(50), small(method="simclr")
    network = make_network(config, images)
    turned = copy.deepcopy(network)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    last: Any = turned.projection
    with torch.no_grad():
        last[-1].weight.copy_(turn @ last[-1].weight)
    both = [network, turned]
    known = [encode(one, images, CPU) for one in both]
    found = uncertainties(both, known, images, config, CPU)
    assert found["ensemble"].max() < 1e-5
    assert found["ensemble, not aligned, as released"].min() > 0.05


def test_classifiers_have_one_frame() -> None:
    images, config = some_images(40), small(method="supervised", members=2, hidden=512, dim=128)
    both = [make_network(config, images, number) for number in (0, 1)]
    known = [encode(one, images, CPU) for one in both]
    found = uncertainties(both, known, images, config, CPU)
    unit = [one.projection / np.linalg.norm(one.projection, axis=1, keepdims=True) for one in known]
    np.testing.assert_allclose(found["ensemble"], spread(unit), rtol=1e-5)
    assert "ensemble, not aligned, as released" not in found


def test_scores_by_hand() -> None:
    images, config = some_images(50), small()
    network = make_network(config, images)
    assert isinstance(network, PretrainingNetwork)
    known = encode(network, images, CPU)
    raw = torch.from_numpy(known.projection[:, 6])
    found = uncertainties([network], [known], images, config, CPU)
    np.testing.assert_allclose(found["tau"], 0.1 / torch.sigmoid(raw).numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["-r^2, as released"], -(raw.numpy() ** 2), rtol=1e-5)
    np.testing.assert_allclose(found["1/feature-norm"], 1 / np.linalg.norm(known.feature, axis=1), rtol=1e-5)
    unit = known.projection[:, :6] / np.linalg.norm(known.projection[:, :6], axis=1, keepdims=True)
    tenth = np.sort(1 - unit @ unit.T, 1)[:, 9]
    np.testing.assert_allclose(found["kNN"], tenth, atol=1e-5)
    apart = np.sort(np.linalg.norm(unit[:, None] - unit, axis=2), 1)
    np.testing.assert_allclose(
        papers_neighbours(known.projection[:, :6], unit, True), apart[:, 1:11].mean(1), atol=1e-3
    )
    np.testing.assert_allclose(papers_neighbours(3 * unit, unit, False), apart[:, :10].mean(1), atol=1e-3)
    np.testing.assert_allclose(spread([np.zeros((3, 2)), np.array([[0, 1], [2, 2], [0, 0]])]), [0.5**1.5, 2**0.5, 0])
    pair = (images.pixels / 255, images.pixels / 255)
    seen = watched(network.eval(), config, pair, images)
    own = torch.from_numpy(known.projection[:, :6])
    assert seen["own_view_found"] == own_view_found(own, own) > 0.5
    assert seen["tau_50"] == pytest.approx(float(temperature(raw, 0.1).quantile(0.5)), rel=1e-5)


def test_temperatures_that_come_near_t_still_rank() -> None:
    raw = torch.linspace(14, 30, 200)
    found = own_scores(torch.cat([torch.zeros(200, 6), raw[:, None]], 1).numpy(), small())
    assert (np.diff(found["tau"]) < 0).all()
    assert (temperature(raw, 0.1) == 0.1).any()  # as they do not in float32
