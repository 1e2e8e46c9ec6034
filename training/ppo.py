"""How a policy is improved from rollouts: proximal policy optimisation on one flat parameter vector.

Importing this module imports torch (1.8 s), so only what trains or makes golden vectors does, and late.

N steps of a batch, M of a minibatch, D feature, A action, P parameter.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from policies.errors import TrainingFailed
from policies.policy import Policy, tensor_shapes
from training.config import TrainingConfig
from training.gae import advantages
from training.learner_state import LearnerState, UpdateReport
from training.network import Layout
from training.rollout import Rollout
from training.seeds import Stream, generator

ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}
ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-5  # epsilon as in the PPO paper's code; torch's default is 1e-8


@dataclass(frozen=True)
class Batch:
    """The steps of an update that really happened, as torch tensors."""

    x_ND: torch.Tensor  # normalised observations
    actions_N: torch.Tensor
    logp_N: torch.Tensor
    advantages_N: torch.Tensor
    returns_N: torch.Tensor


class PPO:
    """Improves its copy of a `LearnerState`, update by update; bit-reproducible because it uses one thread."""

    def __init__(self, layout: Layout, training: TrainingConfig, state: LearnerState) -> None:
        torch.set_num_threads(1)
        self._layout = layout
        self._training = training
        self.state = copy.deepcopy(state)  # arrays that came through Ray are read-only, and these change in place
        self._parameters_P = torch.from_numpy(self.state.parameters_P).requires_grad_()
        self._adam_m_P = torch.from_numpy(self.state.adam_m_P)
        self._adam_v_P = torch.from_numpy(self.state.adam_v_P)

    def update(self, rollouts: Sequence[Rollout]) -> UpdateReport:
        """Learn from one fragment of every shard; raises `TrainingFailed` when the parameters stop being finite."""
        rollouts = sorted(rollouts, key=lambda rollout: rollout.shard)  # sums depend on the order: make it the shards' own
        batch = self._batch(rollouts)
        rng = generator(self._training.seed, Stream.MINIBATCHES, self.state.update)
        num_minibatches = -(-len(batch.actions_N) // self._training.minibatch_size)
        rows = []
        for _ in range(self._training.num_epochs):
            # Nearly equal parts of all rows: none is dropped, and none is so small that its gradient is mostly noise.
            for index_M in np.array_split(rng.permutation(len(batch.actions_N)), num_minibatches):
                rows.append(self._minibatch_step(batch, torch.from_numpy(index_M)))
        means = torch.stack(rows).mean(dim=0).tolist()
        if not np.isfinite(self.state.parameters_P).all():
            raise TrainingFailed(
                f"parameters are no longer finite after update {self.state.update}; lower lr ({self._training.lr})"
            )
        if self._training.normalize_observations:
            self._update_normaliser(np.concatenate([r.obs_TBD[:-1][r.valid_TB] for r in rollouts]))
        self.state.update += 1
        num_env_steps = len(batch.actions_N)
        self.state.env_steps += num_env_steps
        return UpdateReport(num_env_steps, *means, explained_variance=_explained_variance(rollouts, batch))

    def _batch(self, rollouts: Sequence[Rollout]) -> Batch:
        weights = self.state.weights()
        valid = [r.valid_TB for r in rollouts]
        advantages_ = [
            advantages(
                r.rewards_TB,
                r.values_TB,
                r.terminateds_TB,
                r.truncateds_TB,
                gamma=self._training.gamma,
                lambda_=self._training.lambda_,
            )
            for r in rollouts
        ]
        advantages_N = np.concatenate([a[v] for a, v in zip(advantages_, valid)])
        values_N = np.concatenate([r.values_TB[:-1][v] for r, v in zip(rollouts, valid)])
        obs_ND = np.concatenate([r.obs_TBD[:-1][v] for r, v in zip(rollouts, valid)])
        normalised_N = (advantages_N - advantages_N.mean()) / (advantages_N.std() + 1e-8)
        return Batch(
            x_ND=torch.from_numpy((obs_ND - weights.normaliser_mean_D) * weights.normaliser_scale_D),
            actions_N=torch.from_numpy(np.concatenate([r.actions_TB[v] for r, v in zip(rollouts, valid)])),
            logp_N=torch.from_numpy(np.concatenate([r.logp_TB[v] for r, v in zip(rollouts, valid)])),
            advantages_N=torch.from_numpy(normalised_N),
            returns_N=torch.from_numpy(advantages_N + values_N),
        )

    def _minibatch_step(self, batch: Batch, index_M: torch.Tensor) -> torch.Tensor:
        minibatch = Batch(*(getattr(batch, name)[index_M] for name in Batch.__dataclass_fields__))
        loss, statistics = ppo_loss(self._parameters_P, self._layout, self._training, minibatch)
        (gradient_P,) = torch.autograd.grad(loss, self._parameters_P)
        norm = torch.linalg.vector_norm(gradient_P)
        gradient_P *= torch.clamp(self._training.grad_clip / (norm + 1e-6), max=1)
        self._adam_step(gradient_P)
        return torch.cat([statistics, norm.reshape(1)])

    @torch.no_grad()
    def _adam_step(self, gradient_P: torch.Tensor) -> None:
        """Algorithm 1 of https://arxiv.org/abs/1412.6980 on the whole vector; `torch.optim` alone takes 1.7 s to import."""
        self.state.adam_steps += 1
        self._adam_m_P.mul_(ADAM_BETA1).add_(gradient_P, alpha=1 - ADAM_BETA1)
        self._adam_v_P.mul_(ADAM_BETA2).addcmul_(gradient_P, gradient_P, value=1 - ADAM_BETA2)
        correction1 = 1 - ADAM_BETA1**self.state.adam_steps
        correction2 = 1 - ADAM_BETA2**self.state.adam_steps
        denominator_P = self._adam_v_P.sqrt().mul_(correction2**-0.5).add_(ADAM_EPSILON)
        self._parameters_P.addcdiv_(self._adam_m_P, denominator_P, value=-self._training.lr / correction1)

    def _update_normaliser(self, obs_ND: np.ndarray) -> None:
        """Join the batch's mean and spread to the running ones (Chan, Golub and LeVeque's formula)."""
        state, obs_ND = self.state, obs_ND.astype(np.float64)
        count = state.normaliser_count + len(obs_ND)
        delta_D = obs_ND.mean(axis=0) - state.normaliser_mean_D
        state.normaliser_m2_D += obs_ND.var(axis=0) * len(obs_ND) + delta_D**2 * (state.normaliser_count * len(obs_ND) / count)
        state.normaliser_mean_D += delta_D * (len(obs_ND) / count)
        state.normaliser_count = count


