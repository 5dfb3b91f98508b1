"""The two kinds of file a traced model is written to, and how each is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import OptionError, PosthocError

INPUT = "images"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONE_FILE = 2**31 - 2**26  # weights in one .onnx: protobuf's messages end at 2 GB, and the graph itself takes some
Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class Format(NamedTuple):
    """require(): PosthocError where packages are missing. write(program, path, output names). open(path): runs it."""

    require: Callable[[], None]
    write: Callable[[Any, Path, Sequence[str]], None]
    open: Callable[[Path], Run]


def _require_onnx() -> None:
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise PosthocError(
            f"exporting to .onnx needs {', '.join(missing)}, not installed here: pip install 'posthoc[export]' (.pt2 "
            "needs nothing more)"
        )


def _write_onnx(program: Any, path: Path, outputs: Sequence[str]) -> None:
    import onnx

    converted = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=outputs,
        dynamic_shapes={INPUT: {0: "batch"}},
        custom_translation_table={torch.ops.aten.searchsorted.Tensor: _searchsorted},
    )
    assert converted is not None
    tensors = [*program.state_dict.values(), *(c for c in program.constants.values() if isinstance(c, Tensor))]
    if sum(tensor.nbytes for tensor in tensors) < ONE_FILE:
        onnx.save(converted.model_proto, path)
    else:
        converted.save(path, external_data=True)


def _searchsorted(
    sorted_sequence: Any,
    values: Any,
    out_int32: bool = False,
    right: bool = False,
    side: Any = None,
    sorter: Any = None,
) -> Any:
    """torch.searchsorted(right=True) of values [B] in [Q], which ONNX has not: how many of the Q are not above."""
    from onnxscript import opset18

    op: Any = opset18
    if not right or out_int32 or side is not None or sorter is not None:
        raise NotImplementedError("only searchsorted(..., right=True) is translated")
    last = op.Constant(value_ints=[-1])
    above = op.Less(op.Unsqueeze(values, last), sorted_sequence)
    return op.ReduceSum(op.Cast(op.Not(above), to=7), last, keepdims=0)  # 7: int64


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {INPUT: images}), strict=True))


def _write_pt2(program: Any, path: Path, outputs: Sequence[str]) -> None:
    torch.export.save(program, path)


def _open_pt2(path: Path) -> Run:
    run = torch.export.load(path).module()
    return lambda images: {name: value.numpy() for name, value in run(torch.from_numpy(images)).items()}


FORMATS = {
    ".onnx": Format(_require_onnx, _write_onnx, _open_onnx),
    ".pt2": Format(lambda: None, _write_pt2, _open_pt2),
}


def format_of(path: Path) -> Format:
    """The format that a file's ending names. Raises OptionError for another ending."""
    if path.suffix not in FORMATS:
        raise OptionError(f"{path} was given to export to; expected a file that ends in {' or '.join(FORMATS)}")
    return FORMATS[path.suffix]
