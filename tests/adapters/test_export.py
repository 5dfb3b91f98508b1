"""A fitted model as .onnx and .pt2: the same numbers without posthoc, and what its user has to know beside it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision import transforms

import posthoc
from posthoc.adapters import export_formats, metric_predictive
from posthoc.adapters.backbone import build_backbone
from posthoc.adapters.errors import AdapterError, BackboneError, NotFittedError, OptionError, PosthocError
from posthoc.adapters.export_command import report
from posthoc.adapters.export_preprocessing import LEVEL, describe_preprocessing, preprocess
from posthoc.adapters.model import UncertainModel
from posthoc.cli import main

HEADS = ("kappa", "temperature", "loss", "laplace")
BATCHES = (1, 3, 8)
CHILD = """
import sys, numpy, torch
program = torch.export.load(sys.argv[1]).module()
for size in (1, 3, 8):
    images = torch.from_numpy(numpy.load(sys.argv[2]))[:size]
    numpy.savez(sys.argv[3] + f"/{size}.npz", **{name: value.numpy() for name, value in program(images).items()})
assert not {"posthoc", "timm", "torchvision", "laplace"} & set(sys.modules), sorted(sys.modules)
"""


def digits(rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits, uint8 [N,64,64,3], and their classes."""
    found = load_digits()
    pixels = (found.images[rows] * 15).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    return np.repeat(pixels[..., None], 3, 3), found.target[rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> UncertainModel:
    """Four heads on a small timm network for ten classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", pretrained=False, num_classes=10)
    wrapped = posthoc.wrap(network, HEADS, temperature={"base_temperature": 0.1})
    return wrapped.fit(digits(slice(0, 160)), epochs=2, validation=0.3, cache_dir=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def images(model: UncertainModel) -> Tensor:
    return model.backbone.prepare(digits(slice(200, 200 + max(BATCHES)))[0])


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).relu().mean((2, 3)))


def tiny(network: nn.Module | None = None, head: str = "loss", **options: Any) -> UncertainModel:
    """One head on a network of one's own, of 12x12 pixels."""
    steps = [transforms.Resize((12, 12)), transforms.ToTensor(), transforms.Normalize([0.4] * 3, [0.3] * 3)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = network or Tiny()
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (120, 12, 12, 3), dtype=np.uint8), rng.integers(0, 3, 120)
    wrapped = posthoc.wrap(network, head, transform=transforms.Compose(steps), **options)
    return wrapped.fit(data, epochs=1, validation=0.3)


def check(found: dict[str, np.ndarray], model: UncertainModel, images: Tensor) -> None:
    """The outputs of a file against the model's: 1e-4 of the largest, and each score's place among the held-out ones."""
    with torch.no_grad():
        prediction = model(images)
    expected = {"logits": prediction.logits, "embedding": prediction.embedding}
    for head in prediction.heads:
        prefix = "" if head == prediction.heads[0] else f"{head}."
        expected[f"{prefix}uncertainty"] = prediction[head].uncertainty
        score = torch.from_numpy(found[f"{prefix}uncertainty"])
        place = model.held_out[head].percentile(score)
        torch.testing.assert_close(torch.from_numpy(found[f"{prefix}percentile"]), place)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value.numpy()).max() <= 1e-4 * np.abs(value.numpy()).max(), name


def onnx_answers(path: Path, images: Tensor) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))


