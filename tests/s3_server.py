"""A real S3 API server, SeaweedFS, for the time of a test: create-if-absent has to be tested where it is carried out."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 60.0
GRPC_OFFSET = 10_000  # SeaweedFS adds it to each port for its own calls
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"


@dataclass(frozen=True)
class S3Server:
    """A running server with the bucket `registry`. `environment` is what a client needs, in AWS's own variables."""

    endpoint: str
    environment: dict[str, str]


@contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """Run a server for the time of the block; its environment variables are set in this process meanwhile."""
    master, volume, filer, s3 = _free_ports(4)
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [_identity()]}))
    data = directory / "data"
    data.mkdir()
    command = [
        str(Path(sys.executable).parent / "weed"),
        *("server", "-s3", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"),
        *(
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-iam=false",
            "-s3.autoCreateBucket=false",
            f"-s3.config={config}",
            "-master.volumeSizeLimitMB=64",
        ),
    ]
    endpoint = f"http://127.0.0.1:{s3}"
    environment = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with ExitStack() as cleanup, open(directory / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
        cleanup.callback(server.wait, timeout=START_TIMEOUT_S)
        cleanup.callback(server.kill)
        cleanup.callback(_restore, {name: os.environ.get(name) for name in environment})
        os.environ.update(environment)
        _wait_until_ready(server, directory / "server.log")
        yield S3Server(endpoint, environment)


def _identity() -> dict[str, object]:
    keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    return {"name": "test", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}


def _wait_until_ready(server: subprocess.Popen[bytes], log: Path) -> None:
    """Return once a bucket was made and an object written to it: the ports answer before the parts know each other."""
    import s3fs

    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            filesystem = s3fs.S3FileSystem(skip_instance_cache=True, config_kwargs={"retries": {"max_attempts": 1}})
            if not filesystem.exists("registry"):
                filesystem.mkdir("registry")
            filesystem.pipe_file("registry/ready", b"ready")
            filesystem.rm_file("registry/ready")
            return
        except Exception as error:  # refused, reset, 500, 503: whatever a server answers that is not ready
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the S3 server did not start: {error!r}\n{log.read_text()[-3000:]}") from error
            time.sleep(0.2)


def _restore(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _free_ports(count: int) -> list[int]:
    """Return ports that are free together with their gRPC partners."""
    found: list[int] = []
    with ExitStack() as sockets:
        while len(found) < count:
            port = sockets.enter_context(socket.socket())
            port.bind(("127.0.0.1", 0))
            number = port.getsockname()[1]
            partner = sockets.enter_context(socket.socket())
            try:
                partner.bind(("127.0.0.1", number - GRPC_OFFSET))
            except OSError:
                continue
            found.append(number - GRPC_OFFSET)
    return found
