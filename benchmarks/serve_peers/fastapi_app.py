"""Serve the exported policy with FastAPI and ONNX Runtime, as one would in production.

Chosen for speed: uvicorn with uvloop and httptools, without an access log (`benchmarks.serving.servers`); an async route that
reads and writes JSON with orjson, which answered 1.2 to 2 times as many requests as a pydantic body and answer and 2 to 3 times
as many as a plain `def` route, which FastAPI hands to a thread; one thread per inference, since these networks take less time
than handing work to a second one.
"""

import os

import numpy as np
import onnxruntime
import orjson
from fastapi import FastAPI, Request, Response

_options = onnxruntime.SessionOptions()
_options.intra_op_num_threads = _options.inter_op_num_threads = 1
_session = onnxruntime.InferenceSession(os.environ["POLICY_ONNX"], _options, providers=["CPUExecutionProvider"])

app = FastAPI(openapi_url=None)


@app.post("/decide")
async def decide(request: Request) -> Response:
    observation = orjson.loads(await request.body())["observation"]
    [distribution_A] = _session.run(None, {"observations": np.array([observation], np.float32)})[0]
    return Response(orjson.dumps({"action": int(distribution_A.argmax())}), media_type="application/json")
