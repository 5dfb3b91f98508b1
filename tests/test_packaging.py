"""What is built and installed is all there is: every subpackage, one version, one import."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import posthoc

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LISTED: list[str] = PROJECT["tool"]["setuptools"]["packages"]

IMPORT_ALL = """
import importlib, pkgutil, sys
import posthoc
names = [m.name for m in pkgutil.walk_packages(posthoc.__path__, "posthoc.") if not m.name.startswith("posthoc.tests")]
for name in names:
    importlib.import_module(name)
files = [m.__file__ for m in list(sys.modules.values()) if (getattr(m, "__name__", "") or "").startswith("posthoc")]
assert len(files) == len(set(files)), "a file was imported under two names"
print(*names)
"""


def _folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def _packages(folder: Path = ROOT, name: str = "posthoc") -> list[str]:
    """Every folder with an __init__.py whose parents have one too."""
    inner = [(path.parent, f"{name}.{path.parent.name}") for path in sorted(folder.glob("*/__init__.py"))]
    return [name, *(package for path, child in inner for package in _packages(path, child))]


def _modules() -> set[str]:
    """Paths, as in a wheel, of all that the package must carry."""
    found = [path for package in LISTED for path in _folder(package).glob("*.py")]
    for package, names in PROJECT["tool"]["setuptools"]["package-data"].items():
        found += [_folder(package) / name for name in names]
    return {f"posthoc/{path.relative_to(ROOT).as_posix()}" for path in found}


def test_every_subpackage_is_listed() -> None:
    assert sorted(LISTED) == sorted(_packages())
    for package in LISTED[1:]:
        stray = {path.parent for path in _folder(package).rglob("*.py")} - {_folder(name) for name in LISTED}
        assert not stray, "folders of code without an __init__.py are left out of every wheel"


def test_the_version_stands_in_one_place() -> None:
    number = PROJECT["project"]["version"]
    assert posthoc.__version__ == number, "the installed metadata is older than pyproject.toml: install again"
    for package in LISTED:
        for path in _folder(package).glob("*.py"):
            text = path.read_text()
            assert f'"{number}"' not in text, path
            assert not re.search(r"__version__\s*(:.*)?=\s*[\"']", text), path


def test_the_package_is_typed_and_its_names_exist() -> None:
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["posthoc"]
    assert (ROOT / "py.typed").is_file()
    for name in posthoc.__all__:
        assert getattr(posthoc, name) is not None
    assert set(posthoc.__all__) <= set(dir(posthoc))


def test_every_module_imports_from_anywhere_and_only_once(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert set(LISTED) - {"posthoc"} <= set(run.stdout.split())


def test_nothing_of_the_checkout_is_imported_under_another_name() -> None:
    folders = {_folder(package) for package in LISTED}
    files = {name: Path(getattr(m, "__file__", None) or "/").resolve() for name, m in list(sys.modules.items())}
    here = {name: file for name, file in files.items() if file.parent in folders and file.is_file()}
    assert [name for name in here if name != "posthoc" and not name.startswith("posthoc.")] == []
    assert len(set(here.values())) == len(here)


def test_wheel_and_sdist_carry_every_file(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("needs setuptools >= 77 in this environment")
    checkout = tmp_path / "my-repo"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "galleries")
    shutil.copytree(ROOT, checkout, ignore=unwanted)
    for kind in ("wheel", "sdist"):
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(tmp_path)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, timeout=300, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    built = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert built == _modules()
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.removeprefix("posthoc/") for name in _modules()} <= carried
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/pytest.ini", "tests/conftest.py"} <= carried
    assert sdist.name == f"posthoc-{PROJECT['project']['version']}.tar.gz"
