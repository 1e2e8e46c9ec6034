"""What can happen to an observation on its way to the policy: noise, broken sensors, and whatever is worst for it.

B row (one environment, one episode), D feature, F feature of the newest observation alone (of a policy with a history), A choices
of an action mask, P numbers of a distribution.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from policies.distributions import Scale
from policies.policy import Policy
from policies.spaces import Action, Choices
from training.network import outputs_gradient

Kind = Literal["noise", "dropout", "stuck", "delay", "drift", "worst_case"]
KINDS: tuple[Kind, ...] = get_args(Kind)

STUCK_STEPS = 10
DRIFT_STEPS = 100
ATTACK_STEPS = 5
_NOT_USED = np.random.default_rng(0)  # greedy actions draw nothing


@dataclass(frozen=True, eq=False)
class Perturbation:
    """One kind of disturbance with its strength. `spread_D` are the features' standard deviations in undisturbed episodes.

    noise       a normal number is added to each feature; strength is its deviation as a share of the spread
    dropout     each reading is 0 with probability `strength`
    stuck       each reading begins with probability `strength` to stay as it is for STUCK_STEPS steps
    delay       all of it comes `strength` steps late (a whole number)
    drift       each feature of each episode is scaled by a factor that moves from 1 to 1 + u within DRIFT_STEPS steps, u drawn
                once from [-strength, strength]
    worst_case  each feature moves by at most strength * spread, so that the policy's favourite action becomes least favoured:
                projected gradient descent on the margin (Madry et al. 2018, https://arxiv.org/abs/1706.06083). For real-valued
                actions: so that the mean moves as far as it can.

    Of a policy with a history the first three and drift are what happens to sensors, once for each observation: what they said
    stays in what the policy sees after. The worst case moves all that it sees, in each step anew.
    """

    kind: Kind
    strength: float
    spread_D: np.ndarray


class Disturbance:
    """A perturbation at work on episodes that run side by side; it remembers what the sensors showed before."""

    def __init__(self, perturbation: Perturbation, policy: Policy, num_rows: int, rng: np.random.Generator) -> None:
        self._perturbation = perturbation
        self._policy = policy
        self._rng = rng
        self._num_steps = 0
        self._before: list[np.ndarray] = []  # what came before, oldest first, as far back as the delay reaches
        self._num_sensed = policy.spaces.num_features // policy.spaces.history
        self._remembered: np.ndarray | None = None
        shape = (num_rows, self._num_sensed)
        self._stuck_until = np.zeros(shape, np.int64)
        self._drift_BF = rng.uniform(-1, 1, shape) if perturbation.kind == "drift" else None

    def seen(self, obs_BD: np.ndarray, mask_BA: np.ndarray | None) -> np.ndarray:
        """Return what the policy gets to see in the place of the next observations: float32 [B, D]."""
        p, t = self._perturbation, self._num_steps
        self._num_steps += 1
        if p.kind == "delay":
            self._before = [*self._before, obs_BD][-1 - round(p.strength) :]
            return self._before[0]
        if p.kind == "worst_case":
            return worst_case(self._policy, obs_BD, mask_BA, radius_D=p.strength * p.spread_D, rng=self._rng)
        return self._behind_what_was_sensed(self._sensed(obs_BD[:, -self._num_sensed :], t))

    def _sensed(self, obs_BF: np.ndarray, t: int) -> np.ndarray:
        """Return what sensors say of the newest observation."""
        p, rng = self._perturbation, self._rng
        if p.kind == "noise":
            spread_F = p.spread_D[-self._num_sensed :]
            return obs_BF + (rng.standard_normal(obs_BF.shape) * (p.strength * spread_F)).astype(np.float32)
        if p.kind == "dropout":
            return np.where(rng.random(obs_BF.shape) < p.strength, np.float32(0), obs_BF)
        if p.kind == "stuck":
            return self._stuck(obs_BF, t)
        factor_BF = 1 + p.strength * min(t / DRIFT_STEPS, 1) * self._drift_BF
        return (obs_BF * factor_BF).astype(np.float32)

    def _behind_what_was_sensed(self, seen_BF: np.ndarray) -> np.ndarray:
        """Return a policy's whole observation: with a history it still sees what the sensors said before, right or wrong."""
        if self._remembered is None:
            self._remembered = np.tile(seen_BF, self._policy.spaces.history)
        else:
            self._remembered = np.concatenate([self._remembered[:, self._num_sensed :], seen_BF], axis=1)
        return self._remembered

    def _stuck(self, obs_BF: np.ndarray, t: int) -> np.ndarray:
        is_stuck_BF = self._stuck_until > t
        seen_BF = np.where(is_stuck_BF, self._before[0], obs_BF) if self._before else obs_BF
        begins_BF = ~is_stuck_BF & (self._rng.random(obs_BF.shape) < self._perturbation.strength)
        self._stuck_until[begins_BF] = t + 1 + STUCK_STEPS
        self._before = [seen_BF]
        return seen_BF


def worst_case(
    policy: Policy,
    obs_BD: np.ndarray,
    mask_BA: np.ndarray | None,
    *,
    radius_D: np.ndarray,
    rng: np.random.Generator,
    num_steps: int = ATTACK_STEPS,
) -> np.ndarray:
    """Return observations within `radius_D` of the true ones, moved as far against the policy as a few steps can.

    Each step goes by the sign of the gradient, which is the steepest way inside a box, and from a random start: where the
    loss has its minimum there is no gradient to follow.
    """
    radius_D = radius_D.astype(np.float32)
    undisturbed_BP = policy.distributions(obs_BD, mask_BA)
    seen_BD = obs_BD + radius_D * rng.uniform(-1, 1, obs_BD.shape).astype(np.float32)
    best_BD, best_B = obs_BD, np.full(len(obs_BD), -np.inf)
    for step in range(num_steps + 1):
        outputs_BO, gradient_of = outputs_gradient(policy, seen_BD)
        loss_B, d_outputs_BO = _loss(policy, undisturbed_BP, outputs_BO, mask_BA)
        is_better_B = loss_B > best_B
        best_B = np.where(is_better_B, loss_B, best_B)
        best_BD = np.where(is_better_B[:, None], seen_BD, best_BD)
        if step == num_steps:
            return best_BD
        seen_BD = seen_BD + (2 * radius_D / num_steps) * np.sign(gradient_of(d_outputs_BO))
        seen_BD = np.clip(seen_BD, obs_BD - radius_D, obs_BD + radius_D)
    raise AssertionError("the last step returns")


def action_change(policy: Policy, before_BP: np.ndarray, after_BP: np.ndarray) -> np.ndarray:
    """Return how far the greedy actions of two of a policy's distributions are apart [B]: see `action_distance`."""
    actions = [policy.distribution.choose_rows(p_BP, "greedy", _NOT_USED) for p_BP in (before_BP, after_BP)]
    return action_distance(policy.spaces.action, *actions)


def action_distance(space: Action, first_B: np.ndarray, second_B: np.ndarray) -> np.ndarray:
    """Return how far actions, as the environment takes them, are apart [B]: for choices 0 or 1, whether any component differs.

    For real-valued actions it is the mean distance over components, each in halves of its range where it has two bounds.
    """
    first_BK, second_BK = _flat(first_B), _flat(second_B)
    if isinstance(space, Choices):
        return np.any(first_BK != second_BK, axis=1).astype(np.float64)
    return (np.abs(first_BK - second_BK) / Scale(space, "clip").half_K).mean(axis=1)


def smallest_flips(
    policy: Policy, obs_BD: np.ndarray, mask_BA: np.ndarray | None, *, spread_D: np.ndarray, largest: float, seed: int
) -> np.ndarray:
    """Return for each observation the smallest strength [B] of a worst case that changes the greedy choice.

    Infinity where the largest one does not. Found by bisection to a hundredth of `largest`; an attack that fails although
    a perturbation exists makes the number too large, never too small.
    """
    assert isinstance(policy.spaces.action, Choices)
    undisturbed_BP = policy.distributions(obs_BD, mask_BA)

    def flips(strength_B: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(seed)
        radius_BD = strength_B[:, None] * spread_D
        seen_BD = worst_case(policy, obs_BD, mask_BA, radius_D=radius_BD, rng=rng)
        return action_change(policy, undisturbed_BP, policy.distributions(seen_BD, mask_BA)) > 0

    safe_B, found_B = np.zeros(len(obs_BD)), np.full(len(obs_BD), float(largest))
    does_B = flips(found_B)
    for _ in range(7):
        middle_B = (safe_B + found_B) / 2
        flipped_B = flips(middle_B)
        found_B, safe_B = np.where(flipped_B, middle_B, found_B), np.where(flipped_B, safe_B, middle_B)
    return np.where(does_B, found_B, np.inf)


def _flat(actions_B: np.ndarray) -> np.ndarray:
    return actions_B.reshape(len(actions_B), -1)


def _loss(
    policy: Policy, undisturbed_BP: np.ndarray, outputs_BO: np.ndarray, mask_BA: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the worst case makes large [B], and its gradient by the outputs [B, O].

    For choices it is the best other logit minus that of the undisturbed choice, in the component where this is largest:
    above 0 the action has changed. For real-valued actions it is the squared distance of the mean, in deviations.
    """
    rows_B = np.arange(len(outputs_BO))
    d_outputs_BO = np.zeros_like(outputs_BO)
    if not isinstance(policy.spaces.action, Choices):
        num_components = policy.spaces.action.num_components
        mean_BK, std_BK = np.split(undisturbed_BP, 2, axis=1)
        distance_BK = (outputs_BO[:, :num_components] - mean_BK) / std_BK
        d_outputs_BO[:, :num_components] = 2 * distance_BK / std_BK
        return (distance_BK**2).sum(axis=1), d_outputs_BO
    logits_BO = outputs_BO.astype(np.float64)
    if mask_BA is not None:
        logits_BO[~mask_BA] = -np.inf
    margins, pairs = [], []
    for part in policy.distribution.parts:
        z_BA, favourite_B = logits_BO[:, part], undisturbed_BP[:, part].argmax(axis=1)
        others_BA = z_BA.copy()
        others_BA[rows_B, favourite_B] = -np.inf
        rival_B = others_BA.argmax(axis=1)
        margins.append(others_BA[rows_B, rival_B] - z_BA[rows_B, favourite_B])
        pairs.append((part.start + rival_B, part.start + favourite_B))
    component_B = np.argmax(margins, axis=0)
    rival_B, favourite_B = np.array(pairs)[component_B, :, rows_B].T
    d_outputs_BO[rows_B, rival_B] += 1
    d_outputs_BO[rows_B, favourite_B] -= 1
    return np.max(margins, axis=0), d_outputs_BO
