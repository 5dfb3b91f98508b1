"""The recipe decoupled_uniformity: its parts by hand, and whole runs on scikit-learn's digits, which stand for FashionMNIST."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from posthoc.adapters.distributed import Launch
from posthoc.adapters.errors import DataError, OptionError
from posthoc.adapters.losses import DecoupledUniformity
from posthoc.eval.feature_file import FeatureFile
from posthoc.eval.probes import linear_probe, nearest_label
from posthoc.recipes import decoupled_uniformity, decoupled_uniformity_evaluation, decoupled_uniformity_priors
from posthoc.recipes.decoupled_uniformity import (
    PRESETS,
    Batches,
    Uniform,
    UniformityConfig,
    altered,
    evaluate,
    loss_of,
    made,
    make_network,
    make_optimizer,
    watched,
)
from posthoc.recipes.decoupled_uniformity_data import load_sets
from posthoc.recipes.decoupled_uniformity_evaluation import class_worth, representation
from posthoc.recipes.decoupled_uniformity_folders import Attributes
from posthoc.recipes.decoupled_uniformity_priors import Prior, check_apart, open_prior, smoother, write_prior
from posthoc.recipes.decoupled_uniformity_report import table
from posthoc.recipes.options import parse
from posthoc.recipes.pretraining_evaluation import encode, settle
from posthoc.recipes.running import Run
from posthoc.recipes.vae import ConvVAE, divergence, train_vae
from posthoc.recipes.vae import small as shrunk
from posthoc.recipes.view_batches import Augmented, Images, ViewBatches, kept

from .recipe_children import kill_at_checkpoint, metrics, records, results, results_of_two
from .recipe_data import write_digits, write_idx

CPU, ALONE = torch.device("cpu"), Launch(0, 1)
TINY = "--dataset fashion-mnist --data-dir data --width 8 --hidden 32 --dim 16 --batch-size 64 --throughput-steps 0"
SHORT = [*TINY.split(), "--train-images", "220", "--epochs", "3", "--probe-images", "150"]
VAE = [*SHORT, "--prior", "vae", "--vae-epochs", "1", "--vae-dim", "4", "--output"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,400 digits of 16 x 16 px and 397 others to test, in FashionMNIST's files."""
    place = tmp_path_factory.mktemp("uniformity")
    write_digits(place / "data")
    return place


def small(folder: Path, **more: Any) -> UniformityConfig:
    given = {"dataset": "fashion-mnist", "width": 8, "hidden": 12, "dim": 6, "batch_size": 32, "train_images": 60}
    return UniformityConfig(data_dir=folder / "data", **{**given, **more})


def test_it_learns_without_labels_and_says_what_it_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY.split(), "--epochs", "8", "--every", "4", "--train-images", "1000", "--check", "--views", "3"]
    words[words.index("--throughput-steps") + 1] = "1"
    words += ["--t", "5", "--lr", "4e-3", "--hidden", "64", "--dim", "32", "--output", "learns"]
    found = results("decoupled_uniformity", words, folder)
    assert found["prior"] is None
    assert found["worth"]["linear"] > found["random_features"]["linear"] + 0.05
    seen = records(folder / "learns")
    assert [record["step"] for record in seen] == [4 * 14, 8 * 14]
    before, after = found["held_out"]["before"], found["held_out"]["after"]
    assert after == seen[-1]
    assert after["own_view_found"] > before["own_view_found"]
    assert after["uniformity"] < before["uniformity"] < 0, "images are spread"
    assert "| decoupled uniformity | none | not seen | " in capsys.readouterr().out
    assert (folder / "learns" / "training.png").is_file()
    config = small(folder, hidden=64, dim=32, batch_size=64, train_images=1000)
    sets, own = load_sets(config), make_network(config, load_sets(config))
    saved = torch.load(folder / "learns" / "train" / "checkpoint.pt", weights_only=True)["module"]
    own.load_state_dict({name.removeprefix("network."): value for name, value in saved.items()})
    train, test = (encode(own, images, CPU) for images in (sets.train, sets.test))
    near = nearest_label(train.projection, train.label, test.projection)
    assert found["worth"]["nearest_projection"] == (near == test.label).mean(), "the throughput has changed no weight"


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, Any]:
    """What a short run found that nothing disturbed; it is in the folder `whole`."""
    return results("decoupled_uniformity", [*VAE, "whole"], folder)


