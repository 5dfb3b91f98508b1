"""Every head by the same body: it learns what it claims, keeps its contract, and refuses what it cannot use."""

import numpy as np
import pytest
import torch

import posthoc
from posthoc.adapters.backbone import BackboneOutput
from posthoc.adapters.features import Features
from posthoc.adapters.heads import HEADS, FitData, KappaHead, LossHead, TemperatureHead, make_head
from posthoc.adapters.training import TrainOptions

CLASSES, DIM, N = 4, 12, 600


def ambiguous_data(soft: bool = False) -> tuple[Features, np.ndarray]:
    """Images between two classes: share w of the second, which is also the probability of its label; gives w too."""
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][:CLASSES]
    first = rng.integers(CLASSES, size=N)
    second = (first + rng.integers(1, CLASSES, size=N)) % CLASSES
    w = rng.choice([0.0, 0.5], size=N)
    p = np.eye(CLASSES)[first] * (1 - w[:, None]) + np.eye(CLASSES)[second] * w[:, None]
    x = (p @ centres + 0.03 * rng.normal(size=(N, DIM)) + 0.3).astype(np.float32)
    logits = (8.0 * (x - 0.3) @ centres.T).astype(np.float32)
    label = np.where(rng.random(N) < w, second, first)
    return Features.from_arrays(x, penultimate=x, logits=logits, label=p.astype(np.float32) if soft else label), w


def fit_data(features: Features, positives: str = "labels", **options: object) -> FitData:
    rows = np.arange(len(features))
    chosen = TrainOptions(**{"batch_size": 128, "epochs": 8, "progress": False, **options})  # type: ignore[arg-type]
    return FitData(features, rows[:450], rows[450:], positives=positives, options=chosen)


def outputs(head: torch.nn.Module, features: Features) -> dict[str, torch.Tensor]:
    x = torch.from_numpy(np.asarray(features.embedding))
    with torch.no_grad():
        return head(BackboneOutput(x, x, torch.from_numpy(np.asarray(features.logits))))


QUICK = {"temperature": {"base_temperature": 0.1}, "kappa": {"n_samples": 4, "n_negatives": 8}}


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_head_answers_as_promised_and_is_rebuilt_from_its_tensors(name: str) -> None:
    features, _ = ambiguous_data()
    data = fit_data(features)
    head = make_head(name, **QUICK.get(name, {}))
    before = torch.get_rng_state()
    report = head.fit(data)
    assert torch.equal(torch.get_rng_state(), before)
    assert report
    answers = outputs(head, features)
    u = answers["uncertainty"]
    assert u.shape == (N,)
    assert u.dtype == torch.float32
    assert torch.isfinite(u).all()
    assert set(head.fields) <= set(answers)
    assert head.at_bound(answers).shape == (N,)
    twin = type(head)(**head.config())
    twin.build(data.dims)
    twin.load_state_dict(head.state_dict())
    assert torch.equal(outputs(twin, features)["uncertainty"], u)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


@pytest.mark.parametrize("parametrization", ["network", "norm"])
def test_kappa_is_low_where_labels_are_ambiguous(parametrization: str) -> None:
    features, w = ambiguous_data()
    head = KappaHead(projection=4, n_samples=8, n_negatives=8, parametrization=parametrization)
    head.fit(fit_data(features, epochs=40, lr=1e-2))
    u = outputs(head, features)["uncertainty"].numpy()[450:]
    assert np.median(u[w[450:] > 0]) > 1.2 * np.median(u[w[450:] == 0])


