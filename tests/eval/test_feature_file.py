"""`posthoc features`: the file is the store's features in the images' order, and errors come before or instead of a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from posthoc.adapters.backbone import Backbone, build_backbone
from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.features import Features
from posthoc.adapters.source_arrays import FileSource, ListSource
from posthoc.cli import main
from posthoc.eval.datasets import open_named
from posthoc.eval.feature_file import FeatureFile, order_of, prior_arrays

NAME = "test_resnet"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 images in FashionMNIST's files, and weights of a small network."""
    folder = tmp_path_factory.mktemp("features")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for kind, array in (("images-idx3", rng.integers(0, 256, (24, 28, 28))), ("labels-idx1", np.arange(24) % 10)):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (raw / f"train-{kind}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model(NAME, pretrained=False).state_dict(), folder / "w.safetensors")
    return folder


def test_the_file_holds_the_features_and_the_labels(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, file = place / "w.safetensors", place / "prior.npz"
    words = [
        "features",
        NAME,
        "fashion-mnist",
        "--data-dir",
        str(place),
        "--checkpoint",
        str(weights),
        "--npz",
        str(file),
    ]
    main(words)
    assert "24 images" in capsys.readouterr().out
    backbone = build_backbone(NAME, checkpoint=weights)
    with np.load(file, allow_pickle=False) as found:
        assert set(found.files) == {"prior", "labels", "seen_labels", "fingerprint"}
        assert str(found["fingerprint"]) == open_named("fashion-mnist", "train", place).fingerprint()
        np.testing.assert_array_equal(found["labels"], np.arange(24) % 10)
        assert bool(found["seen_labels"])  # it has a classifier
        assert found["prior"].dtype == np.float32
        again = backbone.extract(open_named("fashion-mnist", "train", place))
        np.testing.assert_array_equal(found["prior"], again.embedding)
    main([*words, "--features", "logits"])
    with np.load(file, allow_pickle=False) as found:
        np.testing.assert_array_equal(found["prior"], again.logits)


def test_random_weights_have_seen_no_label_and_what_is_not_known_is_not_said() -> None:
    features = Features.from_arrays(np.ones((3, 2)), label=np.array([0, 1, 0]))
    source = ListSource([np.zeros((4, 4, 3), np.uint8)] * 3, [0, 1, 0])
    assert not prior_arrays(features, "embedding", source, False)["seen_labels"]
    assert set(prior_arrays(features, "embedding", source, None)) == {"prior", "labels"}
    with pytest.raises(DataError, match="--features logits: this network has none"):
        prior_arrays(features, "logits", source, None)


def test_files_are_named_from_their_folder_on() -> None:
    paths, base = ["/data/train/cat/1.png", "/data/train/dog/2.png"], Path("/data/train")
    assert order_of(FileSource(paths, [0, 1], base=base))["names"].tolist() == ["cat/1.png", "dog/2.png"]
    assert order_of(FileSource(paths, [0, 1]))["names"].tolist() == paths


def test_what_cannot_work_is_said_before_anything_is_computed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(Backbone, "extract", never)
    with pytest.raises(OptionError, match=r"prior\.txt was given; expected a file that ends in \.npz"):
        FeatureFile(NAME, "cifar10", npz=Path("prior.txt")).run()
    with pytest.raises(DataError, match="cifar10"):
        FeatureFile(NAME, "cifar10", data_dir=tmp_path, pretrained=False).run()
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="have no labels"):
        FeatureFile(NAME, str(tmp_path), npz=tmp_path / "made" / "prior.npz", pretrained=False).run()
    assert (tmp_path / "made").is_dir(), "the file's folder is made"
    with pytest.raises(DataError, match=r"cannot write .*prior\.npz"):
        FeatureFile(NAME, "fashion-mnist", npz=tmp_path / "one.png" / "prior.npz", data_dir=place).run()
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(DataError, match="it is a folder"):
        FeatureFile(NAME, "fashion-mnist", npz=tmp_path / "folder.npz", data_dir=place).run()
    headless: Any = SimpleNamespace(
        name="headless", is_read=True, penultimate_dim=None, num_classes=0, embedding_dim=4, extract=never
    )
    monkeypatch.setattr("posthoc.adapters.backbone.build_backbone", lambda *_, **__: headless)
    for table in ("logits", "penultimate"):
        with pytest.raises(DataError, match=f"--features {table}: headless has none; take embedding"):
            FeatureFile("headless", "fashion-mnist", data_dir=place, features=table).run()  # type: ignore[arg-type]
