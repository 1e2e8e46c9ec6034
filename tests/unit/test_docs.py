"""Do docs/serving.md and docs/operations.md name what the code has: each setting, path, status, error, event and status field?"""

import ast
import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from msgspec.structs import fields
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from actors.monitor import Monitor
from policies import errors
from policies.errors import RequestRefused
from policies.registry import Registry
from policies.release import ReleaseConfig
from policies.storage import open_storage
from policies.telemetry import ReplicaReport
from serve_app.config import ServingConfig
from serve_app.openapi import openapi_document
from serve_app.replica import PolicyReplica
from serve_app.status import StatusView
from serve_app.variants import VariantStore
from tests.serving_helpers import call as send
from tests.serving_helpers import publish, random_policy, replica_of

ROOT = Path(__file__).parents[2]
SERVED_BY = ("policies", "actors", "serve_app")


def read(name: str) -> str:
    """Return a page as a reader sees it: what stands in an HTML comment is not said."""
    return re.sub(r"<!--.*?-->", "", (ROOT / "docs" / name).read_text(), flags=re.DOTALL)


def rows(text: str, *, heading: str) -> list[list[str]]:
    """Return the cells of every table row below a heading, up to the next heading of its level or above."""
    level = heading.split(" ")[0]
    [section] = re.findall(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.DOTALL | re.MULTILINE)
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]


