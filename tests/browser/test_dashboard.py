"""Does a person who opens the dashboard see what the status says, also when the key is wrong or the connection is lost?

`assert_dashboard_shows` works against any deployment; the simulator below lets these tests move a release at will.
"""

import base64
import copy
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM.exists() and CHROMEDRIVER.exists()), reason="no Chromium here: apt-get install -y chromium chromium-driver"
)
pytestmark = [pytest.mark.browser, needs_chromium]

# No sandbox: CI runs as root in a container. The rest keeps the browser from calling home during a test.
CHROMIUM_ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
STATIC = Path(__file__).parents[2] / "serve_app" / "static"
CONTENT_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
KEY = "simulated-key-0123456789"
WAIT_S = 15.0  # a poll takes 1 s; the rest is for a machine shared with other tests
NOW_S = time.time()


# --- what the lead can use against a real deployment ---


def assert_dashboard_shows(driver: Any, url: str, key: str, status: dict[str, Any]) -> None:
    """Open the dashboard of `url` with `key` and assert that it shows what `status` says.

    Only facts that stay the same from one second to the next are compared, so `status` may come from a deployment under load.
    """
    enter_key(driver, url, key)
    wait_for(lambda: text(driver, "#policy") == status["policy"], lambda: f"policy {text(driver, '#policy')!r}")
    assert f"v{status['champion']}" in text(driver, "#summary")
    for arm in status["arms"]:
        row = row_of(driver, "#arms", arm["version"])
        assert arm["arm"] is None or arm["arm"] in row, row
        assert arm["weight"] is None or percent(arm["weight"]) in row, row
        if arm["outcome"]["mean"] is not None:
            wait_for(lambda version=arm["version"]: f"v{version}" in text(driver, "#outcome"), lambda: text(driver, "#outcome"))
    for version in status["versions"]:
        assert version["gate_verdict"] in row_of(driver, "#versions", version["version"])
    assert len(driver.find_elements("css selector", "#replicas tbody tr")) == len(status["replicas"])
    release = status["release"]
    if release is not None and release["state"] in ("running", "paused"):
        shown = text(driver, "#release")
        assert f"v{release['candidate']}" in shown and percent(release["canary_weight"]) in shown
        assert f"step {release['step'] + 1} of {len(release['weights'])}" in shown
    for closed in status["releases"]:
        assert f"Release {closed['number']}: v{closed['candidate']}" in text(driver, "#history")


def enter_key(driver: Any, url: str, key: str) -> None:
    """Open the page as a new tab would and type the key into the form."""
    driver.get(f"{url}/dashboard")
    driver.execute_script("sessionStorage.clear()")
    driver.refresh()
    field = driver.find_element("id", "key-input")
    wait_for(field.is_displayed, lambda: "the key form is not shown")
    field.send_keys(key)
    driver.find_element("css selector", "#key-form button").click()


def text(driver: Any, selector: str) -> str:
    """Return what a person reads there."""
    return driver.execute_script("return document.querySelector(arguments[0]).innerText", selector)


