"""Adapters from strangers: hostile ones are refused in words, run nothing, and take little time and memory."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

import posthoc
from posthoc.adapters import files
from posthoc.adapters.errors import AdapterError, PosthocError

from .hostile_adapters import Case, cases
from .seeded import images, tiny

GOOD = Path(__file__).parent / "fixtures" / "schema1-five-heads"
CHILD = Path(__file__).with_name("hostile_child.py")
SECONDS, BYTES = 1.0, 200e6  # of CPU and of memory, for any one of them
CASES = cases()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every case, in one process that measures itself."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs to measure the memory of each case")
    root = tmp_path_factory.mktemp("hostile")
    shutil.copytree(GOOD, root / "good")
    asked = [{"name": "good", "address": str(root / "good"), "own": True}]
    for number, case in enumerate(CASES):
        folder = root / str(number)
        shutil.copytree(GOOD, folder)
        answer = case.change(folder)
        address = str(answer) if isinstance(answer, str | Path) else str(folder)
        asked.append({"name": case.name, "address": address, "own": case.own})
    (root / "cases.json").write_text(json.dumps(asked))
    (root / "empty").mkdir()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
    environment |= {"POSTHOC_CACHE": str(root / "cache")}
    command = [sys.executable, str(CHILD), str(root / "cases.json")]
    done = subprocess.run(
        command,
        env=environment,
        cwd=root / "empty",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (root / "executed").exists()
    assert not list((root / "empty").iterdir())
    found = {answer["name"]: answer for answer in json.loads((root / "answers.json").read_text())}
    for case, one in zip(asked[1:], CASES, strict=True):
        found[one.name]["home"] = os.path.realpath(root / case["name"].split(":")[0])
    return found


def test_there_are_hundreds_of_them() -> None:
    assert sum(not (case.intact or case.other) for case in CASES) >= 700
    assert sum(case.intact for case in CASES) >= 10


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_adapter_is_refused_in_words_or_means_the_same(
    case: Case, answers: dict[str, dict[str, Any]]
) -> None:
    answer, good = answers[case.name], answers["good"]["scores"]
    assert "crashed" not in answer, answer["crashed"]
    if case.intact:
        assert answer.get("scores") == good, answer.get("message")
    elif case.other and "scores" in answer:
        assert all(torch.tensor(scores).isfinite().all() for scores in answer["scores"].values())
    else:
        assert "scores" not in answer
        assert 20 < len(answer["message"]) < 2000
    assert answer["seconds"] < SECONDS
    assert answer["bytes"] < BYTES
    assert answer["events"] == []
    assert answer["modules"] == []
    assert [path for path in answer["opened"] if not Path(os.path.realpath(path)).is_relative_to(answer["home"])] == []


def loads(folder: Path) -> dict[str, list[float]] | None:
    """Its scores, or None when it is refused; anything else than a PosthocError, or a second of CPU, fails the test."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of another preprocessing
            model = posthoc.load(folder, backbone=tiny())
    except PosthocError:
        return None
    finally:
        assert time.process_time() - start < SECONDS
    prediction = model(images(4, key=9)[0])
    return {head: prediction[head].uncertainty.tolist() for head in prediction.heads}


def finite(scores: dict[str, list[float]] | None) -> bool:
    return scores is None or all(torch.tensor(values).isfinite().all() for values in scores.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(GOOD, tmp_path_factory.mktemp("mutated") / "adapter"))


def write(folder: Path, raw: dict[str, Any], content: bytes) -> None:
    raw["weights"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / files.WEIGHTS_NAME).write_bytes(content)
    (folder / files.CONFIG_NAME).write_text(json.dumps(raw))


def good() -> tuple[dict[str, Any], bytes]:
    return json.loads((GOOD / files.CONFIG_NAME).read_text()), (GOOD / files.WEIGHTS_NAME).read_bytes()


SOME = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


