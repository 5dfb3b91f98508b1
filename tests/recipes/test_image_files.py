"""Images that stay in their files: what threads read, how much of it is decoded, where views are made."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc.adapters.errors import DataError
from posthoc.adapters.training_loop import step_generator
from posthoc.recipes import image_files
from posthoc.recipes.augmentations import Augmentation, Parameters
from posthoc.recipes.image_files import FileImages, in_threads, open_image, threads

from .test_lam_data import picture


def test_threads_stay_and_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [set(in_threads(lambda _: threading.current_thread().name, range(50))) for _ in range(2)]
    assert all(name.startswith("images_") for name in names[0] | names[1])
    assert len(names[0] | names[1]) <= threads(), "no new ones for the second batch"
    assert in_threads(lambda x: x * x, range(100)) == [x * x for x in range(100)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)), raising=False)
    for processes, expected in (("1", 24), ("4", 6), ("24", 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert threads() == expected


def test_a_large_jpeg_is_decoded_no_larger_than_it_must_be(tmp_path: Path) -> None:
    picture(tmp_path / "large.jpg", 0, (400, 500))
    assert [open_image(tmp_path / "large.jpg", least).size for least in (None, 400, 201, 200, 100, 51)] == [
        (500, 400), (500, 400), (500, 400), (250, 200), (125, 100), (125, 100),
    ]  # fmt: skip
    picture(tmp_path / "large.png", 0, (400, 500))
    assert open_image(tmp_path / "large.png", 20).size == (500, 400)
    (tmp_path / "none.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none\.jpg cannot be read as an image"):
        open_image(tmp_path / "none.jpg", 20)


@pytest.mark.parametrize("scale", [0.08, 0.5])
def test_what_is_decoded_has_the_pixels_of_every_view(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest box of a view keeps the view's own pixels, where the file has them."""
    picture(tmp_path / "large.jpg", 0, (480, 550))
    images = FileImages([tmp_path / "large.jpg"] * 40, np.arange(40), 24)
    boxes, before = [], image_files.crop

    def cropped(image: torch.Tensor, done: Parameters, size: tuple[int, int]) -> torch.Tensor:
        boxes.append((image.shape[1], int(done.box[0, 2:].min())))
        return before(image, done, size)

    monkeypatch.setattr(image_files, "crop", cropped)
    images.views(np.arange(40), Augmentation(scale=(scale, 1.0)), [step_generator(0)], 2)
    assert {height for height, _ in boxes} == {60 if scale > 0.1 else 120}
    assert min(side for _, side in boxes) >= 24


def test_views_are_made_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(2):
        picture(tmp_path / f"{k}.png", k, (30, 40))
    images = FileImages([tmp_path / f"{k}.png" for k in range(2)], np.arange(2), 8)
    monkeypatch.setattr(image_files, "change", lambda views, done: views)  # which knows no device without numbers
    for place in ("cpu", "meta"):
        there = images.to(torch.device(place))
        assert there.views(np.arange(2), Augmentation(), [step_generator(0)]).device.type == place
        assert there.plain(np.arange(2)).device.type == place
