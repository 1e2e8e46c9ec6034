"""Show the status document to a person in a terminal."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

REFRESH_S = 1.0
MENDED = ("worker_restarts", "environment_failures", "learner_restarts")
PLAIN_EVERY_S = 10.0  # without a terminal a line now and then is a log, one per second is noise


def watch(console: Console, fetch: Callable[[], dict[str, Any]]) -> None:
    """Show the status, refreshed each second, until interrupted. Without a terminal: one plain line every ten seconds."""
    if not console.is_terminal:
        while True:
            console.print(_line(fetch()), highlight=False, soft_wrap=True)
            time.sleep(PLAIN_EVERY_S)
    with Live(status_view(fetch()), console=console, refresh_per_second=4) as live:
        while True:
            time.sleep(REFRESH_S)
            live.update(status_view(fetch()))


def status_view(status: dict[str, Any]) -> RenderableType:
    """Return the tables of a status document."""
    parts: list[RenderableType] = [_heading(status)]
    parts += [Text(line, style="bold red") for line in switch_lines(status)]
    if status.get("training"):
        parts.append(Text(training_line(status["training"])))
    if status.get("arms"):
        parts.append(_arms_table(status["arms"]))
    parts += [Text(line) for line in map(shadow_line, status.get("shadows") or [])]
    if status.get("monitor") is None:
        parts.append(Text(status.get("reason") or "the monitor does not answer", style="yellow"))
    return Group(*parts)


def switch_lines(status: dict[str, Any]) -> list[str]:
    """Return a line for each arm that is switched off, loud enough not to be forgotten."""
    return [
        f"{off['arm'].upper()} SWITCHED OFF: {off['reason']} (`trimtab arms enable {off['arm']}`)"
        for off in status.get("switched_off") or []
    ]


def shadow_line(shadow: dict[str, Any]) -> str:
    """Return what a shadow would have done, in one line."""
    parts = [f"shadow v{shadow['version']}: {shadow['decisions']:,} decisions, {shadow['failures']} failures"]
    if not shadow["is_asked"]:
        parts.append("not asked now")
    if shadow["agreement"] is not None:
        parts.append(f"agrees in {shadow['agreement']:.1%}")
    if shadow["sent_propensity"] is not None:
        parts.append(f"would send the same with probability {shadow['sent_propensity']:.3f}")
    return ", ".join(parts)


def training_line(run: dict[str, Any]) -> str:
    """Return how the newest run stands, in one line."""
    parts = [f"training run {run['run_id']} {run['state']}{_reason(run['stop_reason'])}", f"{run['env_steps']:,} steps"]
    if run["state"] == "running" and run["env_steps_per_s"] is not None:
        parts.append(f"{run['env_steps_per_s']:,.0f} steps/s")
    if run["return_mean"] is not None:
        interval = "" if run["return_low"] is None else f" [{run['return_low']:,.1f}, {run['return_high']:,.1f}]"
        parts.append(f"return {run['return_mean']:,.1f}{interval}")
    if run["evaluation_return_mean"] is not None:
        target = "" if run["target_return"] is None else f" of {run['target_return']:,g}"
        parts.append(f"greedy {run['evaluation_return_mean']:,.1f}{target}")
    parts += [f"{run[count]} {count.replace('_', ' ')}" for count in MENDED if run[count]]
    return " · ".join(parts)


def _reason(stop_reason: str | None) -> str:
    return {None: "", "target": " (target reached)", "patience": " (no better evaluation)"}.get(stop_reason, f" ({stop_reason})")


def _heading(status: dict[str, Any]) -> Text:
    champion, release = status.get("champion"), status.get("release")
    text = Text(f"{status['policy']}: champion v{champion}" if champion else f"{status['policy']}: no champion", style="bold")
    if release:
        shares = " → ".join(f"{weight:.0%}" for weight in release["weights"])
        text.append(f"\nrelease {release['number']} of v{release['candidate']} ({shares}): {release['state']}", style="cyan")
        if release["state"] == "running":
            text.append(f", canary has {release['canary_weight']:.0%}\n{release.get('verdict')}: {release.get('reason')}")
        else:
            text.append(f"\n{release['history'][-1]['action']}: {release['history'][-1]['reason']}")
    return text


def _arms_table(arms: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("version", "arm", "share", "decisions", "per s", "errors", "p50 ms", "p99 ms", "episodes", "outcome"):
        table.add_column(title, justify="left" if title in ("version", "arm") else "right")
    for arm in arms:
        latency, outcome = arm.get("latency_ms") or {}, arm.get("outcome") or {}
        interval = ""
        if outcome.get("mean") is not None:
            interval = f"{outcome['mean']:.1f} [{_number(outcome['low'])}, {_number(outcome['high'])}]"
        table.add_row(
            f"v{arm['version']}",
            arm.get("arm") or "-",
            f"{arm.get('weight') or 0:.0%}",
            f"{arm['decisions']:,}",
            _number(arm.get("decisions_per_s")),
            str(arm["errors"]),
            _number(latency.get("p50"), 2),
            _number(latency.get("p99"), 2),
            str(outcome.get("episodes", "")),
            interval,
        )
    return table


def _line(status: dict[str, Any]) -> str:
    arms = [
        f"v{arm['version']} {arm['arm']} {arm['weight']:.0%}: {arm['decisions']} decisions, {_number(arm['decisions_per_s'])}/s"
        for arm in status.get("arms") or []
        if arm.get("arm")
    ]
    release = status.get("release")
    if release:
        arms.append(f"release {release['number']} {release['state']}, step {release['step'] + 1} of {len(release['weights'])}")
    arms += switch_lines(status)
    if status.get("training"):
        arms.append(training_line(status["training"]))
    return f"{time.strftime('%H:%M:%S')} {status['policy']} " + "; ".join(arms)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
