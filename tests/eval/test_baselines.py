"""Training-free scores against their formulas, by brute force, and against figures measured on real features."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.neighbors import NearestNeighbors

from posthoc import PosthocError
from posthoc.eval import baselines
from posthoc.eval.metrics import auroc, nll


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def logits(rng):
    return rng.normal(size=(9000, 7)).astype(np.float32) * 4  # more than two chunks


def test_logit_scores_are_their_formulas(logits):
    x = logits.astype(np.float64)
    p = softmax(x, 1)
    wanted = {
        "max-softmax": 1 - p.max(1),
        "entropy": -(p * np.log(p)).sum(1),
        "energy": -np.log(np.exp(x).sum(1)),
        "max-logit": -x.max(1),
    }
    for name, score in baselines.LOGIT_SCORES.items():
        assert score(logits) == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
        assert score(logits).dtype == np.float32


def test_tensors_arrays_and_memory_maps_give_the_same(logits, tmp_path):
    np.save(tmp_path / "x.npy", logits)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    want = baselines.energy(logits)
    assert np.array_equal(baselines.energy(torch.from_numpy(logits).requires_grad_()), want)
    assert np.array_equal(baselines.energy(mapped), want)


def test_a_certain_softmax_keeps_its_digits():
    z = np.array([[30.0, 0.0, 0.0], [40.0, 0.0, 0.0]], np.float64)
    assert baselines.max_softmax(z) == pytest.approx([2 * np.exp(-30), 2 * np.exp(-40)], rel=1e-3)


def test_a_large_logit_does_not_overflow():
    z = np.array([[1e4, -1e4], [0.0, 0.0]], np.float32)
    for score in baselines.LOGIT_SCORES.values():
        assert np.isfinite(score(z)).all()
        assert score(z)[1] > score(z)[0]


def test_inverse_norm(rng):
    x = rng.normal(size=(50, 3))
    assert baselines.inverse_norm(x) == pytest.approx(1 / np.linalg.norm(x, axis=1), rel=1e-6)
    x[3] = 0
    scores = baselines.inverse_norm(x)
    assert np.isfinite(scores).all()
    assert scores.argmax() == 3


@pytest.mark.parametrize("k", [1, 50])
def test_knn_is_scikit_learns(rng, k):
    bank, x = rng.normal(size=(9000, 8)), rng.normal(size=(300, 8)) * 5
    distance, _ = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(bank).kneighbors(x)
    assert baselines.knn(x, bank, k=k) == pytest.approx(distance[:, -1], rel=1e-4, abs=1e-6)


def test_knn_leaves_the_image_itself_out(rng):
    bank = rng.normal(size=(5000, 6))
    rows = np.array([0, 4095, 4096, 4999, 17])
    ours = baselines.knn(bank[rows], bank, k=3, own=rows)
    for score, row in zip(ours, rows, strict=True):
        assert score == pytest.approx(baselines.knn(bank[[row]], np.delete(bank, row, 0), k=3)[0], rel=1e-4)
    some = baselines.knn(bank[rows[:2]], bank, k=1, own=np.array([-1, rows[1]]))
    assert some[0] == pytest.approx(0, abs=1e-6)  # not left out: it is its own neighbour
    assert some[1] > 1e-4


def test_the_temperature_is_found(rng):
    z = rng.normal(size=(20_000, 5)) * 2
    label = (log_softmax(z, 1) + rng.gumbel(size=z.shape)).argmax(1)  # drawn from softmax(z)
    assert baselines.fit_temperature(3 * z, label) == pytest.approx(3, rel=0.05)
    t = baselines.fit_temperature(z * 3, label)
    assert nll(z * 3 / t, label) <= min(nll(z * 3 / (t * f), label) for f in (0.9, 0.99, 1.01, 1.1))
    # scaling by one temperature never changes the class, and never the order of max-softmax between two classes
    assert np.array_equal((z / t).argmax(1), z.argmax(1))


def test_free_scores_has_all_of_them(rng, logits):
    x = rng.normal(size=(len(logits), 4))
    scores = baselines.free_scores(logits, x, x[:100], k=10)
    assert list(scores) == ["max-softmax", "entropy", "energy", "max-logit", "1/feature-norm", "kNN"]
    assert np.array_equal(scores["kNN"], baselines.knn(x, x[:100], k=10))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baselines.energy(np.zeros(3)), "shape"),
        (lambda: baselines.energy(np.array([[0.0, 1.0], [np.nan, 1.0]])), "row 1"),
        (lambda: baselines.knn(np.ones((2, 3)), np.ones((9, 4)), k=1), "training"),
        (lambda: baselines.knn(np.ones((2, 3)), np.ones((9, 3)), k=10), "k must be 1 to 9"),
        (lambda: baselines.knn(np.ones((2, 3)), np.ones((9, 3)), k=9, own=np.array([0, 1])), "k must be 1 to 8"),
        (lambda: baselines.knn(np.ones((2, 3)), np.ones((9, 3)), k=2, own=np.array([0, 9])), "own must hold"),
        (lambda: baselines.fit_temperature(np.ones((2, 3)), np.array([0, 3])), "whole numbers from 0 to 2"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(PosthocError, match=message):
        call()


def test_figures_measured_on_cifar_features(shared):
    """The AUROCs measured for ResNet-20 against DTD and notMNIST; every fourth CIFAR test image is enough here."""
    f = np.load(shared / "data" / "cifar10_resnet20_features.npz")

    def scores(name, step=1):
        x = f[name][::step].astype(np.float32)
        return baselines.free_scores(x @ f["head_weight"].T + f["head_bias"], x, f["train"], k=50)

    inside, dtd, notmnist = scores("test", 4), scores("ood_dtd"), scores("ood_notmnist")
    measured = {
        "max-softmax": (0.879, 0.934),
        "entropy": (0.883, 0.943),
        "energy": (0.903, 0.977),
        "kNN": (0.949, 0.993),
        "1/feature-norm": (0.869, 0.982),
    }
    for name, figures in measured.items():
        ours = [auroc(inside[name], outside[name]) for outside in (dtd, notmnist)]
        assert ours == pytest.approx(figures, abs=0.008), name


def test_max_softmax_keeps_its_digits_where_the_softmax_is_sure():
    gap = np.arange(10, 80, 5.0)
    logits = np.zeros((len(gap), 4), np.float32)
    logits[:, 2] = gap
    exact = 3 * np.exp(-gap) / (1 + 3 * np.exp(-gap))
    assert baselines.max_softmax(logits) == pytest.approx(exact, rel=1e-6)
    assert baselines.max_softmax(np.zeros((1, 4), np.float32)) == pytest.approx([0.75])
