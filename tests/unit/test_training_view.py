"""Does a person see how training goes, on a terminal and in a log, and when it may be done?"""

import io
import math

import pytest
from rich.console import Console, RenderableType

from tests.progress import progress
from training.config import TrainingConfig
from trimtab.training_view import History, LiveView, PlainView, eta_s, training_panel, training_view

TRAINING = TrainingConfig(target_return=100.0, max_env_steps=50_000)


def _history(*updates, training: TrainingConfig = TRAINING) -> History:
    history = History(training)
    for update in updates:
        history.add(update)
    return history


def _drawn(history: History, *, width: int = 80) -> str:
    return _text(training_panel(history, since_s=0.0), width=width)


def _text(renderable: RenderableType, *, width: int = 80) -> str:
    console = Console(record=True, force_terminal=True, width=width, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


class Clock:
    """Stands still until it is told to move."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


# eta


def test_eta_is_where_the_line_through_the_points_meets_the_target():
    assert eta_s([(0.0, 10.0), (10.0, 30.0)], target=70.0) == pytest.approx(20.0)  # 2 per second, 40 to go
    # Least squares through 0, 3, 3, 6 at 0..3 s: slope (−1.5·0 −0.5·3 +0.5·3 +1.5·6) / 5 = 1.8 around (1.5, 3)
    assert eta_s([(0.0, 0.0), (1.0, 3.0), (2.0, 3.0), (3.0, 6.0)], target=12.0) == pytest.approx((12 - 3) / 1.8 + 1.5 - 3)


def test_eta_of_negative_returns_is_as_good():
    assert eta_s([(0.0, -500.0), (10.0, -400.0)], target=-100.0) == pytest.approx(30.0)


def test_eta_is_zero_once_the_line_is_above_the_target():
    assert eta_s([(0.0, 10.0), (10.0, 30.0)], target=20.0) == 0.0


@pytest.mark.parametrize(
    "points", [[], [(0.0, 5.0)], [(0.0, 5.0), (0.0, 9.0)], [(0.0, 5.0), (9.0, 5.0)], [(0.0, 5.0), (9.0, 4.0)]]
)
def test_there_is_no_eta_where_nothing_rises(points: list[tuple[float, float]]):
    assert eta_s(points, target=100.0) is None


def test_eta_does_not_suffer_from_a_clock_that_has_run_for_days():
    late = [(1e6 + second, 10.0 + 2 * second) for second in range(5)]
    assert eta_s(late, target=28.0) == pytest.approx(5.0, abs=1e-3)


def test_eta_looks_at_evaluations_once_there_are_three_and_at_training_before():
    # Training returns rise by 1 per second from 21: 79 more from update 1, so from update 2 on 78 s are left.
    assert _history(progress(1), progress(2)).eta_to_target_s() == pytest.approx(78.0)
    evaluated = [progress(update, evaluation_return_mean=30.0 + 10 * update) for update in (1, 2, 3)]
    assert _history(*evaluated).eta_to_target_s() == pytest.approx(4.0)  # 60 after 3 s, 10 per second
    assert _history(*evaluated[:2]).eta_to_target_s() == pytest.approx(78.0)


def test_eta_follows_what_happened_last():
    rising = [progress(update, return_mean=float(update)) for update in range(1, 41)]
    flat = [progress(update, return_mean=40.0) for update in range(41, 81)]
    assert _history(*rising).eta_to_target_s() == pytest.approx(60.0)
    assert _history(*rising, *flat).eta_to_target_s() is None


def test_without_a_target_there_is_no_eta_and_no_word_of_it():
    history = _history(progress(1), progress(2), training=TrainingConfig(max_env_steps=50_000))
    assert history.eta_to_target_s() is None and "target" not in _drawn(history)


# the panel


def test_the_panel_shows_what_a_person_asks():
    update = progress(3, evaluation_return_mean=60.0, best_return_mean=70.0)
    text = _drawn(_history(progress(1), progress(2), update))
    for part in (
        "run run-1",
        "3,000 of 50,000",
        "1,000 steps/s",
        "3 s · update 3",
        "47 s to the last step",  # 47,000 steps at 1,000 per second
        "training 23.0 [19.5, 22.5] · greedy 60.0, best 70.0, target 100",
        "policy -0.0123 · value 4.56 · entropy 0.67",
        "KL 0.0089 · clipped 10.1% · explained variance 0.34 · lr 0.003",
        "mean 0.5, max 2 versions",
        "collecting 30%",
        "learning 50%",
        "evaluating 15%",
        "saving 5%",
        "machinery 10%",
    ):
        assert part in text, part
    assert "restarts" not in text


def test_the_panel_shows_what_was_mended():
    text = _drawn(_history(progress(1, worker_restarts=2, environment_failures=3, learner_restarts=1)))
    assert "2 worker restarts · 3 environment failures · 1 learner restarts" in text


def test_the_panel_says_when_the_target_is_reached_and_when_it_is_too_far():
    assert "target reached" in _drawn(_history(progress(1, evaluation_return_mean=100.0)))
    # 78 s to the target, but the run ends after 8,000 more steps
    short = TrainingConfig(target_return=100.0, max_env_steps=10_000)
    assert "8 s to the last step · target after that" in _drawn(_history(progress(1), progress(2), training=short))
    assert "· - to the target" in _drawn(_history(progress(1)))


def test_the_panel_of_a_run_without_a_finished_episode_has_no_return():
    text = _drawn(_history(progress(1, return_mean=None, return_low=None, return_high=None)))
    assert "training - · greedy -, best -, target 100" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_panel_keeps_its_lines_at_any_width(width: int):
    lines = _drawn(_history(progress(10_000, env_steps=10**9, env_steps_per_s=1e7)), width=width).splitlines()
    assert len(lines) == len(_drawn(_history(progress(1)), width=80).splitlines())
    assert max(map(len, lines)) <= min(width, 80)


def test_the_bar_of_shares_is_as_long_as_its_frame_whatever_the_rounding():
    for third in (1 / 3, 0.249, 0.0):
        history = _history(progress(1, collect_s=third, learn_s=0.5, evaluate_s=third / 2, checkpoint_s=0.01))
        assert _drawn(history).count("█") == 64


# a terminal


def test_a_terminal_gets_the_live_panel_and_anything_else_lines():
    assert isinstance(training_view(Console(force_terminal=True, file=io.StringIO()), TRAINING), LiveView)
    assert isinstance(training_view(Console(file=io.StringIO()), TRAINING), PlainView)
    dumb = Console(force_terminal=True, file=io.StringIO(), _environ={"TERM": "dumb"})
    assert isinstance(training_view(dumb, TRAINING), PlainView)  # it cannot move its cursor


def _live(console: Console) -> LiveView:
    return LiveView(console, TRAINING, clock=Clock())


def test_the_live_view_ends_with_the_last_update_and_messages_stand_above_it():
    console = Console(record=True, force_terminal=True, width=80, file=io.StringIO())
    with _live(console) as view:
        view.show(progress(1))
        view.say("the learner died [again]; going on from gen-000000")
        view.show(progress(2))
    text = console.export_text()
    assert text.index("the learner died [again]") < text.rindex("2 s · update 2")
    assert "\x1b[?25h" in console.file.getvalue()  # the cursor is back


def test_the_live_view_gives_the_cursor_back_when_training_fails():
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    with pytest.raises(KeyboardInterrupt), _live(console) as view:
        view.show(progress(1))
        raise KeyboardInterrupt
    assert console.file.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_updates_do_not_draw_the_clock_does():
    """Thousands of updates a second must not cost thousands of drawings."""
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    with _live(console) as view:
        for update in range(1, 3_001):
            view.show(progress(update))
    assert console.file.getvalue().count("run run-1") < 300


def test_time_goes_on_between_updates_and_stops_at_the_end():
    clock = Clock()
    view = LiveView(Console(force_terminal=True, width=80, file=io.StringIO()), TRAINING, clock=clock)
    with view:
        view.show(progress(1))
        clock.now_s += 30.0
        assert "time    31 s · update 1" in _text(view._panel())
    assert "time    1 s · update 1" in _text(view._panel())


def test_before_the_first_update_the_live_view_says_what_it_waits_for_and_takes_that_away():
    console = Console(force_terminal=True, width=80, file=io.StringIO())
    with LiveView(console, TRAINING, clock=Clock()) as view:
        assert "starting rollout workers and learner" in _text(view._panel())
    assert _text(view._panel()).strip() == ""  # a run that had ended already


# lines


def _lines(view_at, updates) -> list[str]:
    """Show (seconds, update) pairs to a plain view and return its lines."""
    clock = Clock()
    console = Console(file=io.StringIO(), width=200)
    with PlainView(console, clock=clock) as view:
        for now_s, update in updates:
            clock.now_s = now_s
            view_at(view, update)
    return console.file.getvalue().splitlines()


def test_lines_are_the_first_the_last_every_evaluation_and_else_one_each_half_second():
    updates = [(update / 10, progress(update)) for update in range(1, 20)]
    updates[7] = (0.8, progress(8, evaluation_return_mean=55.0))
    lines = _lines(lambda view, update: view.show(update), updates)
    # 1 at 0.1 s; 6 half a second later; 8 is an evaluation; 13 half a second after that, 18 likewise; 19 is the last
    assert [int(line.split()[1]) for line in lines] == [1, 6, 8, 13, 18, 19]
    assert lines[2] == "update 8 · 8,000 steps · 1,000 steps/s · return 28.0 · greedy return 55.0"


def test_no_line_comes_twice():
    assert len(_lines(lambda view, update: view.show(update), [(0.0, progress(1))])) == 1


def test_a_message_comes_after_the_updates_before_it():
    def show_or_say(view: PlainView, what) -> None:
        view.say(what) if isinstance(what, str) else view.show(what)

    lines = _lines(show_or_say, [(0.0, progress(1)), (0.1, progress(2)), (0.2, "checkpoint [3] is damaged"), (0.3, progress(2))])
    assert [line.split(" · ")[0] for line in lines] == ["update 1", "update 2", "checkpoint [3] is damaged", "update 2"]


def test_an_interrupted_run_shows_its_last_update():
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt), PlainView(console, clock=Clock()) as view:
        view.show(progress(1))
        view.show(progress(2))
        raise KeyboardInterrupt
    assert console.file.getvalue().splitlines()[-1].startswith("update 2")


def test_a_run_that_has_ended_already_has_no_lines():
    assert _lines(lambda view, update: None, []) == []


def test_speed_zero_has_no_end_in_sight():
    assert _history(progress(1, env_steps_per_s=0.0)).eta_to_end_s() is None
    assert math.isclose(_history(progress(1)).eta_to_end_s(), 49.0)
