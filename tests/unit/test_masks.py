"""Action masks end to end: what does not exist is never chosen, in rollouts, evaluation, bundle, serving and replay alike."""

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from policies.bundle import read_bundle, write_bundle
from policies.errors import EnvironmentFailed, IntegrityError, RequestInvalid, SpaceUnsupported
from policies.golden import Golden
from policies.log_reader import LogTail
from policies.network import Architecture
from policies.policy import Policy
from policies.records import Decision
from policies.spaces import Spaces
from policies.storage import Storage, open_storage
from serve_app.replica import PolicyReplica
from tests.bundles import golden_as_trained, make_report, policy_on
from tests.serving_helpers import NAME, Reply, call, publish, read_new, replica_of
from tests.training_environments import allowed_choices
from training.config import EnvironmentConfig, TrainingConfig
from training.environment import VectorEnvironment, check_environment, read_spaces
from training.evaluation import EvaluationRequest, evaluate
from training.learner_state import LearnerState
from training.network import Layout, Weights, layout_of
from training.ppo import PPO
from training.rollout import Shard
from trimtab.drive import request_of
from trimtab.replay import replay

ALL_WAYS = [
    {"observed": observed, "flat": flat, "last": last}
    for observed in (False, True)
    for flat in (False, True)
    for last in ("mask", "zeros", "absent")
    if not (observed and last == "absent")
]
SETTINGS = TrainingConfig(
    num_shards=1, num_env_runners=1, num_envs_per_shard=5, rollout_fragment_length=40, minibatch_size=64, hidden=(8,)
)


def environment_of(name: str = "Masked-v0", **kwargs: Any) -> EnvironmentConfig:
    return EnvironmentConfig(id=f"tests.training_environments:{name}", kwargs=kwargs)


def stubborn_weights(layout: Layout) -> Weights:
    """Return weights that want the first choice most and every later one less: without a mask it would often not exist."""
    weights = LearnerState.initial(layout, 0).weights()
    bias_O = layout.split(weights.parameters_P)[f"policy.{layout.num_layers - 1}.bias"]
    bias_O[:] = -10 * np.arange(len(bias_O))
    return weights


def layout_for(environment: EnvironmentConfig) -> Layout:
    return layout_of(read_spaces(environment), SETTINGS)


@pytest.mark.parametrize("name", ["Masked-v0", "MaskedInTheSameStep-v0"])
@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_rollouts_and_evaluation_never_choose_what_does_not_exist(name: str, way: dict[str, Any]) -> None:
    environment = environment_of(name, **way)  # raises when it is asked for what does not exist
    layout = layout_for(environment)
    assert layout.spaces.has_mask and layout.spaces.mask_size == 6 and layout.spaces.num_features == 1
    weights = stubborn_weights(layout)
    rollout = Shard(environment, SETTINGS, 0, update=0, attempt=0).collect(weights, update=0)
    assert rollout.masks_TBA is not None and np.isfinite(rollout.logp_TB).all()
    is_running_TB = rollout.valid_TB & (rollout.obs_TBD[:-1, :, 0] < 3)
    expected_NA = np.array([allowed_choices(int(place)) for place in rollout.obs_TBD[:-1][is_running_TB][:, 0]])
    assert np.array_equal(rollout.masks_TBA[is_running_TB], expected_NA.astype(bool))
    policy = weights.policy(layout)
    for mode in ("greedy", "sample"):
        result = evaluate(environment, EvaluationRequest(policy, num_episodes=7, seed=0, mode=mode, keep_steps=True))
        assert result.lengths_E.tolist() == [3] * 7
        assert np.array_equal(result.masks_NA, [allowed_choices(int(place)) for place in result.obs_ND[:, 0]])


