"""Live detectors on small real networks: their formulas, stored twins of ReAct and ASH, a backbone that stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from pytorch_ood import detector
from scipy.special import logsumexp

from posthoc import PosthocError
from posthoc.adapters.backbone import build_backbone
from posthoc.eval.detectors import Training, fit_detectors
from posthoc.eval.live_detectors import live_scores

CLASSES = 4


@pytest.fixture(scope="module", params=["resnet10t", "test_vit"])
def network(request, tmp_path_factory):
    """A backbone of random weights, its features of 40 training and 12 test images, and a store for them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = timm.create_model(request.param, num_classes=CLASSES).eval()
    backbone = build_backbone(module)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (52, 64, 64, 3)).astype(np.uint8)
    store = tmp_path_factory.mktemp("store")
    label = np.arange(40) % CLASSES
    options = {"cache_dir": store, "progress": False}
    train = backbone.extract((images[:40], label), **options)
    return request.param, backbone, train, backbone.extract(images[40:], **options), images


def training(backbone, train):
    layer = backbone.classifier()
    return Training(train.penultimate, train.label, layer.weight.detach().numpy(), layer.bias.detach().numpy())


def run(network, *names):
    _, backbone, train, test, _ = network
    (scores,), left_out = live_scores(backbone, [test], names, training(backbone, train), batch_size=5, progress=False)
    return scores, left_out


def test_the_backbone_stays_as_it_is_bit_for_bit(network):
    _, backbone, *_ = network
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}
    scores, left_out = run(network, "odin", "mahalanobis-odin", "rankfeat")
    assert {"ODIN", "Mahalanobis, ODIN"} <= set(scores)
    assert ("RankFeat" in scores) == (network[0] == "resnet10t")
    assert ("RankFeat" in left_out) == (network[0] == "test_vit")
    assert all(torch.equal(value, before[name]) for name, value in backbone.module.state_dict().items())
    assert all(one.grad is None and not one.requires_grad for one in backbone.parameters())
    assert not backbone.module.training
    assert all(values.dtype == np.float32 and values.shape == (12,) for values in scores.values())


def test_odin_is_its_formula(network):
    _, backbone, _, _, images = network
    found = run(network, "odin")[0]["ODIN"]
    x = backbone.prepare(images[40:]).requires_grad_()
    log_p = (backbone.module(x) / 1000).log_softmax(1).max(1).values
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    std = torch.tensor(backbone.preprocessing["std"]).view(1, 3, 1, 1)
    moved = x.detach() + 0.0014 * gradient.sign() / std
    wanted = -(backbone.module(moved) / 1000).softmax(1).max(1).values
    assert found == pytest.approx(wanted.detach().numpy(), abs=1e-6)


def test_mahalanobis_odin_is_the_distance_after_a_step(network):
    name, backbone, train, _, images = network
    found = run(network, "mahalanobis-odin")[0]["Mahalanobis, ODIN"]
    made = detector.Mahalanobis(None).fit_features(
        torch.from_numpy(np.array(train.penultimate)), torch.from_numpy(np.array(train.label))
    )
    x = backbone.prepare(images[40:]).requires_grad_()
    distance = made._calc_gaussian_scores(z := backbone(x).penultimate).argmax(1)
    gap = z - made.mu[distance]
    (gradient,) = torch.autograd.grad((0.5 * (gap @ made.precision * gap).sum(1)).sum(), x)
    moved = x.detach() - 0.002 * gradient.sign() / torch.tensor(backbone.preprocessing["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        wanted = made.predict_features(backbone(moved).penultimate).numpy()
    assert np.corrcoef(found, wanted)[0, 1] > 0.999
    # a random network's covariance of 40 rows is singular up to pytorch-ood's ridge: rounding is magnified
    assert found == pytest.approx(wanted, rel=0.1 if name == "resnet10t" else 0.05)


def test_rankfeat_is_its_formula(network):
    name, backbone, _, _, images = network
    if name != "resnet10t":
        assert "maps" in run(network, "rankfeat")[1]["RankFeat"]
        return
    with torch.no_grad():
        maps = backbone.module.forward_features(backbone.prepare(images[40:]))
        u, s, v = np.linalg.svd(maps.flatten(2).double().numpy(), full_matrices=False)
        rest = maps.flatten(2).numpy() - s[:, :1, None] * u[:, :, :1] @ v[:, :1]
        logits = backbone.module.fc(torch.from_numpy(rest.mean(2)).float()).numpy()
    assert run(network, "rankfeat")[0]["RankFeat"] == pytest.approx(-logsumexp(logits, axis=1), abs=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of pytorch-ood's vmap over attention
def test_react_ash_and_gradnorm_from_the_store_equal_the_live_network(network):
    name, backbone, train, test, images = network
    stored = fit_detectors(training(backbone, train)).scores(test.penultimate)
    x = backbone.prepare(images[40:])
    before = lambda images: backbone(images).penultimate[..., None, None]  # noqa: E731
    head = lambda maps: backbone.classifier()(maps.flatten(1))  # noqa: E731
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(backbone.prepare(images[:40]), torch.from_numpy(np.array(train.label))), 20
    )
    with torch.no_grad():
        react = detector.ReAct(before, head).fit(loader)
        vra = detector.VRA(before, head).fit(loader)
        live = {"ReAct": react.predict(x), "VRA": vra.predict(x)}
        if name == "resnet10t":  # activations after ReLU: never negative
            live |= {
                "ASH-S": detector.ASH(before, head, "ash-s").predict(x),
                "ASH-B": detector.ASH(before, head, "ash-b").predict(x),
                "SCALE": detector.SCALE(before, head).predict(x),
            }
    layer = backbone.structure.linear_name
    live["GradNorm"] = detector.GradNorm(backbone.module, lambda one: one == f"{layer}.weight", 6).predict(x)
    for key, values in live.items():
        assert stored[key] == pytest.approx(values.numpy(), rel=1e-4, abs=1e-5), key


def test_what_cannot_be_run_is_refused_or_left_out(network):
    _, backbone, _, test, _ = network
    with pytest.raises(PosthocError, match="needs no --live"):
        live_scores(backbone, [test], ["react"])
    with pytest.raises(PosthocError, match="odin"):
        live_scores(backbone, [test], ["odim"])
    with pytest.raises(PosthocError, match="give images"):
        live_scores(backbone, [type(test).load(test.folder)], ["odin"])
    _, left_out = live_scores(backbone, [test[:2]], ["mahalanobis-odin"], progress=False)
    assert "--train" in left_out["Mahalanobis, ODIN"]


def test_rows_of_a_part_are_scored_in_their_order(network):
    _, backbone, _, test, _ = network
    whole = run(network, "odin")[0]["ODIN"]
    rows = np.array([7, 2, 9])
    ((part,), _) = live_scores(backbone, [test[rows]], ["odin"], progress=False)
    assert part["ODIN"] == pytest.approx(whole[rows], abs=1e-6)


def test_an_own_network_without_a_classifier_or_a_split():
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    embed = build_backbone(plain, transform=lambda image: torch.zeros(3, 16, 16) + image.getpixel((0, 0))[0] / 255,
                           classifier_layer=False)  # fmt: skip
    data = embed.extract(np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8), progress=False)
    _, left_out = live_scores(embed, [data], ["odin", "rankfeat"], progress=False)
    assert "classifier" in left_out["ODIN"]
    assert "classifier" in left_out["RankFeat"]
