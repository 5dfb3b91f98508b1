"""`posthoc features`: the file is the store's features in the images' order, and errors come before or instead of a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.features import Features
from posthoc.cli import main
from posthoc.eval.datasets import open_named
from posthoc.eval.feature_file import FeatureFile, prior_arrays

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
        assert set(found.files) == {"prior", "labels", "seen_labels"}
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
    assert not prior_arrays(features, "embedding", False)["seen_labels"]
    assert set(prior_arrays(features, "embedding", None)) == {"prior", "labels"}
    with pytest.raises(DataError, match="--features logits: this network has none"):
        prior_arrays(features, "logits", None)
    with pytest.raises(DataError, match="have no labels"):
        prior_arrays(Features.from_arrays(np.ones((3, 2))), "embedding", None)


def test_what_cannot_work_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"prior\.txt was given; expected a file that ends in \.npz"):
        FeatureFile(NAME, "cifar10", npz=Path("prior.txt")).run()
    with pytest.raises(DataError, match="cifar10"):
        FeatureFile(NAME, "cifar10", data_dir=tmp_path, pretrained=False).run()
