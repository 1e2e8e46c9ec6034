"""Which numbers a learner's flat parameter vector holds, what they compute, and how a loss flows back through them.

N rows, D features, O outputs of the policy, P parameters.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np

from policies.network import (
    ACTIVATIONS,
    MODULE_PREFIX,
    Architecture,
    Convolution,
    Gaussian,
    Layers,
    convolution_shapes,
    convolutions_of,
    from_images,
    inner_features,
    layer_shapes,
    layers_of,
    normalised,
    num_inner_features,
    num_outputs,
    perceptron,
    tensor_shapes,
    to_images,
    windows,
)
from policies.policy import Policy
from policies.spaces import Numbers, Spaces
from policies.torch_network import describe, initial_tensors, trust
from training.config import TrainingConfig
from training.seeds import Stream, derived_seed, generator

NORMALISER = ("normaliser.mean", "normaliser.scale")
LOG_STD = "policy.log_std"
ROWS_AT_ONCE = 1024  # the layers of so many rows stay in a core's cache; a whole fragment at once is twice as slow
IMAGES_AT_ONCE = 64  # images are unfolded into all their windows


@dataclass(frozen=True)
class Layout:
    """Names and places of the parameters: the policy's layers, then the value function's, weights as [inputs, outputs].

    With `shares_layers` the value function is one more output of the policy's last hidden layer.
    """

    spaces: Spaces
    architecture: Architecture
    shares_layers: bool = False

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in the order of the flat vector."""
        policy = {name: shape for name, shape in tensor_shapes(self.architecture, self.spaces).items() if name not in NORMALISER}
        if self.architecture.module:
            return policy  # it has a value function of its own
        sizes = (num_inner_features(self.architecture, self.spaces), *self.architecture.hidden)
        if self.shares_layers:
            value = {"value.head.weight": (sizes[-1], 1), "value.head.bias": (1,)}
        else:
            value = convolution_shapes(self.architecture, self.spaces, "value") | layer_shapes("value", (*sizes, 1))
        return policy | value

    @property
    def num_layers(self) -> int:
        return len(self.architecture.hidden) + 1

    @property
    def size(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    def split(self, parameters_P: np.ndarray) -> dict[str, np.ndarray]:
        """Return views of the flat vector by name."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            views[name] = parameters_P[start : start + prod(shape)].reshape(shape)
            start += prod(shape)
        return views

    def join(self, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """Return a new flat vector made of named tensors; names that are not parameters are left out."""
        return np.concatenate([tensors[name].reshape(-1) for name in self.shapes]).astype(np.float32)


def layout_of(spaces: Spaces, training: TrainingConfig) -> Layout:
    """Return the layout that the settings ask for; raises `SpaceUnsupported` when convolutions do not fit the observation."""
    gaussian = Gaussian(training.action_squashing) if isinstance(spaces.action, Numbers) else None
    architecture = Architecture(training.hidden, training.activation, training.conv_filters, gaussian)
    if training.module is not None:
        trust(training.module)
        described = describe(training.module, training.module_kwargs, spaces.num_features, num_outputs(architecture, spaces))
        architecture = Architecture((), gaussian=gaussian, module=described)
    layout = Layout(spaces, architecture, training.vf_share_layers)
    assert layout.size > 0  # computes all shapes: what cannot be built is said here, not in a worker
    return layout


@dataclass(frozen=True)
class Weights:
    """One version of what the learner knows, as the rollout workers get it."""

    version: int
    parameters_P: np.ndarray
    normaliser_mean_D: np.ndarray
    normaliser_scale_D: np.ndarray

    def normalised(self, obs: np.ndarray) -> np.ndarray:
        """Return observations [..., D] as the network gets them: the same array where nothing is normalised."""
        return (obs - self.normaliser_mean_D) * self.normaliser_scale_D if self._normalises else obs

    @cached_property
    def _normalises(self) -> bool:
        return bool(self.normaliser_mean_D.any() or (self.normaliser_scale_D != 1).any())

    def tensors(self, layout: Layout) -> dict[str, np.ndarray]:
        """Return everything by name: policy, value function and normaliser."""
        normaliser = dict(zip(NORMALISER, (self.normaliser_mean_D, self.normaliser_scale_D)))
        return normaliser | layout.split(self.parameters_P)

    @classmethod
    def from_tensors(cls, version: int, tensors: dict[str, np.ndarray], layout: Layout) -> "Weights":
        """Read what `tensors` returned."""
        return cls(version, layout.join(tensors), *(tensors[name] for name in NORMALISER))

    def policy(self, layout: Layout) -> Policy:
        """Return what is served of these weights: without the value function."""
        return policy_of(self.tensors(layout), layout.spaces, layout.architecture)


def policy_of(tensors: dict[str, np.ndarray], spaces: Spaces, architecture: Architecture) -> Policy:
    """Return the policy among a learner's tensors."""
    return Policy(spaces, architecture, {name: tensors[name] for name in tensor_shapes(architecture, spaces)})


def outputs_as_trained(policy: Policy, obs_ND: np.ndarray) -> np.ndarray:
    """Return a policy's outputs [N, O] as training computes them: the truth that golden vectors carry."""
    if policy.architecture.module:
        return policy.outputs(obs_ND)  # there is one definition of it: the user's
    layout = Layout(policy.spaces, policy.architecture)
    tower = _Tower(layout, policy.tensors, "policy")
    x_ND = normalised(np.array(obs_ND, np.float32), policy.tensors, policy.architecture)
    outputs_NO = _Path(tower, tower, layout).forward(x_ND)
    return with_log_std(outputs_NO, policy.tensors.get(LOG_STD))


def outputs_gradient(policy: Policy, obs_ND: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Return the last layer's outputs [N, O], and what turns a gradient by them into the one by the observations [N, D]."""
    x_ND = normalised(np.array(obs_ND, np.float32), policy.tensors, policy.architecture)
    if policy.architecture.module:
        outputs_NO, through_network = policy.module_network.outputs_gradient(x_ND)
    else:
        layout = Layout(policy.spaces, policy.architecture)
        tower = _Tower(layout, policy.tensors, "policy")
        path = _Path(tower, tower, layout)
        outputs_NO, through_network = path.forward(x_ND), path.to_input
    slope_D, clip = policy.tensors["normaliser.scale"], policy.architecture.observation_clip

    def gradient_of(d_outputs_NO: np.ndarray) -> np.ndarray:
        d_obs_ND = through_network(d_outputs_NO.astype(np.float32)) * slope_D
        return d_obs_ND if clip is None else d_obs_ND * (np.abs(x_ND) < clip)

    return outputs_NO, gradient_of


def parameters_sha256(tensors: dict[str, np.ndarray]) -> str:
    """Return one digest of named tensors; the order of the dict does not matter, names, types, shapes and bits do."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}\n".encode() + tensor.tobytes())
    return digest.hexdigest()


def initial_parameters(layout: Layout, seed: int, *, log_std: float = 0.0) -> np.ndarray:
    """Return orthogonal weights and zero biases; the policy starts nearly uniform (last layer scaled by 0.01).

    What matters in on-policy RL, section 3.2: https://arxiv.org/abs/2006.05990
    """
    rng = generator(seed, Stream.INITIAL_PARAMETERS)
    last = layout.num_layers - 1
    module = layout.architecture.module
    own = {}
    if module is not None:
        outputs = num_outputs(layout.architecture, layout.spaces)
        drawn = initial_tensors(module, layout.spaces.num_features, outputs, seed=derived_seed(seed, Stream.INITIAL_PARAMETERS))
        own = {MODULE_PREFIX + name: tensor for name, tensor in drawn.items()}
    output_gain = {f"policy.{last}.weight": 0.01, f"value.{last}.weight": 1.0, "value.head.weight": 1.0}
    tensors = {}
    for name, shape in layout.shapes.items():
        if name in own:
            tensors[name] = own[name]
            continue
        gain = output_gain.get(name, np.sqrt(2))
        tensors[name] = gain * _orthogonal(shape, rng) if name.endswith("weight") else np.zeros(shape)
    if LOG_STD in tensors:
        tensors[LOG_STD] = np.full(layout.shapes[LOG_STD], log_std)
    return layout.join(tensors)


def network_of(layout: Layout, parameters_P: np.ndarray) -> "DifferentiableNetwork":
    """Return the network on a flat vector: ours, or the user's own, which has the same methods."""
    if layout.architecture.module is None:
        return DifferentiableNetwork(layout, parameters_P)
    from training.torch_network import TorchNetwork  # imports this module

    return TorchNetwork(layout, parameters_P)  # type: ignore[return-value]


def with_log_std(outputs_NO: np.ndarray, log_std_K: np.ndarray | None) -> np.ndarray:
    """Return outputs with the deviations that are parameters beside the means, if there are any."""
    if log_std_K is None:
        return outputs_NO
    return np.concatenate([outputs_NO, np.broadcast_to(log_std_K, (len(outputs_NO), len(log_std_K)))], axis=1)


class Network:
    """Policy and value function on one flat vector, which may change in place between calls.

    The whole batch is one product, unlike in `policies.policy`: a shard always has the same number of rows, so its bits are
    stable, and a few large calls are what makes training fast.
    """

    def __init__(self, layout: Layout, parameters_P: np.ndarray) -> None:
        self._layout = layout
        tensors = layout.split(parameters_P)
        self._log_std_K = tensors.get(LOG_STD)
        self._policy = _Tower(layout, tensors, "policy")
        self._value = _Tower(layout, tensors, "value")
        self.rows_at_once = IMAGES_AT_ONCE if self._value.convolutions else ROWS_AT_ONCE

    def outputs(self, x_ND: np.ndarray) -> np.ndarray:
        """Return the policy's outputs [N, O] for normalised observations, log-deviations of real-valued actions among them."""
        outputs_NO = perceptron(self._policy.layers, self._layout.architecture.activation, self._policy.inner_features(x_ND))
        return with_log_std(outputs_NO, self._log_std_K)

    def values(self, x_ND: np.ndarray) -> np.ndarray:
        """Return the value [N] of each normalised observation, `rows_at_once` at a time."""
        values_N = np.empty(len(x_ND), np.float32)
        for start in range(0, len(x_ND), self.rows_at_once):
            rows = slice(start, start + self.rows_at_once)
            x = self._value.inner_features(x_ND[rows])
            values_N[rows] = perceptron(self._value.layers, self._layout.architecture.activation, x)[:, 0]
        return values_N


class DifferentiableNetwork(Network):
    """The same with a way back: `forward`, then `backward` of the same rows. One pair at a time."""

    def __init__(self, layout: Layout, parameters_P: np.ndarray) -> None:
        super().__init__(layout, parameters_P)
        self.gradient_P = np.zeros_like(parameters_P)
        gradients = layout.split(self.gradient_P)
        self._d_log_std_K = gradients.get(LOG_STD)
        self._policy_path = _Path(self._policy, _Tower(layout, gradients, "policy"), layout)
        self._value_path = _Path(self._value, _Tower(layout, gradients, "value"), layout)

    def forward(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return outputs [N, O] and values [N]."""
        outputs_NO = self._policy_path.forward(x_ND)
        if self._layout.shares_layers:
            weight, bias = self._value.layers[-1]
            values_N = (self._policy_path.last_hidden @ weight + bias)[:, 0]
        else:
            values_N = self._value_path.forward(x_ND)[:, 0]
        return with_log_std(outputs_NO, self._log_std_K), values_N

    def backward(self, d_outputs_NO: np.ndarray, d_values_N: np.ndarray) -> np.ndarray:
        """Return the loss's gradient by the parameters, given those by outputs and values. The next call overwrites it."""
        if self._d_log_std_K is not None:
            num_components = len(self._d_log_std_K)
            np.sum(d_outputs_NO[:, num_components:], axis=0, out=self._d_log_std_K)
            d_outputs_NO = d_outputs_NO[:, :num_components]
        if self._layout.shares_layers:
            (weight, _), (d_weight, d_bias) = self._value.layers[-1], self._value_path.gradients.layers[-1]
            d_values_N1 = d_values_N[:, None]
            np.matmul(self._policy_path.last_hidden.T, d_values_N1, out=d_weight)
            _sum_rows(d_values_N1, out=d_bias)
            self._policy_path.backward(d_outputs_NO, d_values_N1 @ weight.T)
        else:
            self._policy_path.backward(d_outputs_NO)
            self._value_path.backward(d_values_N[:, None])
        return self.gradient_P


@dataclass
class _Tower:
    """The layers of `policy` or `value`; a value function that shares layers is the policy's with its own last one."""

    layout: Layout
    tensors: dict[str, np.ndarray] = field(repr=False)
    name: str

    def __post_init__(self) -> None:
        shared = self.layout.shares_layers and self.name == "value"
        name = "policy" if shared else self.name
        self.convolutions: Layers = convolutions_of(self.tensors, name, self.layout.architecture)
        self.layers: Layers = layers_of(self.tensors, name, self.layout.num_layers)
        if shared:
            self.layers = [*self.layers[:-1], (self.tensors["value.head.weight"], self.tensors["value.head.bias"])]

    def inner_features(self, x_ND: np.ndarray) -> np.ndarray:
        return inner_features(self.convolutions, self.layout.architecture, self.layout.spaces, x_ND[None])[0]


class _Path:
    """One way forward through a tower that remembers what the way back needs."""

    def __init__(self, tower: _Tower, gradients: _Tower, layout: Layout) -> None:
        self.gradients = gradients
        self._tower = tower
        self._layout = layout
        self._is_tanh = layout.architecture.activation == "tanh"
        self._activate = ACTIVATIONS[layout.architecture.activation]
        self._inputs: list[np.ndarray] = []  # of each fully connected layer
        self._images: list[np.ndarray] = []  # into each convolution, and out of the last

    @property
    def last_hidden(self) -> np.ndarray:
        return self._inputs[-1]

    def forward(self, x_ND: np.ndarray) -> np.ndarray:
        x = self._convolve(x_ND) if self._tower.convolutions else x_ND
        self._inputs = [x]
        for weight, bias in self._tower.layers[:-1]:
            x = x @ weight
            x += bias
            self._activate(x, out=x)
            self._inputs.append(x)
        weight, bias = self._tower.layers[-1]
        return x @ weight + bias

    def backward(self, d_output: np.ndarray, d_last_hidden: np.ndarray | None = None) -> None:
        """Write the gradients of every layer; `d_last_hidden` comes from another head on the same last hidden layer."""
        d_z = d_output
        for index in reversed(range(len(self._tower.layers))):
            x, (weight, _), (d_weight, d_bias) = self._inputs[index], self._tower.layers[index], self.gradients.layers[index]
            np.matmul(x.T, d_z, out=d_weight)
            _sum_rows(d_z, out=d_bias)
            if index == 0 and not self._tower.convolutions:
                return
            d_x = d_z @ weight.T
            if index == len(self._tower.layers) - 1 and d_last_hidden is not None:
                d_x += d_last_hidden
            d_z = self._through_activation(d_x, x)
        self._convolve_back(d_z)

    def to_input(self, d_output: np.ndarray) -> np.ndarray:
        """Return the gradient by what went in [N, D], and write none."""
        d_z = d_output
        for index in reversed(range(len(self._tower.layers))):
            d_x = d_z @ self._tower.layers[index][0].T
            if index == 0 and not self._tower.convolutions:
                return d_x
            d_z = self._through_activation(d_x, self._inputs[index])
        for index in reversed(range(len(self._tower.convolutions))):
            images, convolution = self._images[index], self._layout.architecture.convolutions[index]
            d_windows = d_z.reshape(-1, convolution.filters) @ self._tower.convolutions[index][0].T
            d_images = _sum_windows(d_windows, images.shape, convolution)
            if index > 0:
                d_z = self._through_activation(d_images, images)
        return from_images(d_images[0], self._layout.spaces)

    def _through_activation(self, d_y: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the gradient before an activation, in place: tanh' is 1 - tanh^2, relu' is 1 where something came through."""
        if self._is_tanh:
            slope = y * y
            np.subtract(1, slope, out=slope)
            d_y *= slope
        else:
            d_y *= (y > 0).view(np.int8)  # numpy multiplies by these faster than by booleans
        return d_y

    def _convolve(self, x_ND: np.ndarray) -> np.ndarray:
        images = to_images(x_ND[None], self._layout.spaces)
        self._images = [images]
        for (weight, bias), convolution in zip(self._tower.convolutions, self._layout.architecture.convolutions):
            output = windows(images, convolution)[0] @ weight
            output += bias
            self._activate(output, out=output)
            images = output.reshape(1, len(x_ND), *_pixels(images, convolution), convolution.filters)
            self._images.append(images)
        return images.reshape(len(x_ND), -1)

    def _convolve_back(self, d_z: np.ndarray) -> None:
        """Go back from the gradient before the last convolution's activation (`backward` went through it already)."""
        for index in reversed(range(len(self._tower.convolutions))):
            images, convolution = self._images[index], self._layout.architecture.convolutions[index]
            (weight, _), (d_weight, d_bias) = self._tower.convolutions[index], self.gradients.convolutions[index]
            d_z = d_z.reshape(-1, convolution.filters)
            np.matmul(windows(images, convolution)[0].T, d_z, out=d_weight)
            _sum_rows(d_z, out=d_bias)
            if index > 0:
                d_images = _sum_windows(d_z @ weight.T, images.shape, convolution)
                d_z = self._through_activation(d_images, images)


def _sum_rows(d_z: np.ndarray, out: np.ndarray) -> None:
    """Add up rows: as a product, which is four times as fast as numpy's sum along the first axis."""
    np.matmul(np.ones(len(d_z), d_z.dtype), d_z, out=out)


def _pixels(images: np.ndarray, convolution: Convolution) -> tuple[int, int]:
    return tuple((size - convolution.kernel) // convolution.stride + 1 for size in images.shape[2:4])  # type: ignore[return-value]


def _sum_windows(d_windows: np.ndarray, shape: tuple[int, ...], convolution: Convolution) -> np.ndarray:
    """Add up per pixel what flows into all windows that see it: the transpose of `windows`."""
    d_images = np.zeros(shape, np.float32)
    height, width = (size - convolution.kernel + 1 for size in shape[2:4])
    side, stride = convolution.kernel, convolution.stride
    rows, columns = len(range(0, height, stride)), len(range(0, width, stride))
    d_windows = d_windows.reshape(*shape[:2], rows, columns, side, side, shape[-1])
    for i in range(side):
        for j in range(side):
            d_images[:, :, i : i + height : stride, j : j + width : stride] += d_windows[:, :, :, :, i, j]
    return d_images


def _orthogonal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    inputs, outputs = shape
    q, r = np.linalg.qr(rng.standard_normal((max(shape), min(shape))))
    q *= np.sign(np.diag(r))  # makes the decomposition unique, so the distribution is uniform
    return q if inputs >= outputs else q.T
