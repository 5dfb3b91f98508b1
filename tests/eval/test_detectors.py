"""Detectors on Gaussian classes: all tell far data from near, none sees a scored row, and what is missing is named."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from posthoc import PosthocError
from posthoc.eval import baselines, detectors, metrics
from posthoc.eval.detectors import DETECTORS, SETTINGS, Training, ensemble, fit_detectors, last_layer

CLASSES, DIM = 4, 8


def world(n=400, seed=0, spread=0.5):
    """Features of a network with four classes on four of its axes, and the last layer that reads them."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % CLASSES
    f = np.abs(rng.normal(size=(n, DIM)) * spread)
    f[np.arange(n), label] += 4
    weight = np.eye(CLASSES, DIM) * 2 - 0.2
    return f.astype(np.float32), label, weight.astype(np.float32), np.zeros(CLASSES, np.float32)


def unseen(n=200, seed=1):
    """Small features, mostly on the axes no class uses."""
    rng = np.random.default_rng(seed)
    f = np.abs(rng.normal(size=(n, DIM)) * 0.3)
    f[:, CLASSES:] += 1.2
    return f.astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    return fit_detectors(Training(*world()))


def test_all_detectors_are_fitted(fitted):
    assert fitted.left_out == {}
    assert set(fitted.fitted) == set(DETECTORS)


@pytest.mark.parametrize("name", DETECTORS)
def test_each_gives_unseen_data_the_higher_score(fitted, name):
    inside, outside = fitted.scores(world(seed=5)[0]), fitted.scores(unseen())
    assert inside[name].dtype == np.float32
    assert inside[name].shape == (400,)
    # ASH and SCALE weigh by the share of small activations, which unseen data have fewer of
    assert metrics.auroc(inside[name], outside[name]) > (0.8 if name == "OpenMax" else 0.9)


def test_a_score_depends_on_its_own_row_alone(fitted):
    x = unseen(7)
    together, alone = fitted.scores(x), fitted.scores(x[3:4])
    for name in DETECTORS:
        assert together[name][3] == pytest.approx(alone[name][0], rel=1e-4, abs=1e-5)


def test_what_is_left_out_repeats_a_baseline():
    from pytorch_ood import detector

    f, label, weight, bias = world()
    x = unseen(50)
    z = detectors._tensor(x @ weight.T + bias)
    for name, ours in {
        "MaxSoftmax": baselines.max_softmax(z) - 1, "Entropy": baselines.entropy(z), "EnergyBased": baselines.energy(z),
        "MaxLogit": baselines.max_logit(z),
    }.items():  # fmt: skip
        theirs = getattr(detector, name)(None).predict_logits(z).numpy()
        assert ours == pytest.approx(theirs, abs=1e-5)
    knn = detector.KNN(None, k=20).fit_features(detectors._tensor(f), detectors._tensor(label))
    theirs = knn.predict_features(detectors._tensor(x)).numpy()
    assert baselines.knn(x, f, k=20) == pytest.approx(theirs**2 / 2, abs=1e-5)  # |a - b|^2 = 2 (1 - cos)


def test_mahalanobis_and_gmm_are_their_formulas(fitted):
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    f, label, *_ = world()
    x = unseen(20)
    means = [f[label == k].mean(0) for k in range(CLASSES)]
    centred = f - np.stack(means)[label]
    precision = np.linalg.inv(centred.T @ centred + 1e-6 * np.eye(DIM))
    distance = np.min([np.einsum("nd,de,ne->n", x - m, precision, x - m) for m in means], axis=0)
    found = fitted.scores(x)
    ratio = found["Mahalanobis"] / distance
    assert ratio == pytest.approx(np.full(20, ratio[0]), rel=1e-3)
    parts = [
        multivariate_normal(m, np.cov(f[label == k].T, bias=True) + 1e-6 * np.eye(DIM)).logpdf(x)
        for k, m in enumerate(means)
    ]
    assert found["GMM"] == pytest.approx(-logsumexp(np.stack(parts) - np.log(CLASSES), axis=0), rel=1e-3)


