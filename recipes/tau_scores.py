"""How uncertain the networks of the recipe `tau` are of images: every method's score, higher = less certain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torchvision import transforms

from ..adapters.backbone import build_backbone
from ..adapters.embedding_baselines import procrustes
from ..adapters.errors import PosthocError
from ..adapters.losses.tau import temperature
from ..adapters.training_loop import step_generator
from ..eval.baselines import LOGIT_SCORES, inverse_norm, knn
from ..eval.live_detectors import live_scores
from ..eval.search import as_unit, neighbours
from .masked_dropout import draw_masks, dropping
from .pretraining_evaluation import Encoded, encode
from .pretraining_networks import PretrainingNetwork
from .tau_methods import UNCERTAIN, posterior
from .view_batches import Images

if TYPE_CHECKING:
    from .tau_options import TauConfig

NEIGHBOURS = 10
PASSES = 602  # a stream of random numbers


def means(projection: np.ndarray, config: TauConfig) -> np.ndarray:
    """Projections [N, D] without the number that says how uncertain they are."""
    return projection[:, : config.dim] if config.method in UNCERTAIN else projection


def uncertainties(
    networks: Sequence[PretrainingNetwork],
    training: Sequence[Encoded],
    images: Images,
    config: TauConfig,
    device: torch.device,
    test: Encoded | None = None,
) -> dict[str, np.ndarray]:
    """Scores [N] of images by name, from one network or the members of an ensemble.

    Args:
        training: what each network made of training images, which neighbours are looked for among.
        test: the set's own test images, for the neighbours as released; None: the images are those.
    """
    found = [encode(network, images, device) for network in networks]
    first = means(found[0].projection, config)
    scores = {
        "kNN": knn(first, means(training[0].projection, config), k=NEIGHBOURS),
        "1/feature-norm": inverse_norm(found[0].feature),
    }
    if config.reference:
        bank = first if test is None else means(test.projection, config)
        scores["kNN, as released"] = papers_neighbours(first, bank, own=test is None)
    scores |= own_scores(found[0].projection, config)
    if config.dropout:
        scores["MC dropout"] = spread(stochastic(networks[0], images, config, device))
    if len(networks) > 1 and config.method == "supervised":  # logits of classes have one frame
        scores["ensemble"] = spread([as_unit(one.projection) for one in found])
    elif len(networks) > 1:
        plain = [as_unit(means(one.projection, config)) for one in found]
        frames = np.stack([as_unit(means(one.projection, config)) for one in training])
        turns = procrustes(torch.from_numpy(frames)).numpy()
        scores["ensemble"] = spread([rows @ turn for rows, turn in zip(plain, turns, strict=True)])
        scores["ensemble, not aligned, as released"] = spread(plain)
    return scores


def own_scores(projection: np.ndarray, config: TauConfig) -> dict[str, np.ndarray]:
    """What a method says of its own projections [N, D], [N] by name; a plain contrast says nothing."""
    rows = torch.from_numpy(projection)
    if config.method in ("tau", "tau-moco"):
        raw = rows[:, -1]
        return {
            # in float64: 1 + e^-r, where the loss drives r up, ranks coarsely in float32 from 14 and is 1 from 17
            "tau": temperature(raw.double(), config.temperature).numpy(),
            "-r^2, as released": -raw.square().numpy(),
        }
    if config.method == "hib":
        return {"std": posterior(rows).stddev[:, 0].contiguous().numpy()}
    if config.method == "supervised":
        return {name: score(projection) for name, score in LOGIT_SCORES.items()}
    return {}


@torch.no_grad()
def stochastic(
    network: PretrainingNetwork, images: Images, config: TauConfig, device: torch.device
) -> list[np.ndarray]:
    """Unit projections [N, D] of several passes with dropout."""
    found = []
    network.eval()
    for number in range(config.passes):
        generator, parts = step_generator(config.seed, PASSES, number), []
        for chunk in images.chunks(device):
            with dropping(network, draw_masks(network, len(chunk), [generator])):
                parts.append(network(chunk)[1])
        found.append(as_unit(means(torch.cat(parts).float().cpu().numpy(), config)))
    return found


def spread(projections: Sequence[np.ndarray]) -> np.ndarray:
    """Standard deviation over passes or members (unbiased), mean over dimensions: [K] of [N, D] -> float32 [N]."""
    return np.stack(projections).std(0, ddof=1).mean(1).astype(np.float32)


def papers_neighbours(projection: np.ndarray, test: np.ndarray, own: bool) -> np.ndarray:
    """Mean distance of unit projections [N, D] to their nearest among the set's own TEST images [M, D], float32 [N].

    As released: the images that are scored are the reference, each without itself (`own`). No training image takes part.
    """
    rows, bank = as_unit(projection), as_unit(test)
    near = neighbours(rows, bank, NEIGHBOURS, own=np.arange(len(rows)) if own else None)
    apart = np.linalg.norm(rows[:, None] - bank[near], axis=2)
    return apart.mean(1).astype(np.float32)


def odin(
    network: PretrainingNetwork, sets: Mapping[str, Images], device: torch.device, store: Path
) -> dict[str, np.ndarray]:
    """ODIN of each set of images, float32 [N], on the network itself (`eval.live_detectors`), which stays as it is.

    store: a folder for its features. Every process of a launch must call this.
    """
    grey = next(iter(sets.values())).pixels.shape[1] == 1
    prepare = transforms.Compose([*([transforms.Grayscale()] if grey else []), transforms.ToTensor()])
    backbone = build_backbone(nn.Sequential(network.encoder, network.projection), transform=prepare, device=device)
    arrays = [(one.pixels.permute(0, 2, 3, 1).squeeze(3).contiguous().numpy(), one.label) for one in sets.values()]
    features = [backbone.extract(one, cache_dir=store, progress=False) for one in arrays]
    scores, left_out = live_scores(backbone, features, ["odin"], progress=False)
    if left_out:
        raise PosthocError(f"ODIN: {left_out['ODIN']}")
    return {name: one["ODIN"] for name, one in zip(sets, scores, strict=True)}
