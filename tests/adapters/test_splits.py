"""The held-out split: seeded, stable, and whole groups on one side."""

import numpy as np
import pytest
from scipy.stats import kstest

import posthoc
from posthoc.adapters.splits import held_out_mask, row_uniform


def test_row_numbers_are_uniform_and_independent_between_seeds() -> None:
    rows = np.arange(20_000)
    a, b = row_uniform(rows, 0), row_uniform(rows, 1)
    assert kstest(a, "uniform").pvalue > 1e-3
    assert kstest(b, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.03


def test_a_row_keeps_its_side_whatever_other_rows_are_there() -> None:
    rows = np.arange(1000)
    whole = held_out_mask(rows, 0.2, seed=3)
    part = held_out_mask(rows[400:700], 0.2, seed=3)
    assert (whole[400:700] == part).all()
    assert 0.15 < whole.mean() < 0.25


def test_groups_stay_on_one_side() -> None:
    rows = np.arange(3000)
    group = np.array([f"patient {i % 150}" for i in rows])
    mask = held_out_mask(rows, 0.3, seed=0, group=group)
    sides = {g: {bool(m) for m in mask[group == g]} for g in np.unique(group)}
    assert all(len(s) == 1 for s in sides.values())
    assert 0.15 < mask.mean() < 0.45


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(posthoc.PosthocError, match="between 0 and 1"):
        held_out_mask(np.arange(10), fraction, seed=0)


def test_a_split_with_an_empty_side_is_refused() -> None:
    with pytest.raises(posthoc.PosthocError, match="give more rows or groups"):
        held_out_mask(np.arange(50), 0.2, seed=0, group=np.zeros(50))


def test_a_group_of_another_length_is_refused() -> None:
    with pytest.raises(posthoc.PosthocError, match="one per row"):
        held_out_mask(np.arange(50), 0.2, seed=0, group=np.zeros(49))
