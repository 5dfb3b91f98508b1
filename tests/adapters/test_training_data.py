"""Nothing of the training data is in an adapter: no row of features, no image, in no file and at no place of it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

import posthoc
from posthoc.adapters import files
from posthoc.adapters.errors import DataError

from .seeded import numbers, tiny

ROWS = 60
NUMBER = re.compile(rb"-?\d+\.?\d*(?:[eE][-+]?\d+)?")
HEADS: dict[str, dict[str, Any]] = {
    "kappa": {},
    "kappa-norm": {"projection": None, "parametrization": "norm"},
    "temperature": {"base_temperature": 0.1},
    "loss": {},
    "laplace-kron": {"structure": "kron"},
    "laplace-diag": {"structure": "diag"},
    "laplace-full": {"structure": "full"},
    "laplace-probe": {"structure": "kron", "classifier": "probe"},
    "laplace-probe-diag": {"structure": "diag", "classifier": "probe"},
    "metric-laplace": {"dim": 4},
    "metric-laplace-online": {"dim": 4, "online": True},
    "metric-laplace-backbone": {"layer": "backbone"},
}


def to_tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 128 - 1


def data(rows: int = ROWS, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    label = np.arange(rows) % classes
    pixels = (numbers(rows, 9, 9, 3, key=3).numpy() + 0.5) * 200 + 20 * label[:, None, None, None]
    return pixels.astype(np.uint8), label


def found_rows(folder: Path, rows: np.ndarray, tolerance: float = 1e-4) -> list[str]:
    """Where a row of [N, D] stands in the folder's files: as bytes, as neighbouring numbers of a tensor or of a text."""
    places = []
    scale = np.abs(rows).mean()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for kind in (np.float16, np.float32, np.float64):
            places += [
                f"{path.name}: bytes of row {i}" for i, row in enumerate(rows) if row.astype(kind).tobytes() in content
            ]
        if path.name == files.WEIGHTS_NAME:
            tensors = load_file(path)
            runs = {name: value.ravel() for name, value in tensors.items()}
            runs |= {f"{name} transposed": value.T.ravel() for name, value in tensors.items() if value.ndim > 1}
        else:
            runs = {"text": np.array([float(number) for number in NUMBER.findall(content)])}
        for name, run in runs.items():
            if run.size < rows.shape[1]:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(run.astype(np.float64), rows.shape[1])
            for i, row in enumerate(rows):
                if (np.abs(windows - row).max(1) < tolerance * scale).any():
                    places.append(f"{path.name}: {name} holds row {i}")
    return places


def found_images(folder: Path, images: np.ndarray) -> list[str]:
    """Where a line of pixels of an image stands, as bytes or as numbers in a text."""
    places = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        text = b",".join(NUMBER.findall(content)) if path.name != files.WEIGHTS_NAME else b""
        for i, image in enumerate(images):
            for line in image.reshape(len(image), -1):
                prepared = (line.astype(np.float32) / 128 - 1).tobytes()
                numbers_of = ",".join(map(str, line.tolist())).encode()
                if line.tobytes() in content or prepared in content or numbers_of in text:
                    places.append(f"{path.name}: image {i}")
    return places


def fitted(name: str, folder: Path, given: Any, validation: float = 0.3) -> Any:
    head = next(known for known in posthoc.list_heads()[::-1] if name.startswith(known))
    model = posthoc.wrap(tiny(), head=head, transform=to_tensor, **HEADS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of small data, and of features in a cone
        model.fit(given, epochs=1, validation=validation, cache_dir=folder / "store")
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("name", HEADS)
def test_no_row_and_no_image_is_in_an_adapter(name: str, tmp_path: Path) -> None:
    pixels, label = data()
    model = fitted(name, tmp_path, (pixels, label))
    features = model.backbone.extract((pixels, label), cache_dir=tmp_path / "store")
    for field in ("embedding", "penultimate", "logits"):
        rows = np.asarray(getattr(features, field), dtype=np.float64)
        assert found_rows(tmp_path / "adapter", rows) == [], field
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert found_rows(tmp_path / "adapter", unit) == [], field
    assert found_images(tmp_path / "adapter", pixels) == []
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == sorted(
        [files.CARD_NAME, files.CONFIG_NAME, files.WEIGHTS_NAME]
    )
    told = (tmp_path / "adapter" / files.CONFIG_NAME).read_text() + (tmp_path / "adapter" / files.CARD_NAME).read_text()
    assert str(tmp_path) not in told


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 8))
    images = data(4)[0]
    save_file({"a": rows[2].astype(np.float32) + np.float32(1e-6)}, tmp_path / files.WEIGHTS_NAME)
    assert found_rows(tmp_path, rows) == ["adapter.safetensors: a holds row 2"]
    save_file({"a": np.stack([rows[1], rows[3]], 1).astype(np.float32)}, tmp_path / files.WEIGHTS_NAME)
    assert [place.split(": ")[1] for place in found_rows(tmp_path, rows)] == [
        "a transposed holds row 1",
        "a transposed holds row 3",
    ]
    (tmp_path / files.WEIGHTS_NAME).unlink()
    (tmp_path / files.CARD_NAME).write_text(f"{rows[4].round(6).tolist()}")
    assert found_rows(tmp_path, rows) == ["README.md: text holds row 4"]
    assert found_images(tmp_path, images) == []
    (tmp_path / files.CARD_NAME).write_text(f"{images[3, 2].tolist()}")
    assert set(found_images(tmp_path, images)) == {"README.md: image 3"}
    (tmp_path / "more").write_bytes(b"x" + images[1].tobytes())
    assert "more: image 1" in found_images(tmp_path, images)


def test_a_fit_on_one_row_whose_mean_is_the_row_is_refused(tmp_path: Path) -> None:
    for name in HEADS:
        with pytest.raises(DataError):
            fitted(name, tmp_path, data(2, classes=2), validation=0.5)
    with pytest.raises(DataError, match="leaves one of 2 rows to fit"):
        fitted("laplace-probe", tmp_path, data(2, classes=2), validation=0.5)


@pytest.mark.parametrize("name", ["laplace-probe", "laplace-full", "metric-laplace"])
def test_of_two_fitting_rows_neither_is_stored(name: str, tmp_path: Path) -> None:
    pixels, label = data(3, classes=2)
    model = fitted(name, tmp_path, (pixels, label), validation=0.5)
    assert model.fitted_on["fit"]["rows"] == 2
    rows = np.asarray(model.backbone.extract((pixels, label), cache_dir=tmp_path / "store").embedding, dtype=np.float64)
    assert found_rows(tmp_path / "adapter", rows) == []
    assert found_rows(tmp_path / "adapter", rows / np.linalg.norm(rows, axis=1, keepdims=True)) == []
