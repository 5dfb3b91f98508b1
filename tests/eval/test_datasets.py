"""Sets by name: where they are looked for, what is said when they are missing, and the commands that take them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.errors import DataError, OptionError
from posthoc.cli import main
from posthoc.eval import metrics
from posthoc.eval.baselines import entropy
from posthoc.eval.dataset_classes import CLASSES, SHARED, UNREMOVED, shared_classes
from posthoc.eval.datasets import SETS, default_data_dir, looking_in, open_named
from posthoc.eval.inputs import read

NAMES = "cifar10 cifar100 svhn tiny-imagenet lsun celeba coco dtd notmnist cars196 mnist fashion-mnist omniglot"  # the issue's
FEW = ["--resamples", "30"]


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data with CIFAR-10 and the photographs of COCO, found by the environment."""
    folder = tmp_path / "data"
    (folder / "coco/val2017").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "cifar10.npz", x_test=images, y_test=np.arange(8), x_train=images[:3], y_train=np.arange(3))
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"coco/val2017/{i}.png")
    monkeypatch.setenv("POSTHOC_DATA", str(folder))
    return folder


@pytest.fixture
def cifar100(data: Path) -> np.ndarray:
    """CIFAR-100 beside it, binary: two pickup trucks among five images. Its labels."""
    label = np.array([0, CLASSES["cifar100"].index("pickup_truck"), 7, 99, CLASSES["cifar100"].index("pickup_truck")])
    pixels = np.random.default_rng(1).integers(0, 256, (5, 3072), dtype=np.uint8)
    (data / "cifar-100-binary").mkdir()
    rows = np.concatenate([np.zeros((5, 1), np.uint8), label[:, None].astype(np.uint8), pixels], 1)
    rows.tofile(data / "cifar-100-binary/test.bin")
    return label


def test_the_names_are_those_of_the_issue():
    assert sorted(SETS) == sorted(NAMES.split())


def test_where_sets_are_looked_for(data, tmp_path, monkeypatch):
    assert open_named("cifar10").describe() == {"kind": "named data set", "name": "cifar10", "rows": 8, "split": "test"}
    assert len(open_named("cifar10", "train")) == 3
    assert len(open_named("cifar10", "validation")) == 8  # a split of a hub set beside it
    other = tmp_path / "other"
    (other / "cifar10").mkdir(parents=True)
    (data / "cifar10.npz").rename(other / "cifar10/cifar10.npz")  # in a folder of the set's name
    with pytest.raises(DataError, match="not in"):
        open_named("cifar10")
    assert len(open_named("cifar10", data_dir=other)) == 8
    with looking_in(other):
        assert len(open_named("cifar10")) == 8
        with looking_in(None):
            assert len(open_named("cifar10")) == 8
    assert default_data_dir() == data
    monkeypatch.delenv("POSTHOC_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / ".cache/posthoc/data"


@pytest.mark.parametrize("name", NAMES.split())
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_set_says_what_to_fetch_and_where_to_put_it(tmp_path, name, split):
    with pytest.raises(DataError) as told:
        open_named(name, split, tmp_path / "nothing")
    message = str(told.value)
    for layout in SETS[name].layouts:
        wanted = layout.train if split == "train" else layout.test
        assert wanted is None or wanted in message
    assert str(tmp_path / "nothing" / name) in message
    for word in ("--data-dir", "$POSTHOC_DATA", "a folder of images", "ORGANISATION/NAME", "To get them"):
        assert word in message
    assert "://" not in message
    assert "{" not in message


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("cifra10", "cifar10"),
        ("CIFAR-100", "cifar100"),
        ("tiny_imagenet", "tiny-imagenet"),
        ("FashionMNIST", "fashion-mnist"),
        ("cars-196", "cars196"),
        ("not_mnist", "notmnist"),
    ],
)
def test_a_misspelt_name_is_put_right(word, name):
    with pytest.raises(DataError, match=f"there is no set '{word}'; did you mean '{name}'"):
        read(word)
    with pytest.raises(DataError, match=f"did you mean '{name}'.*the names are cifar10, "):
        open_named(word)


def test_other_words_are_left_to_folders_and_the_hub(data, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"there is no file tiny-imagenet\.npz"):
        read("tiny-imagenet.npz")
    for word in ("someone/cifar10", "photos", "imagenette", "cifar10.h5"):
        with pytest.raises(OptionError, match="for images give --model"):
            read(word)
    monkeypatch.chdir(tmp_path)
    Path("coco").mkdir()  # a folder wins over a name, as it does over the hub
    for i in range(2):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(f"coco/{i}.png")
    backbone = build_backbone("test_vit", pretrained=False)
    found = read("coco", backbone)
    assert (found.rows, found.dataset) == (2, None)
    Path("coco").rename("else")
    found = read("coco", backbone)
    assert (found.rows, found.dataset, found.label) == (5, "coco", None)


def test_shared_classes_are_classes_of_both_sets():
    assert [len(CLASSES[name]) for name in ("cifar10", "cifar100", "tiny-imagenet")] == [10, 100, 200]
    assert all(list(classes) == sorted(set(classes)) for classes in CLASSES.values())
    for (inside, outside), pairs in SHARED.items():
        found = shared_classes(inside, outside)
        assert set(pairs) <= set(CLASSES[inside])
        assert set(found) <= set(CLASSES[outside])
        assert len(found) == len(set(found))
        assert shared_classes(outside, inside) == list(pairs)
    assert {names: len(shared_classes(*names)) for names in SHARED} == {
        ("cifar10", "cifar100"): 1,
        ("cifar10", "tiny-imagenet"): 24,
        ("cifar100", "tiny-imagenet"): 44,
    }
    assert shared_classes("cifar10", "svhn") == shared_classes(None, "cifar10") == shared_classes(None, None) == []
    assert set().union(*UNREMOVED) <= set(SETS)


