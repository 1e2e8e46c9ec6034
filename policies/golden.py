"""Golden vectors: what the training code answered for some observations, which every runtime has to answer too.

Two comparisons, each where it means something:

* A runtime's distributions against the stored ones, within `GOLDEN_TOLERANCE`: float32 sums in another order differ in their
  last bits, a lost normaliser or a swapped layer by far more.
* Actions drawn again from the *stored* distributions and seeds against the stored actions. Choices and their propensities come
  from comparing and copying float64 numbers, which is the same on every machine: they must be equal in every bit, so a changed
  sampler or random stream is found. Real numbers go through exp, tanh and erfc, whose last bit differs between machines: they
  must agree as float32 numbers do, and the density is that of the stored action, since it may change by much from one float32
  number to the next.

Drawing from a runtime's own distributions instead would prove nothing more: within the tolerance, a draw that falls beside a
boundary may choose its neighbour. A correct runtime would fail now and then; a wrong one is found by its distributions.

N rows, D features, P numbers of a distribution, A choices of a mask, K components of an action.
"""

import io
import math
import re
import zipfile
from dataclasses import dataclass

import numpy as np

from policies.distributions import Distribution, seed_of
from policies.errors import IntegrityError
from policies.observations import MAX_FEATURES
from policies.policy import Policy

NUM_GOLDEN = 256  # rows that a bundle has at least
MIN_GOLDEN = 16  # rows that the first format had at least
MAX_GOLDEN = 4096  # each row is drawn again when a bundle is loaded, at some 20 microseconds
MAX_DRAWS = 1 << 15  # of actions with hundreds of components fewer rows are drawn again: a replica waits for it
MAX_GOLDEN_BYTES = 320 * 4 * MAX_FEATURES  # the rows we write, of the largest observation there is
# float32 sums in another order: two correct runtimes differ by a few 1e-7 per layer, a missing normaliser by far more.
GOLDEN_TOLERANCE = 2e-5
# An action is rounded to float32 (6e-8); a density of a deviation of 2e-9, the smallest, blows the last bit of atanh up to 1e-5.
ACTION_TOLERANCE, DENSITY_TOLERANCE = 1e-6, 1e-4

INPUTS = {"observations": ("<f4",), "distributions": ("<f8",)}
MASKS = {"masks": ("|b1",)}
ACTIONS = {"seeds": ("<i8",), "sampled": ("<i8", "<f8"), "propensities": ("<f8",), "greedy": ("<i8", "<f8")}
# numpy's own spelling of a header, and no other: nothing in it is evaluated.
_HEADER = re.compile(rb"\{'descr': '([^']{3})', 'fortran_order': False, 'shape': \(((?:\d{1,9}, ?)*(?:\d{1,9})?)\), \} *\n")


@dataclass(frozen=True)
class GoldenActions:
    """What was drawn from the golden distributions: with seeds [N] actions [N, K] and their propensities [N], and greedily."""

    seeds_N: np.ndarray
    sampled_NK: np.ndarray
    propensities_N: np.ndarray
    greedy_NK: np.ndarray


@dataclass(frozen=True)
class Golden:
    """Observations [N, D] with the action distributions [N, P] that the *training* code gave for them.

    `masks_NA` holds an action mask per row where the policy takes them, else it is None. `actions` is None until a bundle is
    written, and in bundles of the first format.
    """

    observations_ND: np.ndarray
    distributions_NP: np.ndarray
    masks_NA: np.ndarray | None = None
    actions: GoldenActions | None = None


def with_actions(golden: Golden, distribution: Distribution) -> Golden:
    """Return golden vectors of at least `NUM_GOLDEN` rows with actions drawn for each.

    Where there are fewer, because an environment has few observations or ran for few steps, they are repeated: every row has
    a seed of its own.
    """
    rows_N = np.arange(len(golden.observations_ND))
    rows_N = np.resize(rows_N, max(len(rows_N), NUM_GOLDEN))
    masks_NA = None if golden.masks_NA is None else golden.masks_NA[rows_N]
    distributions_NP = golden.distributions_NP[rows_N].astype(np.float64)  # as they are stored: it is these that are drawn from
    seeds_N = np.array([seed_of(f"golden {row}") for row in range(len(rows_N))], np.int64)
    actions = _draw(distribution, distributions_NP, seeds_N)
    return Golden(golden.observations_ND[rows_N], distributions_NP, masks_NA, actions)


