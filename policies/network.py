"""Which networks a policy can have, and what they compute with numpy alone.

N rows, D features, O outputs, H, W, C height, width and channels of an image.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from policies.errors import IntegrityError, SpaceUnsupported
from policies.observations import Box
from policies.spaces import Choices, Spaces
from policies.torch_network import Module

_ZEROS = np.zeros(1 << 16, np.float32)


def _relu(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Return max(x, 0). numpy compares with an array of zeros three times as fast as with one zero."""
    return np.maximum(x, _ZEROS[: x.size].reshape(x.shape) if x.size <= _ZEROS.size else 0, out=out)


ACTIVATIONS = {"tanh": np.tanh, "relu": _relu}
MAX_LAYERS, MAX_LAYER_SIZE = 16, 65_536
LOG_STD_RANGE = (-20.0, 2.0)  # as in Soft Actor-Critic's own code; e^2 is seven times the whole range of a bounded action
MAX_LOG_STD = 80.0  # e^80 is about the largest float32
MAX_WINDOW_NUMBERS = 1 << 22  # 16 MB per image; 84 x 84 x 4 pixels under the usual 8 x 8 windows make a fortieth of that
MODULE_PREFIX = "module."

Layers = list[tuple[np.ndarray, np.ndarray]]


class Convolution(NamedTuple):
    """One convolution without padding: how many filters, and the side of its window and of its steps in pixels."""

    filters: int
    kernel: int
    stride: int


@dataclass(frozen=True)
class Gaussian:
    """How a network's outputs become real-valued actions: one normal distribution per component.

    A bounded component is normal on a scale where its bounds are -1 and 1; `squash` says how it gets back inside them:
    `clip` cuts what is beyond, `tanh` bends it. `std` says where the deviation comes from: one trained `parameter` per
    component (tensor `policy.log_std`), or a second `output` of the network (its logarithm). `log_std_range` limits that
    logarithm. `greedy` says how the mean itself gets inside the bounds when nothing is sampled: like a sample (`squash`), or
    cut (`clip`) although samples are bent, as RLlib's SAC does (https://github.com/ray-project/ray/issues/51544).
    """

    squash: Literal["clip", "tanh"] = "clip"
    std: Literal["parameter", "output"] = "parameter"
    log_std_range: tuple[float, float] = LOG_STD_RANGE
    greedy: Literal["squash", "clip"] = "squash"

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"squash": self.squash, "std": self.std}
        if self.log_std_range != LOG_STD_RANGE:
            value["log_std_range"] = list(map(float, self.log_std_range))
        if self.greedy != "squash":
            value["greedy"] = self.greedy
        return value


@dataclass(frozen=True)
class Architecture:
    """Convolutions over an image (none for other observations), a multi-layer perceptron, and a head for real-valued actions.

    Or a `torch.nn.Module` of the user's own in their place.

    Choices need no head: the outputs are their logits. `gaussian` is None for them. `observation_clip` cuts normalised
    observations at plus and minus this number; None leaves them as they are.
    """

    hidden: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"
    convolutions: tuple[Convolution, ...] = ()
    gaussian: Gaussian | None = None
    observation_clip: float | None = None
    module: Module | None = None  # a network of the user's own: the layers above say nothing then

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"kind": "mlp", "hidden": list(self.hidden), "activation": self.activation}
        if self.module:
            value = {"kind": "module", **self.module.to_json()}
        if self.convolutions:
            value |= {"kind": "cnn", "convolutions": [list(convolution) for convolution in self.convolutions]}
        if self.gaussian:
            value["gaussian"] = self.gaussian.to_json()
        if self.observation_clip is not None:
            value["observation_clip"] = float(self.observation_clip)
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Architecture":
        """Read what `to_json` wrote; only names on this list become code."""
        try:
            if value["kind"] == "module":
                return cls((), module=Module.from_json(value), gaussian=_gaussian_from_json(value.get("gaussian")))
            if value["kind"] not in ("mlp", "cnn") or value["activation"] not in ACTIVATIONS:
                raise ValueError(f"network {value['kind']!r} with activation {value['activation']!r} is not known")
            hidden = tuple(int(size) for size in value["hidden"])
            convolutions = tuple(Convolution(*map(int, sizes)) for sizes in value.get("convolutions", ()))
            sizes = [*hidden, *(size for convolution in convolutions for size in convolution)]
            if not all(0 < size <= MAX_LAYER_SIZE for size in sizes) or len(hidden) + len(convolutions) > MAX_LAYERS:
                raise ValueError(f"sizes {hidden} and {convolutions} are out of bounds")
            gaussian, clip = _gaussian_from_json(value.get("gaussian")), value.get("observation_clip")
            if clip is not None and not (type(clip) in (int, float) and 0 < clip < math.inf):
                raise ValueError(f"observation_clip {clip!r} is not a positive number")
            return cls(hidden, value["activation"], convolutions, gaussian, clip)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise IntegrityError(f"network description cannot be read: {error}") from error


