"""Credible sets: one pair at a time by brute force, nominal and calibrated coverage, and what is refused."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.vmf import VonMisesFisher
from posthoc.eval import credible
from posthoc.eval.caps import cap_cosine, convolved_concentration
from posthoc.eval.credible import CredibleSets
from posthoc.eval.identifiability import orthogonal_alignment
from posthoc.eval.risk_control import calibrated_radius


def toy(seed: int = 0, queries: int = 40, gallery: int = 30, dim: int = 5) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(queries, dim)),
        rng.uniform(0, 30, queries),
        rng.integers(0, 6, queries),  # label 5 is not in the gallery
        rng.normal(size=(gallery, dim)),
        rng.uniform(0, 30, gallery),
        rng.integers(0, 5, gallery),
    )


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("uncertain", [False, True])
@pytest.mark.parametrize("radius", [0.5, 1.0, 1.7])
def test_one_pair_at_a_time(uncertain: bool, radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credible, "PAIRS", 200)  # several chunks
    query, kappa, label, gallery, kappa_g, label_g = toy()
    sets = CredibleSets(gallery, label_g, kappa_g if uncertain else None, alpha=0.2, radius=radius)
    both = convolved_concentration(kappa[:, None], kappa_g, 5) if uncertain else np.tile(kappa[:, None], 30)
    nominal = np.arccos(cap_cosine(both, 5, 0.2))
    away = np.array([[np.arccos(u @ v) for v in unit(gallery)] for u in unit(query)]) / nominal
    member = away <= radius
    rows, columns = sets.members(query, kappa)
    np.testing.assert_array_equal(np.stack([rows, columns]), np.stack(member.nonzero()))
    report = sets.evaluate(query, kappa, label)
    np.testing.assert_array_equal(report.size, member.sum(1))
    same = label[:, None] == label_g
    for q in range(40):
        if not same[q].any():
            assert np.isnan(report.missed[q])
            assert np.isnan(report.none[q])
        else:
            assert report.missed[q] == pytest.approx(1 - member[q, same[q]].mean())
            assert report.none[q] == float(not member[q, same[q]].any())
    truth = sets.true_radii(query, kappa, label)
    np.testing.assert_allclose(truth.radius, away[same], rtol=1e-6)
    for loss in ("missed", "none"):
        np.testing.assert_allclose(truth.losses(radius, loss), getattr(report, loss))
    summary = report.summary()
    assert summary["queries"] + summary["queries_without_truth"] == 40
    assert summary["queries_without_truth"] == (label == 5).sum() > 0
    assert summary["size_without_truth"] == pytest.approx(member[label == 5].sum(1).mean())
    assert summary["size"] == pytest.approx(member[label != 5].sum(1).mean())
    assert summary["coverage"] == pytest.approx(1 - np.nanmean(report.missed))


@pytest.mark.parametrize("dim", [3, 10, 64])
@pytest.mark.parametrize("uncertain", [False, True])
def test_nominal_sets_hold_the_image_of_the_same_latent(dim: int, uncertain: bool) -> None:
    generator, n = torch.Generator().manual_seed(dim), 1000
    mu = torch.randn(n, dim, dtype=torch.float64, generator=generator)
    kappa = 10 + 40 * torch.rand(n, dtype=torch.float64, generator=generator)
    other = 10 + 40 * torch.rand(n, dtype=torch.float64, generator=generator)
    shown = VonMisesFisher(mu, kappa).sample(generator=generator)
    if uncertain:
        shown = VonMisesFisher(shown, other).sample(generator=generator)
    sets = CredibleSets(shown, np.arange(n), other if uncertain else None, alpha=0.1)
    summary = sets.evaluate(mu, kappa, np.arange(n)).summary()
    assert summary["coverage"] == pytest.approx(0.9, abs=0.01 + 3 * (0.09 / n) ** 0.5)
    assert summary["share_of_gallery"] < 0.6
    assert summary["none"] == summary["missed"]  # one true neighbour each


@pytest.mark.parametrize("dim", [3, 10, 64])
def test_learned_posteriors_are_nominal_after_an_alignment_on_other_rows(dim: int) -> None:
    """Posteriors found up to an orthogonal map: it is fitted on some rows (150 for each dimension, for its own error widens
    what caps have to hold), coverage is counted on others."""
    generator, n = torch.Generator().manual_seed(dim), 150 * dim + 800
    mu = torch.nn.functional.normalize(torch.randn(n, dim, dtype=torch.float64, generator=generator), dim=1)
    kappa = (20 + 60 * torch.rand(n, dtype=torch.float64, generator=generator)) * dim / 3
    latent = VonMisesFisher(mu, kappa).sample(generator=generator).numpy()
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    learned = (mu @ turn).numpy()  # the right concentration, in a frame of its own
    fitted = np.random.default_rng(dim).permutation(n) >= 800
    back = orthogonal_alignment(learned[fitted], latent[fitted])
    np.testing.assert_allclose(back @ back.T, np.eye(dim), atol=1e-12)
    judged, rows = ~fitted, np.arange(int((~fitted).sum()))
    sets = CredibleSets(latent[judged], rows, alpha=0.05)
    found = {
        name: sets.evaluate(mean[judged], kappa.numpy()[judged], rows).summary()["coverage"]
        for name, mean in {"aligned": learned @ back, "as learned": learned, "true": mu.numpy()}.items()
    }
    tolerance = 3 * (0.05 * 0.95 / len(rows)) ** 0.5
    assert found["aligned"] == pytest.approx(0.95, abs=tolerance)
    assert found["true"] == pytest.approx(0.95, abs=tolerance)
    assert found["as learned"] < 0.5


def test_the_alignment_is_scipys_and_undoes_a_reflection() -> None:
    rng = np.random.default_rng(0)
    a, noise = rng.normal(size=(50, 4)), 0.1 * rng.normal(size=(50, 4))
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    turn[0] *= -np.sign(np.linalg.det(turn))  # a reflection
    np.testing.assert_allclose(orthogonal_alignment(a, a @ turn), turn, atol=1e-12)
    np.testing.assert_allclose(
        orthogonal_alignment(a, a @ turn + noise), orthogonal_procrustes(a, a @ turn + noise)[0], atol=1e-12
    )
    with pytest.raises(DataError, match="same dimensions"):
        orthogonal_alignment(a, a[:, :3])
    with pytest.raises(DataError, match="3 rows span fewer than 4"):
        orthogonal_alignment(a[:3], a[:3])


@pytest.mark.parametrize(("loss", "mode"), [("missed", "conformal"), ("none", "pac")])
def test_calibrated_sets_on_classes(loss: str, mode: str) -> None:
    """Posteriors that are far too sure: the nominal set misses, the calibrated one does not, nor returns everything."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(20, 16))
    label = rng.integers(0, 20, 1400)
    z = centre[label] + 0.5 * rng.normal(size=(1400, 16))
    kappa = rng.uniform(500, 2000, 1400)
    sets = CredibleSets(z[:200], label[:200], kappa[:200])
    loose = sets.evaluate(z[200:], kappa[200:], label[200:]).summary()
    assert loose[loss] > 0.3
    pool = sets.true_radii(z[200:], kappa[200:], label[200:])
    risks = []
    for _ in range(500):
        order = rng.permutation(1200)
        radius = calibrated_radius(pool.take(order[:300]), alpha=0.1, delta=0.2, mode=mode, loss=loss)
        risks.append(np.nanmean(pool.take(order[300:]).losses(radius, loss)))
    assert np.mean(risks) <= 0.1 + 3 * np.std(risks) / 500**0.5
    if mode == "pac":
        assert np.mean(np.array(risks) > 0.1) <= 0.2
    calibrated = sets.calibrate(z[200:800], kappa[200:800], label[200:800], loss=loss, mode=mode, alpha=0.1)
    held = calibrated.evaluate(z[800:], kappa[800:], label[800:]).summary()
    assert held[loss] < 0.1 + 0.03
    assert held["share_of_gallery"] < 0.3
    assert calibrated.radius > 1.0
    kept = pool.take(np.arange(600))
    exact = calibrated_radius(kept, alpha=0.1, mode=mode, loss=loss)
    assert exact <= calibrated.radius <= exact * (1 + 2**-16)
    assert calibrated.alpha == sets.alpha


