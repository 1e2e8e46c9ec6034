"""The offline half step by step: train or find a run, evaluate it, gate it, publish it; `up` and the commands share it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from actors.controller import Progress, TrainResult, train
from actors.worker_pool import WorkerPool
from policies.bundle import Bundle, write_bundle
from policies.errors import ConfigError, GateRefused, IntegrityError, NotFound, SignatureRefused
from policies.golden import Golden
from policies.integrity import canonical_json, parse_json, sha256_hex, write_atomic
from policies.policy import Policy
from policies.reference import Reference, choose_steps, decode_reference, encode_reference
from policies.registry import Registry, RegistryState, set_champion
from policies.storage import Storage
from policies.trust import SigningKey
from policies.verdicts import GateReport, Verdict, require_passing
from training.checkpoint import load_checkpoint, load_golden, load_policy
from training.config import TrainingConfig
from training.disagreement import Disagreement, compare
from training.environment import feature_labels, read_spaces
from training.evaluation import Evaluation, EvaluationRequest
from training.gates import Contender, GateContext, run_gates
from training.gates.regression import scenario_names
from training.golden import golden_inputs
from training.network import outputs_as_trained
from training.runs import RESULT, RunConfig, newest_run, open_run, read_config
from trimtab.loop_file import LoopConfig, registry_of
from trimtab.origin import card_of, origin_of, parents_of

GATE_REPORT = "gates.json"
GOLDEN_INPUTS = "golden_inputs.npz"
REFERENCE = "reference.parquet"


@dataclass(frozen=True)
class Published:
    """A version in the registry."""

    version: int
    bundle: Bundle
    is_champion: bool


def train_run(
    loop: LoopConfig,
    storage: Storage,
    *,
    run_id: str | None,
    resume: bool,
    force: bool = False,
    on_progress: Callable[[Progress], None],
    on_message: Callable[[str], None],
) -> TrainResult:
    """Train (or continue) a run; its result is kept beside its checkpoints, so that a finished run is known to be finished."""
    report = {"on_progress": on_progress, "on_message": on_message}
    if resume and run_id is not None and not force:
        loop = loop_of_run(loop, storage, run_id)  # with `force` the loop file stands as it is: that is what is forced
        if chosen := read_config(storage.run(run_id)).tuned_settings():
            on_message(
                f"run {run_id} keeps what a search chose: {', '.join(f'{name} {value}' for name, value in chosen.items())}"
            )
    backend = train if loop.training.rllib_algorithm is None else _rllib_backend()
    result = backend(loop.environment, loop.training, storage, run_id=run_id, resume=resume, force=force, **report)
    write_atomic(storage.run(result.run_id) / RESULT, canonical_json(result.to_json()))
    return result


def loop_of_run(loop: LoopConfig, storage: Storage, run_id: str) -> LoopConfig:
    """Return the loop file as it holds for a run: what a search chose for it stands instead of the training section's.

    Raises `ConfigError` where the loop file has changed so that the two do not fit each other any more.
    """
    chosen = read_config(open_run(storage, run_id)).tuned_settings()
    if not chosen:
        return loop
    try:
        training = TrainingConfig(**{**loop.training.model_dump(exclude_unset=True), **chosen})
    except ValidationError as error:
        raise ConfigError(f"run {run_id!r} has {chosen}, which does not fit the loop file's training section: {error}") from None
    return loop.model_copy(update={"training": training})


def _rllib_backend() -> Callable[..., TrainResult]:
    from actors.rllib_backend import train_with_rllib  # here, not above: with torch and RLlib it takes seconds

    return train_with_rllib


def find_run(storage: Storage, run_id: str | None) -> str:
    """Return the run id, or the id of the run that was started last; raises `NotFound`."""
    if run_id is not None:
        return open_run(storage, run_id).name
    newest = newest_run(storage)
    if newest is None:
        raise NotFound(f"no run in {storage.runs}; start one with `trimtab train`")
    return newest.name


def interrupted_run(loop: LoopConfig, storage: Storage) -> str | None:
    """Return the last run if it has the loop file's settings: an `up` that was interrupted goes on with it."""
    try:
        run_id = find_run(storage, None)
        same = read_config(storage.run(run_id)) == RunConfig(loop.environment, loop.training)
        load_checkpoint(storage.run(run_id))  # a run that was interrupted before its first one is not worth continuing
    except (NotFound, IntegrityError):
        return None
    return run_id if same else None


def has_reached_target(storage: Storage, run_id: str) -> bool:
    """Say whether the run's training ended by itself and reached its target."""
    path = storage.run(run_id) / RESULT
    return path.exists() and parse_json(path.read_bytes(), str(path))["reached_target"]


def evaluate_run(loop: LoopConfig, storage: Storage, run_id: str, *, episodes: int, seed: int) -> Evaluation:
    """Run episodes with the run's best policy so far, in the serving mode of the loop file."""
    policy, _ = load_policy(storage.run(run_id))
    with _evaluation_pool(loop, policy) as pool:
        return pool.evaluate(EvaluationRequest(policy, episodes, seed, loop.serving.mode))[0]


