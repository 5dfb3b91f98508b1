"""Exact search: NumPy's full sort, chunks and blocks that change nothing, faiss, memory, and what is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posthoc.adapters.errors import DataError, OptionError
from posthoc.eval import search


def brute_force(query: np.ndarray, gallery: np.ndarray, k: int, own: np.ndarray | None = None) -> np.ndarray:
    similar = query @ gallery.T
    if own is not None:
        similar[np.arange(len(query)), own] = -np.inf
    return np.argsort(-similar, axis=1, kind="stable")[:, :k]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 900), st.sampled_from([np.float32, np.float64]))
def test_neighbours_are_those_of_a_full_sort(seed: int, queries: int, rows: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    query, gallery = (search.as_unit(rng.normal(size=(n, 6)).astype(dtype)) for n in (queries, rows))
    k = int(rng.integers(1, min(rows, 12)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BLOCK", 8)  # several blocks and a rest
        patch.setattr(search, "COLUMNS", 300)  # several chunks of the gallery
        patch.setitem(search.QUERIES, "cpu", 7)  # and of the queries
        found = search.neighbours(query, gallery, k)
        alone = search.neighbours(gallery, k=k)
        own = rng.integers(0, rows, queries)
        without = search.neighbours(query, gallery, k, own=own)
    similar = (query @ gallery.T)[np.arange(queries)[:, None], found]
    wanted = brute_force(query, gallery, k)
    np.testing.assert_allclose(similar, np.take_along_axis(query @ gallery.T, wanted, 1), rtol=1e-5, atol=1e-6)
    if dtype is np.float64:
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(alone, brute_force(gallery, gallery, k, np.arange(rows)))
        np.testing.assert_array_equal(without, brute_force(query, gallery, k, own))
    assert (alone != np.arange(rows)[:, None]).all()
    assert (without != own[:, None]).all()


def test_many_ties_are_no_trouble() -> None:
    """Three distinct rows, a thousand times each: every neighbour is as near as the best, and none comes twice."""
    gallery = np.repeat(np.eye(3), 1000, axis=0)
    found = search.neighbours(np.eye(3), gallery, 10)
    assert (found // 1000 == np.arange(3)[:, None]).all()
    assert all(len(set(row)) == 10 for row in found.tolist())


def test_equal_images_find_each_other_but_never_themselves() -> None:
    z = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert search.neighbours(z).ravel().tolist() == [1, 0, 3, 2]
    assert search.neighbours(z[:2]).ravel().tolist() == [1, 0]


def test_faiss_finds_the_same() -> None:
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    rng = np.random.default_rng(0)
    z = search.as_unit(rng.normal(size=(500, 16)).astype(np.float32))
    z[100:104] = z[0]  # more equal images than neighbours asked for
    for arguments in ((z, None, 3), (z[:50] + 0.01, z, 20)):
        ours, theirs = (search.neighbours(*arguments, backend=backend) for backend in ("torch", "faiss"))
        gallery = z if arguments[1] is None else arguments[1]
        near = [np.einsum("qd,qkd->qk", arguments[0], gallery[found]) for found in (ours, theirs)]
        np.testing.assert_allclose(*near, atol=1e-6)
    alone = search.neighbours(z, k=3, backend="faiss")
    assert (alone != np.arange(500)[:, None]).all()
    assert set(alone[0]) < {100, 101, 102, 103}
    with pytest.raises(OptionError, match="searches on the CPU"):
        search.neighbours(z, device="meta", backend="faiss")


def test_a_memory_map_is_searched_without_being_loaded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gallery = search.as_unit(rng.normal(size=(400_000, 16)).astype(np.float16).astype(np.float32)).astype(np.float16)
    np.save(tmp_path / "gallery.npy", gallery)
    query = search.as_unit(rng.normal(size=(20, 16)).astype(np.float32))
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    tracemalloc.start()
    found = search.neighbours(query, mapped, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(found, search.neighbours(query, gallery.astype(np.float32), 5))
    assert peak < 12 * 2**20  # two chunks in float32 are 8 MB; the whole would be 26


def test_directions_of_any_length() -> None:
    rows = np.array([[3.0, 4.0], [3e-200, 4e-200], [3e300, 4e300]])
    np.testing.assert_allclose(search.directions("z", rows), [[0.6, 0.8]] * 3)
    assert search.directions("z", rows[:1].astype(np.float16)).dtype == np.float32
    assert search.neighbours(np.empty((0, 2)), rows).shape == (0, 1)


Z = np.eye(3)
GAP = np.where(np.arange(9).reshape(3, 3) == 4, np.nan, Z)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: search.neighbours(Z, k=3), DataError, "k <= 2"),
        (lambda: search.neighbours(Z[:1]), DataError, "k <= 0"),
        (lambda: search.neighbours(Z, Z[:, :2]), DataError, r"\(3, 3\) and \(3, 2\)"),
        (lambda: search.neighbours(Z, Z[:0]), DataError, "gallery is empty"),
        (lambda: search.neighbours(GAP), DataError, r"the queries: 1 rows hold NaN .*\(rows 1\)"),
        (lambda: search.neighbours(Z, GAP), DataError, r"the gallery: 1 rows hold NaN .*\(rows 1\)"),
        (lambda: search.neighbours(Z, Z, own=np.array([0, 1, 3])), DataError, "0 to 2"),
        (lambda: search.neighbours(Z, Z, own=np.array([0])), DataError, "for each query"),
        (lambda: search.neighbours(Z, backend="annoy"), OptionError, "'torch', 'faiss'"),
        (lambda: search.directions("z", Z * [[1], [0], [1]]), DataError, r"z: 1 of 3 rows are 0 .*\(rows 1\)"),
        (lambda: search.directions("z", GAP), DataError, r"NaN .*rows 1"),
        (lambda: search.directions("z", Z[:0]), DataError, "at least one row"),
        (lambda: search.directions("z", Z[0]), DataError, r"\(3,\)"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
