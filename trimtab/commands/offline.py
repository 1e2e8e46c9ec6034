"""The commands before traffic: train, resume, evaluate, gate, publish."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from policies.verdicts import GateReport, Verdict
from training.phases import time_shares
from trimtab.command import (
    DEFAULT_LOOP_FILE,
    DONE,
    NEGATIVE,
    UNDECIDED,
    AddressOption,
    Context,
    JsonOption,
    KeyOption,
    LoopFile,
    OverrideOption,
    RunOption,
    Sets,
    StorageOption,
    console,
    escape,
    load_key,
    open_context,
    output,
    say,
)

if TYPE_CHECKING:  # these import Ray: only the commands that need it pay for it
    from actors.controller import TrainResult


def train(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    run: Annotated[str | None, typer.Option("--run", metavar="RUN_ID", help="Name of the new run; default: made up.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Train a policy until its target return and keep its checkpoints."""
    from training.environment import read_spaces

    context = open_context(loop_file, sets, storage)
    read_spaces(context.loop.environment)  # a wrong environment is said before Ray starts
    with context.cluster(address):
        return _report_training(context, run_training(context, run_id=run, resume=False), as_json)


def resume(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    run: RunOption = None,
    force: Annotated[bool, typer.Option("--force", help="Go on also with settings that make it another run.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Continue a run from its last checkpoint; it ends with the same parameters as if it had never stopped (not with RLlib)."""
    from trimtab.pipeline import find_run

    context = open_context(loop_file, sets, storage)
    run_id = find_run(context.storage, run)
    with context.cluster(address):
        return _report_training(context, run_training(context, run_id=run_id, resume=True, force=force), as_json)


def run_training(context: Context, *, run_id: str | None, resume: bool, force: bool = False) -> "TrainResult":
    """Train a new run or resume one, show how it goes, and where its time went."""
    from trimtab.pipeline import train_run
    from trimtab.training_view import training_view

    training = context.loop.training
    options = {"run_id": run_id, "resume": resume, "force": force}
    with training_view(console, training) as view:
        result = train_run(context.loop, context.storage, **options, on_progress=view.show, on_message=view.say)
    shares = time_shares(result.phases_s, overlaps=training.max_staleness > 0)
    if shares is not None:
        say(str(shares))
    return result


def _report_training(context: Context, result: "TrainResult", as_json: bool) -> int:
    text = (
        f"run {result.run_id}: {result.env_steps:,} env steps in {result.wall_s:.1f} s, "
        f"{result.env_steps_per_s:,.0f}/s in the loop, greedy return {result.evaluation_return_mean:.1f}\n"
        f"checkpoint {result.checkpoint}\nparameters {result.parameters_sha256}"
    )
    output(as_json, result.to_json(), text)
    if not result.reached_target:
        say(target_missed(context, result))
        return NEGATIVE
    return DONE


def target_missed(context: Context, result: "TrainResult") -> str:
    return (
        f"run {result.run_id} did not reach the target return {context.loop.training.target_return:g} within "
        f"{result.env_steps:,} env steps (evaluation: {result.evaluation_return_mean:.1f}); raise training.max_env_steps and "
        f"`trimtab resume --run {result.run_id}`"
    )


def evaluate(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    run: RunOption = None,
    version: Annotated[int | None, typer.Option(help="Evaluate a registered version instead of a run.")] = None,
    episodes: Annotated[int, typer.Option(min=2, help="How many episodes.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial states.")] = 0,
    as_json: JsonOption = False,
) -> int:
    """Run episodes with a policy as it would be served, and print its return."""
    from training.gates.intervals import mean_interval
    from trimtab.pipeline import evaluate_run, evaluate_version, find_run

    context = open_context(loop_file, sets, storage)
    run_id = None if version is not None else find_run(context.storage, run)
    with context.cluster(address):
        if version is not None:
            rows = evaluate_version(context.loop, context.storage, version, episodes=episodes, seed=seed)
        else:
            rows = evaluate_run(context.loop, context.storage, run_id, episodes=episodes, seed=seed)
    interval = mean_interval(rows.returns_E, context.loop.gates.confidence)
    document = {
        "run_id": run_id,
        "version": version,
        "episodes": episodes,
        "seed": seed,
        "return_mean": interval.mean,
        "return_low": interval.low,
        "return_high": interval.high,
        "return_min": float(rows.returns_E.min()),
        "returns": rows.returns_E.tolist(),
    }
    text = (
        f"return {interval.mean:.1f} [{interval.low:.1f}, {interval.high:.1f}] over {episodes} episodes, "
        f"lowest {rows.returns_E.min():.1f}"
    )
    output(as_json, document, text)
    return DONE


def gate(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    run: RunOption = None,
    against: Annotated[int | None, typer.Option(help="Version to compare with; default: the champion.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Judge a run's best policy so far by all gates. Exit code 1 when one fails, 3 when the evidence is not enough."""
    from trimtab.pipeline import find_run, gate_run

    context = open_context(loop_file, sets, storage)
    run_id = find_run(context.storage, run)
    with context.cluster(address):
        report = gate_run(context.loop, context.storage, run_id, against=against)
    if as_json:
        print(json.dumps({"run_id": run_id, **report.to_json()}))
    else:
        print_report(report)
        say(f"model card: {context.storage.run(run_id) / 'card.html'}")
    return {Verdict.PASS: DONE, Verdict.FAIL: NEGATIVE, Verdict.INCONCLUSIVE: UNDECIDED}[report.verdict]


def print_report(report: GateReport) -> None:
    against = f" against version {report.incumbent_version}" if report.incumbent_version else ""
    table = Table(title=f"gates{against}: {report.verdict}", title_justify="left", box=None, pad_edge=False)
    for title in ("gate", "verdict", "reason"):
        table.add_column(title)
    colours = {Verdict.PASS: "green", Verdict.FAIL: "red", Verdict.INCONCLUSIVE: "yellow"}
    for result in report.results:
        table.add_row(result.gate, f"[{colours[result.verdict]}]{result.verdict}[/]", escape(result.reason))
    console.print(table)


def diff(
    first: Annotated[int, typer.Argument(help="A registered version.")],
    second: Annotated[int, typer.Argument(help="Another one.")],
    loop_file: Annotated[Path, typer.Option("--loop", metavar="LOOP_FILE", help="The loop file.")] = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    episodes: Annotated[int, typer.Option(min=2, help="Episodes of each.")] = 128,
    as_json: JsonOption = False,
) -> int:
    """Show where two versions would act differently, what each does there, and what comes of it."""
    from trimtab.pipeline import diff_versions

    context = open_context(loop_file, sets, storage)
    with context.cluster(address):
        found = diff_versions(context.loop, context.storage, first, second, episodes=episodes)
    if as_json:
        print(json.dumps({"first": first, "second": second, **found.to_json()}))
        return DONE
    say(f"versions {first} and {second} act differently in {found.share.mean:.1%} of an episode's states {found.share}")
    table = Table(title="where they differ", title_justify="left", box=None, pad_edge=False)
    for title in ("share", "observations around", f"actions of {first} → {second}", f"what follows: {second} less {first}"):
        table.add_column(title)
    for cluster in found.clusters:
        centre = ", ".join(f"{value:.3g}" for value in cluster.centre_D[:8]) + (", …" if len(cluster.centre_D) > 8 else "")
        pairs = ", ".join(f"{ours} → {theirs} ({count})" for ours, theirs, count in cluster.pairs)
        table.add_row(f"{cluster.share:.0%}", escape(centre), escape(pairs), escape(str(cluster.value_difference or "unknown")))
    console.print(table)
    return DONE


def publish(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    run: RunOption = None,
    override_gates: OverrideOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Pack a gated run as a bundle and register it as the next version; the first passing one becomes champion."""
    from trimtab.pipeline import find_run, publish_run

    context = open_context(loop_file, sets, storage)
    run_id = find_run(context.storage, run)
    published = publish_run(context.loop, context.storage, run_id, override_gates=override_gates, key=load_key(context, key))
    document = {
        "policy": context.loop.name,
        "version": published.version,
        "digest": published.bundle.digest,
        "bundle": str(published.bundle.path),
        "gate_verdict": str(published.bundle.gate_report.verdict),
        "override_gates": override_gates,
        "is_champion": published.is_champion,
        "signed_with": key,
    }
    role = "champion" if published.is_champion else f"deliver it with `trimtab release start --version {published.version}`"
    output(as_json, document, f"published version {published.version}, bundle {published.bundle.digest[:12]}; {role}")
    return DONE
