"""What the `serving` section of the loop file may say."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.engines import EngineSetting


class ShieldConfig(BaseModel):
    """Which actions may be sent. What a version wants beyond that is replaced by what the next step of the ladder wants."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: Any = Field(None, description="a number, or nested lists in the action's shape; higher: more actions are replaced")
    high: Any = Field(None, description="as `low`; lower: more actions are replaced")
    constraints: tuple[str, ...] = Field(
        (), description="`module:function` taking (features, action), true when the action is acceptable"
    )

    @property
    def is_on(self) -> bool:
        return self.low is not None or self.high is not None or bool(self.constraints)


class FallbackConfig(BaseModel):
    """Who answers when the arm's version cannot: always the champion, then the previous champion; then what is named here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repair: tuple[Literal["clip", "missing"], ...] = Field(
        (), description="clip: numbers outside of the space are cut to its bounds; missing: null is replaced by `fill`"
    )
    fill: float = Field(0.0, allow_inf_nan=False, description="what stands for a missing number")
    rule: str | None = Field(None, description="`module:function` taking (features, action mask or None), an action")
    action: Any = Field(None, description="the action that is sent when nobody else can answer")
    slow_ms: float = Field(250.0, gt=0, description="bigger: a version may take longer before its answers count as bad ones")


class ServingConfig(BaseModel):
    """How a policy is served. Defaults run on a laptop and are reachable from this machine only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 for every interface, needed when the cluster has more nodes"
    )
    port: int = Field(8000, ge=1, le=65_535, description="HTTP port of the endpoint")
    direct_lane: bool = Field(True, description="each replica answers on a port of its own too, without Serve's proxy in between")
    num_replicas: int = Field(1, ge=1, description="more: more decisions per second, each replica holds every live version")
    num_cpus_per_replica: float = Field(0.5, ge=0, description="more: Ray packs fewer replicas onto a node")
    mode: Literal["greedy", "sample"] = Field("greedy", description="how versions published from this file act; sample: explores")
    request_modes: tuple[Literal["greedy", "sample"], ...] = Field(
        (), description="which modes a request may ask for with `mode`; none: every request gets its version's own"
    )
    shield: ShieldConfig = ShieldConfig()
    fallback: FallbackConfig = FallbackConfig()
    engine: EngineSetting = Field(
        "auto",
        description="auto: what is measured faster, of each version at load; name one where replicas are on several machines",
    )
    require_signature: bool = Field(
        False, description="true: only versions signed with a trusted key are published, released and served (docs/security.md)"
    )
    max_batch_size: int = Field(256, ge=1, description="bigger: more throughput under load, the last of a batch waits longer")
    max_queue: int = Field(1024, ge=1, description="bigger: bursts wait instead of being answered 429")
    # The decisions of a body are one line of the log, up to five times as long; readers take 64 MiB.
    max_body_bytes: int = Field(
        1 << 20, ge=1024, le=8 << 20, description="bigger: larger requests are read before they are refused with 413"
    )
    durability: Literal["write", "fsync"] = Field(
        "write",
        description="write: what was answered survives a killed process; fsync: a power cut too, each answer waits for the disk",
    )
    on_log_failure: Literal["refuse", "answer"] = Field(
        "refuse",
        description="when the log cannot be written: refuse answers 503; answer goes on, and some decisions may never be logged",
    )
    log_timeout_s: float = Field(
        2.0, gt=0, description="bigger: a write or fsync may take longer before it counts as a failure of the log"
    )
