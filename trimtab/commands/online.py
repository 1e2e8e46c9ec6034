"""The commands around a running endpoint: serve, down, decide, drive, status, replay."""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from policies.errors import NotFound, TrimtabError, UsageError
from training.run_state import read_run_state
from training.runs import newest_run
from trimtab import session as sessions
from trimtab.client import Client
from trimtab.cluster import Cluster
from trimtab.command import (
    DEFAULT_LOOP_FILE,
    DONE,
    NEGATIVE,
    AddressOption,
    Context,
    JsonOption,
    LoopFile,
    Sets,
    StorageOption,
    connect,
    console,
    open_context,
    output,
    say,
)
from trimtab.live import status_view, watch


def serve(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Serve in the background; `trimtab down` ends it.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Serve the champion, with its monitor and release manager, until Ctrl-C."""
    start_s = time.monotonic()
    context = open_context(loop_file, sets, storage)
    champion = context.registry().state().champion
    if champion is None:
        raise NotFound(
            f"{context.loop.name} has no champion in {context.storage.root}; train, gate and publish one, or `trimtab up`"
        )
    if not detach:
        with context.cluster(address) as cluster:
            serve_until_stopped(context, cluster, champion, start_s)
        return DONE
    arguments = ["serve", str(loop_file), "--storage", str(context.storage.root)]
    arguments += [part for value in sets or [] for part in ("--set", value)]
    arguments += ["--address", address] if address else []
    session = sessions.start_detached(arguments, context.storage, context.storage.root / "serve.log")
    text = f"serving {session.policy} version {session.version} at {session.url}; API key in {session.api_key_file}"
    output(as_json, dataclasses.asdict(session), text)
    return DONE


def down(loop_file: LoopFile = DEFAULT_LOOP_FILE, storage: StorageOption = None, as_json: JsonOption = False) -> int:
    """End the `up` or `serve` that runs on this storage, and everything it started."""
    context = open_context(loop_file, None, storage)
    session = sessions.stop_detached(context.storage)
    output(as_json, {"stopped": dataclasses.asdict(session)}, f"stopped {session.policy} at {session.url}")
    return DONE


def decide(
    observation: Annotated[str, typer.Argument(help="A JSON list of numbers, such as '[0, 0, 0, 0]'.")],
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    unit_id: Annotated[str | None, typer.Option(help="Who asks; the same unit keeps its arm.")] = None,
    action_mask: Annotated[str | None, typer.Option(help="Which choices exist now: a JSON list of 0 and 1.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Of a policy with a history: '' begins an episode, then what the decision before says.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Ask the running endpoint for one decision."""
    values, mask = (_parsed(name, text) for name, text in (("observation", observation), ("action mask", action_mask or "null")))
    context = open_context(loop_file, None, storage)
    with connect(context) as client:
        decision = client.decide(values, action_mask=mask, unit_id=unit_id, state=state)
    text = "action {action} by version {version} ({arm}), propensity {propensity:.4f}, decision {decision_id}".format(**decision)
    if state is not None:
        text += f"\nstate {decision['state']}"
    output(as_json, decision, text)
    return DONE


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"{name} {text!r} is not JSON: {error}") from error


def drive(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Stop after this many episodes.")] = None,
    seconds: Annotated[float, typer.Option(min=1, max=86_400, help="Stop after this time at the latest.")] = 600.0,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Episodes at once.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Episode k starts from seed + k.")] = 0,
    as_json: JsonOption = False,
) -> int:
    """Be the clients: play episodes against the endpoint, report rewards, print returns and latencies per arm."""
    from trimtab.drive import drive as run_population

    context = open_context(loop_file, sets, storage)
    session = sessions.require_session(context.storage)
    key = context.storage.api_keys.owner_key()
    summary = run_population(
        context.loop.environment, session.url, key, episodes=episodes, seconds=seconds, concurrency=concurrency, seed=seed
    )
    if as_json:
        print(json.dumps(summary))
    else:
        _print_drive(summary)
    return DONE if summary["failed_requests"] == 0 else NEGATIVE


