"""The reference of a bundle: steps of the episodes that its gates judged, the baseline with which drift is compared.

`reference.parquet` has a row per step, episode by episode: `observation` (a list of float32, the features that the policy saw),
`action` (a list of the environment's own int64 or float32), `reward` (float32, of that step) and `episode` (int64). Loading a
policy only checks its hash; whoever compares with it reads it here. N steps, D features, K components of an action.
"""

from dataclasses import dataclass

import numpy as np

from policies.bundle_reader import REFERENCE, Bundle, read_verified
from policies.errors import IntegrityError, NotFound
from policies.spaces import Choices, Spaces

SCHEMA_VERSION = 1
MAX_STEPS = 20_000
MAX_NUMBERS = 4 << 20  # 16 MB: of large images there are fewer steps


@dataclass(frozen=True)
class Reference:
    """Steps in arrays: observations float32 [N, D], actions int64 or float32 [N, K], rewards float32 [N], episodes int64 [N]."""

    observations_ND: np.ndarray
    actions_NK: np.ndarray
    rewards_N: np.ndarray
    episodes_N: np.ndarray


def choose_steps(
    obs_ND: np.ndarray, actions_N: np.ndarray, rewards_N: np.ndarray, episode_N: np.ndarray, *, seed: int
) -> Reference:
    """Return all steps of an evaluation, or `MAX_STEPS` drawn from all of them, episode by episode.

    They are drawn, not taken at equal distances: steps of episodes that ran side by side alternate.
    """
    num_steps, actions_NK = len(obs_ND), actions_N.reshape(len(obs_ND), -1)
    limit = max(1, min(MAX_STEPS, MAX_NUMBERS // (obs_ND.shape[1] + actions_NK.shape[1])))
    kept = np.arange(num_steps)
    if num_steps > limit:
        kept = np.sort(np.random.default_rng(seed).choice(num_steps, limit, replace=False))
    kept = kept[np.argsort(episode_N[kept], kind="stable")]
    return Reference(obs_ND[kept], actions_NK[kept], rewards_N[kept].astype(np.float32), episode_N[kept].astype(np.int64))


def no_steps(spaces: Spaces) -> Reference:
    """Return the reference of a policy of which no episodes were kept."""
    num_components = spaces.action.num_components
    observations_ND, actions_NK = np.empty((0, spaces.num_features), np.float32), np.empty((0, num_components), _dtype(spaces))
    return Reference(observations_ND, actions_NK, np.empty(0, np.float32), np.empty(0, np.int64))


def encode_reference(reference: Reference, spaces: Spaces) -> bytes:
    """Return the bytes of `reference.parquet`; raises `IntegrityError` when the steps are not of these spaces."""
    import pyarrow  # here, not above: a policy is served and loaded without it
    import pyarrow.parquet

    _check(reference, spaces)
    columns = [
        pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(array.reshape(-1)), array.shape[1])
        for array in (reference.observations_ND, reference.actions_NK)
    ]
    columns += [pyarrow.array(reference.rewards_N), pyarrow.array(reference.episodes_N)]
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table(columns, schema=_schema(spaces))
    pyarrow.parquet.write_table(table, sink, compression="zstd", use_dictionary=False)  # few numbers are the same: a third less
    return sink.getvalue().to_pybytes()


def decode_reference(data: bytes, spaces: Spaces, source: str) -> Reference:
    """Read what `encode_reference` returned; raises `IntegrityError` for anything else."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        schema = _schema(spaces)
        if not file.schema_arrow.equals(schema, check_metadata=False) or file.schema_arrow.metadata != schema.metadata:
            raise IntegrityError(f"{source} has the columns {file.schema_arrow!s:.300}, expected {schema!s:.300}")
        num_rows, num_numbers = file.metadata.num_rows, spaces.num_features + spaces.action.num_components
        if num_rows > MAX_STEPS or num_rows * num_numbers > max(MAX_NUMBERS, num_numbers):
            raise IntegrityError(f"{source} has {num_rows} steps of {num_numbers} numbers; the limit is {MAX_STEPS}")
        table = file.read()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise IntegrityError(f"{source} cannot be read: {type(error).__name__} {error}") from error
    flat = [
        np.concatenate([np.empty(0, column.type.value_type.to_pandas_dtype())] + [chunk.flatten() for chunk in column.chunks])
        for column in table.columns[:2]
    ]
    rewards_N, episodes_N = (column.to_numpy() for column in table.columns[2:])
    widths = (spaces.num_features, spaces.action.num_components)
    if any(column.null_count for column in table.columns) or [a.size for a in flat] != [num_rows * width for width in widths]:
        raise IntegrityError(f"{source} has steps without an observation, an action, a reward or an episode")
    reference = Reference(*(array.reshape(-1, width) for array, width in zip(flat, widths)), rewards_N, episodes_N)
    _check(reference, spaces)
    return reference


def read_reference(bundle: Bundle) -> Reference:
    """Return a bundle's reference; raises `NotFound` for a bundle of the first format, `IntegrityError` for a damaged file."""
    if REFERENCE not in bundle.manifest["files"]:
        raise NotFound(f"{bundle.path} has no {REFERENCE}: it was packed by an earlier Trimtab; gate and publish its run again")
    return decode_reference(read_verified(bundle, REFERENCE), bundle.policy.spaces, str(bundle.path / REFERENCE))


def _check(reference: Reference, spaces: Spaces) -> None:
    num_rows = len(reference.rewards_N)
    expected = [
        ("observations_ND", np.dtype(np.float32), (num_rows, spaces.num_features)),
        ("actions_NK", np.dtype(_dtype(spaces)), (num_rows, spaces.action.num_components)),
        ("rewards_N", np.dtype(np.float32), (num_rows,)),
        ("episodes_N", np.dtype(np.int64), (num_rows,)),
    ]
    found = [(name, array.dtype, array.shape) for name, array in vars(reference).items()]
    if found != expected:
        raise IntegrityError(f"reference steps are {found}, expected {expected}")
    for name, array in vars(reference).items():
        if not np.isfinite(array).all():
            raise IntegrityError(f"reference steps: {name} holds NaN or infinity")


def _schema(spaces: Spaces):
    import pyarrow

    action = pyarrow.int64() if isinstance(spaces.action, Choices) else pyarrow.float32()
    fields = [
        ("observation", pyarrow.list_(pyarrow.float32(), spaces.num_features)),
        ("action", pyarrow.list_(action, spaces.action.num_components)),
        ("reward", pyarrow.float32()),
        ("episode", pyarrow.int64()),
    ]
    return pyarrow.schema(fields, metadata={"schema_version": str(SCHEMA_VERSION)})


def _dtype(spaces: Spaces) -> type:
    return np.int64 if isinstance(spaces.action, Choices) else np.float32