@SOME
@given(content=st.binary(max_size=300), header=st.booleans())
def test_random_bytes_are_refused(content: bytes, header: bool, folder: Path) -> None:
    raw, weights = good()
    write(folder, raw, len(content).to_bytes(8, "little") + content + weights if header else content)
    assert loads(folder) is None
    (folder / files.CONFIG_NAME).write_bytes(content)
    assert loads(folder) is None


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@SOME
@given(data=st.data())
def test_a_mutated_config_is_refused_or_means_the_same(data: st.DataObject, folder: Path) -> None:
    raw, content = good()
    places: list[tuple[Any, Any]] = []

    def walk(at: Any) -> None:
        for key in at if isinstance(at, dict) else range(len(at)):
            places.append((at, key))
            if isinstance(at[key], dict | list):
                walk(at[key])

    walk({name: value for name, value in raw.items() if name != "weights"})
    for _ in range(data.draw(st.integers(1, 2))):
        at, key = data.draw(st.sampled_from(places))
        if isinstance(at, dict) and data.draw(st.booleans()):
            at[data.draw(st.text(max_size=8))] = data.draw(VALUES)
        else:
            at[key] = data.draw(VALUES)
    write(folder, raw, content)
    scores = loads(folder)
    if scores is not None:
        shutil.copytree(GOOD, folder, dirs_exist_ok=True)
        expected = loads(folder)
        assert expected is not None
        assert all(scores[head] == expected[head] for head in scores)


@SOME
@given(data=st.data())
def test_mutated_tensors_are_refused_or_give_finite_scores(data: st.DataObject, folder: Path) -> None:
    raw, content = good()
    tensors = load_file(GOOD / files.WEIGHTS_NAME)
    name = data.draw(st.sampled_from(sorted(tensors)))
    value = tensors[name].clone()
    kind = data.draw(st.sampled_from(("fill", "one", "scale", "shape", "dtype", "bytes", "drop", "name")))
    if kind == "fill":
        value.fill_(data.draw(st.sampled_from((0, -1, 1, 2**40, -(2**40)))))
    elif kind == "one":
        value.view(-1)[data.draw(st.integers(0, value.numel() - 1))] = data.draw(st.integers(-(2**40), 2**40))
    elif kind == "scale":
        value = (value * data.draw(st.sampled_from((-1, 1000, 10**9)))).to(value.dtype)
    elif kind == "shape":
        value = value[None] if data.draw(st.booleans()) else value.view(-1)[: data.draw(st.integers(0, value.numel()))]
    elif kind == "dtype":
        value = value.to(
            data.draw(st.sampled_from((torch.float64, torch.float16, torch.int8, torch.bool, torch.complex64)))
        )
    tensors[name] = value.contiguous()
    if kind in ("drop", "name"):
        del tensors[name]
    if kind == "name":
        tensors[data.draw(st.text(max_size=8))] = value
    content = save(tensors)
    if kind == "bytes":
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(changed)
    write(folder, raw, content)
    assert finite(loads(folder))


def test_a_card_that_is_a_link_is_not_read_into_another(tmp_path: Path) -> None:
    shutil.copytree(GOOD, tmp_path / "x")
    (tmp_path / "secret").write_text("a private file")
    (tmp_path / "x" / files.CARD_NAME).unlink()
    (tmp_path / "x" / files.CARD_NAME).symlink_to(tmp_path / "secret")
    model = posthoc.load(tmp_path / "x", backbone=tiny())
    with pytest.raises(AdapterError, match="a link to a file outside"):
        model.save_pretrained(tmp_path / "x")
    assert (tmp_path / "secret").read_text() == "a private file"


PACKAGE = Path(posthoc.__file__).parent
SOURCES = [
    path
    for part in ("*.py", "adapters/**/*.py", "hub/**/*.py", "eval/**/*.py", "recipes/**/*.py")
    for path in PACKAGE.glob(part)
]
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_of_the_package_runs_or_unpickles_what_it_reads(path: Path) -> None:
    text = path.read_text()
    assert "trust_remote_code" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not UNPICKLERS & {name.split(".")[0] for name in names}, f"line {node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "exec", "compile", "__import__"), f"line {node.lineno}"
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}"
        assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}"
        if path.parent.name in ("adapters", "heads", "losses", "hub") and called.endswith("import_module"):
            # a package's face imports the names of its own table late
            assert path.name == "__init__.py", f"line {node.lineno}"
