"""The training loop: learns, stops early, resumes bit for bit, refuses what cannot work."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import posthoc
from posthoc.adapters.training import TrainOptions, epochs_for, step_generator, train

X = torch.randn(400, 5, generator=torch.Generator().manual_seed(1))
Y = X @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
TRAIN, HELD_OUT = np.arange(320), torch.arange(320, 400)


class Regression(nn.Module):
    """A step whose loss also draws random numbers, as Monte-Carlo losses do."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(5, 1)

    def forward(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        noise = 0.1 * torch.randn(len(rows), generator=generator)
        return ((self.linear(X[rows])[:, 0] - Y[rows] + noise) ** 2).mean()

    @torch.no_grad()
    def held_out(self) -> float:
        return float(((self.linear(X[HELD_OUT])[:, 0] - Y[HELD_OUT]) ** 2).mean())


def run(step: Regression, epochs: int = 8, evaluate: object = None, **options: object):
    chosen = TrainOptions(batch_size=32, progress=False, **options)  # type: ignore[arg-type]
    return train(step, TRAIN, evaluate or step.held_out, name="x", options=chosen, epochs=epochs, lr=0.1)


def test_it_learns_and_keeps_the_best_state() -> None:
    step = Regression()
    before = step.held_out()
    result = run(step)
    assert step.held_out() < 0.05 * before
    assert step.held_out() == pytest.approx(min(result.held_out), rel=1e-5)
    assert result.best_epoch == int(np.argmin(result.held_out))


def test_it_stops_when_the_held_out_loss_no_longer_falls() -> None:
    step = Regression()
    values = iter([3.0, 1.0] + [2.0] * 100)
    result = run(step, epochs=100, evaluate=lambda: next(values))
    assert len(result.held_out) == 2 + 20
    assert result.best_epoch == 1


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = Regression()
    whole = run(unbroken, output_dir=tmp_path / "a")
    broken, calls = Regression(), 0

    def stop_in_epoch_4() -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return broken.held_out()

    with pytest.raises(Killed):
        run(broken, output_dir=tmp_path / "b", evaluate=stop_in_epoch_4)
    resumed = Regression()
    result = run(resumed, output_dir=tmp_path / "b")
    assert torch.equal(resumed.linear.weight, unbroken.linear.weight)
    assert result.held_out == whole.held_out
    lines = [json.loads(line) for line in (tmp_path / "b/x/metrics.jsonl").read_text().splitlines()]
    assert [line["held_out_loss"] for line in lines] == whole.held_out


def test_a_checkpoint_of_another_fit_is_not_continued(tmp_path: Path) -> None:
    run(Regression(), output_dir=tmp_path, seed=0)
    other, fresh = Regression(), Regression()
    run(other, output_dir=tmp_path, seed=1)
    run(fresh, seed=1)
    assert torch.equal(other.linear.weight, fresh.linear.weight)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(Regression(), epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_draws_depend_on_seed_and_place_only() -> None:
    a = torch.rand(4, generator=step_generator(0, 3, 1))
    assert torch.equal(a, torch.rand(4, generator=step_generator(0, 3, 1)))
    places = [(0,), (0, 0), (0, 0, 0), (0, 3), (0, 3, 0), (0, 3, 1), (0, 1, 3), (3, 0, 1), (3, 1)]
    first = {float(torch.rand((), generator=step_generator(*place))) for place in places}
    assert len(first) == len(places)  # also those that differ by zeros at the end


def test_a_loss_that_is_not_finite_stops_the_fit() -> None:
    class Broken(Regression):
        def forward(self, rows: Tensor, generator: torch.Generator) -> Tensor:
            return super().forward(rows, generator) * torch.tensor(float("nan"))

    with pytest.raises(posthoc.PosthocError, match="smaller lr"):
        run(Broken())


def test_one_row_is_too_few() -> None:
    step = Regression()
    with pytest.raises(posthoc.PosthocError, match="at least 2 rows"):
        train(step, TRAIN[:1], step.held_out, name="x", options=TrainOptions(progress=False), epochs=1, lr=0.1)


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"lr": -1.0}, {"lr": float("inf")}, {"batch_size": 1}])
def test_options_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(posthoc.PosthocError, match="was given; expected"):
        TrainOptions(**bad)


@pytest.mark.parametrize(("rows", "epochs"), [(100, 200), (51_200, 10), (10_000_000, 5)])
def test_epochs_follow_from_the_wanted_steps(rows: int, epochs: int) -> None:
    assert epochs_for(rows, 512, 1000) == epochs


@pytest.mark.parametrize("options", [{"epochs": 1.5}, {"epochs": 0}, {"seed": -1}, {"batch_size": "8"}, {"lr": 0.0}])
def test_training_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(posthoc.PosthocError, match=str(next(iter(options)))):
        TrainOptions(**options)


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    values = iter([3.0, 1.0] + [2.0] * 20 + [0.0] * 10)
    first = run(Regression(), epochs=100, evaluate=lambda: next(values), output_dir=tmp_path)
    step = Regression()
    again = run(step, epochs=100, evaluate=lambda: next(values), output_dir=tmp_path)
    assert len(first.held_out) == 22
    assert again.held_out == first.held_out
    assert again.best_epoch == 1


def test_a_score_that_is_no_number_is_not_the_best() -> None:
    step = Regression()
    values = iter([float("nan"), 3.0, float("nan"), 2.0])
    result = run(step, epochs=4, evaluate=lambda: next(values))
    assert result.best_epoch == 3


def test_what_a_step_takes_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row numbers stay whole and on the CPU: processes that share GPUs would move tensors among the arguments."""
    seen: list[object] = []

    class Watching(Regression):
        def forward(self, rows: Tensor, generator: torch.Generator) -> Tensor:
            seen.append((rows.dtype, rows.device.type))
            return super().forward(rows, generator)

    from torch.nn.parallel.scatter_gather import scatter_kwargs

    from posthoc.adapters.training_loop import _Arguments, _Called

    given = _Arguments((torch.arange(4), torch.Generator()))
    inputs, _ = scatter_kwargs((given,), {}, [0])
    (passed,) = inputs[0]
    assert passed is given
    _Called(Watching())(passed)
    assert seen == [(torch.int64, "cpu")]
