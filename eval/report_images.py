"""A report's pictures of images: galleries of the most and least certain ones, neighbours and the credible set they lie in.

Thumbnails are small by construction: at most `SIDE` pixels and `BYTES` bytes each, and a fixed number of them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..adapters.errors import DataError
from ..adapters.source_loader import load_image
from .credible import CredibleSets
from .credible_table import posterior
from .inputs import Scored
from .search import directions, neighbours

SIDE, BYTES = 96, 6144
SHOWN = 10
"""Images in a strip of a gallery."""
QUERIES, NEAREST = 6, 8
ALPHA = 0.05


@dataclass(frozen=True)
class Picture:
    """One image of a strip: `uri` is a data: URI, `words` stand below it, `marked` gives it a frame, `odd` colours the words."""

    uri: str
    alt: str
    words: str
    marked: bool = False
    odd: bool = False
    tiny: bool = False
    """Whether it is shown larger than it is, pixel by pixel."""


@dataclass(frozen=True)
class Strip:
    """Images in a row under a title."""

    title: str
    pictures: tuple[Picture, ...]


def can_show(one: Scored) -> bool:
    """Whether the images of a set can be read again: they were given with a model, in an order, not as ready tensors."""
    source = None if one.features is None else one.features.source
    if source is None or source.length is None:
        return False
    return isinstance(_image(one, 0), Image.Image)


def gallery(
    sets: Sequence[Scored], scores: Sequence[Mapping[str, np.ndarray]], name: str
) -> tuple[list[Strip], dict[str, Any]]:
    """Strips of one score, and the same as numbers: the ID images it is most and least certain of, and the OOD images it
    is most certain of, which would pass as ID. Only of sets that `can_show`."""
    shown = [place for place, one in enumerate(sets) if can_show(one)]
    of = np.concatenate([np.full(sets[place].rows, place) for place in shown]) if shown else np.zeros(0, np.int64)
    row = np.concatenate([np.arange(sets[place].rows) for place in shown]) if shown else of
    value = np.concatenate([scores[place][name] for place in shown]) if shown else of
    order = np.argsort(value, kind="stable")
    inside, outside = order[of[order] == 0], order[of[order] > 0]
    strips, numbers = [], {}
    for title, chosen in (
        (f"{sets[0].name}: most certain", inside[:SHOWN]),
        (f"{sets[0].name}: least certain", inside[::-1][:SHOWN]),
        ("OOD: most certain", outside[:SHOWN]),
    ):
        if len(chosen):
            found = [(int(of[k]), int(row[k]), float(value[k])) for k in chosen]
            strips.append(Strip(title, tuple(_scored(sets[p], r, v, p > 0) for p, r, v in found)))
            numbers[title] = [{"set": sets[p].name, "row": r, "uncertainty": v} for p, r, v in found]
    return strips, numbers


def _scored(one: Scored, row: int, value: float, outside: bool) -> Picture:
    label = "" if one.label is None or one.label.ndim != 1 else f", class {one.label[row]}"
    where = f"{one.name} row {row}" if outside else f"row {row}"
    return picture(one, row, f"{one.name}, row {row}{label}, uncertainty {value:.4g}", f"{value:.3g}\n{where}", outside)


def retrieval_strips(one: Scored, seed: int) -> tuple[list[Strip], dict[str, Any] | None]:
    """Queries with their nearest neighbours in the other half of the set, and which lie in the query's credible set.

    The images are split at random into queries and gallery. Where a head answers with kappa, the directions of its
    posteriors are compared, and the set is the smallest cap with mass .95; else embeddings are, without sets. Nothing where
    images or enough rows lack.
    """
    if not can_show(one) or one.embedding is None or one.embedding.shape[1] < 2 or one.rows < 4 * NEAREST:
        return [], None
    order = np.random.default_rng(seed).permutation(one.rows)
    gallery_rows, queries = np.sort(order[one.rows // 2 :]), np.sort(order[: one.rows // 2])
    try:
        mean, kappa, _ = posterior(one)
    except DataError:
        mean, kappa = one.embedding, None
    direction = directions(f"{one.name}: embedding", mean)
    if kappa is not None:  # from certain to uncertain
        ranked = queries[np.argsort(-kappa[queries], kind="stable")]
        queries = ranked[np.linspace(0, len(ranked) - 1, QUERIES).astype(int)]
    else:
        queries = queries[np.linspace(0, len(queries) - 1, QUERIES).astype(int)]
    for query in queries:  # a copy of a query says nothing about its neighbours
        gallery_rows = gallery_rows[(direction[gallery_rows] != direction[query]).any(1)]
    if len(gallery_rows) < NEAREST:
        return [], None
    near = neighbours(direction[queries], direction[gallery_rows], NEAREST)
    inside = np.zeros((len(queries), len(gallery_rows)), bool)
    if kappa is not None:
        inside[CredibleSets(direction[gallery_rows], alpha=ALPHA).members(direction[queries], kappa[queries])] = True
    strips, told = [], []
    for place, query in enumerate(queries):
        rows = gallery_rows[near[place]]
        cosines = direction[rows] @ direction[query]
        members = inside[place, near[place]]
        size = None if kappa is None else int(inside[place].sum())
        strips.append(_neighbours(one, int(query), rows, cosines, members, size, len(gallery_rows)))
        told.append(
            {
                "query": int(query), "neighbours": rows.tolist(), "cosines": [float(c) for c in cosines],
                "in_set": None if kappa is None else members.tolist(), "set_size": size,
                "kappa": None if kappa is None else float(kappa[query]),
            }
        )  # fmt: skip
    mass = None if kappa is None else 1 - ALPHA
    return strips, {"set": one.name, "mass": mass, "gallery_rows": len(gallery_rows), "queries": told}


def _neighbours(
    one: Scored, query: int, rows: np.ndarray, cosines: np.ndarray, members: np.ndarray, size: int | None, gallery: int
) -> Strip:
    label = one.label if one.label is not None and one.label.ndim == 1 else None

    def of(row: int) -> str:
        return "" if label is None else f"class {label[row]}"

    found = [picture(one, query, f"query: {one.name}, row {query}, {of(query)}", f"query\n{of(query)}")]
    for row, cosine, member in zip(rows, cosines, members, strict=True):
        held = "" if size is None else f", {'inside' if member else 'outside'} the credible set"
        odd = label is not None and label[row] != label[query]
        alt, below = f"row {row}, {of(row)}, cosine {cosine:.3f}{held}", f"{cosine:.3f}\n{of(row)}"
        found.append(picture(one, int(row), alt, below, member, odd))
    title = f"row {query}" if size is None else f"row {query}: {size} of {gallery} images in its credible set"
    return Strip(title, tuple(found))


def picture(one: Scored, row: int, alt: str, words: str, marked: bool = False, odd: bool = False) -> Picture:
    """The thumbnail of a row of a set whose images can be shown."""
    image = _image(one, row).copy()  # the source's own may be in memory, and thumbnails are made in place
    tiny = max(image.size) <= SIDE // 2
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return Picture(_data_uri(image), alt, words, bool(marked), bool(odd), tiny)


def _image(one: Scored, row: int) -> Any:
    """The image of a row: PIL, RGB; a tensor where the source has ready ones."""
    assert one.features is not None
    assert one.features.source is not None
    return load_image(one.features.source.item(int(one.features.row[row])).image)


def _data_uri(image: Image.Image) -> str:
    """PNG where it is small, as for drawings of few pixels, else JPEG of the first quality that keeps within `BYTES`."""
    content, kind = _encoded(image, "PNG", optimize=True), "png"
    for quality in (82, 60, 40, 20):
        if len(content) <= BYTES // 3:
            break
        content, kind = _encoded(image, "JPEG", quality=quality, optimize=True), "jpeg"
        if len(content) <= BYTES:
            break
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
