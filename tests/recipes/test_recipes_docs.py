"""docs/recipes.md: every command line of ours is one that the recipe takes, and every flag beside a paper's is there."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from posthoc.recipes import (
    anisotropic,
    anisotropic_images,
    cifar10h,
    decoupled_uniformity,
    lam,
    synthetic,
    tau,
)
from posthoc.recipes.options import parse, presets_named

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
RECIPES: dict[str, tuple[Any, Any]] = {
    "synthetic": (synthetic.SyntheticConfig, synthetic.PRESETS),
    "anisotropic": (anisotropic.AnisotropicConfig, anisotropic.PRESETS),
    "images": (anisotropic_images.ImagesConfig, anisotropic_images.PRESETS),
    "cifar10h": (cifar10h.Cifar10HConfig, cifar10h.PRESETS),
    "tau": (tau.TauConfig, tau.PRESETS),
    "decoupled_uniformity": (decoupled_uniformity.UniformityConfig, decoupled_uniformity.PRESETS),
    "lam": (lam.LamConfig, lam.PRESETS),
}
NAMES = "|".join(RECIPES)
LINES = [line for line in re.findall(r"-m posthoc\.recipes\.(\w+)((?: [^\n`|]+)?)", TEXT) if line[0] != "NAME"]
SECTIONS = re.findall(rf"^## ({NAMES})$(.*?)(?=^## |\Z)", TEXT, re.M | re.S)


def flags(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z0-9-]*", text))


def options(config: Any) -> set[str]:
    names = {field.name.replace("_", "-") for field in fields(config)}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | {"--preset"}


def column(text: str, *heads: str) -> list[str]:
    """The cells of all tables of a section that stand in a column whose head begins so."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        columns = [i for i, cell in enumerate(head) if cell.startswith(heads)]
        found += [row[i] for row in rows for i in columns]
    return found


def in_code(cells: list[str]) -> set[str]:
    """The flag, or other word, that each piece of code in these cells begins with."""
    return {word for cell in cells for word in re.findall(r"`(?:--)?([\w-]+)[^`]*`", cell)}


def test_every_recipe_has_its_section_and_its_launch_line() -> None:
    assert [name for name, _ in SECTIONS] == list(RECIPES)
    assert {name for name, _ in LINES} >= {"synthetic", "anisotropic", "cifar10h"}
    assert len(LINES) >= 10


@pytest.mark.parametrize(("name", "words"), LINES)
def test_a_command_line_is_taken(name: str, words: str) -> None:
    named, rest = presets_named(shlex.split(words, comments=True))
    if "images" in named:
        name, named = "images", [one for one in named if one != "images"]
    config, presets = RECIPES[name]
    parse(name, config, presets, None, [*(["--preset", *named] if named else []), *rest])


@pytest.mark.parametrize(("name", "text"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_every_flag_beside_a_papers_is_ours(name: str, text: str) -> None:
    found = {flag for cell in column(text, "here", "ours") for flag in flags(cell)}
    assert len(found) > 10
    assert found <= options(RECIPES[name][0])


def flags_of_aninfonce(spec: str) -> set[str]:
    section = re.search(r"(?<=^## 4\. Command line \(defaults\)\n\n).*?(?=\n\n)", spec, re.M | re.S)
    assert section
    return set(re.findall(r"(?:^|; )([a-z][a-z-]*(?:-\d)?)(?= )", section[0], re.M))


def flags_of_mcinfonce(spec: str) -> set[str]:
    table = re.search(r"^\| flag \| default.*?(?=^## 4)", spec, re.M | re.S)
    assert table
    cells = [cell.strip() for line in table[0].splitlines()[2:] for cell in line.strip("|").split("|")[::2]]
    return {word for cell in cells for word in re.findall(r"\b[a-z]+(?:_[a-z]+)*\b", cell.split("(")[0])} - {"max"}


def flags_of_uniformity(spec: str) -> set[str]:
    """Of its pretraining and its linear evaluation, by commas: NAME or NAME/-SHORT, then what else is said of it."""
    lists = re.findall(r"^### 3\.\d CLI, [^\n]*\n(.*?)(?=\. Without|, and the same)", spec, re.M | re.S)
    assert len(lists) == 2
    flat = re.sub(r"\{.*?\}|\(.*?\)", "", ", ".join(lists), flags=re.S)
    return {word for entry in re.split(r",\s", flat) for word in entry.split()[0].split("/-")}


GENERATOR = ("g_", "has_joint", "oversampling", "n_numerical", "n_graphical", "eval_std", "e_dim_hidden", "e_n_hidden")
"""How the flags begin that the synthetic experiment alone has."""
CIFAR = {"traindata", "pretrained", "train", "test"}


SPECS = {
    "synthetic": ("mcinfonce.md", flags_of_mcinfonce),
    "anisotropic": ("aninfonce.md", flags_of_aninfonce),
    "cifar10h": ("mcinfonce.md", flags_of_mcinfonce),
    "decoupled_uniformity": ("decoupled_uniformity.md", flags_of_uniformity),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_flag_of_the_papers_code_is_there(name: str, shared: Path) -> None:
    file, flags_of = SPECS[name]
    theirs = flags_of((shared / "spec" / file).read_text())
    if name == "synthetic":
        theirs -= CIFAR
    if name == "cifar10h":
        theirs = {word for word in theirs if not word.startswith(GENERATOR)}
    assert len(theirs) > 15
    assert theirs <= in_code(column(dict(SECTIONS)[name], "the paper's code", "paper", "theirs"))