def check_golden(policy: Policy, golden: Golden) -> None:
    """Raise `IntegrityError` unless the policy gives the distributions that training gave, and its sampler the same actions."""
    _require_shapes(policy, golden)
    require_golden(policy.distributions(golden.observations_ND, golden.masks_NA), golden.distributions_NP, "policy")
    if golden.actions is not None:
        _check_actions(policy.distribution, golden.distributions_NP, golden.actions)


def require_golden(distributions_NP: np.ndarray, golden_NP: np.ndarray, what: str) -> None:
    """Raise `IntegrityError` unless a runtime's distributions are the golden ones; `what` names the runtime."""
    # Of probabilities this is the plain difference; a mean or a deviation may be any size.
    error = (np.abs(distributions_NP - golden_NP) / np.maximum(1, np.abs(golden_NP))).max()
    if not error <= GOLDEN_TOLERANCE:  # NaN fails too
        raise IntegrityError(
            f"{what} differs from its golden vectors by {error:.3g} (limit {GOLDEN_TOLERANCE:g}): it acts otherwise than trained"
        )


def require_propensities(actions: GoldenActions) -> None:
    """Raise `IntegrityError` for a propensity that is 0 or no finite number, with which nothing could be learned from a log.

    A density is a product over all components: of hundreds of narrow ones it is more than any float, of wide ones 0.
    """
    is_usable_N = (actions.propensities_N > 0) & np.isfinite(actions.propensities_N)
    if not is_usable_N.all():
        row = int(is_usable_N.argmin())
        raise IntegrityError(
            f"an action sampled for golden observation {row} has the propensity {actions.propensities_N[row]:g}: nothing could "
            "be learned from its log; set serving.mode to greedy"
        )


def encode_golden(golden: Golden) -> bytes:
    """Return golden vectors as the bytes of a file `golden.npz`, uncompressed."""
    arrays = {
        "observations": golden.observations_ND.astype(np.float32),
        "distributions": golden.distributions_NP.astype(np.float64),
    }
    if golden.masks_NA is not None:
        arrays["masks"] = golden.masks_NA.astype(bool)
    if golden.actions is not None:
        drawn = golden.actions
        arrays |= {"seeds": drawn.seeds_N, "sampled": drawn.sampled_NK, "greedy": drawn.greedy_NK}
        arrays["propensities"] = drawn.propensities_N
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def decode_golden(data: bytes, source: str) -> Golden:
    """Read golden vectors of either format from the bytes of `golden.npz`; raises `IntegrityError` for any other bytes."""
    members = _read_members(data, source)
    has_masks, has_actions = "masks" in members, "seeds" in members
    dtypes = INPUTS | (MASKS if has_masks else {}) | (ACTIONS if has_actions else {})
    if set(members) != set(dtypes):
        raise IntegrityError(f"{source} cannot be read: it holds {sorted(members)!s:.200}, expected {sorted(dtypes)}")
    arrays = {name: _read_array(members[name], dtypes[name], f"{source} cannot be read: {name}") for name in dtypes}
    for name, array in arrays.items():
        # A density can leave the range of float64; `require_propensities` refuses that where densities are used.
        if name != "propensities" and not np.isfinite(array).all():
            raise IntegrityError(f"{source} cannot be read: {name} holds NaN or infinity")
    actions = None
    if has_actions:
        actions = GoldenActions(*(arrays[name] for name in ("seeds", "sampled", "propensities", "greedy")))
    return Golden(arrays["observations"], arrays["distributions"], arrays.get("masks"), actions)


