"""What `posthoc predict` writes: a column for each thing told of an image, as .csv or .parquet."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from .errors import DataError, PosthocError
from .files import replace_file
from .source_base import LABEL_COLUMNS


def labels_of(source: Any, rows: int) -> list[Any]:
    """The label of each row as far as the data has any (a class folder's by name), without decoding an image."""
    for name in LABEL_COLUMNS:
        try:
            labels = source.column(name).tolist()
        except DataError:
            continue
        names = getattr(source, "classes", None)
        return [names[label] for label in labels] if names else labels
    return [None] * rows


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write columns of equal length to a file whose ending is .parquet, or .csv, whole or not at all; its folder is made.

    Raises PosthocError when it cannot.
    """
    content = _parquet(columns) if path.suffix == ".parquet" else _csv(columns)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise PosthocError(f"cannot write {path}: {error}") from error


def _csv(columns: dict[str, list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def _parquet(columns: dict[str, list[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()
