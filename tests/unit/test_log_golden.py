"""Are logs of every schema version, as lines and sealed, read as what their writers meant, for ever?

The files are never made anew: a new version is a new directory. Lines were written by hand; the sealed ones were made of them by
the first version that sealed, or that wrote such lines.
"""

import shutil
from pathlib import Path

import pytest

from policies.integrity import sha256_file
from policies.log_reader import LogTail, find_decision
from policies.records import Decision
from policies.sealed_segments import SealedFile
from policies.sealing import seal
from tests.logs import chunks, first_of_each, read_log

GOLDEN = Path(__file__).parents[1] / "golden"
DIGEST = "d" * 64

V1_FIRST = Decision(
    decision_id="r1.t1",
    time_s=1700000000.25,
    unit_id="u1",
    episode_id="e1",
    plan=3,
    release=1,
    arm="champion",
    version=1,
    digest=DIGEST,
    observation=[0.1, -0.2, 0.30000000000000004, 4e-9],
    action=1,
    mode="sample",
    seed=4503599627370497,
    propensity=0.7310585786300049,
    mixture_propensity=0.75,
    fallback=None,
    latency_s=0.00125,
)
V1_SECOND = Decision(
    decision_id="r2.t2",
    time_s=1700000001.5,
    unit_id="u2",
    episode_id=None,
    plan=3,
    release=1,
    arm="canary",
    version=1,
    digest=DIGEST,
    observation={"position": [1.5], "gear": 2},
    action=[0.5, -1.0],
    mode="greedy",
    seed=7,
    propensity=1.0,
    mixture_propensity=0.95,
    fallback="version 2 gave NaN",
    latency_s=0.002,
    action_mask=[True, False],
)
V2_ALONE = Decision(
    decision_id="r1.t1",
    time_s=1800000000.25,
    unit_id="größe",
    episode_id=None,
    plan=9,
    release=0,
    arm="champion",
    version=4,
    digest=DIGEST,
    observation=[0.5, 1.0],
    action=3,
    mode="sample",
    seed=11,
    propensity=0.25,
    mixture_propensity=0.25,
    fallback=None,
    latency_s=0.001,
    rung="arm",
    shield="torque",
    assigned="request",
)
# float32, little-endian: 0000803e 00000040 00004040 000080bf are 0.25, 2, 3 and -1
V2_BATCH = [
    Decision("b1:0.t", 1799999999.0, "u1", "e1", 9, 2, "canary", 5, "five", [0.25, 2.0], 0, "sample", 12, 0.5, 0.375,
             "version 5 raised an error", 0.003, rung="champion"),
    Decision("b1:1.t", 1799999999.0, "u2", None, 9, 2, "champion", 4, "four", [3.0, -1.0], 1, "sample", 13, 0.125, 0.25,
             None, 0.003),
]  # fmt: skip
V3_TOGETHER = [
    Decision("r1.t1", 1900000000.5, "u1", None, 12, 3, "champion", 6, "six", [0.5, 1.0], 0, "sample", 21, 0.75, 0.7, None, 0.001),
    Decision("r2.t2", 1900000000.5, "u2", "e2", 12, 3, "canary", 7, "seven", [2.0, -4.0], 1, "greedy", 22, 1.0, 1.0, None, 0.0045,
             assigned="request", repair="1 item replaced"),
]  # fmt: skip
V3_MANY = [
    Decision("page:0.t", 1900000001.0, "page:0", None, 12, 3, "champion", 6, "six", [0.25, 2.0], 1, "sample", 23, 0.25, 0.25,
             None, 0.002, engines={6: "onnxruntime-1.22.0"}),
    Decision("page:1.t", 1900000001.0, "page:1", None, 12, 3, "champion", 6, "six", [3.0, -1.0], 0, "sample", 24, 0.5, 0.5,
             None, 0.002, engines={6: "onnxruntime-1.22.0"}),
]  # fmt: skip
EXPECTED = {"log-v1": [V1_FIRST, V1_SECOND], "log-v2": [*V2_BATCH, V2_ALONE], "log-v3": [*V3_TOGETHER, *V3_MANY]}


@pytest.mark.parametrize("version", EXPECTED)
def test_the_lines_are_read(version: str) -> None:
    assert first_of_each(read_log(GOLDEN / version)) == EXPECTED[version]


@pytest.mark.parametrize("version", EXPECTED)
def test_the_sealed_segment_is_read(version: str) -> None:
    assert read_log(GOLDEN / version / "sealed") == EXPECTED[version]
    for decision in EXPECTED[version]:
        assert find_decision(GOLDEN / version / "sealed", decision.decision_id) == decision


@pytest.mark.parametrize(("version", "num_duplicates", "num_torn_bytes"), [("log-v1", 1, 59), ("log-v2", 0, 0), ("log-v3", 0, 0)])
def test_the_sealed_segment_says_what_it_was_made_of(version: str, num_duplicates: int, num_torn_bytes: int) -> None:
    (lines,), (sealed,) = (GOLDEN / version).glob("*.jsonl"), (GOLDEN / version / "sealed").iterdir()
    info = SealedFile(sealed).info
    assert (info.num_rows, info.num_duplicates, info.num_torn_bytes) == (len(EXPECTED[version]), num_duplicates, num_torn_bytes)
    assert (info.jsonl_sha256, info.jsonl_bytes) == (sha256_file(lines), lines.stat().st_size)
    assert f"{info.writer}-000001" == sealed.stem


@pytest.mark.parametrize("version", EXPECTED)
def test_this_version_seals_the_lines_to_the_same_rows(version: str, tmp_path: Path) -> None:
    (lines,), (sealed,) = (GOLDEN / version).glob("*.jsonl"), (GOLDEN / version / "sealed").iterdir()
    info = seal(Path(shutil.copy(lines, tmp_path)))
    assert info is not None and info.jsonl_sha256 == SealedFile(sealed).info.jsonl_sha256
    assert read_log(tmp_path) == EXPECTED[version]


def test_a_reader_that_had_read_a_part_of_the_lines_goes_on_in_the_golden_file(tmp_path: Path) -> None:
    (lines,), (sealed,) = (GOLDEN / "log-v1").glob("*.jsonl"), (GOLDEN / "log-v1" / "sealed").iterdir()
    copy = Path(shutil.copy(lines, tmp_path))
    tail = LogTail(tmp_path, Decision)
    tail.look()
    assert tail.read(max_bytes=400) == [V1_FIRST]
    shutil.copy(sealed, tmp_path)
    copy.unlink()
    assert [row for chunk in chunks(tail) for row in chunk] == [V1_SECOND]
    assert tail.num_sealed_duplicates == 1