def spans(text: str) -> set[str]:
    """Return what stands between backticks, code blocks left out."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def syntax_trees() -> Iterator[ast.AST]:
    for package in SERVED_BY:
        for path in (ROOT / package).rglob("*.py"):
            yield ast.parse(path.read_text())


# --- settings ---


def settings_of(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return every key of a configuration with its default, as YAML has it."""
    found: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            found |= settings_of(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def described_settings(text: str) -> dict[str, Any]:
    table = rows(text, heading="## Settings: `serving:` in the loop file")[1:]
    return {key.strip("`"): yaml.safe_load(default.strip("`")) for key, default, _ in table}


def test_the_table_of_settings_is_the_configuration() -> None:
    assert described_settings(read("serving.md")) == settings_of(ServingConfig())


@pytest.mark.parametrize(("said", "said_wrongly"), [("| `1024` |", "| `1023` |"), ("| `max_queue` |", "| `max_que` |")])
def test_another_default_or_another_key_would_be_noticed(said: str, said_wrongly: str) -> None:
    text = read("serving.md")
    assert said in text
    assert described_settings(text.replace(said, said_wrongly)) != settings_of(ServingConfig())


# --- paths ---


def paths_missing_in(text: str) -> set[str]:
    paths = openapi_document("<policy>", None, version="1")["paths"]
    named = {span.split(" ")[-1] for span in spans(text)}  # `POST /v1/decide` names a path too
    return set(paths) - named


def test_every_path_of_the_interface_is_described() -> None:
    assert not paths_missing_in(read("serving.md") + read("operations.md"))
    without = re.sub(r"/v1/endpoints", "/v1/elsewhere", read("serving.md") + read("operations.md"))
    assert paths_missing_in(without) == {"/v1/endpoints"}, "negative control: a path that is not named is noticed"


def routes_missing_in(text: str) -> set[str]:
    """Return the paths that stand in the code of the interface, or begin what stands there, and that the pages do not name."""
    tree = ast.parse((ROOT / "serve_app" / "http_api.py").read_text())
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    paths = {text for text in constants if re.fullmatch(r"/[a-z0-9./]+", text) and text not in ("/override", "/dashboard/")}
    named = {span.split(" ")[-1] for span in spans(text)}
    return {path for path in paths if not any(name.startswith(path) for name in named)}


def test_every_path_that_is_answered_is_described_also_those_for_local_clients_and_browsers() -> None:
    text = read("serving.md") + read("operations.md")
    assert not routes_missing_in(text)
    assert routes_missing_in(text.replace("/v1/plan", "/v1/x")) == {"/v1/plan"}, "negative control"


# --- HTTP statuses and errors ---


def refusals() -> dict[str, int]:
    """Return the classes of refusals that have one status of their own."""
    found: dict[str, int] = {}
    waiting = list(RequestRefused.__subclasses__())
    while waiting:
        kind = waiting.pop()
        waiting.extend(kind.__subclasses__())
        if kind.__module__ == errors.__name__:
            found[kind.__name__] = kind.status
    return found


def statuses_sent() -> dict[int, set[str]]:
    """Return the statuses that stand in the code beside a `RequestInvalid`, an `error_response` or a `Response`."""
    found: dict[int, set[str]] = {422: {"RequestInvalid"}}  # its default
    for tree in syntax_trees():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            name = cast(ast.Name, call.func).id
            place = {"RequestInvalid": 1, "error_response": 0, "Response": 0}.get(name)
            if place is not None and len(call.args) > place and isinstance(call.args[place], ast.Constant):
                found.setdefault(cast(ast.Constant, call.args[place]).value, set()).update({name} & {"RequestInvalid"})
    return found


def described_statuses(text: str) -> dict[int, str]:
    """Return who sends each status, the cells of all of its rows."""
    found: dict[int, str] = {}
    for row in rows(text, heading="## HTTP statuses"):
        if row[0].isdigit():
            found[int(row[0])] = f"{found.get(int(row[0]), '')} {row[1]}"
    return found


def test_every_refusal_is_in_the_table_of_statuses_beside_its_own() -> None:
    said, kinds = described_statuses(read("operations.md")), refusals()
    assert {"Unauthorized", "Overloaded", "DeadlineExceeded"} <= set(kinds)
    for name, status in kinds.items():
        if name != "RequestInvalid":
            assert f"`{name}`" in said.get(status, ""), (name, status)
    for status, names in statuses_sent().items():
        assert status in said and all(f"`{name}`" in said[status] for name in names), (status, names)
    assert {200, 400, 405, 408, 413, 415, 431, 500} <= set(statuses_sent()), "negative control: the search finds what is there"


def test_the_table_says_of_each_status_what_our_client_does() -> None:
    source = "".join(path.read_text() for path in (ROOT / "trimtab").glob("*.py"))
    [listed] = re.findall(r"^RETRY_STATUSES\s*=\s*(?:frozenset\()?\(([\d, ]+)\)", source, re.MULTILINE)
    retried = {int(status) for status in listed.split(",")}
    table = [row for row in rows(read("operations.md"), heading="## HTTP statuses") if row[0].isdigit()]
    assert {int(row[0]) for row in table if row[-1] == "yes"} == retried
    assert {row[-1] for row in table} == {"yes", "no"}


def test_every_event_that_is_logged_is_explained() -> None:
    logged = {event for tree in syntax_trees() for event in events_in(tree)}
    assert {"version_not_loaded", "monitor_away", "release_moved"} <= logged, "negative control: the search finds what is there"
    assert not logged - spans(read("operations.md"))


def events_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^event=(\w+)", node.value)


# --- the status document ---


def keys_missing_in(text: str, document: dict[str, Any]) -> set[str]:
    """Return the keys of a status document, and those of its objects, that no table names by its path or by its last part."""
    named = spans("\n".join(" | ".join(row) for row in rows(text, heading="## The status document")))
    last_parts = {span.split(".")[-1] for span in named}
    inner = {f"{key}.{name}" for key, value in document.items() if isinstance(value, dict) for name in value}
    return {key for key in document if key not in named | {span.split(".")[0] for span in named}} | {
        path for path in inner if path not in named and path.split(".")[-1] not in last_parts
    }


def test_every_key_of_the_status_is_described(tmp_path: Path) -> None:
    root = open_storage(tmp_path / "storage").root
    monitor = Monitor("demo", str(root), outcome_range=(0, 1), reward_window_s=60, config=ReleaseConfig(), now=1000)
    monitor.refresh(1000)
    status, text = monitor.status(1000), read("operations.md")
    assert not keys_missing_in(text, status)
    assert keys_missing_in(text, {**status, "weather": {"rain_mm": 3}}) == {"weather", "weather.rain_mm"}, "negative control"
    assert keys_missing_in(text.replace("`feedback.late`", "x"), status) == {"feedback.late"}, "negative control"


def test_every_field_of_a_replicas_report_has_a_row() -> None:
    text = read("operations.md")
    shown = {row[0].strip("`") for row in rows(text, heading="### Replicas")}
    not_shown = {"time_s", "started_at_s"}
    assert {f"replicas[].{field.name}" for field in fields(ReplicaReport) if field.name not in not_shown} <= shown
    assert not_shown <= spans(text)


def test_every_key_of_the_short_status_is_described(tmp_path: Path) -> None:
    async def away() -> dict[str, Any]:
        raise ConnectionError("there is no monitor")

    storage = open_storage(tmp_path / "storage")
    report = ReplicaReport("r", 0.0, 0.0, 0, [], {}, 0, {})
    view = StatusView("demo", VariantStore(Registry(storage.registry("demo"))), away, lambda: report)
    document = asyncio.run(view.read())
    assert document["monitor"] is None and not keys_missing_in(read("operations.md"), document)


# --- metrics ---


def metrics_of(replica: PolicyReplica) -> dict[str, tuple[str, str]]:
    """Return type and labels of every metric of a replica that has decided, by its name."""
    text = replica.api._metrics.text().decode()
    found = {}
    for metric in text_string_to_metric_families(text):
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        labels = sorted({label for sample in metric.samples for label in sample.labels} - {"policy", "replica", "le"})
        found[name] = metric.type, ", ".join(f"`{label}`" for label in labels)
    return found


def described_metrics(text: str) -> dict[str, tuple[str, str]]:
    table = [row for row in rows(text, heading="## Metrics") if len(row) == 4][1:]
    return {row[0].strip("`"): (row[1], ", ".join(sorted(row[2].split(", ")))) for row in table}


def test_every_metric_is_described_with_its_type_and_labels(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "storage")
    publish(storage, random_policy(1))
    replica = replica_of(storage)
    body, key = b'{"observation":[0,0,0,0]}', storage.api_keys.owner_key()
    assert asyncio.run(send(replica.api, "POST", "/v1/decide", body, key=key)).status == 200
    text, shown = read("operations.md"), metrics_of(replica)
    assert described_metrics(text) == shown
    assert described_metrics(text.replace("`trimtab_batches_total`", "`x`")) != shown, "negative control: another name"
    assert described_metrics(text.replace("| gauge | `build` |", "| gauge | |")) != shown, "negative control: other labels"


# --- links ---


def broken_links(page: Path, text: str) -> list[str]:
    """Return the links of a page to files that are not there, or to headings that the page they name has not."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:", "mailto:")):
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


def anchors(text: str) -> set[str]:
    """Return how a renderer names the headings: in lower case, with hyphens for blanks, without other signs."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_readme_lead_somewhere_and_to_every_page() -> None:
    page = ROOT / "README.md"
    text = page.read_text()
    assert not broken_links(page, text)
    assert broken_links(page, text.replace("docs/clients.md", "docs/client.md")), "negative control"
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert not pages - set(re.findall(r"\]\(([^)\s]+)\)", text))


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / "docs" / name
    assert not broken_links(page, read(name))
    wrong = "[a](no_such_page.md) and [b](registry.md#no-such-heading) and [c](registry.md#arms)"
    assert broken_links(page, wrong) == ["no_such_page.md", "registry.md#no-such-heading"], "negative control"
