"""Settings of the gates: section `gates:` of the loop file."""

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PerformanceConfig(_Section):
    """Is the candidate good enough, and not worse than the incumbent?"""

    episodes: int = Field(200, ge=2, le=100_000, description="more episodes: a narrower interval, a slower gate")
    min_return: float | None = Field(None, description="bigger: asks more of a candidate; null is training.target_return")
    max_regression: float = Field(0.05, ge=0, description="bigger: a candidate may lose this share of the incumbent's return")


class SafetyConfig(_Section):
    """How often does the candidate do what the constraint function forbids?"""

    constraint: str | None = Field(None, description="`module:function` taking (obs, action), true when the action is acceptable")
    max_violation_rate: float = Field(0.05, gt=0, lt=1, description="bigger: a larger share of decisions may violate")


class RobustnessConfig(_Section):
    """Does the candidate keep its return when its sensors are noisy?"""

    episodes: int = Field(50, ge=2, le=100_000, description="more episodes per level: a narrower interval, a slower gate")
    noise_levels: tuple[float, ...] = Field((0.05, 0.1), min_length=1, description="noise as a share of each feature's spread")
    min_return_ratio: float = Field(0.8, gt=0, le=1, description="bigger: less of the noise-free return may be lost")


class GatesConfig(_Section):
    """All gates, and the confidence of each interval they decide on."""

    confidence: float = Field(0.95, gt=0.5, lt=1, description="bigger: fewer wrong verdicts, more inconclusive ones")
    seed: int = Field(1_000_003, ge=0, description="initial states of the evaluation; not those of training")
    performance: PerformanceConfig = PerformanceConfig()
    safety: SafetyConfig = SafetyConfig()
    robustness: RobustnessConfig = RobustnessConfig()
