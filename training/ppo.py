"""How a policy is improved from rollouts: proximal policy optimisation on one flat parameter vector.

The loss is defined once, here, with its gradient by the network's outputs; how that flows through the layers is
`training/network.py`. Neither needs torch: a step of two small towers costs a fifth of what torch's dispatch does.

N steps of a batch or minibatch, D feature, O network outputs, K component of an action, P parameter.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from policies.errors import TrainingFailed
from training.config import TrainingConfig, value_at
from training.gae import advantages, vtrace
from training.heads import Head, head_of
from training.learner_state import LearnerState, UpdateReport
from training.network import Layout, network_of
from training.rollout import Rollout
from training.seeds import Stream, generator

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-5  # epsilon as in the PPO paper's code; torch's default is 1e-8
MAX_REWARD = 10.0  # deviations; as stable-baselines3 clips normalised rewards
KL_TOLERANCE = 1.5  # an update ends when its KL is this many times the target, as in stable-baselines3


@dataclass(frozen=True)
class Batch:
    """The steps of an update that really happened."""

    x_ND: np.ndarray  # normalised observations
    actions_NK: np.ndarray
    masks_NA: np.ndarray | None
    logp_N: np.ndarray  # under the policy at the beginning of the update
    values_N: np.ndarray  # likewise
    advantages_N: np.ndarray
    returns_N: np.ndarray
    weights_N: np.ndarray | None  # probability of the action now over that when it was drawn, at most 1; None: they are equal

    def __len__(self) -> int:
        return len(self.x_ND)

    def rows(self, index_N: np.ndarray) -> "Batch":
        """Return some of the steps."""
        columns = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if column is None else column[index_N] for column in columns))


@dataclass(frozen=True)
class LossSettings:
    """The settings of one update, after their schedules."""

    clip_param: float
    vf_loss_coeff: float
    vf_clip_param: float | None
    entropy_coeff: float


@dataclass(frozen=True)
class Loss:
    """A loss, what it is made of, and its gradients by the network's outputs [N, O] and values [N]."""

    loss: float
    policy_loss: float
    value_loss: float
    entropy: float
    kl: float
    clip_fraction: float
    d_outputs_NO: np.ndarray
    d_values_N: np.ndarray


def ppo_loss(head: Head, outputs_NO: np.ndarray, values_N: np.ndarray, batch: Batch, settings: LossSettings) -> Loss:
    """Return the clipped surrogate loss and its gradients; equations 7 and 9 of https://arxiv.org/abs/1707.06347.

        ratio = pi(a|s) / pi_old(a|s)
        L = -mean(w min(ratio A, clip(ratio) A)) + c_v mean((V - R)^2) - c_e mean(H)

    `w` is 1 unless the actions are from an older policy than pi_old. With `vf_clip_param` V is V_old plus at most that much,
    as in stable-baselines3. `kl` is the estimator k3 of http://joschu.net/blog/kl-approx.html, never negative.
    """
    num_steps = np.float32(len(outputs_NO))
    evaluated = head.evaluate(outputs_NO, batch.actions_NK, batch.masks_NA)
    log_ratio_N = evaluated.logp_N - batch.logp_N
    ratio_N = np.exp(log_ratio_N)
    clipped_N = np.clip(ratio_N, 1 - settings.clip_param, 1 + settings.clip_param)
    weighted_N = batch.advantages_N if batch.weights_N is None else batch.advantages_N * batch.weights_N
    gain_N, clipped_gain_N = ratio_N * weighted_N, clipped_N * weighted_N
    d_logp_N = np.where(gain_N <= clipped_gain_N, gain_N, 0)  # where the clipped gain is smaller, nothing moves it any more
    d_logp_N /= -num_steps

    error_N, is_free_N = values_N - batch.returns_N, None
    if settings.vf_clip_param is not None:
        change_N = np.clip(values_N - batch.values_N, -settings.vf_clip_param, settings.vf_clip_param)
        is_free_N = change_N == values_N - batch.values_N
        error_N = batch.values_N + change_N - batch.returns_N
    d_values_N = error_N * np.float32(2 * settings.vf_loss_coeff / num_steps)
    if is_free_N is not None:
        d_values_N *= is_free_N

    policy_loss = -float(np.minimum(gain_N, clipped_gain_N).mean())
    value_loss = float(error_N @ error_N) / float(num_steps)
    entropy = float(evaluated.entropy_N.mean())
    return Loss(
        loss=policy_loss + settings.vf_loss_coeff * value_loss - settings.entropy_coeff * entropy,
        policy_loss=policy_loss,
        value_loss=value_loss,
        entropy=entropy,
        kl=float((ratio_N - 1 - log_ratio_N).mean()),
        clip_fraction=float((clipped_N != ratio_N).mean()),
        d_outputs_NO=head.gradient(evaluated, d_logp_N, -settings.entropy_coeff / float(num_steps)),
        d_values_N=d_values_N,
    )


