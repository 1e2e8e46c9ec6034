"""Small training runs, in the process of a test or in one of their own that can be killed.

python -m tests.training_runs ADDRESS STORAGE RUN_ID TRAINING     starts the run, or goes on with it when there is one

It prints `update N` after every update, `message …` for what it was told, and `result DIGEST` at the end.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import ray

from actors.controller import train
from policies.storage import Storage, open_storage
from training.config import EnvironmentConfig, TrainingConfig
from training.runs import CONFIG

ROOT = Path(__file__).parents[1]
CARTPOLE = EnvironmentConfig(id="CartPole-v1")
# 4 shards x 8 environments x 16 steps = 512 steps per update; small, because bits are compared here and not learning speed
SHORT = TrainingConfig(
    num_shards=4,
    num_env_runners=2,
    num_envs_per_shard=8,
    rollout_fragment_length=16,
    minibatch_size=256,
    num_epochs=2,
    hidden=(16,),
    num_cpus_per_env_runner=0.25,
    max_env_steps=6_000,
    checkpoint_every_updates=3,
    evaluation_every_updates=5,
    evaluation_episodes=5,
    seed=11,
    normalize_observations=True,
)
OURS = ("update ", "message ", "result ")
STEP_TIMEOUT_S = 120.0  # for the next line of a driver; its start takes 5 s here


def changed(**changes) -> TrainingConfig:
    return TrainingConfig(**{**SHORT.model_dump(), **changes})


class Driver:
    """A run in a process group of its own; `with` kills it at the end, if it still runs.

    `address` is that of a cluster, or `local` for one that the driver starts for itself in its process group.
    """

    def __init__(self, address: str, storage: Storage, run_id: str, training: TrainingConfig) -> None:
        command = [sys.executable, "-m", "tests.training_runs", address, str(storage.root), run_id, training.model_dump_json()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._log = storage.root / f"{run_id}.log"
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def has_begun(self) -> bool:
        """Say whether it has printed anything that was not read: its first update, at a driver that was just started."""
        return not self._lines.empty()

    def next_line(self) -> str:
        """Return what the driver prints next; fails when it ends or is silent."""
        line = self._lines.get(timeout=STEP_TIMEOUT_S)
        assert line, self._end()
        return line

    def assert_runs(self) -> None:
        assert self.process.poll() is None, self._end()

    def wait_for_updates(self, num_updates: int) -> None:
        """Wait until the driver has made so many updates from now on."""
        while not self._lines.empty():
            self.next_line()
        while num_updates > 0:
            num_updates -= self.next_line().startswith("update ")

    def result(self) -> str:
        """Wait for the end and return the digest of the parameters; fails when the run has found damage."""
        line = self.next_line()
        while line.startswith(("update ", "message the learner died")):
            line = self.next_line()
        assert line.startswith("result "), line
        return line.removeprefix("result ")

    def kill(self) -> None:
        """Kill the whole process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    def _end(self) -> str:
        return f"the driver ended with {self.process.wait(timeout=30)}: {self._log.read_text()[-3000:]}"

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith(OURS):  # Ray prints too, of processes that were killed
                self._lines.put(line.rstrip("\n"))
        self._lines.put("")


def main(address: str, root: str, run_id: str, training: str) -> None:
    if address == "local":
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=address, log_to_driver=False)
    storage = open_storage(root)
    result = train(
        CARTPOLE,
        TrainingConfig.model_validate_json(training),
        storage,
        run_id=run_id,
        resume=(storage.run(run_id) / CONFIG).exists(),
        on_progress=lambda progress: print("update", progress.update, flush=True),
        on_message=lambda message: print("message", message, flush=True),
    )
    print("result", result.parameters_sha256, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