def _read_members(data: bytes, source: str) -> dict[str, bytes]:
    """Return the bytes of every array. Members are stored as they are, so together they are no larger than the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise IntegrityError(f"{source} cannot be read: an array is compressed, which ours never are")
            if len({entry.filename for entry in entries}) != len(entries) or sum(e.file_size for e in entries) > len(data):
                raise IntegrityError(f"{source} cannot be read: arrays with the same name, or of the same bytes")
            return {entry.filename.removesuffix(".npy"): archive.read(entry) for entry in entries}
    except IntegrityError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds for bytes that nobody wrote
        raise IntegrityError(f"{source} cannot be read: {type(error).__name__} {error}") from error


def _read_array(data: bytes, dtypes: tuple[str, ...], what: str) -> np.ndarray:
    """Return a view of the bytes of a file `.npy` of version 1.0; nothing is allocated by what its header says."""
    begin = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:begin])
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None:
        raise IntegrityError(f"{what} has no header as numpy writes it")
    dtype = header[1].decode("ascii", "replace")
    if dtype not in dtypes:
        raise IntegrityError(f"{what} holds {dtype!r}, expected {' or '.join(dtypes)}")
    shape = tuple(int(size) for size in header[2].split(b",") if size.strip())
    needed, found = math.prod(shape) * np.dtype(dtype).itemsize, len(data) - begin
    if needed != found:
        raise IntegrityError(f"{what} has {found} bytes, its shape {shape} needs {needed}")
    return np.frombuffer(data, dtype, offset=begin).reshape(shape)


def _require_shapes(policy: Policy, golden: Golden) -> None:
    spaces, num_components = policy.spaces, policy.spaces.action.num_components
    num_rows = golden.observations_ND.size // spaces.num_features
    widths = {"observations_ND": spaces.num_features, "distributions_NP": policy.distribution.num_parameters}
    expected = {name: (num_rows, width) for name, width in widths.items()}
    if spaces.has_mask:
        expected["masks_NA"] = (num_rows, spaces.mask_size)
    arrays = {name: array for name, array in vars(golden).items() if array is not None and name != "actions"}
    if golden.actions is not None:
        arrays |= vars(golden.actions)
        expected |= {"seeds_N": (num_rows,), "propensities_N": (num_rows,)}
        expected |= {"sampled_NK": (num_rows, num_components), "greedy_NK": (num_rows, num_components)}
    found = {name: array.shape for name, array in arrays.items()}
    if found != expected or not MIN_GOLDEN <= num_rows <= MAX_GOLDEN:
        raise IntegrityError(
            f"golden vectors have shapes {found}, expected {expected} with at least {MIN_GOLDEN} rows and {MAX_GOLDEN} at most"
        )


def _draw(distribution: Distribution, distributions_NP: np.ndarray, seeds_N: np.ndarray) -> GoldenActions:
    sampled, propensities = zip(
        *(distribution.choose(row_P, "sample", seed) for row_P, seed in zip(distributions_NP, seeds_N.tolist()))
    )
    greedy = [distribution.choose(row_P, "greedy", 0)[0] for row_P in distributions_NP]
    num_rows = len(seeds_N)
    return GoldenActions(
        seeds_N, np.array(sampled).reshape(num_rows, -1), np.array(propensities), np.array(greedy).reshape(num_rows, -1)
    )


def _check_actions(distribution: Distribution, distributions_NP: np.ndarray, stored: GoldenActions) -> None:
    num_rows = max(MIN_GOLDEN, MAX_DRAWS // stored.sampled_NK.shape[1])
    stored, distributions_NP = GoldenActions(*(array[:num_rows] for array in vars(stored).values())), distributions_NP[:num_rows]
    if stored.seeds_N.min() < 0 or stored.seeds_N.max() >= 1 << 53:
        raise IntegrityError("golden vectors: a seed is not from 0 to 2^53 - 1")
    try:
        drawn = _draw(distribution, distributions_NP, stored.seeds_N)
        if {stored.sampled_NK.dtype, stored.greedy_NK.dtype} != {drawn.sampled_NK.dtype}:
            raise IntegrityError(f"golden vectors: actions are {stored.sampled_NK.dtype}, expected {drawn.sampled_NK.dtype}")
        wrong = [name for name, is_same in _compared(distribution, distributions_NP, stored, drawn).items() if not is_same]
    except (ValueError, ArithmeticError) as error:  # of a stored deviation of 0, say: within the tolerance of a tiny one
        raise IntegrityError(f"golden vectors: stored distributions or actions are impossible: {error}") from error
    if wrong:
        raise IntegrityError(
            f"golden vectors: {' and '.join(wrong)} are not what is drawn from the stored distributions with the stored seeds: "
            "actions are drawn otherwise now than when the bundle was written"
        )


def _compared(
    distribution: Distribution, distributions_NP: np.ndarray, stored: GoldenActions, drawn: GoldenActions
) -> dict[str, bool]:
    if drawn.sampled_NK.dtype == np.int64:
        return {name: np.array_equal(array, getattr(drawn, name)) for name, array in vars(stored).items()}
    rows = zip(stored.sampled_NK, distributions_NP)
    density_N = [distribution.propensity(action_K, row_P, "sample") for action_K, row_P in rows]
    close, near = {"rtol": ACTION_TOLERANCE, "atol": 1e-9}, {"rtol": DENSITY_TOLERANCE, "atol": 1e-300, "equal_nan": True}
    return {
        "sampled_NK": np.allclose(drawn.sampled_NK, stored.sampled_NK, **close),
        "propensities_N": np.allclose(density_N, stored.propensities_N, **near),
        "greedy_NK": np.allclose(drawn.greedy_NK, stored.greedy_NK, **close),
    }
