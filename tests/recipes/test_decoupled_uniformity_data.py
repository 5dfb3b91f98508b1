"""Data of the recipe `decoupled_uniformity`: small copies of the archives' folders, priors, several labels."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from posthoc.adapters.data import open_source
from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.training_loop import step_generator
from posthoc.eval.feature_file import order_of
from posthoc.recipes import image_files
from posthoc.recipes.augmentations import Augmentation
from posthoc.recipes.decoupled_uniformity import (
    BATCHES,
    Batches,
    Uniform,
    UniformityConfig,
    altered,
    loss_of,
    make_network,
)
from posthoc.recipes.decoupled_uniformity_data import load_sets
from posthoc.recipes.decoupled_uniformity_evaluation import class_worth, label_worth, projector
from posthoc.recipes.decoupled_uniformity_folders import (
    PATHOLOGIES,
    read_chexpert,
    read_cub,
    read_imagenet100,
    read_utzappos,
)
from posthoc.recipes.decoupled_uniformity_priors import check_apart, open_prior, read_prior, write_prior
from posthoc.recipes.decoupled_uniformity_report import seen_by
from posthoc.recipes.image_files import FileImages
from posthoc.recipes.pretraining_evaluation import Encoded, check_judged
from posthoc.recipes.running import Run
from posthoc.recipes.view_batches import ViewBatches

from .recipe_children import records, results, results_of_two
from .test_lam_data import picture

CPU = torch.device("cpu")
FILES = (
    "--data-dir . --size 24 --network small --width 8 --hidden 16 --dim 8 --batch-size 32 --epochs 1 --throughput-steps 1 "
    "--rotation 20"
)


def options(root: Path, dataset: str, **more: Any) -> UniformityConfig:
    size = None if dataset == "omniglot" else 24
    return UniformityConfig(dataset=dataset, data_dir=root, **{"batch_size": 32, "size": size, **more})


def imagenet(root: Path, classes: int = 100) -> Path:
    for split, count in (("train", 2), ("val", 1)):
        for number in range(classes):
            for k in range(count):
                picture(root / f"imagenet100/{split}/n{number:08d}/{split}_{k}.JPEG", number, (8, 10))
    return root


def cub(root: Path, classes: int = 4, each: int = 12) -> Path:
    base, names, labels, split, said = root / "CUB_200_2011", [], [], [], []
    for label in range(classes):
        for k in range(each):
            number = len(names) + 1
            name = f"{label + 1:03d}.Bird/Bird_{label}_{k}.jpg"
            picture(base / "images" / name, number, (26, 30))
            names.append(f"{number} {name}")
            labels.append(f"{number} {label + 1}")
            split.append(f"{number} {int(k % 4 > 0)}")
            said += [f"{number} {a + 1} {(number >> a) & 1} 3 {k}.5" for a in range(3)]
    said[4] += " 1"  # the archive has lines with a column too many
    for file, lines in (
        ("images.txt", names), ("image_class_labels.txt", labels), ("train_test_split.txt", split),
        ("attributes/image_attribute_labels.txt", said),
    ):  # fmt: skip
        (base / file).parent.mkdir(exist_ok=True)
        (base / file).write_text("\n".join(lines) + "\n")
    (root / "attributes.txt").write_text("1 has_bill_shape::curved\n2 has_bill_shape::dagger\n3 has_tail::notched\n")
    return root


def zappos(root: Path, each: int = 20) -> Path:
    base, rows = root / "ut-zap50k", []
    for label, place in enumerate(("Boots/Ankle", "Shoes/Flats", "Shoes/Heels")):
        for k in range(each):
            picture(base / "ut-zap50k-images" / place / "Maker" / f"{label}{k:02d}.7.jpg", k, (34, 24))
            rows.append(f"{label}{k:02d}-7,{int(label == 0)},{int(label == 1)},{k % 2},{int(k % 3 == 0)}")
    table = base / "ut-zap50k-data" / "meta-data-bin.csv"
    table.parent.mkdir()
    table.write_text("\n".join(["CID,Category.Boots,SubCategory.Flats,Material.Suede,HeelHeight.Flat", *rows[::-1]]))
    return root


def chexpert(root: Path, images: int = 40) -> Path:
    base = root / "CheXpert-v1.0-small"
    head = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding," + ",".join(PATHOLOGIES)
    for split, count in (("train", images), ("valid", 8)):
        rows = []
        for k in range(count):
            name = f"{split}/patient{k:05d}/study1/view1_frontal.jpg"
            picture(base / name, k, (26, 30), "L")
            found = ["1.0" if k % 2 else "0.0", "-1.0", "", *("0.0" for _ in PATHOLOGIES[3:])]
            healthy = k % 4 == 0
            if healthy:
                found = ["" for _ in PATHOLOGIES]
            rows.append(f"CheXpert-v1.0-small/{name},Male,50,Frontal,AP,{'1.0' if healthy else ''}," + ",".join(found))
        (base / f"{split}.csv").write_text("\n".join([head, *rows]) + "\n")
    return root


def test_imagenet100_is_a_hundred_folders_or_a_list_of_them(tmp_path: Path) -> None:
    imagenet(tmp_path, 101)
    with pytest.raises(DataError, match=r"has 101 classes; expected 100: list their WordNet ids in .*imagenet100\.txt"):
        read_imagenet100(tmp_path)
    wanted = [f"n{number:08d}" for number in range(1, 101)]
    (tmp_path / "imagenet100/imagenet100.txt").write_text("\n".join(f"{name} a word" for name in wanted[::-1]))
    train, test = read_imagenet100(tmp_path)
    assert (len(train.paths), len(test.paths)) == (200, 100)
    for part in (train, test):
        assert [wanted[label] for label in part.label] == [path.parent.name for path in part.paths]
    found = load_sets(options(tmp_path, "imagenet100"))
    assert (len(found.train.label), len(found.held_out.label), len(found.test.label)) == (180, 20, 100)
    assert len(set(found.held_out.label)) > 10, "folders are sorted by class; what is held out is not"
    np.testing.assert_array_equal(found.label[found.rows], found.train.label)
    with pytest.raises(DataError, match="lay ImageNet's folders train and val there"):
        read_imagenet100(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="did you mean 'imagenet100'"):
        load_sets(options(tmp_path, "imagenet10", size=None))


def test_imagenet100s_folder_is_in_the_sets_own_order(tmp_path: Path) -> None:
    sets = load_sets(options(imagenet(tmp_path), "imagenet100"))
    folder = open_source(tmp_path / "imagenet100" / "train")
    np.testing.assert_array_equal(order_of(folder)["names"], order_of(sets.source)["names"])
    np.testing.assert_array_equal(folder.column("label"), sets.label)


def test_cub200_has_its_own_split_and_attributes(tmp_path: Path) -> None:
    train, test = read_cub(cub(tmp_path))
    assert (len(train.paths), len(test.paths)) == (36, 12)
    assert set(train.label) == set(test.label) == {0, 1, 2, 3}
    assert all(path.name.startswith(f"Bird_{label}_") for path, label in zip(train.paths, train.label, strict=True))
    assert train.attributes is not None
    found = train.attributes()
    assert found.names == ("has_bill_shape:curved", "has_bill_shape:dagger", "has_tail:notched")
    numbers = [
        12 * label + int(path.stem.split("_")[2]) + 1 for path, label in zip(train.paths, train.label, strict=True)
    ]
    np.testing.assert_array_equal(found.values, [[(number >> a) & 1 for a in range(3)] for number in numbers])
    np.testing.assert_array_equal(found.of_groups(["has_tail"]).values, found.values[:, 2:])
    with pytest.raises(OptionError, match="attributes:has_tale: there is no such group; did you mean 'has_tail'"):
        found.of_groups(["has_tale"])
    said = tmp_path / "CUB_200_2011/attributes/image_attribute_labels.txt"
    said.write_text("\n".join(said.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="1 images lack attributes"):
        train.attributes()


def test_zappos_attributes_are_not_its_classes(tmp_path: Path) -> None:
    train, test = read_utzappos(zappos(tmp_path))
    assert (len(train.paths), len(test.paths)) == (42, 18)
    assert not {str(path) for path in train.paths} & {str(path) for path in test.paths}
    assert set(train.label) == {0, 1, 2}
    assert train.attributes is not None
    found = train.attributes()
    assert found.names == ("Material:Suede", "HeelHeight:Flat")
    k = np.array([int(path.stem[1:3]) for path in train.paths])
    np.testing.assert_array_equal(found.values, np.stack([k % 2, k % 3 == 0], 1))
    sets = load_sets(options(tmp_path, "utzappos", size=None))
    (chunk,) = sets.held_out.chunks(CPU)
    assert chunk.shape[1:] == (3, 32, 32)
    next(iter((tmp_path / "ut-zap50k/ut-zap50k-images").glob("*/*/*/*"))).rename(
        tmp_path / "ut-zap50k/ut-zap50k-images/Boots/Ankle/Maker/new.jpg"
    )
    (renamed,) = [one for one in read_utzappos(tmp_path) if any(path.stem == "new" for path in one.paths)]
    assert renamed.attributes is not None
    with pytest.raises(DataError, match=r"1 of \d+ images have no row, first new"):
        renamed.attributes()


def test_chexpert_knows_what_is_not_known(tmp_path: Path) -> None:
    train, test = read_chexpert(chexpert(tmp_path))
    assert (len(train.paths), len(test.paths)) == (40, 8)
    healthy, sick, other = train.label[0], train.label[1], train.label[2]
    assert (healthy[:-1] == 0).all()
    assert np.isnan(healthy[-1]), "support devices do not make a patient ill"
    np.testing.assert_array_equal(sick[:4], [1, np.nan, np.nan, 0])
    assert other[0] == 0
    sets = load_sets(options(tmp_path, "chexpert"))
    assert sets.labels == PATHOLOGIES
    (chunk,) = sets.test.chunks(CPU)
    assert chunk.shape == (8, 1, 24, 24)


def test_every_label_is_judged_on_the_images_where_it_is_known() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    feature, label = rng.normal(size=(400, 5)).astype(np.float32), np.zeros((400, 3), np.float32)
    label[:, 0] = feature[:, 0] + 0.5 * rng.normal(size=400) > 0
    label[:, 1] = feature[:, 1] > 1
    label[::3, 0] = np.nan  # where it is not known the features would mislead
    feature[::3, 0] *= -1
    train, test = (Encoded(feature[part], feature[part], label[part]) for part in (slice(0, 250), slice(250, 400)))
    network: Any = SimpleNamespace(projection=projector(5, 8, 3))
    with torch.no_grad():  # a representation that has lost the second label
        network.projection[0].weight.copy_(torch.eye(8, 5) * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))
    found = label_worth(network, train, test, ("a", "b", "c"), 0)
    assert found["auc"]["c"] is None
    known = ~np.isnan(test.label[:, 0])
    assert found["known_images"]["a"] == [int((~np.isnan(train.label[:, 0])).sum()), int(known.sum())]
    wanted = metrics.roc_auc_score(test.label[known, 0], test.feature[known, 0])
    assert found["auc"]["a"] == pytest.approx(wanted, abs=0.01)
    assert found["auc"]["b"] > 0.99
    assert found["mean_auc"] == pytest.approx((found["auc"]["a"] + found["auc"]["b"]) / 2)
    lost = found["auc_representation"]
    assert lost["a"] == pytest.approx(wanted, abs=0.01)
    assert abs(lost["b"] - 0.5) < 0.15
    assert found["mean_auc_representation"] == pytest.approx((lost["a"] + lost["b"]) / 2)
    with pytest.raises(DataError, match="no label has both"):
        check_judged(train.label, np.zeros((400, 3)), "chexpert", 0, False)
    check_judged(train.label, test.label, "chexpert", 0, False)
    few = train.label.copy()
    few[:2, 1], few[2:, 1] = [0.0, 1.0], np.nan  # so few that none is held out
    found = label_worth(network, Encoded(train.feature, train.feature, few), test, ("a", "b", "c"), 0)
    assert found["auc"]["b"] is None
    assert found["auc"]["a"] is not None
    assert found["known_images"]["b"][0] == 2


def test_classes_that_are_not_probed_are_never_right() -> None:
    rng = np.random.default_rng(0)
    label, asked = np.arange(80) % 4, np.arange(60) % 6
    feature, other = (
        np.eye(6, dtype=np.float32)[rows] + 0.05 * rng.normal(size=(len(rows), 6)) for rows in (label, asked)
    )
    train, test = (Encoded(x.astype(np.float32), x, y) for x, y in ((feature, label), (other, asked)))
    network: Any = SimpleNamespace(projection=projector(6, 12, 3))
    found = class_worth(network, train, test, "omniglot", 0, False)
    assert found["linear"] == found["nearest_feature"] == pytest.approx(4 / 6)
    assert set(found) == {"linear", "top_5", "linear_representation", "nearest_feature", "nearest_projection"}
    check_judged(label, asked, "omniglot", 0, True)
    for few, papers, said in (
        (label[:6], True, "4 classes have fewer than 3 images"),
        (label[:1], False, "of one class"),
    ):
        with pytest.raises(DataError, match=said):
            check_judged(few, asked, "omniglot", 0, papers)


def test_omniglot_tests_on_other_drawers(tmp_path: Path) -> None:
    for alphabet, characters in (("Greek", 3), ("Latin", 2)):
        for character in range(characters):
            for drawer in range(1, 21):
                ink = np.full((105, 105), 255, np.uint8)
                ink[40:60, 10 * character : 10 * character + drawer] = 0
                path = (
                    tmp_path
                    / f"omniglot-py/images_background/{alphabet}/character{character:02d}/0001_{drawer:02d}.png"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(ink).save(path)
    sets = load_sets(options(tmp_path, "omniglot"))
    assert (len(sets.train.label), len(sets.held_out.label), len(sets.test.label)) == (68, 7, 25)
    (chunk,) = sets.test.chunks(CPU)
    assert chunk.shape == (25, 1, 28, 28)
    assert float(chunk.mean()) < 0.2, "ink is bright"
    paths = sets.source.names()
    assert paths is not None
    assert all(int(Path(paths[row]).stem[-2:]) <= 15 for row in sets.rows)
    np.testing.assert_array_equal(sets.label[sets.rows], sets.train.label)
    assert sets.attributes is not None
    found = sets.attributes()
    assert found.values.shape == (100, 7)
    np.testing.assert_array_equal(found.values.sum(0), [60, 40, 20, 20, 20, 20, 20])
    assert found.of_groups(["alphabet"]).names == ("alphabet:Greek", "alphabet:Latin")
    np.testing.assert_array_equal(found.values[:, 2:].argmax(1), sets.label)


def test_views_of_files_belong_to_rows_of_the_whole_launch(tmp_path: Path) -> None:
    for k in range(70):
        picture(tmp_path / f"{k}.png", k, (20, 30))
    images = FileImages([tmp_path / f"{k}.png" for k in range(70)], np.arange(70), 12)
    how = Augmentation()
    whole = ViewBatches(images, how, 64, 5, Launch(0, 1), CPU, 3)
    halves = [ViewBatches(images, how, 64, 5, Launch(rank, 2), CPU, 3) for rank in (0, 1)]
    views = whole(1)
    assert [view.shape for view in views] == [(64, 3, 12, 12)] * 3
    for number, view in enumerate(views):
        assert torch.equal(view, torch.cat([half(1)[number] for half in halves]))
    assert not torch.equal(views[0], views[1])
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png cannot be read as an image"):
        list(images.chunks(CPU))


def test_a_prior_file_must_be_in_the_sets_order(tmp_path: Path) -> None:
    label, rows = np.arange(6) % 3, np.arange(12.0).reshape(6, 2)
    np.savez(tmp_path / "a.npz", prior=rows, labels=label)
    found, seen, checked = read_prior(tmp_path / "a.npz", label, {})
    np.testing.assert_array_equal(found, rows)
    assert (seen, checked) == (None, "labels")
    np.savez(tmp_path / "b.npz", prior=np.stack([rows, -rows], 1), labels=label, seen_labels=np.array(False))
    found, seen, _ = read_prior(tmp_path / "b.npz", label, {})
    np.testing.assert_array_equal(found, rows)
    assert seen is False
    unknown = np.array([[0.0, np.nan], [1.0, 0.0]])
    np.savez(tmp_path / "c.npz", prior=rows[:2], labels=unknown)
    read_prior(tmp_path / "c.npz", unknown.copy(), {})
    for arrays, said in (
        ({"prior": rows}, "has no labels; expected the keys prior and labels"),
        ({"prior": rows[:5], "labels": label[:5]}, r"labels are int64 \[5\]; expected \[6\]"),
        ({"prior": rows[:5], "labels": label}, r"prior is float64 \[5, 2\]; expected numbers \[6, P\]"),
        ({"prior": rows[:, :0], "labels": label}, r"prior is float64 \[6, 0\]; expected numbers .* P at least 1"),
        ({"prior": np.zeros((6, 0, 4)), "labels": label}, r"prior is float64 \[6, 0, 4\]; expected numbers"),
        (
            {"prior": rows, "labels": label[::-1]},
            r"labels of 4 of 6 rows are not the set's, first row 0 \(2 there, 0 here\)",
        ),
        ({"prior": np.where(rows == 7, np.inf, rows), "labels": label}, "prior is not finite in row 3"),
        ({"prior": rows.astype(str), "labels": label}, "expected numbers"),
    ):
        wrong: Any = arrays
        np.savez(tmp_path / "wrong.npz", **wrong)
        with pytest.raises(DataError, match=said):
            read_prior(tmp_path / "wrong.npz", label, {})
    (tmp_path / "wrong.npz").write_text("no zip")
    with pytest.raises(DataError, match=r"cannot be read as an \.npz"):
        read_prior(tmp_path / "wrong.npz", label, {})


def test_images_of_a_class_are_told_apart_by_their_names(tmp_path: Path) -> None:
    """CUB-200 by `write_prior`: the set's own file fits, and one whose rows of a class have changed places does not."""
    sets = load_sets(options(cub(tmp_path), "cub200"))
    names, rows = sets.source.names(), np.arange(36.0)[:, None]
    assert names is not None
    write_prior(tmp_path / "mine.npz", rows, sets, seen_labels=False)
    run: Any = SimpleNamespace(device=CPU)
    prior = open_prior(options(tmp_path, "cub200", prior="mine.npz"), run, sets)
    assert prior is not None
    np.testing.assert_array_equal(prior.make(), rows[sets.rows])
    assert prior.told() == {
        "name": "mine.npz", "seen_labels": False, "holds_classes": False, "order_checked_by": "names",
    }  # fmt: skip
    with np.load(tmp_path / "mine.npz") as file:
        arrays: Any = dict(file)
    first, second = np.flatnonzero(sets.label == 2)[:2]
    arrays["names"][[first, second]] = arrays["names"][[second, first]]
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(
        DataError, match=rf"names of 2 of 36 rows are not the set's, first row {first} \(images/003\.Bird"
    ):
        open_prior(options(tmp_path, "cub200", prior="mine.npz"), run, sets)
    order = {"fingerprint": np.array("a")}
    np.savez(tmp_path / "array.npz", prior=rows, labels=sets.label, fingerprint=np.array("b"))
    with pytest.raises(DataError, match="its images are others than the set's, or in another order"):
        read_prior(tmp_path / "array.npz", sets.label, order)
    with pytest.raises(DataError, match=r"`write_prior` \(docs/recipes\.md\) writes one of your own rows"):
        open_prior(options(tmp_path, "cub200", prior="other.npz"), run, sets)
    for wrong, said in ((rows[1:], r"expected numbers \[36, P\]"), (rows * np.nan, "not finite in row 0")):
        with pytest.raises(DataError, match=said):
            write_prior(tmp_path / "wrong.npz", wrong, sets)
    assert not (tmp_path / "wrong.npz").exists()