def row_of(driver: Any, table: str, version: int) -> str:
    rows = driver.execute_script(f"return [...document.querySelectorAll('{table} tbody tr')].map((row) => row.innerText)")
    matching = [row for row in rows if f"v{version}" in row.split()]
    assert len(matching) == 1, f"version {version} in {rows}"
    return matching[0]


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def wait_for(condition: Callable[[], Any], describe: Callable[[], str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not seen within {WAIT_S:.0f} s; instead: {describe()}")
        time.sleep(0.1)


def console_problems(driver: Any) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def scrolls_sideways(driver: Any) -> bool:
    return driver.execute_script("return document.documentElement.scrollWidth > document.documentElement.clientWidth")


def set_page_width(driver: Any, width: int, height: int = 1000) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


# --- a deployment that only has a status ---


def simulated_status(stage: str, polls: int) -> dict[str, Any]:
    """Return the status of a deployment at one stage of a release: `idle`, `canary_5`, `canary_25` or `rolled_back`."""
    history = [
        {"time_s": NOW_S - 120, "action": "start", "step": 0, "reason": "release of version 2 asked for"},
        {"time_s": NOW_S - 60, "action": "advance", "step": 1, "reason": "reward not worse: 12.5 above the floor"},
        {"time_s": NOW_S - 5, "action": "rollback", "step": 1, "reason": "reward of the canary is lower by at least 81.3"},
    ]
    step = 0 if stage == "canary_5" else 1
    weights = [0.05, 0.25, 1.0]
    release = {
        "number": 2,
        "candidate": 2,
        "incumbent": 1,
        "state": "rolled_back" if stage == "rolled_back" else "running",
        "step": step,
        "weights": weights,
        "canary_weight": 0.0 if stage == "rolled_back" else weights[step],
        "override_gates": "game day: does it roll back?",
        "started_at": NOW_S - 120,
        "verdict": "inconclusive",
        "reason": "211 of 400 episodes of the canary seen",
        "evidence": {
            "candidate": simulated_evidence(211, 402.7, 361.2, 444.2),
            "incumbent": simulated_evidence(4010, 484.1, 479.5, 488.7),
        },
        "history": history[: {"canary_5": 1, "canary_25": 2}.get(stage, 3)],
    }
    first = {key: value for key, value in release.items() if key not in ("evidence", "verdict", "reason")}
    first |= {"number": 1, "state": "aborted", "override_gates": None, "started_at": NOW_S - 90_000, "step": 0}
    first["history"] = [
        {"time_s": NOW_S - 90_000, "action": "start", "step": 0, "reason": "first try"},
        {"time_s": NOW_S - 89_000, "action": "abort", "step": 0, "reason": "asked for by hand"},
    ]
    in_release = stage.startswith("canary")
    canary_weight = weights[step] if in_release else 0.0
    arms = [
        simulated_arm(1, "champion", 1 - canary_weight, (484.1, 479.5, 488.7, 4010), polls),
        simulated_arm(2, "canary" if in_release else None, canary_weight, (402.7, 361.2, 444.2, 211), polls),
    ]
    plan_arms = [{"name": arm["arm"], "version": arm["version"], "weight": arm["weight"]} for arm in arms if arm["arm"]]
    return {
        "policy": "cartpole",
        "time_s": NOW_S + polls,
        "champion": 1,
        "plan": {"number": 7, "release": 2 if in_release else 0, "arms": plan_arms},
        "release": release if in_release else None,
        "releases": [first, release] if stage == "rolled_back" else [first],
        "versions": [
            simulated_version(1, "pass", None, NOW_S - 99_000),
            simulated_version(2, "fail", "game day: does it roll back?", NOW_S - 300),
        ],
        "arms": arms,
        "series": simulated_series(polls),
        "feedback": {"joined": 90_121 + polls, "duplicate": 3, "unknown": 1, "late": 0, "waiting": 41},
        "replicas": [simulated_replica("cartpole#k3x9", 7, polls), simulated_replica("cartpole#p81z", 6, polls)],
        "responses": {"200": 100_000 + polls, "401": 1, "422": 4},
        "monitor": {
            "started_at": NOW_S - 4000,
            "rebuilt_decisions": 12_345,
            "refresh_age_s": 0.7,
            "integrity_errors": [],
            "counts": {"abandoned": 12, "clipped": 0},
        },
    }


def simulated_evidence(episodes: int, mean: float, low: float, high: float) -> dict[str, Any]:
    outcome = {"episodes": episodes, "outcome_mean": mean, "outcome_low": low, "outcome_high": high}
    return {"decisions": 200 * episodes, "errors": 0, **outcome, "error_low": 0.0, "error_high": 3 / episodes}


def simulated_version(version: int, gate_verdict: str, override_gates: str | None, registered_at: float) -> dict[str, Any]:
    return {
        "version": version,
        "digest": hashlib.sha256(bytes([version])).hexdigest(),
        "policy_sha256": hashlib.sha256(bytes([version, version])).hexdigest(),
        "gate_verdict": gate_verdict,
        "override_gates": override_gates,
        "registered_at": registered_at,
    }


def simulated_replica(name: str, plan: int, polls: int) -> dict[str, Any]:
    return {
        "replica": name,
        "plan": plan,
        "versions": [1, 2],
        "age_s": 0.4,
        "responses": {"200": 50_000 + polls, "422": 2},
        "queue_depth": 0,
        "load_failures": {},
    }


def simulated_arm(
    version: int, name: str | None, weight: float, outcome: tuple[float, float, float, int], polls: int
) -> dict[str, Any]:
    mean, low, high, episodes = outcome
    decisions = 1000 * episodes // 5 + 40 * polls
    return {
        "version": version,
        "arm": name,
        "weight": weight,
        "decisions": decisions,
        "errors": 0 if version == 1 else 3,
        "error_rate": 0.0 if version == 1 else 3 / decisions,
        "decisions_per_s": 812.4 * weight,
        "latency_ms": {"p50": 0.81, "p95": 1.9, "p99": 4.27 + version},
        "actions": {"0": decisions * 52 // 100, "1": decisions - decisions * 52 // 100},
        "outcome": {"episodes": episodes, "mean": mean, "low": low, "high": high, "mixed": 2 if version == 2 else 0},
    }


def simulated_series(polls: int) -> dict[str, Any]:
    moments = list(range(-180 + polls, polls))
    wave = [(moment * 7919) % 97 / 97 for moment in moments]  # a fixed zigzag in [0, 1)
    canary = [None if index < 60 else value for index, value in enumerate(wave)]
    return {
        "time_s": [NOW_S + moment for moment in moments],
        "versions": {
            "1": {
                "decisions_per_s": [790 + 30 * value - (40 if index > 60 else 0) for index, value in enumerate(wave)],
                "latency_p50_ms": [0.8 + 0.1 * value for value in wave],
                "latency_p99_ms": [4 + 2 * value for value in wave],
                "outcome_mean": [484 + value for value in wave],
            },
            "2": {
                "decisions_per_s": [None if value is None else 40 + 9 * value for value in canary],
                "latency_p50_ms": [None if value is None else 0.9 + 0.1 * value for value in canary],
                "latency_p99_ms": [None if value is None else 5 + 3 * value for value in canary],
                # An episode ends in every third bucket only: values between gaps must be visible too.
                "outcome_mean": [None if value is None or index % 3 else 430 - index / 9 for index, value in enumerate(canary)],
            },
        },
    }


class Simulator:
    """A server on loopback with the dashboard's files and a status that the test changes; it can be taken down and put up."""

    def __init__(self) -> None:
        self.stage = "canary_5"
        self.change: Callable[[dict[str, Any]], None] = lambda status: None
        self.polls = 0
        self._server = self._bind(port=0)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def status(self) -> dict[str, Any]:
        status = copy.deepcopy(simulated_status(self.stage, self.polls))
        self.change(status)
        return status

    def up(self) -> None:
        self._server = self._bind(port=int(self.url.rsplit(":", 1)[1]))

    def down(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _bind(self, port: int) -> ThreadingHTTPServer:
        simulator = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, content_type, body = simulator.answer(self.path, self.headers.get("Authorization"))
                self.send_response(code)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Keep the test's output readable."""

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server

    def answer(self, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        if path == "/v1/status":
            if authorization != f"Bearer {KEY}":
                return 401, "application/json", b'{"error": "the API key is wrong"}'
            self.polls += 1
            return 200, "application/json", json.dumps(self.status()).encode()
        file = STATIC / ("index.html" if path == "/dashboard" else path.removeprefix("/dashboard/"))
        if not file.is_file():
            return 404, "text/plain", b"not found"
        return 200, CONTENT_TYPES[file.suffix], file.read_bytes()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in CHROMIUM_ARGUMENTS:
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
    browser.set_page_load_timeout(30)
    yield browser
    browser.quit()


@pytest.fixture
def simulator(driver: Any) -> Iterator[Simulator]:
    simulator = Simulator()
    set_page_width(driver, 1280)
    driver.get_log("browser")  # what earlier tests left there
    yield simulator
    driver.get("about:blank")
    simulator.down()


# --- the properties ---


@pytest.mark.parametrize("stage", ["idle", "canary_5", "canary_25", "rolled_back"])
def test_every_stage_of_a_release_is_shown_without_console_errors(driver: Any, simulator: Simulator, stage: str) -> None:
    simulator.stage = stage
    assert_dashboard_shows(driver, simulator.url, KEY, simulator.status())
    wait_for(lambda: simulator.polls >= 3, lambda: f"{simulator.polls} polls")
    assert console_problems(driver) == []


def test_negative_control_a_script_error_is_found_in_the_console(driver: Any, simulator: Simulator) -> None:
    enter_key(driver, simulator.url, KEY)
    driver.execute_script("setTimeout(() => { throw new Error('planted') })")
    found: list[str] = []
    wait_for(lambda: found.extend(console_problems(driver)) or found, lambda: "an empty console")
    assert "planted" in found[0]


def test_negative_control_a_page_that_shows_another_weight_is_refused(driver: Any, simulator: Simulator) -> None:
    claimed = simulator.status()
    claimed["arms"][1]["weight"] = 0.35
    with pytest.raises(AssertionError, match="v2"):
        assert_dashboard_shows(driver, simulator.url, KEY, claimed)


def test_numbers_of_the_arms_and_their_intervals_are_those_of_the_status(driver: Any, simulator: Simulator) -> None:
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: "v2" in text(driver, "#arms"), lambda: text(driver, "body"))
    canary = row_of(driver, "#arms", 2)
    # 812.4 x 0.05 = 40.62; p99 = 4.27 + 2; actions are split 52 : 48
    assert all(shown in canary for shown in ("5 %", "40.6", "0.81", "1.9", "6.27", "0: 52 %", "1: 48 %")), canary
    outcome = text(driver, "#outcome")
    assert all(shown in outcome for shown in ("484.1", "479.5 to 488.7", "402.7", "361.2 to 444.2", "211 episodes", "2 mixed")), (
        outcome
    )


def test_interval_marks_stand_where_their_numbers_are_on_one_axis(driver: Any, simulator: Simulator) -> None:
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: driver.find_elements("css selector", ".interval .mark"), lambda: text(driver, "body"))
    lows, highs, means = (places(driver, part, at) for part, at in ((".range", "x1"), (".range", "x2"), (".mark", "x")))
    # axis from 361.2 - p to 488.7 + p with p = 6 % of 127.5 = 7.65: 142.8 long; champion mean (484.1 - 353.55) / 142.8 = 91.42 %
    assert means == pytest.approx([91.42, 34.42], abs=0.01)
    assert lows[0] == pytest.approx(88.20, abs=0.01) and highs[1] == pytest.approx(63.48, abs=0.01)
    assert highs[1] < lows[0]  # they do not overlap in the numbers, so they must not overlap in the drawing


def places(driver: Any, part: str, attribute: str) -> list[float]:
    nodes = driver.find_elements("css selector", f".interval {part}")
    return [float(node.get_attribute(attribute).rstrip("%")) for node in nodes]


def test_an_advance_and_then_a_rollback_appear_without_reloading(driver: Any, simulator: Simulator) -> None:
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: "release of version 2 asked for" in text(driver, "#release"), lambda: text(driver, "body"))
    assert "12.5 above the floor" not in text(driver, "#release")
    simulator.stage = "canary_25"
    wait_for(lambda: "reward not worse: 12.5 above the floor" in text(driver, "#release"), lambda: text(driver, "#release"))
    assert "step 2 of 3" in text(driver, "#release") and "25 %" in row_of(driver, "#arms", 2)
    announced = driver.find_element("id", "announcement")
    assert announced.get_attribute("aria-live") == "polite"
    assert "running: version 2, step 2 of 3, 25 %" in announced.get_attribute("textContent")
    simulator.stage = "rolled_back"
    wait_for(lambda: "lower by at least 81.3" in text(driver, "#history"), lambda: text(driver, "#history"))
    assert "Release 2: v2 against v1" in text(driver, "#history") and "rolled back" in text(driver, "#history")
    assert "No release in progress" in text(driver, "#release") and "100 %" in row_of(driver, "#arms", 1)
    assert "Release 2 is rolled back" in announced.get_attribute("textContent")


def test_charts_draw_one_line_per_version_and_say_their_latest_values(driver: Any, simulator: Simulator) -> None:
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: driver.find_elements("css selector", "#latency-chart canvas"), lambda: text(driver, "body"))
    for chart, labels in (
        ("rate", ["v1", "v2"]),
        ("latency", ["v1 p99", "v2 p99", "v1 p50", "v2 p50"]),
        ("reward", ["v1", "v2"]),
    ):
        legend = text(driver, f"#{chart}-chart .legend")
        assert all(label in legend for label in labels), legend
        assert "Latest: v1" in driver.find_element("css selector", f"#{chart}-chart .plot").get_attribute("aria-label")
        for line in ("--series-0", "--series-1"):  # drawn one animation frame after the data arrive
            wait_for(partial(has_line, driver, chart, line), partial("no line {} in the chart {}".format, line, chart))


def has_line(driver: Any, chart: str, colour: str) -> bool:
    return line_pixels(driver, chart, colour) > 50


def test_negative_control_a_version_without_measurements_has_no_line(driver: Any, simulator: Simulator) -> None:
    simulator.change = lambda status: status["series"]["versions"].pop("2")
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: driver.find_elements("css selector", "#rate-chart canvas"), lambda: text(driver, "body"))
    wait_for(lambda: has_line(driver, "rate", "--series-0"), lambda: "no line of v1")
    assert line_pixels(driver, "rate", "--series-1") == 0


