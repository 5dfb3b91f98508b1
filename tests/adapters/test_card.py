"""The card: what it says, and what of a user's edits outlives the next save."""

from __future__ import annotations

import re

import pytest
import yaml

from posthoc.adapters.card import MEASURES, Evaluation, Measured, render_card
from posthoc.adapters.card_sections import LINEAGE, SECTION, descends, holds_edits, merge, metadata, seal
from posthoc.adapters.config import AdapterConfig, BackboneConfig, HeadConfig, WeightsConfig
from posthoc.adapters.errors import AdapterError
from posthoc.adapters.heads import HEADS


def config(name: str = "resnet50.a1_in1k", heads: tuple[str, ...] = ("kappa",), **backbone) -> AdapterConfig:
    described = {"source": "timm", "weights": "pretrained", "num_classes": 1000} | backbone
    return AdapterConfig(
        backbone=BackboneConfig(
            name=name, fingerprints={"embedding": "a" * 64}, embedding_dim=2048, penultimate_dim=2048, **described
        ),
        heads=[HeadConfig(h, "aleatoric", "embedding", 0, {}, {"rows": 1234, "median": 0.5}) for h in heads],
        weights=WeightsConfig(10, "b" * 64),
        preprocessing={},
        data={"name": "photos <b>", "rows": 10, "fingerprint": "c" * 64},
        fit={"seed": 0, "command": "posthoc fit resnet50.a1_in1k photos"},
        versions={"posthoc": "0.1.0"},
    )


def test_every_head_has_words_for_what_it_measures():
    assert set(MEASURES) == set(HEADS)


def test_the_block_on_top_is_what_the_hub_reads():
    facts = metadata(render_card(config(heads=("kappa", "loss")), license="mit"))
    assert facts["base_model"] == "timm/resnet50.a1_in1k"
    assert facts["base_model_relation"] == "adapter"
    assert facts["library_name"] == "posthoc"
    assert facts["pipeline_tag"] == "image-classification"
    assert facts["license"] == "mit"
    assert facts["tags"] == ["posthoc", "uncertainty", "kappa", "loss", "aleatoric"]
    own = metadata(render_card(config("Net", source="module", num_classes=0)))
    assert "base_model" not in own
    assert own["pipeline_tag"] == "image-feature-extraction"
    hub = metadata(render_card(config("hf-hub:org/net", source="hub")))
    assert hub["base_model"] == "org/net"


def test_the_card_tells_data_command_and_limits():
    card = render_card(config(), address="org/x")
    assert 'posthoc.load("org/x")' in card
    assert "1,234" in card
    assert '- name: "photos &lt;b&gt;"' in card
    assert '- command: "posthoc fit resnet50.a1_in1k photos"' in card
    assert "stated no licence" in card
    assert "stated no licence" not in render_card(config(), license="mit")
    assert MEASURES["kappa"][1] in card


def test_the_example_is_python_that_compiles():
    (code,) = re.findall(r"```python\n(.*?)```", render_card(config(), address="org/x"), re.S)
    compile(code, "card", "exec")


def test_the_example_asks_for_what_the_held_out_scores_can_promise():
    few = config()
    few.heads[0].held_out["rows"] = 11
    assert "threshold(coverage=0.91)" in render_card(few)
    assert "threshold(coverage=0.95)" in render_card(config())


def test_figures_are_in_the_tables_and_in_the_block():
    one = Measured("kappa", "Out-of-distribution detection", "a against b", "auroc", 0.91234567, 0.9, 0.92)
    card = render_card(config(), evaluation=Evaluation([one], "### a\n\n| x |", ["evaluation/ood.png"]))
    assert "![ood](evaluation/ood.png)" in card
    assert "### a" in card
    (result,) = metadata(card)["model-index"][0]["results"]
    (metric,) = result["metrics"]
    assert metric["value"] == 0.912346
    assert metric["args"] == {"head": "kappa", "low": 0.9, "high": 0.92, "confidence": 0.95, "posthoc": True}
    again = render_card(config(), previous=card)
    assert "model-index" not in metadata(again)  # a figure of what is no longer there


def test_saving_again_changes_nothing_and_renews_what_nobody_touched():
    card = render_card(config())
    assert not holds_edits(card, render_card(config()))
    assert render_card(config(), previous=card) == card
    other = render_card(config(heads=("loss",)), previous=card)
    assert LINEAGE.sub("", other) == LINEAGE.sub("", render_card(config(heads=("loss",))))
    assert "| loss |" in other
    assert "| kappa |" not in other


