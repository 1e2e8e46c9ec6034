"""Draw a lineage: run → checkpoint → version → its releases, with its parents above, as boxes and arrows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from policies.errors import UsageError
from trimtab.learning_curves import require_format
from trimtab.lineage import NOT_RECORDED
from trimtab.registry_text import SHORT, moment

if TYPE_CHECKING:  # matplotlib takes half a second to import: only who draws pays for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

COLUMN, ROW = 3.2, 1.5  # inches between the middles of boxes
BOX_WIDTH = 28  # characters
COLOURS = {"plain": "#eeeeee", "run": "#dce9f7", "version": "#fff2cc", "promoted": "#d9ead3", "other": "#f4cccc"}


@dataclass(frozen=True)
class Box:
    """A box at a column and row of the picture; both may be halves."""

    column: float
    row: float
    lines: tuple[str, ...]
    colour: str


def boxes(found: dict[str, Any]) -> tuple[list[Box], list[tuple[int, int]]]:
    """Return the boxes of a lineage, and its arrows as pairs of indices of boxes."""
    steps = (found["checkpoint"] or {}).get("env_steps")
    chain = [
        Box(0, 0, ("run", found["run_id"] or NOT_RECORDED), "run"),
        Box(1, 0, ("checkpoint", NOT_RECORDED if steps is None else f"{steps:,} steps"), "run"),
        Box(2, 0, _version_lines(found), "version"),
    ]
    releases = [
        Box(3, row, (f"release {r['release']}, as {r['role']}", r["state"], moment(r["changed_at"])), _colour(r))
        for row, r in zip(_around(len(found["releases"])), found["releases"])
    ]
    placed = [*chain, *releases]
    arrows = [(0, 1), (1, 2), *((2, index) for index in range(len(chain), len(placed)))]
    above = max(box.row for box in placed) + 1
    for target, kind in ((0, "run"), (2, "incumbent")):  # a run goes on from a run; a version was judged against one
        parents = [parent for parent in found["parents"] or [] if parent.get("kind") == kind]
        for offset, parent in zip(_around(len(parents)), parents):
            arrows.append((len(placed), target))
            placed.append(Box(target - offset, above, _parent_lines(parent), "plain"))
    return placed, arrows


def draw_lineage(found: dict[str, Any]) -> Figure:
    """Return the picture of a lineage."""
    from matplotlib.figure import Figure

    placed, arrows = boxes(found)
    rows = [box.row for box in placed]
    columns = [box.column for box in placed]
    figure = Figure(figsize=(COLUMN * (max(columns) - min(columns) + 1), ROW * (max(rows) - min(rows) + 1)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(min(columns) - 0.5, max(columns) + 0.5), ylim=(min(rows) - 0.5, max(rows) + 0.5))
    axes.axis("off")
    drawn = [_draw_box(axes, box) for box in placed]
    for start, end in arrows:
        ends = {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        style = {"arrowstyle": "->", "color": "0.4", **ends}
        axes.annotate("", _middle(placed[end]), _middle(placed[start]), arrowprops=style, zorder=5)  # boxes are placed first
    return figure


def save_lineage(found: dict[str, Any], path: Path) -> None:
    """Write the picture; raises `UsageError` when the path has no format of ours or cannot be written."""
    from matplotlib import rc_context

    metadata = {"Date": None} if require_format(path) == "svg" else {"Software": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lineage"}):  # text that can be searched; the same bytes each time
        try:
            draw_lineage(found).savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _draw_box(axes: Axes, box: Box) -> Text:
    text = "\n".join(line for part in box.lines for line in wrap(part, BOX_WIDTH))
    style = {"boxstyle": "round,pad=0.5", "facecolor": COLOURS[box.colour], "edgecolor": "0.4"}
    return axes.text(box.column, box.row, text, ha="center", va="center", fontsize=9, bbox=style)


def _middle(box: Box) -> tuple[float, float]:
    return box.column, box.row


def _around(count: int) -> list[float]:
    """Return places 1 apart around 0, the largest first."""
    return [(count - 1) / 2 - index for index in range(count)]


def _version_lines(found: dict[str, Any]) -> tuple[str, ...]:
    names = ", ".join(found["aliases"])
    title = f"version {', '.join(map(str, found['versions']))}" if found["versions"] else "never registered"
    approvers = ", ".join(approval["approver"] for approval in found["approvals"])
    lines = (title, names, found["digest"][:SHORT], f"gates: {found['gates']['verdict']}", approvers and f"approved: {approvers}")
    return tuple(line for line in lines if line)


def _parent_lines(parent: dict[str, Any]) -> tuple[str, ...]:
    name = f"version {parent['version']}" if "version" in parent else str(parent.get("run_id", ""))
    lines = (f"parent: {parent.get('kind', '')}", name, str(parent.get("digest", ""))[:SHORT])
    return tuple(line for line in lines if line)


def _colour(release: dict[str, Any]) -> str:
    if release["role"] == "incumbent" or release["state"] in ("running", "paused"):
        return "plain"
    return "promoted" if release["state"] == "promoted" else "other"
