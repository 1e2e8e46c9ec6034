"""Make a deliberately bad candidate: a copy of a run whose policy prefers exactly the actions that it should avoid.

python examples/flip_policy.py --storage trimtab-data --run RUN_ID      prints the id of the new run
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the example also runs from a checkout that is not installed

from policies.errors import TrimtabError, UsageError
from policies.storage import Storage, open_storage
from training.checkpoint import load_checkpoint, read_layout, save_checkpoint
from training.network import NORMALISER, parameters_sha256
from training.pacing import Evaluations
from training.runs import create_run, new_run_id, open_run, read_config


def flip_policy(storage: Storage, run_id: str, *, now: float) -> str:
    """Copy the run's last checkpoint into a new run with the sign of the policy's output layer flipped; return its id."""
    source = open_run(storage, run_id)
    checkpoint = load_checkpoint(source)
    layout = read_layout(checkpoint.state)
    if layout.architecture.module is not None:
        factory = layout.architecture.module.factory
        raise UsageError(f"run {run_id!r} has a network of its own, {factory}: its last layer is not known")
    last = layout.num_layers - 1
    flipped = {name: -checkpoint.tensors[name] for name in (f"policy.{last}.weight", f"policy.{last}.bias")}
    tensors = checkpoint.tensors | flipped

    config = read_config(source)
    target = create_run(storage, new_run_id(now), config)
    published = {name: tensors[name] for name in [*layout.shapes, *NORMALISER]}
    state = {
        **checkpoint.state,
        "run_id": target.name,
        "parameters_sha256": parameters_sha256(published),
        "evaluations": asdict(Evaluations()),  # nobody has evaluated this one
        "flipped_from": run_id,
    }
    save_checkpoint(target, update=state["update"], tensors=tensors, state=state, keep=config.training.keep_checkpoints)
    return target.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", required=True, help="storage root that holds the run")
    parser.add_argument("--run", required=True, help="id of the run to copy")
    arguments = parser.parse_args()
    try:
        print(flip_policy(open_storage(arguments.storage), arguments.run, now=time.time()))
    except TrimtabError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
