"""The post-hoc variant of the recipe `tau`: the library's temperature head on a frozen pretrained network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import timm
import torch
from torch import Tensor, nn

from ..adapters.backbone import Backbone, build_backbone
from ..adapters.data import open_source
from ..adapters.errors import BackboneError
from ..adapters.features import Features
from ..adapters.heads.temperature import TemperatureHead
from ..adapters.model import UncertainModel, wrap
from ..adapters.scoring import score
from ..adapters.source_base import Source
from ..adapters.weights import load_strictly, read_checkpoint
from ..eval.baselines import LOGIT_SCORES, inverse_norm, knn
from ..eval.datasets import default_data_dir, is_named, open_named
from .cifar10h_networks import cifar_backbone
from .image_sets import Chosen, other_sources, shaped, spread_over
from .pretraining_evaluation import certainty_grid, ood_tables, save_scores
from .running import Run, seeded
from .small_image_networks import DEPTHS
from .tau_report import draw_ood, ood_lines
from .tau_scores import NEIGHBOURS

if TYPE_CHECKING:
    from .tau_options import TauConfig

SIDE = 64
"""Pixels of an image in the grid."""


CIFAR = 32
"""Pixels of the images that CIFAR's ResNets were trained on: those of other sets are brought to them."""


class Known(NamedTuple):
    """A network by a short name: timm's name, whether timm has its weights, and what its embedding is: the feature before its
    classifier, the pooled feature of a network without one, or the projection that is its last layer."""

    timm: str
    fetched: bool
    embedding: Literal["before-classes", "pooled", "projection"]


KNOWN = {
    "resnet50": Known("resnet50.tv_in1k", True, "before-classes"),
    # of the next two the architecture and the preprocessing, which was theirs too
    "simclr": Known("resnet50.tv_in1k", False, "pooled"),
    "byol": Known("resnet50.tv_in1k", False, "pooled"),
    "clip": Known("vit_base_patch32_clip_224.openai", True, "projection"),
}


class Frozen(Protocol):
    """Which frozen network: options of a recipe."""

    @property
    def backbone(self) -> str | None: ...
    @property
    def checkpoint(self) -> Path | None: ...
    @property
    def random_weights(self) -> bool: ...
    @property
    def data_dir(self) -> Path | None: ...
    @property
    def seed(self) -> int: ...


def frozen_backbone(config: Frozen) -> Backbone:
    """The frozen network by the options, with its OWN preprocessing and embedding: the pooled feature, of CLIP its projection.

    Raises BackboneError for a name that there is not, and weights that are not there or do not fit.
    """
    name = str(config.backbone)
    if name in DEPTHS:
        return cifar_backbone(name, config.checkpoint, config.data_dir, config.random_weights, config.seed, CIFAR)
    known = KNOWN.get(name, Known(name, True, "before-classes"))
    file = f"{known.timm if known.fetched else name}.safetensors"
    stored = Path(config.data_dir or default_data_dir()).expanduser() / file
    checkpoint = config.checkpoint
    if checkpoint is None and not config.random_weights and stored.is_file():
        checkpoint = stored
    if not known.fetched and checkpoint is None and not config.random_weights:
        raise BackboneError(
            f"{name}: no package fetches its weights; give them with --checkpoint FILE (a ResNet-50, names as in "
            "torchvision or timm, under any prefix), or --random-weights to try the run"
        )
    fetch = checkpoint is None and not config.random_weights
    with seeded(config.seed):
        if known.embedding == "before-classes":
            return build_backbone(known.timm, pretrained=fetch, checkpoint=checkpoint)
        try:
            options: dict[str, Any] = {"num_classes": 0} if known.embedding == "pooled" else {}
            module = timm.create_model(known.timm, pretrained=fetch, **options)
        except Exception as error:  # timm and huggingface_hub raise many kinds
            raise BackboneError(
                f"{name} ({known.timm}) could not be fetched ({type(error).__name__}: {error}); give its weights "
                "with --checkpoint FILE"
            ) from error
    if checkpoint is not None:
        load_strictly(module, encoder_weights(read_checkpoint(checkpoint), module, checkpoint), checkpoint, known.timm)
    if known.embedding == "projection":
        return build_backbone(module, feature_layer="head", classifier_layer=False)
    return build_backbone(module)


def encoder_weights(state: Mapping[str, Tensor], module: nn.Module, path: Path) -> dict[str, Tensor]:
    """Those of a pretraining's weights that are the network's own: under one prefix, beside projections and the like.

    Names are the network's, or those of an nn.Sequential of a ResNet's parts (`PLACES`), as BYOL's are. Of a trained network
    and one that trails it (target, momentum, key) the trained one is taken. Raises BackboneError where no prefix has all names,
    or several do.
    """
    names = [name for name in module.state_dict() if not name.endswith("num_batches_tracked")]
    wholes: list[str] = []
    for theirs in (names, [in_sequence(name) for name in names]):
        prefixes = {key.removesuffix(theirs[0]) for key in state if key.endswith(theirs[0])}
        wholes = sorted(prefix for prefix in prefixes if all(prefix + name in state for name in theirs))
        trained = [one for one in wholes if not any(word in one for word in ("target", "momentum", "_k.", "ema"))]
        if len(trained) == 1:
            return {name: state[trained[0] + other] for name, other in zip(names, theirs, strict=True)}
        if wholes:
            break
    found = ", ".join(repr(prefix) for prefix in trained or wholes) or "none"
    raise BackboneError(
        f"--checkpoint {path}: expected all {len(names)} weights of {type(module).__name__} under one prefix; prefixes that "
        f"have them: {found}. It holds {', '.join(sorted(state)[:3])}, ...: convert the names to {names[0]}, ..., and save the "
        "network's own state_dict"
    )