def test_calibrated_caps_hold_the_share_they_claim() -> None:
    features, _ = ambiguous_data()
    data = fit_data(features, epochs=15)
    head = KappaHead(projection=4, n_samples=8, n_negatives=8)
    report = head.fit(data)
    from posthoc.adapters.heads.common import pair_sources
    from posthoc.adapters.training import step_generator
    from posthoc.adapters.vmf import VonMisesFisher

    _, _, held_out = pair_sources(data)
    batch = held_out.draw(torch.from_numpy(data.held_out).repeat(5), step_generator(7))
    with torch.no_grad():
        mu, kappa = head.posterior(batch.anchor)
        other, _ = head.posterior(batch.positive)
    threshold = VonMisesFisher(mu, kappa * head.calibration).cosine_quantile(0.05)
    covered = ((mu * other).sum(-1) >= threshold).double().mean()
    assert 0.91 < float(covered) < 0.98
    assert report["calibration"] == pytest.approx(float(head.calibration))


def test_kappa_starts_where_the_mean_resultant_is_nine_tenths() -> None:
    features, _ = ambiguous_data()
    head = KappaHead(projection=8)
    head.build(fit_data(features).dims)
    with torch.no_grad():
        for p in head.network.scores.parameters():
            p.zero_()
    resultant = outputs(head, features)["resultant"]
    assert resultant.numpy() == pytest.approx(0.9, abs=1e-4)


def test_log_mean_exp_network_is_convex_and_standardises() -> None:
    from posthoc.adapters.heads.common import LogSumExpNet

    generator = torch.Generator().manual_seed(0)
    net = LogSumExpNet(5, 7).double()
    net.standardise(torch.full((5,), 2.0), torch.tensor([1.0, 2.0, 4.0, 1.0, 0.0]))
    a, b = (torch.randn(64, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        assert (net(0.5 * (a + b)) <= 0.5 * (net(a) + net(b)) + 1e-12).all()
        moved = a + torch.tensor([0.0, 0, 0, 0, 9.0])  # a dimension that never moved in the fit says nothing
        assert torch.equal(net(moved), net(a))
        scores = net.scores((a - 2.0) / torch.tensor([1.0, 2.0, 4.0, 1.0, torch.inf]))
        assert torch.allclose(net(a), scores.exp().mean(-1).log(), atol=1e-12)


def test_raw_embeddings_in_a_cone_are_warned_of() -> None:
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(N, DIM))).astype(np.float32) + 1.0
    features = Features.from_arrays(x, label=rng.integers(3, size=N))
    with pytest.warns(UserWarning, match="cone"):
        KappaHead(projection=None, n_samples=2, n_negatives=4).fit(fit_data(features, epochs=1))


def test_soft_labels_train_kappa() -> None:
    features, _ = ambiguous_data(soft=True)
    report = KappaHead(projection=4, n_samples=4, n_negatives=8).fit(fit_data(features, "soft-labels"))
    assert np.isfinite(report["held_out_loss"])


def test_batches_of_one_class_train_kappa_all_the_same() -> None:
    features, _ = ambiguous_data()
    label = np.zeros(N, dtype=np.int64)
    label[:: N // 4] = 1  # most batches of 16 have none of these
    rare = Features.from_arrays(features.embedding, label=label)
    report = KappaHead(projection=4, n_samples=4, n_negatives=8).fit(fit_data(rare, "labels", epochs=1, batch_size=16))
    assert np.isfinite(report["held_out_loss"])


def test_the_loss_head_ranks_the_classifiers_own_losses() -> None:
    features, _ = ambiguous_data()
    head = LossHead()
    assert head.fit(fit_data(features, epochs=40))["losses_of"] == "backbone"
    logits = torch.from_numpy(np.asarray(features.logits))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(features.label), reduction="none").numpy()
    held_out = slice(450, None)
    assert correlation(outputs(head, features)["uncertainty"].numpy()[held_out], loss[held_out]) > 0.3


def test_without_a_classifier_the_losses_are_a_cross_fitted_probes() -> None:
    features, _ = ambiguous_data()
    bare = Features.from_arrays(features.embedding, label=features.label)
    assert "cross-fitted" in LossHead().fit(fit_data(bare))["losses_of"]
    with pytest.raises(posthoc.PosthocError, match="no classes and the labels 4"):
        LossHead(classifier="backbone").fit(fit_data(bare))


