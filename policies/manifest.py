"""What a manifest says of a policy for people and for runtimes that are not ours: how observations become a distribution."""

from collections.abc import Sequence
from typing import Any

from policies.errors import IntegrityError
from policies.policy import Policy
from policies.spaces import Choices, Spaces


def describe_policy(policy: Policy) -> dict[str, Any]:
    """Return the normaliser and the action distribution, as JSON values.

    Everything follows from the network and the spaces; whoever reads a bundle compares, so that the two cannot differ.
    """
    return {"normaliser": _normaliser(policy), "action_distribution": _action_distribution(policy)}


def describe_spaces(spaces: Spaces, *, names: Sequence[str] = (), units: Sequence[str] = ()) -> dict[str, Any]:
    """Return the spaces with the names and units of the features, where given; raises `IntegrityError` for a wrong number."""
    described = spaces.to_json()
    described |= {key: list(labels) for key, labels in (("names", names), ("units", units)) if labels}
    require_labels(described, spaces)
    return described


def require_labels(described: dict[str, Any], spaces: Spaces) -> None:
    """Raise `IntegrityError` unless names and units are absent or there is a text for every feature."""
    for key in ("names", "units"):
        labels = described.get(key)
        if labels is None:
            continue
        are_texts = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        if not are_texts or len(labels) != spaces.num_features:
            raise IntegrityError(
                f"manifest.json: spaces.{key} is {labels!s:.200}, expected {spaces.num_features} texts, one per feature"
            )


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
