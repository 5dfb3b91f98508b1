"""The CIFAR-10H recipe: pairs and losses against brute force, figures against golden numbers, runs killed and shared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from posthoc.adapters.errors import OptionError, PosthocError
from posthoc.adapters.positives import RowNumbers, SoftLabelPairs, draw_negatives
from posthoc.adapters.training_loop import History, step_generator
from posthoc.adapters.vmf import VonMisesFisher
from posthoc.recipes.cifar10h import PRESETS, Cifar10HConfig
from posthoc.recipes.cifar10h_data import CifarH, FeatureInputs, ImageInputs, five_sets, fold_rows
from posthoc.recipes.cifar10h_networks import PosteriorNetwork, cifar_backbone, trainable_copy
from posthoc.recipes.cifar10h_report import (
    ENTROPY,
    Fold,
    Judged,
    all_scores,
    ambiguity,
    comparable,
    credible_rows,
    credible_sets,
    retrieval,
)
from posthoc.recipes.cifar10h_training import Answer, Step, answer, make_loss
from posthoc.recipes.networks import CifarResNet
from posthoc.recipes.running import parse, seeded

from .recipe_children import kill_at_checkpoint, metrics, results

ROWS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 coloured noise images, votes that go by the colour, and weights of a ResNet-20 that knows nothing."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    colours = rng.integers(60, 200, (10, 3))
    votes = rng.dirichlet(np.full(10, 0.1), ROWS)
    images = votes @ colours + rng.normal(0, 10, (32, 32, ROWS, 1))
    pixels = images.clip(0, 255).astype(np.uint8).transpose(2, 0, 1, 3)
    label = votes.argmax(1)
    np.savez(folder / "cifar10.npz", x_test=pixels, y_test=label, x_train=pixels, y_train=label)
    np.save(folder / "cifar10h-probs.npy", votes)
    with seeded(0):
        save_file(CifarResNet(20).state_dict(), folder / "cifar10_resnet20.safetensors")
    return folder


def words(folder: Path, output: str, *more: str) -> list[str]:
    tiny = "--folds 0 --head-steps 6 --steps 6 --every 2 --resamples 20 --samples 8 --batch-size 32 --block 16"
    return ["--data-dir", str(folder), "--output", output, "--cache-dir", str(folder / "cache"), *tiny.split(), *more]


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Path:
    """A run that nothing disturbed."""
    results("cifar10h", words(folder, "unbroken", "--preset", "mcinfonce", "--crops", "0.2"), folder)
    return folder / "unbroken"


def test_a_run_writes_what_it_found(unbroken: Path) -> None:
    found = json.loads((unbroken / "results.json").read_text())
    names = [table["title"] for table in found["tables"]]
    assert names[:2] == ["cifar10h: ambiguity", "cifar10h: retrieval"]
    assert set(found["tables"][0]["scores"]) == {
        "1/kappa", "1/kappa, two views", "entropy", "energy", "1/feature-norm", "entropy, two views",
    }  # fmt: skip
    nominal = found["credible_sets"]["nominal"]
    assert nominal["queries"] + nominal["queries_without_truth"] == ROWS // 5
    assert all((unbroken / name).stat().st_size for name in ("cifar10h.png", "results.md", "scores.npz", "config.json"))
    records = [json.loads(line) for line in metrics(unbroken)["fold0"].splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]


def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(folder: Path, unbroken: Path) -> None:
    line = words(folder, "broken", "--preset", "mcinfonce", "--crops", "0.2")
    kill_at_checkpoint("cifar10h", line, folder, "fold0/checkpoint.pt")
    again = results("cifar10h", [*line, "--resume"], folder)
    first = json.loads((unbroken / "results.json").read_text())
    assert metrics(folder / "broken") == metrics(unbroken)
    for one in (again, first):
        for fold in one["folds"]:
            fold.pop("seconds")
    assert [again[name] for name in ("tables", "folds", "credible_sets")] == [
        first[name] for name in ("tables", "folds", "credible_sets")
    ]


def test_two_processes_agree_with_one(folder: Path, unbroken: Path) -> None:
    line = words(folder, "two", "--preset", "mcinfonce", "--crops", "0.2")
    results("cifar10h", line, folder, processes=2)  # which asserts that there are two
    for name in ("fold0-head", "fold0"):
        both = [
            [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
            for output in (unbroken, folder / "two")
        ]
        for one, other in zip(*both, strict=True):
            assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
            assert other["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "papr"], "did you mean 'paper'"),
        (["--folds", "5"], "different numbers of 0 to 4"),
        (["--batch-size", "40", "--block", "16"], "multiple of --block 16"),
        (["--backbone", "resnet56"], "cifar10_resnet56.safetensors is not there"),
        (["--backbone", "resnet18"], "--checkpoint FILE"),
        (["--backbone", "resnet19"], "'resnet18'"),
        (["--batch-size", "512", "--block", "512"], "fewer than a batch"),
        (["--labels", "none.npy"], "cannot read votes"),
        (["--variant", "posthoc", "--scratch"], "neither --scratch"),
        (["--kappa", "1e9"], "expected"),
    ],
)
def test_bad_options_end_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    from posthoc.recipes.cifar10h import command

    with pytest.raises(SystemExit) as stopped:
        command([*words(folder, str(tmp_path / "bad")), *more])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("posthoc: ")
    assert message in shown


def test_more_processes_than_blocks_are_refused(folder: Path) -> None:
    from posthoc.adapters.distributed import Launch
    from posthoc.recipes.running import row_blocks

    with pytest.raises(PosthocError, match="multiple of 32"):
        row_blocks(16, 16, Launch(0, 2))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_config(preset: str) -> None:
    config = parse("cifar10h", Cifar10HConfig, PRESETS, None, ["--preset", preset, "--seed", "3"])
    assert config.seed == 3
    if preset.startswith("paper"):
        assert (config.parametrization, config.centred, config.lr, config.steps) == ("norm", False, 1e-4, 100_000)


def test_the_papers_scripts_are_the_presets() -> None:
    """spec/mcinfonce.md section 6: e_dim_z, t, kappa, n_neg, n_phases."""
    known = {
        "paper": (8, 16, 16, 32, 1),
        "paper-elk": (8, 32, 32, 1, 0),
        "paper-hib": (8, None, 32, 0, 1),
        "paper-hard": (16, 16, 16, 0, 0),
        "paper-train-hard": (8, 64, 64, 0, 1),
    }
    for name, (dim, t, kappa, negatives, phases) in known.items():
        config = Cifar10HConfig(**PRESETS[name])
        assert (config.dim, config.kappa, config.negatives, config.phases) == (dim, kappa, negatives, phases)
        assert t is None or config.concentration == t
    hib = Cifar10HConfig(**PRESETS["paper-hib"])
    assert (hib.hib_scale, hib.hib_shift) == (2.0, 1.0)


# pairs and the loss of a step


def test_positives_follow_the_soft_labels_and_ids_stay_whole() -> None:
    """P(j | i) is the sum over classes of p_i(c) p_j(c) / sum_k p_k(c); ids beyond 255 are not folded."""
    rng = np.random.default_rng(1)
    labels = rng.dirichlet(np.full(3, 0.5), 600).astype(np.float32)
    rows = np.arange(290, 302)
    pairs = SoftLabelPairs(RowNumbers(600), labels, rows)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([pairs.draw(torch.full((400,), 295), generator).positive for _ in range(50)])
    assert drawn.dtype == torch.int64
    share = np.bincount(drawn.numpy(), minlength=600)[rows] / len(drawn)
    mass = labels[rows].sum(0)
    expected = (labels[295] / mass) @ labels[rows].T
    itself = rows == 295
    once_more = expected[itself] * expected  # an anchor that drew itself draws once more
    expected = np.where(itself, expected[itself] ** 2, expected + once_more)
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / len(drawn)))


def test_negatives_of_hard_labels_are_true() -> None:
    labels = np.eye(10, dtype=np.float32)[np.arange(1000) % 10]
    pairs = SoftLabelPairs(RowNumbers(1000), labels, np.arange(1000))
    batch = pairs.draw(torch.arange(300, 364), torch.Generator().manual_seed(0))
    columns, has = draw_negatives(batch.negative, 16, torch.Generator().manual_seed(1))
    assert has.all()
    assert ((batch.anchor % 10)[:, None] != (batch.positive % 10)[columns]).all()
    assert (batch.anchor % 10 == batch.positive % 10).all()


class Table(nn.Module):
    """Inputs that are posteriors already: the last column is log kappa."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.scale = nn.Identity(), nn.Parameter(torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> VonMisesFisher:
        return VonMisesFisher(inputs[:, :-1] * self.scale, inputs[:, -1].exp())


