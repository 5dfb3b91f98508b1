"""What recipes share: the run's folder, shares of a batch, trackers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import OptionError
from posthoc.adapters.training_loop import step_generator
from posthoc.recipes import running
from posthoc.recipes.options import RecipeConfig
from posthoc.recipes.running import Run, row_blocks, seeded_module

from .recipe_children import results, two_processes


@dataclass(kw_only=True)
class Config(RecipeConfig):
    """Options of a recipe."""

    steps: int = 3
    """how many"""


PRESETS = {"default": {"steps": 5}}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_blocks_of_a_batch(world: int) -> None:
    shares = [list(row_blocks(64, 16, Launch(rank, world))) for rank in range(world)]
    assert [block for share in shares for block in share] == [0, 1, 2, 3]
    assert {len(share) for share in shares} == {4 // world}


@pytest.mark.parametrize(("batch", "world"), [(60, 1), (64, 3), (8, 1), (64, 8)])
def test_a_batch_that_cannot_be_shared(batch: int, world: int) -> None:
    with pytest.raises(OptionError, match=f"batch of {batch} rows .* multiple of {16 * world}"):
        row_blocks(batch, 16, Launch(0, world))


def test_first_weights_depend_on_seed_and_place_alone() -> None:
    def weights(seed: int, place: int) -> torch.Tensor:
        return seeded_module(lambda: torch.nn.Linear(3, 3), seed, place).weight

    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first = weights(0, 1)
    assert torch.equal(torch.rand(2), expected)  # the global generator was left alone
    assert torch.equal(first, weights(0, 1))
    assert not torch.equal(first, weights(0, 2))
    assert not torch.equal(first, weights(1, 1))
    assert not torch.equal(torch.rand(2, generator=step_generator(0, 1)), torch.rand(2, generator=step_generator(1, 0)))


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    Run("some", Config(output=tmp_path / "a")).finish({"found": float("nan")})
    said = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (said["recipe"], said["found"], said["config"]["steps"], said["made"]["processes"]) == ("some", None, 3, 1)
    with pytest.raises(OptionError, match="--resume, or give another folder"):
        Run("some", Config(output=tmp_path / "a"))
    Run("some", Config(output=tmp_path / "a", resume=True))
    with pytest.raises(OptionError, match="seed is 0 there and 1 here"):
        Run("some", Config(output=tmp_path / "a", resume=True, seed=1))
    with pytest.raises(OptionError, match="recipe is 'some' there and 'other' here"):
        Run("other", Config(output=tmp_path / "a", resume=True))
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(OptionError, match="not JSON"):
        Run("some", Config(output=tmp_path / "a", resume=True))
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="is a file"):
        Run("some", Config(output=tmp_path / "file"))


def test_a_tracker_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="pip install wandb"):
        Run("some", Config(output=tmp_path / "a", tracker=("wandb",)))
    assert not (tmp_path / "a").exists()


def test_metrics_are_sent_to_a_tracker(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tiny = "--dim 3 --seed 2 --batch-size 16 --steps 2 --every 1 --tracker tensorboard --output a"
    results("anisotropic", tiny.split(), tmp_path)
    (events, *_) = (tmp_path / "a").glob("**/events.out.tfevents.*")
    assert b"train/r2_held_out" in events.read_bytes()


def test_a_run_that_was_made_from_something_else_is_not_continued(tmp_path: Path) -> None:
    config = Config(output=tmp_path / "run")
    images = np.arange(6, dtype=np.uint8)
    first = Run("some", config)
    first.stands_on(images, "weights")
    again = replace(config, resume=True)
    Run("some", again)  # killed before it had read its data: what it was made from stays known
    same = Run("some", again)
    same.stands_on(images.copy(), "weights")
    assert same.signature == first.signature
    for other in ((images + 1, "weights"), (images, "other weights")):
        with pytest.raises(OptionError, match="made from other data or weights"):
            Run("some", again).stands_on(*other)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = []

    def work(config: Config) -> None:
        run = Run("some", config)
        made.append(run)
        run.finish({"figure": len(made)})

    words = ["--output", str(tmp_path / "run")]
    running.main("some", Config, PRESETS, work, None, "--steps", words)
    running.main("some", Config, PRESETS, work, None, "--steps", [*words, "--resume"])
    assert len(made) == 1
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        running.main("some", Config, PRESETS, work, None, "--steps", [*words, "--resume", "--steps", "4"])
    assert "has other options (steps is 5 there and 4 here)" in capsys.readouterr().err


def test_a_run_of_another_precision_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(kw_only=True)
    class Apart(Config):
        """Options of a recipe whose processes may keep to themselves."""

        gather: bool = True
        """whether they do not"""

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for gather in (True, False):
        config = Apart(output=tmp_path / str(gather), gather=gather)
        Run("some", config).finish({})
        again = replace(config, resume=True)
        with monkeypatch.context() as patch:
            patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
            with pytest.raises(OptionError, match="mixed_precision is 'no' there and 'bf16' here"):
                Run("some", again)
        assert json.loads((config.output / "results.json").read_text())["made"]["mixed_precision"] == "no"
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            if gather:
                running.check_folder("some", again)  # the same for any number of processes
            else:
                with pytest.raises(OptionError, match="processes is 1 there and 2 here"):
                    running.check_folder("some", again)


def test_two_processes_tell_once(tmp_path: Path) -> None:
    tiny = "--dim 3 --seed 2 --batch-size 16 --steps 2 --every 1 --output a"
    line = tiny.split()
    results("anisotropic", line, tmp_path)
    status, printed, _ = two_processes("anisotropic", [*line, "--resume"], tmp_path)
    assert (status, printed.count("is finished")) == (0, 1)
    status, _, errors = two_processes("anisotropic", [*line, "--resume", "--steps", "4"], tmp_path)
    assert (bool(status), errors.count("has other options")) == (True, 1)


def test_an_error_of_another_process_is_told_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By then the launcher has ended this process, unless the first one has no error."""

    def work(config: Config) -> None:
        raise OptionError("this machine lacks the data")

    def waits(seconds: float) -> None:
        assert capsys.readouterr().err == ""
        waited.append(seconds)

    waited: list[float] = []
    monkeypatch.setattr(running.time, "sleep", waits)
    line = ["--output", str(tmp_path / "run")]
    for number, expected in (("0", ""), ("1", "process 1: ")):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(SystemExit) as stopped:
            running.main("some", Config, PRESETS, work, None, "--steps", line)
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"posthoc: {expected}this machine lacks the data\n"
    assert waited == [running.OWN_ERROR_AFTER]


