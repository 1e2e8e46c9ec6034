"""How the test process ends."""

import atexit
import os
import sys

import pytest

_exit_status = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_exit_status] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave without C++ destructors where Ray was used, when everything is told and Python has cleaned up.

    Ray, gRPC, Arrow and OpenBLAS leave native threads in the process that used them. One run of many ended behind its summary
    with a segmentation fault in such a thread, which called into what the main thread had just destroyed. What our own programs
    exit with is asserted by the tests that start them; they do not end like this.
    """
    if "ray" not in sys.modules or _exit_status not in config.stash:
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(config.stash[_exit_status])