def _step(**options: Any) -> Step:
    config = Cifar10HConfig(batch_size=32, block=16, negatives=4, samples=16, **options)
    rng = np.random.default_rng(2)
    table = rng.normal(size=(90, 6)).astype(np.float32)
    labels = rng.dirichlet(np.full(4, 0.3), 90).astype(np.float32)
    return Step(Table(), make_loss(config), FeatureInputs(table, table, table), labels, np.arange(90), config)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["mcinfonce", "elk", "hib"])
@pytest.mark.parametrize("directions_only", [False, True])
def test_a_batch_is_the_mean_of_its_blocks(loss: str, directions_only: bool) -> None:
    """So that the processes of a launch, each with blocks of its own, have one process's gradient in the mean."""
    step = _step(loss=loss)
    rows, places = torch.arange(32).view(2, 16), [(0, 1), (0, 2)]
    whole = step(rows, places, directions_only)
    parts = [step(rows[i : i + 1], places[i : i + 1], directions_only) for i in range(2)]
    assert float(whole.detach()) == pytest.approx(float(sum(parts).detach()) / 2, rel=1e-5)


def test_a_block_is_its_loss_with_drawn_pairs() -> None:
    step = _step(loss="elk", symmetric=False)
    value = step(torch.arange(16)[None], [(7,)], False)
    generator = step_generator(7)
    batch = step.pairs.draw(torch.arange(16), generator)
    for _ in range(2):
        torch.rand(16, generator=generator)  # which images of either side are cropped
    columns, _ = draw_negatives(batch.negative, 4, generator)
    table = step.inputs.whole(np.arange(90))

    def posterior(rows: torch.Tensor) -> VonMisesFisher:
        return VonMisesFisher(table[rows][..., :-1], table[rows][..., -1].exp())

    expected = step.loss(posterior(batch.anchor), posterior(batch.positive), posterior(batch.positive[columns]))  # type: ignore[misc]
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_first_phase_moves_no_kappa() -> None:
    step = _step(loss="mcinfonce")
    network = step.network
    kappas: list[torch.Tensor] = []
    network.register_forward_hook(lambda *call: kappas.append(call[2].concentration))
    step.inputs.features.requires_grad_(True)  # type: ignore[union-attr]
    loss = step(torch.arange(32).view(2, 16), [(0, 1), (0, 2)], True)
    (gradient,) = torch.autograd.grad(loss, step.inputs.features)  # type: ignore[union-attr]
    assert not gradient[:, -1].any()
    assert gradient[:, :-1].any()


