"""Heads against free scores on CIFAR-10: ambiguity, unseen data, calibration, crops; each image scored out of fold.

    python benchmarks/cifar10.py --shared ../shared --data DATA --output outputs/cifar10 --backbone 20
    python benchmarks/cifar10_tables.py outputs/cifar10

The first line fits and scores (on 2 cores about 25 minutes for ResNet-20 and five seeds), one file a seed, and goes on
where it was stopped; the second makes the tables of docs/results.md. DATA is where `shared/data/get_data.py` has put
CIFAR-10 (it is called when the file is missing). The backbones are the pretrained ResNet-20 and ResNet-56, as modules
of one's own.

The 10,000 TEST images are split in 5 folds by the seed. The heads of a fold are fitted on the other four (a tenth of
which is held out for early stopping), and score the fold, crops of it, and the images of the OOD sets. So every test
image is scored by heads that have not seen it, and no OOD image plays any part in a fit. kNN and temperature scaling
are fitted on the same rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

import posthoc
from posthoc.adapters.backbone import Backbone, build_backbone
from posthoc.adapters.features import Features
from posthoc.adapters.linear_probe import fit_linear_probe
from posthoc.adapters.model import UncertainModel
from posthoc.adapters.perturbations import CROP_FRACTIONS, center_crop
from posthoc.adapters.scoring import feature_batches
from posthoc.eval.baselines import entropy, fit_temperature, free_scores
from posthoc.eval.dataset_classes import shared_classes
from posthoc.recipes.networks import CifarResNet

FOLDS, CROPPED, NEIGHBOURS, BATCH = 5, 2000, 50, 256


def resnet(depth: int, shared: Path) -> Backbone:
    """The pretrained CIFAR network as a module of one's own."""
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return build_backbone(
        CifarResNet(depth),
        checkpoint=shared / f"data/cifar10_resnet{depth}.safetensors",
        transform=transforms.Compose([transforms.ToTensor(), normalise]),
    )


def cifar10_test(shared: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Test images uint8 [10000,32,32,3] and labels int64."""
    if not (data / "cifar10.npz").exists():
        sys.path.insert(0, str(shared / "data"))
        import get_data

        data.mkdir(parents=True, exist_ok=True)
        get_data.cifar10(data)
    arrays = np.load(data / "cifar10.npz")
    return arrays["x_test"], arrays["y_test"].astype(np.int64)


def ood_images(shared: Path) -> dict[str, np.ndarray]:
    """The OOD sets as RGB images of 32 x 32 (bilinear); the Tiny ImageNet classes CIFAR-10 has are a mask beside it."""
    tiny = datasets.load_dataset("parquet", data_files=str(shared / "data/tiny_imagenet_val.parquet"), split="train")
    dtd = datasets.load_dataset(
        "parquet", data_files=str(shared / "data/dtd_textures_600_256px.parquet"), split="train"
    )
    letters = idx_images(shared / "data/notmnist-t10k-images-idx3-ubyte.gz")
    names, shared_ids = tiny.features["label"].names, shared_classes("cifar10", "tiny-imagenet")
    return {
        "tiny-imagenet": np.stack([small(image) for image in tiny["image"]]),
        "dtd": np.stack([small(image) for image in dtd["image"]]),
        "notmnist": np.stack([small(Image.fromarray(image)) for image in letters]),
        "overlap": np.array([names[label] in shared_ids for label in tiny["label"]]),
    }


def small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))


def idx_images(path: Path) -> np.ndarray:
    """uint8 [N, 28, 28] from MNIST's file format."""
    import gzip

    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)


@dataclasses.dataclass
class Stored:
    """Features of everything that is scored; each image has been through the backbone once."""

    test: Features
    crops: list[Features]
    cropped: np.ndarray
    ood: dict[str, Features]


def extract_all(backbone: Backbone, shared: Path, data: Path) -> tuple[Stored, np.ndarray]:
    """Features of the test images, of 2,000 of them cropped, and of the OOD sets; with the mask of shared classes."""
    images, label = cifar10_test(shared, data)
    cropped = np.sort(np.random.default_rng(0).permutation(len(images))[:CROPPED])
    crops = [
        np.stack([np.asarray(center_crop(Image.fromarray(images[i]), fraction)) for i in cropped])
        for fraction in CROP_FRACTIONS
    ]
    sets = ood_images(shared)
    overlap = sets.pop("overlap")
    cache = data / "features"
    stored = Stored(
        backbone.extract((images, label), cache_dir=cache),
        [backbone.extract(one, cache_dir=cache) for one in crops],
        cropped,
        {name: backbone.extract(one, cache_dir=cache) for name, one in sets.items()},
    )
    return stored, overlap


