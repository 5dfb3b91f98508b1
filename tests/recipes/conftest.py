"""Recipes run on the CPU here, those of this process as those of children: the same bits are promised on one machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)  # what other tests settled on
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
