"""From any data to predictions: streamed, a share on every process, keeping only the fields asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .backbone import BackboneOutput
from .data import Source, open_source
from .distributed import Launch, check_launch
from .errors import DataError, OptionError, suggest
from .features import Features
from .prediction import Prediction
from .scoring import feature_batches
from .sinks import Fields, open_sink
from .source_loader import read_batches, workers_for

if TYPE_CHECKING:
    from .model import UncertainModel

SHARED = ("embedding", "logits")


def predict(
    model: UncertainModel, data: Any, fields: Sequence[str], batch_size: int, output_dir: str | Path | None
) -> Prediction:
    """See `UncertainModel.predict`."""
    wanted = _wanted(model, fields)
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size} was given; expected at least 1")
    launch = check_launch()
    sink = open_sink(output_dir, launch)
    with torch.no_grad():
        for rows, output in _outputs(model, data, batch_size, launch):
            sink.append(rows, _keep(model.answer(output), wanted))
    arrays = sink.finish()
    if not arrays:
        raise DataError("there are no images to predict, or no field was asked for")
    return _prediction(model, arrays)


def _wanted(model: UncertainModel, fields: Sequence[str]) -> set[str]:
    if isinstance(fields, str):
        raise OptionError(f"fields={fields!r} was given; expected several names, such as ({fields!r},)")
    known = {"uncertainty", "percentile", *SHARED}.union(*(head.fields for _, head, _ in model.each_head()))
    for name in fields:
        if name not in known:
            raise OptionError(f"unknown field {name!r}: {suggest(name, known)}")
    # the percentile is the score in other words: it goes where the score goes
    return {*fields, "percentile"} if "uncertainty" in fields else set(fields)


def _keep(prediction: Prediction, wanted: set[str]) -> Fields:
    kept: Fields = {name: getattr(prediction, name) for name in SHARED if name in wanted}
    for head in prediction.heads:
        one = prediction[head]
        kept |= {f"{head}.{name}": getattr(one, name) for name in one.fields if name in wanted}
    return {name: value.float() for name, value in kept.items() if value is not None}


def _prediction(model: UncertainModel, arrays: dict[str, np.ndarray]) -> Prediction:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    heads = {
        head: {name.removeprefix(f"{head}."): value for name, value in tensors.items() if name.startswith(f"{head}.")}
        for head in model.heads
    }
    return Prediction(heads, model.kinds(), tensors.get("embedding"), tensors.get("logits"))


def _outputs(
    model: UncertainModel, data: Any, batch_size: int, launch: Launch
) -> Iterator[tuple[np.ndarray, BackboneOutput]]:
    """This process's share: row numbers and what the backbone says of them."""
    if isinstance(data, Features):
        features = model.backbone.extract(data)  # checks that they are this backbone's
        yield from feature_batches(features, np.arange(*_block(len(features), launch)), model.device)
        return
    source = open_source(_one_image(data))
    total = None if source.length is None else int(np.diff(_block(source.length, launch))[0])
    small = total is not None and total <= batch_size
    bar = tqdm(total=total, desc="predict", unit="image", disable=small or not launch.is_main)
    with bar:
        batches = read_batches(
            source,
            _jobs(source, batch_size, launch),
            model.backbone.transform,
            num_workers=workers_for(source, model.device, launch.world),
            pin_memory=model.device.type == "cuda",
        )
        for batch in batches:
            if batch.broken:
                raise DataError(f"an image could not be read: {batch.broken[0].name}: {batch.broken[0].why}")
            assert batch.images is not None
            images = model.backbone.prepare(batch.images) if batch.ready else batch.images
            images = images.to(model.device, model.backbone.dtype, non_blocking=True)
            yield np.asarray(batch.row), model.backbone(images)
            bar.update(len(batch.row))


def _one_image(data: Any) -> Any:
    """A single image array as a batch of one: float [C,H,W], uint8 [H,W,1|3|4]."""
    if not isinstance(data, np.ndarray | Tensor) or data.ndim != 3:
        return data
    ready = data.dtype.is_floating_point if isinstance(data, Tensor) else data.dtype.kind == "f"
    if not ready and data.shape[0] in (1, 3, 4) and data.shape[-1] not in (1, 3, 4):
        raise DataError(
            f"uint8 {list(data.shape)} is either {data.shape[0]} grey images or one image with channels first: give "
            "[1,C,H,W] or [H,W,C] for one image, [N,H,W,1] for grey ones"
        )
    return data[None] if ready or data.shape[-1] in (1, 3, 4) else data


def _block(length: int, launch: Launch) -> tuple[int, int]:
    """First and one past the last of this process's rows of `length`."""
    return length * launch.rank // launch.world, length * (launch.rank + 1) // launch.world


def _jobs(source: Source, batch_size: int, launch: Launch) -> Iterator[list[Any]]:
    """Rows of one process, a list for each batch: a block of a map-style source, every world-th batch of a stream."""
    if source.length is not None:
        first, last = _block(source.length, launch)
        for start in range(first, last, batch_size):
            yield list(range(start, min(start + batch_size, last)))
        return
    jobs: list[Any] = []
    for row, item in enumerate(source.stream()):
        if row // batch_size % launch.world == launch.rank:
            jobs.append((row, item))
        if len(jobs) == batch_size:
            yield jobs
            jobs = []
    if jobs:
        yield jobs
