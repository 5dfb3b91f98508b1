"""The plain metrics: agreement with scikit-learn and SciPy, arrays and tensors alike, refusals."""

import sys

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import log_loss, roc_auc_score

from posthoc import PosthocError
from posthoc.eval import extras, metrics
from posthoc.eval.statistics import Auroc, Spearman


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_auroc_and_spearman_agree_with_what_the_bootstrap_counts(rng):
    a, b = rng.integers(0, 9, 200) / 3, rng.integers(2, 11, 200) / 3
    assert metrics.auroc(a, b) == pytest.approx(roc_auc_score(np.repeat([0, 1], 200), np.r_[a, b]))
    assert metrics.auroc(a, b) == pytest.approx(float(Auroc(a, b).value()))
    assert metrics.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert metrics.spearman(a, b) == pytest.approx(float(Spearman(a, b).value()))


def test_nll_takes_logits_and_log_probabilities(rng):
    z, label = rng.normal(size=(9000, 4)) * 3, rng.integers(0, 4, 9000)
    p = torch.from_numpy(z).softmax(1)
    assert metrics.nll(z, label) == pytest.approx(log_loss(label, p.numpy()))
    assert metrics.nll(p.log(), torch.from_numpy(label)) == pytest.approx(metrics.nll(z, label))
    assert metrics.nll_per_image(z, label).shape == (9000,)


def test_a_calibrated_model_has_a_small_calibration_error(rng):
    p = rng.dirichlet([0.5] * 3, 50_000)
    label = (p.cumsum(1) > rng.random((50_000, 1))).argmax(1)
    assert metrics.ece(*metrics.confidence_and_correct(np.log(p), label)) < 0.01
    assert metrics.ece(*metrics.confidence_and_correct(np.log(p) * 4, label)) > 0.1


def test_a_perfect_score_rejects_the_errors_first():
    wrong = np.arange(100) >= 80
    u = np.arange(100)
    curve = metrics.accuracy_rejection_curve(u, ~wrong)
    assert curve[0] == pytest.approx(0.8)
    assert curve[20] == pytest.approx(1.0)
    assert np.all(np.diff(curve) >= 0)
    assert metrics.aurc(u, wrong) < metrics.aurc(np.zeros(100), wrong) == pytest.approx(0.2)
    assert metrics.aurc(-u, wrong) > 0.2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auroc([], [1.0]), "at least one row"),
        (lambda: metrics.spearman([1.0, 1.0], [1.0, 2.0]), "constant"),
        (lambda: metrics.spearman([1.0, 2.0, 3.0], [1.0, 2.0]), "lengths differ"),
        (lambda: metrics.nll(np.zeros((2, 3)), [0, 3]), "from 0 to 2"),
        (lambda: metrics.nll(np.zeros((2, 3)), [0.5, 1.0]), "whole numbers"),
        (lambda: metrics.nll(np.zeros((2, 3)), [0]), r"\[N, C\]"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(PosthocError, match=message):
        call()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)  # what an uninstalled package looks like to import
    with pytest.raises(PosthocError, match=r"scikit-learn.*posthoc\[eval\]"):
        extras.require("sklearn.metrics", "scikit-learn")
    with pytest.raises(PosthocError, match=r"posthoc\[demo\]"):
        extras.require("no_such_module_of_anyone", "that package", "demo")
