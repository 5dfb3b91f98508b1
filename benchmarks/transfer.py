"""Zero-shot transfer: heads fitted on Tiny ImageNet features of EfficientNet-Lite0, on four data sets they have not seen.

    python benchmarks/transfer.py --shared ../shared --data outputs/data --output outputs/transfer

Prints the Markdown tables of docs/results.md and writes them as JSON. Heads are fitted, once, on 8,000 of the 10,000 validation
photos of Tiny ImageNet (labels: the network's own 1,000 classes, so that its decisions can be right or wrong); kNN and detectors
have the same photos, and a temperature is fitted on the other 2,000. `--rows`
images of CIFAR-10's test set (with the votes of CIFAR-10H), of DTD and of notMNIST, and whole characters of
Omniglot up to as many, are read at the network's 224 pixels, whole and cropped. Nothing is fitted or chosen on them.

With 2,000 rows and four crops some 33,000 images go through the network. Features are kept, and what is there is not
computed again.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10 import cifar10_test, idx_images
from laplace_imagenet import imagenet_index, lite, photos

import posthoc
from posthoc.adapters.files import replace_file
from posthoc.adapters.model import UncertainModel
from posthoc.eval.ambiguity import FRACTIONS, crop_scores
from posthoc.eval.inputs import Scored, from_features
from posthoc.eval.table import Table, render
from posthoc.eval.transfer import transfer_table

HEADS = ["kappa", "temperature", "loss", "laplace", "metric-laplace"]
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"base_temperature": 0.1},  # its search by blur would run the network
    "loss": {"classifier": "backbone"},
    "laplace": {"classifier": "backbone"},
}


def fitted(arguments: argparse.Namespace) -> tuple[UncertainModel, Scored, Scored]:
    """The heads on Tiny ImageNet, the features they were fitted on, and held-out ones."""
    tiny = photos(arguments.shared, "tiny_imagenet_val")
    backbone = lite(0, arguments.shared, arguments.data)
    features = backbone.extract(tiny, cache_dir=arguments.data / "features")
    index = imagenet_index(tiny.features["label"].names)
    features = dataclasses.replace(features, label=index[np.asarray(features.label)])
    order = np.random.default_rng(arguments.seed).permutation(len(features))
    train, held_out = features[np.sort(order[:8000])], features[np.sort(order[8000:])]
    options = {name: OPTIONS[name] for name in arguments.heads if name in OPTIONS}
    model = posthoc.wrap(backbone, arguments.heads, **options).fit(train, positives="labels", seed=arguments.seed)
    return model, from_features("tiny-imagenet", train), from_features("tiny-imagenet (others)", held_out)


def sets(arguments: argparse.Namespace) -> dict[str, tuple[Any, np.ndarray | None]]:
    """Images with labels, and votes where there are any, by name; rows drawn by the seed."""
    generator = np.random.default_rng(arguments.seed)

    def some(rows: int) -> np.ndarray:
        return np.sort(generator.permutation(rows)[: arguments.rows])

    images, label = cifar10_test(arguments.shared, arguments.data)
    chosen = some(len(label))
    votes = np.load(arguments.shared / "data/cifar10h-counts.npy")
    found: dict[str, tuple[Any, np.ndarray | None]] = {"CIFAR-10": ((images[chosen], label[chosen]), votes[chosen])}
    textures = photos(arguments.shared, "dtd_textures_600_256px")
    found["DTD"] = (textures.select(some(len(textures))), None)
    drawings = photos(arguments.shared, "omniglot_8_alphabets")
    classes = np.asarray(drawings["label"])
    order = generator.permutation(np.unique(classes))
    kept = order[: max(2, arguments.rows // int((classes == classes[0]).sum()))]
    found["Omniglot"] = (drawings.select(np.flatnonzero(np.isin(classes, kept))), None)
    letters = idx_images(arguments.shared / "data/notmnist-t10k-images-idx3-ubyte.gz")
    chosen = some(len(letters))
    found["notMNIST"] = ((letters[chosen], letter_labels(arguments.shared)[chosen]), None)
    return found


def letter_labels(shared: Path) -> np.ndarray:
    """int64 [N] from MNIST's file format."""
    import gzip

    path = shared / "data/notmnist-t10k-labels-idx1-ubyte.gz"
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=8).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with golden numbers and data")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="where weights and features are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/transfer"))
    parser.add_argument("--heads", nargs="+", default=HEADS, help="to be fitted")
    parser.add_argument("--rows", type=int, default=2000, help="images of each data set, at most")
    parser.add_argument("--fractions", type=float, nargs="*", default=list(FRACTIONS), help="sides of the crops")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of rows, fits, random scores and bootstrap")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model, train, held_out = fitted(arguments)
    made: list[Table] = []
    for name, (data, votes) in sets(arguments).items():
        cache = arguments.data / "features"
        one, scores, notes = crop_scores(
            model, data, arguments.fractions, train=train, held_out=held_out, cache_dir=cache
        )
        table = transfer_table(
            scores, one.embedding, one.label, votes=votes, fractions=arguments.fractions, name=name,
            resamples=arguments.resamples, seed=arguments.seed,
        )  # fmt: skip
        made.append(dataclasses.replace(table, notes=(*table.notes, *notes)))
        print(made[-1].markdown() + "\n", flush=True)
        replace_file(arguments.output / "transfer.json", (render(made, "json") + "\n").encode())
    print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
