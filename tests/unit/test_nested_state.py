"""Does a nested state come back as it was, and is what is not data refused?"""

import json

import numpy as np
import pytest

from policies.errors import IntegrityError, TrainingFailed
from training.nested_state import from_tensors, to_tensors

STATE = {
    "a": {0: [1, 2.5, (None, True)], 1: {}},
    None: {"m": np.arange(6.0).reshape(2, 3), "s": np.float32(0.1), "zero": np.zeros((), np.int64)},
    "far": [float("inf"), float("-inf")],
    "text": "κ",
}


def written_and_read(state: object) -> object:
    node, tensors = to_tensors(state, "x")
    return from_tensors(json.loads(json.dumps(node, allow_nan=False)), tensors)


def test_every_kind_of_value_comes_back_with_its_type():
    again = written_and_read(STATE)
    assert again["a"] == STATE["a"] and again["far"] == STATE["far"] and again["text"] == STATE["text"]
    assert type(again["a"][0][2]) is tuple and list(again["a"]) == [0, 1]
    assert again[None]["s"] == STATE[None]["s"] and again[None]["s"].dtype == np.float32
    assert again[None]["m"].tolist() == STATE[None]["m"].tolist() and again[None]["zero"].shape == ()
    assert np.isnan(written_and_read(float("nan"))) and type(written_and_read(np.float64("nan"))) is np.float64


@pytest.mark.parametrize("leaf", [{1, 2}, np.array([object()]), lambda: 1, b"bytes", {(1, 2): 3}, 1j])
def test_what_is_not_data_is_refused_with_its_place(leaf: object):
    with pytest.raises(TrainingFailed, match="state at x/deep/0"):
        to_tensors({"deep": [leaf]}, "x")


@pytest.mark.parametrize(
    "node", [None, {}, {"pickle": "gASV"}, {"tensor": "missing"}, {"dict": [1]}, {"numpy": ["O", {"value": 1}]}]
)
def test_nodes_of_another_kind_are_refused(node: object):
    with pytest.raises(IntegrityError, match="saved state cannot be read"):
        from_tensors(node, {})
