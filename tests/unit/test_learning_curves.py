"""Does `trimtab plot` draw the curves that the metrics hold, and say what it cannot draw?"""

import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from policies.errors import NotFound, UsageError
from policies.storage import Storage, open_storage
from tests.command_line import run_trimtab, trimtab_json
from tests.progress import row
from training.config import EnvironmentConfig, TrainingConfig
from training.metrics import MetricsLog
from training.runs import RunConfig, create_run
from trimtab.commands.curves import plot
from trimtab.learning_curves import MAX_POINTS, Curve, draw, read_curve, smoothed
from trimtab.live import status_view

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "data")


def _run(storage: Storage, run_id: str, num_updates: int, *, target: float | None = 100.0) -> Path:
    """Make a run whose training return rises by one per update and whose every fifth update is evaluated at twice that."""
    run_dir = create_run(storage, run_id, RunConfig(EnvironmentConfig(id="CartPole-v1"), TrainingConfig(target_return=target)))
    log = MetricsLog(run_dir, after_update=0)
    for update in range(1, num_updates + 1):
        greedy = 2.0 * update if update % 5 == 0 else None
        log.append(row(update, run_id=run_id, evaluation_return_mean=greedy))
    log.close()
    return run_dir


def _svg(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_bytes())


def _texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()).strip() for element in svg.iter(f"{SVG}text")]


def _points(svg: ElementTree.Element, name: str) -> np.ndarray:
    """Return the corners of a drawn line in the picture's coordinates, whose y axis points down."""
    (group,) = [element for element in svg.iter(f"{SVG}g") if element.get("id") == name]
    line = next(group.iter(f"{SVG}path")).get("d")
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", line)])


def test_the_picture_holds_every_update_of_every_run_against_both_axes(storage: Storage, tmp_path: Path):
    curves = [read_curve(_run(storage, "a", 40)), read_curve(_run(storage, "b", 20))]
    draw(curves, ("steps", "wall"), tmp_path / "curves.svg")
    svg = _svg(tmp_path / "curves.svg")
    for axis in ("steps", "wall"):
        assert len(_points(svg, f"{axis}:a:return")) == len(_points(svg, f"{axis}:a:smoothed")) == 40
        assert len(_points(svg, f"{axis}:b:return")) == 20
        assert len(_points(svg, f"{axis}:a:greedy")) == 8 and len(_points(svg, f"{axis}:b:greedy")) == 4


def test_a_drawn_curve_is_where_its_numbers_are(storage: Storage, tmp_path: Path):
    """All marks of a panel share one scale: the y of the picture is one straight line over the returns."""
    curve = read_curve(_run(storage, "a", 40))
    draw([curve], ("steps",), tmp_path / "curves.svg")
    svg = _svg(tmp_path / "curves.svg")
    training_N2, greedy_E2 = _points(svg, "steps:a:return"), _points(svg, "steps:a:greedy")
    y = np.concatenate([training_N2[:, 1], greedy_E2[:, 1]])
    values = np.concatenate([curve.returns_N, curve.greedy_N[np.isfinite(curve.greedy_N)]])
    slope, offset = np.polyfit(values, y, 1)
    assert slope < 0 and np.allclose(slope * values + offset, y, atol=1e-3)
    assert np.allclose(np.diff(training_N2[:, 0]), np.diff(training_N2[:, 0])[0], atol=1e-3)  # 1,000 steps per update


def test_the_picture_names_runs_axes_and_marks(storage: Storage, tmp_path: Path):
    draw([read_curve(_run(storage, "a", 40)), read_curve(_run(storage, "b", 20))], ("steps", "wall"), tmp_path / "curves.svg")
    texts = _texts(_svg(tmp_path / "curves.svg"))
    for label in ("a", "b", "environment steps", "time since the first step (s)", "return per episode", "target"):
        assert label in texts, label
    assert {"training return, smoothed", "greedy evaluation", "± 2 standard errors"} <= set(texts)


def test_without_a_target_there_is_no_target_in_the_legend(storage: Storage, tmp_path: Path):
    draw([read_curve(_run(storage, "a", 40, target=None))], ("steps",), tmp_path / "curves.svg")
    assert "target" not in _texts(_svg(tmp_path / "curves.svg"))


