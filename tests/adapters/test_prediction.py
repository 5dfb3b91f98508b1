"""What a model answers with."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from posthoc.adapters.errors import PosthocError
from posthoc.adapters.prediction import MissingFieldError, Prediction


def two_heads(rows: int = 4) -> Prediction:
    scale = torch.arange(rows, dtype=torch.float32)
    return Prediction(
        {
            "kappa": {"uncertainty": scale, "percentile": 10 * scale, "kappa": 1 / (scale + 1)},
            "laplace": {"uncertainty": 2 * scale, "percentile": scale, "variance": torch.ones(rows, 3)},
        },
        {"kappa": "aleatoric", "laplace": "total"},
        embedding=torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)),
        logits=torch.eye(rows)[:, :3],
    )


def test_plain_fields_are_the_first_heads() -> None:
    prediction = two_heads()
    assert prediction.heads == ("kappa", "laplace")
    assert prediction.kind == "aleatoric"
    assert torch.equal(prediction.uncertainty, torch.arange(4.0))
    assert torch.equal(prediction["laplace"].uncertainty, 2 * torch.arange(4.0))
    assert prediction["laplace"].kind == "total"
    assert prediction["laplace"].logits is prediction.logits


def test_a_field_that_is_not_there_lists_those_that_are_and_who_has_it() -> None:
    prediction = two_heads()
    with pytest.raises(MissingFieldError, match=r"uncertainty, percentile, kappa.*prediction\['laplace'\]\.variance"):
        _ = prediction.variance
    assert not hasattr(prediction, "temperature")
    assert isinstance(MissingFieldError("x"), PosthocError)
    with pytest.raises(PosthocError, match="did you mean 'laplace'"):
        prediction["laplac"]


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 3), [1, 2]),
        (-1, [3]),
        (2, [2]),
        ([3, 0], [3, 0]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (np.array([2, 1]), [2, 1]),
    ],
)
def test_indexing_keeps_rows_of_every_field(index: object, rows: list[int]) -> None:
    part = two_heads()[index]
    assert len(part) == len(rows)
    assert part.uncertainty.tolist() == rows
    assert part["laplace"].uncertainty.tolist() == [2 * row for row in rows]
    assert part.embedding.shape == (len(rows), 5)
    assert part["laplace"].variance.shape == (len(rows), 3)


def test_rows_can_be_walked_and_end() -> None:
    assert [row.uncertainty.item() for row in two_heads()] == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        two_heads()[4]


def test_numpy_gives_arrays_without_gradient() -> None:
    prediction = Prediction({"a": {"uncertainty": torch.ones(2, requires_grad=True)}}, {"a": "total"})
    assert isinstance(prediction.numpy().uncertainty, np.ndarray)
    assert not prediction.detach().uncertainty.requires_grad
    assert prediction.cpu().logits is None


def test_to_pandas_has_one_row_per_image() -> None:
    frame = two_heads().to_pandas()
    assert list(frame.columns) == [
        "uncertainty", "percentile", "kappa", "laplace.uncertainty", "laplace.percentile", "predicted",
    ]  # fmt: skip
    assert frame["laplace.uncertainty"].tolist() == [0, 2, 4, 6]
    assert frame["predicted"].tolist() == [0, 1, 2, 0]


def test_to_pandas_without_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PosthocError, match="pip install pandas"):
        two_heads().to_pandas()


def test_a_pytree_of_its_tensors() -> None:
    prediction = two_heads()
    doubled = pytree.tree_map(lambda leaf: 2 * leaf, prediction)
    assert torch.equal(doubled.uncertainty, 2 * prediction.uncertainty)
    assert torch.equal(doubled["laplace"].variance, 2 * prediction["laplace"].variance)
    assert doubled.kind == "aleatoric"
    leaves, spec = pytree.tree_flatten(prediction)
    assert len(leaves) == 8
    again = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert pytree.tree_unflatten(leaves, again).heads == prediction.heads
    named = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(prediction)[0]]
    assert named[0] == "['kappa.uncertainty']"
    assert named[-1] == "['logits']"


class Answering(nn.Module):
    def forward(self, images: torch.Tensor) -> Prediction:
        scores = images.mean((1, 2, 3))
        return Prediction(
            {"a": {"uncertainty": scores, "percentile": scores + 1}}, {"a": "total"}, logits=images[:, 0, 0]
        )


def test_crosses_compile_and_export(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = Answering()(images)
    compiled = torch.compile(Answering(), backend="eager", fullgraph=True)(images)
    program = torch.export.export(Answering(), (images,))
    torch.export.save(program, tmp_path / "program.pt2")
    for answer in (compiled, program.module()(images), torch.export.load(tmp_path / "program.pt2").module()(images)):
        assert isinstance(answer, Prediction)
        assert answer.kind == "total"
        assert torch.equal(answer.uncertainty, expected.uncertainty)
        assert torch.equal(answer.logits, expected.logits)
        assert answer.embedding is None
