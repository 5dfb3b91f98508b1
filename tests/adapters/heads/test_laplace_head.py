"""The laplace head: calibrated by its temperature, whichever classifier it stands on, and nothing but tensors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ToTensor

import posthoc
from posthoc.adapters.backbone import BackboneOutput
from posthoc.adapters.errors import BackboneError, DataError, NotFittedError, OptionError
from posthoc.adapters.features import Features
from posthoc.adapters.heads import FeatureDims, FitData, LaplaceHead
from posthoc.adapters.laplace import LastLayerPosterior
from posthoc.adapters.predictive import entropy
from posthoc.adapters.training import TrainOptions

N, DIM, CLASSES = 1500, 8, 4
TRAIN, HELD_OUT, TEST = np.arange(900), np.arange(900, 1200), np.arange(1200, N)


def overconfident(factor: float = 4.0) -> tuple[np.ndarray, np.ndarray, tuple[Tensor, Tensor]]:
    """Penultimate features, labels drawn from a softmax of them, and a classifier whose logits are too large by `factor`."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, DIM)).astype(np.float32)
    weight, bias = rng.normal(size=(CLASSES, DIM)) / 2, rng.normal(size=CLASSES) / 2
    label = (x @ weight.T + bias + rng.gumbel(size=(N, CLASSES))).argmax(1)
    return x, label, (torch.from_numpy(factor * weight).float(), torch.from_numpy(factor * bias).float())


def fit_data(labels: str = "hard", classifier: bool = True, bias: bool = True) -> FitData:
    """`labels`: hard, soft or none. The embedding is another thing than the penultimate features."""
    x, label, (weight, offset) = overconfident()
    logits = x @ weight.numpy().T + (offset.numpy() if bias else 0.0)
    given = {"hard": label, "soft": np.eye(CLASSES, dtype=np.float32)[label], "none": None}[labels]
    embedding = np.concatenate([x, x[:, :1] ** 2], 1)
    features = Features.from_arrays(embedding, penultimate=x, logits=logits, label=given)
    own = (weight, offset if bias else None) if classifier else None
    return FitData(
        features, TRAIN, HELD_OUT, classifier=own, classifier_reason="it has two", options=TrainOptions(progress=False)
    )


def outputs(head: LaplaceHead, features: Features, rows: np.ndarray = TEST) -> dict[str, Tensor]:
    parts = [torch.from_numpy(np.asarray(a[rows])) for a in (features.embedding, features.penultimate, features.logits)]
    with torch.no_grad():
        return head(BackboneOutput(*parts))


def nll(probabilities: Tensor, rows: np.ndarray = TEST) -> float:
    return -float(probabilities.log()[torch.arange(len(rows)), torch.from_numpy(overconfident()[1][rows])].mean())


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_the_tuned_temperature_mends_an_overconfident_classifier(structure: str) -> None:
    data = fit_data()
    head = LaplaceHead(structure)
    report = head.fit(data)
    answers = outputs(head, data.features)
    assert 2.0 < report["likelihood_temperature"] < 5.0  # 4 is true; the posterior's own spread takes a part of it
    truth = nll(torch.softmax(torch.from_numpy(data.features.logits[TEST]) / 4.0, -1))
    assert nll(answers["probabilities"]) < truth + 0.02
    assert nll(torch.softmax(torch.from_numpy(data.features.logits[TEST]), -1)) > truth + 0.3
    assert report["held_out_nll"] < report["held_out_nll_softmax"]
    untuned = LaplaceHead(structure, tune="marglik")
    plain = untuned.fit(data)
    assert plain["likelihood_temperature"] == 1.0
    weight, bias = data.classifier  # type: ignore[misc]
    own = LastLayerPosterior(structure, plain["prior_precision"])
    own.fit(data.features.penultimate, weight, bias, data.features.label, subset=data.train)
    assert float(own.log_marginal_likelihood()) == pytest.approx(plain["log_marginal_likelihood"], rel=1e-6)
    assert nll(outputs(untuned, data.features)["probabilities"]) > nll(answers["probabilities"])


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_those_of_the_posterior_at_that_temperature(structure: str, bias: bool) -> None:
    data = fit_data(bias=bias)
    head = LaplaceHead(structure)
    report = head.fit(data)
    t = report["likelihood_temperature"]
    assert data.classifier is not None
    weight, offset = data.classifier
    x = torch.from_numpy(data.features.penultimate)
    posterior = LastLayerPosterior(structure, report["prior_precision"])
    posterior.fit(x[TRAIN], weight / t, None if offset is None else offset / t, data.features.label[TRAIN])
    assert "log_marginal_likelihood" not in report  # the backbone's classifier was not trained on these rows
    answers = outputs(head, data.features)
    probabilities = posterior.predict(x[TEST])
    torch.testing.assert_close(answers["probabilities"].double(), probabilities, atol=1e-5, rtol=0)
    torch.testing.assert_close(answers["uncertainty"].double(), entropy(probabilities), atol=1e-5, rtol=0)
    torch.testing.assert_close(answers["variance"].double(), posterior.functional_variance(x[TEST]), rtol=1e-3, atol=0)
    information = posterior.uncertainties(x[TEST])["mutual_information"]
    torch.testing.assert_close(answers["mutual_information"].double(), information, rtol=0.1, atol=1e-5)
    assert (answers["mutual_information"] < answers["uncertainty"]).all()
    assert all(answers[name].dtype == torch.float32 for name in ("uncertainty", *head.fields))