def test_onnx_answers_as_the_model_does(model: UncertainModel, images: Tensor, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.heads["loss"].eval()
    modes = [part.training for part in model.modules()]
    written = model.export(tmp_path / "new" / "model.onnx")
    assert [part.training for part in model.modules()] == modes
    model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"model.onnx", "model.onnx.json"}
    assert set(written.files) == set((tmp_path / "new").iterdir())
    assert all(value < 1e-4 for value in written.differences.values())
    for size in BATCHES:
        check(onnx_answers(written.path, images[:size]), model, images[:size])
    told = json.loads((tmp_path / "new" / "model.onnx.json").read_text())
    assert list(told["outputs"]) == list(onnx_answers(written.path, images[:1])) == list(written.differences)
    content = written.path.read_bytes()
    assert told["files"] == {"model.onnx": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    assert str(Path(posthoc.__file__).parent).encode() not in content  # no paths of this machine


def test_pt2_answers_in_a_process_that_has_only_torch(model: UncertainModel, images: Tensor, tmp_path: Path) -> None:
    written = model.export(tmp_path / "model.pt2")
    np.save(tmp_path / "images.npy", images.numpy())
    child = [sys.executable, "-c", CHILD, str(written.path), str(tmp_path / "images.npy"), str(tmp_path)]
    subprocess.run(child, check=True, cwd=tmp_path, timeout=300)
    for size in BATCHES:
        with np.load(tmp_path / f"{size}.npz") as answers:
            check(dict(answers), model, images[:size])
    assert str(Path(posthoc.__file__).parent).encode() not in written.path.read_bytes()


def test_what_is_written_beside_it(model: UncertainModel, tmp_path: Path) -> None:
    model.export(tmp_path / "model.pt2", ["laplace", "kappa"])
    told = json.loads((tmp_path / "model.pt2.json").read_text())
    assert told["input"] == {"name": "images", "shape": ["batch", 3, 160, 160], "dtype": "float32"}
    assert told["outputs"] == {
        "logits": ["batch", 10],
        "embedding": ["batch", 96],
        "uncertainty": ["batch"],
        "percentile": ["batch"],
        "kappa.uncertainty": ["batch"],
        "kappa.percentile": ["batch"],
    }
    first, second = told["heads"].items()
    assert [first[0], first[1]["uncertainty"], first[1]["kind"]] == ["laplace", "uncertainty", "total"]
    assert [second[0], second[1]["uncertainty"], second[1]["kind"]] == ["kappa", "kappa.uncertainty", "aleatoric"]
    for name, head in told["heads"].items():
        assert head["threshold"] == {"coverage": 0.95, "abstain_above": model.threshold(coverage=0.95, head=name)}
    fingerprints = told["backbone"]["fingerprints"]
    assert fingerprints == {scope: model.backbone.fingerprint(scope) for scope in ("embedding", "logits")}
    assert told["preprocessing"]["complete"] is True


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_pct": 0.875, "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        {"crop_mode": "squash", "crop_pct": 0.9, "interpolation": "bilinear"},
        {"crop_mode": "border", "crop_pct": 1.0, "interpolation": "bicubic", "mean": (0.3, 0.5, 0.7)},
        {"input_size": (3, 96, 161), "crop_pct": 0.9, "interpolation": "bicubic"},
    ],
)
def test_the_description_makes_what_the_transform_makes(settings: dict[str, Any]) -> None:
    backbone = build_backbone(timm.create_model("test_resnet", pretrained=False, pretrained_cfg_overlay=settings))
    told = json.loads(json.dumps(describe_preprocessing(backbone)))
    assert told["complete"] is True
    rng = np.random.default_rng(1)
    for height, width in ((375, 500), (500, 333), (64, 64), (31, 200), (161, 97)):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        expected = backbone.require_transform()(image).numpy()
        found = preprocess(image, told)
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= LEVEL / min(told["std"])  # one level of 256, from resampling


