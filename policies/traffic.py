"""Split traffic between arms: sticky per unit, exact in expectation, explainable after the fact."""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

BUCKETS = 10_000  # 0.01 % resolution, finer than any weight a release uses

ArmName = Literal["holdout", "canary", "champion"]


@dataclass(frozen=True)
class Arm:
    """A share of traffic: `weight` in [0, 1] of the units is answered by `version`; all weights of a plan add up to 1."""

    name: ArmName
    version: int
    weight: float


@dataclass(frozen=True)
class TrafficPlan:
    """Who answers whom. `number` is the journal entry that made the plan, so it only ever grows.

    `release` is the number of the release in progress, 0 when there is none. The salt is the same for all steps of a
    release and another for the next one: growth is sticky, and it is not always the same users who get the canary.
    Who is held out does not depend on releases. `shadows` answer every request too, in the background, and nobody hears them.
    """

    number: int
    release: int
    arms: tuple[Arm, ...]
    shadows: tuple[int, ...] = ()

    @property
    def salt(self) -> str:
        return f"release-{self.release}"

    def arm(self, name: ArmName) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "release": self.release,
            "arms": [{"name": arm.name, "version": arm.version, "weight": arm.weight} for arm in self.arms],
        }


def champion_only(number: int, version: int) -> TrafficPlan:
    """Return the plan without a release: the champion answers everybody."""
    return TrafficPlan(number, 0, (Arm("champion", version, 1.0),))


def with_canary(number: int, release: int, *, champion: int, candidate: int, weight: float) -> TrafficPlan:
    """Return the plan of one release step: the canary gets `weight`, the champion keeps the rest."""
    arms = (Arm("canary", candidate, weight), Arm("champion", champion, 1.0 - weight))
    return TrafficPlan(number, release, arms)


def assign(unit_id: str, plan: TrafficPlan) -> Arm:
    """Return the arm that answers this unit.

    The bucket depends on the unit and the plan's salt only, so a unit keeps its arm while weights move towards it:
    growing the canary from 5 % to 25 % never takes back a unit that already has it.
    """
    bucket = bucket_of(unit_id, plan.salt)
    upper = 0.0
    for arm in plan.arms:  # canary first: its share only grows at its far end
        upper += arm.weight * BUCKETS
        if bucket < round(upper):
            return arm
    return plan.arms[-1]


def bucket_of(unit_id: str, salt: str) -> int:
    """Return 0 … 9,999 from SHA-256: Python's own `hash` differs between processes and would break stickiness."""
    digest = hashlib.sha256(f"{salt}\0{unit_id}".encode()).digest()
    return int.from_bytes(digest[:8]) % BUCKETS
