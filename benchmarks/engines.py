"""How long does each inference engine take for 1, 8, 64 and 256 rows of four perceptrons, on one thread?

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.engines [--rounds 100] [--shared]

`numpy` is how policies are served, `onnxruntime` what a replica takes in its place where it is worth it (`serve_app.engines`).
Beside them: numpy before panels and half blocks; torch; and the others in blocks of eight rows, which is what it takes where an
engine's bits depend on the batch. Engines take turns of five calls, so whatever else the machine does meets them all, and each
has its matrices in the cache; the least time counts. `--shared` says in the result that others worked on the machine meanwhile.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.train_cartpole import commit, machine
from policies.blocks import BLOCK_ROWS
from policies.errors import IntegrityError
from policies.network import layers_of, normalised, perceptron
from policies.onnx_engine import OnnxEngine
from policies.policy import Policy
from serve_app.engines import SIZES as CHOICE_SIZES
from serve_app.engines import choose, require_independent_rows
from tests.serving_helpers import random_policy

RESULT_FILE = Path(__file__).parent / "results" / "engines.json"
SIZES = (1, 8, 64, 256)
CALLS_PER_TURN = 5
NETWORKS = {  # features, hidden layers, actions
    "4-64-64-2": (4, (64, 64), 2),
    "17-256-256-12": (17, (256, 256), 12),
    "128-512-512-18": (128, (512, 512), 18),
    "256-1024-1024-32": (256, (1024, 1024), 32),
}

Outputs = Callable[[np.ndarray], np.ndarray]


def engines_of(policy: Policy) -> dict[str, Outputs]:
    """Return how each engine computes the network's outputs [B, O] of observations [B, D]."""
    onnx = OnnxEngine(policy)
    return {
        "numpy": policy.outputs,
        "numpy_before": _as_before(policy),
        "onnxruntime": onnx.outputs,
        "onnxruntime_blocks": _in_blocks(onnx.outputs),
        "torch": _with_torch(policy),
        "torch_blocks": _in_blocks(_with_torch(policy)),
    }


def times_us(engines: dict[str, Outputs], obs_BD: np.ndarray, *, rounds: int) -> dict[str, float]:
    """Return the least time of each engine for this batch."""
    best_s = dict.fromkeys(engines, float("inf"))
    for _ in range(rounds):
        for name, outputs in engines.items():
            for _ in range(CALLS_PER_TURN):
                began_s = time.perf_counter()
                outputs(obs_BD)
                best_s[name] = min(best_s[name], time.perf_counter() - began_s)
    return {name: round(1e6 * seconds, 1) for name, seconds in best_s.items()}


def measure_network(name: str, *, rounds: int) -> dict[str, Any]:
    """Return times by batch size and engine, what a replica would choose, and whose rows have the same bits in every batch."""
    num_features, hidden, num_actions = NETWORKS[name]
    policy = random_policy(1, num_features=num_features, num_actions=num_actions, hidden=hidden)
    engines = engines_of(policy)
    obs_ND = np.random.default_rng(0).standard_normal((max(SIZES), num_features)).astype(np.float32)
    of_size = {size: times_us(engines, obs_ND[:size], rounds=rounds) for size in SIZES}
    of_engine = {engine: {size: of_size[size][engine] for size in CHOICE_SIZES} for engine in ("numpy", "onnxruntime")}
    return {
        "us": {engine: {size: times[engine] for size, times in of_size.items()} for engine in engines},
        "chosen": choose(of_engine),
        "rows_independent_of_batch": {engine: _is_independent(outputs, obs_ND[:32]) for engine, outputs in engines.items()},
    }


def _as_before(policy: Policy) -> Outputs:
    """Blocks of eight rows always, each matrix in one piece."""
    layers = layers_of(policy.tensors, "policy", len(policy.architecture.hidden) + 1)

    def outputs(obs_BD: np.ndarray) -> np.ndarray:
        num_blocks = -(-len(obs_BD) // BLOCK_ROWS)
        x_KRD = np.zeros((num_blocks, BLOCK_ROWS, obs_BD.shape[1]), np.float32)
        flat = x_KRD.reshape(num_blocks * BLOCK_ROWS, -1)
        flat[: len(obs_BD)] = obs_BD
        normalised(flat[: len(obs_BD)], policy.tensors, policy.architecture)
        outputs_KRO = perceptron(layers, policy.architecture.activation, x_KRD)
        return outputs_KRO.reshape(num_blocks * BLOCK_ROWS, -1)[: len(obs_BD)]

    return outputs


def _in_blocks(whole: Outputs) -> Outputs:
    def outputs(obs_BD: np.ndarray) -> np.ndarray:
        num_rows, num_blocks = len(obs_BD), -(-len(obs_BD) // BLOCK_ROWS)
        x_KRD = np.zeros((num_blocks, BLOCK_ROWS, obs_BD.shape[1]), np.float32)
        x_KRD.reshape(-1, obs_BD.shape[1])[:num_rows] = obs_BD
        return np.concatenate([whole(x_RD) for x_RD in x_KRD])[:num_rows]

    return outputs


def _with_torch(policy: Policy) -> Outputs:
    network = _layers_in_torch(policy)

    def outputs(obs_BD: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(obs_BD)).numpy()

    return outputs


def _layers_in_torch(policy: Policy) -> torch.nn.Module:
    """Return the layers alone: these policies do not normalise, and a softmax is no part of what the others compute here."""
    modules: list[torch.nn.Module] = []
    for weight, bias in layers_of(policy.tensors, "policy", len(policy.architecture.hidden) + 1):
        linear = torch.nn.Linear(*weight.shape)
        linear.weight.data, linear.bias.data = torch.from_numpy(weight.T.copy()), torch.from_numpy(bias.copy())
        modules += [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*modules[:-1]).eval()


def _is_independent(outputs: Outputs, obs_ND: np.ndarray) -> bool:
    try:
        require_independent_rows(outputs, obs_ND, "engine")
    except IntegrityError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--shared", action="store_true", help="others work on this machine meanwhile")
    parser.add_argument("--output", type=Path, default=RESULT_FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "benchmark": "engines",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "machine": machine(),
        "machine_shared_while_measuring": arguments.shared,
        "openblas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "packages": {name: version(name) for name in ("numpy", "onnxruntime", "torch")},
        "networks": {name: measure_network(name, rounds=arguments.rounds) for name in NETWORKS},
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, found in result["networks"].items():
        print(f"{name}: {found['chosen']}; independent of the batch: {found['rows_independent_of_batch']}")
        for engine, of_size in found["us"].items():
            print(f"  {engine:20}" + "".join(f"{us:10.1f}" for us in of_size.values()))


if __name__ == "__main__":
    main()
