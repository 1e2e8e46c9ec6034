"""`trimtab up`: train, gate, publish, serve, stay."""

import time

from policies.errors import TrainingFailed
from policies.trust import SigningKey
from trimtab.command import (
    DEFAULT_LOOP_FILE,
    DONE,
    AddressOption,
    Context,
    KeyOption,
    LoopFile,
    Sets,
    StorageOption,
    load_key,
    open_context,
    say,
)
from trimtab.commands.offline import print_report, run_training, target_missed
from trimtab.commands.online import serve_until_stopped


def up(
    loop_file: LoopFile = DEFAULT_LOOP_FILE,
    sets: Sets = None,
    storage: StorageOption = None,
    address: AddressOption = None,
    key: KeyOption = None,
) -> int:
    """Train until the target, gate, publish, serve, and stay: the whole loop.

    A champion in the storage root is served without training; a run that was interrupted is continued. Ctrl-C ends
    everything that was started.
    """
    from serve_app.app import require_free_ports
    from training.environment import read_spaces

    start_s = time.monotonic()
    context = open_context(loop_file, sets, storage)
    signing_key = load_key(context, key)
    read_spaces(context.loop.environment)  # a wrong environment is said before Ray starts
    with context.cluster(address) as cluster:
        say(f"Ray at {cluster.address} ({'started here' if cluster.is_local else 'joined'})")
        champion = context.registry().state().champion
        if cluster.is_local:
            require_free_ports(context.loop.serving)  # before the training, not after it
        if champion is None:
            champion = _make_first_champion(context, signing_key)
        serve_until_stopped(context, cluster, champion, start_s)
    return DONE


def _make_first_champion(context: Context, key: SigningKey | None) -> int:
    from trimtab.pipeline import gate_run, has_reached_target, interrupted_run, publish_run, require_key

    require_key(context.loop, key)  # before the training, not after it
    run_id = interrupted_run(context.loop, context.storage)
    if run_id is None or not has_reached_target(context.storage, run_id):
        result = run_training(context, run_id=run_id, resume=run_id is not None)
        run_id = result.run_id
        if not result.reached_target:
            raise TrainingFailed(target_missed(context, result))
    else:
        say(f"run {run_id} is trained already")
    print_report(gate_run(context.loop, context.storage, run_id))
    published = publish_run(context.loop, context.storage, run_id, key=key)
    say(f"published version {published.version}, bundle {published.bundle.digest[:12]}, champion")
    return published.version