def line_pixels(driver: Any, chart: str, colour: str) -> int:
    """Count the pixels of a chart that have the colour of a stylesheet variable."""
    return driver.execute_script(
        """const canvas = document.querySelector(`#${arguments[0]}-chart canvas`);
        const wanted = getComputedStyle(document.documentElement).getPropertyValue(arguments[1]).trim();
        const [r, g, b] = [1, 3, 5].map((at) => parseInt(wanted.slice(at, at + 2), 16));
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        let count = 0;
        for (let i = 0; i < data.length; i += 4)
            if (data[i + 3] > 128 && Math.hypot(data[i] - r, data[i + 1] - g, data[i + 2] - b) < 30) count += 1;
        return count""",
        chart,
        colour,
    )


def test_a_wrong_key_says_where_the_key_is_and_the_right_one_then_works(driver: Any, simulator: Simulator) -> None:
    enter_key(driver, simulator.url, "wrong-key")
    wait_for(lambda: "refused this key" in text(driver, "#key-problem"), lambda: text(driver, "body"))
    take_screenshot(driver, "wrong-key")
    assert "secrets/api_key in the storage root" in text(driver, "#key-problem")
    assert driver.execute_script("return sessionStorage.length") == 0
    assert not driver.find_element("id", "content").is_displayed()
    driver.find_element("id", "key-input").send_keys(KEY)
    driver.find_element("css selector", "#key-form button").click()
    wait_for(lambda: text(driver, "#policy") == "cartpole", lambda: text(driver, "body"))
    assert not driver.find_element("id", "key-form").is_displayed()


