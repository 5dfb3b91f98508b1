"""Wrap, fit, ask: the model on a small network of one's own and on a small timm network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import posthoc
from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.blurring import blurred_embeddings
from posthoc.adapters.checks import check_features
from posthoc.adapters.data import open_source
from posthoc.adapters.errors import DataError, NotFittedError, OptionError
from posthoc.adapters.features import Features
from posthoc.adapters.fitting import resolve_positives
from posthoc.adapters.model import UncertainModel
from posthoc.adapters.prediction import MissingFieldError
from posthoc.adapters.splits import held_out_mask

ROWS, CLASSES = 240, 4


class Tiny(nn.Module):
    """A network with batch statistics, so that a fit that touched them would show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


def colours(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise images [N,3,12,12] whose colour tells the class, not always clearly."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(rows) % CLASSES
    colour = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])[label]
    strength = torch.rand(rows, 1, generator=generator) * 0.8
    noise = torch.randn(rows, 3, 12, 12, generator=generator)
    return noise + (strength * colour)[:, :, None, None], label


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return colours(ROWS, 0)


@pytest.fixture(scope="module")
def network() -> Tiny:
    """Trained on other images of the same kind than those it is wrapped for."""
    images, labels = colours(512, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Tiny()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for step in range(40):
        batch = slice(step % 8 * 64, step % 8 * 64 + 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def model(network: Tiny, data: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> UncertainModel:
    """Kappa and loss, fitted once for the tests that only ask."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    store = tmp_path_factory.mktemp("store")
    fitted = posthoc.wrap(network, head=["kappa", "loss"]).fit(data, epochs=3, validation=0.25, cache_dir=store)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    return fitted


def test_the_backbone_stays_frozen(model: UncertainModel, network: Tiny) -> None:
    assert model.train() is model
    assert not network.training
    assert not network.norm.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert model.get_base_model() is network
    model.eval()


def test_the_report_tells_what_happened(model: UncertainModel) -> None:
    assert set(model.report) == {"kappa", "loss"}
    for report in model.report.values():
        assert report["rows"] + report["held_out"]["rows"] == ROWS
        assert report["seconds"] > 0
        assert np.isfinite([report["train_loss"], report["held_out_loss"], report["held_out"]["median"]]).all()
        assert 0 <= report["share_at_bound"] <= 1
        assert report["warnings"] == []


def test_a_call_answers_with_every_head(model: UncertainModel, data: tuple[Tensor, Tensor]) -> None:
    prediction = model(data[0][:5])
    assert prediction.heads == ("kappa", "loss")
    assert (prediction.kind, prediction["loss"].kind) == ("aleatoric", "decision")
    for head in prediction.heads:
        score = prediction[head].uncertainty
        assert score.dtype == torch.float32
        assert score.shape == (5,)
        assert torch.isfinite(score).all()
        assert ((prediction[head].percentile >= 0) & (prediction[head].percentile <= 100)).all()
    torch.testing.assert_close(prediction.uncertainty, 1 / prediction.kappa)
    assert prediction.embedding.shape == (5, 8)
    assert prediction.logits.shape == (5, CLASSES)
    with pytest.raises(MissingFieldError):
        _ = prediction.temperature


def test_scores_depend_on_the_images_with_a_gradient(model: UncertainModel, data: tuple[Tensor, Tensor]) -> None:
    images = data[0][:3].clone().requires_grad_(True)
    model(images).uncertainty.sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_compiled_and_exported_models_answer_the_same(model: UncertainModel, data: tuple[Tensor, Tensor]) -> None:
    images = data[0][:4]
    expected = model(images)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
    program = torch.export.export(model, (images,))
    for answer in (compiled, program.module()(images)):
        for head in expected.heads:
            torch.testing.assert_close(answer[head].uncertainty, expected[head].uncertainty)
            torch.testing.assert_close(answer[head].percentile, expected[head].percentile)
        torch.testing.assert_close(answer.logits, expected.logits)


def streamed(images: Tensor) -> datasets.IterableDataset:
    def rows() -> Iterator[dict[str, Any]]:
        for image in images.numpy():
            yield {"image": image}

    return datasets.IterableDataset.from_generator(rows)


@pytest.mark.parametrize("form", ["array", "data set", "loader", "stream", "features", "output folder"])
def test_predict_gives_the_scores_of_a_call_for_any_data(form: str, model: UncertainModel, tmp_path: Path) -> None:
    images, labels = colours(50, 3)
    forms: dict[str, Any] = {
        "array": images,
        "data set": TensorDataset(images, labels),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=3, shuffle=True),
        "stream": streamed(images),
        "output folder": images,
    }
    given = model.backbone.extract(images, cache_dir=tmp_path / "store") if form == "features" else forms[form]
    folder = tmp_path / "out" if form == "output folder" else None
    answer = model.predict(given, batch_size=16, output_dir=folder)
    with torch.no_grad():
        expected = model(images)
    assert len(answer) == 50
    for head in expected.heads:
        torch.testing.assert_close(answer[head].uncertainty, expected[head].uncertainty)
        torch.testing.assert_close(answer[head].percentile, expected[head].percentile)
    torch.testing.assert_close(answer.logits, expected.logits)
    assert answer.embedding is None
    if folder is not None:
        written = np.load(folder / "kappa.uncertainty.npy")
        np.testing.assert_array_equal(written, answer.uncertainty)
        assert sorted(path.name for path in folder.iterdir()) == [
            "kappa.percentile.npy", "kappa.uncertainty.npy", "logits.npy", "loss.percentile.npy", "loss.uncertainty.npy",
        ]  # fmt: skip


def test_predict_keeps_the_fields_asked_for_and_no_others(model: UncertainModel, data: tuple[Tensor, Tensor]) -> None:
    answer = model.predict(data[0][:5], fields=("resultant", "embedding"))
    assert answer["kappa"].fields == ("resultant",)
    assert answer["loss"].fields == ()
    assert answer.embedding.shape == (5, 8)
    assert answer.logits is None
    with pytest.raises(OptionError, match="did you mean 'kappa'"):
        model.predict(data[0][:5], fields=("kapa",))
    with pytest.raises(OptionError, match="several names"):
        model.predict(data[0][:5], fields="uncertainty")
    with pytest.raises(DataError, match="no images"):
        model.predict(data[0][:0])


def test_thresholds_are_those_of_the_held_out_scores(model: UncertainModel, data: tuple[Tensor, Tensor]) -> None:
    threshold = model.threshold(coverage=0.9)
    # Held-out scores of 0.25 * 240 rows: the threshold is one of them, and keeps 90 % of all rows up to chance.
    assert np.mean(model.predict(data[0]).uncertainty.numpy() <= threshold) > 0.75
    assert model.threshold(coverage=0.9, head="loss") != threshold
    assert model.threshold(risk=0.9) >= model.threshold(risk=0.8)
    with pytest.raises(OptionError, match="did you mean 'loss'"):
        model.threshold(coverage=0.9, head="los")


def test_before_fit_everything_says_so(network: Tiny, tmp_path: Path) -> None:
    unfitted = posthoc.wrap(network, head="kappa")
    images = torch.zeros(1, 3, 12, 12)
    for ask in (
        lambda: unfitted(images),
        lambda: unfitted.predict(images),
        lambda: unfitted.threshold(coverage=0.9),
        lambda: unfitted.save_pretrained(tmp_path),
    ):
        with pytest.raises(NotFittedError, match=r"model\.fit"):
            ask()


def test_heads_are_made_by_name_with_options_and_added(network: Tiny, data: tuple[Tensor, Tensor]) -> None:
    one = posthoc.wrap(network, head="kappa", projection=3)
    assert one.heads["kappa"].config()["projection"] == 3
    two = posthoc.wrap(network, head=["kappa", "loss"], loss={"objective": "mse"})
    assert two.heads["loss"].config()["objective"] == "mse"
    assert list(one.add_head("temperature").heads) == ["kappa", "temperature"]
    with pytest.raises(OptionError, match="did you mean 'kappa'"):
        posthoc.wrap(network, head="kapa")
    with pytest.raises(OptionError, match="did you mean 'projection'"):
        posthoc.wrap(network, head="kappa", projektion=3)
    with pytest.raises(OptionError, match="with several heads"):
        posthoc.wrap(network, head=["kappa", "loss"], projection=3)
    with pytest.raises(OptionError, match="already"):
        one.add_head("kappa")
    with pytest.raises(OptionError, match="at least one head"):
        posthoc.wrap(network, head=[])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(40, dtype=torch.int64), "one class"),
        (torch.arange(40) % 4 - 1, "negative"),
        (torch.cat([torch.arange(39) % 4, torch.tensor([255])]), "labels out of range: 255 in row.s. 39"),
        (torch.rand(40), "int .N."),
        ((torch.arange(40)[:, None] % torch.tensor([2, 3, 5]) == 0).float(), "not a distribution"),
    ],
    ids=["one class", "negative", "stray", "regression", "multi-label"],
)
def test_labels_no_head_can_use_are_refused(labels: Tensor, message: str, network: Tiny) -> None:
    with pytest.raises(DataError, match=message):
        posthoc.wrap(network, head="kappa").fit((colours(40, 2)[0], labels), epochs=1)


def test_too_few_rows_are_refused(network: Tiny) -> None:
    with pytest.raises(posthoc.PosthocError, match="give more"):
        posthoc.wrap(network, head="kappa").fit(colours(2, 2), epochs=1)


def test_values_that_are_not_finite_are_refused_with_their_rows(network: Tiny) -> None:
    embedding = np.ones((20, 8), dtype=np.float32)
    features = Features(embedding, None, None, np.arange(20) % 2, np.arange(100, 120))
    check_features(features)
    embedding[[3, 7]] = np.nan
    with pytest.raises(DataError, match=r"embedding is not finite in row\(s\) 103, 107"):
        check_features(features)
    with pytest.raises(DataError, match=r"row\(s\) 103, 107"):
        posthoc.wrap(network, head="kappa").fit(features)


@pytest.mark.parametrize(
    ("label", "asked", "found"),
    [
        (np.arange(4), "auto", "labels"),
        (np.full((4, 2), 0.5, dtype=np.float32), "auto", "soft-labels"),
        (np.full((4, 2), 0.5, dtype=np.float32), "labels", "labels"),
        (None, "auto", "views"),
        (np.arange(4), "views", "views"),
    ],
)
def test_positives_are_found_from_what_the_data_has(label: np.ndarray | None, asked: str, found: str) -> None:
    features = Features.from_arrays(np.ones((4, 3), dtype=np.float32), label=label)
    assert resolve_positives(asked, features, True) == (found, None)


@pytest.mark.parametrize(
    ("label", "asked", "message"),
    [
        (None, "labels", "needs labels"),
        (np.arange(4), "soft-labels", "these are class indices"),
        (np.arange(4), "lables", "did you mean 'labels'"),
    ],
)
def test_positives_the_data_lacks_are_refused(label: np.ndarray | None, asked: str, message: str) -> None:
    features = Features.from_arrays(np.ones((4, 3), dtype=np.float32), label=label)
    with pytest.raises(posthoc.PosthocError, match=message):
        resolve_positives(asked, features, True)


def test_a_column_gives_positives_and_groups(network: Tiny, data: tuple[Tensor, Tensor]) -> None:
    table = datasets.Dataset.from_dict({"scene": [row // 2 for row in range(60)]})
    images = data[0][:60].numpy()
    table = table.with_transform(lambda batch: {"image": [images[s] for s in batch["scene"]], "scene": batch["scene"]})
    fitted = posthoc.wrap(network, head="kappa").fit(
        table, positives="scene", group="scene", epochs=1, validation=0.3, batch_size=16
    )
    assert fitted.fitted_on["fit"]["positives"] == "ids"
    assert fitted.fitted_on["fit"]["grouped"]
    # Both rows of a scene fall on one side.
    assert fitted.report["kappa"]["rows"] % 2 == 0
    assert fitted.report["kappa"]["held_out"]["rows"] % 2 == 0


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Unlabelled images of another size than the network's."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(image).resize((40, 30)) for image in pixels]


def test_images_without_labels_are_paired_by_views(photos: list[Image.Image]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = posthoc.wrap("test_resnet", head="kappa", pretrained=False)
    wrapped.fit(photos, views=2, epochs=2, validation=0.3, batch_size=8)
    assert wrapped.fitted_on["fit"]["positives"] == "views"
    whole = wrapped.predict(photos)
    torch.testing.assert_close(wrapped(photos[:3]).uncertainty, whole.uncertainty[:3])
    torch.testing.assert_close(wrapped.predict(photos[4]).uncertainty, whole.uncertainty[4:5])
    as_array = np.asarray(photos[4])
    torch.testing.assert_close(wrapped.predict(as_array).uncertainty, whole.uncertainty[4:5])
    with pytest.raises(OptionError, match="labelled rows"):
        wrapped.threshold(risk=0.1)


def test_temperature_is_chosen_by_blur_on_the_images(network: Tiny, data: tuple[Tensor, Tensor]) -> None:
    wrapped = posthoc.wrap(network, head="temperature").fit(data, epochs=2, validation=0.25)
    report = wrapped.report["temperature"]
    tried = report["rank_correlation_with_blur"]
    assert set(tried) == {0.01, 0.02, 0.05, 0.1, 0.2}
    assert tried[report["base_temperature"]] == max(tried.values()) > 0


def test_blurred_embeddings_start_at_the_images_themselves(
    model: UncertainModel, data: tuple[Tensor, Tensor], photos: list[Image.Image]
) -> None:
    rows = np.array([7, 3, 11])
    with torch.random.fork_rng(devices=[]):
        from_pil = build_backbone("test_resnet", pretrained=False)
    for backbone, images in ((model.backbone, data[0]), (from_pil, photos)):
        severity, embedding = blurred_embeddings(backbone, open_source(images), rows, batch_size=2)
        assert severity[0] == 0
        assert embedding.shape == (len(severity), 3, backbone.embedding_dim)
        plain = backbone(backbone.prepare([images[row] for row in rows])).embedding
        np.testing.assert_allclose(embedding[0], plain.detach(), rtol=1e-4, atol=1e-5)
        moved = np.linalg.norm(embedding - embedding[0], axis=2).mean(axis=1)
        assert (np.diff(moved) > 0).all()


def test_a_broken_image_is_named_when_predicting(photos: list[Image.Image], tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        wrapped = posthoc.wrap("test_resnet", head="kappa", pretrained=False)
    wrapped.fit((photos, np.arange(24) % 3), epochs=1, validation=0.3)
    photos[0].save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"bad\.png"):
        wrapped.predict(tmp_path)


def test_views_without_images_are_refused(network: Tiny) -> None:
    features = Features.from_arrays(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    with pytest.raises(DataError, match="these are features"):
        posthoc.wrap(network, head="kappa", transform=lambda image: torch.zeros(3, 12, 12)).fit(features)


def test_features_of_one_pass_serve_several_fits(network: Tiny, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    first = posthoc.wrap(network, head="loss")
    features = first.backbone.extract(data, cache_dir=tmp_path)
    a = first.fit(features, epochs=2).predict(features)
    b = posthoc.wrap(network, head="loss").fit(data, epochs=2, cache_dir=tmp_path).predict(features)
    assert torch.equal(a.uncertainty, b.uncertainty)


def test_a_backbone_that_makes_no_errors_on_the_rows_is_told(network: Tiny) -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(400) % 4
    logits = 12.0 * nn.functional.one_hot(label, 4) + torch.randn(400, 4, generator=generator)
    embedding = torch.randn(400, 8, generator=generator)
    features = Features.from_arrays(embedding, penultimate=embedding, logits=logits, label=label)
    wrapped = posthoc.wrap(network, head="kappa", transform=lambda image: torch.zeros(3, 12, 12))
    with pytest.warns(UserWarning, match="hardly an error on these rows"):
        wrapped.fit(features, epochs=1)
    assert any("hardly an error" in said for said in wrapped.report["kappa"]["warnings"])


def test_a_backbone_far_better_on_the_fitting_rows_is_told(network: Tiny) -> None:
    """Groups: right on all of those that are fitted on, guessing on the held-out ones."""
    generator = torch.Generator().manual_seed(0)
    label, group = torch.arange(400) % 4, np.arange(400) // 20
    unseen = torch.from_numpy(held_out_mask(np.arange(400), 0.3, 0, group))
    known = 3.0 * nn.functional.one_hot(label, 4) * (~unseen)[:, None]
    embedding = torch.randn(400, 8, generator=generator)
    logits = known + torch.randn(400, 4, generator=generator)
    features = Features.from_arrays(embedding, penultimate=embedding, logits=logits, label=label)
    wrapped = posthoc.wrap(network, head="kappa", transform=lambda image: torch.zeros(3, 12, 12))
    with pytest.warns(UserWarning, match="trained on the fitting rows"):
        wrapped.fit(features, epochs=1, validation=0.3, group=group)


def test_a_run_leaves_its_settings_and_resumes(network: Tiny, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = posthoc.wrap(network, head="loss").fit(data, epochs=3, output_dir=run)
    config = json.loads((run / "config.json").read_text())
    assert config["heads"]["loss"]["objective"] == "ranking"
    assert config["fit"]["epochs"] == 3
    assert config["data"]["rows"] == ROWS
    assert json.loads((run / "results.json").read_text())["loss"]["rows"] == first.report["loss"]["rows"]
    assert len((run / "loss" / "metrics.jsonl").read_text().splitlines()) == 3
    again = posthoc.wrap(network, head="loss").fit(data, epochs=3, output_dir=run)
    assert torch.equal(again.predict(data[0]).uncertainty, first.predict(data[0]).uncertainty)
    assert again.report["loss"]["train_loss"] == first.report["loss"]["train_loss"]


def test_labels_of_other_classes_are_not_the_classifiers(network: Tiny, data: tuple[Tensor, Tensor]) -> None:
    images, label = data
    wide = Tiny()
    wide.fc = nn.Linear(8, 50)
    model = posthoc.wrap(wide, "kappa").fit((images, label), epochs=1, validation=0.25)
    assert model.fitted_on["fit"]["backbone"] == {}
    with pytest.raises(OptionError, match="whose classifier has those classes"):
        model.threshold(risk=0.5)


def test_a_head_that_needs_labels_says_so_before_any_training(network: Tiny, data: tuple[Tensor, Tensor]) -> None:
    wrapped = posthoc.wrap(network, ["kappa", "loss"])
    with pytest.raises(DataError, match="the loss head needs labels"):
        wrapped.fit(data[0], views=2, epochs=1)
    assert not wrapped.report


def test_one_colour_image_with_channels_first_is_not_three_grey_ones(model: UncertainModel) -> None:
    with pytest.raises(DataError, match="3 grey images or one image"):
        model.predict(np.zeros((3, 12, 12), dtype=np.uint8))
