"""Show a person how a training run goes: a live panel on a terminal, lines in a log."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from training.config import TrainingConfig
from training.phases import PHASES, TimeShares, time_shares
from trimtab.command import escape

if TYPE_CHECKING:  # it imports Ray
    from actors.controller import Progress
    from training.learner_state import UpdateReport

REFRESHES_PER_S = 4  # a drawing takes 2 ms: less than a hundredth of a core, however many updates come in between
PLAIN_EVERY_S = 0.5
GREEDY_WINDOW = 5  # evaluations that the ETA looks back on, and updates where there are too few evaluations
TRAINING_WINDOW = 20
PANEL_WIDTH = 80
STEPS_WIDTH, SHARES_WIDTH = 28, 64
RLLIB_LOSSES = ("policy_loss", "value_loss", "qf_loss", "alpha_value", "entropy", "kl")  # as many as the panel has room for
COLOURS = {"collecting": "cyan", "learning": "green", "evaluating": "magenta", "saving": "yellow"}


class TrainingView(Protocol):
    """Hears of each update and of each message while it is entered.

        with training_view(console, training) as view:
            train(..., on_progress=view.show, on_message=view.say)

    Once it is left, also when training failed, everything it was told has been shown.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, progress: "Progress") -> None: ...

    def say(self, text: str) -> None: ...


def training_view(console: Console, training: TrainingConfig) -> TrainingView:
    """Return the view that suits where the console writes to."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console, training)
    return PlainView(console)


class PlainView:
    """A line twice a second at most, but always one for the first update, for the last, and for each evaluation."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._next_s = -float("inf")
        self._kept_back: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._print_kept_back()

    def show(self, progress: "Progress") -> None:
        self._kept_back = progress
        if progress.evaluation_return_mean is not None or self._clock() >= self._next_s:
            self._print_kept_back()
            self._next_s = self._clock() + PLAIN_EVERY_S

    def say(self, text: str) -> None:
        self._print_kept_back()  # what it speaks of comes before it
        _print(self._console, text)

    def _print_kept_back(self) -> None:
        if self._kept_back is not None:
            _print(self._console, str(self._kept_back))
            self._kept_back = None


class LiveView:
    """A panel that is drawn a few times a second, however fast the updates come; messages stand above it."""

    def __init__(self, console: Console, training: TrainingConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._history = History(training)
        self._lock = threading.Lock()  # the panel is drawn by a thread of rich's
        self._began_s = self._heard_s = clock()
        self._is_over = False
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=REFRESHES_PER_S)  # asks for a panel

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._live.stop()

    def show(self, progress: "Progress") -> None:
        with self._lock:
            self._history.add(progress)
            self._heard_s = self._clock()

    def say(self, text: str) -> None:
        _print(self._console, text)

    def _panel(self) -> RenderableType:
        with self._lock:
            if self._history.latest is None:
                return Text(
                    "" if self._is_over else f"starting rollout workers and learner … {self._clock() - self._began_s:.0f} s"
                )
            since_s = 0.0 if self._is_over else self._clock() - self._heard_s
            return training_panel(self._history, since_s=since_s)


class History:
    """What the panel shows of the updates so far."""

    def __init__(self, training: TrainingConfig) -> None:
        self.training = training
        self.latest: Progress | None = None
        self.last_greedy: float | None = None
        self._phases_s = dict.fromkeys(PHASES, 0.0)
        self._greedy: deque[tuple[float, float]] = deque(maxlen=GREEDY_WINDOW)
        self._returns: deque[tuple[float, float]] = deque(maxlen=TRAINING_WINDOW)

    def add(self, progress: "Progress") -> None:
        """Take in one update."""
        self.latest = progress
        for phase in PHASES:
            self._phases_s[phase] += getattr(progress, phase)
        if progress.return_mean is not None:
            self._returns.append((progress.elapsed_s, progress.return_mean))
        if progress.evaluation_return_mean is not None:
            self.last_greedy = progress.evaluation_return_mean
            self._greedy.append((progress.elapsed_s, self.last_greedy))

    def shares(self) -> TimeShares | None:
        return time_shares(self._phases_s, overlaps=self.training.max_staleness > 0)

    def eta_to_target_s(self) -> float | None:
        """Extrapolate the last greedy returns, or the training returns before there were three evaluations."""
        if self.training.target_return is None:
            return None
        points = self._greedy if len(self._greedy) >= 3 else self._returns
        return eta_s(points, self.training.target_return)

    def eta_to_end_s(self) -> float | None:
        """Return when `max_env_steps` is reached at the average speed of this session."""
        steps = self.training.max_env_steps - self.latest.env_steps
        return max(0.0, steps / self.latest.env_steps_per_s) if self.latest.env_steps_per_s > 0 else None