def evaluate_version(loop: LoopConfig, storage: Storage, version: int, *, episodes: int, seed: int) -> Evaluation:
    """Run episodes with a registered version, in the mode in which it is served."""
    bundle = registry_of(loop, storage).bundle(version)
    with _evaluation_pool(loop, bundle.policy) as pool:
        return pool.evaluate(EvaluationRequest(bundle.policy, episodes, seed, bundle.manifest["serving_mode"]))[0]


def diff_versions(loop: LoopConfig, storage: Storage, first: int, second: int, *, episodes: int) -> Disagreement:
    """Run episodes with two versions from the same initial states, and find where they would act differently."""
    registry = registry_of(loop, storage)
    bundles = [registry.bundle(version) for version in (first, second)]
    if bundles[0].policy.spaces.to_json() != bundles[1].policy.spaces.to_json():
        raise ConfigError(f"versions {first} and {second} take or give different things; their decisions cannot be compared")
    requests = [
        EvaluationRequest(bundle.policy, episodes, loop.gates.seed, bundle.manifest["serving_mode"], keep_steps=True)
        for bundle in bundles
    ]
    with _evaluation_pool(loop, bundles[0].policy) as pool:
        evaluations = pool.evaluate(*requests)
    return compare(
        bundles[0].policy,
        bundles[1].policy,
        (evaluations[0], evaluations[1]),
        gamma=loop.training.gamma,
        confidence=loop.gates.confidence,
        seed=loop.gates.seed,
    )


def gate_run(loop: LoopConfig, storage: Storage, run_id: str, *, against: int | None = None) -> GateReport:
    """Judge the run's best policy so far, compare it with the champion (or `against`), and keep the report in the run."""
    policy, metadata = load_policy(storage.run(run_id))
    registry = registry_of(loop, storage)
    version = against if against is not None else registry.state().champion
    incumbent, known_scenarios = _incumbent(registry, version) if version is not None else (None, ())
    context = GateContext(
        Contender(policy, loop.serving.mode), incumbent, loop.environment, loop.gates, _min_return(loop), known_scenarios
    )
    with _evaluation_pool(loop, policy) as pool:
        report, episodes = run_gates(context, evaluate=pool.evaluate, conditions_sha256=_conditions_sha256(loop), now=time.time())
    run = storage.run(run_id)
    keep_judged(run, policy, report, episodes, seed=loop.gates.seed)
    for name, data in card_of(loop, storage, run_id, policy, metadata, report, override_gates=None).items():
        write_atomic(run / name, data)
    return report


def keep_judged(run: Path, policy: Policy, report: GateReport, episodes: Evaluation, *, seed: int) -> None:
    """Write down in a run what a bundle needs of its gates: observations for golden vectors, the reference, the report.

    The report is last: where it is, the others are.
    """
    np.savez(run / GOLDEN_INPUTS, **_golden_inputs(policy, episodes, seed))
    reference = choose_steps(episodes.obs_ND, episodes.actions_N, episodes.rewards_N, episodes.episode_N, seed=seed)
    write_atomic(run / REFERENCE, encode_reference(reference, policy.spaces))
    write_atomic(run / GATE_REPORT, canonical_json(report.to_json()))


def publish_run(
    loop: LoopConfig, storage: Storage, run_id: str, *, override_gates: str | None = None, key: SigningKey | None = None
) -> Published:
    """Pack the run's best policy with its gate report and register it; the first passing version becomes champion.

    Raises `GateRefused` when the report is missing, of another policy, or not passing (without a break-glass reason), and
    `SignatureRefused` when the loop file requires a signature and there is no key to sign with.
    """
    require_key(loop, key)
    run = storage.run(run_id)
    policy, metadata = load_policy(run)
    report_path = run / GATE_REPORT
    if not report_path.exists():
        raise GateRefused(f"run {run_id} has no gate report; run `trimtab gate --run {run_id}` first")
    report = GateReport.from_json(parse_json(report_path.read_bytes(), str(report_path)))
    require_passing(report, policy.sha256(), override=override_gates, what=f"run {run_id} not published")
    registry = registry_of(loop, storage)
    _require_current(report, loop, registry.state(), run_id)
    parents = parents_of(registry.state(), report, metadata)
    # Its own settings, not those the loop file has by now (or had overridden for `train` alone).
    origin = origin_of(loop.model_copy(update={"training": read_config(run).training}), run, metadata, parents)
    version = _passing_version(registry.state(), policy)
    if version is None:
        documents = card_of(loop, storage, run_id, policy, metadata, report, override_gates=override_gates)
        version = _register(
            loop, registry, run, policy, report, origin=origin, override_gates=override_gates, documents=documents
        )
    state = registry.state()
    if key is not None:  # after it has its number, which is signed with it; before it can become champion
        registry.sign(version, key)
    if state.champion is None and state.version(version).gate_verdict is Verdict.PASS:
        state = registry.append(lambda state: set_champion(state, version, "first version"), now=time.time())
    return Published(version, registry.bundle(version), state.champion == version)