def test_the_classes_of_tiny_imagenet_are_what_the_lists_say(shared):
    """Against the names that the real validation set has beside its ids."""
    import pyarrow.parquet as pq

    table = pq.read_table(shared / "data/tiny_imagenet_val.parquet", columns=["label", "name"])
    info = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert tuple(info["label"]["names"]) == CLASSES["tiny-imagenet"]
    name = dict(zip(table["label"].to_pylist(), table["name"].to_pylist(), strict=True))
    word = {wnid: name[i] for i, wnid in enumerate(CLASSES["tiny-imagenet"])}
    ten, hundred = SHARED["cifar10", "tiny-imagenet"], SHARED["cifar100", "tiny-imagenet"]
    assert [word[wnid] for wnid in ten["frog"].split()] == ["bullfrog", "tailed frog"]
    assert [word[wnid] for wnid in ten["automobile"].split()] == [
        "beach wagon",
        "convertible",
        "limousine",
        "sports car",
    ]
    assert [word[wnid] for wnid in ten["cat"].split()] == ["tabby", "Persian cat", "Egyptian cat"]
    for kind in ("bee", "chimpanzee", "cockroach", "lion", "mushroom", "orange", "plate", "snail", "tractor", "camel"):
        assert kind in word[hundred[kind]]
    for kind, count in (("bottle", 3), ("bridge", 3), ("lobster", 2), ("butterfly", 2)):
        assert len(hundred[kind].split()) == count
    named = {wnid for wnid, text in word.items() if any(part in CLASSES["cifar100"] for part in text.lower().split())}
    left = {word[wnid] for wnid in named - set(" ".join(hundred.values()).split())}
    assert left == {"spider web", "sea slug", "sea cucumber"}


@pytest.fixture
def weights(tmp_path: Path) -> list[str]:
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.safetensors")
    return ["--model", "test_vit", "--checkpoint", str(tmp_path / "w.safetensors")]


def test_named_sets_in_a_table_with_and_without_shared_classes(data, cifar100, weights, tmp_path, capsys):
    out = tmp_path / "ood.json"
    command = ["eval", "ood", "--id", "cifar10", "--ood", "cifar100", "coco", "--near", "cifar100", *weights, *FEW]
    main([*command, "--output", str(out)])
    whole, part, coco = json.loads(out.read_text())
    assert [one["title"] for one in (whole, part, coco)] == [
        "cifar100, all images (near OOD)", "cifar100 without classes of cifar10 (near OOD)", "coco"
    ]  # fmt: skip
    assert [one["set"] for one in (whole, part, coco)] == ["cifar100", "cifar100", "coco"]
    assert [one["ood_rows"] for one in (whole, part, coco)] == [5, 3, 5]
    backbone = build_backbone("test_vit", checkpoint=tmp_path / "w.safetensors")
    a, b = read("cifar10", backbone), read("cifar100", backbone)
    np.testing.assert_array_equal(b.label, cifar100)
    u, v = entropy(a.logits), entropy(b.logits)
    kept = np.array([name != "pickup_truck" for name in np.array(CLASSES["cifar100"])[cifar100]])
    for table, rows in ((whole, slice(None)), (part, kept)):
        assert table["scores"]["entropy"]["auroc"]["value"] == pytest.approx(metrics.auroc(u, v[rows]))
    assert "2 of the 5 images are of 1 class that cifar10 has too: the next table is without them" in whole["notes"]
    assert "2 of the 5 images are of 1 class that cifar10 has too: left out here" in part["notes"]
    assert any("nothing was left out, although coco's photographs" in note for note in coco["notes"])
    for table in (whole, part, coco):
        assert "images resized to 160 x 160 pixels (bicubic, crop 0.95, center)" in table["notes"]
    told = capsys.readouterr().out
    assert told.count("images resized to 160 x 160") == 3

    folders = [str(one.features.folder) for one in (a, b)]  # the stored features know which sets they are of
    main(["eval", "ood", "--id", folders[0], "--ood", folders[1], *FEW, "--output", str(out)])
    stored = json.loads(out.read_text())
    assert [one["title"] for one in stored] == ["cifar100, all images", "cifar100 without classes of cifar10"]
    assert [one["ood_rows"] for one in stored] == [5, 3]
    assert [one["scores"]["entropy"]["auroc"] for one in stored] == [
        one["scores"]["entropy"]["auroc"] for one in (whole, part)
    ]


def test_a_missing_set_is_told_before_any_image_is_looked_at(weights, monkeypatch, capsys):
    monkeypatch.setattr("posthoc.eval.ood.read", lambda *_: pytest.fail("read"))
    with pytest.raises(SystemExit):
        main(["eval", "ood", "--id", "cifar10", "--ood", "coco", "svhn", *weights])
    assert "the test images of svhn are not in" in capsys.readouterr().err


def test_every_command_takes_names_and_a_folder_of_data(data, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("POSTHOC_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    calibration = ["eval", "calibration", "--data", "cifar10", *weights, *FEW, "--format", "json"]
    with pytest.raises(SystemExit):
        main(calibration)
    assert "the test images of cifar10 are not in" in capsys.readouterr().err
    main([*calibration, "--data-dir", str(data)])
    (table,) = json.loads(capsys.readouterr().out)
    assert (table["set"], table["rows"]) == ("cifar10", 8)
    assert default_data_dir() == tmp_path / ".cache/posthoc/data"  # for that command only
