"""Is ONNX Runtime taken only where it is right and clearly faster, and does the log say so, so that every decision replays?"""

import asyncio
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from policies import onnx_engine
from policies.bundle import Bundle
from policies.distributions import Categorical
from policies.errors import ConfigError, IntegrityError
from policies.onnx_engine import OnnxEngine, installed_name
from policies.registry import Registry
from policies.sealed_segments import SealedFile
from policies.sealing import seal
from policies.storage import Storage, open_storage
from serve_app import engines
from serve_app.engines import MAX_ROUNDS, choose, engine_for, measure, require_independent_rows
from serve_app.replica import PolicyReplica
from serve_app.variants import VariantStore
from tests.bundles import make_bundle, make_policy
from tests.serving_helpers import NAME, decide_all, logged, publish, random_policy, release, replica_of
from trimtab.replay import replay

OTHER = "onnxruntime==1"


# --- the rule ---


@pytest.mark.parametrize(
    ("numpy_us", "other_us", "chosen"),
    [
        # Shares 1/2, 7/8 and 8/7: their product is 1/2, the cube root of that 0.794.
        ((40, 80, 700), (20, 70, 800), OTHER),
        # 1/2, 7/8 and 6/5: 0.525, and its cube root 0.807, not 20 % better.
        ((40, 80, 700), (20, 70, 840), "numpy"),
        # 3/4 of each, and 10 us less for eight rows; then 9.75 us less.
        ((20, 40, 80), (15, 30, 60), OTHER),
        ((20, 39, 80), (15, 29.25, 60), "numpy"),
        # A third of each, and nobody would notice.
        ((9, 12, 30), (3, 4, 10), "numpy"),
        ((9, 12, 30), (90, 120, 300), "numpy"),
    ],
)
def test_numpy_gives_way_to_what_is_clearly_faster(numpy_us: tuple[float, ...], other_us: tuple[float, ...], chosen: str) -> None:
    assert choose({"numpy": dict(zip((1, 8, 64), numpy_us)), OTHER: dict(zip((1, 8, 64), other_us))}) == chosen


def test_measuring_takes_the_least_of_each_and_ends_in_time() -> None:
    """A clock that only engines move: `slow` takes 30 ms a batch, `fast` 10 ms, and each its first time a second more."""
    clock = {"now_s": 0.0}
    asked: list[tuple[str, int]] = []

    def engine(name: str, takes_s: float) -> engines.Outputs:
        def outputs(obs_BD: np.ndarray) -> np.ndarray:
            clock["now_s"] += takes_s if (name, len(obs_BD)) in asked else takes_s + 1
            asked.append((name, len(obs_BD)))
            return obs_BD

        return outputs

    candidates = {"slow": engine("slow", 0.03), "fast": engine("fast", 0.01)}
    times_us = measure(candidates, np.zeros((3, 2), np.float32), now_s=lambda: clock["now_s"])
    assert times_us == {
        "slow": pytest.approx({1: 30_000, 8: 30_000, 64: 30_000}),
        "fast": pytest.approx({1: 10_000, 8: 10_000, 64: 10_000}),
    }
    assert len(asked) == 2 * 3 * 2, "two rounds of three sizes for each of two; the first round alone took too long"
    assert asked[:2] == [("slow", 1), ("fast", 1)], "they take turns"
    asked.clear()
    measure({"numpy": lambda obs_BD: asked.append(("numpy", len(obs_BD)))}, np.zeros((3, 2)), now_s=lambda: 0.0)
    assert len(asked) == 3 * MAX_ROUNDS, "a fast network is measured so often and no more"


# --- what is refused ---


def require_refused(bundle: Bundle, caplog: pytest.LogCaptureFixture, *, reason: str, error: str) -> None:
    """Left to choose, a replica serves with numpy and logs why; who asked for ONNX Runtime is told why there is none."""
    assert engine_for(1, bundle, "auto") is None
    assert "event=engine_refused version=1" in caplog.text and reason in caplog.text
    with pytest.raises(IntegrityError, match=rf"serving.engine is onnxruntime, and {error}"):
        engine_for(1, bundle, "onnxruntime")


def test_a_graph_that_computes_something_else_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path, make_policy(1))
    always_other(monkeypatch)
    assert engine_for(1, bundle, "auto") is not None
    monkeypatch.setitem(onnx_engine.OPERATORS, "tanh", "Relu")
    require_refused(bundle, caplog, reason="golden", error=".*golden vectors.*set it to numpy")


