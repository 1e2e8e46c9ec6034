"""How the endpoint is started on a Ray cluster, and stopped without leaving anything behind."""

import contextlib
import json
import logging
import socket
import time
import urllib.error
import urllib.request
from typing import Any

import ray

from policies.errors import ClusterError, NotFound
from policies.storage import existing_storage
from serve_app.config import ServingConfig
from serve_app.haproxy import end_haproxies, haproxies
from serve_app.replica import PolicyReplica

START_TIMEOUT_S = 60.0  # a replica starts in about 3 s on an idle machine; a loaded one has needed 20
CALL_TIMEOUT_S = 10.0  # Serve's controller answers within milliseconds, or hangs
STOP_TIMEOUT_S = 30.0  # replicas finish what they are answering; Serve itself takes 2-3 s
HAPROXY_END_TIMEOUT_S = 5.0
# Serve's own queue must never be the one that fills: ours answers 429, its would let requests wait without a word.
# HAProxy passes at most 4,096 connections.
MAX_ONGOING_REQUESTS = 8192

logger = logging.getLogger(__name__)

_started: set[str] = set()  # the applications that this process has to stop


def start_serving(policy: str, storage_root: str, config: ServingConfig) -> str:
    """Serve a policy from its registry on the connected Ray cluster and return the URL once `/readyz` says yes.

    Raises `ClusterError` when a port is taken or the endpoint does not become ready in time.
    """
    from ray import serve  # here, not above: it reads the profile's environment variables when it is imported
    from ray.serve.api import RunTarget

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _require_reachable_replicas(config)
    target = RunTarget(_application(policy, storage_root, config), name=f"trimtab-{policy}", route_prefix="/")
    if _controller() is None:
        require_free_ports(config)
        _started.add(target.name)
        serve.start(http_options={"host": config.host, "port": config.port})
    else:
        _require_same_address(config)
        _started.add(target.name)
    try:  # not `serve.run`: it waits for ever when the cluster has no room for the replicas
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except (ray.exceptions.RayTaskError, ray.serve.exceptions.RayServeException) as error:
        raise ClusterError(f"Ray Serve refused the application: {error}") from error
    url = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
    _wait_until_ready(url, target.name, key=_owner_key(storage_root))
    if not haproxies(_node_ids()):
        logger.warning(
            "event=slow_profile reason='this cluster was started without the Serve profile, so a Python proxy stands in front: "
            "about a hundred requests per second instead of thousands' remedy='export the variables of cluster.yaml before "
            "`ray start` on every node'"
        )
    return url


def stop_serving() -> None:
    """End what this process started; stop Serve itself, HAProxy included, unless it runs applications of others."""
    from ray import serve

    if not _started or not ray.is_initialized() or _controller() is None:
        return
    others = set(serve.status().applications) - _started
    for name in _started & set(serve.status().applications) if others else set():
        serve.delete(name)
    _started.clear()
    if others:
        return
    node_ids = _node_ids()
    _shut_controller_down()
    serve.shutdown()  # forgets this process's connection to the controller
    killed = end_haproxies(node_ids, timeout_s=HAPROXY_END_TIMEOUT_S)
    if killed:
        logger.warning("event=haproxy_killed pids=%s", killed)


def _application(policy: str, storage_root: str, config: ServingConfig) -> Any:
    from ray import serve
    from ray.serve.schema import LoggingConfig

    deployment = serve.deployment(
        serve.ingress()(PolicyReplica),
        name="policy",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.num_cpus_per_replica},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=1,  # how soon a dead replica is noticed; at 5 s two cores had it back after 10 to 15 s
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),  # the access log is a line per request
    )
    return deployment.bind(policy, storage_root, config.model_dump())


def _controller() -> Any:
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def _shut_controller_down() -> None:
    """Do what `serve.shutdown` does, without the call that it leaves hanging: Ray reports that one on standard output."""
    controller = _controller()
    if controller is None:
        return
    # It has ended already, or is slow: whether it ends is looked at below.
    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=CALL_TIMEOUT_S)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _controller() is not None and time.monotonic() < deadline:
        time.sleep(0.05)