# data


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_votes_are_shares_or_counts(tmp_path: Path, kind: type) -> None:
    from posthoc.recipes.cifar10h_data import read_vote_shares

    counts = np.random.default_rng(0).integers(0, 30, (50, 10)) + np.eye(10, dtype=int)[0]
    table = counts if kind is np.int64 else counts / counts.sum(1, keepdims=True)
    np.save(tmp_path / "votes.npy", table.astype(kind))
    read = read_vote_shares(tmp_path / "votes.npy", 50)
    np.testing.assert_allclose(read, counts / counts.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        (np.ones((49, 10)) / 10, r"expected \[50, classes\]"),
        (np.ones(50), r"expected \[50, classes\]"),
        (np.full((50, 10), 0.11), r"50 rows do not sum to 1 \(first: row 0, 1.1\)"),
        (np.zeros((50, 10), int), "at least one for each image"),
        (np.full((50, 10), -0.1), "not negative"),
        (np.full((50, 10), np.nan), "finite"),
    ],
)
def test_a_wrong_file_of_votes_is_refused(tmp_path: Path, votes: np.ndarray, message: str) -> None:
    from posthoc.recipes.cifar10h_data import read_vote_shares

    np.save(tmp_path / "votes.npy", votes)
    with pytest.raises(PosthocError, match=message):
        read_vote_shares(tmp_path / "votes.npy", 50)


def test_missing_data_says_what_goes_where(tmp_path: Path) -> None:
    from posthoc.recipes.cifar10h_data import load_cifar10h

    with pytest.raises(PosthocError, match=r"cifar10h-probs.npy or cifar10h-counts.npy.*cifar-10h.*--labels"):
        load_cifar10h(tmp_path)
    np.save(tmp_path / "cifar10h-counts.npy", np.ones((5, 10), int))
    with pytest.raises(PosthocError, match=r"cifar10 are not in .*torchvision.datasets.CIFAR10"):
        load_cifar10h(tmp_path)