def test_the_docs_snippet_writes_a_file_for_a_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    (snippet,) = [one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "write_prior" in one]
    (tmp_path / "DATA").mkdir()
    chexpert(tmp_path / "DATA", 300)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {"encode": lambda files: np.arange(2.0 * len(files)).reshape(-1, 2)})
    sets = load_sets(options(tmp_path / "DATA", "chexpert"))
    rows, seen, checked = read_prior(tmp_path / "DATA" / "gloria.npz", sets.label, order_of(sets.source))
    assert (rows.shape, seen, checked) == ((300, 2), False, "names")


def damaged(path: Path, line: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "line", "text", "said"),
    [
        (
            "image_class_labels.txt",
            3,
            "3 three",
            r"image_class_labels\.txt, line '3 three': expected the number of a class",
        ),
        ("train_test_split.txt", 3, "3 2", r"train_test_split\.txt, line '3 2': expected 0 or 1"),
        (
            "attributes/image_attribute_labels.txt",
            5,
            "2 2",
            r"image_attribute_labels\.txt, line 5: '2 2'; expected an image",
        ),
        ("attributes/image_attribute_labels.txt", 5, "2 9 1 3 1.5", r"line 5: '2 9 1 3 1\.5'; expected"),
        ("attributes/image_attribute_labels.txt", 5, "2 2 yes 3 1.5", "line 5: .*0 or 1"),
    ],
)
def test_a_damaged_table_of_cub200_is_named(file: str, line: int, text: str, said: str, tmp_path: Path) -> None:
    damaged(cub(tmp_path) / "CUB_200_2011" / file, line, text)
    with pytest.raises(DataError, match=said):
        read_cub(tmp_path)[0].attributes()  # type: ignore[misc]


