"""The hand-written backward pass against torch's: every kind of network and head, and every term of the loss.

The reference is float64. Ours runs twice: in float64, where only the formulas can differ, and in float32 as it trains.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from policies.network import Architecture, Convolution, Gaussian
from policies.observations import Box
from policies.spaces import Action, Choices, Numbers, Spaces
from tests import torch_reference
from training.heads import ChoiceHead, Evaluated, NumberHead, head_of
from training.network import DifferentiableNetwork, Layout, Network, Weights, outputs_gradient
from training.ppo import Batch, LossSettings, ppo_loss

NUM_STEPS = 64
PLAIN = LossSettings(clip_param=0.2, vf_loss_coeff=0.5, vf_clip_param=None, entropy_coeff=0.0)
FULL = LossSettings(clip_param=0.2, vf_loss_coeff=0.7, vf_clip_param=0.3, entropy_coeff=0.05)

DISCRETE = Choices("discrete", (4,), (0,), ())
MULTI = Choices("multi_discrete", (2, 3, 4), (0, 5, -1), (3,))
BITS = Choices("multi_binary", (2, 2), (0, 0), (2,))
REAL = Numbers(np.array([-1, -2, -np.inf], np.float32), np.array([1, 2, np.inf], np.float32))


@dataclass(frozen=True)
class Case:
    """A network on an observation of this shape, with this kind of action."""

    action: Action
    architecture: Architecture
    shape: tuple[int, ...] = (5,)
    shares_layers: bool = False
    has_mask: bool = False

    @property
    def layout(self) -> Layout:
        low = np.full(self.shape, -np.inf, np.float32)
        return Layout(Spaces(Box(low, -low), self.action, self.has_mask), self.architecture, self.shares_layers)


TWO_CONVOLUTIONS = (Convolution(6, 3, 2), Convolution(5, 2, 1))
CASES = {
    "tanh": Case(DISCRETE, Architecture((16, 8), "tanh")),
    "relu": Case(DISCRETE, Architecture((16, 8), "relu")),
    "no hidden layer": Case(DISCRETE, Architecture(())),
    "shared tanh": Case(DISCRETE, Architecture((16, 8), "tanh"), shares_layers=True),
    "shared relu, one layer": Case(DISCRETE, Architecture((16,), "relu"), shares_layers=True),
    "shared without a hidden layer": Case(DISCRETE, Architecture(()), shares_layers=True),
    "masked": Case(DISCRETE, Architecture((8,)), has_mask=True),
    "several choices": Case(MULTI, Architecture((8,))),
    "several masked choices": Case(MULTI, Architecture((8,)), has_mask=True),
    "bits": Case(BITS, Architecture((8,), "relu")),
    "numbers": Case(REAL, Architecture((8,), gaussian=Gaussian())),
    "numbers with tanh, shared": Case(REAL, Architecture((8,), gaussian=Gaussian("tanh")), shares_layers=True),
    "numbers, deviation from the network": Case(REAL, Architecture((8,), gaussian=Gaussian(std="output"))),
    "channels last": Case(DISCRETE, Architecture((8,), "relu", TWO_CONVOLUTIONS), (9, 8, 3)),
    "channels first, tanh": Case(DISCRETE, Architecture((8,), "tanh", TWO_CONVOLUTIONS), (3, 9, 8)),
    "grey image, shared": Case(DISCRETE, Architecture((8,), "relu", TWO_CONVOLUTIONS), (9, 8), shares_layers=True),
    "image without a hidden layer, numbers": Case(
        REAL, Architecture((), "tanh", (Convolution(4, 3, 3),), Gaussian()), (2, 9, 8), shares_layers=True
    ),
}


def random_parameters(layout: Layout) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(layout.size) * 0.4


def make_batch(layout: Layout, parameters_P: np.ndarray) -> Batch:
    """Return steps on both sides of every clip: ratios and value changes are spread over twice the allowed range."""
    rng = np.random.default_rng(0)
    spaces, head = layout.spaces, head_of(layout.spaces, layout.architecture)
    x_ND = rng.standard_normal((NUM_STEPS, spaces.num_features))
    network = Network(layout, parameters_P)
    outputs_NO, values_N = network.outputs(x_ND), network.values(x_ND)
    masks_NA = None
    if spaces.has_mask:
        masks_NA = rng.random((NUM_STEPS, spaces.mask_size)) < 0.5
        masks_NA[:, np.cumsum(spaces.action.nvec) - 1] = True  # the last choice of each component always exists
    actions_NK = head.sample(outputs_NO, head.noise(rng, (NUM_STEPS,)), masks_NA)
    logp_N = head.evaluate(outputs_NO, actions_NK, masks_NA).logp_N
    return Batch(
        x_ND=x_ND,
        actions_NK=actions_NK,
        masks_NA=masks_NA,
        logp_N=logp_N + rng.uniform(-0.4, 0.4, NUM_STEPS),
        values_N=values_N + rng.uniform(-0.6, 0.6, NUM_STEPS),
        advantages_N=rng.standard_normal(NUM_STEPS),
        returns_N=rng.standard_normal(NUM_STEPS),
        weights_N=rng.uniform(0.2, 1, NUM_STEPS),
    )


def in_float32(batch: Batch) -> Batch:
    arrays = {name: array for name, array in vars(batch).items() if array is not None and array.dtype == np.float64}
    return replace(batch, **{name: array.astype(np.float32) for name, array in arrays.items()})


def our_gradient(layout: Layout, parameters_P: np.ndarray, batch: Batch, settings: LossSettings) -> np.ndarray:
    network = DifferentiableNetwork(layout, parameters_P)
    outputs_NO, values_N = network.forward(batch.x_ND)
    loss = ppo_loss(head_of(layout.spaces, layout.architecture), outputs_NO, values_N, batch, settings)
    return network.backward(loss.d_outputs_NO, loss.d_values_N).copy()


def reference_gradient(layout: Layout, parameters_P: np.ndarray, batch: Batch, settings: LossSettings) -> np.ndarray:
    tensors = torch_reference.leaves(layout.split(parameters_P))
    outputs, values = torch_reference.forward(
        tensors, layout.spaces, layout.architecture, batch.x_ND, shares_layers=layout.shares_layers
    )
    loss = torch_reference.ppo_loss(layout.spaces, outputs, values, batch, settings)
    by_name = torch_reference.gradients(tensors, loss)
    return np.concatenate([by_name[name].reshape(-1) for name in layout.shapes])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference as a share of the largest number."""
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("settings", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_gradient_by_every_parameter_is_torchs(case: Case, settings: LossSettings) -> None:
    layout = case.layout
    parameters_P = random_parameters(layout)
    batch = make_batch(layout, parameters_P)
    if settings is PLAIN:
        batch = replace(batch, weights_N=None)
    expected = reference_gradient(layout, parameters_P, batch, settings)
    # The constants of the heads are float32, so even in float64 the last eight digits differ.
    assert difference(our_gradient(layout, parameters_P, batch, settings), expected) < 1e-7
    parameters_P = parameters_P.astype(np.float32)
    assert difference(our_gradient(layout, parameters_P, in_float32(batch), settings), expected) < 5e-6


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_way_forward_is_torchs(case: Case) -> None:
    layout = case.layout
    parameters_P = random_parameters(layout)
    x_ND = make_batch(layout, parameters_P).x_ND
    tensors = torch_reference.leaves(layout.split(parameters_P))
    options = {"shares_layers": layout.shares_layers}
    outputs, values = torch_reference.forward(tensors, layout.spaces, layout.architecture, x_ND, **options)
    network = DifferentiableNetwork(layout, parameters_P)
    for ours in (network.forward(x_ND), (network.outputs(x_ND), network.values(x_ND))):
        np.testing.assert_allclose(ours[0], outputs.detach(), atol=1e-12)
        np.testing.assert_allclose(ours[1], values.detach(), atol=1e-12)


@pytest.mark.parametrize("name", ["tanh", "several masked choices", "numbers", "numbers, deviation from the network"])
def test_losses_and_gradients_by_the_outputs_are_torchs(name: str) -> None:
    layout = CASES[name].layout
    parameters_P = random_parameters(layout)
    batch = make_batch(layout, parameters_P)
    ours = DifferentiableNetwork(layout, parameters_P).forward(batch.x_ND)
    outputs, values = (torch.tensor(array, requires_grad=True) for array in ours)
    expected = torch_reference.ppo_loss(layout.spaces, outputs, values, batch, FULL)
    expected.backward()
    head = head_of(layout.spaces, layout.architecture)
    loss = ppo_loss(head, *ours, batch, FULL)
    assert loss.loss == pytest.approx(expected.item(), abs=1e-7)
    assert difference(loss.d_outputs_NO, outputs.grad.numpy()) < 1e-7
    assert difference(loss.d_values_N, values.grad.numpy()) < 1e-7
    # The parts that are reported are what the names say.
    logp, entropy = torch_reference.log_probability_and_entropy(layout.spaces, outputs, batch.actions_NK, batch.masks_NA)
    log_ratio = logp.detach().numpy() - batch.logp_N
    assert loss.entropy == pytest.approx(entropy.mean().item(), abs=1e-6)
    assert loss.kl == pytest.approx((np.exp(log_ratio) - 1 - log_ratio).mean(), abs=1e-7)
    assert loss.clip_fraction == (np.abs(np.exp(log_ratio) - 1) > 0.2).mean()
    assert 0.2 < loss.clip_fraction < 0.8  # so both sides of the clip were looked at


WITHOUT = {
    "clipping": {"clip_param": 10.0},
    "the value function": {"vf_loss_coeff": 0.0},
    "value clipping": {"vf_clip_param": None},
    "entropy": {"entropy_coeff": 0.0},
}


@pytest.mark.parametrize("changes", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("name", ["tanh", "several masked choices", "numbers"])
def test_a_loss_without_one_of_its_terms_has_another_gradient(name: str, changes: dict) -> None:
    """Negative control: the comparison above would notice any single term that is missing or wrong."""
    layout = CASES[name].layout
    parameters_P = random_parameters(layout)
    batch = make_batch(layout, parameters_P)
    expected = reference_gradient(layout, parameters_P, batch, FULL)
    assert difference(our_gradient(layout, parameters_P, batch, replace(FULL, **changes)), expected) > 1e-3


def test_a_loss_without_masks_or_importance_weights_has_another_gradient() -> None:
    layout = CASES["several masked choices"].layout
    parameters_P = random_parameters(layout)
    batch = make_batch(layout, parameters_P)
    expected = reference_gradient(layout, parameters_P, batch, FULL)
    for column in ("masks_NA", "weights_N"):
        assert difference(our_gradient(layout, parameters_P, replace(batch, **{column: None}), FULL), expected) > 1e-2


@pytest.mark.parametrize(("name", "head"), [("tanh", ChoiceHead), ("numbers", NumberHead)])
def test_a_wrong_sign_in_a_head_is_noticed(name: str, head: type, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = CASES[name].layout
    parameters_P = random_parameters(layout)
    batch = make_batch(layout, parameters_P)
    expected = reference_gradient(layout, parameters_P, batch, FULL)
    right = head.gradient

    def wrong(self: object, evaluated: Evaluated, d_logp_N: np.ndarray, d_entropy: float) -> np.ndarray:
        return right(self, evaluated, d_logp_N, -d_entropy)

    monkeypatch.setattr(head, "gradient", wrong)
    assert difference(our_gradient(layout, parameters_P, batch, FULL), expected) > 1e-2


def test_a_masked_choice_has_no_probability_and_takes_no_gradient() -> None:
    head = ChoiceHead(DISCRETE)
    outputs_NO = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    mask_NA = np.array([[True, False, True, False]])
    # log softmax over the two that exist: log(e / (e + e^3)) = -log(1 + e^2) = -2.126928
    evaluated = head.evaluate(outputs_NO, np.array([[0]]), mask_NA)
    assert evaluated.logp_N == pytest.approx([-2.126928], abs=1e-6)
    # entropy of (0.1192029, 0.8807971): 0.1192029 * 2.126928 + 0.8807971 * 0.126928 = 0.365334
    assert evaluated.entropy_N == pytest.approx([0.365334], abs=1e-6)
    gradient_NO = head.gradient(evaluated, np.ones(1, np.float32), 1.0)
    assert np.isfinite(gradient_NO).all() and gradient_NO[0, [1, 3]].tolist() == [0, 0]
    noise_N = head.noise(np.random.default_rng(0), (2_000,))
    drawn_NK = head.sample(np.repeat(outputs_NO, 2_000, axis=0), noise_N, np.repeat(mask_NA, 2_000, axis=0))
    # Standard error of a share of 0.12 in 2,000 draws: 0.0072
    assert set(drawn_NK[:, 0]) == {0, 2} and (drawn_NK == 0).mean() == pytest.approx(0.1192, abs=5 * 0.0072)


def test_a_deviation_at_its_limit_is_not_pushed_beyond() -> None:
    head = NumberHead(REAL, "clip")
    outputs_NO = np.array([[0, 0, 0, 2.5, -21.0, 0]], np.float32)  # log-deviations outside, outside and inside of [-20, 2]
    evaluated = head.evaluate(outputs_NO, np.zeros((1, 3), np.float32), None)
    # Entropy of a normal is log(std) + log(sqrt(2 pi e)) = log(std) + 1.4189385; here with 2, -20 and 0.
    assert evaluated.entropy_N == pytest.approx([2 - 20 + 0 + 3 * 1.4189385], abs=1e-5)
    gradient_NO = head.gradient(evaluated, np.ones(1, np.float32), 1.0)
    assert gradient_NO[0, 3:].tolist() == [0, 0, 0]  # d log p / d log std = z^2 - 1 = -1, entropy +1: they cancel in the third
    only_entropy_NO = head.gradient(evaluated, np.zeros(1, np.float32), 1.0)
    assert only_entropy_NO[0, 3:].tolist() == [0, 0, 1]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_gradient_by_the_observations_is_the_slope_of_the_outputs(case: Case) -> None:
    layout = case.layout
    parameters_P = random_parameters(layout).astype(np.float32)
    rng = np.random.default_rng(3)
    num_features = layout.spaces.num_features
    normaliser = rng.normal(0, 0.3, num_features), rng.uniform(0.5, 1.5, num_features)
    weights = Weights(0, parameters_P, *(numbers.astype(np.float32) for numbers in normaliser))
    policy = weights.policy(layout)
    obs_ND, direction_ND = rng.standard_normal((2, 6, num_features)).astype(np.float32)
    outputs_NO, gradient_of = outputs_gradient(policy, obs_ND)
    d_outputs_NO = rng.standard_normal(outputs_NO.shape)
    slope = float((gradient_of(d_outputs_NO) * direction_ND).sum())
    step = 3e-3
    ahead, behind = (outputs_gradient(policy, obs_ND + sign * step * direction_ND)[0].astype(np.float64) for sign in (1, -1))
    expected = float(((ahead - behind) * d_outputs_NO).sum() / (2 * step))
    assert slope == pytest.approx(expected, rel=0.1, abs=0.03)  # float32, and some units of relu begin to act on the way
    assert slope != pytest.approx(1.5 * expected, rel=0.1, abs=0.03)  # negative control: the tolerance is not everything
