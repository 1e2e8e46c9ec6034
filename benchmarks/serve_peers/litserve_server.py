"""Serve the exported policy with LitServe, with its batching and without.

    python -m benchmarks.serve_peers.litserve_server --port 8000 [--batched]

Chosen from its documentation: `fast_queue` (ZeroMQ, "for more than 100 requests per second"), a worker per processor ("for CPU,
the number of cores") and as many HTTP servers, log level warning, no access log. Batches of up to 64 that wait 1 ms for company.
"""

import argparse
import os
from typing import Any

import litserve
import numpy as np
import onnxruntime


class OneByOne(litserve.LitAPI):
    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["POLICY_ONNX"], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request: dict[str, Any]) -> list[float]:
        return request["observation"]

    def predict(self, observation: list[float]) -> int:
        [distribution_A] = self.session.run(None, {"observations": np.array([observation], np.float32)})[0]
        return int(distribution_A.argmax())

    def encode_response(self, output: int) -> dict[str, int]:
        return {"action": output}


class Batched(OneByOne):
    def batch(self, inputs: list[list[float]]) -> np.ndarray:
        return np.array(inputs, np.float32)

    def predict(self, observations_BD: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"observations": observations_BD})[0].argmax(axis=1)

    def unbatch(self, output: np.ndarray) -> list[int]:
        return output.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batched", action="store_true")
    arguments = parser.parse_args()
    batched = {"max_batch_size": 64, "batch_timeout": 0.001}
    api = Batched(api_path="/decide", **batched) if arguments.batched else OneByOne(api_path="/decide")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=os.cpu_count(), fast_queue=True)
    server.run(host="127.0.0.1", port=arguments.port, log_level="warning", generate_client_file=False, access_log=False)


if __name__ == "__main__":
    main()
