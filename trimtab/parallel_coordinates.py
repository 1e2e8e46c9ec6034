"""Draw a search: one axis per setting, one line per trial, coloured by the return it reached."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.search_space import Domain
from training.tuning import Trial, TrialStatus

if TYPE_CHECKING:  # matplotlib takes half a second to import: only who draws pays for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEM = "parallel-coordinates"
COLOURS = "viridis"  # grows in lightness as well: readable without colours, and for all kinds of colour vision
LINES = {TrialStatus.FINISHED: "-", TrialStatus.STOPPED: "--", TrialStatus.INTERRUPTED: "-.", TrialStatus.FAILED: ":"}
CHOICE_SPREAD = 0.5  # of a choice's share of its axis: lines of equal choices side by side, not on top of each other
FAILED_COLOUR = "0.6"
INCHES_PER_AXIS = 2.0


def draw_parallel_coordinates(trials: list[Trial], space: dict[str, Domain], best: Trial) -> Figure:
    """Return the picture; `best` is drawn on top. Trials without a return are grey and end before the last axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES_PER_AXIS * (len(space) + 1) + 1.5, 5.0), layout="constrained")
    axes = figure.subplots()
    low, high = _return_range(trials)
    _draw_axes(axes, space, low, high)
    for trial in sorted(trials, key=lambda trial: (trial == best, -math.inf if trial.best_return is None else trial.best_return)):
        _draw_trial(axes, trial, trials, space, low, high, is_best=trial == best)
    _draw_legend(figure, axes, trials, best, low, high)
    return figure


def save_figure(figure: Figure, directory: Path) -> list[Path]:
    """Write the picture as PNG and as SVG and return their paths."""
    from matplotlib import rc_context

    paths = [directory / f"{STEM}.png", directory / f"{STEM}.svg"]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": STEM}):  # text that can be searched; the same bytes each time
        figure.savefig(paths[0], dpi=150, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _return_range(trials: list[Trial]) -> tuple[float, float]:
    returns = [trial.best_return for trial in trials if trial.best_return is not None]
    low, high = min(returns), max(returns)
    return (low, high) if low < high else (low - 1, high + 1)


def _draw_axes(axes: Axes, space: dict[str, Domain], low: float, high: float) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, (setting, domain) in enumerate(space.items()):
        title = f"{setting} (log)" if domain.is_log else setting
        _draw_axis(axes, place, title, [(domain.position(value), _label(value)) for value in _ticks(domain)])
    values = [value for value in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= value <= high]
    ticks = [((value - low) / (high - low), _label(value)) for value in values]
    _draw_axis(axes, len(space), "best return", ticks, labels_right=True)  # no line goes on beyond the last axis
    axes.set(xlim=(-0.35, len(space) + 0.35), ylim=(-0.04, 1.04))
    axes.set_axis_off()


def _draw_axis(axes: Axes, place: int, title: str, ticks: list[tuple[float, str]], *, labels_right: bool = False) -> None:
    outwards, alignment = (1, "left") if labels_right else (-1, "right")
    axes.plot([place, place], [0, 1], color="0.2", linewidth=1, zorder=3)
    for height, label in ticks:
        axes.plot([place, place + 0.02 * outwards], [height, height], color="0.2", linewidth=1, zorder=3)
        background = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
        axes.text(place + 0.03 * outwards, height, label, ha=alignment, va="center", fontsize=9, zorder=4, bbox=background)
    axes.text(place, 1.05, title, ha="center", va="bottom", fontsize=10, fontweight="bold")


def _ticks(domain: Domain) -> list[Any]:
    """Return the values to write at an axis: all choices, powers of ten with 2 and 5 between, or round numbers."""
    from matplotlib.ticker import MaxNLocator

    if domain.choice is not None:
        return list(domain.choice)
    low, high = domain.ends
    if not domain.is_log:
        return [value for value in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= value <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 1e4 else (1,)
    return [value for decade in decades for factor in factors if low <= (value := float(f"{factor}e{decade}")) <= high]


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _draw_trial(
    axes: Axes, trial: Trial, trials: list[Trial], space: dict[str, Domain], low: float, high: float, *, is_best: bool
) -> None:
    from matplotlib import colormaps
    from matplotlib.patheffects import Normal, Stroke

    heights = [_height(domain, trial.parameters[setting], trial.number / len(trials)) for setting, domain in space.items()]
    colour = FAILED_COLOUR
    if trial.best_return is not None:
        share = (trial.best_return - low) / (high - low)
        heights.append(share)
        colour = colormaps[COLOURS](share)
    width = 3.0 if is_best else 1.5
    outline = [Stroke(linewidth=width + 2, foreground="black"), Normal()] if is_best else []
    style = {"color": colour, "linewidth": width, "alpha": 0.9, "path_effects": outline}
    axes.plot(range(len(heights)), heights, LINES[trial.status], zorder=2, **style)


def _height(domain: Domain, value: Any, share: float) -> float:
    if domain.choice is None:
        return domain.position(value)
    return domain.position(value) + CHOICE_SPREAD * (share - 0.5) / len(domain.choice)


def _draw_legend(figure: Figure, axes: Axes, trials: list[Trial], best: Trial, low: float, high: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    figure.colorbar(ScalarMappable(Normalize(low, high), COLOURS), ax=axes, label="best return", fraction=0.03, pad=0.01)
    found = {trial.status for trial in trials}
    styles = {status: style for status, style in LINES.items() if status in found}
    handles = [Line2D([], [], linestyle=style, color="0.3", label=str(status)) for status, style in styles.items()]
    handles.append(Line2D([], [], linewidth=4, color="black", label=f"best: {best.run_id}, return {best.best_return:.1f}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
