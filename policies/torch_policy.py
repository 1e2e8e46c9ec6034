"""A policy once more as a `torch.nn.Module`, for runtimes that are not ours: from a plain observation to a distribution.

Everything that `Policy.distributions` does is inside: normaliser, clip, network, deviation, mask. An export made of this module
needs no code beside it that could be forgotten. Importing this imports torch.

N rows, D features, H, W, C height, width and channels of an image, A choices, P numbers of a distribution.
"""

import numpy as np
import torch
from torch import nn

from policies.network import (
    MODULE_PREFIX,
    Architecture,
    convolutions_of,
    image_shape,
    is_channels_first,
    layers_of,
    num_outputs,
)
from policies.observations import Box
from policies.policy import Policy
from policies.spaces import Choices, Spaces
from policies.torch_network import ModuleNetwork

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class TorchPolicy(nn.Module):
    """Computes `policy.distributions` with torch, in float32; it has copies of the policy's tensors.

    Raises what `policies.torch_network.build` raises for a network of the user's own.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._clip = policy.architecture.observation_clip
        self.register_buffer("mean", _tensor(policy.tensors["normaliser.mean"]))
        self.register_buffer("scale", _tensor(policy.tensors["normaliser.scale"]))
        self.network = _users_network(policy) if policy.architecture.module else _network(policy)
        self.head = _Probabilities(policy.spaces.action) if isinstance(policy.spaces.action, Choices) else _MeanAndStd(policy)
        self.eval().requires_grad_(False)

    def forward(self, observations: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
        """Return distributions float32 [N, P] for observations float32 [N, D] and, where there are masks, bool [N, A]."""
        x_ND = (observations - self.mean) * self.scale
        if self._clip is not None:
            x_ND = torch.clamp(x_ND, -self._clip, self._clip)
        return self.head(self.network(x_ND), masks)


class _Probabilities(nn.Module):
    """The probability of every choice, per component; of a masked one exactly 0."""

    def __init__(self, action: Choices) -> None:
        super().__init__()
        self._sizes = list(action.nvec)

    def forward(self, logits_NA: torch.Tensor, masks_NA: torch.Tensor | None) -> torch.Tensor:
        if masks_NA is not None:
            logits_NA = torch.where(masks_NA, logits_NA, -torch.inf)
        if len(self._sizes) == 1:
            return torch.softmax(logits_NA, dim=1)
        return torch.cat([torch.softmax(part, dim=1) for part in torch.split(logits_NA, self._sizes, dim=1)], dim=1)


class _MeanAndStd(nn.Module):
    """Mean and standard deviation per number, side by side, on the policy's own scale."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        gaussian = policy.architecture.gaussian
        assert gaussian is not None, "real-valued actions need a Gaussian head"
        self._num_components, self._range = policy.spaces.action.num_components, gaussian.log_std_range
        log_std_K = policy.tensors.get("policy.log_std")
        self.register_buffer("log_std", None if log_std_K is None else _tensor(log_std_K))

    def forward(self, outputs_NO: torch.Tensor, masks_NA: torch.Tensor | None) -> torch.Tensor:
        mean_NK = outputs_NO[:, : self._num_components]
        log_std_NK = outputs_NO[:, self._num_components :] if self.log_std is None else self.log_std.expand_as(mean_NK)
        return torch.cat([mean_NK, torch.exp(torch.clamp(log_std_NK, *self._range))], dim=1)


class _Image(nn.Module):
    """Rows of features as torch's images [N, C, H, W]."""

    def __init__(self, spaces: Spaces) -> None:
        super().__init__()
        assert isinstance(spaces.observation, Box)
        self._is_channels_first = is_channels_first(spaces.observation.low.shape)
        self._height, self._width, self._channels = image_shape(spaces)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        if self._is_channels_first:
            return x_ND.reshape(-1, self._channels, self._height, self._width)
        return x_ND.reshape(-1, self._height, self._width, self._channels).permute(0, 3, 1, 2)


class _ChannelsLast(nn.Module):
    """Torch's images as [N, H, W, C]: the perceptron's weights count the features in this order."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 2, 3, 1)


class _UsersNetwork(nn.Module):
    """A network of the user's own without its values, which only training asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return self.network(x_ND)[0]


def _network(policy: Policy) -> nn.Sequential:
    architecture = policy.architecture
    layers: list[nn.Module] = []
    if architecture.convolutions:
        layers += [_Image(policy.spaces), *_convolutions(policy, architecture), _ChannelsLast(), nn.Flatten()]
    *hidden, last = layers_of(policy.tensors, "policy", len(architecture.hidden) + 1)
    for weight, bias in hidden:
        layers += [_linear(weight, bias), ACTIVATIONS[architecture.activation]()]
    return nn.Sequential(*layers, _linear(*last))


def _convolutions(policy: Policy, architecture: Architecture) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = image_shape(policy.spaces)[2]
    for (weight, bias), (filters, kernel, stride) in zip(
        convolutions_of(policy.tensors, "policy", architecture), architecture.convolutions
    ):
        layer = nn.Conv2d(channels, filters, kernel, stride)
        # Ours has the window's pixels, row by row with their channels, as inputs; torch's is [filters, C, row, column].
        layer.weight.data = _tensor(weight.reshape(kernel, kernel, channels, filters).transpose(3, 2, 0, 1))
        layer.bias.data = _tensor(bias)
        layers += [layer, ACTIVATIONS[architecture.activation]()]
        channels = filters
    return layers


def _linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    layer = nn.Linear(*weight.shape)
    layer.weight.data, layer.bias.data = _tensor(weight.T), _tensor(bias)
    return layer


def _users_network(policy: Policy) -> _UsersNetwork:
    architecture, spaces = policy.architecture, policy.spaces
    assert architecture.module is not None
    tensors = {
        name.removeprefix(MODULE_PREFIX): tensor.copy()
        for name, tensor in policy.tensors.items()
        if name.startswith(MODULE_PREFIX)
    }
    module = ModuleNetwork(architecture.module, tensors, spaces.num_features, num_outputs(architecture, spaces))
    return _UsersNetwork(module.network)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32, order="C"))  # a copy of its own