def test_damaged_tables_of_zappos_and_chexpert_are_named(tmp_path: Path) -> None:
    table = zappos(tmp_path) / "ut-zap50k/ut-zap50k-data/meta-data-bin.csv"
    whole = table.read_text()
    for text, said in (
        ("000-7,1,0,0", r"meta-data-bin\.csv, line 61: there is not one cell for each of the 5 columns"),
        ("000-7,1,0,0,1,5", r"meta-data-bin\.csv, line 61: there is not one cell for each of the 5 columns"),
        ("000-7,1,0,,1", r"meta-data-bin\.csv, CID 000-7: Material\.Suede is ''; expected 0 or 1"),
    ):
        damaged(table, 61, text)
        (part,) = [one for one in read_utzappos(tmp_path) if any(path.stem == "000.7" for path in one.paths)]
        with pytest.raises(DataError, match=said):
            part.attributes()  # type: ignore[misc]
        table.write_text(whole)
    table = chexpert(tmp_path) / "CheXpert-v1.0-small/train.csv"
    whole = table.read_text()
    row = whole.splitlines()[3]
    for text, said in (
        (row[: row.rindex(",")], r"train\.csv, line 4: there is not one cell for each of the 19 columns"),
        (row.replace("-1.0", "ill"), r"train\.csv, .*patient00002.*: Cardiomegaly is 'ill'; expected 1, 0, -1"),
    ):
        damaged(table, 4, text)
        with pytest.raises(DataError, match=said):
            read_chexpert(tmp_path)
        table.write_text(whole)
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"train\.csv is no text"):
        read_chexpert(tmp_path)


