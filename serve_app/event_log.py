"""Where a replica's events go: into the log file that Serve keeps for it.

Serve gives its own logger a file. What others log goes to standard error, which Serve turns into lines of its own logger at level
INFO, and those are dropped where that logger keeps no more than warnings.
"""

import logging
import sys
from logging.handlers import MemoryHandler

OUR_LOGGERS = ("serve_app", "policies")


def log_where_serve_does() -> None:
    """Let this replica's loggers write to the file of Serve's, each event at once. Outside of a Serve replica: do nothing."""
    serve = sys.modules.get("ray.serve")
    if serve is None:
        return
    try:
        serve.get_replica_context()
    except serve.exceptions.RayServeException:
        return
    for handler in logging.getLogger("ray.serve").handlers:
        target = handler.target if isinstance(handler, MemoryHandler) and handler.target is not None else handler
        for name in OUR_LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            if target not in logger.handlers:
                logger.addHandler(target)