def test_the_key_is_asked_for_once_per_tab(driver: Any, simulator: Simulator) -> None:
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: text(driver, "#policy") == "cartpole", lambda: text(driver, "body"))
    driver.refresh()
    wait_for(lambda: text(driver, "#policy") == "cartpole", lambda: text(driver, "body"))
    driver.find_element("id", "forget-key").click()
    assert driver.find_element("id", "key-form").is_displayed()
    assert "cartpole" not in text(driver, "body") and "v1" not in text(driver, "body")


def test_a_lost_connection_keeps_the_values_and_says_how_old_they_are(driver: Any, simulator: Simulator) -> None:
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: text(driver, "#freshness") == "live", lambda: text(driver, "body"))
    before = row_of(driver, "#versions", 2)
    simulator.down()
    wait_for(lambda: "Connection lost" in text(driver, "#notices"), lambda: text(driver, "body"))
    wait_for(lambda: "last update 3 s ago" in text(driver, "#freshness"), lambda: text(driver, "#freshness"))
    take_screenshot(driver, "lost")
    assert row_of(driver, "#versions", 2) == before and "v2" in text(driver, "#outcome")
    simulator.up()
    wait_for(lambda: text(driver, "#freshness") == "live", lambda: text(driver, "#freshness"))
    assert text(driver, "#notices").strip() == ""


