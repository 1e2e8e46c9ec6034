"""What the commands share: their options, what they start with, and how they answer."""

import contextlib
import dataclasses
import datetime
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from policies.registry import Registry, locate_registry
from policies.storage import Storage, open_storage
from policies.trust import SigningKey
from trimtab import session as sessions
from trimtab.client import Client
from trimtab.cluster import Cluster, connected
from trimtab.loop_file import LoopConfig, load_loop_file, registry_of

DONE, NEGATIVE, UNUSABLE, UNDECIDED, INTERRUPTED = 0, 1, 2, 3, 130
DEFAULT_LOOP_FILE = Path("examples/cartpole.yaml")
TABLE_WIDTH = 160  # of a table that goes into a file or a pipe

console = Console(stderr=True)

LoopFile = Annotated[Path, typer.Argument(metavar="[LOOP_FILE]", help="The loop file (YAML).")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the loop file.")]
StorageOption = Annotated[
    str | None, typer.Option("--storage", metavar="DIR|URL", help="Storage root: a directory or file:// URL.")
]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster: host:port, `auto` (made by `ray start`) or `local` (a new one).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunOption = Annotated[str | None, typer.Option("--run", metavar="RUN_ID", help="The run; default: the one started last.")]
OverrideOption = Annotated[
    str | None,
    typer.Option("--override-gates", metavar="REASON", help="Break-glass: go on without passing gates; the reason is kept."),
]
KeyOption = Annotated[
    str | None, typer.Option("--key", metavar="NAME", help="Sign with this key of the storage root (`trimtab keys new NAME`).")
]
ExpiresOption = Annotated[
    datetime.datetime | None,
    typer.Option("--expires", formats=["%Y-%m-%d"], help="From this day (UTC) on it does not count."),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the journal.")]


@dataclasses.dataclass(frozen=True)
class Context:
    """What nearly every command starts with."""

    loop: LoopConfig
    storage: Storage

    def registry(self) -> Registry:
        """Return the registry of the loop's policy."""
        return registry_of(self.loop, self.storage)

    @contextlib.contextmanager
    def cluster(self, address: str | None) -> Iterator[Cluster]:
        """Connect to Ray for the time of the block: see `trimtab.cluster.connected`."""
        running = sessions.running_session(self.storage)
        with connected(address, session_address=running.ray_address if running else None) as cluster:
            yield cluster


def open_context(loop_file: Path, sets: list[str] | None, storage: str | None) -> Context:
    """Read the loop file and open its storage root."""
    loop = load_loop_file(loop_file, overrides=sets, storage=storage)
    context = Context(loop, open_storage(loop.storage))
    if loop.registry is not None:  # written down in the storage root, where replicas and actors look too
        locate_registry(context.storage.registry(loop.name), f"{loop.registry.rstrip('/')}/{loop.name}")
    return context


def load_key(context: Context, name: str | None) -> SigningKey | None:
    """Return the private key that a person named; raises `NotFound`, or `SignatureRefused` if its signatures do not count."""
    return None if name is None else SigningKey.load(context.storage, name, now=time.time())


def connect(context: Context) -> Client:
    """Return a client of the endpoint that serves from the context's storage; raises `NotFound` when none does."""
    session = sessions.require_session(context.storage)
    return Client(session.url, context.storage.api_keys.owner_key())


def start_of_day(day: datetime.datetime | None) -> float | None:
    """Return when a day of `--expires` begins in UTC, in seconds since 1970."""
    return None if day is None else day.replace(tzinfo=datetime.UTC).timestamp()


def escape(text: str) -> str:
    """Keep rich from reading brackets as markup."""
    return text.replace("[", r"\[")


def say(text: str) -> None:
    """Tell a person something on stderr."""
    console.print(escape(text), soft_wrap=True, highlight=False)


def rendered(table: Table) -> str:
    """Return a table as text."""
    text = io.StringIO()
    Console(file=text, width=TABLE_WIDTH).print(table)
    return text.getvalue().rstrip()


def output(as_json: bool, document: dict[str, Any], text: str) -> None:
    """Answer on stdout: one JSON document, or text."""
    if as_json:
        print(json.dumps(document, default=str), flush=True)
    else:
        print(text, flush=True)
