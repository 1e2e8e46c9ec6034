"""Does Ray accept cluster.yaml, and does every node start with the Serve profile and the token?"""

import copy
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.profile import serve_profile_environment

CLUSTER_FILE = Path(__file__).parents[2] / "cluster.yaml"
START_LISTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_FILE.read_text())


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    # One head and one worker to fill in: Ray understood the addresses, and did not merely tolerate unknown keys below `provider`.
    assert prepared["max_workers"] == len(cluster["provider"]["worker_ips"]) == 1


@pytest.mark.parametrize("section, wrong", [((), "worker_start_ray_comands"), (("auth",), "ssh_usr")])
def test_negative_control_a_misspelled_key_is_refused(cluster: dict[str, Any], section: tuple[str, ...], wrong: str) -> None:
    broken = copy.deepcopy(cluster)
    place = broken
    for key in section:
        place = place[key]
    place[wrong] = "x"
    with pytest.raises(ValidationError, match=wrong):
        validate_config(prepare_config(broken))


@pytest.mark.parametrize("start_list", START_LISTS)
@pytest.mark.parametrize("num_cpus", [2, 64])
def test_every_node_starts_ray_with_the_serve_profile_and_the_token(
    cluster: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_list: str, num_cpus: int
) -> None:
    seen = environment_of_ray_start(cluster[start_list], tmp_path, num_cpus)
    for name in [name for name in os.environ if name.startswith("RAY_SERVE_")]:
        monkeypatch.delenv(name)  # an operator's own choice is left out of the profile, and this must not depend on it
    monkeypatch.setattr(os, "cpu_count", lambda: num_cpus)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "trimtab-venv" / "bin"))
    (tmp_path / "trimtab-venv" / "bin" / "trimtab-haproxy").touch()
    assert seen == serve_profile_environment() | {"RAY_AUTH_MODE": "token"}


def test_negative_control_a_forgotten_variable_is_seen(cluster: dict[str, Any], tmp_path: Path) -> None:
    commands = [command.replace("RAY_SERVE_PROXY_USE_GRPC=1", "") for command in cluster["worker_start_ray_commands"]]
    assert "RAY_SERVE_PROXY_USE_GRPC" not in environment_of_ray_start(commands, tmp_path, num_cpus=2)


def environment_of_ray_start(commands: list[str], home: Path, num_cpus: int) -> dict[str, str]:
    """Run the start commands as a node would, each in its own shell, with a `ray` that writes down its RAY_ variables."""
    recorder = home / "trimtab-venv" / "bin" / "ray"
    getconf = home / "bin" / "getconf"
    for script, body in ((recorder, f'[ "$1" = start ] && env > {home}/seen; true'), (getconf, f"echo {num_cpus}")):
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{getconf.parent}:/usr/bin:/bin", "RAY_HEAD_IP": "192.0.2.1"}
    for command in commands:
        subprocess.run(["bash", "-c", command], env=environment, check=True, timeout=30)
    variables = dict(line.split("=", 1) for line in (home / "seen").read_text().splitlines() if "=" in line)
    return {name: value for name, value in variables.items() if name.startswith("RAY_") and name != "RAY_HEAD_IP"}
