"""Does ONNX Runtime compute what the policy computes, with bits that no batch changes, and only where it may?"""

import warnings

import numpy as np
import pytest

from policies import onnx_engine
from policies.errors import ConfigError, IntegrityError
from policies.network import Architecture, Convolution, Gaussian
from policies.observations import Box
from policies.onnx_engine import OnnxEngine, engine_named, installed_name
from policies.policy import Policy
from policies.spaces import Choices, Numbers, Spaces
from tests.bundles import make_policy, policy_on, vector_spaces

BOUND = np.ones(3, np.float32)
SEVERAL = Spaces(Box(-BOUND, BOUND), Choices("multi_discrete", (2, 3), (0, 1), (2,)))
MASKED = Spaces(Box(-BOUND, BOUND), Choices("discrete", (4,), (0,), ()), True)
REAL = Spaces(Box(-BOUND, BOUND), Numbers(-BOUND, BOUND))
POLICIES = {
    "small": lambda: make_policy(1),
    "large": lambda: make_policy(1, num_features=128, num_actions=18, hidden=(512, 512)),
    "odd": lambda: make_policy(1, num_features=27, num_actions=5, hidden=(33, 17)),
    "linear": lambda: make_policy(1, num_features=3, hidden=()),
    "relu, clipped": lambda: policy_on(vector_spaces(7, 3), Architecture((130,), "relu", observation_clip=0.5)),
    "several choices": lambda: policy_on(SEVERAL, Architecture((8,))),
    "masks": lambda: policy_on(MASKED, Architecture((8,))),
    "numbers": lambda: policy_on(REAL, Architecture((8,), gaussian=Gaussian())),
    "numbers, both from the network": lambda: policy_on(REAL, Architecture((8,), gaussian=Gaussian(std="output"))),
}


def observations(policy: Policy, num: int = 200) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((num, policy.spaces.num_features)).astype(np.float32)


@pytest.mark.parametrize("kind", POLICIES)
def test_it_computes_the_same_function(kind: str) -> None:
    policy = POLICIES[kind]()
    engine, obs_ND = OnnxEngine(policy), observations(policy)
    masks_NA = np.tile([True, False, True, True], (200, 1)) if policy.spaces.has_mask else None
    # Sums of float32 in another order: some 1e-7 of what is added, and these logits are sums of hundreds up to 25.
    np.testing.assert_allclose(engine.outputs(obs_ND), policy.outputs(obs_ND), atol=1e-4)
    found_NP = engine.distributions(obs_ND, masks_NA)
    assert found_NP.dtype == np.float64
    np.testing.assert_allclose(found_NP, policy.distributions(obs_ND, masks_NA), atol=1e-4)


@pytest.mark.parametrize("kind", POLICIES)
def test_a_row_has_the_same_bits_in_every_batch_and_at_every_place(kind: str) -> None:
    policy = POLICIES[kind]()
    engine, obs_ND, rng = OnnxEngine(policy), observations(policy), np.random.default_rng(1)
    alone = np.concatenate([engine.outputs(row[None]) for row in obs_ND])
    for _ in range(50):
        rows = rng.integers(0, len(obs_ND), rng.integers(1, 130))
        assert np.array_equal(engine.outputs(obs_ND[rows]), alone[rows])


def test_its_bits_are_others_than_numpys() -> None:
    """Negative control of all that is done about it: were they the same, the log would not have to name an engine."""
    policy = make_policy(1, num_features=128, num_actions=18, hidden=(512, 512))
    obs_ND = observations(policy)
    assert not np.array_equal(OnnxEngine(policy).outputs(obs_ND), policy.outputs(obs_ND))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_overflow_is_seen_and_its_neighbours_stay(value: float, activation: str) -> None:
    engine = OnnxEngine(policy_on(vector_spaces(4, 3), Architecture((16, 16), activation)))
    obs_ND = observations(engine.policy, 9)
    expected_NO = engine.outputs(obs_ND)
    obs_ND[[2, 7]] = value, -value, value, value
    expected_NO[[2, 7]] = np.nan
    assert np.array_equal(engine.outputs(obs_ND), expected_NO, equal_nan=True)
    assert np.isnan(engine.distributions(obs_ND)[[2, 7]]).all()


def test_ordinary_observations_warn_of_nothing_and_none_at_all_is_answered() -> None:
    engine = OnnxEngine(make_policy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.outputs(np.zeros((0, 4), np.float32)).shape == (0, 2)
        assert engine.outputs(np.full((3, 4), 1e6, np.float64)).dtype == np.float32


def test_networks_that_are_no_perceptron_are_refused() -> None:
    image = Box(np.zeros((12, 12, 1), np.float32), np.ones((12, 12, 1), np.float32))
    spaces = Spaces(image, Choices("discrete", (2,), (0,), ()))
    policy = policy_on(spaces, Architecture((8,), "relu", convolutions=(Convolution(4, 4, 2),)))
    with pytest.raises(IntegrityError, match="plain perceptrons"):
        OnnxEngine(policy)


def test_the_log_gets_the_engine_that_it_names_or_hears_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, name = make_policy(), installed_name()
    assert engine_named(name, policy).name == name
    with pytest.raises(ConfigError, match=rf"computed by onnxruntime==0.0.1.*pip install 'onnxruntime==0.0.1'.*here is {name}"):
        engine_named("onnxruntime==0.0.1", policy)
    monkeypatch.setattr(onnx_engine, "PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match=rf"pip install '{name}'.*no-such-package"):
        engine_named(name, policy)