PLACES = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
"""Where a ResNet's parts stand in an nn.Sequential of its children; 2 and 3 have no weights."""


def in_sequence(name: str) -> str:
    """The name of a ResNet's weight where its children stand in an nn.Sequential."""
    part, dot, rest = name.partition(".")
    return PLACES.get(part, part) + dot + rest


def open_set(config: TauConfig, split: str) -> Source:
    """Training or test images of a named set, or of a folder (or a set of the hub) with such splits."""
    if is_named(config.dataset):
        return open_named(config.dataset, split, config.data_dir)
    return open_source(config.dataset, split)


def some_of(source: Source, most: int | None) -> Chosen:
    """At most so many of a source's images, evenly spread over it: folders are sorted by class. None: all."""
    rows = np.arange(len(source))
    return Chosen(source, spread_over(rows, most or len(rows)))


def run_posthoc(config: TauConfig, run: Run) -> None:
    """Fit the head on features of training images, score test images and all other sets, and report."""
    train = some_of(open_set(config, "train"), config.train_images)
    test = some_of(open_set(config, "test"), config.test_images)
    backbone = frozen_backbone(config).to(run.device)
    others, notes = other_sources(config.dataset, config.data_dir, config.ood_images)
    judged = (part for name, one in others.items() for part in (name, one.fingerprint()))
    run.stands_on(train.fingerprint(), test.fingerprint(), backbone.fingerprint(), *judged)
    model, head = fitted(config, backbone, train)
    features = {
        name: backbone.extract(one, cache_dir=config.cache_dir)
        for name, one in {"train": train, config.dataset: test, **others}.items()
    }
    training = features.pop("train")
    scores = {name: uncertainties(head, one, training, run.device) for name, one in features.items()}
    results = run.launch.on_main(lambda: found(config, model, scores, notes))
    model.save_pretrained(config.output / "adapter")
    if run.launch.is_main:
        shown(config, test, features[config.dataset].label, scores, results)
    run.finish(results)


def fitted(config: TauConfig, backbone: Backbone, train: Source) -> tuple[UncertainModel, TemperatureHead]:
    """The head on the network, fitted by the options; its training is in the run's folder `head`."""
    # as released: one linear layer, its loss, and t as given; else the library's head, which chooses t by blur
    released: dict[str, Any] = {"base_temperature": config.temperature, "depth": 0, "reference": True}
    head = TemperatureHead(**(released if config.reference else {}), gather=config.gather)
    model = wrap(backbone, head)
    model.fit(
        train,
        positives=config.positives,
        views=config.views,
        epochs=config.epochs,
        lr=config.lr,
        batch_size=config.batch_size,
        seed=config.seed,
        cache_dir=config.cache_dir,
        output_dir=config.output / "head",
    )
    return model, head


def found(
    config: TauConfig, model: UncertainModel, scores: Mapping[str, Mapping[str, np.ndarray]], notes: Mapping[str, str]
) -> dict[str, Any]:
    """What is told of a fitted head, JSON-able, by the scores of each set's images."""
    described = model.backbone.describe()
    outside = {name: one for name, one in scores.items() if name != config.dataset}
    return {
        "method": f"head on {config.backbone}",
        "positives": config.positives,
        "backbone": {key: described[key] for key in ("name", "weights", "embedding_dim", "preprocessing", "cost")},
        "fit": model.report["temperature"],
        "ood": ood_tables(scores[config.dataset], outside, config.seed, notes),
        "not_read": {name: why for name, why in notes.items() if name not in outside},
    }


def shown(
    config: TauConfig,
    test: Source,
    label: np.ndarray | None,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    results: Mapping[str, Any],
) -> None:
    """Scores and pictures into the run's folder, and the table onto the screen. label: of the test images, if known."""

    def picture(row: int) -> np.ndarray:
        return shaped(Chosen(test, np.array([row])), 3, SIDE)[0].permute(1, 2, 0).numpy()

    own = {name: scores[config.dataset][name] for name in ("tau", "-r^2, as released")}
    save_scores(config.output / "scores", scores)
    certainty_grid(config.output / "certainty.png", picture, np.arange(len(test)) if label is None else label, own)
    draw_ood(config.output, results["ood"])
    print("\n".join(ood_lines(results["ood"])))


@torch.no_grad()
def uncertainties(
    head: TemperatureHead, features: Features, training: Features, device: torch.device
) -> dict[str, np.ndarray]:
    """Scores float32 [N], higher = less certain: the head's, the released one, and what costs no training."""
    every = np.arange(len(features))
    embedding = torch.from_numpy(np.array(features.embedding, dtype=np.float32)).to(device)
    scores = {
        "kNN": knn(features.embedding, training.embedding, k=NEIGHBOURS),
        "1/feature-norm": inverse_norm(features.embedding),
        "tau": score(head, features, every, device)[0].numpy(),
        "-r^2, as released": -head.raw(embedding).square().cpu().numpy(),
    }
    if features.logits is not None:
        scores |= {name: one(features.logits) for name, one in LOGIT_SCORES.items()}
    return scores
