"""Data of the recipe `lam`: what is trained on, held out and tested on is apart; small copies of the archives' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from posthoc.adapters.errors import DataError, PosthocError
from posthoc.adapters.training_loop import step_generator
from posthoc.recipes.image_files import FileImages
from posthoc.recipes.lam_data import MARGIN, OTHERS, DataOptions, load_sets
from posthoc.recipes.lam_folders import read_cub200, read_lfw, read_msls
from posthoc.recipes.lam_networks import Prepared
from posthoc.recipes.lam_training import CROPS

from .recipe_children import results
from .recipe_data import write_idx


def options(root: Path, dataset: Any, **more: Any) -> DataOptions:
    given: dict[str, Any] = {
        "ood": (), "train_images": None, "test_images": None, "held_out": 0.2, "side": 32, "seed": 0,
    }  # fmt: skip
    return DataOptions(dataset=dataset, data_dir=root, **given | more)


def picture(
    path: Path, seed: int, size: tuple[int, int] = (40, 48), mode: str = "RGB", green: float | None = None
) -> None:
    """Noise; or noise around a green of which something is to be learnt, and a red and a blue that say nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    if green is None:
        pixels = rng.integers(0, 256, (*size, 3) if mode == "RGB" else size, np.uint8)
    else:
        colour = np.array([rng.uniform(0, 255), green, rng.uniform(0, 255)])
        pixels = rng.normal(colour, 20, (*size, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def cub200(root: Path, classes: int = 110, each: int = 2) -> Path:
    """`CUB_200_2011/` with images of the first `classes` classes, numbered across them."""
    base, names, labels = root / "CUB_200_2011", [], []
    green = np.random.default_rng(0).permutation(np.linspace(10, 245, classes))
    for number in range(classes):
        for k in range(each):
            name = f"{number + 1:03d}.Bird_{number}/Bird_{number}_{k}.jpg"
            picture(base / "images" / name, len(names), green=green[number])
            names.append(f"{len(names) + 1} {name}")
            labels.append(f"{len(labels) + 1} {number + 1}")
    (base / "images.txt").write_text("\n".join(names))
    (base / "image_class_labels.txt").write_text("\n".join(labels))
    return root


def lfw(root: Path) -> Path:
    base = root / "lfw-py"
    for split, people in (("Train", [("Ann_A", 3), ("Bob_B", 1), ("Cy_C", 2)]), ("Test", [("Di_D", 2), ("Ed_E", 2)])):
        for name, count in people:
            for k in range(1, count + 1):
                picture(base / "lfw_funneled" / name / f"{name}_{k:04d}.jpg", k)
        lines = [str(len(people)), *(f"{name}\t{count}" for name, count in people)]
        (base / f"peopleDev{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def msls(root: Path, each: int = 24) -> Path:
    """Cities of pictures 8 m apart in a line, ever greener, every fourth a query; one panorama."""
    for city in ("amman", "boston", "cph", "tokyo"):
        rng = np.random.default_rng(list(city.encode()))
        for part in ("query", "database"):
            base = root / "train_val" / city / part
            rows, raw = [], []
            for k in range(each):
                if (k % 4 == 0) == (part == "query"):
                    picture(base / "images" / f"{city}{k}.jpg", int(rng.integers(2**31)), green=10 + 10 * k)
                    rows.append(f"{len(rows)},{city}{k},{500.0 + 8 * k},{4_000_000.0}")
                    raw.append(f"{len(raw)},{city}{k},{k == 5}")
            (base / "postprocessed.csv").write_text(",key,easting,northing\n" + "\n".join(rows) + "\n")
            (base / "raw.csv").write_text(",key,pano\n" + "\n".join(raw) + "\n")
    return root


def test_a_closed_set_holds_out_training_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 50), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.arange(count), len(name)
        write_idx(tmp_path / "FashionMNIST/raw", name, images, np.arange(count) % 10)
    found = load_sets(options(tmp_path, "fashion-mnist", test_images=8))
    numbers = [(255 * part.pictures.plain(np.arange(len(part)))[:, 0, 0, :2]).round().int() for part in found.parts]
    assert [len(part) for part in found.parts] == [40, 10, 8]
    train, held = (set(part[:, 0].tolist()) for part in numbers[:2])
    assert not train & held
    assert len(train | held) == 50
    assert set(numbers[2][:, 1].tolist()) == {4}, "test images are the test part's"
    for part, one in zip(found.parts, numbers, strict=True):
        np.testing.assert_array_equal(part.target, one[:, 0] % 10)
    other = load_sets(options(tmp_path, "fashion-mnist", seed=1)).validation
    assert not np.array_equal(other.pictures.plain(np.arange(10)), found.validation.pictures.plain(np.arange(10)))


def test_omniglot_tests_on_characters_that_nothing_was_trained_on(tmp_path: Path) -> None:
    for part, alphabets in (("background", "AB"), ("evaluation", "C")):
        for alphabet in alphabets:
            for character in range(6):
                for k in range(3):
                    ink = np.full((105, 105), 255, np.uint8)
                    ink[40:60, 10 * character : 10 * character + 9] = 0
                    path = tmp_path / f"omniglot-py/images_{part}/{alphabet}/character{character:02d}/{k}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(ink).save(path)
    found = load_sets(options(tmp_path, "omniglot", ood=("other-alphabets",)))
    labels = [set(part.target.tolist()) for part in found.parts]
    assert [len(one) for one in labels] == [8, 2, 2]
    assert len(set.union(*labels)) == 12
    assert len(found.ood["other-alphabets"]) == 18
    for pictures in (found.test.pictures, found.ood["other-alphabets"]):
        x = pictures.plain(np.arange(2))
        assert x.shape == (2, 1, 28, 28)
        assert float(x.mean()) < 0.2, "ink is bright, as in notMNIST"


def test_cub200_tests_on_its_last_hundred_classes(tmp_path: Path) -> None:
    train, test = read_cub200(cub200(tmp_path))
    assert (len(train.paths), len(test.paths)) == (200, 20)
    assert set(train.target) == set(range(100))
    assert set(test.target) == set(range(100, 110))
    assert all(f"{label + 1:03d}.Bird" in str(path) for label, path in zip(train.target, train.paths, strict=True))
    found = load_sets(options(tmp_path, "cub200"))
    assert not set(found.train.target) & set(found.validation.target)
    assert [len(set(part.target)) for part in found.parts] == [80, 20, 10]


def test_lfw_holds_out_people(tmp_path: Path) -> None:
    train, test = read_lfw(lfw(tmp_path))
    assert train.target.tolist() == [0, 0, 0, 1, 2, 2]
    assert test.target.tolist() == [3, 3, 4, 4]
    found = load_sets(options(tmp_path, "lfw"))
    people = [set(part.target) for part in found.parts]
    assert not people[0] & people[1]
    assert people[0] | people[1] == {0, 1, 2}
    cub200(tmp_path)
    assert len(load_sets(options(tmp_path, "lfw", ood=None)).ood["cub200"]) == 20


def test_msls_holds_out_cities_and_leaves_out_panoramas(tmp_path: Path) -> None:
    train, test = read_msls(msls(tmp_path))
    assert len(test.paths) == 23
    assert not any("cph5.jpg" in str(path) for path in test.paths)
    apart = np.linalg.norm(train.target[:, None] - train.target[None], axis=-1)
    other = train.group[:, None] != train.group[None]
    assert apart[other].min() > 1e6, "cities in UTM zones of their own do not meet"
    assert apart[~other].max() < 200
    found = load_sets(options(tmp_path, "msls"))
    assert found.test.query is not None
    assert int(found.test.query.sum()) == 6
    assert found.train.of_places


def test_images_of_files_are_cropped_at_random_to_train_on_only(tmp_path: Path) -> None:
    for k in range(3):
        picture(tmp_path / f"{k}.png", k, (50, 60 + k))
    pictures = FileImages([tmp_path / f"{k}.png" for k in range(3)], np.arange(3), 32, base=tmp_path, margin=MARGIN)
    rows = np.arange(3)
    plain = pictures.plain(rows)
    assert plain.shape == (3, 3, 32, 32)
    assert torch.equal(plain[1:], pictures.plain(rows[1:]))
    one, again, other = (pictures.views(rows, CROPS, [step_generator(seed)]) for seed in (0, 0, 1))
    assert one.shape == plain.shape
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        pictures.plain(rows)


@pytest.mark.parametrize("dataset", ["cub200", "lfw", "msls"])
def test_missing_archives_say_what_goes_where(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(DataError, match=r"is not there\. To get it: .*--data-dir"):
        load_sets(options(tmp_path, dataset))


def test_broken_archives_are_told(tmp_path: Path) -> None:
    cub200(tmp_path)
    next((tmp_path / "CUB_200_2011/images").rglob("*.jpg")).unlink()
    with pytest.raises(DataError, match="1 of 220 images"):
        read_cub200(tmp_path)
    (tmp_path / "CUB_200_2011/image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(DataError, match="do not name the same images"):
        read_cub200(tmp_path)
    lfw(tmp_path)
    (tmp_path / "lfw-py/peopleDevTest.txt").write_text("1\nAnn\n")
    with pytest.raises(DataError, match="NAME<tab>IMAGES"):
        read_lfw(tmp_path)
    (msls(tmp_path) / "train_val/cph/query/postprocessed.csv").write_text("key\n1\n")
    with pytest.raises(DataError, match="columns key, easting, northing"):
        read_msls(tmp_path)
    for unread in ("east", "nan", ""):
        (tmp_path / "train_val/cph/query/postprocessed.csv").write_text(f"key,easting,northing\nq1,{unread},7\n")
        with pytest.raises(DataError, match=f"key q1: easting '{unread}', northing '7'; two numbers"):
            read_msls(tmp_path)


def test_ood_sets_are_read_as_the_images_they_are_compared_with(shared: Path, tmp_path: Path) -> None:
    """CIFAR-10's OOD sets without its classes, in its size; grey letters beside grey images."""
    assert OTHERS["cifar10"] == ("tiny-imagenet", "dtd")
    rng = np.random.default_rng(0)
    pixels, label = rng.integers(0, 256, (20, 32, 32, 3), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=pixels, y_train=label, x_test=pixels, y_test=label)
    for name in ("tiny_imagenet_val.parquet", "dtd_textures_600_256px.parquet"):
        (tmp_path / name).symlink_to(shared / "data" / name)
    found = load_sets(options(tmp_path, "cifar10", ood=None, test_images=12))
    assert {name: (len(one), one.size) for name, one in found.ood.items()} == {
        "tiny-imagenet": (12, (3, 32, 32)), "dtd": (12, (3, 32, 32)),
    }  # fmt: skip
    plain = found.test.pictures.plain(np.arange(12))
    assert Prepared(3)(plain).std() == pytest.approx(1.3, abs=0.1), "the network normalises colours as ImageNet's"
    assert torch.equal(Prepared(1)(plain[:, :1]), plain[:, :1]), "and takes grey images as they are"


def assert_learnt(found: dict[str, Any]) -> None:
    """Images of classes or cities that are held out are found by the embedding better than by untrained weights."""
    values = found["validation_map_at_5"]["deterministic"]
    assert values["best"] > values["before"] + 0.1, values


def test_places_are_trained_on_and_found(tmp_path: Path) -> None:
    """A run of a timm network on a small copy of MSLS: mAP and AUSC, no votes, for places have no labels."""
    msls(tmp_path)
    line = (
        "--preset msls --network test_resnet --no-pretrained --size 32 --dim 4 --epochs 6 --batch-size 16 --samples 2"
    )
    line += " --lr 0.003 --margin 0.5 --methods mc-dropout post-hoc-euclidean-positives online-arccos-fixed"
    found = results("lam", [*line.split(), "--data-dir", str(tmp_path), "--output", "run"], tmp_path)
    assert set(found["methods"]) == {
        "deterministic", "mc-dropout", "post-hoc-euclidean-positives", "online-arccos-fixed",
    }  # fmt: skip
    for row in found["methods"].values():
        assert "vote ECE" not in row
    assert_learnt(found)
    assert found["reports"]["online-arccos-fixed"]["prior_precision"] == 1.0


def test_classes_of_cub200_are_trained_on(tmp_path: Path) -> None:
    cub200(tmp_path, each=2)
    line = "--preset cub200 pfe --network test_resnet --no-pretrained --size 32 --dim 4 --epochs 6 --batch-size 32 --samples 2"
    line += " --lr 0.003 --margin 0.7 --miner all"
    found = results("lam", [*line.split(), "--ood", "--data-dir", str(tmp_path), "--output", "run"], tmp_path)
    assert found["images"] == {"train": 160, "validation": 40, "test": 20}
    assert "vote ECE" in found["methods"]["pfe"]
    assert_learnt(found)


def test_an_unknown_ood_set_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(PosthocError, match="--ood fashion-mnist was given"):
        load_sets(options(tmp_path, "fashion-mnist", ood=("fashion-mnist",)))
