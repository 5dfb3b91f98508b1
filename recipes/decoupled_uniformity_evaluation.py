"""What the features of the recipe `decoupled_uniformity` know: linear evaluation, neighbours, AUC of each label where there are
several."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from ..adapters.training_loop import step_generator
from ..eval.metrics import auroc
from ..eval.probe import widened
from ..eval.probe_protocols import IMAGENET100, decoupled_uniformity_probe, sgd_probe
from ..eval.probes import linear_probe, nearest_label, top_k_accuracy
from .pretraining_evaluation import Encoded, judgeable
from .pretraining_networks import Norm, PretrainingNetwork

PROBE = 710  # place of the random numbers
TOP = 5


def projector(size: int, hidden: int, dim: int, norm: Norm | None = None) -> nn.Sequential:
    """Features [B, size] -> [B, dim] by three linear layers; the paper's representation is what the first gives.

    norm: behind the first two; the paper has none. Without it untrained projections of all images are nearly the same, from
    which small networks take long to part.
    """
    layers: list[nn.Module] = []
    for inputs in (size, hidden):
        layers.append(nn.Linear(inputs, hidden))
        if norm is not None:
            layers.append(nn.BatchNorm1d(hidden) if norm == "batch" else nn.GroupNorm(math.gcd(hidden, 8), hidden))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(hidden, dim))


@torch.no_grad()
def representation(network: PretrainingNetwork, feature: np.ndarray) -> np.ndarray:
    """The paper's representation float32 [N, hidden] of pooled features [N, F]: a linear layer of them."""
    first: nn.Linear = network.projection[0]  # type: ignore[index, assignment]
    return first(torch.from_numpy(feature).to(first.weight.device)).cpu().numpy()


def class_worth(
    network: PretrainingNetwork, train: Encoded, test: Encoded, dataset: str, seed: int, papers: bool,
    device: torch.device | str = "cpu",
) -> dict[str, float]:  # fmt: skip
    """Shares of right test labels, 0 to 1.

    Of a linear classifier (L-BFGS, strength chosen on training images) of pooled features and of the representation, of the
    nearest training image by cosine; top 5 of the former where there are more classes. papers: also the paper's protocol, on
    imagenet100 its optimiser alone (`papers_protocol_unaugmented`): its code augments the images of that probe anew in every
    epoch, and stored features are of plain ones. device: where classifiers are fitted.
    """
    classes = int(max(train.label.max(), test.label.max())) + 1

    def judged(scores: np.ndarray, k: int = 1) -> float:
        return top_k_accuracy(widened(scores, classes), test.label, k)

    logits, _ = linear_probe(train.feature, train.label, test.feature, seed=seed, device=device)
    found = {"linear": judged(logits)}
    if classes > TOP:
        found["top_5"] = judged(logits, TOP)
    own, other = (representation(network, part.feature) for part in (train, test))
    logits, _ = linear_probe(own, train.label, other, seed=seed, device=device)
    found["linear_representation"] = judged(logits)
    for name in ("feature", "projection"):
        near = nearest_label(getattr(train, name), train.label, getattr(test, name))
        found[f"nearest_{name}"] = float((near == test.label).mean())
    if papers:
        generator = step_generator(seed, PROBE)
        if dataset == "imagenet100":
            scores = sgd_probe(own, train.label, other, IMAGENET100, generator, device)
            found["papers_protocol_unaugmented"] = judged(scores)
        else:
            scores = decoupled_uniformity_probe(own, train.label, other, generator, device)
            found["papers_protocol"] = judged(scores)
    return found


def label_worth(
    network: PretrainingNetwork, train: Encoded, test: Encoded, names: tuple[str, ...], seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """AUC of a linear classifier for each label, [N, L] of 0, 1 and NaN, by name, and their mean, `mean_auc`.

    Of pooled features and, `..._representation`, of the representation. A label's unknown images (NaN) are left out, of its
    training and of its test images alone. Its AUC is None, and has no part in the mean, where either has images of one kind
    only, or training so few that none is held out to choose the classifier's strength. device: where classifiers are fitted.
    """
    known = {
        name: [int((~np.isnan(part.label[:, place])).sum()) for part in (train, test)]
        for place, name in enumerate(names)
    }
    own, other = (representation(network, part.feature) for part in (train, test))
    auc = {
        end: _aucs(x, train.label, y, test.label, names, seed, device)
        for end, x, y in (("", train.feature, test.feature), ("_representation", own, other))
    }
    means = {f"mean_auc{end}": float(np.mean([v for v in one.values() if v is not None])) for end, one in auc.items()}
    return {**means, **{f"auc{end}": one for end, one in auc.items()}, "known_images": known}


def _aucs(
    feature: np.ndarray, label: np.ndarray, asked: np.ndarray, truth: np.ndarray, names: tuple[str, ...], seed: int,
    device: torch.device | str,
) -> dict[str, float | None]:  # fmt: skip
    found: dict[str, float | None] = {}
    for name, own, other in zip(names, label.T, truth.T, strict=True):
        if not judgeable(own, other, seed):
            found[name] = None
            continue
        known, there = ~np.isnan(own), ~np.isnan(other)
        y, right = own[known].astype(np.int64), other[there].astype(bool)
        logits, _ = linear_probe(feature[known], y, asked[there], seed=seed, device=device)
        score = logits[:, 1] - logits[:, 0]
        found[name] = auroc(score[~right], score[right])
    return found