def test_omniglots_alphabets_are_in_its_parquet_file_too(shared: Path) -> None:
    sets = load_sets(options(shared / "data", "omniglot"))
    assert sets.attributes is not None
    found = sets.attributes()
    assert found.groups() == ["alphabet", "character"]
    assert found.of_groups(["alphabet"]).values.sum(0).tolist() == [20 * kinds for kinds in (24, 22, 24, 40, 26)]
    assert len(np.unique(found.of_groups(["character"]).values, axis=0)) == 136
    assert (len(sets.train.label) + len(sets.held_out.label), len(sets.test.label)) == (136 * 15, 136 * 5)
    told: dict[str, Any] = {}
    for name in ("attributes", "attributes:alphabet", "attributes:character", "attributes:alphabet,character"):
        prior = open_prior(options(shared / "data", "omniglot", prior=name), SimpleNamespace(device=CPU), sets)  # type: ignore[arg-type]
        assert prior is not None
        told[name] = prior.told()
        assert seen_by(told[name]) == ("the classes themselves" if "character" in name else "people's annotations")
        assert told[name]["seen_labels"] == (True if "character" in name else "annotations")
        check_apart(prior.make(), name)
    assert told["attributes"]["groups"] == ["alphabet"], "what is judged is left out unless it is asked for"