def test_missing_numbers_are_dashes_and_not_zeros(driver: Any, simulator: Simulator) -> None:
    simulator.stage = "idle"
    simulator.change = lambda status: status.update(without_measurements(status))
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: "v1" in text(driver, "#arms"), lambda: text(driver, "body"))
    # decisions, per second, errors, three percentiles and the action mix; the weight is the only number known
    assert row_of(driver, "#arms", 1).split().count("–") == 7 and "100 %" in row_of(driver, "#arms", 1)
    assert "No finished episode yet" in text(driver, "#outcome") and "Nothing measured yet" in text(driver, "#rate-chart")
    assert console_problems(driver) == []


def without_measurements(status: dict[str, Any]) -> dict[str, Any]:
    blank = {"decisions": None, "errors": None, "error_rate": None, "decisions_per_s": None, "actions": {}}
    blank |= {
        "latency_ms": dict.fromkeys(("p50", "p95", "p99")),
        "outcome": dict.fromkeys(("episodes", "mean", "low", "high", "mixed")),
    }
    return {
        "arms": [{**arm, **blank} for arm in status["arms"]],
        "series": {"time_s": [], "versions": {}},
        "feedback": dict.fromkeys(status["feedback"]),
        "replicas": [],
        "responses": {},
    }


def test_without_a_monitor_the_plan_is_shown_and_the_rest_is_called_unknown(driver: Any, simulator: Simulator) -> None:
    def monitor_dies(status: dict[str, Any]) -> None:
        kept = {key: status[key] for key in ("policy", "plan", "champion")}  # what a replica knows by itself
        status.clear()
        status.update(kept, monitor=None, reason="the monitor does not answer within its time limit")

    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: "running" in text(driver, "#release"), lambda: text(driver, "body"))
    simulator.change = monitor_dies
    wait_for(
        lambda: "The monitor is missing (the monitor does not answer" in text(driver, "#notices"), lambda: text(driver, "body")
    )
    assert "5 %" in row_of(driver, "#arms", 2) and "95 %" in row_of(driver, "#arms", 1)
    for section in ("release", "history", "outcome", "versions", "replicas"):
        assert text(driver, f"#{section}") == "Not known while the monitor is away."
    assert "not known" in driver.find_element("id", "announcement").get_attribute("textContent")
    simulator.change = lambda status: None
    wait_for(lambda: "running" in text(driver, "#release"), lambda: text(driver, "body"))
    assert text(driver, "#notices").strip() == "" and console_problems(driver) == []


