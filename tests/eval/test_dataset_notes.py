"""What is told beside image sets: equal images by their pixels, parts without shared classes, preprocessing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from posthoc.adapters.backbone import Backbone, build_backbone
from posthoc.adapters.data import open_source
from posthoc.adapters.errors import DataError
from posthoc.adapters.features import Features
from posthoc.eval import dataset_notes
from posthoc.eval.dataset_classes import CLASSES
from posthoc.eval.dataset_notes import PIXELS, hash_pixels, parts_by_class, pixel_keys, preprocessing_text
from posthoc.eval.inputs import Scored, from_features, overlap
from posthoc.eval.ood import check_overlap


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 5),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 4),
    )
    return build_backbone(net, transform=transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()]))


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 20, 20, 3), dtype=np.uint8)


def test_equal_images_are_found_whatever_their_batches_and_files(backbone, tmp_path):
    a, b = images(23), images(11, seed=1)
    b[[2, 7]] = a[[20, 4]]
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(b):
        Image.fromarray(image).save(tmp_path / f"photos/{i:02}.png")
    one = from_features("a", backbone.extract(a, batch_size=23))
    two = from_features("b", backbone.extract(str(tmp_path / "photos"), batch_size=1))
    assert overlap(one, two) == ([4, 20], [2, 7])
    assert check_overlap(one, [two]) == ["2 of 11 images of b are also in a (rows 2, 7)"]
    stored = [from_features(s.name, Features.load(s.features.folder)) for s in (one, two)]  # without their images
    assert overlap(*stored) == ([4, 20], [2, 7])
    part = from_features("part", two.features[[7, 3]])
    assert overlap(one, part) == ([4], [0])
    with pytest.raises(DataError, match="every image of copy is also in a"):
        check_overlap(one, [from_features("copy", backbone.extract(a[5:9], batch_size=2))])


def test_the_same_embedding_differs_between_batches_so_that_its_bytes_do_not_tell():
    """Why pixels are hashed: the last bits of one image's embedding depend on the size of the batch."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 64)
    x = torch.randn(64, 512)
    with torch.inference_mode():
        whole, alone = layer(x), torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(whole, alone)
    if torch.equal(whole, alone):
        pytest.skip("this processor's kernels do not depend on the batch")
    assert overlap(Scored("a", embedding=whole.numpy()), Scored("b", embedding=alone.numpy()))[0] != list(range(64))


def test_a_hash_is_of_the_decoded_pixels_and_shape(tmp_path):
    image = images(1)[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).save(tmp_path / "b.bmp")
    changed = image.copy()
    changed[0, 0, 0] ^= 1
    flat = image.reshape(10, 40, 3)
    made = [tmp_path / "a.png", tmp_path / "b.bmp"]
    files = hash_pixels(open_source(made), np.arange(2))
    arrays = hash_pixels(open_source([image, changed, flat]), np.arange(3))
    assert files[0] == files[1] == arrays[0]
    assert len({arrays[0], arrays[1], arrays[2]}) == 3
    grey = np.full((1, 6, 6), 9, np.uint8)
    assert hash_pixels(open_source(grey), np.arange(1)) == hash_pixels(
        open_source(grey[..., None].repeat(3, 3)), np.arange(1)
    )
    many = images(700, seed=3)  # several blocks, in order
    whole = hash_pixels(open_source(many), np.arange(700))
    assert (whole[[5, 300, 699]] == hash_pixels(open_source(many[[5, 300, 699]]), np.arange(3))).all()
    assert (hash_pixels(open_source(many), np.array([300, 5])) == whole[[300, 5]]).all()


