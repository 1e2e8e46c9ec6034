"""The `trimtab` command: every step of the loop on its own, and `up` for all of them in one go.

Exit codes: 0 done, 1 the verdict is negative (gate not passed, release refused or rolled back, signature refused, target not
reached), 2 usage or environment error, 3 a gate had too little evidence. With --json one JSON document goes to stdout;
everything else goes to stderr.
"""

import sys
import traceback

import typer

from policies.errors import GateRefused, ReleaseRefused, SignatureRefused, TrainingFailed, TrimtabError
from trimtab.cluster import prepare_environment, terminate_as_interrupt
from trimtab.command import DONE, INTERRUPTED, NEGATIVE, UNUSABLE, console, escape
from trimtab.commands import apikey, arms, curves, exports, log, offline, online, registry, release, tuning, whole_loop

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
release_app = typer.Typer(no_args_is_help=True, help="Deliver a version to traffic step by step, and take it back.")
arms_app = typer.Typer(no_args_is_help=True, help="Switch arms off and on, hold units out, let versions answer in shadow.")
registry_app = typer.Typer(no_args_is_help=True, help="See, name, approve, verify and tidy the versions of a policy.")
log_app = typer.Typer(no_args_is_help=True, help="See and seal the decision log.")
keys_app = typer.Typer(
    no_args_is_help=True, help="Make keys to sign versions with, and say whose signatures count; for clients see `apikey`."
)
apikey_app = typer.Typer(
    no_args_is_help=True, help="Make API keys for clients of the endpoint, and end them; to sign versions see `keys`."
)

for command in (
    whole_loop.up,
    offline.train,
    offline.resume,
    tuning.tune,
    offline.evaluate,
    offline.gate,
    offline.diff,
    offline.publish,
):
    app.command()(command)
app.add_typer(release_app, name="release")
for command in (exports.export, exports.sign, exports.verify):
    app.command()(command)
app.add_typer(keys_app, name="keys")
for command in (online.serve, online.decide, online.drive, online.status, online.replay, online.down, curves.plot):
    app.command()(command)
for command in (release.start, release.status, release.promote, release.pause, release.resume, release.abort, release.rollback):
    release_app.command()(command)
app.add_typer(arms_app, name="arms")
arms_app.command("list")(arms.list_arms)
for command in (arms.disable, arms.enable, arms.holdout, arms.shadow):
    arms_app.command()(command)
for name in ("new", "trust", "list", "revoke"):
    keys_app.command(name)(getattr(exports, f"keys_{name}"))
app.add_typer(apikey_app, name="apikey")
apikey_app.command("list")(apikey.list_keys)
for command in (apikey.create, apikey.rotate, apikey.revoke):
    apikey_app.command()(command)
app.add_typer(registry_app, name="registry")
registry_app.command("list")(registry.list_versions)
for command in (registry.show, registry.history, registry.diff, registry.verify, registry.gc):
    registry_app.command()(command)
for command in (registry.alias, registry.tag, registry.approve):
    registry_app.command()(command)
app.add_typer(log_app, name="log")
log_app.command("list")(log.list_segments)
for command in (log.seal, log.show):
    log_app.command()(command)
app.command("lineage")(registry.show_lineage)


def main() -> None:
    """Run the command line and turn our errors into a message and an exit code."""
    prepare_environment()
    terminate_as_interrupt()
    try:
        code = app(standalone_mode=False)  # an interrupt in a command comes back as code 130
        if code == INTERRUPTED:
            console.print("stopped", style="yellow")
        sys.exit(code if isinstance(code, int) else DONE)
    except (GateRefused, ReleaseRefused, SignatureRefused, TrainingFailed) as error:
        _fail(NEGATIVE, error)
    except TrimtabError as error:
        _fail(UNUSABLE, error)
    except Exception as error:
        show = getattr(error, "show", None)  # typer's own usage errors know how to print themselves
        if show is None:
            traceback.print_exc()
        else:
            show()
        sys.exit(UNUSABLE)


def _fail(code: int, error: Exception) -> None:
    console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
    sys.exit(code)
