"""Scores over augmented views: definitions by brute force, the reference's disagreement, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import entropy

from posthoc import PosthocError
from posthoc.eval import augmentation

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "tau"


def test_entropy_of_the_mean_and_mutual_information():
    z = np.random.default_rng(0).normal(size=(50, 6, 4)) * 2
    p = np.exp(z) / np.exp(z).sum(2, keepdims=True)
    total = np.array([entropy(one.mean(0)) for one in p])
    each = np.array([np.mean([entropy(view) for view in one]) for one in p])
    assert augmentation.entropy_of_mean(z) == pytest.approx(total, rel=1e-5)
    assert augmentation.mutual_information(z) == pytest.approx(total - each, abs=1e-6)


def test_views_that_agree_have_no_information_and_opposite_ones_log_of_their_number():
    same = np.repeat(np.random.default_rng(0).normal(size=(5, 1, 3)), 4, axis=1)
    assert augmentation.mutual_information(same) == pytest.approx(np.zeros(5), abs=1e-7)
    assert augmentation.embedding_spread(same) == pytest.approx(np.zeros(5), abs=1e-7)
    apart = np.eye(3)[None] * 200
    assert augmentation.mutual_information(apart) == pytest.approx([np.log(3)])
    assert augmentation.entropy_of_mean(apart) == pytest.approx([np.log(3)])


def test_chunks_do_not_matter(monkeypatch):
    z = np.random.default_rng(1).normal(size=(23, 3, 5)).astype(np.float32)
    whole = augmentation.embedding_spread(z)
    monkeypatch.setattr(augmentation, "NUMBERS", 60)
    assert np.array_equal(augmentation.embedding_spread(z), whole)


@pytest.mark.parametrize("name", ["disagreement_m10_n12_d8_s160", "disagreement_m5_n20_d16_s161"])
def test_golden_disagreement(name):
    if not GOLDEN.is_dir():
        pytest.skip("needs the golden numbers in ../shared")
    golden = np.load(GOLDEN / f"{name}.npz")
    found = augmentation.embedding_spread(golden["outputs"].transpose(1, 0, 2))
    assert found == pytest.approx(golden["score"], rel=1e-5)
    if "score_mc_dropout" in golden:
        assert found == pytest.approx(golden["score_mc_dropout"], rel=1e-5)


def test_bad_views_are_refused():
    with pytest.raises(PosthocError, match="views=V"):
        augmentation.entropy_of_mean(np.zeros((3, 4)))
    with pytest.raises(PosthocError, match="at least two"):
        augmentation.embedding_spread(np.ones((3, 1, 4)))
