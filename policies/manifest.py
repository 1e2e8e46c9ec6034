"""What a manifest says of a policy, for people and for runtimes that are not ours: what goes in, what comes out, and how."""

from collections.abc import Sequence
from typing import Any

from policies.errors import IntegrityError
from policies.integrity import canonical_json
from policies.policy import Policy
from policies.spaces import Choices, Spaces

LABELS = ("names", "units")


def describe(policy: Policy, *, names: Sequence[str] = (), units: Sequence[str] = ()) -> dict[str, Any]:
    """Return spaces, network, normaliser and action distribution as JSON values.

    `names` and `units` are those of the features, or nothing; raises `IntegrityError` for a wrong number of them.
    """
    labels = {key: list(values) for key, values in zip(LABELS, (names, units)) if values}
    _require_labels(labels, policy.spaces)
    return {
        "spaces": {**policy.spaces.to_json(), **labels},
        "network": policy.architecture.to_json(),
        "normaliser": _normaliser(policy),
        "action_distribution": _action_distribution(policy),
    }


def require_description(manifest: dict[str, Any], policy: Policy) -> None:
    """Raise `IntegrityError` unless a manifest says of a policy what we say of it, so that nobody who reads it is misled."""
    labels = {key: manifest["spaces"][key] for key in LABELS if key in manifest["spaces"]}
    _require_labels(labels, policy.spaces)
    for key, expected in describe(policy).items():
        found = manifest[key]
        if key == "spaces":
            found = {name: value for name, value in found.items() if name not in labels}
        if canonical_json(found) != canonical_json(expected):  # as JSON: to Python 1, 1.0 and true are equal
            raise IntegrityError(f"{key} is {found!s:.200}, but the policy's is {expected!s:.200}")


def _require_labels(labels: dict[str, Any], spaces: Spaces) -> None:
    for key, values in labels.items():
        are_texts = isinstance(values, list) and all(isinstance(value, str) for value in values)
        if not are_texts or len(values) != spaces.num_features:
            raise IntegrityError(f"spaces.{key} is {values!s:.200}, expected {spaces.num_features} texts, one per feature")


def _normaliser(policy: Policy) -> dict[str, Any]:
    is_identity = not policy.tensors["normaliser.mean"].any() and (policy.tensors["normaliser.scale"] == 1).all()
    kind = {"kind": "none"} if is_identity else {"kind": "mean_scale", "formula": "(x - mean) * scale"}
    return {**kind, "clip": policy.architecture.observation_clip}


def _action_distribution(policy: Policy) -> dict[str, Any]:
    action, head = policy.spaces.action, policy.architecture.gaussian
    if isinstance(action, Choices):
        return {"kind": "categorical", "nvec": list(action.nvec)}
    assert head is not None, "real-valued actions need a Gaussian head"
    return {"kind": "normal", "size": action.num_components, **head.to_json()}
