"""Does a run become a version once, only with its own current gate report, and whatever interrupted the last try?"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policies.errors import ConfigError, GateRefused, SignatureRefused
from policies.integrity import canonical_json, write_atomic
from policies.reference import encode_reference, no_steps, read_reference
from policies.registry import Registry
from policies.storage import Storage, open_storage
from policies.trust import SigningKey, TrustStore, create_key
from policies.verdicts import GateReport, Verdict
from tests.bundles import make_report
from training.checkpoint import adopt_checkpoint, load_policy, save_checkpoint
from training.environment import read_spaces
from training.evaluation import EvaluationRequest, evaluate
from training.event_file import EventFile
from training.golden import NUM_CORNERS, NUM_GOLDEN
from training.learner_state import LearnerState
from training.metrics import TENSORBOARD
from training.network import layout_of
from training.runs import RunConfig, create_run
from trimtab import pipeline
from trimtab.loop_file import LoopConfig, load_loop_file

LOOP_FILE = Path(__file__).parents[2] / "examples" / "cartpole.yaml"


@pytest.fixture
def loop() -> LoopConfig:
    return load_loop_file(LOOP_FILE)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "data")


def _make_run(loop: LoopConfig, storage: Storage, run_id: str = "r", *, seed: int = 0) -> Path:
    """Make a run with the checkpoint that training starts from."""
    run = create_run(storage, run_id, RunConfig(loop.environment, loop.training))
    layout = layout_of(read_spaces(loop.environment), loop.training)
    state = LearnerState.initial(layout, seed)
    described = {
        **state.counters(),
        "spaces": layout.spaces.to_json(),
        "network": layout.architecture.to_json(),
        "vf_share_layers": layout.shares_layers,
    }
    save_checkpoint(run, update=0, tensors=state.to_tensors(layout), state=described, keep=2)
    return run


def _gate(loop: LoopConfig, run: Path, verdict: Verdict = Verdict.PASS, incumbent_version: int | None = None) -> None:
    """Put a gate report beside the run as `gate_run` does."""
    policy, _ = load_policy(run)
    conditions = pipeline._conditions_sha256(loop)
    report: GateReport = replace(make_report(policy, verdict), conditions_sha256=conditions, incumbent_version=incumbent_version)
    write_atomic(run / pipeline.GATE_REPORT, canonical_json(report.to_json()))
    np.savez(run / pipeline.GOLDEN_INPUTS, observations=np.random.default_rng(0).normal(0, 0.1, (32, 4)).astype(np.float32))
    write_atomic(run / pipeline.REFERENCE, encode_reference(no_steps(policy.spaces), policy.spaces))


HERE = "tests.training_environments:"
OTHER_ENVIRONMENTS = {
    "masks in info": [f"environment.id={HERE}Masked-v0"],
    "masks in the observation": [f"environment.id={HERE}Masked-v0", "environment.kwargs={observed: true, flat: true}"],
    "real actions": ["environment.id=Pendulum-v1"],
    "squashed actions": ["environment.id=Pendulum-v1", "training.action_squashing=tanh"],
    "images": [f"environment.id={HERE}Screen", "environment.max_episode_steps=9", "training.conv_filters=[[4, 3, 2]]"],
    "all kinds": [f"environment.id={HERE}Everything", "environment.kwargs={action: multi_binary}"],
}


@pytest.mark.parametrize("overrides", OTHER_ENVIRONMENTS.values(), ids=OTHER_ENVIRONMENTS)
def test_every_kind_of_policy_is_published_with_golden_vectors_of_what_it_meets(storage: Storage, overrides: list[str]) -> None:
    loop = load_loop_file(LOOP_FILE, overrides=["training.hidden=[8]", *overrides])
    run = _make_run(loop, storage)
    policy, _ = load_policy(run)
    episodes = evaluate(loop.environment, EvaluationRequest(policy, num_episodes=5, seed=1, mode="sample", keep_steps=True))
    report = replace(make_report(policy), conditions_sha256=pipeline._conditions_sha256(loop))
    pipeline.keep_judged(run, policy, report, episodes, seed=0)
    bundle = pipeline.publish_run(loop, storage, "r").bundle
    golden, met = bundle.golden, {row.tobytes() for row in episodes.obs_ND}
    assert len(golden.observations_ND) >= NUM_GOLDEN + NUM_CORNERS
    assert {row.tobytes() for row in golden.observations_ND[:-NUM_CORNERS]} <= met
    assert (golden.masks_NA is not None) == policy.spaces.has_mask
    reference = read_reference(bundle)
    assert {row.tobytes() for row in reference.observations_ND} == met  # five episodes are fewer steps than the limit
    returns_E = np.bincount(reference.episodes_N, reference.rewards_N)
    assert np.allclose(returns_E, episodes.returns_E, rtol=1e-5)  # float32 sums of up to 200 rewards
    origin = bundle.manifest["origin"]
    assert origin["parents"] == [] and origin["seeds"] == {"training": loop.training.seed, "gates": loop.gates.seed}
    assert origin["data_range"]["env_steps"] == 0


def test_the_first_passing_run_becomes_champion_and_publishing_again_changes_nothing(loop: LoopConfig, storage: Storage) -> None:
    _gate(loop, _make_run(loop, storage))
    first = pipeline.publish_run(loop, storage, "r")
    assert (first.version, first.is_champion) == (1, True)
    _gate(loop, storage.run("r"), incumbent_version=1)
    again = pipeline.publish_run(loop, storage, "r")
    assert again.version == 1 and again.bundle.digest == first.bundle.digest
    assert len(list(Registry(storage.registry(loop.name)).bundles.iterdir())) == 1


def test_a_publish_that_was_killed_before_its_champion_is_finished_by_the_next_one(
    loop: LoopConfig, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    _gate(loop, _make_run(loop, storage))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "set_champion", killed)
        pipeline.publish_run(loop, storage, "r")
    assert Registry(storage.registry(loop.name)).state().champion is None
    assert pipeline.publish_run(loop, storage, "r").is_champion


def test_a_report_of_other_settings_or_another_champion_is_refused(loop: LoopConfig, storage: Storage) -> None:
    run = _make_run(loop, storage)
    lenient = load_loop_file(LOOP_FILE, overrides=["gates.performance.min_return=-1"])
    _gate(lenient, run)
    with pytest.raises(GateRefused, match="judged under other settings"):
        pipeline.publish_run(loop, storage, "r")
    _gate(loop, run, incumbent_version=7)
    with pytest.raises(GateRefused, match="judged against 7, the champion is nobody"):
        pipeline.publish_run(loop, storage, "r")
    _gate(loop, run)
    pipeline.publish_run(loop, storage, "r")  # the control


def test_a_failing_run_needs_the_break_glass_and_is_not_champion(loop: LoopConfig, storage: Storage) -> None:
    _gate(loop, _make_run(loop, storage), Verdict.FAIL)
    with pytest.raises(GateRefused, match="gates say fail"):
        pipeline.publish_run(loop, storage, "r")
    published = pipeline.publish_run(loop, storage, "r", override_gates="drill")
    assert (published.version, published.is_champion) == (1, False)


def test_up_continues_a_run_with_a_checkpoint_and_the_same_settings_only(loop: LoopConfig, storage: Storage) -> None:
    assert pipeline.interrupted_run(loop, storage) is None
    create_run(storage, "a", RunConfig(loop.environment, loop.training))  # interrupted before its first checkpoint
    assert pipeline.interrupted_run(loop, storage) is None
    _make_run(loop, storage, "b")
    assert pipeline.interrupted_run(loop, storage) == "b"
    assert pipeline.interrupted_run(load_loop_file(LOOP_FILE, overrides=["training.seed=9"]), storage) is None


def test_a_bundle_names_the_incumbent_and_the_donor_of_its_weights_as_parents(loop: LoopConfig, storage: Storage) -> None:
    _gate(loop, _make_run(loop, storage))
    first = pipeline.publish_run(loop, storage, "r")
    run = _make_run(loop, storage, "child", seed=1)
    adopt_checkpoint(run, _make_run(loop, storage, "donor", seed=2), "gen-000000")
    _gate(loop, run, incumbent_version=1)
    second = pipeline.publish_run(loop, storage, "child")
    assert first.bundle.manifest["origin"]["parents"] == []
    assert second.bundle.manifest["origin"]["parents"] == [
        {"kind": "incumbent", "version": 1, "digest": first.bundle.digest},
        {"kind": "run", "run_id": "donor", "generation": "gen-000000"},
    ]


def test_a_bundle_says_with_which_settings_its_run_learned_whatever_the_loop_file_says_now(storage: Storage) -> None:
    trained_with = load_loop_file(LOOP_FILE, overrides=["training.seed=7", "training.lr=0.002", "training.hidden=[8]"])
    _gate(trained_with, _make_run(trained_with, storage))
    loop_now = load_loop_file(LOOP_FILE, overrides=["training.hidden=[8]"])
    bundle = pipeline.publish_run(loop_now, storage, "r").bundle
    origin = bundle.manifest["origin"]
    assert origin["seeds"]["training"] == origin["loop"]["training"]["seed"] == 7
    assert origin["loop"]["training"]["lr"] == 0.002 != loop_now.training.lr
    assert "| seed | 7 |" in (bundle.path / "card.md").read_text()


def test_a_bundle_says_between_which_times_its_run_learned(loop: LoopConfig, storage: Storage) -> None:
    run = _make_run(loop, storage)
    for times in ((100.0, 130.0), (500.0, 520.0)):  # a run and its continuation
        events = EventFile(run / TENSORBOARD, now=times[0], purge_step=0)
        events.append(1, {"return/mean": 1.0}, now=times[1])
        events.close()
    (run / TENSORBOARD / "events.out.tfevents.000002").open("ab").write(b"torn")
    _gate(loop, run)
    bundle = pipeline.publish_run(loop, storage, "r").bundle
    assert bundle.manifest["origin"]["data_range"] == {"env_steps": 0, "from": 100.0, "to": 520.0}


def test_a_run_that_was_judged_without_keeping_its_steps_is_judged_again(loop: LoopConfig, storage: Storage) -> None:
    run = _make_run(loop, storage)
    _gate(loop, run)
    (run / pipeline.REFERENCE).unlink()
    with pytest.raises(GateRefused, match=r"has no reference\.parquet.*run `trimtab gate` again"):
        pipeline.publish_run(loop, storage, "r")


def test_names_and_units_of_features_are_in_the_bundle_and_change_neither_policy_nor_verdict(
    loop: LoopConfig, storage: Storage
) -> None:
    _gate(loop, _make_run(loop, storage))
    names = "environment.observation_names=[position, velocity, angle, spin]"
    named = load_loop_file(LOOP_FILE, overrides=[names, "environment.observation_units=[m, m/s, rad, rad/s]"])
    bundle = pipeline.publish_run(named, storage, "r").bundle  # judged under a loop file without them
    assert bundle.manifest["spaces"]["names"] == ["position", "velocity", "angle", "spin"]
    assert bundle.manifest["spaces"]["units"] == ["m", "m/s", "rad", "rad/s"]
    assert bundle.policy.sha256() == load_policy(storage.run("r"))[0].sha256()
    short = load_loop_file(LOOP_FILE, overrides=["environment.observation_names=[position]"])
    with pytest.raises(ConfigError, match="observation_names has 1 entries, an observation has 4 features"):
        read_spaces(short.environment)


def test_a_loop_that_requires_signatures_publishes_with_a_key_only(storage: Storage) -> None:
    loop = load_loop_file(LOOP_FILE, overrides=["serving.require_signature=true"])
    _gate(loop, _make_run(loop, storage))
    with pytest.raises(SignatureRefused, match="--key"):
        pipeline.publish_run(loop, storage, "r")
    assert Registry(storage.registry(loop.name)).state().versions == {}
    _, public_path = create_key(storage, "release")
    TrustStore(storage.trust).trust(public_path.read_bytes(), name="release", expires_at=None, now=0.0)
    key = SigningKey.load(storage, "release", now=0.0)
    published = pipeline.publish_run(loop, storage, "r", key=key)
    signed = TrustStore(storage.trust).verify(published.bundle.path, now=0.0)
    assert published.is_champion and signed.claims == {"policy": loop.name, "version": 1}


def test_publishing_goes_on_where_it_was_cut_short_before_signing(storage: Storage) -> None:
    loop = load_loop_file(LOOP_FILE, overrides=["serving.require_signature=true"])
    run = _make_run(loop, storage)
    _gate(loop, run)
    _, public_path = create_key(storage, "release")
    TrustStore(storage.trust).trust(public_path.read_bytes(), name="release", expires_at=None, now=0.0)
    key = SigningKey.load(storage, "release", now=0.0)
    with pytest.raises(SignatureRefused, match="died"):
        pipeline.publish_run(loop, storage, "r", key=_DyingKey(key.fingerprint, key.private_pem))
    state = Registry(storage.registry(loop.name)).state()
    assert list(state.versions) == [1] and state.champion is None  # nothing unsigned has become champion
    assert pipeline.publish_run(loop, storage, "r", key=key).is_champion
    assert list(Registry(storage.registry(loop.name)).state().versions) == [1]


class _DyingKey(SigningKey):
    def sign(self, directory: Path, claims: dict) -> Path:
        raise SignatureRefused("died")