def _require_same_address(config: ServingConfig) -> None:
    options = ray.get(_controller().get_http_config.remote(), timeout=CALL_TIMEOUT_S)
    if (options.host, options.port) != (config.host, config.port):
        raise ClusterError(
            f"Ray Serve runs on this cluster already, at {options.host}:{options.port}, not {config.host}:{config.port}; "
            f"--set serving.host={options.host} --set serving.port={options.port}, or end it with `serve shutdown -y`"
        )


def _require_reachable_replicas(config: ServingConfig) -> None:
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if num_nodes > 1 and config.host in ("127.0.0.1", "localhost"):
        raise ClusterError(
            f"serving.host is {config.host}, but the cluster has {num_nodes} nodes, which could not reach each other's replicas; "
            "--set serving.host=0.0.0.0 (every request but /healthz and /readyz still needs the API key)"
        )


def require_free_ports(config: ServingConfig) -> None:
    """Raise `ClusterError` that names the first port a new Serve instance on this machine needs and cannot have."""
    from ray.serve._private import constants

    ports = {config.port: "the endpoint"}
    if constants.RAY_SERVE_ENABLE_HA_PROXY:
        ports[constants.RAY_SERVE_HAPROXY_METRICS_PORT] = "HAProxy metrics, moved by RAY_SERVE_HAPROXY_METRICS_PORT"
        ports[constants.RAY_SERVE_HAPROXY_STATS_PORT] = "HAProxy statistics, moved by RAY_SERVE_HAPROXY_STATS_PORT"
        # Another cluster's fallback proxy on this port would get our requests whenever HAProxy thinks our replicas are down.
        ports[constants.RAY_SERVE_FALLBACK_PROXY_HTTP_PORT] = "fallback proxy, moved by RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
    for port, purpose in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.host if port == config.port else "0.0.0.0", port))
            except OSError as error:
                raise ClusterError(
                    f"port {port} ({purpose}) cannot be used: {error.strerror}; {_remedy(config, port)}"
                ) from error


def _remedy(config: ServingConfig, port: int) -> str:
    leftovers = haproxies()
    if leftovers:
        pids = " ".join(str(pid) for pid in leftovers)
        return f"Ray Serve's HAProxy is running here as process {pids}: end that session, or if it is dead already, `kill {pids}`"
    return (
        "choose another one with --set serving.port=…"
        if port == config.port
        else f"find out who uses it with `ss -ltnp sport = :{port}`"
    )


def _wait_until_ready(url: str, application: str, *, key: str | None) -> None:
    from ray import serve

    deadline, answer = time.monotonic() + START_TIMEOUT_S, "no answer"
    while time.monotonic() < deadline:
        state = serve.status().applications.get(application)
        if state is not None and state.status == "DEPLOY_FAILED":
            raise ClusterError(f"Ray Serve could not start the replicas: {state.message}")
        status, answer = _readiness(url, key)
        if status == 200 and state is not None and state.status == "RUNNING":  # else a replica of an ended session answered
            return
        time.sleep(0.1)
    message = state.message if state is not None else ""
    raise ClusterError(
        f"the endpoint at {url} was not ready within {START_TIMEOUT_S:g} s; its last word: {answer} {message}".rstrip()
    )


def _owner_key(storage_root: str) -> str | None:
    try:
        return existing_storage(storage_root).api_keys.owner_key()
    except NotFound:  # it was taken away from this machine: then the endpoint says that it is not ready, but not why
        return None


def _readiness(url: str, key: str | None) -> tuple[int | None, str]:
    request = urllib.request.Request(f"{url}/readyz", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        body = error.read().decode(errors="replace")
        try:
            return error.code, json.loads(body)["reason"]
        except (ValueError, KeyError, TypeError):
            return error.code, body[:200]
    except OSError as error:
        return None, str(error)


def _node_ids() -> set[str]:
    return {node["NodeID"] for node in ray.nodes()}