def test_text_from_the_server_is_never_markup(driver: Any, simulator: Simulator) -> None:
    planted = "<img src=x onerror=\"document.title='owned'\">"

    def plant(status: dict[str, Any]) -> None:
        status["policy"] = status["reason"] = planted
        status["release"]["reason"] = status["release"]["override_gates"] = planted
        status["release"]["history"][0]["reason"] = status["versions"][0]["override_gates"] = planted
        status["release"]["evidence"]["candidate"][planted] = planted
        status["replicas"][0] |= {"replica": planted, "load_failures": {"2": planted}}
        status["monitor"]["integrity_errors"] = [planted]

    simulator.change = plant
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: text(driver, "#policy") == planted, lambda: text(driver, "body"))
    assert text(driver, "body").count(planted) >= 9
    assert driver.find_elements("css selector", "img") == [] and "release running" in driver.title


def test_nothing_is_loaded_from_another_host(driver: Any, simulator: Simulator) -> None:
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: text(driver, "#freshness") == "live", lambda: text(driver, "body"))
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert f"{simulator.url}/v1/status" in loaded and len(loaded) >= 5
    assert [name for name in loaded if not name.startswith((simulator.url, "data:"))] == []


@pytest.mark.parametrize("stage", ["canary_25", "rolled_back"])
@pytest.mark.parametrize("width", [390, 800, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_text_stands_out(
    driver: Any, simulator: Simulator, stage: str, width: int, scheme: str
) -> None:
    simulator.stage = stage
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    set_page_width(driver, width)
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: driver.find_elements("css selector", "#reward-chart canvas"), lambda: text(driver, "body"))
    time.sleep(0.6)  # the weight bars' transition
    take_screenshot(driver, f"{stage}-{width}-{scheme}")
    assert not scrolls_sideways(driver)
    assert low_contrast_texts(driver) == []


def test_negative_control_a_wide_element_and_pale_text_are_found(driver: Any, simulator: Simulator) -> None:
    set_page_width(driver, 390)
    enter_key(driver, simulator.url, KEY)
    wait_for(lambda: text(driver, "#freshness") == "live", lambda: text(driver, "body"))
    driver.execute_script("document.getElementById('policy').style.cssText = 'width: 600px; color: #888; background: #777'")
    assert scrolls_sideways(driver)
    assert low_contrast_texts(driver) != []


def low_contrast_texts(driver: Any) -> list[str]:
    """Return the texts whose contrast with the background behind them is below 4.5 : 1 (WCAG 2, level AA)."""
    return driver.execute_script(
        """const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const luminance = (colour) => channels(colour).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = (node) => { const c = getComputedStyle(node).backgroundColor;
            return node === document.documentElement || (channels(c)[3] ?? 1) > 0 ? c : behind(node.parentElement); };
        return [...document.querySelectorAll('body *')].filter((node) => node.checkVisibility() && [...node.childNodes].some(
            (child) => child.nodeType === Node.TEXT_NODE && child.textContent.trim())).flatMap((node) => {
            const [a, b] = [luminance(getComputedStyle(node).color), luminance(behind(node))].sort((x, y) => y - x);
            const ratio = (a + 0.05) / (b + 0.05);
            return ratio < 4.5 ? [`${ratio.toFixed(2)}: ${node.textContent.trim().slice(0, 40)}`] : []; })"""
    )


def take_screenshot(driver: Any, name: str) -> None:
    """Keep a picture of the whole page where TRIMTAB_SCREENSHOTS says, so that a person can look at a design change."""
    folder = os.environ.get("TRIMTAB_SCREENSHOTS")
    if folder:
        picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
        (Path(folder) / f"dashboard-{name}.png").write_bytes(base64.b64decode(picture["data"]))