def test_features_far_away_are_epistemically_uncertain() -> None:
    data = fit_data()
    head = LaplaceHead()
    head.fit(data)
    near, weight = outputs(head, data.features), data.classifier[0]  # type: ignore[index]
    # far along a direction that the logits do not see: only what is known about the weights differs
    blind = torch.linalg.svd(weight).Vh[-1].numpy()
    x = np.asarray(data.features.penultimate) + 30.0 * blind
    far = head(
        BackboneOutput(
            torch.from_numpy(x[TEST]), torch.from_numpy(x[TEST]), torch.from_numpy(data.features.logits[TEST])
        )
    )
    assert (far["mutual_information"] > near["mutual_information"]).float().mean() > 0.95
    assert (far["uncertainty"] > near["uncertainty"]).float().mean() > 0.9


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("classifier", ["backbone", "probe"])
def test_tensors_and_options_rebuild_it(structure: str, classifier: str) -> None:
    data = fit_data()
    head = LaplaceHead(structure, classifier=classifier)
    head.fit(data)
    options = json.loads(json.dumps(head.config()))
    twin = LaplaceHead(**options)
    twin.build(FeatureDims(DIM + 1, DIM, 0))
    assert twin.scope == head.scope == ("logits" if classifier == "backbone" else "embedding")
    assert "draws" not in head.state_dict()
    assert ("weight" in head.state_dict()) == (classifier == "probe")
    twin.load_state_dict({name: tensor.clone() for name, tensor in head.state_dict().items()}, strict=True)
    for name, value in outputs(head, data.features).items():
        assert torch.equal(outputs(twin, data.features)[name], value), name
    assert all(torch.isfinite(t).all() for t in head.state_dict().values())


def test_fitting_twice_gives_the_same_and_leaves_the_random_state_alone() -> None:
    data = fit_data(classifier=False)
    before = torch.get_rng_state()
    first, second = LaplaceHead(), LaplaceHead()
    first.fit(data)
    second.fit(data)
    second.fit(data)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outputs(first, data.features)["uncertainty"], outputs(second, data.features)["uncertainty"])


def test_without_a_classifier_for_these_classes_a_probe_is_fitted() -> None:
    truth = nll(torch.softmax(torch.from_numpy(fit_data().features.logits[TEST]) / 4.0, -1))
    for data in (fit_data(classifier=False), fit_data()):
        if data.classifier is not None:  # a fifth class in the labels, which the backbone's classifier lacks
            data.features.label[0] = CLASSES
        head = LaplaceHead()
        report = head.fit(data)
        assert report["classifier"] == "linear probe"
        assert head.scope == "embedding"
        embedding = torch.from_numpy(data.features.embedding[TEST])
        answers = head(BackboneOutput(embedding, None, None))
        assert nll(answers["probabilities"]) < truth + 0.05


def test_the_backbones_classifier_is_taken_when_the_labels_show_fewer_classes_and_it_is_asked_for() -> None:
    data = fit_data()
    data.features.label[data.features.label == CLASSES - 1] = 0
    auto, asked = LaplaceHead(), LaplaceHead(classifier="backbone")
    assert auto.fit(data)["classifier"] == "linear probe"
    assert asked.fit(data)["classifier"] == "the backbone's own"
    assert asked.config()["classes"] == CLASSES


