"""The networks, distributions and the PPO loss once more, in torch and float64, for tests to compare with.

Written from what the names mean (a weight is [inputs, outputs]; a convolution's inputs are its window's pixels row by row with
their channels) and from torch's own layers and distributions; nothing here knows of the flat vector or of a backward pass.
"""

from typing import Any

import numpy as np
import torch
from torch.distributions import Categorical, Normal
from torch.nn import functional

from policies.network import Architecture
from policies.spaces import Choices, Spaces
from training.ppo import Batch, LossSettings

Tensors = dict[str, torch.Tensor]


def leaves(tensors: dict[str, np.ndarray]) -> Tensors:
    """Return tensors whose gradients will be asked for."""
    return {name: torch.tensor(tensor, dtype=torch.float64, requires_grad=True) for name, tensor in tensors.items()}


def forward(
    tensors: Tensors, spaces: Spaces, architecture: Architecture, x_ND: np.ndarray, *, shares_layers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the policy's outputs [N, O] (log-deviations included) and the values [N]."""
    x = torch.tensor(x_ND, dtype=torch.float64)
    last = len(architecture.hidden)
    hidden = _hidden(tensors, "policy", spaces, architecture, x)
    outputs = hidden @ tensors[f"policy.{last}.weight"] + tensors[f"policy.{last}.bias"]
    if "policy.log_std" in tensors:
        outputs = torch.cat([outputs, tensors["policy.log_std"].expand_as(outputs)], dim=1)
    if shares_layers:
        values = hidden @ tensors["value.head.weight"] + tensors["value.head.bias"]
    else:
        value_hidden = _hidden(tensors, "value", spaces, architecture, x)
        values = value_hidden @ tensors[f"value.{last}.weight"] + tensors[f"value.{last}.bias"]
    return outputs, values[:, 0]


def _hidden(tensors: Tensors, tower: str, spaces: Spaces, architecture: Architecture, x: torch.Tensor) -> torch.Tensor:
    activate = {"tanh": torch.tanh, "relu": torch.relu}[architecture.activation]
    if architecture.convolutions:
        images = _images(spaces, x)
        for index, (filters, kernel, stride) in enumerate(architecture.convolutions):
            weight = tensors[f"{tower}.convolution.{index}.weight"].reshape(kernel, kernel, images.shape[1], filters)
            bias = tensors[f"{tower}.convolution.{index}.bias"]
            images = activate(functional.conv2d(images, weight.permute(3, 2, 0, 1), bias, stride=stride))
        x = images.permute(0, 2, 3, 1).flatten(1)
    for layer in range(len(architecture.hidden)):
        x = activate(x @ tensors[f"{tower}.{layer}.weight"] + tensors[f"{tower}.{layer}.bias"])
    return x


def _images(spaces: Spaces, x: torch.Tensor) -> torch.Tensor:
    """Return images as torch wants them, [N, C, H, W]."""
    shape = spaces.observation.low.shape
    images = x.reshape(len(x), *shape)
    if len(shape) == 2:
        return images[:, None]
    return images if shape[0] < min(shape[1:]) else images.permute(0, 3, 1, 2)


def log_probability_and_entropy(
    spaces: Spaces, outputs_NO: torch.Tensor, actions_NK: np.ndarray, masks_NA: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both [N], summed over the components of an action."""
    if not isinstance(spaces.action, Choices):
        mean, log_std = outputs_NO.chunk(2, dim=1)
        normal = Normal(mean, log_std.clamp(-20, 2).exp())
        return normal.log_prob(torch.tensor(actions_NK, dtype=torch.float64)).sum(1), normal.entropy().sum(1)
    logits = outputs_NO
    if masks_NA is not None:
        logits = logits.masked_fill(torch.tensor(~masks_NA), -1e30)
    parts = [Categorical(logits=part) for part in logits.split(list(spaces.action.nvec), dim=1)]
    actions = torch.tensor(actions_NK)
    logp = sum(part.log_prob(actions[:, k]) for k, part in enumerate(parts))
    return logp, sum(part.entropy() for part in parts)


def ppo_loss(
    spaces: Spaces, outputs_NO: torch.Tensor, values_N: torch.Tensor, batch: Batch, settings: LossSettings
) -> torch.Tensor:
    """Return the loss, term by term as https://arxiv.org/abs/1707.06347 has them."""

    def constant(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=torch.float64)

    logp, entropy = log_probability_and_entropy(spaces, outputs_NO, batch.actions_NK, batch.masks_NA)
    ratio = torch.exp(logp - constant(batch.logp_N))
    advantages, returns = constant(batch.advantages_N), constant(batch.returns_N)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - settings.clip_param, 1 + settings.clip_param) * advantages)
    if batch.weights_N is not None:
        surrogate = surrogate * constant(batch.weights_N)
    if settings.vf_clip_param is not None:
        old = constant(batch.values_N)
        values_N = old + (values_N - old).clamp(-settings.vf_clip_param, settings.vf_clip_param)
    value_loss = functional.mse_loss(values_N, returns)
    return -surrogate.mean() + settings.vf_loss_coeff * value_loss - settings.entropy_coeff * entropy.mean()


def gradients(tensors: Tensors, loss: torch.Tensor) -> dict[str, Any]:
    """Return the loss's gradient by each tensor, zero for one that plays no part in it."""
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {
        name: np.zeros(tuple(tensor.shape)) if gradient is None else gradient.numpy()
        for (name, tensor), gradient in zip(tensors.items(), found)
    }
