"""Publishing with the real client: what is sent, what the hub then holds, and what a second push changes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import posthoc
from posthoc.adapters.card_sections import SECTION

from .steps import STEPS, images, network

pytestmark = pytest.mark.filterwarnings("ignore:the backbone's accuracy")
FILES = {"adapter.safetensors", "adapter_config.json", "README.md"}


def fitted(seed: int, cache_dir: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(80, 3, 6, 6, generator=generator), np.arange(80) % 4
    return posthoc.wrap(network(), ["kappa", "loss"]).fit(data, epochs=1, batch_size=16, seed=seed, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Any]:
    cache = tmp_path_factory.mktemp("features")
    return [fitted(0, cache), fitted(1, cache)]  # the second network never sees an image: its features are stored


def expected(model: Any) -> dict[str, list[float]]:
    prediction = model(images())
    return {name: prediction[name].uncertainty.tolist() for name in model.heads}


def run(child: Any, *steps: list[Any], **environment: str | None) -> list[dict[str, Any]]:
    """Steps in one process: ["push", folder, id, options], ["load", id, revision], ["search", options]."""
    return child(STEPS, [json.dumps(steps, default=str)], **environment)


def contents(hub_server: Any, repo_id: str = "org/tiny", revision: str = "main") -> dict[str, bytes]:
    """What a revision holds, but for the file that a new repository comes with."""
    commit = hub_server.store.repositories["model", repo_id].find(revision)
    return {name: hub_server.store.read(commit, name) for name in commit.files if name != ".gitattributes"}


def header(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_an_adapter_travels_and_gives_the_same_scores(hub_server, child, models, tmp_path):
    folder = models[0].save_pretrained(tmp_path / "adapter")
    (folder / "notes.txt").write_text("not of the adapter")
    pushed, back = run(child, ["push", folder, "org/tiny", {"license": "mit"}], ["load", "org/tiny", None])
    assert re.fullmatch(rf"{hub_server.url}/org/tiny/commit/[0-9a-f]{{40}}", pushed["answer"])
    found = contents(hub_server)
    assert set(found) == FILES
    assert found["adapter.safetensors"] == (folder / "adapter.safetensors").read_bytes()
    assert back["answer"].pop("from") == {
        "address": "org/tiny",
        "revision": None,
        "commit": pushed["answer"].rpartition("/")[2],
        "weights": json.loads(found["adapter_config.json"])["weights"]["sha256"],
    }
    assert back == {"answer": expected(models[0]), "warnings": []}
    assert not any("resolve" in one.path and "README" in one.path for one in hub_server.log)  # two files are enough
    facts = header(found["README.md"])
    assert facts["license"] == "mit"
    assert facts["library_name"] == "posthoc"
    assert {"posthoc", "kappa", "loss", "aleatoric", "decision"} <= set(facts["tags"])
    assert 'posthoc.load("org/tiny", backbone=your_model)' in found["README.md"].decode()


def test_a_second_push_makes_no_new_blob_and_another_adapter_one_commit(hub_server, child, models, tmp_path):
    first, second = (one.save_pretrained(tmp_path / str(k)) for k, one in enumerate(models))
    once = ["push", first, "org/tiny", {}]
    one, again = run(child, once, once)
    assert one["answer"] == again["answer"]  # nothing changed: no new commit
    assert len(hub_server.store.stored) == 1 + len(FILES)  # .gitattributes
    other, old, new = run(
        child,
        ["push", second, "org/tiny", {"commit_message": "better"}],
        ["load", "org/tiny", one["answer"].rpartition("/")[2]],
        ["load", "org/tiny", "main"],
    )
    repository = hub_server.store.repositories["model", "org/tiny"]
    newest = repository.find("main")
    assert other["answer"].endswith(newest.oid)
    assert newest.title == "better"
    assert len(repository.history(newest)) == 3  # the hub's own, and one for each push
    for answer, model in ((old, models[0]), (new, models[1])):
        answer["answer"].pop("from")
        assert answer["answer"] == expected(model)


def test_branches_tags_and_pull_requests(hub_server, child, models, tmp_path):
    first, second = (one.save_pretrained(tmp_path / str(k)) for k, one in enumerate(models))
    *_, branch, tagged, asked = run(
        child,
        ["push", first, "org/tiny", {}],
        ["tag", "org/tiny", "v1.0"],
        ["push", second, "org/tiny", {"revision": "next"}],
        ["load", "org/tiny", "next"],
        ["load", "org/tiny", "v1.0"],
        ["push", second, "org/tiny", {"create_pr": True}],
    )
    assert branch["answer"].pop("from")["revision"] == "next"
    assert tagged["answer"].pop("from")["revision"] == "v1.0"
    assert branch["answer"] == expected(models[1])
    assert tagged["answer"] == expected(models[0])
    assert asked["answer"] == f"{hub_server.url}/org/tiny/discussions/1"
    assert contents(hub_server)["adapter.safetensors"] == (first / "adapter.safetensors").read_bytes()
    pull = contents(hub_server, revision="refs/pr/1")
    assert pull["adapter.safetensors"] == (second / "adapter.safetensors").read_bytes()


def test_what_a_user_edits_in_the_card_stays(hub_server, child, models, tmp_path):
    folder = models[0].save_pretrained(tmp_path / "adapter")
    run(child, ["push", folder, "org/tiny", {}])
    # on the hub: a paragraph, a section's text, a section taken out, a tag, a field, a licence, a figure of somebody's own
    card = contents(hub_server)["README.md"].decode()
    edited = card.replace("# Uncertainty for Sequential", "# Uncertainty for Sequential\n\nAsk Ada first.")
    edited = edited.replace("## Limits\n", "## Limits\n\n- Not for night photos.\n")
    edited = re.sub(r"<!-- posthoc:fitted .*?<!-- /posthoc:fitted -->\n", "", edited, flags=re.S)
    edited = edited.replace("tags:\n", "license: apache-2.0\nlanguage: la\ntags:\n- night\n", 1)
    repository = hub_server.store.repositories["model", "org/tiny"]
    parent = repository.find("main")
    entry = hub_server.store.keep_regular(edited.encode())
    hub_server.store.commit(repository, parent, {**parent.files, "README.md": entry}, "by hand")
    models[1].save_pretrained(folder)
    (pushed,) = run(child, ["push", folder, "org/tiny", {}])
    assert any("limits" in one and "changed by hand" in one for one in pushed["warnings"])
    after = contents(hub_server)["README.md"].decode()
    assert "Ask Ada first." in after
    assert "- Not for night photos." in after
    assert [one["name"] for one in SECTION.finditer(after)] == ["about", "use", "measured", "backbone", "limits"]
    facts = header(after.encode())
    assert facts["license"] == "apache-2.0"
    assert facts["language"] == "la"
    assert {"night", "posthoc", "kappa"} <= set(facts["tags"])
    median = json.loads(contents(hub_server)["adapter_config.json"])["heads"][0]["held_out"]["median"]
    assert f"{median:.4g}" in after  # what was not edited is of the new adapter
    # here: the folder's card is the pushed one, and an edit of it goes along
    own = (folder / "README.md").read_text()
    assert own == after
    (folder / "README.md").write_text(own.replace("Ask Ada first.", "Ask Grace first."))
    run(child, ["push", folder, "org/tiny", {}])
    assert "Ask Grace first." in contents(hub_server)["README.md"].decode()
    # in both: the hub's stays, and it is said
    parent = repository.find("main")
    there = hub_server.store.read(parent, "README.md").decode().replace("Ask Grace", "Ask Emmy")
    entry = hub_server.store.keep_regular(there.encode())
    hub_server.store.commit(repository, parent, {**parent.files, "README.md": entry}, "by hand")
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("Ask Grace", "Ask Sofia"))
    (pushed,) = run(child, ["push", folder, "org/tiny", {}])
    assert any("edited both here and on the hub" in one for one in pushed["warnings"])
    assert "Ask Emmy first." in contents(hub_server)["README.md"].decode()


def test_edits_outlive_a_save_a_branch_and_a_pull_request(hub_server, child, models, tmp_path):
    folder = models[0].save_pretrained(tmp_path / "adapter")
    run(child, ["push", folder, "org/tiny", {}])

    def edit(text):
        card = folder / "README.md"
        card.write_text(card.read_text().replace("# Uncertainty for", f"{text}\n\n# Uncertainty for"))

    edit("Said before a save.")
    models[1].save_pretrained(folder)  # fitted again, and saved over it
    run(child, ["push", folder, "org/tiny", {}])
    assert b"Said before a save." in contents(hub_server)["README.md"]
    edit("Said on a branch.")
    run(child, ["push", folder, "org/tiny", {"revision": "feature/x"}], ["push", folder, "org/tiny", {}])
    assert b"Said on a branch." in contents(hub_server)["README.md"]
    edit("Said in a request.")
    run(child, ["push", folder, "org/tiny", {"create_pr": True}], ["push", folder, "org/tiny", {}])
    for text in (b"Said before a save.", b"Said on a branch.", b"Said in a request."):
        assert text in contents(hub_server)["README.md"]
        assert text in (folder / "README.md").read_bytes()


def test_what_is_not_ours_is_left_alone(hub_server, child, models, tmp_path):
    mine = {"evaluation/mine.md": b"x", "evaluation/plots/roc.png": b"y", "evaluation/roc.png": b"z"}
    hub_server.store.add("org/tiny", mine)
    folder = models[0].save_pretrained(tmp_path / "adapter")
    _, pulled = run(child, ["push", folder, "org/tiny", {}], ["pull", "org/tiny", None])
    assert set(contents(hub_server)) == FILES | set(mine)
    card = (Path(pulled["answer"]) / "README.md").read_bytes()
    (again,) = run(child, ["push", pulled["answer"], "other/copy", {}])  # the hub's cache stays as it was downloaded
    assert "error" not in again["answer"]
    assert (Path(pulled["answer"]) / "README.md").read_bytes() == card
    assert b'posthoc.load("other/copy"' in contents(hub_server, "other/copy")["README.md"]


def test_what_the_hub_refuses_is_said(hub_server, child, models, tmp_path):
    folder = models[0].save_pretrained(tmp_path / "adapter")
    hub_server.store.create("model", "org/public")
    (private,) = run(child, ["push", folder, "org/public", {"private": True}])
    assert "is public: nothing was pushed" in private["answer"]["error"]
    hub_server.answer(400, where="validate-yaml")
    (refused,) = run(child, ["push", folder, "org/tiny", {}])
    assert "cannot push to 'org/tiny'" in refused["answer"]["error"]
    assert "reached" not in refused["answer"]["error"]
    (named,) = run(child, ["push", folder, "solo", {}])
    assert named["answer"].startswith(f"{hub_server.url}/owner/solo/commit/")


def test_private_repositories_and_tokens(hub_server, child, models, tmp_path):
    folder = models[0].save_pretrained(tmp_path / "adapter")
    run(child, ["push", folder, "org/secret", {"private": True}])
    assert hub_server.store.repositories["model", "org/secret"].private
    for token in (None, "hf_stranger"):
        got, pushed = run(
            child,
            ["load", "org/secret", None],
            ["push", folder, "org/secret", {}],
            HF_TOKEN=token,
            HF_HOME=tmp_path / str(token),
        )
        assert "hf auth login" in got["answer"]["error"]
        assert "hf auth login" in pushed["answer"]["error"]
    written = [p for p in tmp_path.rglob("*") if p.is_file() and b"hf_owner" in p.read_bytes()]
    assert written == []  # nothing of ours keeps a token
    assert not any(one.token for one in hub_server.log if one.path.startswith("/storage"))


def test_a_push_that_dies_leaves_nothing_half_and_the_next_completes(hub_server, child, models, tmp_path):
    first, second = (one.save_pretrained(tmp_path / str(k)) for k, one in enumerate(models))
    run(child, ["push", first, "org/tiny", {}])
    before = contents(hub_server)
    hub_server.drop_upload(1000, times=None)
    (broken,) = run(child, ["push", second, "org/tiny", {}], HF_HUB_ETAG_TIMEOUT="2")
    assert "cannot push" in broken["answer"]["error"]
    hub_server.calm()
    assert contents(hub_server) == before
    assert run(child, ["load", "org/tiny", None])[0]["answer"]["kappa"] == expected(models[0])["kappa"]
    pushed, back = run(child, ["push", second, "org/tiny", {}], ["load", "org/tiny", None])
    assert "error" not in pushed["answer"]
    assert back["answer"]["kappa"] == expected(models[1])["kappa"]


def test_a_download_that_dies_is_never_loaded_and_the_next_completes(hub_server, child, models, tmp_path):
    folder = models[0].save_pretrained(tmp_path / "adapter")
    run(child, ["push", folder, "org/tiny", {}])
    hub_server.drop_download(1000, times=None, hard=True)
    (broken,) = run(child, ["load", "org/tiny", None], HF_HOME=tmp_path / "other")
    assert "cannot be reached" in broken["answer"]["error"]
    hub_server.calm()
    (back,) = run(child, ["load", "org/tiny", None], HF_HOME=tmp_path / "other")
    assert back["answer"]["kappa"] == expected(models[0])["kappa"]
    offline, unknown = run(
        child, ["load", "org/tiny", None], ["load", "org/other", None], HF_HOME=tmp_path / "other", HF_HUB_OFFLINE="1"
    )
    assert offline["answer"]["kappa"] == expected(models[0])["kappa"]
    commit = hub_server.store.repositories["model", "org/tiny"].find("main").oid
    assert any("cannot be reached" in one and commit in one for one in offline["warnings"])
    assert "cannot be reached" in unknown["answer"]["error"]


def test_two_pushes_at_once_are_two_commits_and_one_adapter(hub_server, child, models, tmp_path):
    folders = [one.save_pretrained(tmp_path / str(k)) for k, one in enumerate(models)]
    hub_server.slow(0.3, where="POST .*/preupload/")
    running = [child.start(STEPS, [json.dumps([["push", str(folder), "org/tiny", {}]])]) for folder in folders]
    for process in running:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert "error" not in json.loads(out.splitlines()[-1])[0]["answer"]
    repository = hub_server.store.repositories["model", "org/tiny"]
    assert len(repository.history(repository.find("main"))) == 3
    found = contents(hub_server)
    assert found["adapter.safetensors"] in [(folder / "adapter.safetensors").read_bytes() for folder in folders]
    (back,) = run(child, ["load", "org/tiny", None])
    assert back["answer"]["kappa"] in [expected(model)["kappa"] for model in models]


def test_adapters_are_found_by_their_tags(hub_server, child, models, tmp_path):
    folder = models[0].save_pretrained(tmp_path / "adapter")
    run(child, ["push", folder, "org/tiny", {}], ["push", folder, "other/tiny-too", {}])
    hub_server.store.create("model", "org/no-adapter")
    every, by_head, by_author, none, of_backbone, wrong = run(
        child,
        ["search", {}],
        ["search", {"head": "kappa", "query": "too"}],
        ["search", {"author": "org"}],
        ["search", {"head": "laplace"}],
        ["search", {"backbone": "resnet50.a1_in1k"}],
        ["search", {"head": "kapa"}],
    )
    assert {one["repo_id"] for one in every["answer"]} == {"org/tiny", "other/tiny-too"}
    assert [one["repo_id"] for one in by_head["answer"]] == ["other/tiny-too"]
    assert by_head["answer"][0]["heads"] == ["kappa", "loss"]
    assert [one["repo_id"] for one in by_author["answer"]] == ["org/tiny"]
    assert none["answer"] == of_backbone["answer"] == []
    assert "did you mean 'kappa'" in wrong["answer"]["error"]


def test_nothing_broken_and_no_evaluation_of_another_adapter_is_published(hub_server, child, models, tmp_path):
    folder = models[0].save_pretrained(tmp_path / "adapter")
    weights = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(weights[:-1] + b"x")
    (damaged,) = run(child, ["push", folder, "org/tiny", {}])
    assert "was changed after it was written" in damaged["answer"]["error"]
    (folder / "adapter.safetensors").write_bytes(weights)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.json").write_text(json.dumps(evaluation("0" * 64)))
    other, commit, bad = run(
        child,
        ["push", folder, "org/tiny", {}],
        ["push", folder, "org/tiny", {"revision": "a" * 40}],
        ["push", folder, "no id", {}],
    )
    assert "is not of this adapter" in other["answer"]["error"]
    assert "error" in commit["answer"]
    assert "error" in bad["answer"]
    assert hub_server.store.repositories == {}  # found out before anything was made there


def test_figures_go_into_card_and_metadata_and_old_ones_leave(hub_server, child, models, tmp_path):
    folder = models[0].save_pretrained(tmp_path / "adapter")
    place = folder / "evaluation"
    place.mkdir()
    digest = json.loads((folder / "adapter_config.json").read_text())["weights"]["sha256"]
    (place / "results.json").write_text(json.dumps(evaluation(digest)))
    (place / "risk_coverage.png").write_bytes(b"\x89PNG not a real one")
    (place / "index.html").write_text("<img>")
    (place / "photo.jpg").write_bytes(b"somebody")
    run(child, ["push", folder, "org/tiny", {}])
    found = contents(hub_server)
    assert set(found) == FILES | {"evaluation/results.json", "evaluation/risk_coverage.png"}
    assert b"/home/ada" not in found["evaluation/results.json"]
    assert json.loads(found["evaluation/results.json"])["made"]["command"] == ["posthoc", "secret"]
    card = found["README.md"].decode()
    assert "![risk coverage](evaluation/risk_coverage.png)" in card
    assert "0.812 [0.800, 0.825]" in card
    assert "<script" not in card
    (result,) = header(found["README.md"])["model-index"][0]["results"]
    assert result["dataset"]["name"] == "photos against textures"
    metric, other = result["metrics"]
    assert (metric["type"], other["type"], metric["value"]) == ("auroc", "fpr95", 0.812)
    assert (metric["args"]["low"], metric["args"]["high"]) == (0.8, 0.825)
    assert "kappa" in metric["name"]
    # another adapter without an evaluation: no figure of the old one stays
    other = models[1].save_pretrained(tmp_path / "other")
    run(child, ["push", other, "org/tiny", {}])
    found = contents(hub_server)
    assert set(found) == FILES
    assert "0.812" not in found["README.md"].decode()
    assert "model-index" not in header(found["README.md"])


def evaluation(adapter: str) -> dict[str, Any]:
    """A report's results.json, as docs/report.md describes it."""
    figure = {"value": 0.812, "low": 0.8, "high": 0.825}
    rows = {name: {"auroc": figure, "fpr95": figure} for name in ("kappa", "entropy")}
    table = {"source": "", "title": "textures <script>", "set": "textures", "notes": [], "scores": rows}
    return {
        "kind": "posthoc report",
        "schema_version": 1,
        "made": {
            "date": "2026-11-25T00:00:00+00:00",
            "versions": {},
            "command": ["posthoc", "/home/ada/secret"],
            "adapter": adapter,
        },
        "seed": 0,
        "resamples": 100,
        "sets": [{"name": "photos", "role": "id", "rows": 10}, {"name": "textures", "role": "ood", "rows": 10}],
        "tables": [table],
        "figures": {},
    }
