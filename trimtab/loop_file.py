"""Read the loop file: one YAML document that says everything about one policy's loop."""

import difflib
import os
import sys
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from policies.errors import ConfigError
from policies.registry import Registry
from policies.release import ReleaseConfig
from policies.storage import DEFAULT_LOCATION, NAME_PATTERN, Storage
from policies.torch_network import trust
from policies.trust import TrustStore
from serve_app.config import ServingConfig
from training.config import EnvironmentConfig, TrainingConfig
from training.gates.config import GatesConfig
from training.tuning import TuningConfig


class FeedbackConfig(BaseModel):
    """What an outcome is: the sum of an episode's rewards, or one decision's reward where there are no episodes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outcome_range: tuple[float, float] = Field(description="wider: surely contains every outcome, but releases need more of them")
    reward_window_s: float = Field(600.0, gt=0, description="bigger: rewards may come later, the monitor remembers more")

    @field_validator("outcome_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError(f"the lower end {value[0]} must be below the upper end {value[1]}")
        return value


class LoopConfig(BaseModel):
    """A loop file. Every section has its reader in the package that uses it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    environment: EnvironmentConfig
    training: TrainingConfig = TrainingConfig()
    tuning: TuningConfig = TuningConfig()
    gates: GatesConfig = GatesConfig()
    serving: ServingConfig = ServingConfig()
    feedback: FeedbackConfig
    release: ReleaseConfig = ReleaseConfig()
    storage: str = DEFAULT_LOCATION

    @model_validator(mode="after")
    def _has_a_threshold(self) -> Self:
        if self.training.target_return is None and self.gates.performance.min_return is None:
            raise ValueError("set training.target_return, or gates.performance.min_return: the gates need a threshold")
        return self

    @model_validator(mode="after")
    def _can_be_served(self) -> Self:
        if self.training.rllib_algorithm == "DQN" and self.serving.mode != "greedy":
            raise ValueError(
                f"serving.mode {self.serving.mode!r} has no meaning for rllib:DQN: it learns the values of actions, not how "
                "probable each should be; set serving.mode to greedy"
            )
        return self

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not NAME_PATTERN.fullmatch(value):
            raise ValueError(f"{value!r} must be 1-63 of a-z 0-9 . _ - and start with a letter or digit")
        return value


def load_loop_file(path: Path, *, overrides: list[str] | None = None, storage: str | None = None) -> LoopConfig:
    """Read and check a loop file, apply `section.key=value` overrides, and make its directory importable.

    Raises `ConfigError` that names the key and, for an unknown one, those that are allowed.
    """
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"loop file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"loop file {path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"loop file {path} must be a mapping with the keys {', '.join(LoopConfig.model_fields)}")
    for override in overrides or []:
        _set(document, override)
    if storage is not None:
        document["storage"] = storage
    try:
        config = LoopConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"loop file {path}:\n" + "\n".join(_explain(problem) for problem in error.errors())) from None
    _make_importable(path.absolute().parent)
    if config.training.module is not None:
        trust(config.training.module)  # whoever runs this loop file runs that code anyway
    return config


def registry_of(loop: LoopConfig, storage: Storage) -> Registry:
    """Return the registry of the loop's policy; it gives out signed bundles only, if the loop file says so."""
    trust = TrustStore(storage.trust) if loop.serving.require_signature else None
    return Registry(storage.registry(loop.name), trust=trust)


def _make_importable(directory: Path) -> None:
    """Let `module:function` references and `module:Id-v0` environments name files beside the loop file.

    Ray's workers on this machine take the path from the environment; on other nodes the module has to be installed.
    """
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))


def _set(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is not a section")
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error


def _explain(problem: Any) -> str:
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        allowed = list(_model_at(location[:-1]).model_fields)
        close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"  {key}: unknown key; {hint}allowed: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"  {key}: this key is required"
    found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
    return f"  {key + ': ' if key else ''}{problem['msg']}{found}"


def _model_at(location: tuple[Any, ...]) -> type[BaseModel]:
    model: type[BaseModel] = LoopConfig
    for part in location:
        if str(part) not in model.model_fields:
            continue  # a key of a mapping, whose values the model describes
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model
