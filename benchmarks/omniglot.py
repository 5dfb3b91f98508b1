"""Retrieval among alphabets that nothing was fitted on: Omniglot, and which scores know when the neighbour is wrong.

    python benchmarks/omniglot.py --shared ../shared --output outputs/omniglot

A small network is trained here on the 136 characters of "small 1" (5 alphabets, images of 28 x 28, ink bright), and the heads on
its features of the same images. Then every image of "small 2" (3 other alphabets, 106 characters) queries all the others of
it. Raw pixels stand beside the network. A seed changes network, heads and bootstrap. About 5 minutes a seed on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

import posthoc
from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.training import TrainOptions
from posthoc.eval.inputs import from_features
from posthoc.eval.results import read_run
from posthoc.eval.retrieval import embedding_table, retrieve, score_table
from posthoc.eval.score_rows import score_all
from posthoc.eval.search import directions
from posthoc.eval.table import Table, over_seeds, render
from posthoc.recipes.classifier import ClassifierOptions, as_input, train_classifier
from posthoc.recipes.networks import SmallConvNet

HEADS = ["kappa", "temperature", "loss", "laplace", "metric-laplace"]
SIDE, STEPS, RESAMPLES = 28, 800, 500


def drawings(shared: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 28, 28] and labels 0, 1, ... of the characters of one split."""
    path = str(shared / "data/omniglot_8_alphabets.parquet")
    rows = datasets.load_dataset("parquet", data_files=path, split="train")
    rows = rows.select(np.flatnonzero(np.array(rows["split"]) == f"background_{split}"))
    resized = [one.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for one in rows["image"]]
    return 255 - np.stack([np.asarray(one) for one in resized]), np.unique(rows["label"], return_inverse=True)[1]


def run(shared: Path, seed: int) -> list[Table]:
    seen, label = drawings(shared, "small1")
    torch.manual_seed(seed)
    network = SmallConvNet(1, int(label.max()) + 1)
    options = TrainOptions(batch_size=128, seed=seed)
    train_classifier(network, seen, label, classifier=ClassifierOptions(steps=STEPS), options=options)
    backbone = build_backbone(network.eval(), transform=lambda image: as_input(np.asarray(image.convert("L"))[None])[0])
    training = backbone.extract((seen, label), batch_size=512)
    model = posthoc.wrap(backbone, HEADS).fit(training, seed=seed, batch_size=256)
    images, character = drawings(shared, "small2")
    one = from_features("Omniglot", backbone.extract((images, character), batch_size=512), model)
    (scores,), notes = score_all([one], from_features("training images", training))
    common = {"name": "Omniglot", "resamples": RESAMPLES, "seed": seed}
    found = retrieve(directions("embedding", one.embedding), character)
    pixels = retrieve(directions("pixels", images.reshape(len(images), -1).astype(np.float32)), character)
    table = score_table({"distance": found.distance, **scores}, found, gallery_scores=scores, **common)
    return [
        embedding_table(pixels, **common | {"name": "Omniglot, raw pixels"}),
        embedding_table(found, **common | {"name": "Omniglot, small network"}),
        table.noted(*notes),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with the drawings")
    parser.add_argument("--output", type=Path, default=Path("outputs/omniglot"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in arguments.seeds:
        path = arguments.output / f"seed{seed}.json"
        if not path.exists():
            path.write_text(render(run(arguments.shared, seed), "json") + "\n")
        runs.append(read_run(path))
    print(render([over_seeds(tables) for tables in zip(*runs, strict=True)], "markdown"))


if __name__ == "__main__":
    main()