def test_soft_labels_of_one_class_are_labels() -> None:
    hard, soft = LaplaceHead(), LaplaceHead()
    a, b = hard.fit(fit_data()), soft.fit(fit_data("soft"))
    assert a["likelihood_temperature"] == pytest.approx(b["likelihood_temperature"], rel=1e-5)
    assert a["held_out_nll"] == pytest.approx(b["held_out_nll"], rel=1e-5)


def test_without_labels_the_temperature_stays_and_says_so() -> None:
    data = fit_data("none")
    head = LaplaceHead()
    with pytest.warns(UserWarning, match="temperature stays 1"):
        report = head.fit(data)
    assert report["likelihood_temperature"] == 1.0
    assert "log_marginal_likelihood" not in report
    assert LaplaceHead(tune="marglik").fit(data)["prior_precision"] == report["prior_precision"]
    fixed = LaplaceHead(tune="marglik", prior_precision=7.0)
    assert fixed.fit(data)["prior_precision"] == 7.0


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(DataError, match=r"no labels.*it has two"):
        LaplaceHead().fit(fit_data("none", classifier=False))
    with pytest.raises(DataError, match="classifier='probe'"):
        LaplaceHead(classifier="probe").fit(fit_data("none"))
    with pytest.raises(BackboneError, match="it has two"):
        LaplaceHead(classifier="backbone").fit(fit_data(classifier=False))
    more = fit_data()
    more.features.label[0] = CLASSES
    with pytest.raises(DataError, match="4 classes and the labels 5"):
        LaplaceHead(classifier="backbone").fit(more)
    broken = fit_data()
    broken.features.penultimate[3] = np.nan
    with pytest.raises(DataError, match="rows 3"):
        LaplaceHead().fit(broken)
    with pytest.raises(NotFittedError, match="laplace"):
        outputs(LaplaceHead(), fit_data().features)
    head = LaplaceHead()
    head.fit(fit_data())
    with pytest.raises(BackboneError, match="no penultimate"):
        head(BackboneOutput(torch.zeros(2, DIM + 1), None, torch.zeros(2, CLASSES)))


@pytest.mark.parametrize(
    "options", [{"structure": "lowrank"}, {"tune": "grid"}, {"classifier": "linear"}, {"prior_precision": 0.0}]
)
def test_options_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(OptionError, match=str(next(iter(options.values())))):
        LaplaceHead(**options)


class _OnPenultimate(torch.nn.Module):
    def __init__(self, head: LaplaceHead, classifier: tuple[Tensor, Tensor | None]) -> None:
        super().__init__()
        self.head = head
        self.weight, self.bias = classifier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        answers = self.head(BackboneOutput(x, x, torch.nn.functional.linear(x, self.weight, self.bias)))
        return answers["uncertainty"], answers["mutual_information"], answers["variance"]


@pytest.mark.filterwarnings("ignore:.*get_attr.*:UserWarning")  # torch before 2.8, of constants
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_it_exports_with_a_free_batch_and_is_differentiable(structure: str) -> None:
    data = fit_data()
    head = LaplaceHead(structure)
    head.fit(data)
    assert data.classifier is not None
    model = _OnPenultimate(head, data.classifier).eval()
    x = torch.from_numpy(data.features.penultimate[TEST]).requires_grad_()
    exported = torch.export.export(
        model, (x[:5].detach(),), dynamic_shapes=({0: torch.export.Dim("batch", max=1 << 20)},)
    )
    expected = model(x)
    for a, b in zip(exported.module()(x), expected, strict=True):
        torch.testing.assert_close(a, b)
    (expected[0].sum() + expected[1].sum()).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_on_cifar_features_it_is_as_calibrated_as_temperature_scaling_and_variance_is_no_score(shared: Path) -> None:
    with np.load(shared / "data/cifar10_resnet20_features.npz") as stored:
        x, label = stored["test"].astype(np.float32), stored["y_test"].astype(np.int64)
        texture = stored["ood_dtd"].astype(np.float32)
        weight, bias = (torch.from_numpy(stored[name].astype(np.float32)) for name in ("head_weight", "head_bias"))
    logits = x @ weight.numpy().T + bias.numpy()
    fold = np.random.default_rng(0).permutation(len(x))
    test, held_out, train = fold[:2000], fold[2000:2800], fold[2800:]
    head = LaplaceHead()
    features = Features.from_arrays(x, penultimate=x, logits=logits, label=label)
    head.fit(FitData(features, train, held_out, classifier=(weight, bias)))
    answers = outputs(head, features, test)

    def cross_entropy(rows: np.ndarray, t: float) -> float:
        return float(
            torch.nn.functional.cross_entropy(torch.from_numpy(logits[rows]) / t, torch.from_numpy(label[rows]))
        )

    scaled = min(np.linspace(0.5, 5.0, 91), key=lambda t: cross_entropy(fold[2000:], t))
    found = -float(answers["probabilities"].log()[torch.arange(2000), torch.from_numpy(label[test])].mean())
    assert found < cross_entropy(test, scaled) + 0.005
    assert found < cross_entropy(test, 1.0) - 0.08

    with torch.no_grad():
        t = torch.from_numpy(texture)
        unseen = head(BackboneOutput(t, t, torch.nn.functional.linear(t, weight, bias)))

    def auroc(name: str) -> float:  # share of pairs in which the unseen image scores higher
        a, b = (o[name].reshape(len(o[name]), -1).mean(1) for o in (answers, unseen))
        return float((b.unsqueeze(1) > a).float().mean())

    assert auroc("uncertainty") > 0.88
    assert auroc("mutual_information") > 0.88
    assert auroc("variance") < 0.3


