"""Where two policies would act differently, what each does there, and what comes of it.

E episode, N step, D feature, C cluster.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.cluster.vq import kmeans2

from policies.policy import Policy
from policies.spaces import Choices
from training.evaluation import Evaluation
from training.gates.intervals import Interval, difference_interval, mean_interval
from training.perturbations import action_distance

MAX_CLUSTERS = 5
MIN_STATES_PER_CLUSTER = 20
DIFFERENT = 0.1  # of real-valued actions: a tenth of half the range apart
SHOWN_PAIRS = 3


@dataclass(frozen=True)
class Cluster:
    """States of a kind in which the two disagree. `share` is of all disagreements, `pairs` are the most frequent actions.

    `value_difference` is what follows such a state, discounted, in the second policy's episodes less what follows it in the
    first's; None where one of them meets such states in fewer than two episodes.
    """

    share: float
    centre_D: np.ndarray
    pairs: list[tuple[Any, Any, int]]
    value_difference: Interval | None


@dataclass(frozen=True)
class Disagreement:
    """`share` is of the states that either policy meets in an episode from the same beginning, on average over beginnings."""

    share: Interval
    num_states: int
    clusters: list[Cluster]

    def to_json(self) -> dict[str, Any]:
        clusters = [
            {
                "share": cluster.share,
                "centre": cluster.centre_D.tolist(),
                "pairs": [{"first": first, "second": second, "states": count} for first, second, count in cluster.pairs],
                **(cluster.value_difference.to_json("value_difference") if cluster.value_difference else {}),
            }
            for cluster in self.clusters
        ]
        return {**self.share.to_json("share"), "states": self.num_states, "clusters": clusters}


def compare(
    first: Policy, second: Policy, episodes: tuple[Evaluation, Evaluation], *, gamma: float, confidence: float, seed: int
) -> Disagreement:
    """Ask both policies about every state of both policies' episodes, and group those in which their greedy actions differ."""
    obs_ND = np.concatenate([part.obs_ND for part in episodes])
    masks_NA = None if episodes[0].masks_NA is None else np.concatenate([part.masks_NA for part in episodes])
    owner_N = np.repeat([0, 1], [len(part.obs_ND) for part in episodes])
    episode_N = np.concatenate([part.episode_N for part in episodes]) + owner_N * len(episodes[0].returns_E)
    value_N = np.concatenate([returns_to_go(part, gamma) for part in episodes])
    actions = [
        policy.distribution.choose_rows(policy.distributions(obs_ND, masks_NA), "greedy", np.random.default_rng(0))
        for policy in (first, second)
    ]
    differs_N = action_distance(first.spaces.action, *actions) > (0 if isinstance(first.spaces.action, Choices) else DIFFERENT)
    share_E = np.bincount(episode_N, differs_N) / np.bincount(episode_N)
    # Episodes of the two that begin in the same state are a pair: they agree or disagree together.
    share_E = (share_E[: len(share_E) // 2] + share_E[len(share_E) // 2 :]) / 2

    found = np.flatnonzero(differs_N)
    clusters = []
    for rows in _clusters(obs_ND, found, seed):
        pairs = Counter((str(actions[0][row].round(2).tolist()), str(actions[1][row].round(2).tolist())) for row in rows)
        values = [_by_episode(value_N, episode_N, rows[owner_N[rows] == owner]) for owner in (0, 1)]
        clusters.append(
            Cluster(
                share=len(rows) / len(found),
                centre_D=obs_ND[rows].mean(axis=0),
                pairs=[(*pair, count) for pair, count in pairs.most_common(SHOWN_PAIRS)],
                value_difference=difference_interval(values[1], values[0], confidence) if min(map(len, values)) >= 2 else None,
            )
        )
    return Disagreement(mean_interval(share_E, confidence), len(obs_ND), sorted(clusters, key=lambda cluster: -cluster.share))


def returns_to_go(evaluation: Evaluation, gamma: float) -> np.ndarray:
    """Return the discounted sum of the rewards from each step on [N]."""
    order_N = np.argsort(evaluation.episode_N, kind="stable")
    value_N = np.empty(len(order_N))
    for rows in np.split(order_N, np.cumsum(evaluation.lengths_E)[:-1]):
        ahead = 0.0
        for row in rows[::-1]:
            ahead = evaluation.rewards_N[row] + gamma * ahead
            value_N[row] = ahead
    return value_N


def _clusters(obs_ND: np.ndarray, found: np.ndarray, seed: int) -> list[np.ndarray]:
    """Return rows of `found` in groups whose observations are near each other, each feature measured by its spread."""
    if not len(found):
        return []
    spread_D = obs_ND.std(axis=0)
    scaled_ND = obs_ND[found].astype(np.float64) / np.where(spread_D > 0, spread_D, 1)
    num_clusters = min(MAX_CLUSTERS, 1 + len(found) // MIN_STATES_PER_CLUSTER, len(np.unique(scaled_ND, axis=0)))
    _, label_N = kmeans2(scaled_ND, num_clusters, minit="++", seed=seed)
    return [found[label_N == label] for label in np.unique(label_N)]


def _by_episode(value_N: np.ndarray, episode_N: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the mean value of each episode that has such rows: the steps of one episode are not independent."""
    counts = np.bincount(episode_N[rows])
    sums = np.bincount(episode_N[rows], value_N[rows])
    return sums[counts > 0] / counts[counts > 0]