def test_hashes_are_kept_with_the_features_and_made_again_when_damaged(backbone, monkeypatch):
    features = backbone.extract(images(6, seed=5))
    keys = pixel_keys(features)
    place = Path(features.folder) / PIXELS
    assert place.is_file()
    place.write_bytes(place.read_bytes()[:100])
    assert (pixel_keys(features) == keys).all()
    monkeypatch.setattr(dataset_notes, "hash_pixels", lambda *_: pytest.fail("decoded again"))
    assert (pixel_keys(features) == keys).all()
    assert (pixel_keys(features[1:3]) == keys[1:3]).all()
    assert backbone.extract(images(6, seed=5)).folder == features.folder  # the store is still whole
    place.unlink()
    assert pixel_keys(Features.load(features.folder)) is None
    assert pixel_keys(Features.from_arrays(np.ones((3, 2), np.float32))) is None


def test_pixels_of_images_that_were_not_skipped(backbone, tmp_path):
    for i, image in enumerate(images(4, seed=6)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped 1 image"):
        features = backbone.extract(str(tmp_path), on_error="skip")
    assert (pixel_keys(features) == hash_pixels(open_source(images(4, seed=6)), np.array([0, 2, 3]))).all()


def sets(inside: str | None, outside: str | None, label: np.ndarray | None) -> tuple[Scored, Scored]:
    rows = 6 if label is None else len(label)
    return (
        Scored("in", {"u": np.arange(3.0)}, dataset=inside),
        Scored("out", {"u": np.arange(float(rows))}, label=label, dataset=outside),
    )


def test_parts_with_and_without_shared_classes():
    names = CLASSES["tiny-imagenet"]
    frog, car, web = (names.index(wnid) for wnid in ("n01641577", "n04285008", "n04275548"))
    whole, part = parts_by_class(*sets("cifar10", "tiny-imagenet", np.array([web, frog, car, car, web])))
    assert (whole.name, part.name) == ("out, all images", "out without classes of cifar10")
    assert whole.rows == slice(None)
    assert part.rows.tolist() == [True, False, False, False, True]
    assert whole.notes[0].startswith("3 of the 5 images are of 2 classes that cifar10 has too")
    (back, rest) = parts_by_class(*sets("tiny-imagenet", "cifar10", np.arange(10)))
    assert np.flatnonzero(rest.rows).tolist() == [CLASSES["cifar10"].index(name) for name in ("airplane", "horse")]
    assert back.notes[0].startswith("8 of the 10 images are of 8 classes")


def test_there_is_one_part_where_nothing_or_all_is_shared():
    for inside, outside in (("cifar10", "dtd"), (None, "tiny-imagenet"), ("cifar10", None)):
        (only,) = parts_by_class(*sets(inside, outside, np.zeros(4, int)))
        assert only == ("out", slice(None), ())
    (only,) = parts_by_class(*sets("cifar10", "cifar100", np.array([0, 1])))
    assert only.notes == ()
    truck = CLASSES["cifar100"].index("pickup_truck")
    (only,) = parts_by_class(*sets("cifar10", "cifar100", np.array([truck, truck])))
    assert "nothing would be left" in only.notes[0]
    with pytest.raises(DataError, match="out shares classes with in, and has no labels"):
        parts_by_class(*sets("cifar10", "cifar100", None))


def test_preprocessing_in_one_line(backbone, tmp_path):
    timm = {"input_size": [3, 224, 260], "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "squash"}
    assert preprocessing_text(timm) == "resized to 224 x 260 pixels (bicubic, crop 0.875, squash)"
    assert preprocessing_text({}) is preprocessing_text(None) is None
    one = from_features("a", backbone.extract(images(4, seed=7)))
    (note,) = dataset_notes.preprocessing_notes([one, one])
    assert note.startswith("images went through Compose( Resize(size=(24, 24), interpolation=bilinear")
    assert "\n" not in note
    other = build_backbone(backbone.module, transform=transforms.Compose([transforms.ToTensor()]))
    two = from_features("b", other.extract(images(4, seed=7)))
    told = dataset_notes.preprocessing_notes([one, two, Scored("c", {"u": np.arange(2.0)})])
    assert [note.split(" went")[0] for note in told] == ["images of a", "images of b"]
    assert dataset_notes.preprocessing_notes([Scored("c", {"u": np.arange(2.0)})]) == []
