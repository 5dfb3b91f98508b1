"""Every timm family, examined by the script that writes docs/backbones.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_backbones", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


survey = _load(Path(__file__).resolve().parents[2] / "docs" / "make_backbones.py")


@pytest.fixture(autouse=True)
def _small_networks_keep_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm before 1.0.31 forgets the option `img_size`, by which the survey makes networks small."""
    create = timm.create_model

    def created(name: str, **options: Any) -> Any:
        model = create(name, **options)
        if not hasattr(model, "_model_args"):
            model._model_args = options
        return model

    monkeypatch.setattr(timm, "create_model", created)


@pytest.mark.parametrize(("family", "number"), survey.cases())
def test_a_family_keeps_every_promise_of_a_backbone(family: str, number: int) -> None:
    if family in survey.CASES and not timm.is_model(survey.CASES[family][number][0]):
        pytest.skip(f"timm {timm.__version__} does not have the network of the survey")
    row = survey.examine(family, number)
    if row.not_built is not None:
        pytest.skip(f"{row.model} cannot be built: {row.not_built}")
    assert row.problems == ()
    assert (row.classifier is None) == (row.refused is not None)


def test_networks_with_two_classifiers_are_refused_and_say_what_to_do() -> None:
    for family, number in (("deit", 1), ("levit", 0), ("efficientformer", 0), ("repvit", 0), ("crossvit", 0)):
        row = survey.examine(family, number)
        assert row.kind == "several classifiers"
        assert "made of 2 classifiers" in row.refused
        assert "kappa" in row.refused
        assert "classifier_layer='" in row.refused


def test_caformer_has_another_last_layer_input_than_embedding() -> None:
    row = survey.examine("metaformer", 1)
    assert (row.kind, row.embedding, row.penultimate) == ("deep linear", 512, 2048)


def test_the_page_tells_what_was_found() -> None:
    page = survey.PAGE.read_text(encoding="utf-8")
    if f"timm {timm.__version__} has" not in page:
        pytest.skip(f"docs/backbones.md was not written with timm {timm.__version__}")
    assert page == survey.page([survey.examine(*key) for key in survey.cases()])


def test_a_family_that_the_table_does_not_know_is_examined_by_its_smallest_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(survey.CASES, "ghostnet")
    assert survey.case("ghostnet", 0) == ("ghostnet_050", {"side": 224})