def folds(rows: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and rows to score, five times."""
    fold = np.empty(rows, dtype=np.int64)
    fold[np.random.default_rng(seed).permutation(rows)] = np.arange(rows) % FOLDS
    for k in range(FOLDS):
        yield np.flatnonzero(fold != k), np.flatnonzero(fold == k)


class Scorer:
    """Heads and free scores fitted on the rows of one fold."""

    def __init__(self, backbone: Backbone, fitting: Features, votes: np.ndarray, seed: int) -> None:
        self.fitting = fitting
        soft = dataclasses.replace(fitting, label=votes)
        four = ["kappa", "temperature", "loss", "laplace"]
        options = {"seed": seed, "batch_size": BATCH}
        self.models = {
            "soft": posthoc.wrap(backbone, ["kappa"]).fit(soft, positives="soft-labels", **options),
            "": posthoc.wrap(backbone, four).fit(fitting, **options),
            "diag": posthoc.wrap(backbone, "laplace", structure="diag").fit(fitting, **options),
        }
        assert fitting.label is not None
        self.temperature = fit_temperature(fitting.logits, fitting.label)
        self.probe = fit_linear_probe(fitting.embedding, votes, seed=seed)

    def scores(self, features: Features) -> dict[str, np.ndarray]:
        """By score, [N], higher = less certain; log probabilities [N, C] under "log-p ..."; heads' percentiles too."""
        logits = np.asarray(features.logits)
        result = free_scores(logits, features.embedding, self.fitting.embedding, k=NEIGHBOURS)
        result["entropy, T scaled"] = entropy(logits / self.temperature)
        result["entropy of a vote probe"] = entropy(
            np.asarray(features.embedding) @ self.probe.weight.numpy().T + self.probe.bias.numpy()
        )
        result["log-p softmax"], result["log-p T scaled"] = logits, logits / self.temperature
        for kind, model in self.models.items():
            result |= head_scores(model, kind, features)
        return result


def head_scores(model: UncertainModel, kind: str, features: Features) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {}
    for _, batch in feature_batches(features, np.arange(len(features)), model.device):
        with torch.no_grad():
            prediction = model.answer(batch)
        for name in model.heads:
            one, label = prediction[name], f"{name} ({kind})" if kind else name
            parts.setdefault(label, []).append(one.uncertainty.numpy())
            parts.setdefault(f"percentile {label}", []).append(one.percentile.numpy())
            if name == "laplace":
                parts.setdefault(f"log-p {label}", []).append(one.probabilities.clamp(min=1e-30).log().numpy())
                parts.setdefault(f"{label} mutual information", []).append(one.mutual_information.numpy())
                parts.setdefault(f"{label} variance", []).append(one.variance.mean(1).numpy())
    return {name: np.concatenate(part) for name, part in parts.items()}


def one_seed(backbone: Backbone, stored: Stored, votes: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Scores "test/NAME" [10000], "crops/NAME" [2000, S], "SET/NAME" [5, M] (by each fold's heads), "fold" [10000]."""
    rows = len(stored.test)
    result: dict[str, np.ndarray] = {"fold": np.zeros(rows, dtype=np.int64)}

    def keep(place: str, name: str, shape: tuple[int, ...], at: object, values: np.ndarray) -> None:
        result.setdefault(f"{place}/{name}", np.full(shape, np.nan, dtype=np.float32))[at] = values

    for k, (fitting, scored) in enumerate(folds(rows, seed)):
        scorer = Scorer(backbone, stored.test[fitting], votes[fitting].astype(np.float32), seed)
        result["fold"][scored] = k
        for name, values in scorer.scores(stored.test[scored]).items():
            keep("test", name, (rows, *values.shape[1:]), scored, values)
        mine = np.flatnonzero(np.isin(stored.cropped, scored))
        for s, crop in enumerate(stored.crops):
            for name, values in scorer.scores(crop[mine]).items():
                if not name.startswith("log-p"):
                    keep("crops", name, (CROPPED, len(stored.crops)), (mine, s), values)
        for place, features in stored.ood.items():
            for name, values in scorer.scores(features).items():
                if not name.startswith("log-p"):
                    keep(place, name, (FOLDS, len(features)), k, values)
        chosen = {name: report.get("base_temperature") for name, report in scorer.models[""].report.items()}
        print(f"seed {seed}, fold {k}: base temperature {chosen['temperature']}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with golden numbers and data")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="where CIFAR-10 and features are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/cifar10"))
    parser.add_argument("--backbone", type=int, nargs="+", default=[20, 56], help="depths of the networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("default")
    votes = np.load(arguments.shared / "data/cifar10h-probs.npy")
    for depth in arguments.backbone:
        folder = arguments.output / f"resnet{depth}"
        folder.mkdir(parents=True, exist_ok=True)
        backbone = resnet(depth, arguments.shared)
        stored, overlap = extract_all(backbone, arguments.shared, arguments.data)
        common = {"label": stored.test.label, "votes": votes, "overlap": overlap}
        for seed in arguments.seeds:
            path = folder / f"seed{seed}.npz"
            if path.exists():
                continue
            part = path.with_suffix(f".{os.getpid()}.part.npz")
            np.savez(part, **common, **one_seed(backbone, stored, votes, seed))
            part.replace(path)


if __name__ == "__main__":
    main()
