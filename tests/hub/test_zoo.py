"""The zoo: its list, how an adapter of it is made and measured, and how it is published and found again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo

from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.errors import AdapterError, DataError, OptionError
from posthoc.adapters.files import read_config
from posthoc.cli import main
from posthoc.hub.zoo import Entry, chosen, entries, hub_id
from posthoc.hub.zoo_build import build, classifier_labels, split

NETWORK = "test_resnet.r160_in1k"
NAMES = ["n01440764", "n01443537", "n01484850"]


def entry(head: str = "loss", **more) -> Entry:
    given = {"images": "org/digits", "split": "train", "ood": (), "held_back": 0.3, "seed": 0} | more
    return Entry(f"tiny-{head}", NETWORK, head, **given)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Digits in folders named by WordNet id, others apart, and a network whose classifier knows them as those classes."""
    place = tmp_path_factory.mktemp("zoo")
    digits = load_digits()
    for k, image in enumerate(digits.images):
        label = int(digits.target[k])
        folder = place / ("images" if label < 3 else "others") / (NAMES[label] if label < 3 else "")
        if label < 3 or k % 8 == 0:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32)).convert("RGB").save(folder / f"{k}.png")
    torch.manual_seed(0)
    network = timm.create_model(NETWORK, pretrained=False)
    backbone = build_backbone(NETWORK, pretrained=False)
    backbone.module.load_state_dict(network.state_dict())
    features = backbone.extract(place / "images", cache_dir=place / "store", progress=False)
    inputs, label = torch.from_numpy(np.array(features.penultimate)), torch.from_numpy(np.array(features.label))
    means = torch.stack([inputs[label == c].mean(0) for c in range(3)])
    classes = [ImageNetInfo().label_names().index(name) for name in NAMES]
    layer = network.get_classifier()
    scale = 4 / (means - means.mean(0)).square().sum(1).mean()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(-50)
        layer.weight[classes] = scale * means
        layer.bias[classes] = -0.5 * scale * means.square().sum(1)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, place / "network.safetensors")
    return place