def test_the_last_layer_is_read_from_features_and_logits():
    f, _, weight, bias = world()
    found = last_layer(f, f @ weight.T + bias + 3)
    assert found[0] == pytest.approx(weight, abs=1e-4)
    assert found[1] == pytest.approx(bias + 3, abs=1e-3)
    with pytest.raises(PosthocError, match="no linear function"):
        last_layer(f, np.abs(f @ weight.T) ** 2)
    with pytest.raises(PosthocError, match="more rows than dimensions"):
        last_layer(f[:5], (f @ weight.T)[:5])


def test_one_that_cannot_be_fitted_is_left_out_and_says_why():
    f, label, weight, bias = world()
    never = np.where(label == 2, 3, label)  # class 2 never occurs
    found = fit_detectors(Training(f, never, weight, bias), ["Mahalanobis", "GEN"])
    assert list(found.fitted) == ["GEN"]
    assert found.left_out["Mahalanobis"] == "class 2 of 4 has no training image"


@pytest.mark.parametrize(
    ("there", "told", "out"),
    [
        ([0, 1, 2, 3], "classes 4, 5, 6, 7, 8 and 1 more of 10 have no training image", {"SHE"}),
        ([0, 1, 2, 3, 4, 5, 6], "classes 7, 8, 9 of 10 have no training image", {"SHE"}),
        (list(range(1, 10)), "class 0 of 10 has no training image", {"SHE", "Mahalanobis", "RMD"}),
        ([0], "classes 1, 2, 3, 4, 5 and 4 more of 10 have no training image", {"SHE"}),
        ([5], "classes 0, 1, 2, 3, 4 and 4 more of 10 have no training image", {"SHE", "Mahalanobis", "RMD"}),
    ],
)
def test_training_images_of_some_of_ten_classes(there, told, out):
    rng = np.random.default_rng(0)
    every = np.arange(300) % 10
    f = np.abs(rng.normal(size=(300, 12)) * 0.5)
    f[np.arange(300), every] += 4
    weight = (np.eye(10, 12) * 2 - 0.2).astype(np.float32)
    kept = np.isin(every, there)
    found = fit_detectors(Training(f[kept], every[kept], weight, np.zeros(10, np.float32)))
    assert found.left_out == dict.fromkeys(out, told)
    scores = found.scores(f.astype(np.float32))  # images of the other classes too
    assert set(scores) == set(DETECTORS) - out
    assert found.left_out == dict.fromkeys(out, told)


@pytest.mark.parametrize("error", [IndexError("index 7"), RuntimeError("no memory"), ValueError()])
def test_one_that_fails_while_scoring_is_left_out_alone(error):
    found = fit_detectors(Training(*world(40)), ["GEN", "ViM"])

    def fails(*_):
        raise error

    found.fitted["GEN"] = fails
    assert list(found.scores(unseen(5))) == ["ViM"]
    assert found.left_out == {"GEN": str(error) or "ValueError"}


