"""Are tensors read back as they were written, and nothing else?"""

from typing import Any

import numpy as np
import pytest

from policies.errors import IntegrityError
from policies.integrity import canonical_json
from policies.tensors import decode_tensors, encode_tensors

SHAPES = {"x": (2,), "y": (1, 3)}
TENSORS = {"x": np.float32([1, 2]), "y": np.float32([[3, 4, 5]])}
ENTRIES = {
    "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "y": {"dtype": "F32", "shape": [1, 3], "data_offsets": [8, 20]},
}


def _file(header: bytes, body: bytes = bytes(20)) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def _entries(**changes: Any) -> bytes:
    """Return a file whose entry `y` is changed."""
    return _file(canonical_json(ENTRIES | {"y": {**ENTRIES["y"], **changes}}))


def test_tensors_are_read_back_as_they_were_written() -> None:
    again = decode_tensors(encode_tensors(TENSORS), SHAPES, "t")
    assert all(np.array_equal(again[name], tensor) for name, tensor in TENSORS.items())
    assert decode_tensors(_entries(), SHAPES, "t")["y"].tolist() == [[0, 0, 0]]  # the control of what follows


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has 0 bytes"),
        (bytes(7), "has 7 bytes"),
        ((1 << 63).to_bytes(8, "little") + bytes(20), "the header says 9223372036854775808 bytes"),
        (((1 << 20) + 1).to_bytes(8, "little") + bytes(1 << 21), "the limit is 1048576"),
        (_file(b"[]"), "the header does not hold exactly"),
        (_file(b"{}"), "the header does not hold exactly"),
        (_file(b'{"x":{},"x":{}}'), "appears twice"),
        (_file(b"[" * 100_000), "not readable JSON"),
        (_file(canonical_json({**ENTRIES, "__metadata__": {}})), "does not hold exactly"),
        (_file(canonical_json({**ENTRIES, "y": None})), "entry y is None"),
        (_entries(more=1), "entry y is .* expected exactly"),
        (_entries(dtype="F64"), r"expected float32 \(F32\)"),
        (_entries(dtype="I32"), r"expected float32 \(F32\)"),
        (_entries(shape=[3, 1]), r"of shape \[1, 3\]"),
        (_entries(shape=[1.0, 3]), r"of shape \[1, 3\]"),
        (_entries(shape=[True, 3]), r"of shape \[1, 3\]"),
        (_entries(data_offsets=[8, 24]), "entry y has 16 bytes, its shape .* needs 12"),
        (_entries(data_offsets=[0, 12]), "begins at byte 0, the one before it ends at 8|begins at byte 0"),
        (_entries(data_offsets=[4, 16]), "entry y begins at byte 4, the one before it ends at 8"),
        (_entries(data_offsets=[12, 24]), "entry y begins at byte 12, the one before it ends at 8"),
        (_entries(data_offsets=[-12, 0]), "begins at byte -12"),
        (_entries(data_offsets=[8.0, 20.0]), r"expected float32 \(F32\)"),
        (_entries(data_offsets=["8", "20"]), r"expected float32 \(F32\)"),
        (_entries(data_offsets=[20]), r"expected float32 \(F32\)"),
        (_entries(data_offsets=None), r"expected float32 \(F32\)"),
        (_file(canonical_json(ENTRIES), bytes(16)), "the tensors have 20 bytes, the file holds 16"),
        (_file(canonical_json(ENTRIES), bytes(24)), "the tensors have 20 bytes, the file holds 24"),
    ],
)
def test_a_file_that_is_anything_else_is_refused_with_what_is_wrong(data: bytes, words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        decode_tensors(data, SHAPES, "policy.safetensors")