def test_a_mask_may_be_lists_of_pythons() -> None:
    environment, same = environment_of(gives="list"), environment_of()
    weights = stubborn_weights(layout_for(environment))
    rollouts = [Shard(config, SETTINGS, 0, update=0, attempt=0).collect(weights, update=0) for config in (environment, same)]
    assert np.array_equal(rollouts[0].masks_TBA, rollouts[1].masks_TBA) and not rollouts[0].masks_TBA.all()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_mask_may_have_rows_of_different_lengths(vectorization: str) -> None:
    environment = environment_of("MaskedByRows").model_copy(update={"max_episode_steps": 9, "vectorization": vectorization})
    check_environment(environment)
    shard = Shard(environment, SETTINGS, 0, update=0, attempt=0)
    rollout = shard.collect(stubborn_weights(layout_for(environment)), update=0)
    shard.close()
    assert np.array_equal(np.unique(rollout.masks_TBA[rollout.valid_TB], axis=0), [[True, True, False, True, False]])


@pytest.mark.parametrize("way", [{}, {"observed": True, "flat": True}], ids=str)
def test_the_environment_would_notice_a_policy_that_does_not_look_at_the_mask(way: dict[str, Any]) -> None:
    """Negative control: the same policy with every choice allowed takes one that does not exist."""
    environment = VectorEnvironment(environment_of(**way), 2, seed=0)
    policy = stubborn_weights(layout_for(environment_of(**way))).policy(layout_for(environment_of(**way)))
    everything_BA = np.ones((2, 6), bool)
    with pytest.raises(EnvironmentFailed, match=r"ValueError in step: action .* does not exist in step"):
        for _ in range(3):
            rows_BP = policy.distributions(environment.obs_BD, everything_BA)
            environment.step(policy.distribution.choose_rows(rows_BP, "greedy", np.random.default_rng(0)))


@pytest.mark.parametrize("way", ALL_WAYS[::3], ids=str)
def test_learning_with_masks_keeps_finite_parameters_and_finds_the_better_choice(way: dict[str, Any]) -> None:
    environment = environment_of(**way)
    training = SETTINGS.model_copy(update={"num_epochs": 4, "lr": 0.01, "entropy_coeff": 0.001})
    layout = layout_of(read_spaces(environment), training)
    learner = PPO(layout, training, LearnerState.initial(layout, 0))
    shard = Shard(environment, training, 0, update=0, attempt=0)
    for update in range(25):
        report = learner.update([shard.collect(learner.state.weights(), update=update)])
    assert np.isfinite(report.entropy) and np.isfinite(report.kl)
    policy = learner.state.weights().policy(layout)
    returns_E = evaluate(environment, EvaluationRequest(policy, num_episodes=3, seed=0)).returns_E
    # Later choices pay more. Flat, 0 and 4 are missing, then 1 and 5, then 2 and 3: 5 + 4 + 5. By halves 0, 1, 2: 2 + 2 + 1.
    assert returns_E.tolist() == [14 if way["flat"] else 5] * 3
    untrained = stubborn_weights(layout).policy(layout)
    assert (
        evaluate(environment, EvaluationRequest(untrained, num_episodes=3, seed=0)).returns_E.tolist() == [1] * 3
    )  # the control: 1 + 0 + 0


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (environment_of(gives="nothing"), "allows nothing, in environment 0; end the episode instead"),
        (environment_of(gives="nothing", observed=True), "allows nothing, in environment 0; end the episode instead"),
        (environment_of(gives="four"), "action_mask of 4 choices, its action space has 6"),
        (environment_of(gives="none"), "gave action_mask in `info` before, but not in this step"),
        (environment_of("MaskedInTheSameStep-v0", remembers=False), "gave action_mask in `info` before, but not in this step"),
    ],
    ids=str,
)
def test_a_mask_that_is_missing_or_wrong_is_told(environment: EnvironmentConfig, words: str) -> None:
    vector = VectorEnvironment(environment, 2, seed=0)
    layout = layout_for(environment)
    policy = stubborn_weights(layout).policy(layout)
    with pytest.raises(EnvironmentFailed, match=words):
        for _ in range(3):
            rows_BP = policy.distributions(vector.obs_BD, vector.mask_BA)
            vector.step(policy.distribution.choose_rows(rows_BP, "greedy", np.random.default_rng(0)))