def _gaussian_from_json(value: Any) -> Gaussian | None:
    if value is None:
        return None
    if value["squash"] not in ("clip", "tanh") or value["std"] not in ("parameter", "output"):
        raise ValueError(f"gaussian head {value} is not known")
    low, high = map(float, value.get("log_std_range", LOG_STD_RANGE))
    greedy = value.get("greedy", "squash")
    if not -MAX_LOG_STD <= low < high <= MAX_LOG_STD or greedy not in ("squash", "clip"):
        raise ValueError(f"gaussian head {value} is not known")
    return Gaussian(value["squash"], value["std"], (low, high), greedy)


def num_outputs(architecture: Architecture, spaces: Spaces) -> int:
    """Return how many numbers the policy's last layer has: a logit per choice, or a mean (and log-deviation) per number."""
    if isinstance(spaces.action, Choices):
        return sum(spaces.action.nvec)
    assert architecture.gaussian is not None, "real-valued actions need a Gaussian head"
    return spaces.action.num_components * (2 if architecture.gaussian.std == "output" else 1)


def tensor_shapes(architecture: Architecture, spaces: Spaces) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a policy; a weight is [inputs, outputs], applied as `x @ w + b`.

    `normaliser.mean` and `normaliser.scale` [D] turn an observation x into `(x - mean) * scale`; they are 0 and 1 when the
    run did not normalise. A convolution's weight has the window's pixels, row by row with their channels, as inputs. The
    tensors of a module of the user's own are `module.…`, as that names them. Raises `IntegrityError` for a head that is not for
    these actions.
    """
    if (architecture.gaussian is None) != isinstance(spaces.action, Choices):
        raise IntegrityError("a network has a Gaussian head for real-valued actions, and none for choices")
    shapes: dict[str, tuple[int, ...]] = {name: (spaces.num_features,) for name in ("normaliser.mean", "normaliser.scale")}
    if architecture.gaussian and architecture.gaussian.std == "parameter":
        shapes["policy.log_std"] = (spaces.action.num_components,)
    if architecture.module:
        return shapes | {f"{MODULE_PREFIX}{name}": shape for name, shape in architecture.module.tensors.items()}
    shapes |= convolution_shapes(architecture, spaces, "policy")
    sizes = (num_inner_features(architecture, spaces), *architecture.hidden, num_outputs(architecture, spaces))
    return shapes | layer_shapes("policy", sizes)


def layer_shapes(tower: str, sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a perceptron's weights and biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        shapes[f"{tower}.{layer}.weight"] = (inputs, outputs)
        shapes[f"{tower}.{layer}.bias"] = (outputs,)
    return shapes


def convolution_shapes(architecture: Architecture, spaces: Spaces, tower: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a tower's convolutions."""
    if not architecture.convolutions:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    channels = image_shape(spaces)[2]
    for index, convolution in enumerate(architecture.convolutions):
        shapes[f"{tower}.convolution.{index}.weight"] = (convolution.kernel**2 * channels, convolution.filters)
        shapes[f"{tower}.convolution.{index}.bias"] = (convolution.filters,)
        channels = convolution.filters
    return shapes


def num_inner_features(architecture: Architecture, spaces: Spaces) -> int:
    """Return how many numbers go into the perceptron: the features, or what the convolutions leave of the image."""
    if not architecture.convolutions:
        return spaces.num_features
    height, width, channels = image_shape(spaces)
    for convolution in architecture.convolutions:
        height, width = (_output_size(size, convolution) for size in (height, width))
        previous_channels, channels = channels, convolution.filters
        if min(height, width) < 1:
            raise SpaceUnsupported(
                f"convolutions {architecture.convolutions} leave nothing of an image of {image_shape(spaces)[:2]} pixels; "
                "use fewer, smaller or less far-stepping ones"
            )
        num_window_numbers = height * width * convolution.kernel**2 * previous_channels
        if num_window_numbers > MAX_WINDOW_NUMBERS:
            raise SpaceUnsupported(
                f"convolution {convolution} has windows of {num_window_numbers} numbers in one image; the limit is "
                f"{MAX_WINDOW_NUMBERS}: use smaller kernels, larger strides or smaller images"
            )
    return math.prod((height, width, channels))


