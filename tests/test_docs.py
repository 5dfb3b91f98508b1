"""The documentation's snippets run, in order, as one program a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from posthoc.adapters import losses
from posthoc.adapters.vmf import mean_resultant_length

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _page(name: str) -> str:
    if not DOCS.is_dir():
        pytest.skip("needs the folder docs, which is not beside these tests")
    return (DOCS / name).read_text()


def _run(snippet: str, names: dict, capsys: pytest.CaptureFixture[str]) -> list[float]:
    exec(compile(snippet, "snippet", "exec"), names)
    return [float(line) for line in capsys.readouterr().out.split()]


def test_objectives_loop_trains_an_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = re.findall(r"```python\n(.*?)```", _page("objectives.md"), flags=re.DOTALL)
    assert len([line for line in first.splitlines() if line.strip()]) == 15
    names: dict = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = _run(first, names, capsys)
        assert len(values) == 150
        assert sum(values[-20:]) < 0.6 * sum(values[:20])
        for snippet in others:
            assert all(0 < value < 1 for value in _run(snippet, names, capsys))


def test_objectives_table_of_resultants_is_right() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", _page("objectives.md"), flags=re.MULTILINE)
    assert len(rows) == 9
    for dim, cells in rows:
        *given, half = [float(cell) for cell in cells.split("|")]
        kappa = torch.tensor([4.0, 16.0, 64.0, 256.0, 1024.0], dtype=torch.float64)
        assert given == pytest.approx(mean_resultant_length(kappa, int(dim)).tolist(), abs=5.1e-5)
        nearby = torch.tensor([half - 0.051, half + 0.051], dtype=torch.float64)
        below, above = mean_resultant_length(nearby, int(dim)).tolist()
        assert below < 0.5 < above


@pytest.mark.parametrize("name", losses.__all__)
def test_every_objective_is_described(name: str) -> None:
    assert name in _page("objectives.md")