def test_a_killed_run_goes_on_to_the_same_result(folder: Path, unbroken: dict[str, Any]) -> None:
    killed = kill_at_checkpoint("decoupled_uniformity", [*VAE, "killed"], folder, "train/checkpoint.pt")
    assert killed != metrics(folder / "whole")
    resumed = results("decoupled_uniformity", [*VAE, "killed", "--resume"], folder)
    assert metrics(folder / "killed") == metrics(folder / "whole")
    for name in ("worth", "random_features", "held_out"):
        assert resumed[name] == unbroken[name]
    assert resumed["prior"]["smoother"] == unbroken["prior"]["smoother"]
    assert (unbroken["prior"]["seen_labels"], unbroken["prior"]["holds_classes"]) == (False, False)


def test_two_processes_are_one(folder: Path, unbroken: dict[str, Any]) -> None:
    two = results_of_two("decoupled_uniformity", [*VAE, "of-2"], folder)
    for part in ("vae", "train"):
        for a, b in zip(records(folder / "whole", part), records(folder / "of-2", part), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert two["random_features"] == unbroken["random_features"]
    assert two["prior"]["smoother"]["diagonal"] == pytest.approx(unbroken["prior"]["smoother"]["diagonal"], rel=1e-3)


def test_the_loss_is_the_librarys_of_each_images_views_and_prior(folder: Path) -> None:
    config = small(folder, views=3, prior="labels", normalised=False)
    sets = load_sets(config)
    network = make_network(config, sets)
    kinds = [type(part).__name__ for part in network.projection]  # type: ignore[union-attr]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    parts: Any = make_network(small(folder, norm="batch"), sets).projection
    assert [type(part).__name__ for part in parts][1::3] == ["BatchNorm1d", "BatchNorm1d"]
    images: Any = sets.train
    known = np.random.default_rng(0).normal(size=(len(sets.train.label), 3)).astype(np.float32)
    batches = Batches(ViewBatches(images, altered(config), 32, 0, ALONE, CPU, 3), known)
    prior, *views = batches(0)
    loss = DecoupledUniformity(kernel="rbf")
    rows = batches.views.rows(0).numpy()
    assert prior is not None
    np.testing.assert_array_equal(prior, known[rows])
    embedded = torch.stack([network(view)[1] for view in views], 1)
    wanted = loss(embedded, torch.from_numpy(known[rows]))
    assert Uniform(network, loss)(*batches(0)).item() == pytest.approx(wanted.item(), abs=1e-6)
    feature, projected = network(views[0])
    own = representation(network, feature.detach().numpy())
    torch.testing.assert_close(network.projection[1:](torch.from_numpy(own)), projected)  # type: ignore[index]
    pair = tuple(kept(Augmented(sets.held_out, altered(config), 0, view), CPU) for view in (0, 1))
    first, second = (nn.functional.normalize(network(view.pixels / 255.0)[1], dim=1) for view in pair)
    told = watched(network, pair, CPU)
    middle = (first + second).detach() / 2
    apart = torch.pdist(middle).square()
    assert told["uniformity"] == pytest.approx(float((-2 * apart).exp().mean().log()), abs=1e-5)
    assert told["alignment"] == pytest.approx(-float(middle.square().sum(1).mean()), abs=1e-5)


def test_lars_steps_by_the_length_of_a_layer(generator: torch.Generator) -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    nn.init.zeros_(module[1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(module[0].bias)  # type: ignore[arg-type]
    config = UniformityConfig(optimizer="lars", lr=0.7, momentum=0.9, weight_decay=0.05)
    optimizer = make_optimizer(module, config)
    wanted = [p.detach().clone() for p in module.parameters()]
    moved = [torch.zeros_like(p) for p in wanted]
    for step in range(3):
        grads = [torch.randn(p.shape, generator=generator) for p in wanted]
        if step == 1:
            grads[0] = torch.zeros_like(grads[0])  # a ratio of nothing by nothing
        for p, grad in zip(module.parameters(), grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        for w, grad, m in zip(wanted, grads, moved, strict=True):
            if w.ndim > 1:
                length, slope = w.norm(), grad.norm()
                ratio = 0.001 * length / (slope + 0.05 * length) if length > 0 and slope > 0 else 1.0
                grad = ratio * (grad + 0.05 * w)
            m.mul_(0.9).add_(grad)
            w.sub_(0.7 * m)
        for p, w in zip(module.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.detach(), w, atol=1e-5, rtol=1e-5)
    assert all(p.detach().abs().min() > 0 for p in (module[1].weight, module[0].bias)), "what began at 0 has moved"


def test_sgd_does_not_shrink_biases() -> None:
    module = nn.Linear(2, 2)
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)
    optimizer = make_optimizer(module, UniformityConfig(optimizer="sgd", lr=0.5, weight_decay=0.1, momentum=0.0))
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(module.weight, torch.tensor(0.95))
    assert torch.equal(module.bias, torch.ones(2))


def test_priors_by_name(folder: Path, tmp_path: Path) -> None:
    """A network's embedding is what `posthoc features` writes of it, each of the images that are trained on."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 64), ("t10k", 12)):
        raw = tmp_path / "data" / "FashionMNIST" / "raw"
        write_idx(raw, part, rng.integers(0, 256, (count, 16, 16), dtype=np.uint8), np.arange(count) % 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "w.safetensors")
    weights, file = tmp_path / "w.safetensors", tmp_path / "data" / "known.npz"
    FeatureFile("test_resnet", "fashion-mnist", file, data_dir=tmp_path / "data", checkpoint=weights).run()
    run: Any = SimpleNamespace(device=CPU)

    def opened(name: str, **more: Any) -> Any:
        config = small(tmp_path, prior=name, **more)
        sets = load_sets(config)
        return open_prior(config, run, sets), sets

    (of_file, sets), (of_network, _) = opened("known.npz"), opened("test_resnet", checkpoint=weights)
    assert len(sets.train.label) == 54
    with np.load(file) as stored:
        np.testing.assert_array_equal(of_file.make(), stored["prior"][:54])
    np.testing.assert_allclose(of_network.make(), of_file.make(), atol=1e-5)
    assert of_network.seen_labels is True, "of a classifier"
    assert of_file.seen_labels is True, "the file says so"
    assert of_file.told()["order_checked_by"] == "fingerprint"
    assert of_network.told()["network"]["embedding_dim"] == 96
    assert opened("test_resnet", random_weights=True)[0].seen_labels is False
    by_label, _ = opened("labels")
    np.testing.assert_array_equal(by_label.make(), np.eye(4)[sets.train.label])
    with pytest.raises(OptionError, match="fashion-mnist has none; omniglot, cub200 and utzappos have"):
        opened("attributes")
    with pytest.raises(OptionError, match=r"neither a file \.npz nor a known name; did you mean 'attributes'"):
        opened("atributes")
    with pytest.raises(
        DataError, match=r"there is no such file, nor .*; `posthoc features MODEL fashion-mnist --npz FILE` writes one"
    ):
        opened("other.npz")
    some = SimpleNamespace(**vars(sets))
    some.attributes = lambda: Attributes(np.arange(128.0).reshape(64, 2), ("a:x", "b:y"))
    found: Any = open_prior(small(tmp_path, prior="attributes:b"), run, some)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.make(), np.arange(128.0).reshape(64, 2)[:54, 1:])
    told = {"name": "attributes:b", "seen_labels": "annotations", "holds_classes": False, "groups": ["b"]}
    assert found.told() == told
    some.label = np.full((64, 2), np.nan)
    with pytest.raises(OptionError, match="labels of fashion-mnist are not known for every image"):
        open_prior(small(tmp_path, prior="labels"), run, some)  # type: ignore[arg-type]


def test_the_smoother_looks_at_as_many_images_as_the_loss() -> None:
    rows = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    loss = DecoupledUniformity(kernel="cosine", ridge=0.1)
    told = smoother(rows, loss, 40)
    assert told["images"] == 40
    assert "by_sigma" not in told
    some = torch.from_numpy(rows[np.linspace(0, 499, 40).astype(int)])
    assert told["diagonal"] == pytest.approx(loss.mean_diagonal(some), abs=1e-6)
    classes = np.eye(10, dtype=np.float32)[np.arange(500) % 10]
    told = smoother(classes, DecoupledUniformity(kernel="rbf"), 64)
    assert told["of"] == "rbf"
    assert told["median_distance"] == pytest.approx(2**0.5)
    assert 1 / 64 < told["diagonal"] < 0.5, "images of a class are averaged"
    by_width = [one["diagonal"] for one in told["by_sigma"]]
    assert by_width == sorted(by_width, reverse=True)
    images = Images(torch.zeros(64, 1, 8, 8, dtype=torch.uint8), np.zeros(64))
    views = ViewBatches(images, altered(UniformityConfig()), 64, 0, Launch(0, 2), CPU)
    prior = Prior("classes", classes, True, lambda: classes, holds_classes=True)
    for gather, count in ((True, 64), (False, 32)):
        config = UniformityConfig(prior="labels", gather=gather)
        assert loss_of(config).gather is gather
        assert made(prior, loss_of(config), views.rows)[1]["smoother"]["images"] == count  # type: ignore[index]


def test_the_autoencoders_loss_is_its_elbo(generator: torch.Generator) -> None:
    model = ConvVAE(3, 5, width=8)
    images, noise = torch.rand(4, 3, 32, 32, generator=generator), torch.randn(4, 5, generator=generator)
    mean, log_variance = model.code(images)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    rest = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(
        divergence(mean, log_variance), torch.distributions.kl_divergence(posterior, rest), atol=1e-6, rtol=1e-5
    )
    decoded = model.decoder(mean + posterior.stddev * noise)
    fit = torch.distributions.Normal(decoded, model.log_sigma.exp()).log_prob(images).sum((1, 2, 3))
    elbo = fit - torch.distributions.kl_divergence(posterior, rest).sum(1)
    torch.testing.assert_close(model(images, noise), -elbo.mean() / images[0].numel())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sigma 3", r"--sigma 3\.0 was given; it is read with a --prior"),
        ("--kernel cosine", "--kernel cosine was given; it is read with a --prior"),
        ("--kernel rbf", "--kernel rbf was given; it is read with a --prior"),
        ("--ridge 1", r"--ridge 1\.0 was given; it is read with a --prior"),
        ("--prior vae --kernel cosine --sigma 2", r"--sigma 2\.0 was given; it is read with --kernel rbf"),
        ("--vae-dim 4", "--vae-dim 4 was given; it is read with --prior vae"),
        ("--prior labels --vae-epochs 3", "--vae-epochs 3 was given; it is read with --prior vae"),
        (
            "--prior vae --checkpoint w.pth",
            r"--checkpoint w\.pth was given; it is read with a --prior that is a network",
        ),
        ("--prior known.npz --random-weights", "--random-weights True was given; it is read with a --prior that is a"),
        (
            "--prior attributes:shape --cache-dir a",
            "--cache-dir a was given; it is read with a --prior that is a network",
        ),
        ("--size 64", "--size 64 was given; it is read with --dataset imagenet100, cub200, utzappos, chexpert"),
        ("--preset omniglot --size 64", "--size 64 was given; it is read with --dataset imagenet100"),
        ("--momentum 0.5", r"--momentum 0\.5 was given; it is read with --optimizer sgd or lars"),
        ("--preset chexpert --papers-probe", "--papers-probe True was given; .* chexpert has several labels"),
        ("--prior vae --ridge 0", r"ridge=0\.0 was given; use a positive number, or None"),
        ("--t 0", r"t=0\.0 was given"),
        ("--momentum 1", r"--momentum 1\.0 was given"),
        ("--final-lr 1", r"--final-lr 1\.0 was given; expected a number from 0 to --lr 0\.002"),
        ("--views 0", "--views 0 was given"),
        ("--jitter 2", r"brightness=2\.0"),
    ],
)
def test_what_cannot_work_is_said_at_once(words: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse("decoupled_uniformity", UniformityConfig, PRESETS, None, words.split())


@pytest.mark.parametrize("words", ["--preset paper --optimizer adamw", "--preset paper-cub200 --kernel cosine"])
def test_what_a_papers_preset_sets_is_no_mistake(words: str) -> None:
    parse("decoupled_uniformity", UniformityConfig, PRESETS, None, words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ridge nan", r"ridge=nan"),
        ("--sigma nan", "--sigma nan was given"),
        ("--t nan", "t=nan was given"),
        ("--weight-decay -1", r"--weight-decay -1\.0 was given; expected 0 or more"),
        ("--final-lr nan", "--final-lr nan was given"),
        ("--optimizer sgd --momentum nan", "--momentum nan was given"),
        ("--rotation nan", "rotation=nan"),
        ("--jitter nan", "brightness=nan"),
        ("--smallest-crop nan", "scale=nan"),
        ("--blur -1", r"blur=-1\.0"),
    ],
)
def test_numbers_out_of_range_are_refused(words: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse("decoupled_uniformity", UniformityConfig, PRESETS, None, ["--prior", "vae", *words.split()])


def test_imagenet100s_probe_on_plain_images_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """spec/decoupled_uniformity.md section 4: its code trains that probe on views, and all others on plain images."""
    rng = np.random.default_rng(0)
    feature, label = rng.normal(size=(40, 6)).astype(np.float32), np.arange(40) % 4
    parts: Any = SimpleNamespace(feature=feature, projection=feature, label=label)
    network: Any = SimpleNamespace(projection=nn.Sequential(nn.Linear(6, 5)))
    scores = rng.normal(size=(40, 4))
    for name in ("sgd_probe", "decoupled_uniformity_probe"):
        monkeypatch.setattr(decoupled_uniformity_evaluation, name, lambda *_: scores)
    share = (scores.argmax(1) == label).mean()
    for dataset, key, other in (
        ("imagenet100", "papers_protocol_unaugmented", "papers_protocol"),
        ("cub200", "papers_protocol", "papers_protocol_unaugmented"),
    ):
        found = class_worth(network, parts, parts, dataset, 0, True)
        assert found[key] == share
        assert other not in found


def test_the_benchmark_asks_for_the_priors_that_a_set_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(path))
    benchmark, asked = runpy.run_path(str(path / "decoupled_uniformity.py")), []

    def carried_out(recipe: str, words: list[str], folder: Path, threads: int | None) -> dict[str, Any]:
        config = parse(recipe, UniformityConfig, PRESETS, None, words)
        asked.append(config.prior)
        worth = {"mean_auc": 0.75, "auc": {"Edema": 0.75}}
        told = {"seen_labels": False, "holds_classes": False, "smoother": {"diagonal": 0.5}}
        prior = None if config.prior is None else told
        return {"prior": prior, "worth": worth, "random_features": worth, "made": {"seconds": 60.0}}

    benchmark["main"].__globals__["carried_out"] = carried_out
    known = {
        "chexpert": [None, "vae", "tf_efficientnet_lite0"],
        "cifar10": [None, "vae", "tf_efficientnet_lite0", "labels"],
        "omniglot": [None, "vae", "tf_efficientnet_lite0", "attributes", "labels"],
    }
    for dataset, priors in known.items():
        asked.clear()
        line = ["benchmark", "--data", "data", "--dataset", dataset, "--seeds", "0", "--output", str(tmp_path)]
        monkeypatch.setattr("sys.argv", line)
        (tmp_path / dataset).mkdir()
        benchmark["main"]()
        assert asked == priors
        assert "| random features | not seen | - | 75.0 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*line, "--dataset", "chexpert", "--only", "labels"])
    with pytest.raises(SystemExit):
        benchmark["main"]()
    assert "chexpert has the priors no kernel, VAE, EfficientNet-Lite0" in capsys.readouterr().err


def test_a_kernel_stands_where_there_is_a_prior() -> None:
    assert loss_of(UniformityConfig()).kernel is None
    assert loss_of(UniformityConfig(prior="labels")).kernel == "rbf"
    assert loss_of(UniformityConfig(prior="labels", kernel="cosine")).kernel == "cosine"
    for preset in ("chexpert", "paper-chexpert"):
        parse("decoupled_uniformity", UniformityConfig, PRESETS, None, ["--preset", "paper", preset])


def test_random_features_have_batchnorms_statistics_and_probes_the_runs_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(folder, norm="batch", papers_probe=True)
    sets, run = load_sets(config), SimpleNamespace(device=torch.device("cpu", 0))
    placed: list[Any] = []

    def fitted(*arguments: Any, **more: Any) -> Any:
        placed.append(more["device"])
        return linear_probe(*arguments, **more)

    def papers(
        feature: Any, label: np.ndarray, test: np.ndarray, generator: torch.Generator, device: Any
    ) -> np.ndarray:
        placed.append(device)
        return np.zeros((len(test), 10))

    monkeypatch.setattr(decoupled_uniformity_evaluation, "linear_probe", fitted)
    monkeypatch.setattr(decoupled_uniformity_evaluation, "decoupled_uniformity_probe", papers)
    found = evaluate(config, run, sets, make_network(config, sets))  # type: ignore[arg-type]
    assert placed == [run.device] * 6
    blank = make_network(config, sets)
    settle(blank, sets.train, CPU)
    train, test = (encode(blank, images, CPU) for images in (sets.train, sets.test))
    assert found["random_features"] == class_worth(blank, train, test, config.dataset, 0, True, run.device)
    assert found["random_features"] != found["worth"], "a network whose statistics nothing has set"


def test_the_autoencoder_learns_what_images_look_like(folder: Path, tmp_path: Path) -> None:
    config = small(folder, batch_size=64, train_images=700, output=tmp_path / "out")
    sets, run = load_sets(config), Run("decoupled_uniformity", config)
    pixels, others = (shrunk(images, CPU) for images in (sets.train, sets.held_out))
    _, last = train_vae(run, pixels, others, 64, 6, 8)
    errors = [record["held_out_error"] for record in records(tmp_path / "out", "vae")]
    middle = pixels.float().mean(0)
    blind = float((others.float() - middle).square().mean().sqrt()) / 255
    assert errors == sorted(errors, reverse=True)
    assert last["held_out_error"] == errors[-1] < 0.85 * blind, "better than the mean of all images"
    assert last["dimensions_used"] > 1


def test_a_prior_must_tell_images_apart(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    check_apart(rows, "scalars")
    for wrong, cosine in (
        (np.full((50, 3), 7.0, np.float32), False),
        (np.zeros((50, 3), np.float32), True),
        (np.zeros((50, 0), np.float32), False),
        (np.abs(rows), True),  # all in one direction
    ):
        with pytest.raises(DataError, match=r"--prior known: its rows \[50, \d\] tell no two images apart"):
            check_apart(wrong, "known", cosine)
    prior = Prior("known", "known", False, lambda: np.ones((54, 2), np.float32))
    monkeypatch.setattr(decoupled_uniformity, "open_prior", lambda *_: prior)
    with pytest.raises(DataError, match="tell no two images apart"):
        decoupled_uniformity.run(small(folder, output=tmp_path / "out", prior="vae"))
    config, model = small(folder, output=tmp_path / "vae", prior="vae"), SimpleNamespace(eval=lambda: None)
    collapsed = (model, {"dimensions_used": 0.0})
    monkeypatch.setattr(decoupled_uniformity_priors, "train_vae", lambda *_: collapsed)
    found = open_prior(config, SimpleNamespace(device=CPU), load_sets(config))  # type: ignore[arg-type]
    assert found is not None
    with pytest.raises(DataError, match="no dimension of the codes says anything of an image: give more --vae-epochs"):
        found.make()


def test_held_out_views_are_kept_small(generator: torch.Generator) -> None:
    pixels = torch.randint(0, 256, (6, 3, 10, 12), generator=generator, dtype=torch.uint8)
    view = Augmented(Images(pixels, np.arange(6)), altered(UniformityConfig()), 3, 1)
    found = kept(view, CPU)
    assert (found.pixels.dtype, found.size) == (torch.uint8, (3, 10, 12))
    wanted = torch.cat(list(view.chunks(CPU)))
    torch.testing.assert_close(torch.cat(list(found.chunks(CPU))), wanted, atol=0.5 / 255 + 1e-6, rtol=0)
    large = Images(torch.zeros(9, 1, 1024, 1024, dtype=torch.uint8), np.arange(9))
    assert [len(chunk) for chunk in large.chunks(CPU)] == [4, 4, 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prior", "vae", "--network", "resnet_18"], "resnet_18"),
        (["--prior", "vae", "--batch-size", "50"], "multiple of 32"),
        (["--lr", "1e-9", "--check"], r"linear evaluation is .* beside that of random features; expected \+0\.010"),
    ],
)
def test_what_a_run_cannot_do(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(SystemExit):
        results("decoupled_uniformity", [*SHORT, *words, "--output", str(output)], folder)
    assert re.search(said, capsys.readouterr().err)
    assert not list(output.glob("vae/*")), "nothing was trained before"
    assert (output / "config.json").exists() == (output / "results.json").exists() == ("--check" in words)


def test_a_run_goes_on_with_the_same_prior_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = load_sets(small(folder))
    rows = np.random.default_rng(0).normal(size=(len(sets.source), 3))
    words = [*SHORT, "--prior", "mine.npz", "--papers-probe", "--output", "own"]
    words[words.index("--epochs") + 1] = "1"
    write_prior(folder / "data" / "mine.npz", rows, sets)
    found = results("decoupled_uniformity", words, folder)
    assert found["prior"]["seen_labels"] is None
    assert found["prior"]["order_checked_by"] == "fingerprint"
    told = {**found, "prior": {**found["prior"], "order_checked_by": "labels"}}
    assert "checked by its labels alone" in table(told)
    assert "checked by its labels alone" not in table(found)
    assert set(found["worth"]) == {
        "linear", "top_5", "linear_representation", "nearest_feature", "nearest_projection", "papers_protocol",
    }  # fmt: skip
    (folder / "own" / "results.json").unlink()
    write_prior(folder / "data" / "mine.npz", rows + 1.0, sets, seen_labels=True)
    with pytest.raises(SystemExit):
        results("decoupled_uniformity", [*words, "--resume"], folder)
    assert "was made from other data or weights" in capsys.readouterr().err
