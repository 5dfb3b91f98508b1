"""The CIFAR-10H recipe's data: votes, five sets, images as a step sees them, pairs against their definition."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from posthoc.adapters.errors import DataError, OptionError, PosthocError
from posthoc.adapters.perturbations import center_crop
from posthoc.adapters.positives import RowNumbers, SoftLabelPairs, draw_negatives
from posthoc.adapters.training_loop import step_generator
from posthoc.recipes.cifar10h_data import ImageInputs, five_sets, fold_rows, load_cifar10h


@pytest.fixture(params=["folder", "data set"])
def lettered(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """--images with the labels of 200 images, in the folder or as a data set like those of the hub; shares of their votes."""
    rng = np.random.default_rng(3)
    votes = rng.dirichlet(np.full(10, 0.1), 200)
    label, pixels = votes.argmax(1), rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    if request.param == "folder":
        np.savez(tmp_path / "cifar10.npz", x_test=pixels, y_test=label, x_train=pixels, y_train=label)
        yield "cifar10", votes
        return
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"img": [Image.fromarray(one) for one in pixels], "label": label}
    table = datasets.Dataset.from_dict(columns, features)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda name, **_: datasets.DatasetDict({"test": table})["test"])
        yield "someone/cifar10", votes


def test_votes_in_another_order_than_images_are_refused(lettered: tuple[str, np.ndarray], tmp_path: Path) -> None:
    images, votes = lettered
    rng = np.random.default_rng(4)
    some = np.arange(10)
    some[[3, 5]] = 5, 3  # cats and dogs
    wrong = {"rows": votes[rng.permutation(200)], "columns": votes[:, rng.permutation(10)], "two": votes[:, some]}
    for name, table in {"right": votes, **wrong}.items():
        np.save(tmp_path / f"{name}.npy", table)
    found = load_cifar10h(tmp_path, tmp_path / "right.npy", images, rows=150)
    np.testing.assert_allclose(found.votes, votes[:150], rtol=1e-6)
    assert found.votes.dtype == np.float32
    np.save(tmp_path / "few.npy", votes[:, :9])
    with pytest.raises(DataError, match=r"few\.npy has 9 columns, expected 10"):
        load_cifar10h(tmp_path, tmp_path / "few.npy", images)
    for name, table in wrong.items():
        agree = (table.argmax(1) == votes.argmax(1)).mean()
        expected = rf"{name}.npy: .* for {agree:.1%} of the images; at least 90% are expected: the order of the rows"
        with pytest.raises(DataError, match=expected):
            load_cifar10h(tmp_path, tmp_path / f"{name}.npy", images)


def test_missing_data_says_what_goes_where(tmp_path: Path) -> None:
    with pytest.raises(PosthocError, match=r"cifar10h-probs.npy or cifar10h-counts.npy.*cifar-10h.*--labels"):
        load_cifar10h(tmp_path)
    with pytest.raises(PosthocError, match=r"--labels .*none.npy was given, and there is no such file.*cifar-10h"):
        load_cifar10h(tmp_path, tmp_path / "none.npy")
    np.save(tmp_path / "cifar10h-counts.npy", np.ones((5, 10), int))
    with pytest.raises(PosthocError, match=r"cifar10 are not in .*torchvision.datasets.CIFAR10"):
        load_cifar10h(tmp_path)


def test_five_folds_test_every_image_once() -> None:
    sets = five_sets(1003, seed=5)
    assert [len(part) for part in sets] == [201, 201, 201, 200, 200]
    tested = []
    for fold in range(5):
        train, validation, test = fold_rows(sets, fold)
        np.testing.assert_array_equal(train, np.sort(np.concatenate([sets[(fold + k) % 5] for k in range(3)])))
        assert validation is sets[(fold + 3) % 5]
        assert not set(train) & set(validation)
        assert not set(test) & (set(train) | set(validation))
        tested.append(test)
    np.testing.assert_array_equal(np.sort(np.concatenate(tested)), np.arange(1003))
    with pytest.raises(OptionError):
        fold_rows(sets, 5)


def test_training_images_are_cropped_moved_and_mirrored() -> None:
    """A crop, then half of them mirrored, then each moved by its own up to 4 px, what comes in repeating the border."""
    rng = np.random.default_rng(0)
    pixels, stored = rng.integers(0, 256, (2, 16, 32, 32, 3), dtype=np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)
    inputs = ImageInputs(pixels, stored, mean, std)
    every = np.arange(16)

    def as_seen(images: np.ndarray) -> torch.Tensor:
        scaled = (images / 255 - np.array(mean)) / np.array(std)
        return torch.from_numpy(scaled).permute(0, 3, 1, 2).float()

    def drawn(crops: float, augment: bool) -> torch.Tensor:
        return inputs.training(torch.arange(16), crops, augment, step_generator(0))

    plain = as_seen(pixels)
    for got, expected in (
        (drawn(0.0, False), plain),
        (inputs.whole(every), plain),
        (inputs.whole(every, mirrored=True), plain.flip(3)),
        (inputs.whole(every, crop=True), as_seen(stored)),
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    share = torch.rand(16, 2, generator=step_generator(0)).numpy()
    sides = 0.25 + 0.75 * share[:, 1]
    cut = [np.asarray(center_crop(Image.fromarray(x), float(f))) for x, f in zip(pixels, sides, strict=True)]
    wanted = np.where((share[:, 0] < 0.3)[:, None, None, None], cut, pixels)
    torch.testing.assert_close(drawn(0.3, False), as_seen(wanted), atol=1e-5, rtol=0)

    found = set()
    for view, image in zip(drawn(0.0, True), plain, strict=True):
        ways = {}
        for flip, down, right in product((False, True), range(-4, 5), range(-4, 5)):
            rows, columns = (np.clip(np.arange(32) + by, 0, 31) for by in (down, right))
            ways[flip, down, right] = (image.flip(2) if flip else image)[:, rows][:, :, columns]
        (way,) = [key for key, moved in ways.items() if torch.allclose(view, moved, atol=1e-5)]
        found.add(way)
    assert 0.2 < np.mean([flip for flip, *_ in found]) < 0.8
    assert len(found) > 12


def test_positives_follow_the_soft_labels_and_ids_stay_whole() -> None:
    """P(j | i) is the sum over classes of p_i(c) p_j(c) / sum_k p_k(c); ids beyond 255 are not folded."""
    rng = np.random.default_rng(1)
    labels = rng.dirichlet(np.full(3, 0.5), 600).astype(np.float32)
    rows = np.arange(290, 302)
    pairs = SoftLabelPairs(RowNumbers(600), labels, rows)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([pairs.draw(torch.full((400,), 295), generator).positive for _ in range(50)])
    assert drawn.dtype == torch.int64
    share = np.bincount(drawn.numpy(), minlength=600)[rows] / len(drawn)
    mass = labels[rows].sum(0)
    expected = (labels[295] / mass) @ labels[rows].T
    itself = rows == 295
    once_more = expected[itself] * expected  # an anchor that drew itself draws once more
    expected = np.where(itself, expected[itself] ** 2, expected + once_more)
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / len(drawn)))


def test_negatives_of_hard_labels_are_true() -> None:
    labels = np.eye(10, dtype=np.float32)[np.arange(1000) % 10]
    pairs = SoftLabelPairs(RowNumbers(1000), labels, np.arange(1000))
    batch = pairs.draw(torch.arange(300, 364), torch.Generator().manual_seed(0))
    columns, has = draw_negatives(batch.negative, 16, torch.Generator().manual_seed(1))
    assert has.all()
    assert ((batch.anchor % 10)[:, None] != (batch.positive % 10)[columns]).all()
    assert (batch.anchor % 10 == batch.positive % 10).all()
