"""Do golden vectors find a policy that acts otherwise than trained, and a sampler that draws otherwise than then?"""

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from policies.errors import IntegrityError
from policies.golden import (
    MAX_GOLDEN,
    NUM_GOLDEN,
    Golden,
    check_golden,
    decode_golden,
    encode_golden,
    require_propensities,
    with_actions,
)
from policies.network import Architecture, Gaussian
from policies.observations import Box
from policies.policy import Policy
from policies.spaces import Choices, Numbers, Spaces
from tests.bundles import golden_as_trained, make_policy, policy_on, vector_spaces
from tests.mutations import packed
from training.golden import NUM_CORNERS, golden_inputs

OBSERVATION = Box(np.full(4, -np.inf, np.float32), np.full(4, np.inf, np.float32))
BOUNDED = Numbers(np.float32([-2, 0]), np.float32([2, 10]))
POLICIES = {
    "discrete": make_policy(num_actions=3),
    "multi_discrete": policy_on(Spaces(OBSERVATION, Choices("multi_discrete", (2, 3), (0, 5), (2,))), Architecture((8,))),
    "multi_binary": policy_on(Spaces(OBSERVATION, Choices("multi_binary", (2,) * 4, (0,) * 4, (2, 2))), Architecture((8,))),
    "clipped": policy_on(Spaces(OBSERVATION, BOUNDED), Architecture((8,), gaussian=Gaussian())),
    "bent": policy_on(Spaces(OBSERVATION, BOUNDED), Architecture((8,), gaussian=Gaussian("tanh", "output"))),
}
REAL = ("clipped", "bent")


def _complete(policy: Policy) -> Golden:
    return with_actions(golden_as_trained(policy), policy.distribution)


@pytest.mark.parametrize("kind", POLICIES)
def test_what_is_read_back_is_what_was_written_and_is_drawn_again(kind: str) -> None:
    policy = POLICIES[kind]
    golden = _complete(policy)
    again = decode_golden(encode_golden(golden), "golden.npz")
    check_golden(policy, again)
    assert len(again.observations_ND) == NUM_GOLDEN and len(set(again.actions.seeds_N.tolist())) == NUM_GOLDEN
    for before, after in zip(vars(golden.actions).values(), vars(again.actions).values()):
        assert before.dtype == after.dtype and np.array_equal(before, after)
    assert len(np.unique(again.actions.sampled_NK, axis=0)) > 1


def test_distributions_of_float32_are_drawn_from_as_they_are_stored() -> None:
    """Their sums in float32 end elsewhere than in float64, and so would some draws."""
    policy = make_policy(num_actions=100)
    golden = golden_as_trained(policy)
    rough = replace(golden, distributions_NP=golden.distributions_NP.astype(np.float32))
    check_golden(policy, decode_golden(encode_golden(with_actions(rough, policy.distribution)), "golden.npz"))


def _other_uniform(seed: int) -> float:
    return 1 - (seed + 1) / (1 << 53)


BROKEN_SAMPLERS: dict[str, tuple[str, str, Any]] = {
    "another draw": ("discrete", "policies.distributions.uniform", _other_uniform),
    "another stream for several choices": ("multi_discrete", "numpy.random.Philox", np.random.PCG64),
    "another stream for numbers": ("clipped", "numpy.random.Philox", np.random.PCG64),
    "a density without its constant": ("bent", "policies.distributions._normal_density", lambda z: np.exp(-0.5 * z * z)),
    "a mean that is not bent": ("bent", "numpy.tanh", lambda x: x),
}


