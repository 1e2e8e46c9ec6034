"""Make the small bundle of one format version: a CartPole policy with eight units, trained, judged and published for real.

python -m tests.golden.make_bundle VERSION     writes bundle-vVERSION/ beside this file, once, when a format is new

A folder that exists is never made anew: it is what users have on their disks. No Ray is needed; the loop is that of
`actors/controller.py` in one process, and the steps after it are the pipeline's own.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from policies.bundle import Bundle
from policies.distributions import seed_of
from policies.storage import open_storage
from training.checkpoint import load_policy, save_checkpoint
from training.environment import read_spaces
from training.evaluation import evaluate
from training.gates import Contender, GateContext, run_gates
from training.learner_state import LearnerState
from training.network import layout_of
from training.ppo import PPO
from training.rollout import Shard
from training.runs import RunConfig, create_run
from trimtab import pipeline
from trimtab.loop_file import LoopConfig, load_loop_file

HERE = Path(__file__).parent
LOOP_FILE = HERE.parents[1] / "examples" / "cartpole.yaml"
OVERRIDES = [
    "training.hidden=[8]",
    "gates.performance.min_return=100",
    "gates.performance.episodes=128",
    "gates.robustness.episodes=64",
    "gates.safety.constraints=[{function: 'cartpole_safety:stays_on_track', max_violation_rate: 0.2}]",
    "gates.regression.scenarios=[]",
    "serving.mode=sample",
    "environment.observation_names=[position, velocity, angle, spin]",
    "environment.observation_units=[m, m/s, rad, rad/s]",
]
NUM_UPDATES = 80
ROWS = (0, 40, 80, 120, 160, 200, 240, 255, -3, -1)  # golden observations whose decisions are written down


def main(version: int) -> None:
    folder = HERE / f"bundle-v{version}"
    if folder.exists():
        sys.exit(f"{folder} exists; a format's bundle is never made anew")
    loop = load_loop_file(LOOP_FILE, overrides=OVERRIDES)
    with tempfile.TemporaryDirectory() as directory:
        bundle = _publish(loop, Path(directory))
        shutil.copytree(bundle.path, folder / bundle.digest)
    lines = ",\n ".join(json.dumps(decision) for decision in _decisions(bundle))
    (folder / "decisions.json").write_text(f"[\n {lines}\n]\n")


def _publish(loop: LoopConfig, directory: Path) -> Bundle:
    storage, training = open_storage(directory / "data"), loop.training
    run = create_run(storage, "golden", RunConfig(loop.environment, training))
    layout = layout_of(read_spaces(loop.environment), training)
    ppo = PPO(layout, training, LearnerState.initial(layout, training.seed))
    shards = [Shard(loop.environment, training, number, update=0, attempt=0) for number in range(training.num_shards)]
    for update in range(NUM_UPDATES):
        weights = ppo.state.weights()
        ppo.update([shard.collect(weights, update=update) for shard in shards])
    tensors = ppo.state.to_tensors(layout)
    state = {
        **ppo.state.counters(),
        "run_id": run.name,
        "spaces": layout.spaces.to_json(),
        "network": layout.architecture.to_json(),
        "vf_share_layers": layout.shares_layers,
    }
    save_checkpoint(run, update=NUM_UPDATES, tensors=tensors, best=ppo.state.weights().tensors(layout), state=state, keep=2)
    policy, _ = load_policy(run)
    context = GateContext(Contender(policy, loop.serving.mode), None, loop.environment, loop.gates, pipeline._min_return(loop))
    report, episodes = run_gates(
        context,
        evaluate=lambda *requests: [evaluate(loop.environment, request) for request in requests],
        conditions_sha256=pipeline._conditions_sha256(loop),
        now=time.time(),
    )
    pipeline.keep_judged(run, policy, report, episodes, seed=loop.gates.seed)
    return pipeline.publish_run(loop, storage, run.name).bundle


def _decisions(bundle: Bundle) -> list[dict]:
    policy, decisions = bundle.policy, []
    for row in ROWS:
        obs_D, seed = bundle.golden.observations_ND[row], seed_of(f"golden {row}")
        parameters_P = policy.distributions(obs_D[None])[0]
        sampled, propensity = policy.distribution.choose(parameters_P, "sample", seed)
        greedy, _ = policy.distribution.choose(parameters_P, "greedy", seed)
        decision = {"seed": seed, "sampled": sampled, "propensity": propensity, "greedy": greedy}
        decisions.append({"observation": obs_D.astype(float).tolist(), **decision})
    return decisions


if __name__ == "__main__":
    main(int(sys.argv[1]))
