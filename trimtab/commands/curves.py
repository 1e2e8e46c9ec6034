"""`trimtab plot`: the learning curves of runs as a picture."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from policies.errors import NotFound
from policies.storage import Storage, open_storage
from training.runs import newest_run, open_run
from trimtab.command import DEFAULT_LOOP_FILE, DONE, JsonOption, StorageOption, open_context, output


class XAxis(StrEnum):
    """What the curves are drawn against."""

    STEPS = "steps"
    WALL = "wall"
    BOTH = "both"


RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN_ID]…", help="The runs; default: the one started or resumed last.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The picture to write: .png or .svg.")]
XOption = Annotated[XAxis, typer.Option("--x", help="Against environment steps, wall-clock time, or both side by side.")]
LoopFileOption = Annotated[Path, typer.Option("--loop", metavar="LOOP_FILE", help="The loop file, which says where runs are.")]


def plot(
    runs: RunsArgument = None,
    out: OutOption = Path("learning-curves.png"),
    x: XOption = XAxis.BOTH,
    loop_file: LoopFileOption = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> int:
    """Draw the learning curves of one or several runs: training return and greedy evaluations."""
    from trimtab.learning_curves import draw, read_curve, require_format

    require_format(out)
    # The loop file only says where the runs are.
    place = open_storage(storage) if storage is not None else open_context(loop_file, None, None).storage
    curves = [read_curve(run_dir) for run_dir in _run_dirs(place, runs or [])]
    draw(curves, ("steps", "wall") if x is XAxis.BOTH else (x.value,), out)
    names = [curve.run_id for curve in curves]
    output(as_json, {"out": str(out), "runs": names, "x": x.value}, f"{out}: {', '.join(names)}")
    return DONE


def _run_dirs(storage: Storage, run_ids: list[str]) -> list[Path]:
    if run_ids:
        return [open_run(storage, run_id) for run_id in dict.fromkeys(run_ids)]
    newest = newest_run(storage)
    if newest is None:
        raise NotFound(f"no run in {storage.runs}; start one with `trimtab train`")
    return [newest]
