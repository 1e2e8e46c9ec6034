"""Which environment variables make Ray Serve fast; they are read when `ray.serve` is imported, in every process."""

import os

_VARIABLES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",  # HAProxy instead of a Python proxy, straight to the replicas
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # one event loop per replica, log buffer, frozen GC
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # One datagram per request to a Python process that counts it costs more than the decision; replicas count their own.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",  # a connection that is silent within a request is closed; default: an hour
    # HAProxy hears of a stopping replica within about half a second (0.1 s broadcast, 0.25 s health checks); the default of
    # 30 s is for load balancers outside, and would make every Ctrl-C wait.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}
_SMALL_MACHINE_CPUS = 4  # below it, HAProxy's default of 4 threads only takes time from the replicas


def serve_profile_environment() -> dict[str, str]:
    """Return the variables to set before `ray start` on every node, or before Ray is started here.

    A variable that is set already is the operator's choice and is left out.
    """
    variables = dict(_VARIABLES)
    if (os.cpu_count() or 1) <= _SMALL_MACHINE_CPUS:
        variables["RAY_SERVE_HAPROXY_NBTHREAD"] = "1"
    return {name: value for name, value in variables.items() if name not in os.environ}