def test_image_files_are_read_once_for_the_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = options(cub(tmp_path), "cub200", prior="vae", vae_epochs=2, vae_dim=4, output=tmp_path / "out")
    sets, run = load_sets(config), Run("decoupled_uniformity", config)
    prior, seen, before = open_prior(config, run, sets), [], image_files.open_image

    def opened(path: Path, least: int) -> Any:
        seen.append(Path(path))
        return before(path, least)

    monkeypatch.setattr(image_files, "open_image", opened)
    assert prior is not None
    assert prior.make().shape == (33, 4)
    known: Any = (sets.train.paths, sets.held_out.paths)  # type: ignore[union-attr]
    assert sorted(seen) == sorted([*known[0], *known[1]])


def test_a_run_on_image_files_with_several_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--dataset chexpert {FILES} --output out"
    chexpert(tmp_path)
    found = results("decoupled_uniformity", words.split(), tmp_path)
    assert found["prior"] is None
    known = {name for name, value in found["worth"]["auc"].items() if value is not None}
    assert known == {PATHOLOGIES[0]}, "of the others the copy has no sick patient"
    assert 0 <= found["worth"]["mean_auc"] == found["worth"]["auc"][PATHOLOGIES[0]] <= 1
    assert "| mean AUC | mean AUC representation |" in capsys.readouterr().out
    assert found["held_out"]["after"]["step"] == 1


