"""Which environment variables make Ray Serve fast; they are read when `ray.serve` is imported, in every process."""

import os
import sysconfig
from pathlib import Path

from serve_app.haproxy_binary import BINARY_VARIABLE

_VARIABLES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",  # HAProxy instead of a Python proxy, straight to the replicas
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # one event loop per replica, log buffer, frozen GC
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # One datagram per request to a Python process that counts it costs more than the decision; replicas count their own.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",  # a connection that is silent within a request is closed; default: an hour
    # A killed HAProxy is replaced after three failed checks. At Serve's 10 s between them it was away for 28 s, and for 58 s when
    # the controller, which counts, was killed too; one check is one small call on the same node.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A replica that dies within a request closes the connection without an answer, and the client would get a 500. HAProxy asks
    # another one instead. Safe for us: with a `request_id` the log has the decision, and the same one is told; without one the
    # first decision is in the log with an answer that nobody got, as it would be anyway, and feedback counts once however often
    # it comes. It holds for all applications of the Serve instance: set it to `conn-failure` where others' requests must not
    # be repeated. Requests larger than HAProxy's buffer (16 KiB) are not.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
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
    binary = Path(sysconfig.get_path("scripts"), "trimtab-haproxy")
    if binary.exists():  # not where Trimtab is used from a checkout without being installed
        variables[BINARY_VARIABLE] = str(binary)
    if (os.cpu_count() or 1) <= _SMALL_MACHINE_CPUS:
        variables["RAY_SERVE_HAPROXY_NBTHREAD"] = "1"
    return {name: value for name, value in variables.items() if name not in os.environ}
