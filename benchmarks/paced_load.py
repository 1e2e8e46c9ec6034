"""A few connections that ask at a moderate pace and note each request: when it began and ended, and what came of it.

    python -m benchmarks.paced_load URL KEY CONNECTIONS THINK_S      # until standard input closes; then one JSON list

Runs in a process of its own, so that it waits for nobody but the server. Times are of the machine's monotonic clock.
"""

import asyncio
import json
import subprocess
import sys
import time
from typing import NamedTuple
from urllib.parse import urlsplit

OBSERVATION = [0.01, -0.02, 0.03, -0.04]
TIMEOUT_S = 10.0
END_TIMEOUT_S = 30.0


class Request(NamedTuple):
    """One request; `status` is 0 when no answer came."""

    began_s: float
    ended_s: float
    status: int
    has_retry_after: bool

    @property
    def latency_ms(self) -> float:
        return 1000 * (self.ended_s - self.began_s)


class PacedLoad:
    """The load as a process: starts with `__init__`, ends with `end`, which returns its requests in the order of their ends."""

    def __init__(self, url: str, key: str, *, connections: int, think_s: float) -> None:
        command = [sys.executable, "-m", "benchmarks.paced_load", url, key, str(connections), str(think_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end(self) -> list[Request]:
        output, _ = self._process.communicate(timeout=END_TIMEOUT_S)
        if self._process.returncode != 0:
            raise RuntimeError(f"the load ended with code {self._process.returncode}")
        return [Request(*row) for row in json.loads(output)]


async def _load(url: str, key: str, connections: int, think_s: float) -> list[Request]:
    ended, requests = asyncio.Event(), []
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    users = [asyncio.create_task(_ask_for_ever(index, url, key, think_s, requests)) for index in range(connections)]
    await ended.wait()
    for user in users:
        user.cancel()
    await asyncio.gather(*users, return_exceptions=True)
    return requests


async def _ask_for_ever(index: int, url: str, key: str, think_s: float, requests: list[Request]) -> None:
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    address, number = urlsplit(url), 0
    while True:
        number += 1
        body = json.dumps({"observation": OBSERVATION, "unit_id": f"{index}-{number}"}).encode()
        head = f"POST /v1/decide HTTP/1.1\r\nhost: {address.netloc}\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}"
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                streams = streams or await asyncio.open_connection(address.hostname, address.port)
                streams[1].write(head.encode() + b"\r\n\r\n" + body)
                status, has_retry_after, stays_open = await _read_answer(streams[0])
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            status, has_retry_after, stays_open = 0, False, False
        requests.append(Request(began_s, time.monotonic(), status, has_retry_after))
        if not stays_open and streams is not None:
            streams[1].close()
            streams = None
        await asyncio.sleep(think_s)


async def _read_answer(reader: asyncio.StreamReader) -> tuple[int, bool, bool]:
    """Return status, whether the answer says when to come again, and whether its connection stays open."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    lines = head.split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
    await reader.readexactly(int(headers.get(b"content-length", 0)))
    return int(lines[0].split()[1]), b"retry-after" in headers, headers.get(b"connection") != b"close"


def percentile(values: list[float], share: float) -> float | None:
    """Return the smallest value that at least this share of them do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)] if ordered else None


def main() -> None:
    url, key, connections, think_s = sys.argv[1:]
    json.dump(asyncio.run(_load(url, key, int(connections), float(think_s))), sys.stdout)


if __name__ == "__main__":
    main()