def test_five_folds_test_every_image_once() -> None:
    sets = five_sets(1003, seed=5)
    assert [len(part) for part in sets] == [201, 201, 201, 200, 200]
    tested = []
    for fold in range(5):
        train, validation, test = fold_rows(sets, fold)
        np.testing.assert_array_equal(train, np.sort(np.concatenate([sets[(fold + k) % 5] for k in range(3)])))
        assert validation is sets[(fold + 3) % 5]
        assert not set(train) & set(validation)
        assert not set(test) & (set(train) | set(validation))
        tested.append(test)
    np.testing.assert_array_equal(np.sort(np.concatenate(tested)), np.arange(1003))
    with pytest.raises(OptionError):
        fold_rows(sets, 5)


def test_training_images_are_cropped_moved_and_mirrored() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    inputs = ImageInputs(pixels, pixels[::-1], (0.5,) * 3, (0.25,) * 3)
    rows = torch.arange(8)
    plain = inputs.training(rows, 0.0, False, step_generator(0))
    torch.testing.assert_close(plain, inputs.whole(np.arange(8)))
    torch.testing.assert_close(inputs.whole(np.array([0]), crop=True), inputs.whole(np.array([7])))
    expected = (functional.pad(torch.from_numpy(pixels[0]).float(), (0, 0)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(plain[0], expected)
    moved = inputs.training(rows, 0.0, True, step_generator(0))
    assert not torch.equal(moved, plain)
    assert torch.equal(moved, inputs.training(rows, 0.0, True, step_generator(0)))
    torch.testing.assert_close(inputs.whole(np.arange(8), mirrored=True), plain.flip(3))
    crops = inputs.training(rows, 1.0, False, step_generator(0))
    assert not any(torch.equal(a, b) for a, b in zip(crops, plain, strict=True))


# networks


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "vit_tiny_patch16_224", "convnext_atto"])
def test_four_families_take_small_images_and_learn_a_kappa(name: str, folder: Path) -> None:
    """A step of the norm and of the network's kappa moves every weight below the classifier, and kappa as it was told to."""
    backbone = cifar_backbone(name, None, folder, scratch=True, seed=0)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in backbone.modules())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for parametrization in ("norm", "network"):
        with seeded(1):
            network = PosteriorNetwork(trainable_copy(backbone), backbone.embedding_dim, 8, parametrization, kappa=10.0)
        network.start(backbone(images).embedding)
        kappa = network(images).concentration
        if parametrization == "norm":
            assert float(kappa.detach().mean()) == pytest.approx(10.0, rel=1e-3)
        trained = [p for p in network.parameters() if p.requires_grad]
        kappa.log().mean().backward()
        idle = {name for name, p in network.named_parameters() if p.requires_grad and p.grad is None}
        assert idle <= {"projection.weight", "projection.bias"}, "the network's kappa does not depend on the projection"
        steepness = sum(float(p.grad.square().sum()) for p in trained if p.grad is not None)
        torch.optim.SGD(trained, lr=1e-3 / steepness).step()  # log kappa should fall by .001
        assert float(network(images).concentration.detach().log().mean()) < float(kappa.detach().log().mean())


def test_the_copy_trains_and_its_statistics_do_not(folder: Path) -> None:
    backbone = cifar_backbone("resnet20", None, folder, scratch=False, seed=0)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    network = PosteriorNetwork(trainable_copy(backbone), 64, 4, "norm", 16.0)
    network.start(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)))
    network.train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    network(torch.randn(4, 3, 32, 32)).concentration.sum().backward()
    optimizer.step()
    after = network.backbone.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) == ("running" in name or "num_batches" in name or "linear" in name), name
        assert torch.equal(backbone.state_dict()[name], value), "the backbone that is compared with stays as it is"


def test_the_start_is_at_the_principal_directions() -> None:
    rng = torch.Generator().manual_seed(0)
    features = 5 + torch.randn(500, 6, generator=rng) * torch.tensor([9.0, 0.1, 5.0, 0.1, 0.1, 0.1])
    network = PosteriorNetwork(nn.Identity(), 6, 2, "norm", kappa=16.0)
    network.start(features)
    weight = network.projection.weight.detach()
    assert weight[:, [0, 2]].abs().max() > 20 * weight[:, [1, 3, 4, 5]].abs().max()
    projected = network.projection(features).detach()
    assert projected.mean(0).abs().max() < 1e-4
    assert float(projected.norm(dim=1).mean()) == pytest.approx(16.0, rel=1e-5)


# figures


def _answer(embedding: np.ndarray, kappa: np.ndarray) -> Answer:
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    return Answer(unit.astype(np.float32), 1 / kappa, kappa)


