"""Every head beside every free score and detector, on four kinds of data: the wide tables of docs/results.md.

    python benchmarks/evaluation.py --shared ../shared --data outputs/data --output outputs/evaluation

Parts: `cifar10` (the pretrained ResNet-20 and -56 against Tiny ImageNet, DTD, notMNIST), `fashion-mnist` (a small network
trained here, against MNIST and notMNIST), `tiny-imagenet` (EfficientNet-Lite0/1/2 with their own classifier, 1000-way and
200-way, and ImageNet photos against DTD). The labelled images the backbone was not trained on are split in halves of each
class by the seed; heads, temperature and settings ("tuned") are fitted on one half and score the other, and back: two runs
a seed. kNN and detectors are fitted on training features (Tiny ImageNet: on a quarter of the photos, temperature and
settings on another, for the networks' training images are not here). No OOD image plays any part in a fit. Values are means
over runs with their standard deviation.

Test-time augmentation stands on 4 stored views of every image that is scored; of the photos in `tiny-imagenet`, which cost an
hour a network, only EfficientNet-Lite0's OOD table has it.

On 2 cores about 10 minutes a network beyond the extraction of features; what is there is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from cifar10 import BATCH, extract_all, ood_images, resnet
from laplace_imagenet import halves, imagenet_index, lite, photos
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.datasets import MNIST, FashionMNIST

import posthoc
from posthoc.adapters.backbone import Backbone, build_backbone
from posthoc.adapters.features import Features
from posthoc.adapters.model import UncertainModel
from posthoc.adapters.scoring import feature_batches
from posthoc.adapters.training import TrainOptions
from posthoc.eval.augmentation import augmented_scores
from posthoc.eval.calibration import calibration_table
from posthoc.eval.inputs import Scored, from_features
from posthoc.eval.ood import ood_table
from posthoc.eval.results import read_run
from posthoc.eval.scaling import scaled
from posthoc.eval.score_rows import score_all
from posthoc.eval.selective import selective_table
from posthoc.eval.table import Cell, Table, over_seeds, render
from posthoc.recipes.classifier import as_input, train_classifier
from posthoc.recipes.networks import SmallConvNet

HEADS = ["kappa", "temperature", "loss", "laplace", "metric-laplace"]
RESAMPLES, VIEWS = 200, 4


@dataclass
class Experiment:
    """Stored features: labelled ones to split and score, OOD sets, and what training-free detectors are fitted on.

    `train`: None: the fitting half. `inside`: ID images of the OOD tables where they are not the scored half. `views`:
    augmented views of the test images (under the experiment's name, if there are any), of `inside` and of OOD sets. `options`:
    of heads.
    """

    name: str
    backbone: Backbone
    test: Features
    ood: dict[str, Features]
    views: dict[str, Features]
    train: Features | None = None
    inside: tuple[str, Features] | None = None
    near: list[str] = field(default_factory=list)
    options: dict[str, dict] = field(default_factory=dict)


def run(experiment: Experiment, fitting: np.ndarray, scored: np.ndarray, seed: int) -> list[Table]:
    """Tables of one half: one for each OOD set, selective prediction, calibration."""
    model = posthoc.wrap(experiment.backbone, HEADS, **experiment.options)
    model.fit(experiment.test[fitting], seed=seed, batch_size=BATCH)
    half = from_features(experiment.name, experiment.test[scored], model)
    if experiment.train is None:  # detectors on one part of the other half, temperature and settings on the rest
        train = from_features("a quarter", experiment.test[fitting[::2]])
        held_out = from_features("another quarter", experiment.test[fitting[1::2]])
    else:
        train = from_features("training images", experiment.train)
        held_out = from_features(f"{experiment.name} (other half)", experiment.test[fitting])
    inside = half if experiment.inside is None else from_features(*experiment.inside, model)
    outside = [from_features(name, features, model) for name, features in experiment.ood.items()]
    rows, notes = score_all([half, inside, *outside], train, held_out=held_out, tuned=True)
    _augment(rows, experiment, scored)
    assert half.correct is not None
    wrong = ~half.correct if experiment.inside is None else None
    options = {"resamples": RESAMPLES, "seed": seed}
    tables = [
        ood_table(
            rows[1],
            scores,
            name=one.name,
            kind="near" if one.name in experiment.near else "far",
            wrong=wrong,
            **options,
        )
        for scores, one in zip(rows[2:], outside, strict=True)
    ]
    tables.append(selective_table(rows[0], ~half.correct, name="mistakes", **options))
    tables.append(_calibration(model, half, held_out, options))
    return [replace(table, notes=(*table.notes, *notes)) for table in tables]


def _augment(rows: list[dict[str, np.ndarray]], experiment: Experiment, scored: np.ndarray) -> None:
    """Adds the rows of test-time augmentation wherever there are views."""
    views = {name: one[scored] if name == experiment.name else one for name, one in experiment.views.items()}
    inside = experiment.name if experiment.inside is None else experiment.inside[0]
    made = dict(zip(views, augmented_scores(list(views.values())), strict=True))
    for scores, name in zip(rows, [experiment.name, inside, *experiment.ood], strict=True):
        scores |= made.get(name, {})


def _calibration(model: UncertainModel, half: Scored, held_out: Scored, options: dict[str, int]) -> Table:
    """The softmax as it is and scaled, and the predictive of the head `laplace`."""
    assert half.label is not None
    values = {"softmax": np.asarray(half.logits)} | scaled(half.logits, held_out.logits, held_out.label)
    batches = feature_batches(half.features, np.arange(half.rows), model.device)
    with torch.no_grad():
        p = torch.cat([model.answer(batch)["laplace"].probabilities for _, batch in batches])
    values["laplace"] = p.clamp(min=1e-30).log().numpy()
    return calibration_table(values, half.label, **options)


def cifar10(shared: Path, data: Path) -> Iterator[Experiment]:
    arrays = np.load(data / "cifar10.npz") if (data / "cifar10.npz").exists() else None
    for depth in (20, 56):
        backbone = resnet(depth, shared)
        stored, shared_classes = extract_all(backbone, shared, data)
        arrays = np.load(data / "cifar10.npz") if arrays is None else arrays
        train = backbone.extract((arrays["x_train"], arrays["y_train"].astype(np.int64)), cache_dir=data / "features")
        ood = dict(stored.ood)
        name, images = f"CIFAR-10, ResNet-{depth}", ood_images(shared)
        images |= {name: arrays["x_test"], "tiny-imagenet": images["tiny-imagenet"][~shared_classes]}
        ood["tiny-imagenet"] = ood["tiny-imagenet"][~shared_classes]
        views = {one: backbone.extract(images[one], views=VIEWS, cache_dir=data / "features") for one in (name, *ood)}
        yield Experiment(name, backbone, stored.test, ood, views, train, near=["tiny-imagenet"])


def fashion_mnist(shared: Path, data: Path) -> Iterator[Experiment]:
    train, test = FashionMNIST(data, train=True), FashionMNIST(data, train=False)
    path = data / "fashion_mnist_small.safetensors"
    torch.manual_seed(0)
    network = SmallConvNet(1, 10)
    if path.exists():
        network.load_state_dict(load_file(path))
    else:
        options = TrainOptions(epochs=3, batch_size=128)
        train_classifier(network, train.data.numpy(), train.targets.numpy(), options=options)
        save_file(network.state_dict(), path)
    backbone = build_backbone(network.eval(), transform=lambda image: as_input(np.asarray(image.convert("L"))[None])[0])
    cache = {"cache_dir": data / "features", "batch_size": 512}
    letters = np.frombuffer(_unzipped(shared / "data/notmnist-t10k-images-idx3-ubyte.gz"), np.uint8, offset=16)

    def features(images: np.ndarray, label: np.ndarray | None = None, views: int = 1) -> Features:
        return backbone.extract(images if label is None else (images, label), views=views, **cache)

    ood = {"mnist": MNIST(data, train=False).data.numpy(), "notmnist": letters.reshape(-1, 28, 28)}
    yield Experiment(
        "FashionMNIST",
        backbone,
        features(test.data.numpy(), test.targets.numpy()),
        {name: features(images) for name, images in ood.items()},
        {name: features(images, views=VIEWS) for name, images in {"FashionMNIST": test.data.numpy(), **ood}.items()},
        features(train.data.numpy(), train.targets.numpy()),
    )


def _unzipped(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def tiny_imagenet(shared: Path, data: Path) -> Iterator[Experiment]:
    tiny = photos(shared, "tiny_imagenet_val")
    index = imagenet_index(tiny.features["label"].names)
    scored = {
        "ImageNet photos": photos(shared, "imagenet_samples_1000_256px"),
        "dtd": photos(shared, "dtd_textures_600_256px"),
    }
    for size in (0, 1, 2):
        backbone = lite(size, shared, data)
        cache = {"cache_dir": data / "features"}
        found = [backbone.extract(images, **cache) for images in (tiny, *scored.values())]
        viewed = scored if size == 0 else {}
        augmented = {name: backbone.extract(images, views=VIEWS, **cache) for name, images in viewed.items()}
        label = np.asarray(found[0].label)
        for ways in (1000, 200):
            network, rows = (backbone, np.arange(1000)) if ways == 1000 else (_sliced(backbone, index), index)
            test, inside, dtd = (_columns(one, rows, network) for one in found)
            views = {name: _columns(one, rows, network) for name, one in augmented.items()}
            test = replace(test, label=index[label] if ways == 1000 else label)
            yield Experiment(
                f"Tiny ImageNet, EfficientNet-Lite{size}, {ways}-way",
                network, test, {"dtd": replace(dtd, label=None)}, views, inside=("ImageNet photos", replace(inside, label=None)),
                options={
                    "temperature": {"base_temperature": 0.1},  # its search by blur would run the network
                    "loss": {"classifier": "backbone"}, "laplace": {"classifier": "backbone"},
                },
            )  # fmt: skip


def _sliced(backbone: Backbone, rows: np.ndarray) -> Backbone:
    """The same network with some of its classes only."""
    module, layer = copy.deepcopy(backbone.module), backbone.classifier()
    module.classifier = nn.Linear(layer.in_features, len(rows))
    module.classifier.weight.data.copy_(layer.weight.detach()[rows])
    module.classifier.bias.data.copy_(layer.bias.detach()[rows])
    return build_backbone(module, transform=backbone.transform)


def _columns(features: Features, rows: np.ndarray, backbone: Backbone) -> Features:
    """Features as that network gives them: the same images, some of the logits."""
    return replace(
        features, logits=np.asarray(features.logits)[..., rows], backbone_fingerprint=backbone.fingerprint("logits")
    )


PARTS: dict[str, Callable[[Path, Path], Iterator[Experiment]]] = {
    "cifar10": cifar10,
    "fashion-mnist": fashion_mnist,
    "tiny-imagenet": tiny_imagenet,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with golden numbers and data")
    parser.add_argument("--data", type=Path, default=Path("outputs/data"), help="where data sets and features are kept")
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for part in arguments.parts:
        for experiment in PARTS[part](arguments.shared, arguments.data):
            tables = tables_of(experiment, arguments.output, arguments.seeds)
            print(f"\n### {experiment.name}\n\n{summary(tables)}\n\n{render(tables[-1:], 'markdown')}", flush=True)


def tables_of(experiment: Experiment, output: Path, seeds: list[int]) -> list[Table]:
    """The experiment's tables over all runs; each run's are kept as the commands keep theirs."""
    output.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in seeds:
        for k, (fitting, scored) in enumerate(halves(np.asarray(experiment.test.label), seed)):
            path = output / f"{experiment.name.replace(', ', '-').replace(' ', '-').lower()}-{seed}-{k}.json"
            if not path.exists():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # a head's doubts are in its report
                    path.write_text(render(run(experiment, fitting, scored, seed), "json") + "\n")
            runs.append([_same_rows(table) for table in read_run(path)])
    joined = [over_seeds(tables) for tables in zip(*runs, strict=True)]
    told = f"over {len(runs)} runs: {len(seeds)} seed(s), two halves each; intervals"
    return [
        replace(t, notes=(*t.notes[:-1], t.notes[-1].replace(f"over {len(runs)} seeds; intervals", told)))
        for t in joined
    ]


def _same_rows(table: Table) -> Table:
    """Tuned rows without the value that was chosen, which differs by run."""
    return replace(table, cells={name.split(" (tuned")[0] + " (tuned)" if " (tuned" in name else name: row
                                 for name, row in table.cells.items()})  # fmt: skip


def summary(tables: list[Table]) -> str:
    """One line for each score: AUROC and FPR95 of every OOD set, and AURC of the mistakes; the JSON files hold the rest."""
    *ood, mistakes, _ = tables
    columns = [(table, metric, f"{table.about['set']}: {metric}") for table in ood for metric in ("auroc", "fpr95")]
    columns += [(mistakes, metric, f"mistakes: {metric}") for metric in ("aurc", "error_auroc")]
    lines = [["score", *(name for _, _, name in columns)], ["---"] * (len(columns) + 1)]
    for name in ood[0].cells:
        cells = [table.cells.get(name, {}).get(metric) for table, metric, _ in columns]
        lines.append([name, *("" if cell is None else _shown(cell) for cell in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(cell: Cell) -> str:
    value = f"{cell.value.value:.3f} [{cell.value.low:.3f}, {cell.value.high:.3f}]"
    return f"**{value}**" if cell.better else value


if __name__ == "__main__":
    main()
