"""Observations of every kind: what an environment shows and what a request says become the same features."""

import json
import math
import tracemalloc
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces as gym_spaces
from gymnasium.vector import SyncVectorEnv

from policies.errors import IntegrityError, RequestInvalid, SpaceUnsupported
from policies.spaces import MAX_FEATURES, Spaces
from trimtab.drive import request_of

TWO_ACTIONS = gym_spaces.Discrete(2)


class Shows(gymnasium.Env):
    """Shows samples of a space, and keeps the last one."""

    action_space = TWO_ACTIONS

    def __init__(self, observation_space: gymnasium.Space, seed: int) -> None:
        self.observation_space = observation_space
        observation_space.seed(seed)
        self.shown: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.shown = self.observation_space.sample()
        return self.shown, {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.reset()[0], 0.0, False, False, {}


def random_space(rng: np.random.Generator, depth: int = 3) -> gymnasium.Space:
    """Return a space of any kind, nested up to `depth` deep."""
    kind = rng.choice(["box", "bytes", "discrete", "multi_discrete", "multi_binary", "tuple", "dict"][: 7 if depth else 5])
    shape = tuple(rng.integers(1, 4, rng.integers(0, 4)).tolist())
    if kind == "box":
        low = np.where(rng.random(shape) < 0.3, -np.inf, rng.uniform(-5, 0, shape))
        high = np.where(rng.random(shape) < 0.3, np.inf, rng.uniform(0, 5, shape))
        dtype = rng.choice([np.float32, np.float64])
        return gym_spaces.Box(low.astype(dtype), high.astype(dtype), shape, dtype)
    if kind == "bytes":
        return gym_spaces.Box(0, 255, shape, rng.choice([np.uint8, np.int32]))
    if kind == "discrete":
        return gym_spaces.Discrete(int(rng.integers(1, 6)), start=int(rng.integers(-3, 4)))
    if kind == "multi_discrete":
        nvec = rng.integers(1, 5, shape or (2,))
        return gym_spaces.MultiDiscrete(nvec, start=rng.integers(-3, 4, nvec.shape))
    if kind == "multi_binary":
        return gym_spaces.MultiBinary(shape or 3)
    parts = [random_space(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    if kind == "tuple":
        return gym_spaces.Tuple(parts)
    return gym_spaces.Dict(dict(zip(rng.permutation(["b", "a c", "Z"]).tolist(), parts)))  # sorted by Gymnasium


def kinds_in(space: gymnasium.Space) -> set[str]:
    parts = {"Tuple": lambda: space.spaces, "Dict": lambda: space.spaces.values()}.get(type(space).__name__, list)()
    return {type(space).__name__}.union(*(kinds_in(part) for part in parts))


def as_request(observation: Any) -> Any:
    """Return an observation as it arrives over HTTP."""
    return json.loads(json.dumps(request_of(observation, {})))["observation"]


RANDOM_SPACES = [random_space(np.random.default_rng(seed)) for seed in range(80)]


def test_the_random_spaces_are_of_every_kind_and_nested() -> None:
    assert set().union(*map(kinds_in, RANDOM_SPACES)) == {"Box", "Discrete", "MultiDiscrete", "MultiBinary", "Tuple", "Dict"}
    assert sum(isinstance(space, gym_spaces.Tuple | gym_spaces.Dict) for space in RANDOM_SPACES) > 10


@pytest.mark.parametrize("seed", range(len(RANDOM_SPACES)))
def test_a_batch_a_request_and_gymnasiums_own_flattening_are_the_same_features(seed: int) -> None:
    space, num_envs = RANDOM_SPACES[seed], 3
    envs = [Shows(space, seed * 10 + index) for index in range(num_envs)]
    vector_env = SyncVectorEnv([lambda env=env: env for env in envs], copy=False)
    ours = Spaces.from_gymnasium(space, TWO_ACTIONS)
    for observations in (vector_env.reset()[0], vector_env.step(np.zeros(num_envs, int))[0]):
        obs_BD = ours.encode_batch(observations, num_envs)
        assert obs_BD.dtype == np.float32
        for env, obs_D in zip(envs, obs_BD):
            from_request_D = ours.check_observation(as_request(env.shown))
            assert from_request_D.dtype == np.float32
            assert obs_D.tolist() == from_request_D.tolist()
            assert obs_D.tolist() == gym_spaces.flatten(space, env.shown).astype(np.float32).tolist()
            assert (ours.low_D <= obs_D).all() and (obs_D <= ours.high_D).all()
    # Negative control: another observation has other features, unless there is only one.
    other_D = ours.encode_batch(vector_env.reset()[0], num_envs)
    assert other_D.shape == obs_BD.shape and (not np.array_equal(other_D, obs_BD) or np.ptp(other_D, axis=0).max() == 0)


@pytest.mark.parametrize("seed", range(len(RANDOM_SPACES)))
def test_spaces_survive_the_way_through_json(seed: int) -> None:
    ours = Spaces.from_gymnasium(RANDOM_SPACES[seed], TWO_ACTIONS)
    again = Spaces.from_json(json.loads(json.dumps(ours.to_json())))
    assert again.to_json() == ours.to_json() and again.interface() == ours.interface()
    assert np.array_equal(again.low_D, ours.low_D) and np.array_equal(again.high_D, ours.high_D)
    request = as_request(Shows(RANDOM_SPACES[seed], seed).reset()[0])
    assert np.array_equal(again.check_observation(request), ours.check_observation(request))
    assert len(ours.check_observation(ours.example_request()["observation"])) == ours.num_features  # an example is valid


def test_the_order_of_a_dicts_keys_means_nothing() -> None:
    parts = {"b": gym_spaces.Discrete(2), "a": gym_spaces.Box(0, 9, (1,))}
    ours = Spaces.from_gymnasium(gym_spaces.Dict(list(parts.items())), TWO_ACTIONS)
    assert ours.check_observation({"b": 1, "a": [7]}).tolist() == [7, 0, 1]
    assert ours.encode_batch({"b": np.array([1]), "a": np.array([[7.0]])}, 1).tolist() == [[7, 0, 1]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bound", [0.7, 0.1, 1 / 3, 1e-3, 123.456])
def test_an_observation_at_its_bound_is_within(bound: float, dtype: type) -> None:
    """Bounds are kept as float32; 0.7 as a float64 is larger than that, and still what the environment allows."""
    space = gym_spaces.Box(-bound, bound, (1,), dtype)
    ours = Spaces.from_gymnasium(space, TWO_ACTIONS)
    for edge in (space.low, space.high):
        assert ours.check_observation(as_request(edge)) == ours.encode_batch(edge[None], 1)[0]
    for beyond in (-bound * 1.000001, bound * 1.000001):  # the control
        with pytest.raises(RequestInvalid, match="is outside"):
            ours.check_observation([beyond])


def test_what_is_rounded_beyond_a_bound_is_outside_of_it() -> None:
    """1 + 2^-23 is odd in its last bit: halfway to the next float32 is rounded away from it, to 1 + 2^-22, which is outside."""
    bound = np.float32(1 + 2**-23)
    ours = Spaces.from_gymnasium(gym_spaces.Box(-bound, bound, (1,)), TWO_ACTIONS)
    halfway = 1 + 1.5 * 2**-23
    assert np.float32(halfway) > bound
    for sign in (-1, 1):
        with pytest.raises(RequestInvalid, match="is outside"):
            ours.check_observation([sign * halfway])
        largest = ours.check_observation([sign * math.nextafter(halfway, 0)])  # the control: what is rounded to the bound is in
        assert largest.tolist() == [sign * bound]
    even = np.float32(1)  # halfway is rounded to it
    assert Spaces.from_gymnasium(gym_spaces.Box(-even, even, (1,)), TWO_ACTIONS).check_observation([1 + 2**-24]).tolist() == [1]


NESTED = Spaces.from_gymnasium(
    gym_spaces.Dict(
        {
            "pose": gym_spaces.Tuple([gym_spaces.Box(-1, 1, (2,)), gym_spaces.Discrete(3)]),
            "bits": gym_spaces.MultiBinary((2, 2)),
            "multi": gym_spaces.MultiDiscrete([2, 3], start=[0, 5]),
            "free": gym_spaces.Box(-np.inf, np.inf, ()),
        }
    ),
    TWO_ACTIONS,
)
RIGHT = {"pose": [[0.5, -1], 2], "bits": [[0, 1], [1, 0]], "multi": [1, 7], "free": 1e30}


def test_features_of_a_nested_observation_are_in_the_order_of_the_names() -> None:
    # bits 0 1 1 0 · free · multi: second of 2, third of 3 · pose: the numbers, third of 3
    assert NESTED.check_observation(RIGHT).tolist() == [0, 1, 1, 0, np.float32(1e30), 0, 1, 0, 0, 1, 0.5, -1, 0, 0, 1]


WRONG = [
    ({"pose": None}, "observation.pose must be a list of 2 observations"),
    ({"pose": [[0, 0]]}, "observation.pose must be a list of 2 observations"),
    ({"pose": [[0], 0]}, "observation.pose[0] has 1 items; expected a list of 2 finite numbers"),
    ({"pose": [[0, 1.5], 0]}, "observation.pose[0][1] = 1.5 is outside [-1, 1]"),
    ({"pose": [[0, float("nan")], 0]}, "observation.pose[0][1] = nan is outside"),
    ({"pose": [[0, True], 0]}, "observation.pose[0][1] is bool"),
    ({"pose": [[0, "1"], 0]}, "observation.pose[0][1] is str"),
    ({"pose": [[0, 0], 3]}, "observation.pose[1] = 3 is not an integer from 0 to 2"),
    ({"pose": [[0, 0], 1.0]}, "observation.pose[1] = 1.0 is not an integer from 0 to 2"),
    ({"pose": [[0, 0], True]}, "observation.pose[1] = True is not an integer"),
    ({"pose": [[0, 0], [1]]}, "observation.pose[1] = [1] is not an integer"),
    ({"bits": [[0, 1], [2, 0]]}, "observation.bits[1][0] = 2 is neither 0 nor 1"),
    ({"bits": [[0, 1], [0, False]]}, "observation.bits[1][1] = False is neither 0 nor 1"),
    ({"bits": [[0, 1], [1]]}, "observation.bits[1] has 1 items; expected a list of 2 zeros and ones"),
    ({"bits": [0, 1, 1, 0]}, "observation.bits has 4 items; expected a list of 2 x 2 zeros and ones"),
    ({"bits": [0, 1]}, "observation.bits[0] is int; expected a list of 2 zeros and ones"),
    ({"multi": [1, 4]}, "observation.multi[1] = 4 is not an integer from 5 to 7"),
    ({"multi": 1}, "observation.multi is int; expected a list of 2 integers"),
    ({"free": [1]}, "observation.free is list; expected one of finite numbers"),
    ({"free": 1e39}, "observation.free = 1e+39 is outside"),
    ({"free": None}, "observation.free is NoneType"),
    (
        {"extra": 1},
        "observation must be an object with exactly the keys ['bits', 'free', 'multi', 'pose'], found ['bits', 'extra'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_value_is_refused_and_its_place_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestInvalid) as raised:
        NESTED.check_observation(RIGHT | changes)
    assert message in str(raised.value)
    NESTED.check_observation(RIGHT)  # the control


def test_a_missing_key_or_another_type_is_refused() -> None:
    for wrong in ({name: RIGHT[name] for name in ("pose", "bits", "free")}, [RIGHT], "pose", None):
        with pytest.raises(RequestInvalid, match="observation must be an object with exactly the keys"):
            NESTED.check_observation(wrong)


@pytest.mark.parametrize(
    ("space", "shown", "words"),
    [
        (gym_spaces.Box(0, 1, (2,)), np.zeros((1, 3)), r"shape \(1, 3\), its space says \(1, 2\)"),
        (gym_spaces.Discrete(3), np.array([3]), r"\[\[3\]\], outside"),
        (gym_spaces.Discrete(3, start=1), np.array([0]), r"\[\[0\]\], outside"),
        (gym_spaces.MultiBinary(2), np.zeros((1, 3)), r"shape \(1, 3\)"),
        (
            gym_spaces.Dict(a=gym_spaces.Tuple([gym_spaces.Discrete(2)])),
            {"a": (np.array([2]),)},
            r"\['a'\] \[0\] holds \[\[2\]\]",
        ),
        (gym_spaces.Dict(a=gym_spaces.Discrete(2)), {"b": np.array([1])}, r"\['a'\] 'a'"),
    ],
)
def test_what_an_environment_shows_outside_of_its_space_is_refused(space: gymnasium.Space, shown: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Spaces.from_gymnasium(space, TWO_ACTIONS).encode_batch(shown, 1)


@pytest.mark.parametrize(
    "space",
    [
        gym_spaces.Text(3),
        gym_spaces.Sequence(gym_spaces.Discrete(2)),
        gym_spaces.Graph(gym_spaces.Discrete(2), None),
        gym_spaces.Dict(a=gym_spaces.Discrete(2), b=gym_spaces.Tuple([gym_spaces.Text(3)])),
        gym_spaces.Dict({1: gym_spaces.Discrete(2)}),
        gym_spaces.Box(0, 1, (0,)),
        gym_spaces.Discrete(MAX_FEATURES + 1),
        gym_spaces.Discrete(10**12),
        gym_spaces.MultiBinary(MAX_FEATURES + 1),
    ],
    ids=str,
)
def test_observation_spaces_that_cannot_be_encoded_are_refused(space: gymnasium.Space) -> None:
    with pytest.raises(SpaceUnsupported):
        Spaces.from_gymnasium(space, TWO_ACTIONS)


BOX = {"kind": "box", "shape": [2], "low": [0, 0], "high": [1, None]}
ACTION = {"kind": "discrete", "n": 2, "start": 0}
HOSTILE = [
    {},
    {"observation": BOX},
    {"observation": [], "action": ACTION},
    {"observation": BOX, "action": None},
    {"observation": {"kind": "picture"}, "action": ACTION},
    {"observation": BOX | {"shape": [3]}, "action": ACTION},
    {"observation": BOX | {"shape": [-2]}, "action": ACTION},
    {"observation": BOX | {"shape": [10**9, 10**9], "low": 0, "high": 1}, "action": ACTION},
    {"observation": BOX | {"shape": [10**8], "low": 0, "high": 1}, "action": ACTION},
    {"observation": {"kind": "discrete", "n": 10**12, "start": 0}, "action": ACTION},
    {"observation": {"kind": "discrete", "n": 0, "start": 0}, "action": ACTION},
    {"observation": {"kind": "tuple", "parts": [BOX, {"kind": "discrete", "n": -1, "start": 0}]}, "action": ACTION},
    {"observation": {"kind": "multi_binary", "shape": [10**6, 10**6]}, "action": ACTION},
    {"observation": {"kind": "multi_binary", "shape": [-1, -4]}, "action": ACTION},
    {"observation": {"kind": "multi_discrete", "nvec": [2, 2], "starts": [0], "shape": [2]}, "action": ACTION},
    {"observation": {"kind": "multi_discrete", "nvec": [2, 2], "starts": [0, 0], "shape": [3]}, "action": ACTION},
    {"observation": {"kind": "tuple", "parts": []}, "action": ACTION},
    {"observation": BOX, "action": {"kind": "discrete", "n": 10**12, "start": 0}},
    {"observation": BOX, "action": {"kind": "discrete", "n": 0, "start": 0}},
    {"observation": BOX, "action": {"kind": "multi_discrete", "nvec": [2, 2], "starts": [0], "shape": [2]}},
    {"observation": BOX, "action": {"kind": "multi_discrete", "nvec": [2, 2], "starts": [0, 0], "shape": [3]}},
    {"observation": BOX, "action": {"kind": "multi_binary", "shape": [10**9]}},
    {"observation": BOX, "action": {"kind": "box", "shape": [10**9], "low": 0, "high": 1}},
    {"observation": BOX, "action": {"kind": "box", "shape": [], "low": [], "high": []}},
    {"observation": BOX | {"shape": [1e999]}, "action": ACTION},
    {"observation": BOX | {"low": [0, 10**400]}, "action": ACTION},
    {"observation": BOX | {"low": "nan"}, "action": ACTION},
    {"observation": BOX | {"low": [0, "nan"]}, "action": ACTION},
    {"observation": {"kind": "tuple", "parts": [BOX | {"shape": [10**5], "low": None, "high": None}] * 100}, "action": ACTION},
    {"observation": {"kind": "multi_binary", "shape": [1] * 1000}, "action": ACTION},
    {"observation": BOX, "action": {"kind": "box", "shape": [2], "low": None, "high": None}, "has_mask": True},
]


def _deep() -> dict[str, Any]:
    observation: dict[str, Any] = BOX
    for _ in range(5_000):
        observation = {"kind": "tuple", "parts": [observation]}
    return {"observation": observation, "action": ACTION}


@pytest.mark.parametrize("value", [*HOSTILE, _deep()], ids=lambda value: str(len(value)))
def test_a_description_that_is_damaged_or_hostile_is_refused_before_it_costs_memory(value: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="spaces cannot be read"):
            Spaces.from_json(value)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_the_undamaged_description_is_read() -> None:
    """Negative control of the above."""
    ours = Spaces.from_json({"observation": BOX, "action": ACTION})
    assert ours.low_D.tolist() == [0, 0] and ours.high_D.tolist() == [1, np.inf]


def test_the_interface_leaves_out_bounds_and_nothing_else() -> None:
    def spaces(*names: str, high: float = 1.0) -> Spaces:
        return Spaces.from_gymnasium(gym_spaces.Dict({name: gym_spaces.Box(0, high, (1,)) for name in names}), TWO_ACTIONS)

    assert spaces("a", "b").interface() == spaces("a", "b", high=2.0).interface()
    assert spaces("a", "b").interface() != spaces("a", "c").interface()
    assert spaces("a", "low").interface() != spaces("a", "high").interface()  # here these are names, not bounds
