"""Which ports of this machine are free?"""

import contextlib
import socket


def free_ports(num: int) -> list[int]:
    """Return ports that nobody listens on, on any interface; another process may take one before it is used."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(num)]
        return [listener.getsockname()[1] for listener in sockets]
