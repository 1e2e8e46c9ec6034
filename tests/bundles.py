"""Small real policies, bundles and registries for tests that need one but are not about how it was trained."""

from pathlib import Path

import numpy as np

from policies.bundle import Bundle, write_bundle
from policies.golden import Golden
from policies.network import Architecture, tensor_shapes
from policies.observations import Box
from policies.policy import Policy
from policies.registry import Registry, register_version, set_champion
from policies.spaces import Choices, Spaces
from policies.verdicts import REQUIRED_GATES, GateReport, GateResult, Verdict
from training.network import outputs_as_trained


def vector_spaces(num_features: int, num_actions: int, *, start: int = 0, bound_D: np.ndarray | None = None) -> Spaces:
    """Return spaces with a vector as observation, within plus and minus `bound_D` (open if None), and a Discrete action."""
    bound_D = np.full(num_features, np.inf, np.float32) if bound_D is None else bound_D
    return Spaces(Box(-bound_D, bound_D), Choices("discrete", (num_actions,), (start,), ()))


def make_policy(seed: int = 0, *, num_features: int = 4, num_actions: int = 2, hidden: tuple[int, ...] = (16, 16)) -> Policy:
    """Return a policy with random weights and an observation normaliser that is not the identity."""
    rng = np.random.default_rng(seed)
    spaces, architecture = vector_spaces(num_features, num_actions), Architecture(hidden)
    tensors = {
        name: (rng.standard_normal(shape) * 0.5).astype(np.float32) for name, shape in tensor_shapes(architecture, spaces).items()
    }
    return Policy(spaces, architecture, tensors)


def policy_on(spaces: Spaces, architecture: Architecture, seed: int = 0) -> Policy:
    """Return a policy with random weights on any spaces."""
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(architecture, spaces)
    return Policy(spaces, architecture, {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()})


def golden_as_trained(policy: Policy, masks_NA: np.ndarray | None = None) -> Golden:
    """Return golden vectors as publishing makes them: the training code's answers, one row per mask if there are masks."""
    num_rows = 32 if masks_NA is None else len(masks_NA)
    obs_ND = np.random.default_rng(7).standard_normal((num_rows, policy.spaces.num_features)).astype(np.float32)
    return Golden(obs_ND, policy.distribution.parameters(outputs_as_trained(policy, obs_ND), masks_NA), masks_NA)


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
        golden=Golden(obs_ND, policy.distributions(obs_ND)),
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
