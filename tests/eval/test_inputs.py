"""What score files may hold, and what is told of those that cannot be read."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from posthoc.adapters.errors import DataError
from posthoc.adapters.features import Features
from posthoc.cli import main
from posthoc.eval.arrays import finite
from posthoc.eval.inputs import Scored, from_arrays, from_features, read, same_network


def known(name, by, width=3):
    features = Features.from_arrays(np.ones((2, width), np.float32))
    features.backbone_fingerprint = by
    return from_features(name, features)


def test_sets_of_one_network_are_told_from_sets_of_two():
    plain = Scored("plain", {"u": np.arange(2.0)})
    wide = Scored("wide", logits=np.zeros((2, 5)), embedding=np.zeros((2, 3)))
    same_network([])
    same_network([None, plain, wide, known("a", "f" * 64), None, known("b", None), known("c", "f" * 64)])
    for key, width in (("logits", 4), ("embedding", 2), ("penultimate", 7)):
        other = Scored("other", **{key: np.zeros((9, width))})
        has = Scored("has", **{key: np.zeros((2, width + 1))})
        with pytest.raises(DataError, match=rf"has and other .*{key} \[N, {width + 1}\] and \[N, {width}\]"):
            same_network([plain, None, has, known("a", None), other] if key != "embedding" else [has, other])
    with pytest.raises(DataError, match=r"a and b come from different networks.*ffffffffffff\.\.\. and 000000000000"):
        same_network([known("a", "f" * 64), known("x", None), known("b", "0" * 64)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": np.array(["cat", "dog", "cat", "dog"])}, r"x: label is text \[4\]; whole numbers"),
        ({"label": np.array(3)}, "x: label has no dimension"),
        ({"correct": np.array(True)}, "x: correct has no dimension"),
        ({"logits": np.array(1.0)}, "x: logits has no dimension"),
        ({"label": np.array([0, 1, np.nan, 2])}, r"label is not finite in 1 of 4 rows \(rows 2\)"),
        ({"label": np.array([0, 1.5, 2, 2.5])}, r"label is no whole number in 2 of 4 rows \(rows 1, 3\)"),
        ({"label": np.array([0, 1e300, 2, 2])}, r"label is no whole number in 1 of 4 rows \(rows 1\)"),
        ({"label": np.array([[0.5, 0.5]] * 3 + [[1.5, -0.5]])}, r"label is negative in 1 of 4 rows \(rows 3\)"),
        ({"label": np.array([[0.5, 0.5]] * 3 + [[np.inf, 0]])}, "label is not finite in 1 of 4 rows"),
        ({"label": np.zeros((4, 1))}, r"label is float64 \[4, 1\]"),
        ({"label": np.zeros((4, 2, 2))}, r"label is float64 \[4, 2, 2\]"),
        ({"label": np.zeros(4, complex)}, "label is complex128"),
        ({"correct": np.array(["yes"] * 4)}, "correct is <U3; real numbers"),
        ({"logits": np.array([["a", "b"]] * 4)}, "logits is <U1; real numbers"),
        ({"logits": np.zeros((4, 0))}, r"logits has shape \(4, 0\); .* one row and one column"),
        ({"content": np.zeros((4, 2))}, r"content has shape \(4, 2\)"),
    ],
)
def test_what_no_command_could_use_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        from_arrays("x", {"u": np.arange(4.0), **given})


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int32, np.int64])
def test_whole_labels_of_any_dtype_are_class_indices(dtype):
    one = from_arrays(
        "x", {"label": np.array([0, 1, 2, 9], dtype), "logits": np.eye(10, dtype=np.float32)[[0, 1, 3, 9]]}
    )
    assert one.label.dtype == np.int64
    assert one.label.tolist() == [0, 1, 2, 9]
    assert one.correct.tolist() == [True, True, False, True]
    soft = np.full((4, 10), 0.1, np.float32)
    assert from_arrays("x", {"label": soft}).label is soft
    assert Scored("x", {"u": np.arange(2.0)}, content=["a", ("b", 1)]).keys("content") == ["a", ("b", 1)]


def test_every_table_has_rows_and_columns():
    with pytest.raises(DataError, match="at least one row and one column"):
        finite("a", np.zeros((3, 0)), 2)
    with pytest.raises(DataError, match=r"at least one row$"):
        finite("a", np.zeros(0))
    assert finite("a", np.array([True, False])).dtype == np.float64


def packed(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def other_zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("label.npy", b"junk")
    return file.getvalue()


def objects():
    file = io.BytesIO()
    np.savez(file, u=np.array([{}, {}]))
    return file.getvalue()


def npy():
    file = io.BytesIO()
    np.save(file, np.arange(3.0))
    return file.getvalue()


GOOD = packed(u=np.random.default_rng(0).normal(size=500), label=np.arange(500) % 7)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", npy()),
        ("a.npz", b"these are no arrays"),
        ("a.npz", b""),
        ("a.npz", GOOD[: len(GOOD) // 2]),
        ("a.npz", GOOD[:400] + bytes(40) + GOOD[440:]),
        ("a.npz", other_zip()),
        ("a.npz", objects()),
        ("a.csv", b"path,u\na.png,1\nb.png\n"),
        ("a.csv", b"path,u\na.png,1\nb.png,2,3\n"),
        ("a.csv", "path,u\nä.png,1\n".encode("latin-1")),
        ("a.csv", b"u,label\n1,cat\n2,\n"),
        ("a.csv", b"u,label\n1,0\n2,\n"),
        ("a.csv", b"u\n1\nx\n"),
        ("a.csv", b""),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_and_status_2(tmp_path, name, content, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["eval", "selective", "--data", str(tmp_path / name)])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("posthoc: ")
    assert told.count("\n") == 1
    with pytest.raises(DataError):
        read(tmp_path / name)


def test_a_damaged_archive_never_raises_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.npz"
    for at in rng.integers(0, len(GOOD), 300):
        damaged = bytearray(GOOD)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read(path)
        except DataError:
            continue


def test_csv_of_a_spreadsheet(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffu,label,correct\n1,cat,True\n2,ant,false\n".encode())
    one = read(tmp_path / "a.csv")
    assert one.scores["u"].tolist() == [1, 2]
    assert one.label.tolist() == [1, 0]
    assert one.correct.tolist() == [True, False]