def test_an_engine_whose_rows_depend_on_their_batch_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path, make_policy(1))
    always_other(monkeypatch)
    run = OnnxEngine._run

    def one_bit_off_in_batches_of_13(engine: OnnxEngine, x_BD: np.ndarray) -> np.ndarray:
        outputs_BO = run(engine, x_BD)
        return np.nextafter(outputs_BO, np.float32(np.inf)) if len(x_BD) == 13 else outputs_BO

    monkeypatch.setattr(OnnxEngine, "_run", one_bit_off_in_batches_of_13)
    assert engine_for(1, bundle, "auto") is None
    assert "other bits in a batch of 13 than alone" in caplog.text


def test_an_engine_that_hides_an_overflow_is_not_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path, make_policy(1))
    always_other(monkeypatch)
    run = OnnxEngine._run
    monkeypatch.setattr(OnnxEngine, "_run", lambda engine, x_BD: np.nan_to_num(run(engine, x_BD)))
    assert engine_for(1, bundle, "auto") is None
    assert "gives numbers where the network overflows" in caplog.text


def test_a_plain_product_of_the_whole_batch_would_be_refused() -> None:
    """Negative control with BLAS itself: numpy without blocks depends on the batch, and numpy with them does not."""
    policy = make_policy(1, num_features=128, num_actions=18, hidden=(512, 512))
    weight = policy.tensors["policy.0.weight"]
    obs_ND = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
    with pytest.raises(IntegrityError, match="other bits in a batch of"):
        require_independent_rows(lambda obs_BD: obs_BD @ weight, obs_ND, "plain")
    require_independent_rows(policy.outputs, obs_ND, "numpy")


def test_where_it_is_not_installed_numpy_serves_quietly_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path, make_policy(1))
    monkeypatch.setattr(onnx_engine, "PACKAGE", "no-such-package")
    with caplog.at_level(logging.INFO):
        assert engine_for(1, bundle, "auto") is None
        assert engine_for(1, bundle, "numpy") is None
    assert not caplog.text
    with pytest.raises(ConfigError, match=r"serving.engine is onnxruntime.*no-such-package.*trimtab\[export\].*numpy"):
        engine_for(1, bundle, "onnxruntime")


def test_where_its_package_cannot_be_imported_numpy_serves_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path, make_policy(1))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it raises ImportError, whatever is installed
    require_refused(bundle, caplog, reason="onnxruntime", error="ONNX Runtime failed.*numpy")


def test_the_choice_is_logged_with_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(tmp_path, make_policy(1))
    monkeypatch.setattr(engines, "measure", lambda candidates, obs: {n: {1: 2.0, 8: 40.0, 64: 90.25} for n in candidates})
    with caplog.at_level(logging.INFO):
        assert engine_for(7, bundle, "auto") is None
    said = "event=engine_chosen version=7 engine=numpy rows=1/8/64 numpy_us=2.0/40.0/90.2 onnxruntime_us=2.0/40.0/90.2"
    assert said in caplog.text


# --- from a request to its replay ---


def always_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whatever is not numpy be the fastest."""

    def measure(candidates: dict[str, engines.Outputs], obs_ND: np.ndarray) -> dict[str, dict[int, float]]:
        return {name: dict.fromkeys((1, 8, 64), 90.0 if name == "numpy" else 9.0) for name in candidates}

    monkeypatch.setattr(engines, "measure", measure)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Return a storage with a champion and a canary, whose bits ONNX Runtime gives otherwise than numpy."""
    storage = open_storage(tmp_path / "storage")
    for seed in (1, 2):
        publish(storage, random_policy(seed, num_features=64, num_actions=5, hidden=(256, 256)))
    release(storage, 2, weights=(0.5, 1.0))
    return storage


def decide(storage: Storage, engine: str, *bodies: dict[str, Any]) -> PolicyReplica:
    """Have a replica with this engine answer all requests, and return it."""
    replica = replica_of(storage, engine=engine)
    assert [reply.status for reply in decide_all(storage, replica, *bodies)] == [200] * len(bodies)
    return replica


def observations(num: int) -> list[list[float]]:
    obs_ND = np.random.default_rng(3).normal(size=(num, 64))
    obs_ND[:, 0] = 0  # it has bounds
    return obs_ND.tolist()