def test_labels_of_some_classes_are_the_backbones_when_told() -> None:
    features, _ = ambiguous_data()
    kept = features[np.flatnonzero(features.label < CLASSES - 1)]
    data = FitData(
        kept,
        np.arange(250),
        np.arange(250, len(kept)),
        positives="labels",
        options=fit_data(features, epochs=1).options,
    )
    found = {kind: LossHead(classifier=kind).fit(data) for kind in ("auto", "backbone", "probe")}
    assert [one["losses_of"].split()[0] for one in found.values()] == ["linear", "backbone", "linear"]
    logits, label = torch.from_numpy(np.asarray(kept.logits[:250])), torch.from_numpy(kept.label[:250])
    wanted = float(torch.nn.functional.cross_entropy(logits, label))
    assert found["backbone"]["mean_loss"] == pytest.approx(wanted, rel=1e-5)


def test_the_base_temperature_is_chosen_by_blur() -> None:
    features, _ = ambiguous_data()
    data = fit_data(features)

    def blurred(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = np.asarray(features.embedding)[positions]
        centre = np.asarray(features.embedding).mean(0)
        severity = np.array([0.0, 0.4, 0.8])
        return severity, np.stack([centre + (x - centre) * (1 - s) for s in severity])

    data.blurred = blurred
    head = TemperatureHead()
    report = head.fit(data)
    tried = report["rank_correlation_with_blur"]
    assert len(tried) == 5
    assert report["base_temperature"] == max(tried, key=tried.get)
    assert float(head.base) == pytest.approx(report["base_temperature"])


def test_a_score_that_never_rises_with_blur_is_called_no_uncertainty() -> None:
    features, _ = ambiguous_data()
    data = fit_data(features, epochs=1)
    data.blurred = lambda rows: (np.arange(3.0), np.repeat(np.asarray(features.embedding)[rows][None], 3, 0))
    with pytest.warns(UserWarning, match="NOT an uncertainty"):
        TemperatureHead().fit(data)


def test_features_without_images_leave_the_sign_unverified() -> None:
    features, _ = ambiguous_data()
    with pytest.warns(UserWarning, match="sign of the score is unverified"):
        TemperatureHead().fit(fit_data(features, epochs=1))


def test_labels_are_needed_where_losses_are_learnt() -> None:
    x = np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)
    with pytest.raises(posthoc.PosthocError, match="needs labels"):
        LossHead().fit(fit_data(Features.from_arrays(x)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kappa", {"parametrization": "normal"}),
        ("kappa", {"projection": "8"}),
        ("kappa", {"projection": 1}),
        ("kappa", {"n_samples": 2.5}),
        ("loss", {"objective": "l1"}),
        ("loss", {"margin": "0.1"}),
        ("loss", {"classifier": "own"}),
        ("temperature", {"width": -1}),
        ("temperature", {"depth": -1}),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict) -> None:
    with pytest.raises(posthoc.PosthocError, match="expected"):
        make_head(name, **options)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(posthoc.PosthocError, match="'kappa'"):
        make_head("kapa")
    with pytest.raises(posthoc.PosthocError, match="'projection'"):
        make_head("kappa", projektion=8)


@pytest.mark.parametrize("name", ["kappa", "temperature", "loss"])
def test_adapters_stay_below_a_megabyte_at_2048_dimensions(name: str) -> None:
    from posthoc.adapters.heads import FeatureDims

    head = make_head(name)
    head.build(FeatureDims(2048, 2048, 1000))
    assert sum(t.numel() * t.element_size() for t in head.state_dict().values()) < 1e6


def test_the_side_of_the_split_that_has_no_pairs_is_named() -> None:
    features, _ = ambiguous_data()
    rows = np.arange(len(features))
    alone = FitData(features, rows[2:], rows[:2], options=TrainOptions(progress=False))
    with pytest.raises(posthoc.PosthocError, match=r"among the 2 held-out rows.*validation"):
        KappaHead().fit(alone)