def require_key(loop: LoopConfig, key: SigningKey | None) -> None:
    """Raise `SignatureRefused` when the loop file requires signatures and nothing is there to make one."""
    if loop.serving.require_signature and key is None:
        raise SignatureRefused(
            f"{loop.name} is only published signed (serving.require_signature): name a key with --key (`trimtab keys new`)"
        )


def _passing_version(state: RegistryState, policy: Policy) -> int | None:
    """Return the version that this policy is already: a `publish` that was cut short, or repeated, goes on from there."""
    digest = policy.sha256()
    versions = (version for version in state.versions.values() if version.collected_at is None)
    passing = (version for version in versions if version.gate_verdict is Verdict.PASS)
    return next((version.number for version in passing if version.policy_sha256 == digest), None)


def _register(
    loop: LoopConfig,
    registry: Registry,
    run: Path,
    policy: Policy,
    report: GateReport,
    *,
    origin: dict[str, Any],
    override_gates: str | None,
    documents: dict[str, bytes],
) -> int:
    now = time.time()
    names, units = feature_labels(loop.environment)
    bundle = write_bundle(
        registry.bundles,
        policy=policy,
        golden=_golden(run, policy),
        gate_report=report,
        override_gates=override_gates,
        mode=loop.serving.mode,
        origin=origin,
        created_at=now,
        reference=_reference(run, policy),
        documents=documents,
        observation_names=names,
        observation_units=units,
    )
    state = registry.register(bundle, now=now)
    return max(number for number, entry in state.versions.items() if entry.digest == bundle.digest)


def _require_current(report: GateReport, loop: LoopConfig, state: RegistryState, run_id: str) -> None:
    """Raise `GateRefused` when the report answers another question than the loop file asks now."""
    if report.conditions_sha256 != _conditions_sha256(loop):
        what = "under other settings (environment, gates or serving.mode)"
    elif report.incumbent_version != state.champion:
        what = f"against {report.incumbent_version or 'nobody'}, the champion is {state.champion or 'nobody'}"
    else:
        return
    raise GateRefused(f"run {run_id} was judged {what}; run `trimtab gate --run {run_id}` again")


def _conditions_sha256(loop: LoopConfig) -> str:
    conditions = {
        "environment": loop.environment.model_dump(mode="json", exclude={"observation_names", "observation_units"}),
        "gates": loop.gates.model_dump(mode="json"),
        "min_return": _min_return(loop),
        "mode": loop.serving.mode,
    }
    return sha256_hex(canonical_json(conditions))


def _incumbent(registry: Registry, version: int) -> tuple[Contender, tuple[str, ...]]:
    """Return a version as it is served, and the scenarios that it had to pass."""
    bundle = registry.bundle(version)
    contender = Contender(bundle.policy, bundle.manifest["serving_mode"], version)
    return contender, scenario_names(bundle.gate_report.result("regression"))


def _evaluation_pool(loop: LoopConfig, policy: Policy) -> WorkerPool:
    """Return a pool, a context manager, for a policy that fits the loop file's environment; raises `ConfigError` otherwise."""
    expected = read_spaces(loop.environment).to_json()
    if policy.spaces.to_json() != expected:
        raise ConfigError(f"the policy takes and gives {policy.spaces.to_json()}, environment {loop.environment.id} {expected}")
    return WorkerPool(loop.environment, loop.training)


def _min_return(loop: LoopConfig) -> float:
    threshold = loop.gates.performance.min_return
    if threshold is None:
        assert loop.training.target_return is not None  # the loop file was refused otherwise
        return loop.training.target_return
    return threshold


def _golden_inputs(policy: Policy, episodes: Evaluation, seed: int) -> dict[str, np.ndarray]:
    obs_ND, masks_NA = golden_inputs(policy.spaces, episodes.obs_ND, episodes.masks_NA, seed=seed)
    return {"observations": obs_ND, **({} if masks_NA is None else {"masks": masks_NA})}


def _golden(run: Path, policy: Policy) -> Golden:
    """Return the golden vectors: what RLlib computed while it trained, or what our code computes for what the gates kept."""
    golden = load_golden(run)
    if golden is not None:
        return golden
    with np.load(run / GOLDEN_INPUTS, allow_pickle=False) as inputs:
        obs_ND, masks_NA = inputs["observations"], inputs.get("masks")
    return Golden(obs_ND, policy.distribution.parameters(outputs_as_trained(policy, obs_ND), masks_NA), masks_NA)


def _reference(run: Path, policy: Policy) -> Reference:
    if not (run / REFERENCE).exists():
        raise GateRefused(f"run {run.name} has no {REFERENCE}: it was judged by an earlier Trimtab; run `trimtab gate` again")
    return decode_reference((run / REFERENCE).read_bytes(), policy.spaces, str(run / REFERENCE))
