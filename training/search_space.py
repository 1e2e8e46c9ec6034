"""Which values a search may give a setting: drawn at random, moved a little, and placed on a line for a picture."""

import math
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from training.config import TrainingConfig

RESAMPLE_PROBABILITY = 0.25  # of a perturbation; the rest move: what Ray Tune and the PBT paper do
STEP = 0.1  # of a domain's length; 0.1 of two decades is a factor of 1.6
SIGNIFICANT_DIGITS = 4  # of a drawn value: it can be written down and gives the same run


class Domain(BaseModel):
    """The values that a search may give one setting: exactly one of the three."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    log_uniform: tuple[float, float] | None = Field(None, description="[low, high], every decade equally likely")
    uniform: tuple[float, float] | None = Field(None, description="[low, high], every value equally likely")
    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="these values; neighbours are tried after each other")

    @model_validator(mode="after")
    def _is_one_domain(self) -> Self:
        if sum(kind is not None for kind in (self.log_uniform, self.uniform, self.choice)) != 1:
            raise ValueError("give exactly one of log_uniform: [low, high], uniform: [low, high], choice: [value, …]")
        if self.ends is not None and not self.ends[0] < self.ends[1]:
            raise ValueError(f"the lower end {self.ends[0]:g} must be below the upper end {self.ends[1]:g}")
        if self.is_log and self.ends[0] <= 0:
            raise ValueError(f"log_uniform needs ends above 0, not {self.ends[0]:g}")
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """The range of numbers, or None for a choice."""
        return self.uniform or self.log_uniform

    @property
    def is_log(self) -> bool:
        return self.log_uniform is not None

    def at(self, position: float) -> Any:
        """Return the value at a place between 0 and 1."""
        if self.choice is not None:
            return self.choice[min(int(position * len(self.choice)), len(self.choice) - 1)]
        low, high = map(self._scale, self.ends)
        value = low + position * (high - low)
        rounded = float(f"{math.exp(value) if self.is_log else value:.{SIGNIFICANT_DIGITS}g}")
        return min(max(rounded, self.ends[0]), self.ends[1])

    def position(self, value: Any) -> float:
        """Return the place of a value between 0 and 1; of a choice, the middle of its share."""
        if self.choice is not None:
            return (self.choice.index(value) + 0.5) / len(self.choice)
        low, high = map(self._scale, self.ends)
        return (self._scale(value) - low) / (high - low)

    def moved(self, value: Any, *, up: bool) -> Any:
        """Return the neighbour of a value, or the value itself at the end: the next choice, or a tenth of the range away."""
        step = STEP if self.choice is None else 1 / len(self.choice)
        return self.at(min(max(self.position(value) + (step if up else -step), 0.0), 1.0))

    def _scale(self, value: float) -> float:
        return math.log(value) if self.is_log else value


def domain_of(setting: str, domain: Domain) -> Domain:
    """Return the domain with its choices as the setting's own JSON; raises `ValueError` for a value the setting cannot have.

    Rules between settings are not checked here: they need a whole drawn combination.
    """
    field = TrainingConfig.model_fields[setting]
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])
    low, high = domain.ends or (0.0, 0.0)
    # A place inside as well: a setting of whole numbers accepts 4.0 and 16.0 as ends, but not what is drawn between them.
    values = domain.choice if domain.choice is not None else (low, high, low + (high - low) / math.pi)
    try:
        checked = [adapter.dump_python(adapter.validate_python(value), mode="json") for value in values]
    except ValidationError as error:
        problem = error.errors()[0]
        remedy = "" if domain.choice is not None else "; write the values to try as choice: [value, …]"
        raise ValueError(f"{setting}: {problem['msg']} (found {problem['input']!r}){remedy}") from None
    return domain if domain.choice is None else Domain(choice=tuple(checked))


def draw(space: dict[str, Domain], rng: np.random.Generator) -> dict[str, Any]:
    """Return one value for each setting."""
    return {setting: domain.at(rng.random()) for setting, domain in space.items()}


def perturb(space: dict[str, Domain], parameters: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Return other values near these: each is moved up or down, and now and then drawn afresh."""
    perturbed = dict(parameters)
    for setting, domain in space.items():
        is_drawn, position, up = rng.random() < RESAMPLE_PROBABILITY, rng.random(), bool(rng.integers(2))
        perturbed[setting] = domain.at(position) if is_drawn else domain.moved(parameters[setting], up=up)
    return perturbed
