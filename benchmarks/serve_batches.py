"""How many decisions per second when a client asks about 256 observations at once, as JSON and as bytes?

    python -m benchmarks.serve_batches [--policies small,large] [--repetitions 3] [--seconds 10]

Both go to a replica's own port: `json` is `{"observations": [[…], …]}` to /v1/decide, `binary` a FP32 tensor [256, D] to
/v2/models/<policy>/infer of the Open Inference Protocol with its binary tensor data extension, and outputs as bytes too. Each
answer holds action, propensity, decision id, arm, version and fallback of every observation, and each decision is logged. Before
each load 256 answers are compared with the policy. Needs `wrk` on the PATH.

B observations of a batch, D features, A actions.
"""

import argparse
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.answers import Answer, WrongAnswers, require_same_answers
from benchmarks.serving.arguments import names
from benchmarks.serving.policies import SIZES, as_json, draw_observations, policy_of
from benchmarks.serving.results import RESULTS, machine, medians, write_result
from benchmarks.serving.servers import Running, post_bytes, running
from benchmarks.serving.wrk import Request, run_wrk
from tests.serving_helpers import NAME

BATCH_SIZE = 256
CONNECTIONS = (1, 4)  # one client, and a few; more only wait for each other
WARM_UP_S = 2
HEADER_LENGTH = "Inference-Header-Content-Length"
DTYPES = {"INT64": "<i8", "FP64": "<f8", "FP32": "<f4"}
RESULT_FILE = RESULTS / "serve_batches.json"


def json_request(url: str, key: str, obs_BD: np.ndarray) -> Request:
    """Return the batch as JSON."""
    body = json.dumps({"observations": [as_json(obs_D) for obs_D in obs_BD]}).encode()
    return Request(f"{url}/v1/decide", body, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})


def binary_request(url: str, key: str, obs_BD: np.ndarray) -> Request:
    """Return the batch as the protocol's JSON header with the tensor's bytes behind it."""
    data = obs_BD.astype("<f4").tobytes()
    tensor = {"name": "observation", "shape": list(obs_BD.shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": len(data)}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header)), "Authorization": f"Bearer {key}"}
    return Request(f"{url}/v2/models/{NAME}/infer", header + data, headers)


def read_json(body: bytes, headers: dict[str, str]) -> list[Answer]:
    """Return the answers to a batch that was sent as JSON."""
    return [Answer(decision["action"], decision["propensity"]) for decision in json.loads(body)["decisions"]]


def read_binary(body: bytes, headers: dict[str, str]) -> list[Answer]:
    """Return the answers to a batch that was sent as bytes; raises `WrongAnswers` when they are not bytes."""
    if HEADER_LENGTH.lower() not in headers:
        raise WrongAnswers("the answer to a binary request has no binary tensors")
    start = int(headers[HEADER_LENGTH.lower()])
    columns: dict[str, Any] = {}
    for tensor in json.loads(body[:start])["outputs"]:
        end = start + tensor["parameters"]["binary_data_size"]
        columns[tensor["name"]] = _column(tensor["datatype"], body[start:end])
        start = end
    return [Answer(action, propensity) for action, propensity in zip(columns["action"], columns["propensity"], strict=True)]


def _column(datatype: str, data: bytes) -> list[Any]:
    if datatype in DTYPES:
        return np.frombuffer(data, DTYPES[datatype]).tolist()
    texts, start = [], 0  # BYTES: each with its length before it
    while start < len(data):
        [length] = struct.unpack_from("<I", data, start)
        texts.append(data[start + 4 : start + 4 + length].decode())
        start += 4 + length
    return texts


FORMS: dict[str, tuple[Callable[[str, str, np.ndarray], Request], Callable[[bytes, dict[str, str]], list[Answer]]]] = {
    "json": (json_request, read_json),
    "binary": (binary_request, read_binary),
}


def measure(size: str, endpoint: Running, form: str, *, seconds: int, warm_up_s: int = WARM_UP_S) -> list[dict[str, Any]]:
    """Check the answers in this form, load the endpoint, and return one row per number of connections."""
    make, read = FORMS[form]
    obs_BD = draw_observations(size, BATCH_SIZE)
    request = make(endpoint.url, endpoint.key, obs_BD)
    require_same_answers(form, read(*post_bytes(request)), policy_of(size).distributions(obs_BD))
    rows = []
    for connections in CONNECTIONS:
        run_wrk(request, connections=connections, seconds=warm_up_s)
        figures = run_wrk(request, connections=connections, seconds=seconds)
        decisions_per_s = round(figures["requests_per_s"] * BATCH_SIZE, 1)
        row = {"policy": size, "form": form, "connections": connections, "decisions_per_s": decisions_per_s}
        rows.append({**row, "request_bytes": len(request.body), **figures})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=names(SIZES), default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=10, help="of each load")
    parser.add_argument("--output", type=Path, default=RESULT_FILE, help="where the JSON result goes")
    arguments = parser.parse_args()
    result = {"benchmark": "serve_batches", "machine": machine(), "seconds": arguments.seconds, "batch_size": BATCH_SIZE}
    result["rows"] = []
    for repetition in range(arguments.repetitions):
        for size in arguments.policies:
            with running("trimtab_direct", size) as endpoint:
                for form in FORMS:
                    for row in measure(size, endpoint, form, seconds=arguments.seconds):
                        result["rows"].append({"repetition": repetition, **row})
                        print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
    by = ("form", "policy", "connections")
    result["medians"] = medians(result["rows"], by, ("decisions_per_s", "requests_per_s", "p50_ms", "p99_ms"))
    write_result(arguments.output, result)
    print(json.dumps({name: values["decisions_per_s"] for name, values in result["medians"].items()}, indent=1))


if __name__ == "__main__":
    main()
