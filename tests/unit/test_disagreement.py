"""Are disagreements found where they are, counted by episodes, and valued by what follows?"""

import numpy as np
import pytest

from policies.network import Architecture, Gaussian
from policies.observations import Box
from policies.policy import Policy
from policies.spaces import Numbers, Spaces
from tests.unit.test_perturbations import threshold_policy
from training.config import EnvironmentConfig
from training.disagreement import compare, returns_to_go
from training.evaluation import Evaluation, EvaluationRequest, evaluate
from training.gates.intervals import mean_interval

SIGNS = EnvironmentConfig(id="tests.training_environments:Signs-v0")


def _episodes(obs: list[list[float]], rewards: list[list[float]]) -> Evaluation:
    lengths_E = np.array([len(episode) for episode in obs])
    return Evaluation(
        returns_E=np.array([sum(episode) for episode in rewards]),
        lengths_E=lengths_E,
        obs_ND=np.concatenate(obs).astype(np.float32)[:, None],
        actions_N=np.zeros(lengths_E.sum(), int),
        rewards_N=np.concatenate(rewards),
        episode_N=np.repeat(np.arange(len(obs)), lengths_E),
    )


def test_returns_to_go_are_discounted_sums_of_one_episode() -> None:
    # 1 + 0.5 (2 + 0.5 * 4) = 3, 2 + 0.5 * 4 = 4, 4; and 8 alone.
    assert returns_to_go(_episodes([[0, 0, 0], [0]], [[1, 2, 4], [8]]), gamma=0.5).tolist() == [3, 4, 4, 8]


def test_policies_disagree_between_their_boundaries_and_nowhere_else() -> None:
    """Boundaries at 0 and 1: of -1, 0.5 and 2 only 0.5 lies between. It is a third of each episode's states."""
    first, second = threshold_policy(0.0), threshold_policy(1.0)
    episodes = [_episodes([[-1, 0.5, 2]] * 30, [[0, gain, 0]] * 30) for gain in (1.0, 3.0)]
    found = compare(first, second, (episodes[0], episodes[1]), gamma=1.0, confidence=0.95, seed=0)
    assert found.share.mean == pytest.approx(1 / 3) and found.num_states == 180
    (cluster,) = {round(float(cluster.centre_D[0]), 3) for cluster in found.clusters}
    assert cluster == 0.5 and sum(cluster.share for cluster in found.clusters) == pytest.approx(1)
    assert found.clusters[0].pairs[0][:2] == ("1", "0")
    assert all(cluster.value_difference.mean == 2 for cluster in found.clusters)  # what follows is 3 with one, 1 with the other

    same = compare(first, first, (episodes[0], episodes[0]), gamma=1.0, confidence=0.95, seed=0)
    assert same.share.mean == 0 and same.clusters == []  # negative control


def test_pairs_of_episodes_are_counted_once() -> None:
    """Half of the beginnings are always disagreed on, half never: 40 pairs are 40 observations, not 80."""
    first, second = threshold_policy(0.0), threshold_policy(1.0)
    episodes = _episodes([[0.5], [2.0]] * 20, [[0.0], [0.0]] * 20)
    found = compare(first, second, (episodes, episodes), gamma=1.0, confidence=0.95, seed=0)
    expected = mean_interval(np.array([1.0, 0.0] * 20), 0.95)
    assert (found.share.mean, found.share.low) == pytest.approx((expected.mean, expected.low))


def test_real_valued_actions_are_compared_as_they_are_sent() -> None:
    """The same mean of 0.9, once cut at the bounds and once bent by tanh, is 0.9 and 0.716."""
    open_1, one = np.full(1, np.inf, np.float32), np.ones(1, np.float32)
    spaces = Spaces(Box(-open_1, open_1), Numbers(-one, one))
    tensors = {
        "normaliser.mean": np.zeros(1, np.float32),
        "normaliser.scale": one,
        "policy.log_std": np.zeros(1, np.float32),
        "policy.0.weight": np.zeros((1, 1), np.float32),
        "policy.0.bias": np.array([0.9], np.float32),
    }
    cut, bent = (Policy(spaces, Architecture((), gaussian=Gaussian(squash)), tensors) for squash in ("clip", "tanh"))
    episodes = _episodes([[0.0]] * 4, [[0.0]] * 4)
    assert compare(cut, bent, (episodes, episodes), gamma=1.0, confidence=0.95, seed=0).share.mean == 1
    assert compare(cut, cut, (episodes, episodes), gamma=1.0, confidence=0.95, seed=0).share.mean == 0


def test_two_kinds_of_disagreement_are_two_clusters() -> None:
    """The second policy takes the opposite action everywhere: states at -1 and at 1 are as far apart as states can be."""
    first = threshold_policy(0.0)
    opposite = threshold_policy(0.0)
    opposite.tensors["policy.0.weight"][:] *= -1
    episodes = tuple(evaluate(SIGNS, EvaluationRequest(p, 32, seed=0, keep_steps=True)) for p in (first, opposite))
    found = compare(first, opposite, episodes, gamma=1.0, confidence=0.95, seed=0)
    assert found.share.mean == 1
    assert {float(cluster.centre_D[0]) for cluster in found.clusters} == {-1, 1}
    for cluster in found.clusters:
        assert {pair[:2] for pair in cluster.pairs} == {("1", "0") if cluster.centre_D[0] > 0 else ("0", "1")}
        assert cluster.value_difference.high < -4  # the first is always right: 5.5 more on average from a middle step on
    document = found.to_json()
    assert document["share_mean"] == 1 and document["clusters"][0]["value_difference_mean"] == pytest.approx(-5.5, abs=0.6)
