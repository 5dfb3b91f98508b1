"""The options of recipes: what each of them has, and named presets on the command line.

    --preset smoke clear --seed 3

A preset is a set of options. Several may be named: a size (default, where none is named) and variants of it; later ones
win, and what stands beside them on the command line wins over all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..adapters.errors import OptionError, suggest
from ..adapters.losses.elk import PAPER_FIT

SIZES = ("default", "smoke", "paper")
"""Presets that others are laid on: the first where none of them is named."""
Tracker = Literal["tensorboard", "wandb", "trackio"]
Preset = Mapping[str, Any]


@dataclass(kw_only=True)
class RecipeConfig:
    """The options of every recipe."""

    output: Path = Path("runs")
    """folder of the run"""
    seed: int = 0
    """decides every random number: the same seed gives the same result"""
    resume: bool = False
    """continue the run that is in that folder"""
    check: bool = False
    """fail unless the run has learnt what its preset smoke learns"""
    tracker: tuple[Tracker, ...] = ()
    """also send the metrics there: tensorboard, wandb or trackio, by accelerate"""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise OptionError(f"--seed {self.seed} was given; expected a whole number from 0 to 2^31 - 1")


def check_counts(config: RecipeConfig, *names: str) -> None:
    """Raises OptionError for an option of these that is below 1. None, which says that it was not given, passes."""
    check_least(config, 1, *names)


def check_least(config: RecipeConfig, least: int, *names: str) -> None:
    """Raises OptionError for an option of these that is below `least`, or not finite. None passes."""
    _check(config, names, lambda value: least <= value < math.inf, f"{least} or more")


def check_positive(config: RecipeConfig, *names: str) -> None:
    """Raises OptionError for an option of these that is not above 0, and finite. None passes."""
    _check(config, names, lambda value: 0 < value < math.inf, "a number above 0")


def check_below_one(config: RecipeConfig, *names: str) -> None:
    """Raises OptionError for an option of these that is not from 0 to below 1. None passes."""
    _check(config, names, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def check_read(
    config: RecipeConfig, uses: Iterable[tuple[Sequence[str], bool, str]], presets: Mapping[str, Preset]
) -> None:
    """Raises OptionError for an option that was given and is not read: of (options, whether they are read, what reads them).

    A number that a size sets, or a paper's preset, is no mistake: these are for several methods, and others are laid on them.
    """
    for names, read, of in uses:
        given = [name for name in names if getattr(config, name) not in usual(type(config), name, presets)]
        if given and not read:
            name = given[0]
            raise OptionError(f"--{name.replace('_', '-')} {getattr(config, name)} was given; it is read with {of}")


def usual(kind: type[RecipeConfig], name: str, presets: Mapping[str, Preset]) -> list[Any]:
    """The values that an option has by the sizes and the papers' presets alone. A flag that these set counts as given."""
    sizes = [values for preset, values in presets.items() if preset.split("-")[0] in SIZES]
    return [getattr(kind, name), *(one[name] for one in sizes if name in one and one[name] is not True)]


def _check(config: RecipeConfig, names: Sequence[str], fits: Callable[[float], bool], expected: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise OptionError(f"--{name.replace('_', '-')} {value} was given; expected {expected}")


def check_paper_fit(config: Any, dim: str) -> None:
    """Raises OptionError where elk has the paper's normaliser (--loss elk --reference) and no fit of it for the option `dim`."""
    given = getattr(config, dim)
    if config.loss == "elk" and config.reference and given not in PAPER_FIT:
        raise OptionError(
            f"--loss elk --reference --{dim.replace('_', '-')} {given} was given; the paper's normaliser is fitted for "
            f"{', '.join(map(str, PAPER_FIT))} dimensions: take one of these, or leave --reference out"
        )


C = TypeVar("C", bound=RecipeConfig)


def parse(name: str, config: type[C], presets: Mapping[str, Preset], about: str | None, arguments: Sequence[str]) -> C:
    """The config of a command line. Raises OptionError for an unknown preset, SystemExit as tyro does."""
    import tyro

    names, rest = presets_named(arguments)
    options: dict[str, Any] = {}
    for one in names if set(names) & set(SIZES) else ["default", *names]:
        if one not in presets:
            raise OptionError(f"--preset {one!r} is unknown; {suggest(one, presets)}")
        options.update(presets[one])
    shown = "\n".join(f"  {key}: {_shown(value)}" for key, value in presets.items())
    sizes = " or ".join(SIZES)
    text = f"{about or ''}\n\n--preset NAME [NAME ...] sets several options at once: {sizes}, and variants of it. Without a size"
    text += f"\nit is {SIZES[0]}.\n{shown}"
    return tyro.cli(
        config,
        prog=f"posthoc.recipes.{name}",
        description=text,
        default=config(**options),
        args=rest,
        console_outputs=process_number() == 0,  # every process of a launch would say the same
    )


def process_number() -> int:
    """This process's number in its launch, before accelerate is up; 0 without a launch."""
    return int(os.environ.get("RANK") or 0)


def presets_named(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names that stand behind --preset, and all other words. Raises OptionError for a --preset without a name."""
    names: list[str] = []
    rest: list[str] = []
    taking = empty = False
    for word in (*arguments, "--"):
        if word.startswith("-") and empty:
            raise OptionError("--preset was given without a name; expected one or more, as --help lists them")
        if word == "--preset" or word.startswith("--preset="):
            taking, empty = True, "=" not in word
            names += word.split("=", 1)[1:]
        elif word.startswith("-"):
            taking = False
            rest.append(word)
        else:
            (names if taking else rest).append(word)
            empty = False
    return names, rest[:-1]


def _shown(options: Preset) -> str:
    words = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in options.items())
    return words or "the options' own defaults"