@pytest.mark.parametrize("how", BROKEN_SAMPLERS)
def test_a_changed_sampler_is_found_although_the_distributions_are_the_same(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, name, broken = BROKEN_SAMPLERS[how]
    policy, golden = POLICIES[kind], _complete(POLICIES[kind])
    check_golden(policy, golden)  # the control
    same_distributions = policy.distributions(golden.observations_ND)
    monkeypatch.setattr(Policy, "distributions", lambda self, obs_ND, masks_NA=None: same_distributions)
    monkeypatch.setattr(name, broken)
    with pytest.raises(IntegrityError, match="drawn otherwise now than when the bundle was written"):
        check_golden(policy, golden)


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", ["sampled_NK", "propensities_N", "greedy_NK", "seeds_N"])
def test_one_changed_action_propensity_or_seed_is_refused(kind: str, name: str) -> None:
    golden = _complete(POLICIES[kind])
    changed = getattr(golden.actions, name).copy()
    changed.flat[7] = changed.flat[7] + (1e-3 if changed.dtype.kind == "f" else 1 if name != "seeds_N" else 1 << 50)
    changed_seed_chooses_otherwise = name == "seeds_N" and kind not in REAL
    if changed_seed_chooses_otherwise:  # an eighth of the unit further, which need not be another choice: look for one that is
        changed = np.roll(golden.actions.seeds_N, 1)
    with pytest.raises(IntegrityError, match="golden vectors"):
        check_golden(POLICIES[kind], replace(golden, actions=replace(golden.actions, **{name: changed})))


def test_choices_agree_in_every_bit_and_real_numbers_as_float32_does() -> None:
    """Another machine's tanh may round a real action to the next float32; a probability is copied, and has no next."""
    discrete, bent = (_complete(POLICIES[kind]) for kind in ("discrete", "bent"))
    next_bit = np.nextafter(discrete.actions.propensities_N, 2)
    with pytest.raises(IntegrityError, match="propensities_N are not what is drawn"):
        check_golden(POLICIES["discrete"], replace(discrete, actions=replace(discrete.actions, propensities_N=next_bit)))
    beside = np.nextafter(bent.actions.sampled_NK.astype(np.float32), np.float32(1)).astype(np.float64)
    propensities_N = np.array(
        [POLICIES["bent"].distribution.propensity(a, p, "sample") for a, p in zip(beside, bent.distributions_NP)]
    )
    elsewhere = replace(bent.actions, sampled_NK=beside, propensities_N=propensities_N)
    check_golden(POLICIES["bent"], replace(bent, actions=elsewhere))


def test_a_draw_beside_a_boundary_does_not_refuse_a_correct_runtime() -> None:
    """Training said p, this machine says p - 1e-6, and a seed falls in between: both are right, and choose different actions."""
    policy = make_policy()
    obs_ND = np.random.default_rng(1).standard_normal((NUM_GOLDEN, 4)).astype(np.float32)
    ours_NP = policy.distributions(obs_ND)
    golden = with_actions(Golden(obs_ND, ours_NP + [[1e-6, -1e-6]]), policy.distribution)
    seeds_N = ((ours_NP[:, 0] + 5e-7) * (1 << 53)).astype(np.int64)
    drawn = [policy.distribution.choose(row_P, "sample", seed) for row_P, seed in zip(golden.distributions_NP, seeds_N.tolist())]
    actions = replace(
        golden.actions,
        seeds_N=seeds_N,
        sampled_NK=np.array([[a] for a, _ in drawn]),
        propensities_N=np.array([p for _, p in drawn]),
    )
    ours = [policy.distribution.choose(row_P, "sample", seed)[0] for row_P, seed in zip(ours_NP, seeds_N.tolist())]
    assert not np.equal(actions.sampled_NK[:, 0], ours).any()  # what a comparison with our own draws would refuse
    check_golden(policy, replace(golden, actions=actions))


def test_a_stored_deviation_of_nothing_is_refused() -> None:
    """It is within the tolerance of what the policy gives, so drawing from it has to notice, and not divide by it."""
    narrow = Gaussian("tanh", "output", log_std_range=(-20.0, -15.0))  # deviations of at most e^-15 = 3e-7
    policy = policy_on(Spaces(OBSERVATION, BOUNDED), Architecture((8,), gaussian=narrow))
    golden = _complete(policy)
    check_golden(policy, golden)  # the control
    without_deviation_NP = golden.distributions_NP.copy()
    without_deviation_NP[3, 2:] = 0
    with pytest.raises(IntegrityError, match="stored distributions or actions are impossible"):
        check_golden(policy, replace(golden, distributions_NP=without_deviation_NP))


def test_few_observations_are_repeated_with_other_seeds() -> None:
    policy = make_policy()
    golden = golden_as_trained(policy)
    few = Golden(golden.observations_ND[:2], golden.distributions_NP[:2])
    complete = with_actions(few, policy.distribution)
    assert len(complete.observations_ND) == NUM_GOLDEN
    assert len(np.unique(complete.observations_ND, axis=0)) == 2
    of_first_N = complete.actions.sampled_NK[::2, 0]
    # 128 draws: the share of an action is its probability within four standard deviations of 0.5 / sqrt(128)
    assert abs(of_first_N.mean() - few.distributions_NP[0, 1]) < 4 * 0.5 / np.sqrt(128)


def test_inputs_hold_edge_cases_and_every_mask_with_a_single_choice() -> None:
    bound_D = np.float32([2.5, np.inf, 1, np.inf])
    spaces = replace(vector_spaces(4, 3, bound_D=bound_D), has_mask=True, action=Choices("multi_discrete", (2, 3), (0, 0), (2,)))
    met_ND, masks_NA = np.float32([[1, -7, 0.5, 2], [0, 1, 0, 0.5]]), np.ones((2, 5), bool)
    obs_ND, inputs_NA = golden_inputs(spaces, met_ND, masks_NA, seed=0)
    assert len(obs_ND) == len(inputs_NA) == NUM_GOLDEN + 3 + NUM_CORNERS
    assert {tuple(row) for row in obs_ND[:-NUM_CORNERS].tolist()} == {tuple(row) for row in met_ND.tolist()}
    single_SA = inputs_NA[NUM_GOLDEN:-NUM_CORNERS]
    # one of two and one of three: in three rows each of them is the only one at least once
    assert single_SA.astype(int).tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1]]
    # closed sides at their bounds, open ones at 10 times the largest size that was met, and 1: 10 * 7 + 1 and 10 * 2 + 1
    low, high = [-2.5, -71, -1, -21], [2.5, 71, 1, 21]
    turns = [[-2.5, 71, -1, 21], [2.5, -71, 1, -21]]
    assert obs_ND[-NUM_CORNERS:].tolist() == [[0, 0, 0, 0], low, high, *turns]
    policy = policy_on(spaces, Architecture((8,)))
    golden = with_actions(Golden(obs_ND, policy.distributions(obs_ND, inputs_NA), inputs_NA), policy.distribution)
    check_golden(policy, decode_golden(encode_golden(golden), "golden.npz"))
    allowed = golden.actions.sampled_NK[NUM_GOLDEN:-NUM_CORNERS]
    assert allowed.tolist() == golden.actions.greedy_NK[NUM_GOLDEN:-NUM_CORNERS].tolist() == [[0, 0], [1, 1], [0, 2]]


