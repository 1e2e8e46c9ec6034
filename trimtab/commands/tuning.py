"""`trimtab tune`: search hyper-parameters, show the trials, let the best one go on."""

import contextlib
import json
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from policies.errors import TrainingFailed
from trimtab.cluster import first_interrupt_noted
from trimtab.command import (
    DEFAULT_LOOP_FILE,
    DONE,
    INTERRUPTED,
    NEGATIVE,
    AddressOption,
    Context,
    JsonOption,
    LoopFile,
    Sets,
    StorageOption,
    console,
    escape,
    open_context,
    say,
)
from trimtab.commands.offline import run_training, target_missed
from trimtab.live import PLAIN_EVERY_S

if TYPE_CHECKING:  # these import Ray: only the commands that need it pay for it
    from training.tuning import Trial
    from trimtab.tuning import SearchResult


def tune(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    search: Annotated[str | None, typer.Option("--search", metavar="ID", help="Name of the search; default: made up.")] = None,
    continue_best: Annotated[
        bool, typer.Option("--continue/--no-continue", help="Let the best trial go on to the loop file's own target.")
    ] = True,
    as_json: JsonOption = False,
) -> int:
    """Search the settings under `tuning.parameters` with Ray Tune; the best trial goes on as a normal run.

    Every trial is a run of its own. Ctrl-C ends the search with what it knows so far.
    """
    from training.environment import read_spaces
    from training.runs import new_run_id

    context = open_context(loop_file, sets, storage)
    read_spaces(context.loop.environment)  # a wrong environment is said before Ray starts
    with context.cluster(address):
        from trimtab.tuning import run_search

        search_id, tuning = search or new_run_id(time.time()), context.loop.tuning
        say(
            f"search {search_id}: {tuning.num_trials} trials of at most {tuning.max_env_steps:,} env steps, {tuning.scheduler}; "
            "Ctrl-C ends it with what is known by then"
        )
        with first_interrupt_noted() as interrupted, _view(search_id) as view:
            report = {"on_trial": view, "on_message": say, "should_stop": interrupted.is_set}
            result = run_search(context.loop, context.storage, search_id, **report)
        _show(result)
        if interrupted.is_set():
            return _answer(result, as_json, INTERRUPTED)
        if result.best is None or not continue_best:
            return _answer(result, as_json, DONE)
        return _let_best_go_on(context, result, as_json)


def _let_best_go_on(context: Context, result: "SearchResult", as_json: bool) -> int:
    from trimtab.tuning import keep_result

    say(f"run {result.best.run_id} goes on")
    continued = run_training(context, run_id=result.best.run_id, resume=True)
    result = replace(result, continued=continued)
    keep_result(result)
    is_missed = context.loop.training.target_return is not None and not continued.reached_target
    if is_missed:
        say(target_missed(context, continued))
    return _answer(result, as_json, NEGATIVE if is_missed else DONE)


def _answer(result: "SearchResult", as_json: bool, code: int) -> int:
    if as_json:
        print(json.dumps(result.to_json()), flush=True)
    elif result.best is not None:
        print(result.best.run_id, flush=True)
    if result.best is None and code != INTERRUPTED:
        raise TrainingFailed(f"no trial of search {result.search_id} got as far as an evaluation: {result.trials[0].reason}")
    return code


def _show(result: "SearchResult") -> None:
    """Print the table, where the files are, and the best settings as they can be written down."""
    print_table(console, result.trials)
    for trial in result.trials:
        if trial.status == "failed":
            say(f"{trial.run_id} failed: {trial.reason}")
    say(f"result in {result.directory}" + (f", picture {result.pictures[0].name}" if result.pictures else ""))
    if result.best is not None:
        # What a trial that was stopped learned since its last checkpoint is made again when it is resumed, and not gated before.
        how = "gate --run {} judges it" if result.best.status == "finished" else "resume --run {} goes on with it"
        say(f"the best trial is run {result.best.run_id}: trimtab {how.format(result.best.run_id)}. Its settings in a loop file:")
        say(f"  {as_yaml({'training': result.settings})}")
        say(f"or as options: {' '.join(set_options(result.settings))}")