def _print_drive(summary: dict[str, Any]) -> None:
    print(
        f"{summary['episodes']} episodes, {summary['decisions']:,} decisions in {summary['wall_s']:.1f} s "
        f"({summary['decisions_per_s']:,.0f}/s), {summary['failed_requests']} failed requests, "
        f"{summary['mixed_episodes']} episodes answered by two versions"
    )
    for arm in summary["arms"]:
        interval = "" if arm["return_low"] is None else f" [{arm['return_low']:.1f}, {arm['return_high']:.1f}]"
        mean = "-" if arm["return_mean"] is None else f"{arm['return_mean']:.1f}"
        latency = arm["latency_ms"]
        print(
            f"  {arm['arm']} v{arm['version']}: return {mean}{interval} over {arm['episodes']} episodes, {arm['decisions']:,} "
            f"decisions, latency p50 {latency['p50']:.1f} p95 {latency['p95']:.1f} p99 {latency['p99']:.1f} ms"
        )
    for failure, count in summary["failures"].items():
        print(f"  {count} x {failure}")


def status(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    follow: Annotated[bool, typer.Option("--watch", help="Refresh each second until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show what is served, how it does, how the release goes, and how the newest training run stands."""
    context = open_context(loop_file, None, storage)
    document = _status(context)
    if follow:
        watch(console, lambda: _status_or_reason(lambda: _status(context), context.loop.name))
    if as_json:
        print(json.dumps(document))
    else:
        Console().print(status_view(document))
    return DONE


def _status(context: Context) -> dict[str, Any]:
    """Return what the endpoint says and how the newest run stands; raises `NotFound` when there is neither."""
    run_dir = newest_run(context.storage)
    training = None if run_dir is None else read_run_state(run_dir).to_json()
    if training is not None and sessions.running_session(context.storage) is None:
        reason = f"nothing is serving from {context.storage.root}"
        return {**_no_status(context.loop.name, context.registry().state().champion, reason), "training": training}
    with connect(context) as client:
        return {**client.status(), "training": training}


def replay(
    decision_id: Annotated[str, typer.Argument(help="The id that a decision was answered with.")],
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    storage: StorageOption = None,
    as_json: JsonOption = False,
) -> int:
    """Recompute a logged decision from its bundle; exit code 1 unless every bit is the same."""
    from trimtab.replay import replay as recompute

    context = open_context(loop_file, None, storage)
    result = recompute(context.storage, context.loop.name, decision_id)
    text = (
        f"decision {decision_id} by version {result['version']}, bundle {result['digest'][:12]}, {result['engine']}\n"
        f"logged     {result['logged']}\nrecomputed {result['recomputed']}\n"
        f"{'equal, bit for bit' if result['equal'] else 'DIFFERENT'}"
    )
    output(as_json, result, text)
    return DONE if result["equal"] else NEGATIVE


def serve_until_stopped(context: Context, cluster: Cluster, champion: int, start_s: float) -> None:
    with sessions.serving(context.loop, context.storage, champion=champion, ray_address=cluster.address) as session:
        say(f"serving {session.policy} version {session.version} at {session.url} after {time.monotonic() - start_s:.1f} s")
        say(f"API key in {session.api_key_file}; dashboard at {session.url}/dashboard")
        say(f"try: {_curl_line(context, session)}")
        key = context.storage.api_keys.owner_key()
        with Client(session.url, key) as client:
            watch(console, lambda: _status_or_reason(client.status, session.policy))


def _status_or_reason(fetch: Callable[[], dict[str, Any]], policy: str) -> dict[str, Any]:
    """Return the status or why there is none: an endpoint that is away for a moment is no reason to end it."""
    try:
        return fetch()
    except TrimtabError as error:
        return _no_status(policy, None, f"the endpoint does not answer: {error}")


def _no_status(policy: str, champion: int | None, reason: str) -> dict[str, Any]:
    return {"policy": policy, "champion": champion, "monitor": None, "reason": reason}


def _curl_line(context: Context, session: sessions.Session) -> str:
    body = json.dumps(context.registry().bundle(session.version).policy.spaces.example_request())
    return f"""curl -s -H "Authorization: Bearer $(cat {session.api_key_file})" -d '{body}' {session.url}/v1/decide"""
