"""What every gate is given, and how a gate asks for episodes.

A gate is a generator: it yields the evaluations that it needs, is sent what came of them, as often as it likes, and returns
its result. So no gate waits for another, their episodes run together on all rollout workers, and a test can answer instead.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from policies.distributions import Mode
from policies.policy import Policy
from policies.verdicts import GateResult
from training.config import EnvironmentConfig
from training.evaluation import Evaluation, EvaluationRequest
from training.gates.config import GatesConfig

GateRun = Generator[list[EvaluationRequest], list[Evaluation], GateResult]
Gate = Callable[["GateContext"], GateRun]


@dataclass(frozen=True)
class Contender:
    """A policy in the mode in which it is served; `version` is None for one that is not registered."""

    policy: Policy
    mode: Mode
    version: int | None = None


@dataclass(frozen=True)
class GateContext:
    """What is judged, against whom, and under which settings. `known_scenarios` are those that the incumbent had to pass."""

    candidate: Contender
    incumbent: Contender | None
    environment: EnvironmentConfig
    config: GatesConfig
    min_return: float
    known_scenarios: tuple[str, ...] = ()
    _asked: dict[Any, EvaluationRequest] = field(default_factory=dict, repr=False)

    @property
    def contenders(self) -> list[Contender]:
        return [self.candidate] if self.incumbent is None else [self.candidate, self.incumbent]

    def episodes(self, contender: Contender, num_episodes: int, *, first_chunk: int = 0) -> EvaluationRequest:
        """Return the request for undisturbed episodes; asked for by several gates, they are run once.

        Steps are kept of the first ones only, and of the incumbent's where a metric needs them: they fill memory.
        """
        key = (id(contender), num_episodes, first_chunk)
        if key not in self._asked:
            keep_steps = first_chunk == 0 and (contender is self.candidate or self.config.objective is not None)
            self._asked[key] = EvaluationRequest(
                contender.policy, num_episodes, self.config.seed, contender.mode, first_chunk, keep_steps=keep_steps
            )
        return self._asked[key]

    def first_look(self, contender: Contender) -> EvaluationRequest:
        """Return the request that most gates begin with."""
        return self.episodes(contender, self.config.performance.episodes)
