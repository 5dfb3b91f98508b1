"""The backbone's view of blurred images: how a head tells, without labels, whether its score rises with ambiguity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from .perturbations import BLUR_SEVERITIES, blur
from .source_base import Source
from .source_loader import read_batches

if TYPE_CHECKING:
    from .backbone import Backbone


def blurred_embeddings(
    backbone: Backbone, source: Source, rows: np.ndarray, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of images blurred by known amounts; nothing is stored.

    Args:
        source: map-style, so that single rows can be read again.
        rows: int64 [n], rows of the source.

    Returns severity [S] (standard deviation over the shorter side of the source image) and embedding [S, n, D].
    """
    return np.array(BLUR_SEVERITIES), np.stack(
        [_embed(backbone, source, rows, severity, batch_size) for severity in BLUR_SEVERITIES]
    )


@torch.inference_mode()
def _embed(backbone: Backbone, source: Source, rows: np.ndarray, severity: float, batch_size: int) -> np.ndarray:
    transform = backbone.transform

    def blurred(image: Image.Image) -> Tensor:
        assert transform is not None  # without one there are no PIL images: extraction has refused them
        return transform(blur(image, severity))

    jobs = [rows[start : start + batch_size].tolist() for start in range(0, len(rows), batch_size)]
    parts = []
    for batch in read_batches(source, jobs, None if transform is None else blurred):
        assert batch.images is not None  # these rows were read before
        images = _blur_tensor(backbone.prepare(batch.images), severity) if batch.ready else batch.images
        parts.append(backbone(images.to(backbone.device, backbone.dtype)).embedding.float().cpu().numpy())
    return np.concatenate(parts)


def _blur_tensor(images: Tensor, severity: float) -> Tensor:
    """Preprocessed images [B,C,H,W] blurred by the same share of the shorter side, out to three deviations."""
    sigma = severity * min(images.shape[-2:])
    if sigma == 0:
        return images
    # reflection at the border needs a kernel that is not wider than the image
    radius = min(max(1, round(3 * sigma)), min(images.shape[-2:]) - 1)
    return gaussian_blur(images, [2 * radius + 1] * 2, [sigma] * 2)