def test_the_same_run_gives_the_same_bytes(storage: Storage, tmp_path: Path):
    curve = read_curve(_run(storage, "a", 10))
    for name in ("first.svg", "second.svg"):
        draw([curve], ("steps",), tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_a_png_shows_the_colours_of_its_runs(storage: Storage, tmp_path: Path):
    from matplotlib.image import imread

    draw([read_curve(_run(storage, "a", 40)), read_curve(_run(storage, "b", 20))], ("steps", "wall"), tmp_path / "curves.png")
    pixels = (imread(tmp_path / "curves.png")[..., :3] * 255).round().astype(int)
    assert pixels.shape[0] >= 600 and pixels.shape[1] >= 1_400
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert (pixels == colour).all(axis=-1).sum() > 500, colour
    assert ((pixels == (0x00, 0x9E, 0x73)).all(axis=-1)).sum() == 0  # there is no third run


def test_a_long_run_makes_a_small_picture(tmp_path: Path):
    steps_N = np.arange(1.0, 100_001)
    returns_N = np.random.default_rng(0).normal(0, 10, len(steps_N))
    draw(
        [Curve("long", None, steps_N, steps_N, returns_N, returns_N - 1, returns_N + 1, returns_N)],
        ("steps",),
        tmp_path / "c.svg",
    )
    # three lines, a band and a marker of at most MAX_POINTS, about 25 bytes a corner; all points would be 10 MB
    assert (tmp_path / "c.svg").stat().st_size < 400 * MAX_POINTS


def test_ten_runs_differ_in_colour_or_dash(storage: Storage, tmp_path: Path):
    curves = [read_curve(_run(storage, f"run-{number}", 30)) for number in range(10)]
    draw(curves, ("steps",), tmp_path / "curves.svg")
    svg = _svg(tmp_path / "curves.svg")
    styles = set()
    for curve in curves:
        (group,) = [element for element in svg.iter(f"{SVG}g") if element.get("id") == f"steps:{curve.run_id}:smoothed"]
        style = next(group.iter(f"{SVG}path")).get("style")
        styles.add((re.search(r"stroke: (#\w+)", style).group(1), "stroke-dasharray" in style))
    assert len(styles) == 10


def test_smoothing_is_the_mean_around_each_update_and_keeps_straight_lines():
    line_N = np.arange(100.0)
    assert np.allclose(smoothed(line_N), line_N)  # no shift in time: a mean of the past only would lie below
    noisy_N = line_N + np.where(np.arange(100) % 2, 5.0, -5.0)
    assert np.abs(smoothed(noisy_N) - line_N)[5:-5].max() < 1.1  # 5 of 5 values: one more of one sign
    assert smoothed(np.array([3.0])).tolist() == [3.0]


def test_smoothing_leaves_missing_values_out():
    values_N = np.full(100, np.nan)
    values_N[50:] = 7.0
    result_N = smoothed(values_N)
    assert np.isnan(result_N[:48]).all() and np.allclose(result_N[50:], 7.0)


def test_a_run_without_updates_and_a_wrong_ending_are_refused(storage: Storage, tmp_path: Path):
    run_dir = create_run(storage, "new", RunConfig(EnvironmentConfig(id="CartPole-v1"), TrainingConfig()))
    with pytest.raises(NotFound, match="'new' has made no updates yet"):
        read_curve(run_dir)
    curve = read_curve(_run(storage, "a", 5))
    with pytest.raises(UsageError, match=r"curves\.gif cannot be drawn: the file name must end in \.png or \.svg"):
        draw([curve], ("steps",), tmp_path / "curves.gif")
    with pytest.raises(UsageError, match=r"nowhere/curves\.png cannot be written: No such file or directory"):
        draw([curve], ("steps",), tmp_path / "nowhere" / "curves.png")


def test_plot_draws_the_newest_run_or_those_it_is_told(storage: Storage, tmp_path: Path):
    _run(storage, "a", 10)
    _run(storage, "b", 10)
    out = tmp_path / "curves.svg"
    assert trimtab_json("plot", "--out", str(out), storage=storage.root)["runs"] == ["b"]
    assert "environment steps" in _texts(_svg(out)) and "time since the first step (s)" in _texts(_svg(out))
    document = trimtab_json("plot", "b", "a", "b", "--x", "wall", "--out", str(out), storage=storage.root)
    assert document == {"out": str(out), "runs": ["b", "a"], "x": "wall"}
    assert "environment steps" not in _texts(_svg(out))


@pytest.mark.parametrize(
    ("runs", "out", "message"),
    [
        (["nope"], "curves.svg", r"run 'nope' is not in .*; newest runs: a"),
        (["a"], "curves.jpeg", r"curves\.jpeg cannot be drawn: the file name must end in \.png or \.svg"),
        (["a"], "/nowhere/curves.png", r"/nowhere/curves\.png cannot be written: No such file"),
    ],
)
def test_plot_says_what_is_wrong(storage: Storage, runs: list[str], out: str, message: str):
    _run(storage, "a", 2)
    with pytest.raises(UsageError, match=message):
        plot(runs, out=Path(out), storage=str(storage.root))


def test_plot_without_any_run_says_how_to_start_one(storage: Storage):
    result = run_trimtab("plot", storage=storage.root)
    assert result.returncode == 2 and "start one with `trimtab train`" in result.stderr and "Traceback" not in result.stderr


def test_status_tells_how_the_newest_run_stands_when_nothing_is_served(storage: Storage):
    _run(storage, "a", 3)
    status = trimtab_json("status", storage=storage.root)
    assert (status["policy"], status["champion"], status["monitor"]) == ("cartpole", None, None)
    assert (status["training"]["run_id"], status["training"]["state"], status["training"]["env_steps"]) == (
        "a",
        "interrupted",
        3_000,
    )
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(status_view(status))
    text = console.export_text()
    assert "training run a interrupted" in text and "nothing is serving" in text
