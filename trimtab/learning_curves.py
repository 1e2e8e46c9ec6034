"""Draw learning curves of runs: return against environment steps and against wall-clock time."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from policies.errors import NotFound, UsageError
from training.metrics import read_metrics
from training.runs import read_config

if TYPE_CHECKING:  # a second to import, and only this picture needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
XAxis = Literal["steps", "wall"]
LABELS: dict[XAxis, str] = {"steps": "environment steps", "wall": "time since the first step"}
# Okabe and Ito's colours, distinct to all kinds of eyes; without their yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":")  # once round the colours, the next runs are dashed
GREY = "#555555"
GREEDY = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white", "linestyle": (0, (1, 3)), "linewidth": 0.9}
TARGET = {"linewidth": 1, "linestyle": (0, (6, 3))}
MAX_POINTS = 1_000  # per curve: more than there are pixels
SMOOTH_SHARE = 20  # the smoothed curve is the mean of a twentieth of the run around each update
STYLE = {
    "font.size": 10,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, and the file is small
    "svg.hashsalt": "trimtab",  # the same runs give the same bytes
}


@dataclass(frozen=True)
class Curve:
    """What the metrics of one run say about its return. N updates, E evaluated updates."""

    run_id: str
    target_return: float | None
    env_steps_N: np.ndarray
    elapsed_s_N: np.ndarray
    returns_N: np.ndarray  # of the last training episodes; NaN before the first has ended
    low_N: np.ndarray
    high_N: np.ndarray
    greedy_N: np.ndarray  # NaN where the update was not evaluated

    def x(self, axis: XAxis, *, unit_s: float) -> np.ndarray:
        return self.env_steps_N if axis == "steps" else self.elapsed_s_N / unit_s


def read_curve(run_dir: Path) -> Curve:
    """Read a run's curve; raises `NotFound` when it has no updates yet."""
    rows = read_metrics(run_dir)
    if not rows:
        raise NotFound(f"run {run_dir.name!r} has made no updates yet: there is nothing to draw")

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=np.float64)  # None becomes NaN

    return Curve(
        run_id=run_dir.name,
        target_return=read_config(run_dir).training.target_return,
        env_steps_N=column("env_steps"),
        elapsed_s_N=column("elapsed_s"),
        returns_N=column("return_mean"),
        low_N=column("return_low"),
        high_N=column("return_high"),
        greedy_N=column("evaluation_return_mean"),
    )


def require_format(path: Path) -> str:
    """Return the format of a picture's file name; raises `UsageError` and lists those there are."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} cannot be drawn: the file name must end in {' or '.join(FORMATS)}")
    return path.suffix.lower().removeprefix(".")


def draw(curves: Sequence[Curve], axes: Sequence[XAxis], path: Path) -> None:
    """Write the picture; raises `UsageError` when the path has no format of ours or cannot be written."""
    picture = picture_of(curves, axes, require_format(path))
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; name another file with --out") from error


def picture_of(curves: Sequence[Curve], axes: Sequence[XAxis], file_format: str) -> bytes:
    """Return the picture as a file of this format holds it; the same curves give the same bytes of SVG."""
    import matplotlib

    picture = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = _figure(curves, axes)
        figure.savefig(picture, format=file_format, dpi=150, metadata={"Date": None} if file_format == "svg" else None)
    return picture.getvalue()


def smoothed(values_N: np.ndarray) -> np.ndarray:
    """Return the mean of the values around each one, the missing ones (NaN) left out; the window shrinks at both ends."""
    reach = len(values_N) // SMOOTH_SHARE // 2
    known_N = np.isfinite(values_N)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known_N, values_N, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known_N)])
    index_N = np.arange(len(values_N))
    reach_N = np.minimum(reach, np.minimum(index_N, index_N[::-1]))  # as far on one side as on the other: no shift in time
    first_N, end_N = index_N - reach_N, index_N + reach_N + 1
    with np.errstate(invalid="ignore"):
        return (sums[end_N] - sums[first_N]) / (counts[end_N] - counts[first_N])


def _figure(curves: Sequence[Curve], axes: Sequence[XAxis]) -> "Figure":
    from matplotlib.figure import Figure  # without pyplot: no windows, no state that is left behind

    figure = Figure(figsize=(4.8 * len(axes) + 0.4, 4.4), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes):
        _panel(panel, curves, axis)
    panels[0].set_ylabel("return per episode")
    columns = 2 * len(axes)
    figure.legend(handles=_runs(curves), loc="outside upper left", ncols=columns)
    figure.legend(handles=_marks(curves), loc="outside lower center", ncols=columns, fontsize=9, labelcolor=GREY)
    return figure


def _panel(panel: "Axes", curves: Sequence[Curve], axis: XAxis) -> None:
    unit_s, unit = _time_unit(max(curve.elapsed_s_N[-1] for curve in curves))
    for number, curve in enumerate(curves):
        _draw_curve(panel, curve, curve.x(axis, unit_s=unit_s), number, name=f"{axis}:{curve.run_id}")
    for target in sorted({curve.target_return for curve in curves if curve.target_return is not None}):
        panel.axhline(target, color=GREY, zorder=1, **TARGET)
    panel.set_xlabel(LABELS[axis] if axis == "steps" else f"{LABELS[axis]} ({unit})")
    panel.set_xlim(left=0)
    if axis == "steps":
        panel.xaxis.set_major_formatter(_steps)


def _draw_curve(panel: "Axes", curve: Curve, x_N: np.ndarray, number: int, *, name: str) -> None:
    style = _style(number)
    thin = slice(None, None, -(-len(x_N) // MAX_POINTS))
    panel.fill_between(x_N[thin], curve.low_N[thin], curve.high_N[thin], color=style["color"], alpha=0.12, linewidth=0)
    panel.plot(x_N[thin], curve.returns_N[thin], color=style["color"], linewidth=0.8, alpha=0.5, gid=f"{name}:return")
    panel.plot(x_N[thin], smoothed(curve.returns_N)[thin], linewidth=2, gid=f"{name}:smoothed", **style)
    evaluated_N = np.isfinite(curve.greedy_N)
    x_E, greedy_E = x_N[evaluated_N], curve.greedy_N[evaluated_N]
    thin = slice(None, None, max(1, -(-len(x_E) // MAX_POINTS)))
    panel.plot(x_E[thin], greedy_E[thin], color=style["color"], gid=f"{name}:greedy", zorder=3, **GREEDY)


def _style(number: int) -> dict[str, Any]:
    dashes = DASHES[number // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes, "solid_capstyle": "round"}


def _runs(curves: Sequence[Curve]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], linewidth=2, label=curve.run_id, **_style(number)) for number, curve in enumerate(curves)]


def _marks(curves: Sequence[Curve]) -> list[Any]:
    """Return what the kinds of marks mean, in grey: they are the same for all runs."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    marks = [
        Line2D([], [], color=GREY, linewidth=2, label="training return, smoothed"),
        Patch(color=GREY, alpha=0.2, linewidth=0, label="± 2 standard errors"),
        Line2D([], [], color=GREY, label="greedy evaluation", **GREEDY),
    ]
    if any(curve.target_return is not None for curve in curves):
        marks.append(Line2D([], [], color=GREY, label="target", **TARGET))
    return marks


def _time_unit(longest_s: float) -> tuple[float, str]:
    """Return the unit in which the time axis has two or three digits."""
    units = ((1.0, "s"), (60.0, "min"), (3600.0, "h"))
    return next((unit for unit in units if longest_s <= 200 * unit[0]), units[-1])


def _steps(value: float, position: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
