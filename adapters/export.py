"""A fitted model as one graph, .onnx or .pt2, that answers without posthoc, and what its user has to know beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from .errors import AdapterError, BackboneError, OptionError, suggest
from .export_formats import FORMATS, INPUT, Run, format_of
from .export_preprocessing import describe_preprocessing
from .persistence import plain

if TYPE_CHECKING:
    from .model import UncertainModel

TOLERANCE = 1e-4  # of an output's largest value
COVERAGE = 0.95
TRACED, CHECKED = 2, (1, 3)  # images in a batch


@dataclass(frozen=True)
class Exported:
    """What was written: `path` of the graph, all `files`, and by output the largest difference from the model.

    A difference is relative to the output's largest value; of percentiles it is that of the file's from the place of
    the file's own uncertainty, in percent.
    """

    path: Path
    files: tuple[Path, ...]
    differences: dict[str, float]


def export(model: UncertainModel, path: str | Path, heads: Sequence[str] | None = None) -> Exported:
    """See `UncertainModel.export`. The model and its backbone stay as they are, modes included."""
    path = Path(path)
    names = _heads(model, heads)
    _check_request(model, path)
    shape = _input_shape(model)
    with _folder_beside(path) as folder, _on_cpu(model) as still, _modes_kept(still):
        graph = _Graph(still, names).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # converters warn of themselves; their file is compared with the model
            outputs = graph.outputs(shape)  # a first call: what a network computes once and keeps is not to be traced
            _convert(graph, outputs, shape, folder / path.name)
            differences = _check(format_of(path).open(folder / path.name), graph, shape, path)
        written = sorted(folder.iterdir(), key=lambda file: file.name == path.name)  # the graph after its weights
        described = folder / f"{path.name}.json"
        described.write_text(json.dumps(_describe(graph, outputs, shape, written), indent=2) + "\n")
        try:
            placed = [file.replace(path.parent / file.name) for file in (*written, described)]
        except OSError as error:
            raise AdapterError(f"cannot write {path}: {error}") from error
    return Exported(path, (path, *(file for file in placed if file != path)), differences)


class _Graph(nn.Module):
    """Preprocessed images [B,3,H,W] to what the file answers with, in a plain dict."""

    def __init__(self, model: UncertainModel, heads: Sequence[str]) -> None:
        super().__init__()
        self.model, self.heads = model, tuple(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model.backbone(images)
        outputs = {} if features.logits is None else {"logits": features.logits}
        outputs["embedding"] = features.embedding
        for name in self.heads:
            uncertainty = self.model.heads[name](features)["uncertainty"]
            outputs[self.output(name, "uncertainty")] = uncertainty
            outputs[self.output(name, "percentile")] = self.model.held_out[name].percentile(uncertainty)
        return outputs

    def output(self, head: str, field: str) -> str:
        """As in a `Prediction`: the first head's fields have plain names, another's are HEAD.FIELD."""
        return field if head == self.heads[0] else f"{head}.{field}"

    def outputs(self, shape: Sequence[int]) -> dict[str, list[int]]:
        """Names of the outputs in their order, with their shapes without the batch."""
        return {name: list(value.shape[1:]) for name, value in self(_noise(1, shape)).items()}


def _heads(model: UncertainModel, wanted: Sequence[str] | None) -> list[str]:
    names = (
        list(model.heads) if wanted is None else list(dict.fromkeys([wanted] if isinstance(wanted, str) else wanted))
    )
    for name in names:
        if name not in model.heads:
            raise OptionError(f"this model has no head {name!r}: {suggest(name, model.heads)}")
    if not names:
        raise OptionError(f"heads=[] was given; expected some of {', '.join(model.heads)}, or None for all")
    return names


def _check_request(model: UncertainModel, path: Path) -> None:
    format_of(path).require()
    if path.is_dir():
        raise OptionError(f"{path} is a folder; expected the name of a file")
    if model.backbone.dtype != torch.float32:
        raise BackboneError(
            f"{model.backbone.name} computes in {model.backbone.dtype}, and an exported file holds float32: wrap the "
            "network in float32 (network.float()) and fit the heads on that"
        )


def _input_shape(model: UncertainModel) -> list[int]:
    size = model.backbone.preprocessing.get("input_size")
    if not size or None in size:
        raise BackboneError(
            f"the size of the images that {model.backbone.name} takes is not known, and a graph is made for one: wrap or "
            "load it with a transform= (PIL image -> float tensor [3,H,W]) that gives one size"
        )
    return list(size)


def _noise(images: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(images))


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A hidden folder where the files are made under their final names (an .onnx names its weights' file)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise AdapterError(f"cannot write {path}: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _on_cpu(model: UncertainModel) -> Iterator[UncertainModel]:
    """The model itself, or a copy of it where it is on another device: a traced graph keeps its device."""
    if model.device.type == "cpu":
        yield model
    else:
        import copy

        yield copy.deepcopy(model).to("cpu")


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in model.modules()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _convert(graph: _Graph, outputs: Mapping[str, list[int]], shape: Sequence[int], path: Path) -> None:
    """Trace the graph and write it. Raises AdapterError for networks and heads that cannot be."""
    try:
        format_of(path).write(_traced(graph, shape), path, list(outputs))
    except Exception as error:  # the converters raise many kinds
        from .heads import HEADS

        why = (str(error).strip().splitlines() or [""])[0]
        raise AdapterError(
            f"{graph.model.backbone.name} with {', '.join(graph.heads)} cannot be written as {path.suffix} "
            f"({type(error).__name__}: {why}). The heads {', '.join(sorted(HEADS))} can; a network or head of your own "
            "must be one that torch.export traces and, for .onnx, of operations that ONNX has"
        ) from error


def _traced(graph: _Graph, shape: Sequence[int]) -> Any:
    """The exported program for any number of images, without what no output needs and without paths of this machine."""
    sizes = {INPUT: {0: torch.export.Dim("batch")}}
    program = torch.export.export(graph, (_noise(TRACED, shape),), dynamic_shapes=sizes, strict=False)
    nodes = program.graph_module.graph
    for node in list(nodes.nodes):
        node.meta.pop("stack_trace", None)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # keeps alive what it looks at
            nodes.erase_node(node)
    nodes.eliminate_dead_code()
    program.graph_module.recompile()
    for name, value in program.state_dict.items():
        if isinstance(value, nn.Parameter):  # nothing is trained any more, and answers need no detach()
            program.state_dict[name] = nn.Parameter(value.detach(), requires_grad=False)
    return program


def _check(run: Run, graph: _Graph, shape: Sequence[int], path: Path) -> dict[str, float]:
    """The largest difference by output, on batches of other sizes than the traced one.

    Raises AdapterError where the file answers otherwise than the model.
    """
    differences: dict[str, float] = {}
    for size in CHECKED:
        images = _noise(size, shape)
        try:
            found = run(images.numpy())
        except Exception as error:
            raise AdapterError(
                f"the file for {path} was written, but does not run on {size} image(s) and was deleted: {error}"
            ) from error
        for name, difference in _differences(found, graph, images).items():
            differences[name] = max(differences.get(name, 0.0), difference)
            if not difference <= TOLERANCE:
                raise AdapterError(
                    f"the file for {path} was written, but its {name!r} differs from the model's by {difference:.2g} "
                    f"(relative; allowed {TOLERANCE:g}) on {size} image(s), so it was deleted: the conversion is at "
                    f"fault; try {' or '.join(other for other in FORMATS if other != path.suffix)}"
                )
    return differences


def _differences(found: Mapping[str, np.ndarray], graph: _Graph, images: Tensor) -> dict[str, float]:
    expected = {name: value.numpy() for name, value in graph(images).items()}
    for (
        head
    ) in graph.heads:  # scores may lie closer together than the rounding: the place is that of the file's own score
        score = torch.from_numpy(found[graph.output(head, "uncertainty")])
        place = graph.output(head, "percentile")
        expected[place] = graph.model.held_out[head].percentile(score).numpy()
    differences = {}
    for name, value in expected.items():
        answer = found[name]
        same = answer.shape == value.shape and answer.dtype == value.dtype
        largest = (
            1.0 if name.endswith("percentile") else max(float(np.abs(value).max()), float(np.finfo(np.float32).tiny))
        )
        differences[name] = float(np.abs(answer - value).max()) / largest if same else np.inf
    return differences


def _describe(
    graph: _Graph, outputs: Mapping[str, list[int]], shape: Sequence[int], written: Sequence[Path]
) -> dict[str, Any]:
    """What stands in the .json beside the graph."""
    from .. import __version__  # which is there when the package is

    model, backbone = graph.model, graph.model.backbone
    scopes = sorted({model.heads[name].scope for name in graph.heads})
    return {
        "format": "posthoc export 1",
        "graph": written[-1].name,
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": _file_digest(file)} for file in written},
        "input": {"name": INPUT, "shape": ["batch", *shape], "dtype": "float32"},
        "preprocessing": plain(describe_preprocessing(backbone)),
        "outputs": {name: ["batch", *rest] for name, rest in outputs.items()},
        "heads": {name: _describe_head(graph, name) for name in graph.heads},
        "adapter": {"sha256": _adapter_digest(model)},
        "backbone": {
            "name": backbone.name,
            "source": backbone.source,
            "revision": backbone.revision,
            "weights": backbone.weights,
            "fingerprints": {scope: backbone.fingerprint(scope) for scope in scopes},
        },
        "versions": {"posthoc": __version__, "torch": torch.__version__},
    }


def _describe_head(graph: _Graph, name: str) -> dict[str, Any]:
    model = graph.model
    try:
        threshold = model.threshold(coverage=COVERAGE, head=name)
    except OptionError:  # too few held-out scores to promise it
        threshold = None
    return {
        "kind": model.heads[name].kind,
        "uncertainty": graph.output(name, "uncertainty"),
        "percentile": graph.output(name, "percentile"),
        "threshold": {"coverage": COVERAGE, "abstain_above": threshold},
        "held_out": int(model.held_out[name].rows),
    }


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _adapter_digest(model: UncertainModel) -> str:
    """The SHA-256 that the weights of the adapter have in its adapter_config.json."""
    tensors: dict[str, Tensor] = {}
    for name, head, scores in model.each_head():
        tensors |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
        tensors |= {f"{name}.held_out.{key}": value for key, value in scores.state_dict().items()}
    return hashlib.sha256(
        save({name: value.detach().cpu().contiguous().clone() for name, value in sorted(tensors.items())})
    ).hexdigest()