def test_two_processes_on_image_files_without_gathering(tmp_path: Path) -> None:
    """Each takes the loss of its own images, as the paper's code does: of the first step both losses are known by hand."""
    words = f"--dataset cub200 {FILES} --prior attributes:has_tail --no-gather --output out"
    cub(tmp_path, each=24)
    found = results_of_two("decoupled_uniformity", [word if word != "32" else "64" for word in words.split()], tmp_path)
    assert found["prior"]["groups"] == ["has_tail"]
    assert found["prior"]["seen_labels"] == "annotations"
    assert found["prior"]["smoother"]["images"] == 32
    assert found["images"] == {"train": 65, "held_out": 7, "test": 24}
    config = options(
        tmp_path, "cub200", batch_size=64, width=8, hidden=16, dim=8, rotation=20.0, prior="attributes:has_tail"
    )
    sets = load_sets(config)
    assert sets.attributes is not None
    rows = sets.attributes().of_groups(["has_tail"]).values[sets.rows]
    seed, losses = step_generator(0, BATCHES).initial_seed(), []
    for rank in (0, 1):
        views = ViewBatches(sets.train, altered(config), 64, seed, Launch(rank, 2), CPU)
        module = Uniform(make_network(config, sets), loss_of(config))
        losses.append(float(module(*Batches(views, rows)(0)).detach()))
    (record,) = records(tmp_path / "out")
    assert record["train_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    whole = ViewBatches(sets.train, altered(config), 64, seed, Launch(0, 1), CPU)
    both = Uniform(make_network(config, sets), loss_of(config))(*Batches(whole, rows)(0))
    assert abs(record["train_loss"] - float(both.detach())) > 2e-4