def test_a_density_is_usable_at_any_size() -> None:
    actions = _complete(POLICIES["clipped"]).actions
    actions.propensities_N[:2] = 1e-300, 1e300
    require_propensities(actions)


@pytest.mark.parametrize("propensity", [0.0, np.inf, np.nan])
def test_a_propensity_from_which_nothing_can_be_learned_is_refused(propensity: float) -> None:
    actions = _complete(POLICIES["clipped"]).actions
    actions.propensities_N[5] = propensity
    with pytest.raises(IntegrityError, match=r"golden observation 5 has the propensity .* set serving\.mode to greedy"):
        require_propensities(actions)


def _members(golden: Golden) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(encode_golden(golden))) as archive:
        return {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}


def _array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _declaring(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """Return the header of an array of this shape, and none of its numbers."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


GOLDEN = _complete(make_policy())
HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "nothing": (lambda members: b"", "BadZipFile"),
    "a beginning": (lambda members: b"PK", "BadZipFile"),
    "the end cut off": (lambda members: packed(members)[:-30], "BadZipFile"),
    "a member that is no array": (lambda members: packed(members | {"observations": b"no array"}), "observations has no header"),
    "a huge shape": (
        lambda members: packed(members | {"observations": _declaring((1 << 29, 1 << 29))}),
        "needs 1152921504606846976",
    ),
    "a size with many digits": (lambda members: packed(members | {"observations": _declaring((10**40,))}), "has no header"),
    "a negative size": (lambda members: packed(members | {"observations": _declaring((-4,))}), "has no header"),
    "objects": (lambda members: packed(members | {"sampled": _array(np.array([{}, {}]))}), "sampled has no header|holds"),
    "texts": (lambda members: packed(members | {"sampled": _array(np.array(["a"]))}), "sampled holds '<U1'"),
    "columns first": (
        lambda members: packed(members | {"observations": _array(np.asfortranarray(GOLDEN.observations_ND))}),
        "observations has no header",
    ),
    "float64 in place of float32": (
        lambda members: packed(members | {"observations": _array(GOLDEN.observations_ND.astype(float))}),
        "observations holds '<f8', expected <f4",
    ),
    "NaN": (
        lambda members: packed(members | {"distributions": _array(np.full_like(GOLDEN.distributions_NP, np.nan))}),
        "distributions holds NaN or infinity",
    ),
    "infinity": (
        lambda members: packed(members | {"observations": _array(np.full_like(GOLDEN.observations_ND, np.inf))}),
        "observations holds NaN or infinity",
    ),
    "an expression in a header": (
        lambda members: packed(members | {"observations": members["observations"].replace(b"False", b"1 / 0")}),
        "observations has no header",
    ),
    "bytes after the numbers": (lambda members: packed(members | {"seeds": members["seeds"] + b"0"}), "seeds has 2049 bytes"),
    "a compressed member": (lambda members: packed(members, zipfile.ZIP_DEFLATED), "is compressed"),
    "a bomb": (lambda members: packed({"observations": bytes(1 << 26)}, zipfile.ZIP_BZIP2), "is compressed"),
    "an array too many": (lambda members: packed(members | {"more": members["seeds"]}), "holds .*more"),
    "an array too few": (
        lambda members: packed({name: data for name, data in members.items() if name != "greedy"}),
        "expected .*greedy",
    ),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_golden_vectors_that_nobody_wrote_are_refused(how: str) -> None:
    make, words = HOSTILE[how]
    members = _members(GOLDEN)
    check_golden(make_policy(), decode_golden(packed(members), "golden.npz"))  # the control
    with pytest.raises(IntegrityError, match=rf"golden\.npz cannot be read: .*({words})"):
        decode_golden(make(members), "golden.npz")


def test_the_same_name_twice_is_refused() -> None:
    buffer = io.BytesIO(packed(_members(GOLDEN)))
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("seeds.npy", b"")
    with pytest.raises(IntegrityError, match="arrays with the same name"):
        decode_golden(buffer.getvalue(), "golden.npz")


def test_more_rows_than_are_ever_written_are_refused() -> None:
    obs_ND = np.zeros((MAX_GOLDEN + 1, 4), np.float32)
    with pytest.raises(IntegrityError, match="and 4096 at most"):
        check_golden(make_policy(), Golden(obs_ND, make_policy().distributions(obs_ND)))


def test_a_single_number_is_no_golden_vector() -> None:
    with pytest.raises(IntegrityError, match="golden vectors have shapes"):
        check_golden(make_policy(), Golden(np.array(1, np.float32), np.array(1.0)))


def test_golden_vectors_find_a_policy_without_its_normaliser() -> None:
    policy = make_policy()
    obs_ND = np.random.default_rng(3).standard_normal((32, 4)).astype(np.float32)
    golden = Golden(obs_ND, policy.distributions(obs_ND))
    check_golden(policy, golden)
    identity = {"normaliser.mean": np.zeros(4, np.float32), "normaliser.scale": np.ones(4, np.float32)}
    forgetful = Policy(policy.spaces, policy.architecture, {**policy.tensors, **identity})
    with pytest.raises(IntegrityError, match="differs from its golden vectors"):
        check_golden(forgetful, golden)


def test_golden_vectors_with_nan_or_too_few_rows_are_refused() -> None:
    policy = make_policy()
    obs_ND = np.zeros((32, 4), np.float32)
    golden = Golden(obs_ND, policy.distributions(obs_ND))
    with pytest.raises(IntegrityError, match="differs"):
        check_golden(policy, replace(golden, distributions_NP=np.full((32, 2), np.nan)))
    with pytest.raises(IntegrityError, match="at least 16 rows"):
        check_golden(policy, Golden(obs_ND[:4], policy.distributions(obs_ND[:4])))