def print_table(console: Console, trials: "list[Trial]") -> None:
    """Print the table of ranked trials; as wide as it is where no terminal limits it."""
    table = _trial_table(trials)
    if not console.is_terminal:
        table.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table, crop=False, no_wrap=not console.is_terminal, overflow="ignore")


def _trial_table(trials: "list[Trial]") -> Table:
    settings = list(trials[0].parameters)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rank", justify="right")
    table.add_column("run", no_wrap=True)  # what one copies
    for title in (*settings, "env steps", "best return"):
        table.add_column(title, justify="right", overflow="fold")
    table.add_column("status", overflow="fold")
    for rank, trial in enumerate(trials, 1):
        values = [as_yaml(trial.parameters[name]) for name in settings]
        best = "-" if trial.best_return is None else f"{trial.best_return:.1f}"
        table.add_row(str(rank), trial.run_id, *map(escape, values), f"{trial.env_steps:,}", best, escape(status_of(trial)))
    return table


def status_of(trial: "Trial") -> str:
    """Say in a few words how a trial ended; a failure's message is told elsewhere."""
    reason = f" ({trial.reason})" if trial.reason and trial.status != "failed" else ""
    copied = f", copied {len(trial.donors)}" if trial.donors else ""
    return f"{trial.status}{reason}{copied}"


def set_options(settings: dict[str, Any]) -> list[str]:
    """Return the settings as `--set` options for a shell."""
    return [f"--set {shlex.quote(f'training.{name}={as_yaml(value)}')}" for name, value in settings.items()]


def as_yaml(value: Any) -> str:
    """Return a value as YAML on one line. PyYAML would read Python's own 1e-05 as a string."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n").strip()


class _View:
    """Tells of trials that ended, and in between in one line how the search is doing."""

    def __init__(self, search_id: str, live: Live | None) -> None:
        self._search_id = search_id
        self._live = live
        self._told_s = time.monotonic()
        self._is_evaluated = False

    def __call__(self, trials: "list[Trial]", changed: "Trial") -> None:
        from training.tuning import TrialStatus

        if changed.status not in (TrialStatus.WAITING, TrialStatus.RUNNING):
            best = "" if changed.best_return is None else f", best return {changed.best_return:.1f}"
            say(f"{changed.run_id} {status_of(changed)} after {changed.env_steps:,} env steps{best}")
        is_first_evaluation = changed.best_return is not None and not self._is_evaluated
        self._is_evaluated |= is_first_evaluation
        if self._live is not None:
            self._live.update(Text(summary(self._search_id, trials)))
        elif is_first_evaluation or time.monotonic() - self._told_s > PLAIN_EVERY_S:
            self._told_s = time.monotonic()
            say(summary(self._search_id, trials))


@contextlib.contextmanager
def _view(search_id: str) -> Iterator[_View]:
    if not console.is_terminal:
        yield _View(search_id, None)
        return
    with Live(Text(f"search {search_id}: starting"), console=console, refresh_per_second=4, transient=True) as live:
        yield _View(search_id, live)


def summary(search_id: str, trials: "list[Trial]") -> str:
    """Say in one line how a search is doing."""
    counts = Counter(str(trial.status) for trial in trials)
    parts = [f"search {search_id}", *(f"{count} {status}" for status, count in counts.items())]
    parts.append(f"{sum(trial.env_steps for trial in trials):,} env steps")
    evaluated = [trial for trial in trials if trial.best_return is not None]
    if evaluated:
        best = max(evaluated, key=lambda trial: trial.best_return)
        values = " ".join(f"{name} {as_yaml(value)}" for name, value in best.parameters.items())
        parts.append(f"best return {best.best_return:.1f} ({best.run_id}: {values})")
    return " · ".join(parts)
