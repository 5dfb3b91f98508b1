"""The metric-laplace head: it knows the unfamiliar, keeps its contract, and stands on either layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import posthoc
from posthoc.adapters.backbone import BackboneOutput
from posthoc.adapters.errors import OptionError
from posthoc.adapters.features import Features
from posthoc.adapters.heads import FitData, MetricLaplaceHead, make_head
from posthoc.adapters.training import TrainOptions
from posthoc.cli import main
from posthoc.eval import metrics, retrieval_statistics, search

DIM, CLASSES, N = 16, 6, 600
SMALL = {"dim": 4}


def clusters(seed: int = 0, strange: bool = False) -> Features:
    """Classes in six directions of sixteen; strange images lie in the other ten."""
    rng = np.random.default_rng(seed)
    label = rng.integers(CLASSES, size=N)
    x = rng.normal(size=(N, DIM)) * 0.35
    x[np.arange(N), CLASSES + label if strange else label] += 2.0
    return Features.from_arrays((x + 1.0).astype(np.float32), label=label)


def fit_data(features: Features, **changes: object) -> FitData:
    rows = np.arange(len(features))
    options = TrainOptions(batch_size=100, epochs=10, lr=1e-2, progress=False)
    return FitData(features, rows[:450], rows[450:], options=options, **changes)  # type: ignore[arg-type]


def answers(head: MetricLaplaceHead, features: Features) -> dict[str, torch.Tensor]:
    x = torch.from_numpy(np.asarray(features.embedding))
    with torch.no_grad():
        return head(BackboneOutput(x, x, None))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"approximation": "fixed", "pair_count": "observed"},
        {"approximation": "full", "loss": "arccos", "pair_count": "all"},
        {"online": True, "memory": 0.9},
        {"online": True, "memory": 0.9, "approximation": "fixed", "pair_count": "all"},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_it_retrieves_and_is_less_certain_of_the_unfamiliar(options: dict) -> None:
    features = clusters()
    head = MetricLaplaceHead(**SMALL, **options)
    report = head.fit(fit_data(features))
    known, strange = answers(head, clusters(1)), answers(head, clusters(2, strange=True))
    u = known["uncertainty"]
    assert u.dtype == torch.float32
    assert ((u >= 0) & (u <= 1)).all()
    # clamped curvature leaves most weights the prior, which knows less of what was seen
    clamped = options.get("approximation", "positives") != "positives" and "online" not in options
    assert metrics.auroc(u, strange["uncertainty"]) > (0.65 if clamped else 0.8)
    torch.testing.assert_close(known["spread"].square().sum(-1), u, rtol=1e-4, atol=1e-6)
    order = torch.argsort(u)
    assert (known["kappa"][order].diff() <= 0).all()
    torch.testing.assert_close(known["expected_embedding"].norm(dim=-1), torch.ones(N))
    hits, _ = retrieval_statistics.label_hits(search.neighbours(known["expected_embedding"]), clusters(1).label)
    assert retrieval_statistics.recall_at(hits, 1) > 0.9
    assert report["prior_precision"] > 0
    assert len(report["retrieval_risk"]) == 8
    assert (report["negative_curvature"] > 0) == ("online" not in options and bool(options))
    twin = make_head("metric-laplace", **head.config())
    twin.build(fit_data(features).dims)
    twin.load_state_dict(head.state_dict())
    assert torch.equal(answers(twin, features)["uncertainty"], answers(head, features)["uncertainty"])


def test_a_fit_is_the_seeds_and_leaves_the_callers_random_numbers_alone() -> None:
    data = fit_data(clusters())
    heads = [MetricLaplaceHead(**SMALL) for _ in range(2)]
    before = torch.get_rng_state()
    for head in heads:
        head.fit(data)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(heads[0].state_dict().values(), heads[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_prior_given_is_left_alone() -> None:
    head = MetricLaplaceHead(**SMALL, prior_precision=123.0)
    assert head.fit(fit_data(clusters()))["prior_precision"] == 123.0
    assert float(head.posterior.prior_precision) == 123.0


def test_it_stands_on_the_backbones_own_layer() -> None:
    features = clusters()
    x = np.asarray(features.embedding)
    own = Features.from_arrays(x, penultimate=x, logits=x[:, :CLASSES], label=features.label)
    weight = torch.eye(CLASSES, DIM)
    for bias in (torch.full((CLASSES,), -1.0), None):
        head = MetricLaplaceHead(layer="backbone")
        head.fit(fit_data(own, classifier=(weight, bias)))
        assert head.scope == "logits"
        assert head.config()["dim"] == CLASSES
        assert torch.equal(head.posterior.weight, weight)
        u = answers(head, clusters(1))["uncertainty"]
        assert u.isfinite().all()
        assert u.std() > 0
    with pytest.raises(posthoc.PosthocError, match=r"layer='backbone'.*it ends in a convolution"):
        MetricLaplaceHead(layer="backbone").fit(fit_data(own, classifier_reason="it ends in a convolution"))


def test_ids_and_soft_labels_say_who_belongs_together() -> None:
    features = clusters()
    x = np.asarray(features.embedding)
    hard = MetricLaplaceHead(**SMALL)
    hard.fit(fit_data(features))
    by_id, soft = MetricLaplaceHead(**SMALL), MetricLaplaceHead(**SMALL)
    by_id.fit(fit_data(Features.from_arrays(x), positives="ids", ids=np.asarray(features.label)))
    soft.fit(fit_data(Features.from_arrays(x, label=np.eye(CLASSES, dtype=np.float32)[features.label])))
    for head in (by_id, soft):
        assert torch.equal(head.posterior.curvature_weight, hard.posterior.curvature_weight)
    with pytest.raises(posthoc.PosthocError, match="needs labels"):
        MetricLaplaceHead(**SMALL).fit(fit_data(Features.from_arrays(x)))


class Pixels(nn.Module):
    """Images [B,3,4,4] -> embeddings [B,16], in a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Flatten()
        self.fc = nn.Linear(48, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(images))


