"""pytorch-ood's detectors that run the network on the images: input gradients and feature maps, which no store holds.

The network stays as it is, bit for bit: it is frozen, and gradients are taken for the images alone. Left out are ReAct, ASH,
SCALE, VRA and GradNorm, which `detectors` computes from stored features; MCD (the networks of timm are built without
dropout); Gram, NAC and MultiMahalanobis, which need a list of layers that only the network's author can name; and
GradUncertainty, whose own documentation warns that its sum of gradients is no score of its paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..adapters.backbone import Backbone
from ..adapters.errors import DataError, OptionError, suggest
from ..adapters.features import Features
from ..adapters.source_loader import read_batches, workers_for
from .arrays import finite
from .detectors import DETECTORS, Training, quiet
from .extras import require

ImageScore = Callable[[Tensor], Tensor]


def _odin(module: Any, backbone: Backbone, training: Training | None) -> ImageScore:
    """Temperature 1000, step .0014 of the pixel range 0..1 (Liang et al. 2018)."""
    _logits(backbone)
    detector = module.ODIN(lambda x: _tensor(backbone(x).logits), norm_std=backbone.preprocessing.get("std"))
    return detector.predict


def _mahalanobis_odin(module: Any, backbone: Backbone, training: Training | None) -> ImageScore:
    """Mahalanobis distance of the last layer's input, after a step of .002 towards the nearest class (Lee et al. 2018)."""
    if training is None:
        raise ValueError("it is fitted on --train, with penultimate features and labels")
    std = backbone.preprocessing.get("std")
    detector = module.MahalanobisODIN(lambda x: _tensor(backbone(x).penultimate), norm_std=std)
    features = torch.from_numpy(np.array(training.features, dtype=np.float32)).to(backbone.device)
    label = torch.from_numpy(np.array(training.label, dtype=np.int64)).to(backbone.device)
    detector.fit_features(features, label)
    return detector.predict


def _rankfeat(module: Any, backbone: Backbone, training: Training | None) -> ImageScore:
    """Energy after the first singular vectors of the last maps [C, H, W] are taken away (Song et al. 2022)."""
    _logits(backbone)
    network: Any = backbone.module
    if not hasattr(network, "forward_features") or not hasattr(network, "forward_head"):
        raise ValueError("it needs a network split as timm's are, by forward_features and forward_head")
    detector = module.RankFeat(network.forward_features, network.forward_head)

    def score(images: Tensor) -> Tensor:
        with torch.no_grad():
            maps = network.forward_features(images)
            if maps.ndim != 4 or maps.shape[2:].numel() < 2:
                raise ValueError(f"it needs maps [B, C, H, W] of several pixels; these are {tuple(maps.shape)}")
            return detector.predict_feature_maps(maps.contiguous())

    return score


LIVE: dict[str, tuple[str, Callable[[Any, Backbone, Training | None], ImageScore]]] = {
    "odin": ("ODIN", _odin),
    "mahalanobis-odin": ("Mahalanobis, ODIN", _mahalanobis_odin),
    "rankfeat": ("RankFeat", _rankfeat),
}
"""By the word of `--live`: the name tables print, and how the detector is made."""


def check_live(names: Sequence[str]) -> None:
    """Raises OptionError for a name that is no live detector."""
    stored = {name.lower(): name for name in (*DETECTORS, "ASH")}
    for name in names:
        if name.lower() in stored:
            raise OptionError(f"{stored[name.lower()]} needs no --live: it stands in every table that has --train")
        if name not in LIVE:
            raise OptionError(f"live detector {name!r} is unknown: {suggest(name, LIVE)}")


def live_scores(
    backbone: Backbone,
    sets: Sequence[Features],
    names: Sequence[str],
    training: Training | None = None,
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[list[dict[str, np.ndarray]], dict[str, str]]:
    """Scores of the images behind each set of features, float32 [N] by the name tables print, and what was left out.

    Args:
        sets: as `backbone.extract` returns them, so that their images can be read again.
        names: of `LIVE`. training: what those with a fit are fitted on, training rows alone.

    One that this network does not allow is left out, with why. Raises OptionError for an unknown name, DataError where the
    images behind the features are not at hand, PosthocError without pytorch-ood.
    """
    check_live(names)
    for one in sets:
        if one.source is None or one.source.length is None:
            raise DataError(
                "--live runs the network on images: give images, not stored features, score files or streams"
            )
    module = require("pytorch_ood.detector", "pytorch-ood")
    found: list[dict[str, np.ndarray]] = [{} for _ in sets]
    left_out: dict[str, str] = {}
    for word in dict.fromkeys(names):
        name, make = LIVE[word]
        try:
            with quiet():
                score = make(module, backbone, training)
            scored = [_scores(score, backbone, one, batch_size, name, progress) for one in sets]
        except (ValueError, AssertionError, RuntimeError, DataError) as error:
            left_out[name] = str(error) or type(error).__name__
            continue
        for scores, values in zip(found, scored, strict=True):
            scores[name] = values
    return found, left_out


def _scores(
    score: ImageScore, backbone: Backbone, features: Features, batch_size: int, name: str, progress: bool
) -> np.ndarray:
    assert features.source is not None
    rows = np.asarray(features.row)
    jobs = [rows[start : start + batch_size].tolist() for start in range(0, len(rows), batch_size)]
    workers = workers_for(features.source, backbone.device)
    parts = []
    for batch in tqdm(
        read_batches(features.source, jobs, backbone.transform, num_workers=workers),
        name, len(jobs), disable=not progress, leave=False,
    ):  # fmt: skip
        if batch.broken or batch.images is None:
            raise DataError(f"{batch.broken[0].name} could be read before and cannot now: {batch.broken[0].why}")
        with quiet():
            parts.append(score(batch.images.to(backbone.device, backbone.dtype)).detach().float().cpu().numpy())
    return finite("its score", np.concatenate(parts)).astype(np.float32)


def _logits(backbone: Backbone) -> None:
    if not backbone.num_classes:
        raise ValueError("it needs a classifier, and this network has none")


def _tensor(output: Tensor | None) -> Tensor:
    if output is None:
        raise ValueError("it needs a single linear classifier, and this network has none")
    return output
