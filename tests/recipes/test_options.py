"""Options of recipes: presets on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from posthoc.adapters.errors import OptionError
from posthoc.recipes.options import RecipeConfig, check_below_one, check_counts, check_least, check_positive, parse


@dataclass(kw_only=True)
class Config(RecipeConfig):
    """Options of a recipe."""

    steps: int = 3
    """how many"""
    names: tuple[str, ...] = ()
    """some"""
    first_share: float | None = None
    """a number"""


PRESETS = {"default": {"steps": 5}, "long": {"steps": 50}, "named": {"names": ("a",)}, "paper": {}}


def parsed(*words: str) -> Config:
    return parse("some", Config, PRESETS, "About it.", words)


def test_presets_are_sets_of_options_and_the_command_line_wins() -> None:
    assert parsed().steps == 5
    assert parsed("--preset", "long").steps == 50
    assert parsed("--preset=named", "--names", "b", "c") == Config(steps=5, names=("b", "c"))  # a variant of default
    assert parsed("--preset", "named", "paper") == Config(steps=3, names=("a",))
    both = parsed("--seed", "2", "--preset", "long", "named", "--steps", "7")
    assert (both.seed, both.steps, both.names) == (2, 7, ("a",))


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'long'"):
        parsed("--preset", "lang")


@pytest.mark.parametrize("words", [["--preset"], ["--preset", "--seed", "2"], ["--preset", "long", "--preset"]])
def test_a_preset_needs_a_name(words: list[str]) -> None:
    with pytest.raises(OptionError, match="--preset was given without a name"):
        parsed(*words)


def test_a_seed_is_a_whole_number_of_31_bits() -> None:
    for seed in ("-1", str(2**31)):
        with pytest.raises(OptionError, match=f"--seed {seed} was given"):
            parsed("--seed", seed)


@pytest.mark.parametrize(
    ("check", "taken", "refused", "expected"),
    [
        (check_counts, (1, 5), (0, -3, math.inf, math.nan), "1 or more"),
        (lambda config, name: check_least(config, 0, name), (0, 0.5), (-0.1, math.inf, math.nan), "0 or more"),
        (check_positive, (0.1, 7), (0, -1, math.inf, math.nan), "a number above 0"),
        (check_below_one, (0, 0.99), (-0.1, 1, math.nan), "a number from 0 to below 1"),
    ],
    ids=["counts", "least", "positive", "below one"],
)
def test_numbers_out_of_range_are_refused(
    check: Callable[[Config, str], None], taken: tuple[float, ...], refused: tuple[float, ...], expected: str
) -> None:
    for value in (None, *taken):
        check(Config(first_share=value), "first_share")
    for value in refused:
        with pytest.raises(OptionError, match=f"--first-share {value} was given; expected {expected}$"):
            check(Config(first_share=value), "first_share")


@pytest.mark.parametrize(("word", "status"), [("--step", 2), ("--help", 0)])
def test_the_first_process_alone_tells_how_options_are_given(
    word: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit) as stopped:
            parsed(word)
        assert stopped.value.code == status
        shown = capsys.readouterr()
        assert bool(shown.out + shown.err) == (number == "0")


def test_help_teaches_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    said = capsys.readouterr().out
    for words in ("About it.", "long: steps 50", "--steps", "how many", "--resume"):
        assert words in said
