"""Recompute a logged decision from the bundle that made it, bit for bit."""

from typing import Any

from policies.distributions import seed_of
from policies.errors import NotFound
from policies.log_reader import find_decision
from policies.onnx_engine import engine_named
from policies.records import Decision
from policies.registry import Registry
from policies.storage import Storage

MAX_STEPS = 5  # of the fallback ladder


def replay(storage: Storage, policy_name: str, decision_id: str) -> dict[str, Any]:
    """Return the logged and the recomputed action and propensity, and whether they are equal in every bit.

    Raises `NotFound` for an id that is not in the log, `IntegrityError` when the bundle is not the one that was logged,
    `ConfigError` when the engine that computed it is not installed here in that version.
    """
    decision = find_decision(storage.decisions(policy_name), decision_id)
    if decision is None:
        raise NotFound(f"decision {decision_id!r} is not in {storage.decisions(policy_name)}")
    if decision.version == 0:
        raise NotFound(
            f"decision {decision_id!r} was answered by the {decision.rung} step, not by a version: {decision.fallback}"
        )
    bundle = Registry(storage.registry(policy_name)).bundle_of(decision.digest)
    policy = bundle.policy
    # Its bounds were checked when it came in, against those of the champion of that time, which may have been wider.
    spaces = policy.spaces.without_observation_bounds()
    obs_D = spaces.check_observation(decision.observation)
    mask_A = spaces.check_mask(decision.action_mask)
    engine_name = (decision.engines or {}).get(decision.version)
    engine = policy if engine_name is None else engine_named(engine_name, policy)
    parameters_P = engine.distributions(obs_D[None], None if mask_A is None else mask_A[None])[0]
    action, propensity = policy.distribution.choose(parameters_P, decision.mode, decision.seed)
    seed = _seed_of_draw(decision)
    # Under a shield the steps below the one that drew could have sent the same action: what is logged holds their share too.
    is_equal = propensity == decision.propensity or (decision.shield is not None and propensity <= decision.propensity)
    return {
        "decision_id": decision_id,
        "version": decision.version,
        "digest": decision.digest,
        "engine": engine_name or "numpy",
        "logged": {"action": decision.action, "propensity": decision.propensity, "seed": decision.seed},
        "recomputed": {"action": action, "propensity": propensity, "seed": seed},
        "equal": action == decision.action and seed == decision.seed and is_equal,
    }


def _seed_of_draw(decision: Decision) -> int:
    """Return the seed of the decision's first draw, or of the step of the ladder whose draw was sent (`serve_app.rungs`)."""
    steps = [decision.decision_id, *(f"{decision.decision_id}/{depth}" for depth in range(1, MAX_STEPS))]
    return next((seed for seed in map(seed_of, steps) if seed == decision.seed), seed_of(decision.decision_id))
