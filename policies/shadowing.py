"""What a shadow would have answered, beside what was sent: the record that is written of it."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from policies.distributions import Categorical, Distribution, Mode
from policies.records import Shadow


def shadow_records(
    decision_ids: list[str],
    seeds: list[int],
    sent_actions: list[Any],
    parameters_BP: np.ndarray,
    *,
    version: int,
    digest: str,
    mode: Mode,
    distribution: Distribution,
    now: float,
) -> list[Shadow]:
    """Return what a version with these distributions would have done in each decision's place, with the same random numbers."""
    what: dict[str, Any] = {"version": version, "digest": digest, "mode": mode, "now": now}
    is_usable_B = np.isfinite(parameters_BP).all(axis=1)
    if not is_usable_B.all():
        failure = f"version {version} gave NaN"
        records = [failed_shadow(name, failure=failure, **what) for name in decision_ids]
        usable = np.flatnonzero(is_usable_B).tolist()
        columns = ([column[row] for row in usable] for column in (decision_ids, seeds, sent_actions))
        answered = shadow_records(*columns, parameters_BP[usable], distribution=distribution, **what) if usable else []
        for row, record in zip(usable, answered):
            records[row] = record
        return records
    actions, propensities = distribution.choose_many(parameters_BP, mode, seeds)
    sent: Iterable[float | None] = itertools.repeat(None)
    if isinstance(distribution, Categorical):
        sent = distribution.propensity_many(sent_actions, parameters_BP, mode)
    each = zip(decision_ids, parameters_BP.tolist(), actions, propensities, sent_actions, sent)
    return [
        Shadow(name, now, version, digest, mode, parameters, action, propensity, None, action == sent_action, sent_propensity)
        for name, parameters, action, propensity, sent_action, sent_propensity in each
    ]


def failed_shadow(decision_id: str, *, version: int, digest: str, mode: Mode, failure: str, now: float) -> Shadow:
    """Return the record of a version that gave no answer."""
    what = {"decision_id": decision_id, "time_s": now, "version": version, "digest": digest, "mode": mode}
    return Shadow(**what, distribution=None, action=None, propensity=None, failure=failure)
