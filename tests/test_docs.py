"""The documentation's snippets run, in order, as one program a page."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import ToTensor

from posthoc.adapters import losses
from posthoc.adapters.vmf import mean_resultant_length
from posthoc.cli import EVALUATIONS

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


def test_readme_snippets_of_an_own_network_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import posthoc

    own, thresholds, saving, _ = re.findall(r"```python\n(.*?)```", _page("../README.md"), flags=re.DOTALL)[1:]
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
        )
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (150, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 150)
    names = {
        "posthoc": posthoc,
        "my_network": network,
        "my_transform": ToTensor(),
        "images": images,
        "labels": labels,
        "batch": images[:4],
    }
    exec(own, names)
    coverage, risk = thresholds.strip().splitlines()
    exec(coverage.replace("0.95", "0.8"), names)
    exec(risk.replace("0.05", "1.0"), names)
    save, by_name, by_network = saving.strip().splitlines()
    exec(save, names)
    with pytest.raises(posthoc.PosthocError, match="module of your own"):
        exec(by_name, names)
    before = names["model"](images[:4]).uncertainty
    exec(by_network, names)
    assert torch.equal(names["model"](images[:4]).uncertainty, before)


def test_laplace_page_shows_probabilities_and_information(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", _page("laplace.md"), flags=re.DOTALL)
    names: dict = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(snippet, "snippet", "exec"), names)
    assert capsys.readouterr().out.count("tensor(") == 2
    posterior, phi = names["posterior"], names["phi"]
    torch.testing.assert_close(posterior.predict(phi).sum(1), torch.ones(500, dtype=torch.float64))
    assert posterior.rows == "heldout"


def test_evaluation_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", _page("evaluation.md"), flags=re.DOTALL)
    exec(compile(snippet, "snippet", "exec"), {})
    printed = capsys.readouterr().out
    assert "textures" in printed
    assert "| mine | " in printed


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_is_described(name: str) -> None:
    assert f"| `{name}` | " in _page("evaluation.md")


def test_export_snippet_answers_as_the_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm
    from PIL import Image

    import posthoc

    (snippet,) = re.findall(r"```python\n(.*?)```", _page("export.md"), flags=re.DOTALL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", pretrained=False, num_classes=3)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (90, 40, 56, 3), dtype=np.uint8), rng.integers(0, 3, 90)
    model = posthoc.wrap(network, "loss").fit((images, labels), epochs=1, validation=0.3)
    monkeypatch.chdir(tmp_path)
    model.export("model.onnx")
    Image.fromarray(images[0]).save("photo.jpg", quality=95)
    names: dict = {}
    exec(compile(snippet, "snippet", "exec"), names)
    with Image.open("photo.jpg") as photo:
        expected = model.predict(photo)
    assert names["limit"] == model.threshold(coverage=0.95)
    score, percentile, abstain = capsys.readouterr().out.splitlines()[-1].split()
    assert float(score) == pytest.approx(float(expected.uncertainty), rel=1e-4)
    place = model.held_out["loss"].percentile(torch.from_numpy(names["answers"]["uncertainty"]))
    assert float(percentile) == pytest.approx(float(place))
    assert abstain == str(float(score) > names["limit"])
    for size in ((300, 200), (31, 90)):
        other = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        assert np.abs(names["prepare"](other) - model.backbone.prepare([other]).numpy()).max() < 0.01


def test_the_recipe_that_is_added_trains(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    blocks = re.findall(r"```python\n(.*?)```", _page("adding-a-recipe.md"), flags=re.DOTALL)
    code = "\n\n".join(blocks)
    assert len([line for line in code.splitlines() if line.strip()]) < 80
    (tmp_path / "spread.py").write_text(code)
    spec = importlib.util.spec_from_file_location("spread", tmp_path / "spread.py")
    assert spec is not None
    assert spec.loader is not None
    spread = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spread)

    squared = torch.tensor([1.0, 2.0, 6.0])
    log_mean = torch.tensor(3.0).log().expand(3).clone().requires_grad_()
    (slope,) = torch.autograd.grad(spread.ExponentialDistance()(squared, log_mean), log_mean)
    torch.testing.assert_close(slope.sum(), torch.zeros(()))  # lowest where s is the mean of d^2

    spread.run(spread.SpreadConfig(output=tmp_path / "run", epochs=60, check=True))
    figures = json.loads((tmp_path / "run" / "results.json").read_text())["figures"]
    assert figures["rank_correlation"] > 0.6
    assert 0.9 < figures["ratio"] < 1.1
