"""Small data sets that recipes are run on in tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from posthoc.recipes.digits import load_digits


def write_idx(raw: Path, part: str, images: np.ndarray, label: np.ndarray) -> None:
    """One part (train or t10k) of a set in the folder `raw`, in MNIST's two files: images uint8 [N, H, W], labels [N]."""
    raw.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", label.astype(np.uint8))):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (raw / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())


def write_digits(data: Path) -> None:
    """1,400 of scikit-learn's digits, of 16 x 16 px, and 397 others to test on, in the place of FashionMNIST."""
    digits = load_digits(known=10)
    pixels = np.stack([np.asarray(one) for one in digits.images]).repeat(2, 1).repeat(2, 2)
    order = np.random.default_rng(0).permutation(len(pixels))
    for part, rows in (("train", order[:1400]), ("t10k", order[1400:])):
        write_idx(data / "FashionMNIST" / "raw", part, pixels[rows], digits.label[rows])
