"""Split traffic between arms: sticky per unit, exact in expectation, explainable after the fact."""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from policies.errors import IntegrityError

BUCKETS = 10_000  # 0.01 % resolution, finer than any weight a release uses
MAX_HOLDOUT = 0.5  # of the units: more would be the main traffic, and is the champion's
HOLDOUT_SALT = "holdout"  # of no release: who is held out stays held out whatever is released meanwhile

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
    `held_out` is the share of units that no release reaches: the holdout's, or the champion's while the holdout is switched
    off. `shadows` answer every request too, in the background, and nobody hears them.
    """

    number: int
    release: int
    arms: tuple[Arm, ...]
    shadows: tuple[int, ...] = ()
    held_out: float = 0.0

    def __post_init__(self) -> None:
        holdout = self.arm("holdout")
        assert holdout is None or holdout.weight == self.held_out, "make plans with `with_holdout`"

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
            "shadows": list(self.shadows),
            "held_out": self.held_out,
        }

    @classmethod
    def from_json(cls, value: Any) -> "TrafficPlan":
        """Read what `to_json` wrote; raises `IntegrityError` for anything else, and for arms that do not share all traffic."""
        try:
            _require_keys(value, ("number", "release", "arms", "shadows", "held_out"))
            arms = tuple(_arm_from_json(arm) for arm in _list(value["arms"]))
            shadows = tuple(_integer(version, 1) for version in _list(value["shadows"]))
            number, release, held_out = _integer(value["number"]), _integer(value["release"]), _share(value["held_out"])
            _require_whole(arms, held_out)
        except ValueError as error:
            raise IntegrityError(f"this is no traffic plan: {error}; read {value!r:.300}") from error
        return cls(number, release, arms, shadows, held_out)


def champion_only(number: int, version: int) -> TrafficPlan:
    """Return the plan without a release: the champion answers everybody."""
    return TrafficPlan(number, 0, (Arm("champion", version, 1.0),))


def with_canary(number: int, release: int, *, champion: int, candidate: int, weight: float) -> TrafficPlan:
    """Return the plan of one release step: the canary gets `weight`, to the bucket, and the champion keeps the rest."""
    weight = to_the_bucket(weight)
    arms = (Arm("canary", candidate, weight), Arm("champion", champion, 1.0 - weight))
    return TrafficPlan(number, release, arms)


def with_holdout(plan: TrafficPlan, version: int, share: float) -> TrafficPlan:
    """Return the plan with a share of all units taken out of it and given to `version`; the others split what is left."""
    share = to_the_bucket(share)
    rest = (replace(arm, weight=arm.weight * (1.0 - share)) for arm in plan.arms)
    return replace(plan, arms=(Arm("holdout", version, share), *rest), held_out=share)


def without(plan: TrafficPlan, name: ArmName) -> TrafficPlan:
    """Return the plan with the champion in an arm's place: its units are the champion's, and go back when it comes back."""
    gone, champion = plan.arm(name), plan.arm("champion")
    if gone is None:
        return plan
    assert champion is not None and gone is not champion, "the champion's place is nobody's"
    arms = tuple(arm for arm in plan.arms if arm not in (gone, champion))
    whole = 1.0 if not arms else champion.weight + gone.weight
    return replace(plan, arms=(*arms, replace(champion, weight=whole)))


def assign(unit_id: str, plan: TrafficPlan) -> Arm:
    """Return the arm that answers this unit, see `assign_many`."""
    return plan.arms[0] if len(plan.arms) == 1 else assign_many([unit_id], plan)[0]


def assign_many(unit_ids: list[str], plan: TrafficPlan) -> list[Arm]:
    """Return the arm that answers each unit.

    A bucket depends on the unit and a salt only, so a unit keeps its arm while weights move towards it: growing the canary
    from 5 % to 25 % never takes back a unit that already has it. Who is held out is decided first, under a salt of its own.
    """
    champion, canary = plan.arms[-1], plan.arm("canary")
    arms = [champion] * len(unit_ids)
    if canary is not None:
        num_buckets = round(canary.weight / (1.0 - plan.held_out) * BUCKETS)  # of the units that are left
        arms = [canary if bucket < num_buckets else champion for bucket in buckets_of(unit_ids, plan.salt)]
    if plan.held_out:
        holdout, num_buckets = plan.arm("holdout") or champion, round(plan.held_out * BUCKETS)
        held = buckets_of(unit_ids, HOLDOUT_SALT)
        arms = [holdout if bucket < num_buckets else arm for bucket, arm in zip(held, arms)]
    return arms


def to_the_bucket(share: float) -> float:
    """Return the share of units that gets an arm which is to have this one: mixture propensities are made of what happens."""
    return round(share * BUCKETS) / BUCKETS


def buckets_of(unit_ids: list[str], salt: str) -> list[int]:
    """Return 0 … 9,999 for each from SHA-256: Python's own `hash` differs between processes and would break stickiness."""
    prefix, sha256, from_bytes = f"{salt}\0".encode(), hashlib.sha256, int.from_bytes
    return [from_bytes(sha256(prefix + unit_id.encode()).digest()[:8]) % BUCKETS for unit_id in unit_ids]


def _arm_from_json(value: Any) -> Arm:
    _require_keys(value, ("name", "version", "weight"))
    if value["name"] not in get_args(ArmName):
        raise ValueError(f"{value['name']!r} is no arm")
    return Arm(value["name"], _integer(value["version"], 1), _share(value["weight"]))


def _require_whole(arms: tuple[Arm, ...], held_out: float) -> None:
    names = [arm.name for arm in arms]
    if names[-1:] != ["champion"] or len(set(names)) != len(names):
        raise ValueError(f"arms are {names}, expected each at most once and the champion last")
    if not math.isclose(sum(arm.weight for arm in arms), 1.0):
        raise ValueError(f"weights add up to {sum(arm.weight for arm in arms)}, not to 1")
    if held_out > MAX_HOLDOUT or any(arm.weight != held_out for arm in arms if arm.name == "holdout"):
        raise ValueError(f"{held_out:g} of the units are held out, expected the holdout's weight and at most {MAX_HOLDOUT:g}")


def _require_keys(value: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise ValueError(f"expected an object with the keys {', '.join(keys)}")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r:.100} is no list")
    return value


def _integer(value: Any, minimum: int = 0) -> int:
    if type(value) is not int or value < minimum:
        raise ValueError(f"{value!r} is no integer from {minimum} on")
    return value


def _share(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is no share between 0 and 1")
    return float(value)
