"""What rows of a batch are answered: one row at a time, or a whole batch as columns."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from policies.distributions import Mode
from policies.errors import ServiceUnavailable
from policies.records import per_row


class Answer(NamedTuple):
    """One row's decision. `parameters_P` is the distribution of the version that answered, where somebody wants to see it."""

    arm: str
    version: int
    digest: str
    mode: Mode
    seed: int
    action: Any
    propensity: float
    mixture_propensity: float
    rung: str
    fallback: str | None
    shield: str | None
    parameters_P: np.ndarray | None


class Answers(NamedTuple):
    """The decisions of many rows as columns: an object per row costs more than the network. Not empty.

    A list has an item per row; what is no list is the same for all. `mixture_propensities` is None where the plan has one arm and
    they are the propensities. `parameters` are the rows' distributions, where somebody wants to see them.
    """

    arms: str | list[str]
    versions: int | list[int]
    digests: dict[int, str]
    modes: Mode | list[Mode]
    seeds: list[int]
    actions: list[Any]
    propensities: list[float]
    mixture_propensities: list[float] | None
    rungs: str | list[str] = "arm"
    fallbacks: list[str | None] | None = None
    shields: list[str | None] | None = None
    parameters: Sequence[np.ndarray | None] | None = None

    @classmethod
    def of(cls, answers: list[Answer]) -> "Answers":
        """Return the columns of rows."""
        arms, versions, digests, modes, seeds, actions, propensities, mixtures, rungs, fallbacks, shields, parameters = (
            list(column) for column in zip(*answers)
        )
        return cls(
            same(arms),
            same(versions),
            dict(zip(versions, digests)),
            same(modes),
            seeds,
            actions,
            propensities,
            mixtures,
            same(rungs),
            fallbacks if any([value is not None for value in fallbacks]) else None,
            shields if any([value is not None for value in shields]) else None,
            parameters if any([value is not None for value in parameters]) else None,
        )

    def each(self) -> list[Answer]:
        """Return the rows."""
        digests = self.digests[self.versions] if isinstance(self.versions, int) else [self.digests[v] for v in self.versions]
        columns = (
            per_row(self.arms),
            per_row(self.versions),
            per_row(digests),
            per_row(self.modes),
            self.seeds,
            self.actions,
            self.propensities,
            self.propensities if self.mixture_propensities is None else self.mixture_propensities,
            per_row(self.rungs),
            per_row(self.fallbacks),
            per_row(self.shields),
            itertools.repeat(None) if self.parameters is None else self.parameters,
        )
        return [Answer(*row) for row in zip(*columns)]


def put_together(places: list[list[int]], parts: list[Answers]) -> Answers:
    """Return the answers of parts of a batch, each at its places."""
    found: dict[int, Answer] = {}
    for chosen, answers in zip(places, parts):
        found |= zip(chosen, answers.each())
    return Answers.of([found[row] for row in range(len(found))])


# What a batch is answered: columns where every row has an answer of its own arm, else row by row, or why there is none.
Decided = Answers | list[Answer | ServiceUnavailable]


def sorted_out(decided: Decided) -> tuple[Answers | None, dict[int, ServiceUnavailable]]:
    """Return the columns of the rows that have an answer, and why the others have none, by row."""
    if isinstance(decided, Answers):
        return decided, {}
    found = [answer for answer in decided if isinstance(answer, Answer)]
    errors = {row: answer for row, answer in enumerate(decided) if not isinstance(answer, Answer)}
    return Answers.of(found) if found else None, errors


def if_learnable(answer: Answer) -> Answer | ServiceUnavailable:
    """Return the answer, unless its propensity cannot be written down: densities of hundreds of narrow components."""
    if 0 < answer.propensity < math.inf and 0 < answer.mixture_propensity < math.inf:
        return answer
    return ServiceUnavailable(
        f"the action's propensity is {answer.propensity:g}, and {answer.mixture_propensity:g} over all arms: nothing can be "
        "learned from that; serve this policy greedily"
    )


def same(values: list[Any]) -> Any:
    """Return the one value that all are, or else the list."""
    return values[0] if len(set(values)) == 1 else values
