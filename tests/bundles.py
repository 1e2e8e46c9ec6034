"""Small real policies, bundles and registries for tests that need one but are not about how it was trained."""

from pathlib import Path

import numpy as np

from policies.bundle import Bundle, Golden, write_bundle
from policies.policy import Architecture, Policy, tensor_shapes
from policies.registry import Registry, register_version, set_champion
from policies.spaces import Spaces
from policies.verdicts import REQUIRED_GATES, GateReport, GateResult, Verdict


def make_policy(seed: int = 0, *, num_features: int = 4, num_actions: int = 2, hidden: tuple[int, ...] = (16, 16)) -> Policy:
    """Return a policy with random weights and an observation normaliser that is not the identity."""
    rng = np.random.default_rng(seed)
    open_D = np.full(num_features, np.inf, np.float32)
    spaces, architecture = Spaces(-open_D, open_D, num_actions), Architecture(hidden)
    tensors = {
        name: (rng.standard_normal(shape) * 0.5).astype(np.float32) for name, shape in tensor_shapes(architecture, spaces).items()
    }
    return Policy(spaces, architecture, tensors)


def make_report(policy: Policy, verdict: Verdict = Verdict.PASS) -> GateReport:
    """Return a report in which every required gate says `verdict`."""
    results = tuple(GateResult(gate, verdict, f"says {verdict}", {}) for gate in REQUIRED_GATES)
    return GateReport(policy.sha256(), "conditions", 1.0, None, results)


def make_bundle(parent: Path, policy: Policy, *, verdict: Verdict = Verdict.PASS, override_gates: str | None = None) -> Bundle:
    """Write a bundle whose golden vectors the policy itself gives."""
    obs_ND = np.random.default_rng(7).standard_normal((32, policy.spaces.num_features)).astype(np.float32)
    return write_bundle(
        parent,
        policy=policy,
        golden=Golden(obs_ND, policy.probabilities(obs_ND)),
        gate_report=make_report(policy, verdict),
        override_gates=override_gates,
        mode="greedy",
        origin={"test": True},
        created_at=1.0,
    )


def make_registry(root: Path, *, num_versions: int = 1) -> Registry:
    """Return a registry with versions 1 … n of different policies; version 1 is champion."""
    registry = Registry(root)
    for seed in range(num_versions):
        bundle = make_bundle(registry.bundles, make_policy(seed))
        registry.append(lambda state, bundle=bundle: register_version(state, bundle), now=float(seed))
    registry.append(lambda state: set_champion(state, 1, "first version"), now=100.0)
    return registry