class ForgetsAtFirst(gymnasium.Env):
    """Gives a mask in every step, but not when it resets."""

    observation_space, action_space = gymnasium.spaces.Box(0, 1, (1,)), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(1, np.float32), 0.0, False, False, {"action_mask": np.ones(2, np.int8)}


def test_a_mask_that_comes_only_after_the_reset_is_not_silently_left_out() -> None:
    vector = VectorEnvironment(EnvironmentConfig(id=f"{__name__}:ForgetsAtFirst"), 2, seed=0)
    assert not vector.spaces.has_mask
    with pytest.raises(EnvironmentFailed, match="not when it was reset"):
        vector.step(np.zeros(2, int))


def test_real_numbers_cannot_be_masked() -> None:
    space = gymnasium.spaces.Dict(action_mask=gymnasium.spaces.MultiBinary(2), x=gymnasium.spaces.Box(0, 1))
    with pytest.raises(SpaceUnsupported, match="cannot be masked"):
        Spaces.from_gymnasium(space, gymnasium.spaces.Box(0, 1, (1,)))


@pytest.mark.parametrize("observed", [False, True])
def test_a_masked_environment_passes_the_checker(observed: bool) -> None:
    """It draws actions from the whole space, and this environment raises for one that does not exist."""
    for _ in range(10):  # different ones each time
        check_environment(environment_of(observed=observed))
        check_environment(environment_of(observed=observed, flat=True))


MASKS_NA = np.array([allowed_choices(step) for step in range(32)], bool)


def masked_policy(way: dict[str, Any], seed: int = 0) -> Policy:
    return policy_on(read_spaces(environment_of(**way)), Architecture((8,)), seed)


@pytest.mark.parametrize("way", ALL_WAYS[::3], ids=str)
def test_a_bundle_carries_masks_and_its_policy_gives_the_same_distributions(tmp_path: Path, way: dict[str, Any]) -> None:
    policy = masked_policy(way)
    golden = golden_as_trained(policy, MASKS_NA)
    assert (golden.distributions_NP[~MASKS_NA] == 0).all()
    options = {"gate_report": make_report(policy), "mode": "sample", "origin": {}, "created_at": 1.0}
    bundle = read_bundle(write_bundle(tmp_path, policy=policy, golden=golden, **options).path)
    assert bundle.policy.spaces.has_mask and np.array_equal(bundle.golden.masks_NA[:32], MASKS_NA)
    again_NP = bundle.policy.distributions(golden.observations_ND, MASKS_NA)
    assert np.array_equal(again_NP, policy.distributions(golden.observations_ND, MASKS_NA))
    # Negative controls: golden vectors of other masks, or without any, are not this policy's.
    for masks_NA, words in ((np.roll(MASKS_NA, 1, axis=0), "differs from its golden"), (None, "golden vectors have shapes")):
        with pytest.raises(IntegrityError, match=words):
            write_bundle(tmp_path, policy=policy, golden=dataclasses.replace(golden, masks_NA=masks_NA), **options)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


def served(storage: Storage, policy: Policy, golden: Golden) -> PolicyReplica:
    publish(storage, policy, golden=golden)
    return replica_of(storage)


def decide(storage: Storage, replica: PolicyReplica, bodies: list[dict[str, Any]]) -> list[Reply]:
    key = storage.api_key_file.read_text()

    async def run() -> list[Reply]:
        return await asyncio.gather(*[call(replica.api, "POST", "/v1/decide", json.dumps(b).encode(), key=key) for b in bodies])

    return asyncio.run(run())


