"""Which environment a policy learns in, and with which settings."""

import difflib
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from policies.network import Convolution
from policies.spaces import MAX_HISTORY

# A constant, or points (env steps, value) between which the value runs in straight lines, as RLlib writes a schedule.
Schedule = float | tuple[tuple[int, float], ...]

OWN_ALGORITHM = "ppo"
RLLIB_PREFIX = "rllib:"
RLLIB_OFFLINE = ("BC", "MARWIL", "CQL", "IQL")  # learn from recorded episodes, never from the environment
RLLIB_ALGORITHMS = ("PPO", "APPO", "IMPALA", "DQN", "SAC", *RLLIB_OFFLINE)


class EnvironmentConfig(BaseModel):
    """A Gymnasium environment by its id, or whatever a function makes.

    `module:Id-v0` imports the module first, so that it can register the id; `module:factory` calls the function (or class)
    with `kwargs`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1, description="Gymnasium id, module:id that importing registers, or module:factory")
    kwargs: dict[str, Any] = Field({}, description="keyword arguments of the environment's constructor")
    max_episode_steps: int | None = Field(None, ge=1, description="a bigger value lets episodes run longer before truncation")
    vectorization: Literal["auto", "sync", "async"] = Field(
        "auto", description="auto: the environment's own vectorisation or sync; async: a process per environment, for slow ones"
    )
    history: int = Field(
        1, ge=1, le=MAX_HISTORY, description="bigger lets the policy look at more of the last observations; 1: at the newest only"
    )
    observation_names: tuple[str, ...] = Field((), description="a name per feature of an observation, for people and monitors")
    observation_units: tuple[str, ...] = Field((), description="a unit per feature; an empty one where there is none")


class TrainingConfig(BaseModel):
    """Settings of PPO and of the run around it; names as in RLlib. The defaults solve CartPole-v1 on a laptop in seconds.

    With `algorithm: rllib:<NAME>` RLlib trains instead. Which of these settings it then gets, and which are refused, is said in
    `actors/rllib_settings.py`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: str = Field(OWN_ALGORITHM, description=f"ppo: ours; or rllib: with one of {', '.join(RLLIB_ALGORITHMS)}")
    rllib: dict[str, Any] = Field({}, description="RLlib's own settings by its own names, where algorithm is rllib:<NAME>")

    lr: Schedule = Field(3e-3, description="bigger learns faster and less stably; or [[env steps, value], …]")
    gamma: float = Field(0.99, ge=0, le=1, description="bigger looks further ahead and makes values noisier")
    lambda_: float = Field(
        0.95, ge=0, le=1, description="bigger trusts returns over the value function: less bias, more variance"
    )
    clip_param: Schedule = Field(0.2, description="bigger lets one update change the policy more; or a schedule as lr")
    num_epochs: int = Field(8, ge=1, description="bigger reuses each batch more often before it is thrown away")
    minibatch_size: int = Field(1024, ge=1, description="bigger gives fewer, smoother gradient steps per epoch")
    kl_target: float | None = Field(
        None, gt=0, description="bigger lets an update go on for longer: it ends at 1.5 times this KL"
    )
    vf_loss_coeff: float = Field(0.5, ge=0, description="bigger gives the value function more of the clipped gradient")
    vf_clip_param: float | None = Field(None, gt=0, description="bigger lets one update change a value more; null: not limited")
    entropy_coeff: Schedule = Field(0.0, description="bigger keeps the policy random for longer; or a schedule as lr")
    grad_clip: float = Field(0.5, gt=0, description="bigger lets single gradient steps be larger")
    normalize_advantages: bool = Field(True, description="scale each minibatch's advantages to mean 0 and deviation 1")
    normalize_rewards: bool = Field(False, description="divide rewards by the running deviation of their discounted sum")

    hidden: tuple[int, ...] = Field((64, 64), max_length=16, description="bigger networks can express more and answer slower")
    conv_filters: tuple[Convolution, ...] = Field(
        (), max_length=16, description="[filters, kernel, stride] per convolution over an image, before the hidden layers"
    )
    module: str | None = Field(
        None, description="`module:function` that makes a torch network of your own, in place of all layers"
    )
    module_kwargs: dict[str, Any] = Field({}, description="keyword arguments of that function")
    activation: Literal["tanh", "relu"] = Field("tanh", description="function between the layers")
    vf_share_layers: bool = Field(False, description="value function and policy share all layers but the last")
    action_squashing: Literal["clip", "tanh"] = Field("clip", description="how real-valued actions are kept in their bounds")
    initial_log_std: float = Field(0.0, ge=-10, le=2, description="bigger: real-valued actions begin more random")
    normalize_observations: bool = Field(False, description="learn mean and scale of each feature as a part of the policy")

    # At least 2: of two steps in a row one at most is a reset step, so there is always something to learn from.
    rollout_fragment_length: int = Field(64, ge=2, description="bigger collects more steps per environment between updates")
    num_envs_per_shard: int = Field(32, ge=1, description="bigger steps more environments in one vectorised call")
    num_shards: int = Field(2, ge=1, description="bigger allows more rollout workers; a changed number changes the result")
    num_env_runners: int = Field(2, ge=1, description="bigger collects on more processes; does not change the result")
    num_cpus_per_env_runner: float = Field(0.5, ge=0, description="bigger lets Ray place fewer rollout workers on a machine")
    max_staleness: int = Field(
        0, ge=0, le=16, description="bigger collects further ahead of learning: faster, from older weights; 0 takes turns"
    )
    worker_timeout_s: float = Field(
        120.0, gt=0, description="bigger waits longer for a fragment before its environment counts as hanging"
    )

    seed: int = Field(0, ge=0, lt=2**63, description="same seed, same settings, same machine: same parameters bit for bit")
    target_return: float | None = Field(None, description="stop when the greedy policy's mean return is at least this")
    max_env_steps: int = Field(500_000, ge=1, description="stop after this many environment steps, target or not")
    patience: int | None = Field(None, ge=1, description="stop after this many evaluations in a row without a better one")
    evaluation_every_updates: int = Field(5, ge=1, description="bigger looks less often whether the target is reached")
    evaluation_episodes: int = Field(20, ge=1, description="bigger knows the greedy return better and takes longer")
    checkpoint_every_updates: int = Field(
        50, ge=1, description="bigger loses more after a kill; environments restart at each checkpoint"
    )
    keep_checkpoints: int = Field(3, ge=2, description="bigger keeps more generations to fall back to")

    @property
    def rllib_algorithm(self) -> str | None:
        """Name of the RLlib algorithm that trains, or None when ours does."""
        return self.algorithm.removeprefix(RLLIB_PREFIX) if self.algorithm != OWN_ALGORITHM else None

    @property
    def batch_size(self) -> int:
        """Environment steps per update, reset steps included."""
        return self.num_shards * self.num_envs_per_shard * self.rollout_fragment_length

    @field_validator("lr", "clip_param", "entropy_coeff")
    @classmethod
    def _is_a_schedule(cls, schedule: Schedule, info: Any) -> Schedule:
        values = [schedule] if isinstance(schedule, float) else [value for _, value in schedule]
        steps = [] if isinstance(schedule, float) else [step for step, _ in schedule]
        if not values or steps != sorted(set(steps)):
            raise ValueError(
                f"{list(schedule)} must be points [env steps, value] with growing env steps, such as [[0, 0.001], [100000, 0]]"
            )
        low, high = (0.0, float("inf")) if info.field_name == "entropy_coeff" else (0.0, 1.0)
        if not all(low <= value <= high for value in values) or (info.field_name != "entropy_coeff" and max(values) == 0):
            raise ValueError(f"{values} must be between {low:g} and {high:g}")
        return schedule

    @field_validator("algorithm")
    @classmethod
    def _is_an_algorithm(cls, algorithm: str) -> str:
        known = [OWN_ALGORITHM, *(RLLIB_PREFIX + name for name in RLLIB_ALGORITHMS)]
        if algorithm not in known:
            bare = algorithm.lower().removeprefix(RLLIB_PREFIX)
            same = [name for name in known if name.lower().removeprefix(RLLIB_PREFIX) == bare]
            close = same[-1:] or difflib.get_close_matches(algorithm, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{algorithm!r} is not one of {', '.join(known)}{hint}")
        return algorithm

    @model_validator(mode="after")
    def _has_settings_of_its_algorithm(self) -> Self:
        if self.rllib and self.rllib_algorithm is None:
            raise ValueError(f"rllib {sorted(self.rllib)} is for algorithm rllib:<NAME>, but the algorithm is {self.algorithm!r}")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.module is not None and (self.conv_filters or self.vf_share_layers):
            raise ValueError("module takes the place of all layers; leave conv_filters and vf_share_layers away")
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"hidden {list(self.hidden)} has a layer without units; each size must be at least 1")
        if self.rllib_algorithm is not None:
            return self  # RLlib has no shards, and batches of its own
        if self.num_env_runners > self.num_shards:
            raise ValueError(
                f"num_env_runners {self.num_env_runners} is larger than num_shards {self.num_shards}, so workers would have "
                f"nothing to do; set num_env_runners <= {self.num_shards} or num_shards >= {self.num_env_runners}"
            )
        if self.minibatch_size > self.batch_size:
            per_step = self.num_shards * self.num_envs_per_shard
            raise ValueError(
                f"minibatch_size {self.minibatch_size} is larger than the batch of {self.batch_size} steps (num_shards "
                f"{self.num_shards} x num_envs_per_shard {self.num_envs_per_shard} x rollout_fragment_length "
                f"{self.rollout_fragment_length}); set minibatch_size <= {self.batch_size} or rollout_fragment_length >= "
                f"{-(-self.minibatch_size // per_step)}"
            )
        return self


def value_at(schedule: Schedule, env_steps: int) -> float:
    """Return a schedule's value after so many environment steps; before the first and behind the last point it is theirs."""
    if isinstance(schedule, float):
        return schedule
    steps, values = zip(*schedule)
    after = next((index for index, step in enumerate(steps) if step > env_steps), len(steps))
    if after in (0, len(steps)):
        return values[min(after, len(steps) - 1)]
    share = (env_steps - steps[after - 1]) / (steps[after] - steps[after - 1])
    return values[after - 1] + share * (values[after] - values[after - 1])
