"""A model to an adapter and back: identical scores on the same backbone, one clear error for anything else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import posthoc
from posthoc.adapters import files
from posthoc.adapters.card import render_card
from posthoc.adapters.errors import AdapterError, BackboneError
from posthoc.adapters.model import UncertainModel
from posthoc.adapters.persistence import plain

CLASSES = 3


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).relu().mean((2, 3)))


def tiny(seed: int = 0) -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny()


def images(rows: int = 90) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(rows) % CLASSES
    return torch.randn(rows, 3, 9, 9, generator=generator) + label[:, None, None, None], label


@pytest.fixture(scope="module")
def model() -> UncertainModel:
    return posthoc.wrap(tiny(), head=["kappa", "loss"]).fit(images(), epochs=2, validation=0.3)


@pytest.fixture
def adapter(model: UncertainModel, tmp_path: Path) -> Path:
    return model.save_pretrained(tmp_path / "adapter")


def test_loaded_scores_are_identical(model: UncertainModel, adapter: Path) -> None:
    # A fresh network with the same weights, of which nothing is known but its forward.
    for backbone in (tiny(), posthoc.adapters.backbone.build_backbone(tiny())):
        loaded = posthoc.load(adapter, backbone=backbone)
        new = torch.randn(20, 3, 9, 9, generator=torch.Generator().manual_seed(5))
        expected, got = model(new), loaded(new)
        for head in ("kappa", "loss"):
            assert torch.equal(got[head].uncertainty, expected[head].uncertainty)
            assert torch.equal(got[head].percentile, expected[head].percentile)
            assert loaded.threshold(coverage=0.8, head=head) == model.threshold(coverage=0.8, head=head)
        assert loaded.threshold(risk=1.0) == model.threshold(risk=1.0)
        assert loaded.report["kappa"]["rows"] == model.report["kappa"]["rows"]


def test_saving_a_loaded_adapter_changes_nothing(adapter: Path, tmp_path: Path) -> None:
    loaded = UncertainModel.from_pretrained(adapter, backbone=tiny())
    again = loaded.save_pretrained(tmp_path / "again" / adapter.name)  # the card's example has the folder's name
    for name in (files.WEIGHTS_NAME, files.CONFIG_NAME, files.CARD_NAME):
        assert (again / name).read_bytes() == (adapter / name).read_bytes()


def test_tensors_are_named_after_their_head(model: UncertainModel, adapter: Path) -> None:
    names = load_file(adapter / files.WEIGHTS_NAME).keys()
    assert {name.split(".")[0] for name in names} == {"kappa", "loss"}
    assert "kappa.held_out.quantiles" in names
    assert not any(name.startswith("backbone") for name in names)


def test_an_adapter_is_small(adapter: Path) -> None:
    assert sum(path.stat().st_size for path in adapter.iterdir()) < 100_000


def test_a_timm_adapter_attaches_to_its_own_weights_only(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = posthoc.wrap("test_resnet", head="kappa", pretrained=False)
    features = wrapped.backbone.extract(torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    features.label = (torch.arange(40) % 2).numpy()
    folder = wrapped.fit(features, epochs=1, validation=0.3).save_pretrained(tmp_path / "adapter")
    state = tmp_path / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in wrapped.get_base_model().state_dict().items()}, state)
    backbone = posthoc.adapters.backbone.build_backbone("test_resnet", checkpoint=state)
    new = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(posthoc.load(folder, backbone=backbone)(new).uncertainty, wrapped(new).uncertainty)
    other = posthoc.adapters.backbone.build_backbone("test_resnet", pretrained=False)
    with pytest.raises(BackboneError, match="fingerprint"):
        posthoc.load(folder, backbone=other)


def test_another_backbone_is_refused_with_both_fingerprints(model: UncertainModel, adapter: Path) -> None:
    ours = model.backbone.fingerprint("embedding")
    other = posthoc.adapters.backbone.build_backbone(tiny(1))
    other(torch.randn(2, 3, 9, 9))
    with pytest.raises(BackboneError, match=f"(?s){ours}.*{other.fingerprint('embedding')}.*backbone="):
        posthoc.load(adapter, backbone=tiny(1))
    with pytest.raises(BackboneError, match="fingerprint"):
        posthoc.load(adapter, backbone=tiny(1))


def test_an_own_module_must_be_given(adapter: Path) -> None:
    with pytest.raises(AdapterError, match=r"backbone=your_model"):
        posthoc.load(adapter)


@pytest.mark.parametrize("address", ["no/such/folder", "./missing", "word", "/absent"])
def test_what_is_neither_folder_nor_hub_id_is_named(address: str) -> None:
    with pytest.raises(AdapterError, match="neither an existing folder nor a hub id"):
        posthoc.load(address)


def rewrite(adapter: Path, change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None, **config: Any) -> None:
    """Change tensors and config as somebody would who also mends the digest."""
    tensors = load_file(adapter / files.WEIGHTS_NAME)
    change(tensors)
    old = files.read_config(adapter)
    files.write_adapter(
        adapter, tensors, lambda weights: dataclasses.replace(old, weights=weights, **config), render_card
    )


def heads(adapter: Path, **change: Any) -> list[Any]:
    first, *rest = files.read_config(adapter).heads
    return [dataclasses.replace(first, **change), *rest]


def wrong_shape(tensors: dict[str, Tensor]) -> None:
    tensors["kappa.mean"] = torch.zeros(9)


def wrong_dtype(tensors: dict[str, Tensor]) -> None:
    tensors["kappa.mean"] = tensors["kappa.mean"].double()


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors["kappa.mean"]


def unknown(tensors: dict[str, Tensor]) -> None:
    tensors["kappa.more"] = torch.zeros(1)


def not_finite(tensors: dict[str, Tensor]) -> None:
    tensors["kappa.mean"][0] = torch.nan


def unsorted(tensors: dict[str, Tensor]) -> None:
    tensors["kappa.held_out.quantiles"] = tensors["kappa.held_out.quantiles"].flip(0).contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_shape, r"'kappa.mean' is torch.float32 \[9\], expected torch.float32 \[8\]"),
        (wrong_dtype, r"torch.float64"),
        (missing, r"missing \['kappa.mean'\]"),
        (unknown, r"unknown \['kappa.more'\]"),
        (not_finite, r"'kappa.mean' holds values that are not finite"),
        (unsorted, r"not what a fit stores"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], None], message: str, adapter: Path
) -> None:
    rewrite(adapter, change)
    with pytest.raises(AdapterError, match=message):
        posthoc.load(adapter, backbone=tiny())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "kapa"}, "no head 'kapa': did you mean 'kappa'"),
        ({"options": {"projektion": 3}}, "did you mean 'projection'"),
        ({"options": {"projection": "many"}}, "cannot be built"),
        ({"options": {"width": -1}}, "cannot be built"),
        ({"options": {"width": 2**20}}, "larger tensors than its file holds"),
        ({"options": {"depth": 3}}, "no option 'depth'"),
        ({"kind": "epistemic"}, "of kind 'aleatoric'"),
        ({"classes": 2**40}, "classes of head 'kappa'"),
    ],
)
def test_heads_that_cannot_be_are_refused(change: dict[str, Any], message: str, adapter: Path) -> None:
    rewrite(adapter, heads=heads(adapter, **change))
    with pytest.raises(AdapterError, match=message):
        posthoc.load(adapter, backbone=tiny())


def test_a_truncated_or_exchanged_file_is_refused(adapter: Path) -> None:
    path = adapter / files.WEIGHTS_NAME
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError, match="truncated"):
        posthoc.load(adapter, backbone=tiny())
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AdapterError, match="was changed"):
        posthoc.load(adapter, backbone=tiny())


def test_another_preprocessing_warns(adapter: Path) -> None:
    rewrite(adapter, preprocessing={"input_size": [3, 9, 9], "mean": [0.5, 0.5, 0.5]})
    backbone = posthoc.adapters.backbone.build_backbone(tiny())
    backbone.preprocessing = {"mean": [0.0, 0.0, 0.0]}
    with pytest.warns(UserWarning, match="another preprocessing"):
        posthoc.load(adapter, backbone=backbone)


def test_the_config_tells_backbone_data_and_fit(model: UncertainModel, adapter: Path) -> None:
    config = json.loads((adapter / files.CONFIG_NAME).read_text())
    assert config["backbone"]["fingerprints"] == {"embedding": model.backbone.fingerprint("embedding")}
    assert (config["backbone"]["source"], config["backbone"]["name"]) == ("module", "Tiny")
    assert config["data"]["rows"] == 90
    assert config["fit"]["seed"] == 0
    assert config["preprocessing"]["input_size"] == [3, 9, 9]
    assert config["versions"]["posthoc"] == posthoc.__version__
    assert [head["name"] for head in config["heads"]] == ["kappa", "loss"]


def test_plain_turns_numbers_of_any_library_into_json() -> None:
    value = {0.1: torch.tensor([1.0, float("nan")]), "path": Path("x"), "n": (True, None, 2)}
    assert plain(value) == {"0.1": [1.0, None], "path": "x", "n": [True, None, 2]}


def test_a_loaded_own_network_takes_images_when_its_transform_is_given(tmp_path: Path) -> None:
    from torchvision.transforms import ToTensor

    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8)
    model = posthoc.wrap(tiny(), head="kappa", transform=ToTensor())
    model.fit((images, np.arange(60) % 3), epochs=1, validation=0.3, cache_dir=tmp_path / "store")
    folder = model.save_pretrained(tmp_path / "own")
    loaded = posthoc.load(folder, backbone=tiny(), transform=ToTensor(), device="cpu")
    assert torch.equal(loaded(images[:5]).uncertainty, model(images[:5]).uncertainty)
    with pytest.raises(BackboneError, match="transform="):
        posthoc.load(folder, backbone=tiny())(images[:5])


def test_weights_that_no_hub_has_are_asked_for_at_once(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = posthoc.wrap("test_resnet", head="kappa", pretrained=False)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, wrapped.backbone.embedding_dim)).astype(np.float32)
    features = posthoc.adapters.features.Features.from_arrays(x, label=np.arange(40) % 2)
    folder = wrapped.fit(features, epochs=1, validation=0.3).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"\(random\), which no hub has"):
        posthoc.load(folder)
