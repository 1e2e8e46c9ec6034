"""What a bundle says of where it comes from: its run, data, settings, packages, parents, and the model card."""

import contextlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from policies.errors import NotFound
from policies.policy import Policy
from policies.registry import RegistryState
from policies.storage import Storage
from policies.verdicts import GateReport
from training.event_file import first_and_last_time
from training.metrics import TENSORBOARD
from training.runs import read_config
from trimtab.learning_curves import read_curve
from trimtab.loop_file import LoopConfig


def parents_of(state: RegistryState, report: GateReport, metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the policy was compared with, and the run whose weights its own run went on from."""
    parents: list[dict[str, Any]] = []
    if report.incumbent_version is not None:
        number = report.incumbent_version
        parents.append({"kind": "incumbent", "version": number, "digest": state.version(number).digest})
    if "adopted_from" in metadata:
        parents.append({"kind": "run", **metadata["adopted_from"]})
    return parents


def origin_of(loop: LoopConfig, run: Path, metadata: dict[str, Any], parents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest's `origin`: enough to train the same policy again, and to say what it was trained on."""
    packages = ("trimtab", "ray", "torch", "numpy", "gymnasium")
    first_s, last_s = first_and_last_time(run / TENSORBOARD) or (None, None)
    return {
        "run_id": run.name,
        "parents": parents,
        "checkpoint": metadata,
        "data_range": {"env_steps": metadata.get("env_steps"), "from": first_s, "to": last_s},
        "loop": json.loads(loop.model_dump_json(exclude={"storage", "registry"})),
        "seeds": {"training": loop.training.seed, "gates": loop.gates.seed},
        "code_commit": _code_commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def card_of(
    loop: LoopConfig,
    storage: Storage,
    run_id: str,
    policy: Policy,
    metadata: dict[str, Any],
    report: GateReport,
    *,
    override_gates: str | None,
) -> dict[str, bytes]:
    """Return the files of the model card."""
    from trimtab.card import Facts, card_files  # here, not above: it draws, and matplotlib takes half a second

    run = storage.run(run_id)
    training = read_config(run).training
    origin = {
        "run": run_id,
        "algorithm": training.algorithm,
        "seed": training.seed,
        "updates": metadata["update"],
        "environment steps": metadata["env_steps"],
        "code commit": _code_commit() or "unknown",
    }
    settings = training.model_dump(mode="json", exclude_defaults=True)
    environment = loop.environment.model_dump_json(exclude_defaults=True)
    curve = None
    with contextlib.suppress(NotFound):  # no updates yet
        curve = read_curve(run)
    return card_files(Facts(loop.name, policy, loop.serving.mode, environment, origin, settings, report, override_gates, curve))


def _code_commit() -> str | None:
    """Return the commit of the source tree we run from, or None when we were installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
