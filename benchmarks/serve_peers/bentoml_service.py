"""Serve the exported policy with BentoML, with its adaptive batching and without.

Chosen from its documentation: a worker per processor, because inference is bound by the processor; `batchable=True` with a
generous `max_latency_ms`, because a tight one is answered with 503 (at 10 ms four in ten requests under load were, at 100 ms
two or three in a hundred); no access log, no metrics, no usage statistics. Async methods, which it does not hand to a thread.
Lists, which it validates faster than arrays. A batchable API takes and gives lists: one observation is `[[…]]`, its action `[0]`;
the service in front that would make a single object of them costs a second hop, so the benchmark speaks lists with it.
"""

import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=os.cpu_count(), logging={"access": {"enabled": False}}, metrics={"enabled": False})
class PolicyService:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["POLICY_ONNX"], options, providers=["CPUExecutionProvider"])

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    async def decide_batch(self, observation: list[list[float]]) -> list[int]:
        distributions_NA = self.session.run(None, {"observations": np.array(observation, np.float32)})[0]
        return distributions_NA.argmax(axis=1).tolist()

    @bentoml.api
    async def decide(self, observation: list[float]) -> dict[str, int]:
        [distribution_A] = self.session.run(None, {"observations": np.array([observation], np.float32)})[0]
        return {"action": int(distribution_A.argmax())}