def ppo_loss(
    parameters_P: torch.Tensor, layout: Layout, training: TrainingConfig, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and [policy loss, value loss, entropy, KL, clip fraction]; equations 7 and 9 of https://arxiv.org/abs/1707.06347."""
    tensors = split(parameters_P, layout)
    log_probabilities_NA = torch.log_softmax(tower(tensors, "policy", layout, training.activation, batch.x_ND), dim=1)
    values_N = tower(tensors, "value", layout, training.activation, batch.x_ND).squeeze(1)

    logp_N = log_probabilities_NA.gather(1, batch.actions_N.unsqueeze(1)).squeeze(1)
    log_ratio_N = logp_N - batch.logp_N
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - training.clip_param, 1 + training.clip_param)
    policy_loss = -torch.minimum(ratio_N * batch.advantages_N, clipped_N * batch.advantages_N).mean()
    value_loss = (values_N - batch.returns_N).square().mean()
    entropy = -(log_probabilities_NA.exp() * log_probabilities_NA).sum(dim=1).mean()
    loss = policy_loss + training.vf_loss_coeff * value_loss - training.entropy_coeff * entropy

    with torch.no_grad():
        kl = (ratio_N - 1 - log_ratio_N).mean()  # k3 of http://joschu.net/blog/kl-approx.html: unbiased and never negative
        clip_fraction = ((ratio_N - 1).abs() > training.clip_param).float().mean()
        statistics = torch.stack([policy_loss, value_loss, entropy, kl, clip_fraction])
    return loss, statistics


def split(parameters_P: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Return differentiable views of the flat vector by name."""
    shapes = layout.shapes()
    parts = parameters_P.split([prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}


def tower(tensors: dict[str, torch.Tensor], name: str, layout: Layout, activation: str, x_ND: torch.Tensor) -> torch.Tensor:
    """Return the outputs of one MLP, `policy` or `value`, for normalised observations."""
    last = layout.num_layers - 1
    for layer in range(last):
        x_ND = ACTIVATIONS[activation](torch.addmm(tensors[f"{name}.{layer}.bias"], x_ND, tensors[f"{name}.{layer}.weight"]))
    return torch.addmm(tensors[f"{name}.{last}.bias"], x_ND, tensors[f"{name}.{last}.weight"])


@torch.no_grad()
def action_probabilities(policy: Policy, obs_BD: np.ndarray) -> np.ndarray:
    """Return float64 action probabilities [B, A] as training computes them: the truth that golden vectors carry."""
    tensors = {name: torch.from_numpy(policy.tensors[name]) for name in tensor_shapes(policy.architecture, policy.spaces)}
    x_BD = (torch.from_numpy(np.asarray(obs_BD, np.float32)) - tensors["normaliser.mean"]) * tensors["normaliser.scale"]
    layout = Layout(policy.spaces, policy.architecture)
    logits_BA = tower(tensors, "policy", layout, policy.architecture.activation, x_BD)
    return torch.softmax(logits_BA.double(), dim=1).numpy()


def _explained_variance(rollouts: Sequence[Rollout], batch: Batch) -> float:
    """Return the share of the returns' variance that the value function knew before the update; 0 for constant returns."""
    values_N = np.concatenate([r.values_TB[:-1][r.valid_TB] for r in rollouts])
    returns_N = batch.returns_N.numpy()
    variance = float(returns_N.var())
    return 1 - float((returns_N - values_N).var()) / variance if variance > 0 else 0.0