def is_image(spaces: Spaces) -> bool:
    """Say whether the observation is one Box with two or three dimensions."""
    return isinstance(spaces.observation, Box) and spaces.observation.low.ndim in (2, 3)


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Say whether [C, H, W] is meant: a stack of frames has fewer channels than rows and columns."""
    return len(shape) == 3 and shape[0] < min(shape[1:])


def image_shape(spaces: Spaces) -> tuple[int, int, int]:
    """Return height, width and channels of an image observation."""
    if not is_image(spaces):
        raise SpaceUnsupported(f"convolutions need an image, a Box of 2 or 3 dimensions; found {spaces.observation.to_json()}")
    assert isinstance(spaces.observation, Box)
    shape = spaces.observation.low.shape
    if len(shape) == 2:
        return (*shape, 1)
    return (*shape[1:], shape[0]) if is_channels_first(shape) else shape


def to_images(x_ND: np.ndarray, spaces: Spaces) -> np.ndarray:
    """Return rows of features as images [..., H, W, C]; leading dimensions stay."""
    assert isinstance(spaces.observation, Box)
    shape = spaces.observation.low.shape
    if is_channels_first(shape):
        return np.moveaxis(x_ND.reshape(*x_ND.shape[:-1], *shape), -3, -1)
    return x_ND.reshape(*x_ND.shape[:-1], *image_shape(spaces))


def from_images(images: np.ndarray, spaces: Spaces) -> np.ndarray:
    """Return images [N, H, W, C] as rows of features: the way back from `to_images`."""
    assert isinstance(spaces.observation, Box)
    if is_channels_first(spaces.observation.low.shape):
        images = np.moveaxis(images, -1, -3)
    return images.reshape(len(images), -1)


def windows(images: np.ndarray, convolution: Convolution) -> np.ndarray:
    """Return the window under each step of a convolution, [K, N * H' * W', kernel * kernel * C], of images [K, N, H, W, C]."""
    side, stride = convolution.kernel, convolution.stride
    views = np.lib.stride_tricks.sliding_window_view(images, (side, side), axis=(2, 3))[:, :, ::stride, ::stride]
    windows_ = np.moveaxis(views, 4, -1)  # [K, N, H', W', kernel, kernel, C]
    return windows_.reshape(images.shape[0], -1, side * side * images.shape[-1])


def convolve(images: np.ndarray, weight: np.ndarray, bias: np.ndarray, convolution: Convolution) -> np.ndarray:
    """Return the convolution of images [K, N, H, W, C]: [K, N, H', W', filters], before any activation."""
    height, width = (_output_size(size, convolution) for size in images.shape[2:4])
    output = windows(images, convolution) @ weight
    output += bias
    return output.reshape(*images.shape[:2], height, width, convolution.filters)


def normalised(x: np.ndarray, tensors: dict[str, np.ndarray], architecture: Architecture) -> np.ndarray:
    """Turn observations [..., D] into what the network gets, in place, and return them."""
    x -= tensors["normaliser.mean"]
    x *= tensors["normaliser.scale"]
    if architecture.observation_clip is not None:
        np.clip(x, -architecture.observation_clip, architecture.observation_clip, out=x)
    return x


def perceptron(layers: Layers, activation: str, x: np.ndarray) -> np.ndarray:
    """Return the output of fully connected layers for rows [..., D]; one product per leading index."""
    activate = ACTIVATIONS[activation]
    for weight, bias in layers[:-1]:
        x = x @ weight
        x += bias
        activate(x, out=x)
    weight, bias = layers[-1]
    x = x @ weight
    x += bias
    return x


def layers_of(tensors: dict[str, np.ndarray], tower: str, num_layers: int) -> Layers:
    """Return the fully connected layers of one tower."""
    return [(tensors[f"{tower}.{layer}.weight"], tensors[f"{tower}.{layer}.bias"]) for layer in range(num_layers)]


def convolutions_of(tensors: dict[str, np.ndarray], tower: str, architecture: Architecture) -> Layers:
    """Return weight and bias of each of a tower's convolutions."""
    return [
        (tensors[f"{tower}.convolution.{index}.weight"], tensors[f"{tower}.convolution.{index}.bias"])
        for index in range(len(architecture.convolutions))
    ]


def inner_features(convolutions: Layers, architecture: Architecture, spaces: Spaces, x_KND: np.ndarray) -> np.ndarray:
    """Return what goes into the perceptron [K, N, features]: normalised observations, through the convolutions if any."""
    if not convolutions:
        return x_KND
    images = to_images(x_KND, spaces)
    for (weight, bias), convolution in zip(convolutions, architecture.convolutions):
        images = convolve(images, weight, bias, convolution)
        ACTIVATIONS[architecture.activation](images, out=images)
    return images.reshape(*images.shape[:2], math.prod(images.shape[2:]))  # also of no rows at all


def _output_size(size: int, convolution: Convolution) -> int:
    return (size - convolution.kernel) // convolution.stride + 1
