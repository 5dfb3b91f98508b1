"""What score files may hold, and what is told of those that cannot be read."""

from __future__ import annotations

import numpy as np
import pytest

from posthoc.adapters.errors import DataError
from posthoc.adapters.features import Features
from posthoc.eval.inputs import Scored, from_features, same_network


def known(name, by, width=3):
    features = Features.from_arrays(np.ones((2, width), np.float32))
    features.backbone_fingerprint = by
    return from_features(name, features)


def test_sets_of_one_network_are_told_from_sets_of_two():
    plain = Scored("plain", {"u": np.arange(2.0)})
    wide = Scored("wide", logits=np.zeros((2, 5)), embedding=np.zeros((2, 3)))
    same_network([])
    same_network([None, plain, wide, known("a", "f" * 64), None, known("b", None), known("c", "f" * 64)])
    for key, width in (("logits", 4), ("embedding", 2), ("penultimate", 7)):
        other = Scored("other", **{key: np.zeros((9, width))})
        has = Scored("has", **{key: np.zeros((2, width + 1))})
        with pytest.raises(DataError, match=rf"has and other .*{key} \[N, {width + 1}\] and \[N, {width}\]"):
            same_network([plain, None, has, known("a", None), other] if key != "embedding" else [has, other])
    with pytest.raises(DataError, match=r"a and b come from different networks.*ffffffffffff\.\.\. and 000000000000"):
        same_network([known("a", "f" * 64), known("x", None), known("b", "0" * 64)])
