"""Does the torch module give what the policy gives, for every network, head and space, and notice what it would leave out?"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from policies.errors import IntegrityError
from policies.golden import require_golden
from policies.network import Architecture, Gaussian
from policies.policy import Policy
from policies.spaces import Choices
from policies.torch_network import TRUSTED_VARIABLE, describe
from policies.torch_policy import TorchPolicy
from tests.bundles import policy_on, vector_spaces
from tests.unit.test_gradients import CASES, DISCRETE, REAL, Case

MORE_CASES = {
    "clipped observations": Case(DISCRETE, Architecture((8,), observation_clip=0.7)),
    "deviation within limits": Case(REAL, Architecture((8,), gaussian=Gaussian("tanh", "output", (-0.5, 0.25), "clip"))),
    "deviation parameter within limits": Case(REAL, Architecture((8,), gaussian=Gaussian(log_std_range=(-0.1, 0.1)))),
}
ALL_CASES = CASES | MORE_CASES
NETWORK = f"{__name__}:two_towers"


def two_towers(num_features: int, num_outputs: int, width: int) -> torch.nn.Module:
    """Make a network of the user's own: something that is not a row of layers."""
    return TwoTowers(num_features, num_outputs, width)


class TwoTowers(torch.nn.Module):
    def __init__(self, num_features: int, num_outputs: int, width: int) -> None:
        super().__init__()
        self.left, self.right = torch.nn.Linear(num_features, width), torch.nn.Linear(num_features, width)
        self.outputs, self.value = torch.nn.Linear(width, num_outputs), torch.nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.sigmoid(self.left(x)) * self.right(x)
        return self.outputs(hidden), self.value(hidden)[:, 0]


@pytest.fixture
def own_network(monkeypatch: pytest.MonkeyPatch) -> Policy:
    """Return a policy with a network of the user's own, whose function is trusted for the time of the test."""
    monkeypatch.setenv(TRUSTED_VARIABLE, NETWORK)
    spaces = vector_spaces(5, 3)
    return policy_on(spaces, Architecture((), module=describe(NETWORK, {"width": 7}, 5, 3)))


def inputs_of(policy: Policy, num_rows: int = 24) -> tuple[np.ndarray, np.ndarray | None]:
    """Return observations [N, D] and, where the policy takes them, masks [N, A] with one choice or more per component."""
    rng = np.random.default_rng(3)
    obs_ND = rng.standard_normal((num_rows, policy.spaces.num_features)).astype(np.float32)
    if not policy.spaces.has_mask:
        return obs_ND, None
    assert isinstance(policy.spaces.action, Choices)
    masks_NA = rng.random((num_rows, policy.spaces.mask_size)) < 0.5
    masks_NA[:, np.cumsum(policy.spaces.action.nvec) - 1] = True
    return obs_ND, masks_NA


def with_torch(policy: Policy, obs_ND: np.ndarray, masks_NA: np.ndarray | None) -> np.ndarray:
    masks = None if masks_NA is None else torch.from_numpy(masks_NA)
    return TorchPolicy(policy)(torch.from_numpy(obs_ND), masks).numpy()


def require_equal(policy: Policy, torch_policy: Policy) -> None:
    """Raise `IntegrityError` unless `torch_policy`, computed by torch, is what `policy` gives."""
    inputs = inputs_of(policy)
    require_golden(with_torch(torch_policy, *inputs), policy.distributions(*inputs), "torch")


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_torch_gives_the_policys_distributions(case: Case) -> None:
    policy = policy_on(case.layout.spaces, case.architecture)
    require_equal(policy, policy)


def test_a_network_of_the_users_own_is_inside(own_network: Policy) -> None:
    require_equal(own_network, own_network)


def test_a_masked_choice_has_no_probability_at_all() -> None:
    case = CASES["several masked choices"]
    policy = policy_on(case.layout.spaces, case.architecture)
    obs_ND, masks_NA = inputs_of(policy)
    assert masks_NA is not None and not masks_NA.all()
    assert (with_torch(policy, obs_ND, masks_NA)[~masks_NA] == 0).all()
    assert (with_torch(policy, obs_ND, np.ones_like(masks_NA)) > 0).all()  # the control: it was the mask


def changed(policy: Policy, **tensors: Any) -> Policy:
    return replace(policy, tensors=policy.tensors | tensors)


@pytest.mark.parametrize("name", ["tanh", "numbers", "channels last", "clipped observations"])
@pytest.mark.parametrize("part", ["normaliser.mean", "normaliser.scale"])
def test_without_its_normaliser_it_is_another_policy(name: str, part: str) -> None:
    case = ALL_CASES[name]
    policy = policy_on(case.layout.spaces, case.architecture)
    identity = np.full_like(policy.tensors[part], float(part == "normaliser.scale"))
    with pytest.raises(IntegrityError, match="torch differs from its golden vectors"):
        require_equal(policy, changed(policy, **{part: identity}))


@pytest.mark.parametrize("name", MORE_CASES)
def test_without_its_limits_it_is_another_policy(name: str) -> None:
    case = MORE_CASES[name]
    policy = policy_on(case.layout.spaces, case.architecture)
    gaussian = case.architecture.gaussian and replace(case.architecture.gaussian, log_std_range=(-20.0, 2.0))
    unlimited = replace(policy, architecture=replace(case.architecture, observation_clip=None, gaussian=gaussian))
    with pytest.raises(IntegrityError, match="torch differs from its golden vectors"):
        require_equal(policy, unlimited)


def test_pixels_in_another_order_are_another_policy() -> None:
    """[9, 8, 3] and [3, 9, 8] are the same 216 numbers: read the one as the other and every window is wrong."""
    last, first = (CASES[name] for name in ("channels last", "channels first, tanh"))
    policy = policy_on(last.layout.spaces, last.architecture)
    with pytest.raises(IntegrityError, match="torch differs from its golden vectors"):
        require_equal(policy, replace(policy, spaces=first.layout.spaces))


def test_training_the_torch_module_leaves_the_policy_as_it_is(own_network: Policy) -> None:
    for policy in (own_network, policy_on(vector_spaces(4, 2), Architecture((8,)))):
        before = policy.sha256()
        module = TorchPolicy(policy)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.add_(1)
        assert policy.sha256() == before
