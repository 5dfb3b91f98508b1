"""The slow path: laplace-torch's posteriors over other weights than the last layer's, on the live network.

Every image goes through a copy of the network, with a backward pass for each class and image. Where the last layer
will do, `laplace.LastLayerPosterior` takes seconds from stored features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .backbone import Backbone
from .data import Source, open_source
from .errors import BackboneError, DataError, OptionError, suggest

STRUCTURES = ("all", "subnetwork", "functional")


def live_posterior(
    backbone: Backbone,
    data: Any,
    structure: str = "subnetwork",
    *,
    hessian_structure: str | None = None,
    subset_size: int = 1000,
    batch_size: int = 32,
    progress: bool = True,
    **options: Any,
) -> Any:
    """A fitted laplace-torch posterior of a classifier: call it on preprocessed images [B,3,H,W] (`backbone.prepare`).

    Args:
        backbone: with a classifier; it is copied, and stays as it is.
        data: images with class labels, of any kind `open_source` takes: those the classifier was trained on.
        structure: "all" (every weight), "subnetwork" (the weights largest in size), or "functional" (a Gaussian
            process on `subset_size` of the images).
        hessian_structure: for "all" "diag" (default), "kron", "full" or "lowrank"; for "subnetwork" "full" (default)
            or "diag".
        subset_size: weights of the subnetwork, or images of the process.
        options: of laplace-torch's class, as prior_precision=, temperature=, subnetwork_indices=.

    The memory of "full" grows with the square of its weights. Do not save the object: its state holds images.
    Raises OptionError for an unknown structure, BackboneError without a classifier, DataError without labels.
    Source: Daxberger et al., Laplace Redux, arXiv 2106.14806; Bayesian deep learning via subnetwork inference, 2021.
    """
    if structure not in STRUCTURES:
        raise OptionError(f"structure={structure!r} was given: {suggest(structure, STRUCTURES)}")
    if not backbone.num_classes:
        raise BackboneError(f"{backbone.name} has no classifier, so it has no likelihood to take the curvature of")
    network = _Logits(copy.deepcopy(backbone))
    loader = DataLoader(_Prepared(backbone, open_source(data)), batch_size=batch_size)
    posterior = _unfitted(network, structure, hessian_structure, subset_size, len(loader.dataset), options)  # type: ignore[arg-type]
    posterior.fit(loader, progress_bar=progress)
    return posterior


def _unfitted(
    network: nn.Module, structure: str, hessian: str | None, size: int, images: int, options: dict[str, Any]
) -> Any:
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN
    from laplace.utils import LargestMagnitudeSubnetMask

    options = {"backend": CurvlinopsGGN} | options
    if structure == "all":
        return Laplace(network, "classification", "all", hessian or "diag", **options)
    if structure == "functional":
        return Laplace(network, "classification", "all", "gp", n_subset=min(size, images), **options)
    if "subnetwork_indices" not in options:
        weights = sum(parameter.numel() for parameter in network.parameters())
        chosen = LargestMagnitudeSubnetMask(network, n_params_subnet=min(size, weights)).select()
        options["subnetwork_indices"] = chosen.cpu()
    return Laplace(network, "classification", "subnetwork", hessian or "full", **options)


class _Logits(nn.Module):
    """The logits of a backbone whose weights may have gradients."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.backbone(images).logits
        assert logits is not None
        return logits


class _Prepared(Dataset):
    """Images as the network takes them, with their labels."""

    def __init__(self, backbone: Backbone, source: Source) -> None:
        if source.length is None:
            raise DataError(
                "a stream has no length, which a posterior's curvature needs: give a data set of known size"
            )
        if source.item(0).label is None:
            raise DataError("a classifier's curvature on the live network needs class labels: give (images, labels)")
        self.backbone, self.source = backbone, source

    def __len__(self) -> int:
        return self.source.length or 0

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image, label = self.source.item(row)
        return self.backbone.prepare([image])[0], torch.as_tensor(label)
