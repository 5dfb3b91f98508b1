"""Positive pairs and negatives: frequencies against their definition, and true negatives only."""

import numpy as np
import pytest
import torch

import posthoc
from posthoc.adapters.positives import FeatureTable, LabelPairs, SoftLabelPairs, ViewPairs, draw_negatives


def identity_table(n: int) -> FeatureTable:
    """Features that are the row's own number, so that a drawn row can be read off."""
    return FeatureTable(np.arange(n, dtype=np.float32)[:, None])


def test_label_positives_are_uniform_over_the_other_members(generator: torch.Generator) -> None:
    labels = np.array([0, 1, 0, 2, 0, 1, 0, 2])
    pairs = LabelPairs(identity_table(8), labels, np.arange(8))
    batch = pairs.draw(torch.zeros(3_000, dtype=torch.int64), generator)
    drawn, counts = torch.unique(batch.positive[:, 0].long(), return_counts=True)
    assert drawn.tolist() == [2, 4, 6]
    assert (counts.double() / 3_000 - 1 / 3).abs().max() < 4 * (2 / 9 / 3_000) ** 0.5


def test_label_positives_come_from_the_given_rows_only(generator: torch.Generator) -> None:
    labels = np.arange(100) % 5
    rows = np.arange(0, 100, 2)
    batch = LabelPairs(identity_table(100), labels, rows).draw(torch.from_numpy(rows), generator)
    drawn = batch.positive[:, 0].long().numpy()
    assert set(drawn) <= set(rows)
    assert (labels[drawn] == labels[rows]).all()
    assert (drawn != rows).all()
    assert torch.equal(batch.negative.bool(), torch.from_numpy(labels[rows][:, None] != labels[rows][None, :]))


def test_a_class_of_one_row_is_its_own_positive(generator: torch.Generator) -> None:
    labels = np.array([0, 0, 0, 1])
    batch = LabelPairs(identity_table(4), labels, np.arange(4)).draw(torch.tensor([3, 3]), generator)
    assert batch.positive[:, 0].tolist() == [3.0, 3.0]


def test_soft_positives_follow_their_definition(generator: torch.Generator) -> None:
    p = np.array([[0.7, 0.3], [0.5, 0.5], [0.0, 1.0], [0.9, 0.1]])
    pairs = SoftLabelPairs(identity_table(4), p, np.arange(4))
    n = 4_000
    batch = pairs.draw(torch.zeros(n, dtype=torch.int64), generator)
    frequency = torch.bincount(batch.positive[:, 0].long(), minlength=4).double() / n
    once = p[0] @ (p / p.sum(0)).T  # class from the anchor, then a row by its share of the class
    twice = once.copy()
    twice[0] = 0.0
    expected = twice + once[0] * once  # drawing itself is tried once more
    assert np.abs(frequency.numpy() - expected).max() < 4 * (0.25 / n) ** 0.5
    partner = batch.positive[:, 0].long()
    other = int((partner != partner[0]).logical_and(partner != 0).nonzero()[0])
    assert batch.negative[0, other].item() == pytest.approx(1.0 - p[0] @ p[int(partner[other])], abs=1e-6)


def test_neither_an_anchor_nor_its_own_positive_is_its_negative(generator: torch.Generator) -> None:
    doubtful = np.full((6, 3), 1 / 3)  # any two are of one class with probability 1/3
    rows = torch.arange(6)
    batch = SoftLabelPairs(identity_table(6), doubtful, np.arange(6)).draw(rows, generator)
    partner = batch.positive[:, 0].long()
    own = (partner == rows[:, None]) | (partner == partner[:, None])
    assert (batch.negative[own] == 0).all()
    torch.testing.assert_close(batch.negative[~own], torch.full_like(batch.negative[~own], 2 / 3))


def test_views_are_two_different_ones_of_the_same_image(generator: torch.Generator) -> None:
    views = np.arange(6 * 4, dtype=np.float32).reshape(6, 4, 1)
    rows = torch.arange(6).repeat(50)
    batch = ViewPairs(FeatureTable(views), np.arange(6)).draw(rows, generator)
    assert torch.equal(batch.anchor[:, 0].long() // 4, rows)
    assert torch.equal(batch.positive[:, 0].long() // 4, rows)
    assert (batch.anchor != batch.positive).all()
    assert torch.equal(batch.negative.bool(), rows[:, None] != rows[None, :])


def test_negatives_are_never_of_the_own_class_beyond_256_rows(generator: torch.Generator) -> None:
    labels = torch.arange(700) % 7
    negative = (labels[:, None] != labels[None, :]).float()
    columns, has = draw_negatives(negative, 16, generator)
    assert has.all()
    assert (labels[columns] != labels[:, None]).all()
    assert columns.max() > 600  # ids are not cut to 8 bits


def test_an_anchor_without_negatives_is_told(generator: torch.Generator) -> None:
    _, has = draw_negatives(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), 3, generator)
    assert has.tolist() == [False, True]


def test_a_table_too_large_for_memory_is_read_from_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float16)
    rows = torch.tensor([4, 4, 49])
    small = FeatureTable(array)[rows]
    monkeypatch.setattr(FeatureTable, "in_memory_bytes", 0)
    large = FeatureTable(array)
    assert large.tensor is None
    assert torch.equal(large[rows], small)


@pytest.mark.parametrize(("labels", "message"), [(np.zeros(5, int), "at least 2 classes"), (np.arange(5), "one row")])
def test_labels_that_make_no_pairs_are_refused(labels: np.ndarray, message: str) -> None:
    with pytest.raises(posthoc.PosthocError, match=message):
        LabelPairs(identity_table(5), labels, np.arange(5))


def test_one_view_makes_no_pairs() -> None:
    with pytest.raises(posthoc.PosthocError, match="at least 2 stored views"):
        ViewPairs(FeatureTable(np.zeros((3, 1, 2), np.float32)), np.arange(3))
