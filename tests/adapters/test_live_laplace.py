"""The slow path: a live network handed over to laplace-torch."""

import numpy as np
import pytest
import torch
from torch import nn

from posthoc.adapters.backbone import Backbone, build_backbone
from posthoc.adapters.errors import BackboneError, DataError, OptionError
from posthoc.adapters.laplace import LastLayerPosterior
from posthoc.adapters.live_laplace import live_posterior

pytestmark = pytest.mark.filterwarnings(  # by importing laplace-torch 0.3
    "ignore:`torch.jit.script` is deprecated:FutureWarning", "ignore:`torch.jit.script_method` is deprecated"
)


class Small(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(images).relu().mean((2, 3)))


def small() -> tuple[Backbone, tuple[np.ndarray, np.ndarray]]:
    def transform(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 64 - 2

    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    return build_backbone(Small(), transform=transform), (images, np.arange(24) % 3)


@pytest.mark.parametrize("structure", ["all", "subnetwork", "functional"])
def test_hands_over_and_leaves_the_backbone_as_it_was(structure: str) -> None:
    backbone, data = small()
    before = backbone.fingerprint("logits")
    posterior = live_posterior(backbone, data, structure, subset_size=12, batch_size=8, progress=False)
    images = backbone.prepare(data[0][:5])
    p = posterior(images, link_approx="probit")
    torch.testing.assert_close(p.sum(1), torch.ones(5))
    logits = backbone(images).logits
    plain = torch.softmax(logits, 1)
    assert not torch.allclose(p, plain, atol=1e-3)
    assert (p.amax(1) <= plain.amax(1) + 1e-6).all()  # a posterior takes confidence away
    assert backbone.fingerprint("logits") == before
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_the_last_layer_as_a_subnetwork_is_the_closed_form() -> None:
    backbone, data = small()
    count = sum(parameter.numel() for parameter in Small().parameters())
    indices = torch.arange(count - 15, count)  # the last layer's 4 x 3 weights and 3 biases
    posterior = live_posterior(
        backbone, data, "subnetwork", progress=False, subnetwork_indices=indices, prior_precision=0.7
    )
    features = backbone.extract(data)
    weight, bias = backbone.classifier().weight, backbone.classifier().bias
    ours = LastLayerPosterior("full", 0.7).fit(features.penultimate, weight, bias, data[1])
    images = backbone.prepare(data[0][:5])
    _, covariance = posterior._glm_predictive_distribution(images)
    found = ours.functional_variance(torch.tensor(features.penultimate[:5]))
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2).double(), found, rtol=1e-3, atol=0)


def test_what_cannot_be_handed_over_is_refused() -> None:
    backbone, data = small()
    with pytest.raises(OptionError, match="did you mean 'functional'"):
        live_posterior(backbone, data, "functionnal")
    with pytest.raises(DataError, match="needs class labels"):
        live_posterior(backbone, data[0])
    bare = build_backbone(
        nn.Sequential(Small().conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()), transform=backbone.transform
    )
    with pytest.raises(BackboneError, match="no classifier"):
        live_posterior(bare, data)
