"""Fixtures every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden numbers and real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared (golden numbers, real data), which is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's own feature store."""
    monkeypatch.setenv("POSTHOC_CACHE", str(tmp_path_factory.getbasetemp() / "posthoc-cache"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