def bodies(num: int = 9) -> list[dict[str, Any]]:
    """Return single requests, and one for many."""
    alone = [{"observation": obs, "unit_id": f"u{unit}"} for unit, obs in enumerate(observations(num))]
    return [*alone, {"observations": observations(num), "unit_ids": [f"u{unit}" for unit in range(num)]}]


def test_what_onnx_runtime_decided_replays_bit_for_bit_with_it(storage: Storage) -> None:
    decide(storage, "onnxruntime", *bodies())
    decisions = logged(storage)
    assert len(decisions) == 18 and {decision.version for decision in decisions} == {1, 2}
    assert all(decision.engines == {1: installed_name(), 2: installed_name()} for decision in decisions)
    for decision in decisions:
        found = replay(storage, NAME, decision.decision_id)
        assert found["equal"] and found["engine"] == installed_name(), found


def test_numpy_would_not_replay_it(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the engine's name in the line at least one propensity has another last bit."""
    decide(storage, "onnxruntime", *bodies(60))
    stripped = {decision.decision_id: msgspec.structs.replace(decision, engines=None) for decision in logged(storage)}
    monkeypatch.setattr("trimtab.replay.find_decision", lambda directory, decision_id: stripped[decision_id])
    assert not all(replay(storage, NAME, decision_id)["equal"] for decision_id in stripped)


def test_a_mixture_can_be_recomputed_from_the_line_alone(storage: Storage) -> None:
    """It is the sum over both arms of half of the propensity under each, each with the engine that the line names."""
    decide(storage, "onnxruntime", *bodies())
    registry = Registry(storage.registry(NAME))
    by_version = {version: OnnxEngine(registry.bundle(version).policy) for version in (1, 2)}
    for decision in logged(storage):
        assert set(decision.engines or {}) == {1, 2}
        obs_1D = np.array([decision.observation], np.float32)
        shares = 0.0
        for version in (2, 1):  # in the plan's order: canary first
            [parameters_P] = by_version[version].distributions(obs_1D)
            distribution = by_version[version].policy.distribution
            assert isinstance(distribution, Categorical)
            shares += 0.5 * distribution.propensity(decision.action, parameters_P, "sample")
        assert decision.mixture_propensity == shares


def test_a_replay_without_that_engine_says_what_to_install(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(storage, "onnxruntime", {"observation": observations(1)[0]})
    [decision] = logged(storage)
    name = installed_name()
    monkeypatch.setattr(onnx_engine, "PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match=rf"computed by {name}.*pip install '{name}'"):
        replay(storage, NAME, decision.decision_id)


def test_lines_of_numpy_name_no_engine(storage: Storage) -> None:
    replica = decide(storage, "numpy", *bodies(2))
    assert [decision.engines for decision in logged(storage)] == [None] * 4
    assert replica.report().engines == {1: "numpy", 2: "numpy"}


def test_the_engines_are_in_the_report_and_in_the_short_status(storage: Storage) -> None:
    replica = decide(storage, "onnxruntime", {"observation": observations(1)[0]})
    assert replica.report().engines == {1: installed_name(), 2: installed_name()}
    assert asyncio.run(replica.api._status.read())["engines"] == {1: installed_name(), 2: installed_name()}


def test_engines_survive_sealing(storage: Storage) -> None:
    replica = decide(storage, "onnxruntime", *bodies())
    before = logged(storage)
    asyncio.run(replica._stop())
    [segment] = storage.decisions(NAME).glob("*.jsonl")
    assert seal(segment) is not None
    [sealed] = storage.decisions(NAME).glob("*.parquet")
    rows = [decision for group in range(SealedFile(sealed).num_groups) for decision in SealedFile(sealed).read_group(group)]
    assert sorted(rows, key=lambda row: row.decision_id) == sorted(before, key=lambda row: row.decision_id)
    assert all(replay(storage, NAME, decision.decision_id)["equal"] for decision in before)


def test_versions_of_one_plan_may_have_two_engines(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "choose", lambda times_us: "numpy")
    store = VariantStore(Registry(storage.registry(NAME)), engine="auto")
    store.refresh(now=0.0)
    assert store.snapshot is not None and store.snapshot.engines is None
    champion = store.snapshot.variants[1]
    mixed = dataclasses.replace(champion, engine=OnnxEngine(champion.policy))
    snapshot = dataclasses.replace(store.snapshot, variants={**store.snapshot.variants, 1: mixed})
    assert snapshot.engines == {1: installed_name()}