def test_with_fewer_rows_than_dimensions_the_held_out_rows_strengthen_the_prior() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 400))
    label = rng.integers(3, size=260)
    x = (0.12 * centres[label] + rng.normal(size=(260, 400))).astype(np.float32)
    features = Features.from_arrays(x, label=label)
    data = FitData(features, np.arange(120), np.arange(120, 180), options=TrainOptions(progress=False))
    tuned, plain, fixed = LaplaceHead(), LaplaceHead(tune="marglik"), LaplaceHead(prior_precision=2.0)
    report, alone = tuned.fit(data), plain.fit(data)
    assert report["prior_factor"] > 1.0
    assert report["held_out_nll"] < report["held_out_nll_softmax"]
    embedding = torch.from_numpy(x[180:])

    def loss(head: LaplaceHead) -> float:
        p = head(BackboneOutput(embedding, None, None))["probabilities"]
        return -float(p.log()[torch.arange(80), torch.from_numpy(label[180:])].mean())

    assert loss(tuned) < loss(plain)
    assert "prior_factor" not in alone
    assert fixed.fit(data)["prior_precision"] == 2.0


def test_a_probe_works_on_standardised_features_and_ignores_dead_ones() -> None:
    data = fit_data(classifier=False)
    x = np.array(data.features.embedding)
    x = np.concatenate([1000.0 * x[:, :1] + 5.0, x[:, 1:], np.full((len(x), 1), 3.0)], 1).astype(np.float32)
    first, second = LaplaceHead(), LaplaceHead()
    first.fit(data)
    other = Features.from_arrays(x, label=data.features.label)
    second.fit(FitData(other, TRAIN, HELD_OUT, options=TrainOptions(progress=False)))
    x[:, -1] = 77.0  # a dimension that never moved says nothing when it does
    a = first(BackboneOutput(torch.from_numpy(data.features.embedding[TEST]), None, None))["uncertainty"]
    b = second(BackboneOutput(torch.from_numpy(x[TEST]), None, None))["uncertainty"]
    torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


class _Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 6, 3), torch.nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).relu().mean((2, 3)))


def test_an_own_network_is_fitted_on_a_folder_saved_and_loaded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(3):
        (tmp_path / f"images/{k}").mkdir(parents=True)
        for i in range(30):
            noise = rng.integers(0, 60, (12, 12, 3)) + np.eye(3, dtype=int)[k] * 150
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / f"images/{k}/{i}.png")
    torch.manual_seed(0)
    network = _Network()
    model = posthoc.wrap(network, head="laplace", transform=ToTensor()).fit(str(tmp_path / "images"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = posthoc.load(tmp_path / "adapter", backbone=network, transform=ToTensor())
    one = Image.open(tmp_path / "images/1/3.png")
    assert torch.equal(loaded(one).uncertainty, model(one).uncertainty)
    torch.testing.assert_close(model(one).probabilities.sum(1), torch.ones(1))