@pytest.fixture(scope="module")
def network() -> Pixels:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pixels().eval()


def coloured(n: int = 90) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    label = np.arange(n) % 3
    images = rng.integers(0, 90, size=(n, 4, 4, 3)).astype(np.uint8)
    images[np.arange(n), :, :, label] += 120
    return images, label


@pytest.fixture
def transform() -> Callable:
    return lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255.0


@pytest.mark.parametrize("options", [SMALL, {"layer": "backbone"}], ids=["projection", "backbone"])
def test_it_is_saved_loaded_compiled_and_exported(
    network: Pixels, transform: Callable, tmp_path: Path, options: dict
) -> None:
    model = posthoc.wrap(network, "metric-laplace", transform=transform, **options)
    model.fit(coloured(), epochs=5, validation=0.3, cache_dir=tmp_path)
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prediction = model(images)
    assert prediction.kind == "epistemic"
    assert prediction.fields == ("uncertainty", "percentile", "kappa", "expected_embedding", "spread")
    again = posthoc.load(model.save_pretrained(tmp_path / "adapter"), backbone=network, transform=transform)
    assert torch.equal(again(images).uncertainty, prediction.uncertainty)
    assert torch.equal(again(images).expected_embedding, prediction.expected_embedding)
    torch.testing.assert_close(model(images[:2]).uncertainty, prediction.uncertainty[:2], rtol=1e-5, atol=1e-7)
    exported = torch.export.export(again, (images,)).module()(images)
    torch.testing.assert_close(exported.uncertainty, prediction.uncertainty, rtol=1e-5, atol=1e-7)
    images.requires_grad_()
    (grad,) = torch.autograd.grad(model(images).uncertainty.sum(), images)
    assert grad.abs().max() > 0


def test_a_folder_of_images_from_the_command_line(tmp_path: Path) -> None:
    images, label = coloured()
    for i, (image, c) in enumerate(zip(images, label, strict=True)):
        place = tmp_path / "photos" / "rgb"[c]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((64, 64)).save(place / f"{i}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.safetensors")
    shared = ["--checkpoint", str(tmp_path / "w.safetensors"), "--output"]
    photos, adapter = str(tmp_path / "photos"), str(tmp_path / "adapter")
    main(
        [
            "fit",
            "test_vit",
            photos,
            "--head",
            "metric-laplace",
            *shared,
            adapter,
            "--epochs",
            "2",
            "--validation",
            "0.3",
        ]
    )
    tables = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for table in tables:
        main(["predict", adapter, photos, *shared, str(table)])
    assert tables[0].read_text() == tables[1].read_text()
    assert len(tables[0].read_text().splitlines()) == 91


@pytest.mark.parametrize(
    "options",
    [{"dim": 1}, {"loss": "cosine"}, {"approximation": "pos"}, {"pair_count": "pairs"}, {"layer": "head"},
     {"memory": 1.0}, {"online": True, "layer": "backbone"}, {"margin": -1.0}, {"prior_precision": 0.0}],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(OptionError, match="expected"):
        make_head("metric-laplace", **options)