def _judged(embedding: np.ndarray, kappa: np.ndarray, votes: np.ndarray, validation: int = 0) -> Judged:
    known = _answer(embedding, kappa)
    rows = np.arange(len(votes))
    part = [
        Answer(known.embedding[r], known.uncertainty[r], known.kappa[r]) for r in (rows[:validation], rows[validation:])
    ]
    whole = part[1] if validation else known
    history = History([{"step": 1, "train_loss": 0.0}], 0)
    fold = Fold(rows[:validation], rows[validation:], {}, history, 0.0, part[0] if validation else known, whole, whole)
    fractions = np.linspace(0.25, 1, len(rows))
    return Judged(
        CifarH(np.zeros((len(rows), 32, 32, 3), np.uint8), votes.astype(np.float32)), fractions, [fold], None, "1/kappa"
    )


def test_figures_are_the_references(shared: Path) -> None:
    golden = np.load(shared / "golden/mcinfonce/metrics_retrieval.npz")
    votes = golden["soft_labels"]
    judged = _judged(golden["embeddings"], golden["confidence"].astype(float), votes)
    table = ambiguity(judged, all_scores(judged), 20, 0)
    assert table.cells["1/kappa"]["human_spearman"].value.value == pytest.approx(
        float(golden["rcorr_entropy"]), abs=1e-6
    )
    by_label = np.eye(int(golden["labels"].max()) + 1)[golden["labels"]]
    found, hit = retrieval(_judged(golden["embeddings"], golden["confidence"].astype(float), by_label), 20, 0)
    assert found.cells["embedding"]["recall_at_1"].value.value == pytest.approx(float(golden["recall_at_1"]), abs=1e-6)
    assert found.cells["embedding"]["map_at_r"].value.value == pytest.approx(float(golden["mapr"]), abs=1e-6)
    np.testing.assert_array_equal(hit, golden["nn_correct"].astype(bool))


def test_scores_of_folds_share_a_scale() -> None:
    """A fold whose kappas are a power of another's says the same, and entropies are left alone."""
    kappa = np.exp(np.random.default_rng(0).normal(3, 1, 300))
    embedding = np.ones((300, 3))
    one = comparable([_answer(embedding, kappa)], [_answer(embedding, kappa)])
    other = comparable([_answer(embedding, 7 * kappa**1.7)] * 2, [_answer(embedding, 7 * kappa**1.7)] * 2)
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
    assert (np.argsort(one) == np.argsort(1 / kappa)).all()
    plain = Answer(embedding, kappa, logits=embedding)
    np.testing.assert_array_equal(comparable([plain, plain], [plain, plain]), kappa)


def test_credible_sets_of_true_posteriors_have_their_coverage() -> None:
    """Validation and test images are points round ten centres; a query's posterior is the true one of its neighbours."""
    rng = torch.Generator().manual_seed(0)
    centres = functional.normalize(torch.randn(10, 8, generator=rng), dim=1)
    label = np.arange(3000) % 10
    kappa = np.where(label < 5, 20.0, 200.0)
    drawn = VonMisesFisher(centres[label], torch.from_numpy(kappa).float()).rsample((), rng).numpy()
    drawn[2000:] = centres[label[2000:]].numpy() + 1e-6
    judged = _judged(drawn, kappa, np.eye(10)[label], validation=2000)
    found = credible_sets(judged)
    assert found is not None
    assert 1 - float(found.nominal.missed.mean()) == pytest.approx(0.95, abs=0.02)
    rows = credible_rows(found)
    assert rows[0]["kappa"] < rows[-1]["kappa"]
    assert rows[0]["nominal_share"] > 1.15 * rows[-1]["nominal_share"]


def test_a_classifier_has_no_posterior() -> None:
    judged = _judged(np.random.default_rng(0).normal(size=(60, 4)), np.ones(60), np.eye(3)[np.arange(60) % 3], 30)
    fold = judged.folds[0]
    logits = Answer(fold.on_test.embedding, fold.on_test.uncertainty, logits=np.zeros((30, 3)))
    plain = replace(fold, on_validation=logits, on_test=logits, on_crops=logits)
    other = replace(judged, folds=[plain])
    assert credible_sets(other) is None


def test_answers_are_of_the_rows_asked_for() -> None:
    step = _step()
    found = answer(step.network, step.inputs, np.array([5, 3]))
    table = step.inputs.whole(np.array([5, 3])).numpy()
    np.testing.assert_allclose(found.kappa, np.exp(table[:, -1]), rtol=1e-6)
    np.testing.assert_allclose(
        found.embedding, table[:, :-1] / np.linalg.norm(table[:, :-1], axis=1)[:, None], rtol=1e-5
    )
    assert ENTROPY == "entropy"