def test_a_start_that_failed_leaves_its_folder_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(config: Config) -> None:
        run = Run("some", config)
        if config.steps == 1:
            raise OptionError("the data are not there")
        (run.folder / "fit").mkdir(exist_ok=True)
        (run.folder / "fit" / "checkpoint.pt").touch()
        if config.steps == 2:
            raise OptionError("nothing was learnt")

    def ended(*words: str) -> str:
        with pytest.raises(SystemExit):
            running.main("some", Config, PRESETS, work, None, "--steps", ["--output", str(tmp_path / "run"), *words])
        return capsys.readouterr().err

    assert "not there" in ended("--steps", "1")
    assert "nothing was learnt" in ended("--steps", "2")  # other options, the same folder
    assert "holds a run already" in ended("--steps", "3")  # now there is something to lose
    assert "not there" not in ended("--steps", "1", "--resume")
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("kind", "expected"), [("halved", [1, 1, 0.5, 0.5]), ("constant", [1, 1, 1, 1])])
def test_learning_rates_of_the_papers(kind: str, expected: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = running.scheduled(kind, optimizer, 4)  # type: ignore[arg-type]
    found = []
    for _ in range(4):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == expected


def test_records_of_trainings_count_on_in_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    run = Run("some", Config(output=tmp_path / "run", tracker=("tensorboard",)))
    sent: list[tuple[dict[str, float], int]] = []
    monkeypatch.setattr(run.accelerator, "log", lambda values, step: sent.append((values, step)))
    first, second = run.observe("head", 10), run.observe("whole", 5)
    assert first is not None
    assert second is not None
    first({"step": 10, "loss": 1.0})
    second({"step": 2, "loss": 0.5})
    assert sent == [({"head/loss": 1.0}, 10), ({"whole/loss": 0.5}, 12)]


def _too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def _without_a_word() -> None:
    raise MemoryError


@pytest.mark.parametrize(("work", "said"), [(_too_much, "DefaultCPUAllocator"), (_without_a_word, "(no message)")])
def test_running_out_of_memory_names_the_options(
    work: Callable[[], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        running.main("some", Config, PRESETS, lambda config: work(), None, "--batch-size", [])
    shown = capsys.readouterr().err
    assert said in shown
    assert "give a smaller --batch-size" in shown
