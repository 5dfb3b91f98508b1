"""The temperature head on several processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posthoc.adapters.distributed import Launch
from posthoc.adapters.features import Features
from posthoc.adapters.heads import FitData, TemperatureHead
from posthoc.adapters.training import TrainOptions


@pytest.mark.parametrize("gather", [True, False])
def test_a_process_contrasts_the_whole_batch_unless_it_is_told_not_to(
    gather: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    features = Features.from_arrays(rng.normal(size=(90, 6)).astype(np.float32), label=rng.integers(3, size=90))
    options = TrainOptions(batch_size=31, epochs=2, progress=False)
    fitted = []
    for launch in (Launch(0, 1), Launch(0, 2), Launch(1, 2)):
        monkeypatch.setattr("posthoc.adapters.training.check_launch", lambda launch=launch: launch)
        head = TemperatureHead(0.1, gather=gather)
        head.fit(FitData(features, np.arange(70), np.arange(70, 90), positives="labels", options=options))
        fitted.append(torch.cat([parameter.detach().flatten() for parameter in head.parameters()]))
    alone, first, second = fitted
    assert torch.equal(alone, first) == torch.equal(alone, second) == torch.equal(first, second) == gather