@pytest.fixture(scope="module")
def built(world):
    places = {
        "data": str(world / "images"),
        "ood": [str(world / "others")],
        "checkpoint": world / "network.safetensors",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTHOC_CACHE", str(world / "store"))
        return build(entry(), world / "built", command="posthoc zoo build tiny-loss", resamples=50, **places)


def test_the_list_names_twenty_networks_of_timm_and_four_heads():
    found = entries()
    networks = {one.backbone for one in found.values()}
    assert len(networks) == 20
    assert len(found) == 80
    assert networks <= set(timm.list_pretrained())
    assert {one.head for one in found.values()} == {"kappa", "temperature", "loss", "laplace"}


def test_names_and_patterns():
    assert [one.name for one in chosen(["resnet50-kappa"])] == ["resnet50-kappa"]
    assert len(chosen(["efficientnet-lite?-loss"])) == 3
    assert len(chosen([])) == 80
    with pytest.raises(OptionError, match="did you mean 'resnet50-kappa'"):
        chosen(["resnet5-kappa"])
    with pytest.raises(AdapterError, match="did you mean 'resnet50-kappa'"):
        hub_id("zoo/resnet5-kappa")
    assert hub_id("org/name") == "org/name"


def test_a_name_of_the_zoo_is_an_id_of_its_namespace(monkeypatch):
    monkeypatch.delenv("POSTHOC_ZOO", raising=False)
    with pytest.raises(AdapterError, match="not published yet"):
        hub_id("zoo/resnet50-kappa")
    monkeypatch.setenv("POSTHOC_ZOO", "lab")
    assert hub_id("zoo/resnet50-kappa") == "lab/resnet50-kappa"


def test_rows_are_held_back_in_every_class_and_none_is_on_both_sides():
    label = np.random.default_rng(0).integers(0, 7, 500)
    label[label == 3] = 4  # a class without an image
    fitting, back = split(label, 0.3, seed=1)
    assert np.array_equal(np.sort(np.r_[fitting, back]), np.arange(500))
    for c in np.unique(label):
        assert np.sum(label[back] == c) == np.round(0.3 * np.sum(label == c))
    assert not np.array_equal(split(label, 0.3, seed=2)[1], back)


def test_an_adapter_is_fitted_measured_and_described(built, world):
    names = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert names >= {"adapter.safetensors", "adapter_config.json", "README.md", "evaluation/results.json"}
    assert names >= {"evaluation/risk_coverage.png", "evaluation/histogram_loss.png"}
    config = read_config(built)
    told = json.loads((built / "evaluation" / "results.json").read_text())
    assert told["made"]["adapter"] == config.weights.sha256
    rows = {one["role"]: one["rows"] for one in told["sets"]}
    images = len(list((world / "images").rglob("*.png")))
    assert config.data["rows"] + rows["id"] < images  # a third of what is held back is for the temperature
    assert config.data["rows"] == pytest.approx(0.7 * images, abs=2)
    accuracy = next(t for t in told["tables"] if "accuracy" in t["scores"].get("softmax", {}))
    assert accuracy["scores"]["softmax"]["accuracy"]["value"] > 0.6  # labels are counted as the classifier counts them
    card = (built / "README.md").read_text()
    assert '- command: "posthoc zoo build tiny-loss"' in card
    assert "![risk coverage](evaluation/risk_coverage.png)" in card
    for table in told["tables"]:
        if "auroc" in table["scores"].get("loss", {}):
            assert f"{table['scores']['loss']['auroc']['value']:.3f} [" in card


def test_labels_that_are_not_the_classifiers_are_refused(world):
    backbone = build_backbone(NETWORK, pretrained=False, checkpoint=world / "network.safetensors")
    features = backbone.extract(world / "images", cache_dir=world / "store", progress=False)
    assert set(classifier_labels(features, NAMES, backbone)) == {0, 1, 2}
    with pytest.raises(DataError, match="their labels are not its classes"):
        classifier_labels(features, NAMES[::-1], backbone)
    with pytest.raises(DataError, match="has no classes n99999999"):
        classifier_labels(features, [*NAMES[:2], "n99999999"], backbone)


def test_what_was_built_is_published_and_found_by_its_name(hub_server, child, built, tmp_path):
    shutil.copytree(built, tmp_path / "zoo" / "efficientnet-lite0-loss")
    run = "import sys, json; from posthoc.cli import main; main(json.loads(sys.argv[1])); print('null')"
    child(
        run, [json.dumps(["zoo", "publish", "--folder", str(tmp_path / "zoo"), "--license", "mit"])], POSTHOC_ZOO="lab"
    )
    (kept,) = hub_server.store.repositories.values()
    assert kept.id == "lab/efficientnet-lite0-loss"
    load = """
import json, sys, posthoc
from posthoc.adapters.backbone import build_backbone
backbone = build_backbone(sys.argv[1], pretrained=False, checkpoint=sys.argv[2])
print(json.dumps(posthoc.load("zoo/efficientnet-lite0-loss", backbone=backbone).loaded_from["commit"]))
"""
    assert child(load, [NETWORK, built.parents[1] / "network.safetensors"], POSTHOC_ZOO="lab") == kept.find("main").oid


def test_the_command_lists_and_says_what_is_missing(capsys, tmp_path):
    main(["zoo", "list", "vit-tiny-*"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "kappa on vit_tiny_patch16_224" in lines[0]
    for words, told in (
        (["publish", "vit-tiny-*", "--folder", str(tmp_path)], "has no vit-tiny-kappa"),
        (["build", "vit-*", "--checkpoint", "x.safetensors"], "--checkpoint is of one backbone"),
    ):
        with pytest.raises(SystemExit):
            main(["zoo", *words])
        assert told in capsys.readouterr().err