def test_an_ensemble_has_no_units():
    rng = np.random.default_rng(0)
    held, scores = rng.normal(size=(2, 200)), rng.normal(size=(2, 30))
    found = ensemble(list(scores), list(held))
    assert found == pytest.approx(ensemble([scores[0] * 1000, scores[1]], [held[0] * 1000, held[1]]))
    assert found[0] == pytest.approx(np.mean([(held[k] <= scores[k, 0]).mean() for k in range(2)]))
    with pytest.raises(PosthocError, match="held-out scores"):
        ensemble([scores[0]], [])
    with pytest.raises(PosthocError, match="different numbers"):
        ensemble([scores[0], scores[1][:3]], list(held))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, y, w, b: Training(f[:, :3], y, w, b), "weight"),
        (lambda f, y, w, b: Training(f * np.nan, y, w, b), "not finite"),
        (lambda f, y, w, b: Training(f, y + 1, w, b), "from 0 to 3"),
        (lambda f, y, w, b: fit_detectors(Training(f, y, w, b), ["Mahalanobi"]), "Mahalanobis"),
        (lambda f, y, w, b: fit_detectors(Training(f, y, w, b), ["GEN"]).scores(f[:, :3]), "fitted were 8"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    with pytest.raises(PosthocError, match=message):
        change(*world(40))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_ood.detector", None)
    with pytest.raises(PosthocError, match=r"pytorch-ood.*posthoc\[eval\]"):
        fit_detectors(Training(*world(40)))


def shaped(name, z, head, training, p):
    """What a paper does to the last layer's input, by its formula."""
    if name == "ReAct":
        return z.clip(max=np.percentile(training, 100 * p))
    if name == "VRA":
        return z.clip(*np.quantile(training, [1 - p, p], axis=0))
    kept = z.shape[1] - round(z.shape[1] * p)
    order = np.argsort(-z, axis=1)[:, :kept]
    large = np.zeros_like(z)
    np.put_along_axis(large, order, np.take_along_axis(z, order, 1), 1)
    total = z.sum(1, keepdims=True)
    if name == "ASH-B":
        return np.where(large > 0, total / kept, 0)
    return (z if name == "SCALE" else large) * np.exp(total / large.sum(1, keepdims=True))


@pytest.mark.parametrize("name", ["ReAct", "VRA", "ASH-S", "ASH-B", "SCALE"])
@pytest.mark.parametrize("p", [None, 0.75])
def test_shaped_activations_are_their_formulas(name, p):
    from scipy.special import logsumexp

    f, label, weight, bias = world()
    x = unseen(40) + 0.01
    found = fit_detectors(Training(f, label, weight, bias + 1), [name], None if p is None else {name: p}).scores(x)
    z = shaped(name, x.astype(np.float64), None, f.astype(np.float64), p or SETTINGS[name].default)
    wanted = -logsumexp(z @ weight.T + bias + 1, axis=1)
    assert found[name] == pytest.approx(wanted, rel=1e-4)


def test_dice_and_gen_take_their_setting():
    f, label, weight, bias = world()
    x = unseen(30)
    from scipy.special import logsumexp, softmax

    share = f.mean(0) * weight
    kept = np.where(share > np.quantile(share, 0.3), weight, 0)
    found = fit_detectors(Training(f, label, weight, bias), ["DICE", "GEN"], {"DICE": 0.3, "GEN": 2.0}).scores(x)
    assert found["DICE"] == pytest.approx(-logsumexp(x @ kept.T + bias, axis=1), rel=1e-4)
    p = softmax(x @ weight.T + bias, axis=1)
    assert found["GEN"] == pytest.approx((p**2 * (1 - p) ** 2).mean(1), rel=1e-3)


def test_dice_and_gradnorm_equal_pytorch_ood():
    import torch
    from pytorch_ood.detector import DICE, GradNorm

    f, label, weight, bias = world()
    x = torch.from_numpy(unseen(30))
    head = torch.nn.Linear(DIM, CLASSES)
    head.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    ours = fit_detectors(Training(f, label, weight, bias), ["DICE", "GradNorm"]).scores(x)
    dice = DICE(None, head.weight, head.bias, 0.7).fit_features(torch.from_numpy(f), torch.from_numpy(label))
    assert ours["DICE"] == pytest.approx(dice.predict_features(x).numpy(), rel=1e-5)
    theirs = GradNorm(head, param_filter=lambda name: name == "weight").predict(x).numpy()
    assert ours["GradNorm"] == pytest.approx(theirs, rel=1e-4)


def test_negative_activations_have_no_shares():
    f, label, weight, bias = world()
    found = fit_detectors(Training(f - 1, label, weight, bias), ["ASH-S", "SCALE", "ReAct"])
    assert list(found.fitted) == ["ReAct"]
    assert "negative" in found.left_out["ASH-S"]


def test_a_score_that_is_not_finite_is_left_out_and_says_where():
    f, label, weight, bias = world()
    found = fit_detectors(Training(f, label, weight, bias), ["ASH-S", "ReAct"])
    x = unseen(5)
    x[3] = 0  # no activation at all: a share of nothing
    assert list(found.scores(x)) == ["ReAct"]
    assert "rows 3" in found.left_out["ASH-S"]


def test_every_setting_is_in_a_grid_of_the_same_size():
    from posthoc.eval.tuning import BUDGET, ENERGY, KNN

    for setting in (KNN, ENERGY, *SETTINGS.values()):
        assert len(setting.grid) == BUDGET
        assert setting.default in setting.grid


@pytest.mark.parametrize("name", ["GMM", "LTS", "NNGuide", "NCI", "OpenMax"])
def test_a_setting_reaches_the_detector(name):
    import torch
    from pytorch_ood import detector as module

    f, label, weight, bias = world()
    x, head = world(60, seed=2)[0], torch.nn.Linear(DIM, CLASSES)
    head.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    value = SETTINGS[name].grid[3]
    assert value != SETTINGS[name].default
    make = {
        "GMM": lambda: module.GMM(None, value),
        "LTS": lambda: module.LTS(None, head, p=value),
        "NNGuide": lambda: module.NNGuide(None, head, k=int(value)),
        "NCI": lambda: module.NCI(None, head, alpha=value),
        "OpenMax": lambda: module.OpenMax(None, tailsize=int(value)),
    }[name]()
    rows, there, unknown = torch.from_numpy(f), torch.from_numpy(label), torch.from_numpy(x)
    with torch.no_grad():
        if name == "OpenMax":
            theirs = make.fit_logits(head(rows), there).predict_logits(head(unknown)).numpy()
        else:
            if make.requires_fit:
                make.fit_features(rows, there)
            theirs = make.predict_features(unknown).numpy()
    ours = fit_detectors(Training(f, label, weight, bias), [name], {name: value}).scores(x)[name]
    near = 1e-2 if name == "OpenMax" else 1e-4  # theirs raises float32 distances to powers of some 20,000
    assert ours == pytest.approx(theirs, rel=near)
    default = fit_detectors(Training(f, label, weight, bias), [name]).scores(x)[name]
    assert np.abs(default - ours).max() > 3 * near * np.abs(ours).max()


def test_openmax_equals_pytorch_ood_where_every_class_is_predicted():
    import torch
    from pytorch_ood.detector import OpenMax

    f, label, weight, bias = world()
    x = unseen(60)
    logits = lambda rows: torch.from_numpy(rows @ weight.T + bias)  # noqa: E731
    for there in (label, np.where(label == 2, 3, label)):  # a class without a training row
        theirs = OpenMax(None).fit_logits(logits(f), torch.from_numpy(there))
        wanted = theirs.predict_logits(torch.cat([logits(x), torch.eye(CLASSES)]))[:60].numpy()
        found = fit_detectors(Training(f, there, weight, bias), ["OpenMax"]).scores(x)["OpenMax"]
        assert found == pytest.approx(wanted, rel=1e-4)  # their distances are float32, taken to a power of thousands


def test_weibull_is_of_the_greatest_likelihood():
    from scipy.stats import weibull_min

    from posthoc.eval.openmax import STEEPEST, weibull

    rng = np.random.default_rng(0)
    samples = [
        rng.weibull(2, 30),
        5 * rng.weibull(0.7, 12),
        1e4 + rng.random(25),
        np.array([3.0, 4.0]),
        np.array([2.0]),
    ]
    shape, scale = weibull(samples)
    for k, one in enumerate(samples[:4]):
        c, _, s = weibull_min.fit(one, floc=0)
        assert (
            weibull_min.logpdf(one, shape[k], scale=scale[k]).sum() >= weibull_min.logpdf(one, c, scale=s).sum() - 1e-6
        )
        for wrong in (0.99, 1.01):
            assert weibull_min.logpdf(one, wrong * shape[k], scale=scale[k]).sum() < (
                weibull_min.logpdf(one, shape[k], scale=scale[k]).sum()
            )
    assert shape[4] == STEEPEST
    assert scale[4] == pytest.approx(2.0)