def test_edits_outside_inside_and_in_the_block_stay():
    card = render_card(config())
    edited = card.replace("<!-- posthoc:use", "My words.\n\n<!-- posthoc:use", 1)
    edited = edited.replace("## Backbone\n", "## Backbone\n\nA fine one.\n")
    edited = edited.replace("library_name: posthoc\n", "library_name: posthoc\nlicense: mit\nlanguage: [la, grc]\n")
    assert holds_edits(edited, card)
    with pytest.warns(UserWarning, match="backbone were changed by hand"):
        again = render_card(config(heads=("loss",)), previous=edited)
    assert "My words." in again
    assert "A fine one." in again
    assert "| loss |" in again
    facts = metadata(again)
    assert (facts["license"], facts["language"]) == ("mit", ["la", "grc"])
    with pytest.warns(UserWarning, match="backbone"):
        assert render_card(config(heads=("loss",)), previous=again) == again


def test_a_section_that_was_taken_out_stays_out():
    card = render_card(config())
    without = re.sub(r"<!-- posthoc:limits .*?<!-- /posthoc:limits -->\n", "", card, flags=re.S)
    again = render_card(config(), previous=without)
    assert "limits" not in [found["name"] for found in SECTION.finditer(again)]


def test_results_of_others_stay():
    one = Measured("kappa", "task", "data", "auroc", 0.9, 0.8, 1.0)
    card = render_card(config(), evaluation=Evaluation([one], "table"))
    facts = metadata(card)
    theirs = {"task": {"type": "x"}, "dataset": {"type": "y", "name": "z"}, "metrics": [{"type": "f1", "value": 1}]}
    facts["model-index"][0]["results"].append(theirs)
    body = card.split("\n---\n", 1)[1]
    edited = f"---\n{yaml.safe_dump(facts)}---\n{body}"
    again = metadata(render_card(config(), previous=edited))
    assert again["model-index"][0]["results"] == [theirs]


def test_a_users_own_card_keeps_its_text_below_ours():
    own = "---\nlicense: apache-2.0\n---\n# My adapter\n\nHello.\n"
    card = render_card(config(), previous=own)
    assert card.index("# Uncertainty for") < card.index("# My adapter")
    assert metadata(card)["license"] == "apache-2.0"
    assert render_card(config(), previous=card) == card


def test_windows_line_ends_are_no_edit():
    card = render_card(config())
    assert render_card(config(), previous=card.replace("\n", "\r\n")) == card


def test_a_block_that_is_not_yaml_is_said_and_others_words_are_inert():
    with pytest.raises(AdapterError, match="is not YAML"):
        render_card(config(), previous="---\na: [\n---\n# x\n")
    for block in ("- a list", "just words", "tags: 3\nmodel-index: what"):
        card = merge(f"---\n{block}\n---\n# x\n", seal(render_card(config())))
        assert metadata(card)["library_name"] == "posthoc"
    hostile = "---\nx: !!python/object/apply:os.system ['true']\n---\n"
    with pytest.raises(AdapterError, match="is not YAML"):
        render_card(config(), previous=hostile)


def test_which_of_two_cards_is_the_later_one():
    first = render_card(config())
    other = render_card(config(heads=("loss",)))
    mine = first.replace("# Uncertainty", "Mine.\n\n# Uncertainty")
    saved = render_card(config(heads=("loss",)), previous=mine)
    again = render_card(config(), previous=saved.replace("Mine.", "Mine, twice."))
    for later in (mine, saved, again):
        assert descends(later, first)
        assert not descends(first, later)
        assert holds_edits(later, first)
        assert holds_edits(later, other)
    assert descends(again, saved)
    assert descends(again, mine)
    theirs = first.replace("# Uncertainty", "Theirs.\n\n# Uncertainty")
    assert not descends(theirs, saved)
    assert not descends(saved, theirs)
    assert not holds_edits(first, first)
    assert not holds_edits(render_card(config(), previous=first), first)


def test_a_byte_order_mark_hides_no_block():
    own = "\ufeff---\nlicense: apache-2.0\n---\n# My adapter\n"
    assert metadata(render_card(config(), previous=own))["license"] == "apache-2.0"