@pytest.mark.parametrize("way", [way for way in ALL_WAYS if way["last"] == "mask"], ids=str)
def test_requests_with_masks_get_what_exists_and_replay_bit_for_bit(storage: Storage, way: dict[str, Any]) -> None:
    environment = gymnasium.make("tests.training_environments:Masked-v0", **way)
    policy = masked_policy(way)
    replica = served(storage, policy, golden_as_trained(policy, MASKS_NA))
    requests = []
    for seed in range(30):  # whole episodes, driven as `trimtab drive` does
        observation, info = environment.reset(seed=seed)
        for _ in range(3):
            requests.append(request_of(observation, info))
            [reply] = decide(storage, replica, [requests[-1]])
            assert reply.status == 200, reply.body
            action = reply.json()["action"]
            observation, _, _, _, info = environment.step(action if way["flat"] else np.array(action))
    decisions = read_new(LogTail(storage.decisions(NAME), Decision))
    assert len(decisions) == 90
    for request, decision in zip(requests, decisions):
        mask = request["observation"]["action_mask"] if way["observed"] else request["action_mask"]
        assert decision.action_mask == np.array(mask, bool).reshape(-1).tolist()
        again = replay(storage, NAME, decision.decision_id)
        assert again["equal"] and again["recomputed"] == again["logged"]
    # Nearly all choices come up some time: the mask does not fix the action. (The rarest has 2 %, and seeds are secret.)
    assert len({str(decision.action) for decision in decisions}) >= (4 if way["flat"] else 6)


WRONG_MASKS = [
    (None, "action_mask is missing; expected a list of 6"),
    ([1] * 5, "expected a list of 6"),
    ([1] * 7, "expected a list of 6"),
    ([1, 1, 1, 1, 1, 2], "something else than 0 and 1"),
    ([0] * 6, "allows no choice at all"),
]


@pytest.mark.parametrize(("mask", "message"), WRONG_MASKS)
@pytest.mark.parametrize("observed", [False, True])
def test_a_request_without_a_usable_mask_is_refused(storage: Storage, observed: bool, mask: Any, message: str) -> None:
    policy = masked_policy({"observed": observed, "flat": True})
    replica = served(storage, policy, golden_as_trained(policy, MASKS_NA))

    def body(mask: Any) -> dict[str, Any]:
        named = {} if mask is None else {"action_mask": mask}
        return {"observation": {"place": [1], **named}} if observed else {"observation": [1], **named}

    good, bad = decide(storage, replica, [body([1, 0, 0, 0, 0, 1]), body(mask)])
    assert good.status == 200
    assert bad.status == 422 and message in bad.error
    assert len(read_new(LogTail(storage.decisions(NAME), Decision))) == 1


def test_a_mask_may_have_the_shape_of_the_action() -> None:
    spaces = read_spaces(environment_of())
    flat_A = spaces.check_mask([1, 0, 0, 0, 1, 1])
    assert np.array_equal(spaces.check_mask([[1, 0, 0], [0, 1, 1]]), flat_A)
    for ragged in ([[1, 0, 0], [0, 1]], [[1, 0, 0], 0, 1, 1], [[[1, 0, 0], [0, 1, 1]], 1]):
        with pytest.raises(RequestInvalid, match="expected a list of 6"):
            spaces.check_mask(ragged)


def test_one_component_without_a_choice_is_refused() -> None:
    spaces = read_spaces(environment_of())  # two components of three choices
    with pytest.raises(RequestInvalid, match="at least one component"):
        spaces.check_mask([1, 1, 1, 0, 0, 0])
    assert spaces.check_mask([1, 0, 0, True, False, False]).tolist() == [True, False, False] * 2


def test_a_mask_in_both_places_is_refused(storage: Storage) -> None:
    policy = masked_policy({"observed": True, "flat": True})
    replica = served(storage, policy, golden_as_trained(policy, MASKS_NA))
    mask = [1, 0, 0, 0, 0, 1]
    [reply] = decide(storage, replica, [{"observation": {"place": [1], "action_mask": mask}, "action_mask": mask}])
    assert reply.status == 422 and "twice" in reply.error
    [reply] = decide(storage, replica, [{"observation": {"place": [1]}, "action_mask": mask}])  # either one alone is fine
    assert reply.status == 200
