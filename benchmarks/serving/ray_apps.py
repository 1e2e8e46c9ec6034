"""Run one app on a local Ray cluster of its own until standard input closes: ours, the idiomatic one, or a constant.

    python -m benchmarks.serving.ray_apps APP --size small --port 8000 --storage DIRECTORY [--setting plain]

Prints `READY URL KEY` once it answers. A process of its own, because the profile is read when ray.serve is imported.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.serving.ports import free_ports
from benchmarks.serving.settings import SETTINGS

MAX_ONGOING_REQUESTS = 256
HAPROXY_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)


def start_trimtab(arguments: argparse.Namespace) -> tuple[str, str]:
    """Publish the policy in a new storage root and serve it: key, arm, propensity, log line, HAProxy profile."""
    from benchmarks.serving.policies import publish_policy
    from policies.storage import open_storage
    from serve_app.app import start_serving
    from serve_app.config import ServingConfig
    from tests.serving_helpers import NAME

    storage = open_storage(str(arguments.storage))
    publish_policy(storage, arguments.size)
    SETTINGS[arguments.setting].prepare(storage, arguments.size)
    url = start_serving(NAME, str(storage.root), ServingConfig(port=arguments.port))
    return url, storage.api_key_file.read_text().strip()


def start_direct(arguments: argparse.Namespace) -> tuple[str, str]:
    """Start ours, and return the replica's own port instead."""
    import requests

    url, key = start_trimtab(arguments)
    answer = requests.get(f"{url}/v1/endpoints", headers={"Authorization": f"Bearer {key}"}, timeout=10)
    answer.raise_for_status()
    return answer.json()["endpoints"][0], key


def start_idiomatic(arguments: argparse.Namespace) -> tuple[str, str]:
    """Serve the app one would write after Ray Serve's documentation: a router, a policy that batches, the default proxy."""
    import numpy as np
    from ray import serve
    from starlette.requests import Request

    from benchmarks.serving.policies import policy_of

    @serve.deployment(max_ongoing_requests=MAX_ONGOING_REQUESTS)
    class PolicyDeployment:
        def __init__(self, size: str) -> None:
            self.policy = policy_of(size)

        @serve.batch(max_batch_size=64)
        async def act(self, observations: list[list[float]]) -> list[int]:
            return self.policy.distributions(np.array(observations, np.float32)).argmax(axis=1).tolist()

    @serve.deployment(max_ongoing_requests=MAX_ONGOING_REQUESTS)
    class Router:
        def __init__(self, policy: Any) -> None:
            self.policy = policy

        async def __call__(self, request: Request) -> dict[str, int]:
            body = await request.json()
            return {"action": await self.policy.act.remote(body["observation"])}

    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    serve.run(Router.bind(PolicyDeployment.bind(arguments.size)))
    return f"http://127.0.0.1:{arguments.port}", "none"


def start_no_op(arguments: argparse.Namespace) -> tuple[str, str]:
    """Serve a constant behind the same HAProxy profile as ours."""
    from ray import serve
    from ray.serve.schema import LoggingConfig
    from starlette.requests import Request

    @serve.deployment(max_ongoing_requests=MAX_ONGOING_REQUESTS, logging_config=LoggingConfig(enable_access_log=False))
    class NoOp:
        async def __call__(self, request: Request) -> dict[str, int]:
            return {"action": 0}

    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    serve.run(NoOp.bind())
    return f"http://127.0.0.1:{arguments.port}", "none"


RAY_APPS = {"trimtab": start_trimtab, "trimtab_direct": start_direct, "idiomatic": start_idiomatic, "no_op": start_no_op}


def run(arguments: argparse.Namespace) -> None:
    """Serve until standard input closes."""
    from serve_app.profile import serve_profile_environment

    if arguments.app != "idiomatic":
        os.environ.update(serve_profile_environment())
        os.environ.update(zip(HAPROXY_PORTS, map(str, free_ports(len(HAPROXY_PORTS)))))
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        url, key = RAY_APPS[arguments.app](arguments)
        print("READY", url, key, flush=True)
        sys.stdin.read()
    finally:
        stop()


def stop() -> None:
    import ray
    from ray import serve

    from serve_app.app import stop_serving
    from serve_app.haproxy import end_haproxies

    node_ids = {node["NodeID"] for node in ray.nodes()}
    stop_serving()
    serve.shutdown()
    end_haproxies(node_ids, timeout_s=5)
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("app", choices=RAY_APPS)
    parser.add_argument("--size", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS, default="plain")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
