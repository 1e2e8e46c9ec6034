"""Which interpreter runs a peer, and what has to be installed for it.

    python -m benchmarks.peers.environments [--only NAME ...]

makes them now; the benchmarks make those they need.

The pins of most peers conflict with ours (numpy 1, Gymnasium 0.29), so each of those gets a virtual environment of its own
below `.venv-bench/`, made by pip from the requirements below. None of them has Trimtab installed: a peer's file imports its
own library and `benchmarks.peers.judge`, which is found because every peer runs in the repository's directory.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DIRECTORY = REPOSITORY / ".venv-bench"
INSTALL_TIMEOUT_S = 1_200.0  # PufferLib, the slowest, takes 2 to 3 minutes on two busy cores; the rest is for slow networks
TORCH = "torch==2.13.0"  # one version for all, so that no peer is faster or slower by its torch

ONNX_RUNTIME = ("onnxruntime==1.32.0", "numpy==2.4.6")  # one version for all, as of torch
UVICORN = (
    "uvicorn==0.54.0",
    "uvloop==0.23.0",
    "httptools==0.9.0",
)  # all three servers stand on it; it takes the last two when there


class EnvironmentUnavailable(Exception):
    """The environment of a peer cannot be made on this machine."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """Requirements of one virtual environment; `before` is installed first, for builds that need it."""

    requirements: tuple[str, ...]
    before: tuple[str, ...] = ()
    build_isolation: bool = True
    variables: tuple[tuple[str, str], ...] = ()
    sitecustomize: str = ""  # runs at the start of each build
    without_cuda: bool = False  # builds as if there were no CUDA compiler


ENVIRONMENTS = {
    # There is no wheel, and the build needs torch and numpy in the environment that it runs in. NO_OCEAN leaves out PufferLib's
    # own C games, whose build fetches archives from GitHub. On that path setup.py of 3.0.0 reads a variable that it never sets
    # ("NameError: name 'c_extension_paths' is not defined"); as a builtin it is an empty list. With a CUDA compiler on PATH the
    # build wants a torch with CUDA.
    "pufferlib": Environment(
        requirements=("pufferlib==3.0.0",),
        before=(TORCH, "numpy<2", "setuptools<80", "wheel", "Cython"),
        build_isolation=False,
        variables=(("NO_OCEAN", "1"),),
        sitecustomize="import builtins\n\nbuiltins.c_extension_paths = []\n",
        without_cuda=True,
    ),
    "sample_factory": Environment(requirements=(TORCH, "numpy<2", "sample-factory==2.1.1")),
    # EnvPool brings its own LunarLander; Box2D and pygame are for Gymnasium's, in which the policy is judged.
    "envpool": Environment(requirements=(TORCH, "gymnasium>=1.2.2,<1.3", "envpool==1.2.5", "Box2D==2.3.10", "pygame>=2.6,<3")),
    # Servers, see benchmarks/serve_peers/.
    "fastapi": Environment(requirements=("fastapi==0.165.0", "orjson==3.13.0", *UVICORN, *ONNX_RUNTIME)),
    "bentoml": Environment(requirements=("bentoml==1.4.40", *UVICORN, *ONNX_RUNTIME)),
    "litserve": Environment(requirements=("litserve==0.2.19", *UVICORN, *ONNX_RUNTIME)),
}


@dataclasses.dataclass(frozen=True)
class Peer:
    """A module to run, and the environment to run it in: None is the one that runs the benchmark."""

    module: str
    arguments: tuple[str, ...] = ()
    environment: str | None = None


CARTPOLE_PEERS = {
    "cleanrl": Peer("benchmarks.peers.cleanrl", ("--variant", "cleanrl")),
    "cleanrl_big": Peer("benchmarks.peers.cleanrl", ("--variant", "cleanrl_big")),
    "pufferlib": Peer("benchmarks.peers.pufferlib_ppo", environment="pufferlib"),
    "sample_factory": Peer("benchmarks.peers.sample_factory_appo", environment="sample_factory"),
}
LUNARLANDER_PEERS = {
    # A tenth of the steps: its speed does not change on the way, and all of them take eight minutes.
    "stable_baselines3": Peer("benchmarks.peers.stable_baselines3_lunarlander", ("--steps", "50000")),
    "envpool_cleanrl": Peer("benchmarks.peers.envpool_lunarlander", environment="envpool"),
}


def command(peer: Peer, seed: int) -> list[str]:
    """Return the command that runs the peer in the repository's directory, making its environment where it has to.

    Raises EnvironmentUnavailable with the reason.
    """
    python = sys.executable if peer.environment is None else str(ready_python(peer.environment))
    return [python, "-m", peer.module, *peer.arguments, "--seed", str(seed)]


def ready_python(name: str) -> Path:
    """Return the interpreter of an environment, installing it unless an installation of the same requirements is there.

    Raises EnvironmentUnavailable with the failed command and what it said.
    """
    environment, target = ENVIRONMENTS[name], DIRECTORY / name
    python, installed = target / "bin" / "python", target / "installed.txt"
    if installed.exists() and installed.read_text() == repr(environment):
        return python
    if target.exists():
        shutil.rmtree(target)
    try:
        _install(environment, target, python)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.output or "").strip().splitlines()[-15:]
        raise EnvironmentUnavailable(f"{error}: " + " | ".join(line.strip() for line in said if line.strip())) from error
    installed.write_text(repr(environment))  # last, so that an interrupted installation counts as none
    return python


def _install(environment: Environment, target: Path, python: Path) -> None:
    _run([sys.executable, "-m", "venv", str(target)], dict(os.environ))
    variables = _build_variables(environment, target)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    if environment.before:
        _run([*pip, *environment.before], variables)
    _run([*pip, *([] if environment.build_isolation else ["--no-build-isolation"]), *environment.requirements], variables)


def _build_variables(environment: Environment, target: Path) -> dict[str, str]:
    variables = {**os.environ, **dict(environment.variables)}
    variables.pop("PYTHONPATH", None)
    if environment.sitecustomize:
        hooks = target / "build-hooks"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(environment.sitecustomize)
        variables["PYTHONPATH"] = str(hooks)
    if environment.without_cuda:
        folders = variables["PATH"].split(os.pathsep)
        variables["PATH"] = os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())
    return variables


def _run(arguments: list[str], variables: dict[str, str]) -> None:
    subprocess.run(
        arguments,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS), help="which to make")
    failed = False
    for name in parser.parse_args().only:
        try:
            print(f"{name}: {ready_python(name)}", flush=True)
        except EnvironmentUnavailable as error:
            failed = True
            print(f"{name}: not available: {error}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
