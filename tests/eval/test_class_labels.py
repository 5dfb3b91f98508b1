"""Labels that are the classifier's classes, that are none, or that may be of others: one verdict for all who ask."""

from __future__ import annotations

import json

import numpy as np
import pytest

from posthoc.cli import main
from posthoc.eval.class_labels import doubtful_labels, has_classes, misfit, mistakes, usable_labels
from posthoc.eval.inputs import Scored

FEW = ["--resamples", "20", "--format", "json"]
LABEL = np.arange(200) % 4
LOGITS = np.random.default_rng(0).normal(size=(200, 4)) + 2 * np.eye(4)[LABEL]
ODD = np.r_[np.full(30, 7), -1, LABEL[31:]]


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (LABEL, None),
        (ODD, "31 of 200 labels of one (-1, 7) are none of the classifier's 4 classes (0 to 3), so its mistakes"),
        (np.r_[-1, LABEL[1:]], "1 of 200 labels of one (-1) are none"),
        ((LOGITS.argmax(1) + 1) % 4, "the classifier is never right on one; are these labels its classes?"),
    ],
)
def test_one_verdict_for_all_who_ask(label, why):
    one = Scored("one", {}, label, logits=LOGITS)
    told = misfit(one, label)
    assert told is None if why is None else told.startswith(why)
    assert mistakes(one)[1] == told
    assert (mistakes(one)[0] is None) == (why is not None)
    assert has_classes(one) == (why is None)
    assert usable_labels(one)[1] == (told or "")
    assert (usable_labels(one)[0] is None) == (why is not None)


def test_soft_labels_stand_for_the_likeliest_class_where_labels_are_asked_for():
    soft = np.eye(4, dtype=np.float32)[LABEL]
    one = Scored("s", label=soft, logits=soft)
    np.testing.assert_array_equal(usable_labels(one)[0], LABEL)
    assert not has_classes(one)
    assert mistakes(one) == (None, None)
    assert usable_labels(Scored("s", label=LABEL, embedding=soft)) == (None, "the backbone has no classifier")
    assert usable_labels(Scored("s", logits=soft)) == (None, "the images have no labels")
    assert not has_classes(Scored("s", label=LABEL, embedding=soft))


def test_labels_that_are_no_classes_are_no_mistakes():
    odd = Scored("odd", {}, ODD, logits=LOGITS)
    wrong, why = mistakes(odd)
    assert wrong is None
    assert why.startswith("31 of 200 labels of odd (-1, 7) are none of the classifier's 4 classes (0 to 3)")
    known = Scored("known", {}, ODD, np.ones(200, bool), logits=LOGITS)  # told by the file itself
    assert np.array_equal(mistakes(known)[0], np.zeros(200, bool))
    assert np.array_equal(mistakes(Scored("known", {}, LABEL, logits=LOGITS))[0], LOGITS.argmax(1) != LABEL)
    assert mistakes(Scored("bare", {}, logits=LOGITS)) == (None, None)
    none = Scored("none", {"u": np.arange(3.0)}, correct=np.zeros(3, bool))
    assert mistakes(none) == (None, "the classifier is never right on none; are these labels its classes?")


def test_labels_that_may_be_of_other_classes_are_doubted(tmp_path, capsys):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 10))
    label = np.arange(200) % 4
    doubted = Scored("odd", {}, label, logits=logits)
    accuracy = (logits.argmax(1) == label).mean()
    (note,) = doubtful_labels(doubted)
    assert note == (
        f"the classifier is right for {accuracy:.1%} of odd, whose labels are of 4 of its 10 classes: are these labels the "
        "classifier's classes?"
    )
    right = logits + 9 * np.eye(10)[label]
    assert doubtful_labels(Scored("some", {}, label, logits=right)) == []  # four classes of ten, well told
    assert doubtful_labels(Scored("all", {}, np.arange(200) % 10, logits=logits)) == []  # bad, but of all classes
    for name, values in (("odd", label), ("out", None)):
        more = {} if values is None else {"label": values}
        np.savez(tmp_path / f"{name}.npz", logits=logits if more else rng.normal(size=(50, 10)) / 2, **more)
    main(["eval", "ood", "--id", str(tmp_path / "odd.npz"), "--ood", str(tmp_path / "out.npz"), *FEW])
    (table,) = json.loads(capsys.readouterr().out)
    assert note in table["notes"]
    assert any(f"mistakes (accuracy {accuracy:.4f})" in one for one in table["notes"])
    main(["eval", "selective", "--data", str(tmp_path / "odd.npz"), *FEW])
    (table,) = json.loads(capsys.readouterr().out)
    assert note in table["notes"]


def test_partial_labels_in_the_commands(tmp_path, capsys):
    label = LABEL.copy()
    label[:30] = 7
    paths = []
    for name, one, labels in (("in", LOGITS, label), ("out", LOGITS[::-1] / 2, LABEL)):
        paths.append(str(tmp_path / f"{name}.npz"))
        np.savez(paths[-1], label=labels, logits=one)
    main(["eval", "ood", "--id", paths[0], "--ood", paths[1], *FEW])
    (table,) = json.loads(capsys.readouterr().out)
    assert not any("scod" in metric for metric in table["scores"]["entropy"])
    assert any(note.startswith("no scod: 30 of 200 labels of in (7) are none") for note in table["notes"])
    with pytest.raises(SystemExit):
        main(["eval", "selective", "--data", paths[0], *FEW])
    assert "30 of 200 labels of in (7) are none" in capsys.readouterr().err