def test_memory_of_calibration_does_not_grow_with_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credible, "PAIRS", 1 << 15)
    rng = np.random.default_rng(0)
    gallery, query = rng.normal(size=(2000, 4)), rng.normal(size=(2000, 4))
    sets = CredibleSets(gallery, np.arange(2000) % 2)
    tracemalloc.start()
    sets.calibrate(query, np.full(2000, 20.0), np.arange(2000) % 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        peak < 60 * 2**20
    )  # the grid and its sums; two million pairs of 16 bytes, and their concatenation, are 64 MB more


def test_certain_queries_and_the_set_of_everything() -> None:
    query, kappa, label, gallery, _, label_g = toy()
    near = gallery[:1] * 2.0  # the same direction but for rounding, so that it is no copy of the row
    near[0, 0] *= 1.0 + 1e-14
    sets = CredibleSets(gallery, label_g)
    assert [a.tolist() for a in sets.members(near, np.array([np.inf]))] == [[0], [0]]
    assert sets.true_radii(near, np.array([np.inf]), label_g[:1]).radius[0] == 0.0
    everything = sets.with_radius(np.inf).evaluate(query, np.where(kappa > 15, np.inf, kappa), label).summary()
    assert everything["everything"] == 1.0
    assert everything["missed"] == 0.0
    rare = sets.calibrate(query[:3], kappa[:3], label_g[:3], alpha=0.1)
    assert rare.radius == np.inf  # three queries cannot show a loss below a quarter


