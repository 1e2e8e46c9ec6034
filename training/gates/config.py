"""Settings of the gates: section `gates:` of the loop file."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from policies.storage import NAME_PATTERN
from training.perturbations import Kind

Name = Annotated[str, Field(pattern=NAME_PATTERN.pattern + "$")]
Strengths = dict[Kind, Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PerformanceConfig(_Section):
    """Is the candidate good enough, and not worse than the incumbent?"""

    episodes: int = Field(200, ge=2, le=100_000, description="episodes of the first look: more decide more at once")
    max_episodes: int = Field(
        1000, ge=2, le=100_000, description="bigger: more looks until an interval decides; each takes longer"
    )
    min_return: float | None = Field(None, description="bigger: asks more of a candidate; null is training.target_return")
    max_regression: float = Field(0.05, ge=0, description="bigger: a candidate may lose this share of the incumbent's return")
    worst_share: float = Field(0.05, gt=0, lt=1, description="smaller: fewer episodes may be worse than `min_worst_return`")
    min_worst_return: float | None = Field(
        None, description="bigger: asks more of all but `worst_share` of the episodes; null: asks nothing of single ones"
    )

    @model_validator(mode="after")
    def _has_a_first_look(self) -> Self:
        if self.max_episodes < self.episodes:
            raise ValueError(f"max_episodes {self.max_episodes} must be at least episodes {self.episodes}")
        return self


class ConstraintConfig(_Section):
    """What a decision must not be."""

    function: str = Field(description="`module:function` taking (obs, action), true when the action is acceptable")
    max_violation_rate: float = Field(
        0.05, ge=0, lt=1, description="bigger: a larger share of decisions may violate; 0: none may"
    )
    max_unseen_rate: float = Field(
        0.02, gt=0, lt=1, description="where none may: bigger asks for fewer episodes without a violation to believe it"
    )


class CostConfig(_Section):
    """What decisions may cost on average."""

    function: str = Field(description="`module:function` taking (obs, action), a cost from 0 to `largest`")
    largest: float = Field(gt=0, description="the largest cost of one decision that there can be")
    max_mean: float = Field(ge=0, description="bigger: an episode's decisions may cost more on average")


class SafetyConfig(_Section):
    """How often does the candidate do what is forbidden, and what does it cost?"""

    constraints: tuple[ConstraintConfig, ...] | None = Field(
        None, description="what is forbidden; [] says that nothing is; null: nobody has said, and the gate does not pass"
    )
    costs: tuple[CostConfig, ...] = Field((), description="cost functions with their limits")


class RobustnessConfig(_Section):
    """Does the candidate keep its return when its sensors are bad? Kinds and strengths: `training/perturbations.py`."""

    episodes: int = Field(128, ge=2, le=100_000, description="more episodes per strength: narrower intervals, a slower gate")
    strengths: Strengths = Field({"noise": (0.05, 0.1)}, min_length=1, description="what the candidate has to bear")
    watched: Strengths = Field(
        {
            "dropout": (0.01, 0.05),
            "stuck": (0.01, 0.05),
            "delay": (1.0, 2.0),
            "drift": (0.1, 0.3),
            "worst_case": (0.01, 0.05, 0.1),
        },
        description="what is measured and shown too, without deciding anything",
    )
    min_return_ratio: float = Field(0.8, gt=0, le=1, description="bigger: less of the undisturbed return may be lost")
    max_regression: float = Field(
        0.1, ge=0, description="bigger: under each disturbance more of the incumbent's return may be lost"
    )

    @field_validator("strengths", "watched")
    @classmethod
    def _have_a_meaning(cls, value: Strengths) -> Strengths:
        for kind, strengths in value.items():
            for strength in strengths:
                if kind == "delay" and strength != round(strength):
                    raise ValueError(f"a delay of {strength:g} steps is not a whole number of them")
                if kind in ("dropout", "stuck") and strength > 1:
                    raise ValueError(f"{kind} {strength:g} is no probability")
        return value


class ScenarioConfig(_Section):
    """A rare but important situation that no version may forget."""

    name: Name
    min_return: float = Field(description="bigger: asks more of the mean return in this situation")
    episodes: int = Field(1, ge=1, le=10_000, description="more: a surer mean where the situation has chance in it")
    seed: int = Field(0, ge=0, description="of the initial states")
    reset_options: dict[str, Any] | None = Field(None, description="options of `env.reset`: how the situation begins")
    kwargs: dict[str, Any] | None = Field(None, description="keyword arguments of the environment in place of the loop's")
    environment: str | None = Field(None, description="an environment that begins in the situation, in place of the loop's")
    max_episode_steps: int | None = Field(None, ge=1, description="in place of the loop's")


class RegressionConfig(_Section):
    """Scenarios that are kept over versions."""

    scenarios: tuple[ScenarioConfig, ...] = ()
    retired: dict[str, str] = Field({}, description="scenarios that are not asked for any more, each with the reason")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [scenario.name for scenario in self.scenarios] + list(self.retired)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"scenario {twice[0]!r} is there twice")
        return self


class BudgetConfig(_Section):
    """What a policy may need to be served."""

    max_decision_ms: float = Field(20.0, gt=0, description="bigger: one decision may take longer (median, on this machine)")
    max_batch_ms: float = Field(100.0, gt=0, description="bigger: a batch of 64 may take longer (median, on this machine)")
    max_parameters: int = Field(50_000_000, ge=1, description="bigger: allows larger networks")
    max_bundle_bytes: int = Field(256 << 20, ge=1, description="bigger: takes longer to load, everywhere")


class ObjectiveConfig(_Section):
    """What is really wanted, where the reward only stands for it."""

    true_metric: str = Field(
        description="`module:function` taking an episode (obs_TD, actions_T, rewards_T): what is really wanted"
    )
    proxy: str | None = Field(None, description="the same for what training maximises; null is the return")
    max_regression: float = Field(
        0.05, ge=0, description="bigger: a candidate may lose this share of the incumbent's true metric"
    )
    min_true: float | None = Field(None, description="bigger: asks more of the mean of the true metric itself")


class GatesConfig(_Section):
    """All gates, and the confidence of each interval they decide on."""

    confidence: float = Field(0.95, gt=0.5, lt=1, description="bigger: fewer wrong verdicts, more inconclusive ones")
    seed: int = Field(1_000_003, ge=0, description="initial states of the evaluation; not those of training")
    performance: PerformanceConfig = PerformanceConfig()
    safety: SafetyConfig = SafetyConfig()
    robustness: RobustnessConfig = RobustnessConfig()
    regression: RegressionConfig = RegressionConfig()
    budget: BudgetConfig = BudgetConfig()
    objective: ObjectiveConfig | None = Field(None, description="the reward-hacking check; null: the reward is what is wanted")
    own: tuple[str, ...] = Field((), description="gates of your own, as `module:function`")
