"""Which environment a policy learns in, and with which settings."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EnvironmentConfig(BaseModel):
    """A Gymnasium environment by its id; `module:Id-v0` imports the module first, so that it can register the id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1, description="Gymnasium id, or module:id where importing the module registers the id")
    kwargs: dict[str, Any] = Field({}, description="keyword arguments of the environment's constructor")
    max_episode_steps: int | None = Field(None, ge=1, description="a bigger value lets episodes run longer before truncation")


class TrainingConfig(BaseModel):
    """Settings of PPO and of the run around it; names as in RLlib. The defaults solve CartPole-v1 on a laptop in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: float = Field(3e-3, gt=0, le=1, description="bigger learns faster and less stably")
    gamma: float = Field(0.99, ge=0, le=1, description="bigger looks further ahead and makes values noisier")
    lambda_: float = Field(
        0.95, ge=0, le=1, description="bigger trusts returns over the value function: less bias, more variance"
    )
    clip_param: float = Field(0.2, gt=0, le=1, description="bigger lets one update change the policy more")
    num_epochs: int = Field(8, ge=1, description="bigger reuses each batch more often before it is thrown away")
    minibatch_size: int = Field(1024, ge=1, description="bigger gives fewer, smoother gradient steps per epoch")
    vf_loss_coeff: float = Field(0.5, ge=0, description="bigger gives the value function more of the clipped gradient")
    entropy_coeff: float = Field(0.0, ge=0, description="bigger keeps the policy random for longer")
    grad_clip: float = Field(0.5, gt=0, description="bigger lets single gradient steps be larger")
    hidden: tuple[int, ...] = Field((64, 64), max_length=16, description="bigger networks can express more and answer slower")
    activation: Literal["tanh", "relu"] = Field("tanh", description="function between the layers")
    normalize_observations: bool = Field(False, description="learn mean and scale of each feature as a part of the policy")

    rollout_fragment_length: int = Field(64, ge=1, description="bigger collects more steps per environment between updates")
    num_envs_per_shard: int = Field(32, ge=1, description="bigger steps more environments in one vectorised call")
    num_shards: int = Field(2, ge=1, description="bigger allows more rollout workers; a changed number changes the result")
    num_env_runners: int = Field(2, ge=1, description="bigger collects on more processes; does not change the result")
    num_cpus_per_env_runner: float = Field(0.5, ge=0, description="bigger lets Ray place fewer rollout workers on a machine")

    seed: int = Field(0, ge=0, lt=2**63, description="same seed, same settings, same machine: same parameters bit for bit")
    target_return: float | None = Field(None, description="stop when the greedy policy's mean return is at least this")
    max_env_steps: int = Field(500_000, ge=1, description="stop after this many environment steps, target or not")
    evaluation_every_updates: int = Field(5, ge=1, description="bigger looks less often whether the target is reached")
    evaluation_episodes: int = Field(20, ge=1, description="bigger knows the greedy return better and takes longer")
    checkpoint_every_updates: int = Field(
        50, ge=1, description="bigger loses more after a kill; environments restart at each checkpoint"
    )
    keep_checkpoints: int = Field(3, ge=2, description="bigger keeps more generations to fall back to")

    @property
    def batch_size(self) -> int:
        """Environment steps per update, reset steps included."""
        return self.num_shards * self.num_envs_per_shard * self.rollout_fragment_length

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"hidden {list(self.hidden)} has a layer without units; each size must be at least 1")
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