def eta_s(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the seconds from the last point (seconds, return) until the straight line through the points is at the target.

    The line is the one of least squares. None when it does not rise, or when there are fewer than two points.
    """
    if len(points) < 2:
        return None
    times_N, returns_N = np.array(points, dtype=np.float64).T
    centred_N = times_N - times_N.mean()
    spread = centred_N @ centred_N
    if spread == 0:
        return None
    slope = centred_N @ returns_N / spread
    if slope <= 0:
        return None
    reached_s = times_N.mean() + (target - returns_N.mean()) / slope
    return max(0.0, float(reached_s - times_N[-1]))


def training_panel(history: History, *, since_s: float) -> RenderableType:
    """Return the panel; `since_s` is the time since the newest update was heard of. There must be one.

    One text, laid out by hand: rich's tables would take three times as long, at each refresh.
    """
    progress = history.latest
    lines: list[tuple[str, str | Text]] = [
        ("steps", _steps(history)),
        ("time", _time(history, since_s)),
        ("return", _return(history)),
        *_losses(progress.losses),
    ]
    shares = history.shares()
    if shares is not None:
        lines += [("shares", _bar(shares)), ("", _legend(shares)), ("", _machinery(shares))]
    troubles = progress.troubles()
    if troubles:
        lines.append(("mended", Text(" · ".join(f"{count} {what}" for count, what in troubles), style="yellow")))
    text = Text("\n").join(Text.assemble((f"{label:<8}", "dim"), content) for label, content in lines)
    text.no_wrap, text.overflow = True, "ellipsis"  # a narrow terminal cuts lines off, it does not tear them apart
    return Panel(text, title=f"run {progress.run_id}", title_align="left", width=PANEL_WIDTH, border_style="dim")


def _losses(losses: "UpdateReport | dict[str, float]") -> list[tuple[str, str | Text]]:
    if isinstance(losses, dict):  # RLlib's: which there are depends on the algorithm
        shown = [f"{name} {losses[name]:.3g}" for name in RLLIB_LOSSES if name in losses]
        return [("losses", " · ".join(shown))] if shown else []
    clipped, explained = f"clipped {losses.clip_fraction:.1%}", f"explained variance {losses.explained_variance:.2f}"
    return [
        ("losses", f"policy {losses.policy_loss:.3g} · value {losses.value_loss:.3g} · entropy {losses.entropy:.3g}"),
        ("update", f"KL {losses.kl:.3g} · {clipped} · {explained} · lr {losses.lr:.3g}"),
        ("lag", f"mean {losses.lag_mean:.1f}, max {losses.lag_max} versions"),
    ]


def _steps(history: History) -> Text:
    progress, maximum = history.latest, history.training.max_env_steps
    done = round(min(1.0, progress.env_steps / maximum) * STEPS_WIDTH)
    steps = f"{progress.env_steps:,} of {maximum:,}  "
    bar = ("━" * done, "green"), ("─" * (STEPS_WIDTH - done), "dim")
    return Text.assemble(steps, *bar, f"  {progress.env_steps_per_s:,.0f} steps/s")


def _time(history: History, since_s: float) -> Text:
    progress = history.latest
    so_far = f"{_duration(progress.elapsed_s + since_s)} · update {progress.update:,}"
    text = Text(f"{so_far} · {_duration(history.eta_to_end_s())} to the last step")
    if history.training.target_return is not None:
        text.append(" · ").append(_eta_to_target(history), style="bold")
    return text


def _eta_to_target(history: History) -> str:
    if history.last_greedy is not None and history.last_greedy >= history.training.target_return:
        return "target reached"
    eta, end = history.eta_to_target_s(), history.eta_to_end_s()
    if eta is not None and end is not None and eta > end:
        return "target after that"
    return f"{_duration(eta)} to the target"


def _return(history: History) -> Text:
    progress, target = history.latest, history.training.target_return
    text = Text.assemble("training ", (_number(progress.return_mean), "bold"))
    if progress.return_low is not None:
        text.append(f" [{progress.return_low:,.1f}, {progress.return_high:,.1f}]")
    text.append(" · greedy ").append(_number(history.last_greedy), style="bold")
    text.append(f", best {_number(progress.best_return_mean)}")
    if target is not None:
        text.append(f", target {target:,g}")
    return text


def _bar(shares: TimeShares) -> Text:
    """Return one bar whose parts end where the sums of the shares do, so that its length does not depend on rounding."""
    bar, end = Text(), 0.0
    for name, share in shares.parts().items():
        begin, end = end, end + share
        bar.append("█" * (round(end * SHARES_WIDTH) - round(begin * SHARES_WIDTH)), style=COLOURS[name])
    return bar


def _legend(shares: TimeShares) -> Text:
    text = Text()
    for name, share in shares.parts().items():
        text.append("■ ", style=COLOURS[name]).append(f"{name} {share:.0%}  ")
    return text


def _machinery(shares: TimeShares) -> Text:
    return Text(f"machinery {shares.machinery:.0%}: Ray, copying, waiting for each other", style="dim")


def _print(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True, highlight=False)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