class PPO:
    """Improves its copy of a `LearnerState`, update by update; the same rollouts give the same bits."""

    def __init__(self, layout: Layout, training: TrainingConfig, state: LearnerState) -> None:
        self._training = training
        self._head = head_of(layout.spaces, layout.architecture)
        self.state = copy.deepcopy(state)  # arrays that came through Ray are read-only, and these change in place
        self._network = network_of(layout, self.state.parameters_P)

    def update(self, rollouts: Sequence[Rollout]) -> UpdateReport:
        """Learn from one fragment of every shard; raises `TrainingFailed` when the parameters stop being finite."""
        rollouts = sorted(rollouts, key=lambda rollout: rollout.shard)  # sums depend on the order: make it the shards' own
        training, state = self._training, self.state
        lags = [state.update - rollout.version for rollout in rollouts]
        batch = self._batch(rollouts)
        lr = value_at(training.lr, state.env_steps)
        rows, num_epochs = self._learn(batch, lr)
        if not np.isfinite(state.parameters_P).all():
            raise TrainingFailed(f"parameters are no longer finite after update {state.update}; lower lr ({lr:g})")
        if training.normalize_observations:
            self._update_normaliser(np.concatenate([r.obs_TBD[:-1][r.valid_TB] for r in rollouts]))
        state.update += 1
        state.env_steps += len(batch)
        return UpdateReport(
            len(batch),
            *np.mean(rows, axis=0).tolist(),
            explained_variance=_explained_variance(batch),
            num_epochs=num_epochs,
            lr=lr,
            lag_mean=float(np.mean(lags)),
            lag_max=max(lags),
        )

    def _learn(self, batch: Batch, lr: float) -> tuple[list[tuple[float, ...]], int]:
        """Go over the batch several times; return the statistics of each minibatch and the number of epochs made."""
        training, steps = self._training, self.state.env_steps
        settings = LossSettings(
            clip_param=value_at(training.clip_param, steps),
            vf_loss_coeff=training.vf_loss_coeff,
            vf_clip_param=training.vf_clip_param,
            entropy_coeff=value_at(training.entropy_coeff, steps),
        )
        rng = generator(training.seed, Stream.MINIBATCHES, self.state.update)
        # Nearly equal parts of all rows: none is dropped, and none is so small that its gradient is mostly noise.
        bounds = np.linspace(0, len(batch), -(-len(batch) // training.minibatch_size) + 1).astype(int)
        rows: list[tuple[float, ...]] = []
        for epoch in range(training.num_epochs):
            shuffled = batch.rows(rng.permutation(len(batch)))
            for start, end in zip(bounds, bounds[1:]):
                rows.append(self._minibatch_step(shuffled.rows(slice(start, end)), settings, lr))
                if self._is_too_far(kl=rows[-1][3]):
                    return rows, epoch + 1
        return rows, training.num_epochs

    def _minibatch_step(self, batch: Batch, settings: LossSettings, lr: float) -> tuple[float, ...]:
        """Take one step of the optimiser; return policy loss, value loss, entropy, KL, clip fraction and gradient norm.

        When the policy has moved too far already, it stays where it is.
        """
        if self._training.normalize_advantages and len(batch) > 1:
            centred_N = batch.advantages_N - batch.advantages_N.mean()
            batch = replace(batch, advantages_N=centred_N / (batch.advantages_N.std(ddof=1) + np.float32(1e-8)))
        gradient_P, statistics = self._gradient(batch, settings)
        norm = float(np.sqrt(gradient_P @ gradient_P))
        gradient_P *= np.float32(min(1.0, self._training.grad_clip / (norm + 1e-6)))
        if not self._is_too_far(kl=statistics[3]):
            self._adam_step(gradient_P, lr)
        return *statistics, norm

    def _gradient(self, batch: Batch, settings: LossSettings) -> tuple[np.ndarray, tuple[float, ...]]:
        """Return the gradient and the statistics of a minibatch: the means of its parts, which fit into a core's cache."""
        gradient_P, statistics = np.zeros_like(self.state.parameters_P), np.zeros(5)
        for start in range(0, len(batch), self._network.rows_at_once):
            part = batch.rows(slice(start, start + self._network.rows_at_once))
            outputs_NO, values_N = self._network.forward(part.x_ND)
            loss = ppo_loss(self._head, outputs_NO, values_N, part, settings)
            share = len(part) / len(batch)
            gradient_P += self._network.backward(loss.d_outputs_NO, loss.d_values_N) * np.float32(share)
            statistics += np.multiply((loss.policy_loss, loss.value_loss, loss.entropy, loss.kl, loss.clip_fraction), share)
        return gradient_P, tuple(statistics.tolist())

    def _is_too_far(self, *, kl: float) -> bool:
        return self._training.kl_target is not None and kl > KL_TOLERANCE * self._training.kl_target

    def _adam_step(self, gradient_P: np.ndarray, lr: float) -> None:
        """Algorithm 1 of https://arxiv.org/abs/1412.6980 on the whole vector."""
        state = self.state
        state.adam_steps += 1
        state.adam_m_P *= np.float32(ADAM_BETA1)
        state.adam_m_P += np.float32(1 - ADAM_BETA1) * gradient_P
        state.adam_v_P *= np.float32(ADAM_BETA2)
        gradient_P *= gradient_P
        state.adam_v_P += np.float32(1 - ADAM_BETA2) * gradient_P
        denominator_P = np.sqrt(state.adam_v_P)
        denominator_P *= np.float32((1 - ADAM_BETA2**state.adam_steps) ** -0.5)
        denominator_P += np.float32(ADAM_EPSILON)
        np.divide(state.adam_m_P, denominator_P, out=denominator_P)
        denominator_P *= np.float32(lr / (1 - ADAM_BETA1**state.adam_steps))
        state.parameters_P -= denominator_P

    def _batch(self, rollouts: Sequence[Rollout]) -> Batch:
        parts = [self._part(rollout) for rollout in self._with_scaled_rewards(rollouts)]
        columns = zip(*((getattr(part, field.name) for field in fields(Batch)) for part in parts))
        return Batch(*(None if column[0] is None else np.concatenate(column) for column in columns))

    def _part(self, rollout: Rollout) -> Batch:
        """Return one shard's valid steps. What was collected with older weights is evaluated again with those of now."""
        weights, valid_TB = self.state.weights(), rollout.valid_TB
        x_TBD = weights.normalised(rollout.obs_TBD)
        x_ND = x_TBD[:-1][valid_TB]
        actions_NK = rollout.actions_TBK[valid_TB]
        masks_NA = None if rollout.masks_TBA is None else rollout.masks_TBA[valid_TB]
        terms = rollout.rewards_TB, rollout.terminateds_TB, rollout.truncateds_TB
        discounts = {"gamma": self._training.gamma, "lambda_": self._training.lambda_}
        if rollout.version == self.state.update:
            values_TB = rollout.values_TB[:-1]
            next_values_TB = rollout.next_values(rollout.values_TB, rollout.final_values_F)
            advantages_TB = advantages(terms[0], values_TB, next_values_TB, *terms[1:], **discounts)
            returns_TB, logp_N, weights_N = advantages_TB + values_TB, rollout.logp_TB[valid_TB], None
        else:
            final_x_FD = weights.normalised(rollout.final_obs_FD)
            all_values_TB = self._network.values(x_TBD.reshape(-1, x_TBD.shape[-1])).reshape(x_TBD.shape[:2])
            values_TB, next_values_TB = all_values_TB[:-1], rollout.next_values(all_values_TB, self._network.values(final_x_FD))
            logp_N = self._head.log_probability(self._network.outputs(x_ND), actions_NK, masks_NA)
            ratios_TB = np.ones(valid_TB.shape, np.float32)
            ratios_TB[valid_TB] = np.exp(logp_N - rollout.logp_TB[valid_TB])
            advantages_TB, returns_TB = vtrace(ratios_TB, terms[0], values_TB, next_values_TB, *terms[1:], **discounts)
            weights_N = np.minimum(1, ratios_TB[valid_TB])
        values_N, advantages_N, returns_N = (array[valid_TB] for array in (values_TB, advantages_TB, returns_TB))
        return Batch(x_ND, actions_NK, masks_NA, logp_N, values_N, advantages_N, returns_N, weights_N)

    def _with_scaled_rewards(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        """Divide rewards by the deviation of their discounted sums so far, these fragments included."""
        if not self._training.normalize_rewards:
            return rollouts
        for rollout in rollouts:
            self.state.return_moments = np.array(merged_moments(self.state.return_moments, rollout.return_moments))
        count, _, m2 = self.state.return_moments
        scale = 1 / np.sqrt(m2 / count + 1e-8)
        return [
            replace(rollout, rewards_TB=np.clip(rollout.rewards_TB * scale, -MAX_REWARD, MAX_REWARD).astype(np.float32))
            for rollout in rollouts
        ]

    def _update_normaliser(self, obs_ND: np.ndarray) -> None:
        """Join the batch's mean and spread to the running ones."""
        state, obs_ND = self.state, obs_ND.astype(np.float64)
        batch = len(obs_ND), obs_ND.mean(axis=0), obs_ND.var(axis=0) * len(obs_ND)
        before = state.normaliser_count, state.normaliser_mean_D, state.normaliser_m2_D
        state.normaliser_count, state.normaliser_mean_D, state.normaliser_m2_D = merged_moments(before, batch)


def merged_moments(a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return count, mean and sum of squared distances of two samples together (Chan, Golub and LeVeque's formula)."""
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = a, b
    count = count_a + count_b
    delta = mean_b - mean_a
    return count, mean_a + delta * (count_b / count), m2_a + m2_b + delta**2 * (count_a * count_b / count)


def _explained_variance(batch: Batch) -> float:
    """Return the share of the returns' variance that the value function knew before the update; 0 for constant returns."""
    variance = float(batch.returns_N.var())
    return 1 - float((batch.returns_N - batch.values_N).var()) / variance if variance > 0 else 0.0