class Resize(transforms.Resize):
    """By its name torchvision's, but it mirrors as well."""

    def forward(self, image: Any) -> Any:
        return super().forward(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


@pytest.mark.parametrize(
    "steps",
    [
        [Resize((12, 12)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)],
        [transforms.Resize((12, 12)), transforms.Grayscale(3), transforms.ToTensor()],
        [transforms.Normalize([0.5] * 3, [0.5] * 3), transforms.ToTensor()],
    ],
)
def test_a_transform_that_cannot_be_described_is_named(steps: list[Any]) -> None:
    backbone = build_backbone(timm.create_model("test_resnet", pretrained=False))
    backbone.transform = transforms.Compose(steps)
    told = describe_preprocessing(backbone)
    assert told["complete"] is False
    assert type(steps[0]).__name__ in told["transform"]


@pytest.mark.parametrize(("head", "options"), [("metric-laplace", {"dim": 4}), ("laplace", {"structure": "full"})])
def test_other_heads_and_structures(
    head: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        metric_predictive, "NODES", 5
    )  # the integral's loop is unrolled: less to convert, the same steps
    small = tiny(head=head, **options)
    images = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    written = small.export(tmp_path / "m.onnx")
    check(onnx_answers(written.path, images), small, images)


def test_weights_beyond_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny()
    monkeypatch.setattr(export_formats, "ONE_FILE", 100)
    written = small.export(tmp_path / "m.onnx")
    assert {file.name for file in written.files} == {"m.onnx", "m.onnx.data", "m.onnx.json"}
    assert "keep the two together" in report(written)
    assert set(json.loads((tmp_path / "m.onnx.json").read_text())["files"]) == {"m.onnx", "m.onnx.data"}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in written.files:
        file.replace(moved / file.name)
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    check(onnx_answers(moved / "m.onnx", images), small, images)


def test_a_file_that_answers_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, path = tiny(), tmp_path / "m.pt2"
    path.write_text("what was there")
    right = export_formats.FORMATS[".pt2"]

    def write(program: Any, to: Path, outputs: Any) -> None:
        name = next(name for name in program.state_dict if name.endswith("fc.bias"))
        program.state_dict[name] = nn.Parameter(program.state_dict[name] + 1e-3, requires_grad=False)
        right.write(program, to, outputs)

    monkeypatch.setitem(export_formats.FORMATS, ".pt2", right._replace(write=write))
    with pytest.raises(AdapterError, match="'logits' differs"):
        small.export(path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    assert path.read_text() == "what was there"


class Branching(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * (2.0 if float(images.detach().sum()) > 0 else 1.0))


def test_a_network_that_cannot_be_traced_is_told(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"Branching with loss cannot be written as \.pt2 .*torch.export"):
        tiny(Branching()).export(tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_requests_that_cannot_be_met_are_refused_before_work(
    model: UncertainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match=r"ends in \.onnx or \.pt2"):
        model.export(tmp_path / "model.pb")
    with pytest.raises(OptionError, match="did you mean 'kappa'"):
        model.export(tmp_path / "m.onnx", ["kapa"])
    with pytest.raises(OptionError, match="expected some of"):
        model.export(tmp_path / "m.onnx", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="cannot write"):
        model.export(tmp_path / "file" / "m.pt2")
    (tmp_path / "m.pt2").mkdir()
    with pytest.raises(OptionError, match="is a folder"):
        model.export(tmp_path / "m.pt2")
    with pytest.raises(NotFittedError):
        posthoc.wrap(Tiny(), "loss").export(tmp_path / "n.pt2")
    monkeypatch.setattr(export_formats, "find_spec", lambda name: None)
    with pytest.raises(PosthocError, match=r"onnx, onnxscript, onnxruntime, .*posthoc\[export\]"):
        model.export(tmp_path / "m.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"file", "m.pt2"}


def test_a_size_or_a_precision_that_no_graph_can_have(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(120, 3, 12, 12)).astype(np.float32), rng.integers(0, 3, 120)
    with pytest.raises(BackboneError, match="size of the images"):
        posthoc.wrap(Tiny(), "loss").fit(data, epochs=1).export(tmp_path / "m.pt2")
    small = tiny()
    small.backbone.double()
    with pytest.raises(BackboneError, match=r"float64.*float32"):
        small.export(tmp_path / "m.pt2")


def test_the_command(model: UncertainModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(model.get_base_model().state_dict(), tmp_path / "w.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    adapter = [str(tmp_path / "adapter"), str(tmp_path / "m.pt2"), "--checkpoint", str(tmp_path / "w.safetensors")]
    main(["export", *adapter, "--head", "loss"])
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"{tmp_path / 'm.pt2'}: ")
    assert told[0].endswith("outputs logits, embedding, uncertainty, percentile")
    assert "largest relative difference" in told[-1]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    beside = json.loads((tmp_path / "m.pt2.json").read_text())
    assert beside["adapter"] == {"sha256": config["weights"]["sha256"]}
    assert list(beside["heads"]) == ["loss"]
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "Example: posthoc export" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "adapter"), str(tmp_path / "m.txt")])
    assert "ends in .onnx or .pt2" in capsys.readouterr().err