def test_copies_of_gallery_rows_are_found_at_every_radius() -> None:
    _, kappa, label, gallery, _, label_g = toy()
    sets = CredibleSets(gallery, label_g)
    for one in (sets, sets.with_radius(2.0), sets.with_radius(2.0).with_radius(3.0)):
        with pytest.raises(DataError, match="30 queries are gallery rows bit for bit"):
            one.evaluate(gallery, kappa[:30], label[:30])


def test_a_radius_taken_from_a_pair_holds_that_pair() -> None:
    query, kappa, label, gallery, kappa_g, label_g = toy(1, queries=60)
    sets = CredibleSets(gallery, label_g, kappa_g)
    for radius in np.sort(sets.true_radii(query, kappa, label).radius)[::40]:
        losses = sets.true_radii(query, kappa, label).losses(radius)
        np.testing.assert_allclose(sets.with_radius(radius).evaluate(query, kappa, label).missed, losses)


def test_report_of_no_query_with_truth() -> None:
    query, kappa, _, gallery, _, label_g = toy()
    summary = CredibleSets(gallery, label_g).evaluate(query, kappa, np.full(40, 99)).summary()
    assert summary["queries"] == 0
    assert np.isnan(summary["coverage"])
    assert summary["size_without_truth"] > 0


Q, K, L, G, KG, LG = toy()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CredibleSets(G, LG).evaluate(np.r_[Q[:2], G[4:6]], K[:4], L[:4]), DataError, r"2 queries .*rows 2, 3"),
        (lambda: CredibleSets(G).evaluate(Q, K, L), DataError, "no gallery labels"),
        (lambda: CredibleSets(G, LG[:3]), DataError, "gallery 30, label 3"),
        (lambda: CredibleSets(G, LG, KG[:3]), DataError, "gallery 30, concentration 3"),
        (lambda: CredibleSets(G, LG).members(Q, K[:3]), DataError, "lengths differ"),
        (lambda: CredibleSets(G, LG).members(Q[:, :4], K), DataError, "4 dimensions and the gallery 5"),
        (lambda: CredibleSets(G * [[0.0]], LG), DataError, "the gallery: 30 of 30 rows are 0"),
        (lambda: CredibleSets(np.where(G > 2, np.nan, G), LG), DataError, "not finite"),
        (lambda: CredibleSets(G[:0], LG[:0]), DataError, "at least one row"),
        (lambda: CredibleSets(G, LG).members(Q, -K), DataError, "at least 0"),
        (lambda: CredibleSets(G, LG, alpha=0.0), OptionError, "alpha=0"),
        (lambda: CredibleSets(G, LG, radius=-1.0), OptionError, "radius=-1"),
        (lambda: CredibleSets(G, LG).with_radius(np.nan), OptionError, "radius=nan"),
        (lambda: CredibleSets(G[:, :1], LG), DataError, r"D >= 2\]; these are of shape \(30, 1\)"),
        (lambda: CredibleSets(G, LG[:, None]), DataError, "one for each row"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
