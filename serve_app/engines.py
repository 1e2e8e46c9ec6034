"""Which engine computes a version on this machine: ONNX Runtime where it is right and clearly faster, or else numpy.

B rows, D features, O outputs of a network.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Literal

import numpy as np

from policies.bundle_reader import Bundle
from policies.errors import ConfigError, IntegrityError, TrimtabError
from policies.golden import require_golden
from policies.onnx_engine import OnnxEngine, is_computable
from policies.policy import Policy

EngineSetting = Literal["auto", "numpy", "onnxruntime"]
Outputs = Callable[[np.ndarray], np.ndarray]

NUMPY = "numpy"  # what needs no name in the log
SIZES = (1, 8, 64)  # rows: what a replica is asked for while it is idle, busy, and very busy
# numpy replays on any machine with the same kernels, and local clients have its bits: another engine must be worth it. Ten
# microseconds are a tenth of what a request costs (docs/serving.md).
MAX_SHARE, MIN_GAIN_US, GAIN_SIZE = 0.8, 10.0, 8
BUDGET_S, MAX_ROUNDS = 0.2, 50  # of measuring, per version; a first and a second round are always made
TRIED_SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 64, 100, 257)

logger = logging.getLogger(__name__)


def engine_for(version: int, bundle: Bundle, setting: EngineSetting) -> OnnxEngine | None:
    """Return what computes a verified bundle in numpy's place, None for numpy.

    `auto` measures, and takes numpy where ONNX Runtime is not installed or not right. `onnxruntime` raises `ConfigError` or
    `IntegrityError` in these cases. What is no plain perceptron stays with the engine that it has.
    """
    policy = bundle.policy
    if setting == NUMPY or not is_computable(policy):
        return None
    try:
        engine = _checked_engine(bundle)
    except ConfigError as error:
        if setting == "auto":
            return None
        raise ConfigError(f"serving.engine is onnxruntime, and {error}; or set it to numpy") from error
    except IntegrityError as error:
        if setting == "auto":
            logger.warning("event=engine_refused version=%d error=%r", version, str(error))
            return None
        raise IntegrityError(f"serving.engine is onnxruntime, and {error}; set it to numpy") from error
    if setting == "onnxruntime":
        logger.info("event=engine_chosen version=%d engine=%s reason=serving.engine", version, engine.name)
        return engine
    times_us = measure({NUMPY: policy.outputs, engine.name: engine.outputs}, bundle.golden.observations_ND)
    chosen = choose(times_us)
    figures = " ".join(f"{name.split('=')[0]}_us={_figures(of_size)}" for name, of_size in times_us.items())
    logger.info("event=engine_chosen version=%d engine=%s rows=%s %s", version, chosen, "/".join(map(str, SIZES)), figures)
    return engine if chosen == engine.name else None


def _checked_engine(bundle: Bundle) -> OnnxEngine:
    try:
        engine = OnnxEngine(bundle.policy)
        check_engine(engine, bundle)
        return engine
    except TrimtabError:
        raise
    except Exception as error:  # its package cannot be imported here, or does not compute what it has read
        raise IntegrityError(f"ONNX Runtime failed: {error!r:.300}") from error


def choose(times_us: dict[str, dict[int, float]]) -> str:
    """Return the engine to use, given the microseconds that each takes for each number of rows.

    That is the one whose share of numpy's time, as the geometric mean over the numbers of rows, is smallest, if that is at most
    80 % and eight rows take at least 10 us less; numpy otherwise.
    """
    shares = {name: _share(times_us[name], times_us[NUMPY]) for name in times_us}
    fastest = min(shares, key=lambda name: shares[name])
    gain_us = times_us[NUMPY][GAIN_SIZE] - times_us[fastest][GAIN_SIZE]
    return fastest if shares[fastest] <= MAX_SHARE and gain_us >= MIN_GAIN_US else NUMPY


def measure(
    engines: dict[str, Outputs], obs_ND: np.ndarray, *, now_s: Callable[[], float] = time.perf_counter
) -> dict[str, dict[int, float]]:
    """Return the least time in us that each engine took for each of `SIZES` rows.

    They take turns, so what else goes on on the machine meets them all; and what one has in the cache, another drives out.
    """
    times_us = {name: dict.fromkeys(SIZES, float("inf")) for name in engines}
    batches = {size: np.resize(obs_ND, (size, obs_ND.shape[1])) for size in SIZES}
    ends_s = now_s() + BUDGET_S
    for round_number in range(MAX_ROUNDS):
        if round_number >= 2 and now_s() >= ends_s:
            break
        for size, obs_BD in batches.items():
            for name, outputs in engines.items():
                began_s = now_s()
                outputs(obs_BD)
                times_us[name][size] = min(times_us[name][size], 1e6 * (now_s() - began_s))
    return times_us


def _share(found_us: dict[int, float], numpy_us: dict[int, float]) -> float:
    return math.prod(found_us[size] / numpy_us[size] for size in numpy_us) ** (1 / len(numpy_us))


def check_engine(engine: OnnxEngine, bundle: Bundle) -> None:
    """Raise `IntegrityError` unless an engine gives a bundle's golden distributions, and a row has the same bits in any batch."""
    golden = bundle.golden
    found_NP = engine.distributions(golden.observations_ND, golden.masks_NA)
    require_golden(found_NP, golden.distributions_NP, engine.name)
    require_independent_rows(engine.outputs, _rows_to_try(bundle.policy, golden.observations_ND), engine.name)
    _require_same_overflow(engine)


def require_independent_rows(outputs: Outputs, obs_ND: np.ndarray, what: str) -> None:
    """Raise `IntegrityError` if a row has other bits in some batch than alone. No engine promises it, so each is tried."""
    alone_NO = np.concatenate([outputs(row_D[None]) for row_D in obs_ND])
    for first, size in enumerate(TRIED_SIZES):  # each batch begins with another row, so rows come to stand at other places
        rows_B = (first + np.arange(size)) % len(obs_ND)
        if not np.array_equal(outputs(obs_ND[rows_B]), alone_NO[rows_B]):
            raise IntegrityError(f"{what} gives a row other bits in a batch of {size} than alone: its decisions would not replay")


def _require_same_overflow(engine: OnnxEngine) -> None:
    """Raise `IntegrityError` unless NaN comes out where it does of numpy: an activation that takes NaN for 0 would hide it."""
    signs_D = np.resize(np.array([1, -1], np.float32), engine.policy.spaces.num_features)
    obs_BD = np.array([[np.nan], [np.inf], [3e38]], np.float32) * signs_D
    with np.errstate(over="ignore", invalid="ignore"):
        found_BO, expected_BO = engine.outputs(obs_BD), engine.policy.outputs(obs_BD)
    if not np.array_equal(np.isnan(found_BO), np.isnan(expected_BO)):
        raise IntegrityError(f"{engine.name} gives numbers where the network overflows, or NaN where it does not")


def _rows_to_try(policy: Policy, obs_ND: np.ndarray) -> np.ndarray:
    """Return some golden observations, and random ones: zeros, of which an environment may have many, hide an order of sums."""
    random_ND = np.random.default_rng(0).standard_normal((16, policy.spaces.num_features), np.float32)
    return np.concatenate([obs_ND[:16], random_ND + policy.tensors["normaliser.mean"]])


def _figures(of_size: dict[int, float]) -> str:
    return "/".join(f"{us:.1f}" for us in of_size.values())
