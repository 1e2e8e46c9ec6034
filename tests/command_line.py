"""The real `trimtab` command for tests, in a process of its own."""

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
TRIMTAB = [sys.executable, "-m", "trimtab"]
SERVING = ("haproxy", "raylet", "gcs_server")
# Whatever these tests start inherits this, so that clusters of somebody else on the machine are not taken for ours.
MARK = "TRIMTAB_STARTED_BY_TEST"
os.environ[MARK] = f"{os.getpid()}-{secrets.token_hex(8)}"


def run_trimtab(*arguments: str, storage: Path | None = None, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository's root and return what it printed and how it ended."""
    command = [*TRIMTAB, *arguments, *(["--storage", str(storage)] if storage else [])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


def trimtab_json(*arguments: str, storage: Path, expected_code: int = 0) -> dict[str, Any]:
    """Run a command with --json and return its one document; fails if standard output holds anything else."""
    result = run_trimtab(*arguments, "--json", storage=storage)
    assert result.returncode == expected_code, result.stderr
    return json.loads(result.stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serving_processes() -> set[int]:
    """Return the processes of Ray and of HAProxy that these tests started; one that only waits to be reaped does not run."""
    found = set()
    for process in psutil.process_iter(["name", "status", "environ"]):
        name, is_ours = process.info["name"] or "", (process.info["environ"] or {}).get(MARK) == os.environ[MARK]
        if is_ours and any(part in name for part in SERVING) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.add(process.pid)
    return found
