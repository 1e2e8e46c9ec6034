"""Where does the time of a run go, and how much of it is spent on anything but stepping environments and learning?"""

from collections.abc import Mapping
from dataclasses import dataclass

WALL_PHASES = ("collect_s", "learn_s", "evaluate_s", "checkpoint_s")  # they follow each other and fill the loop's time
PHASES = (*WALL_PHASES, "worker_s", "learner_s")  # what the slowest worker and the learner computed meanwhile


@dataclass(frozen=True)
class TimeShares:
    """How the training loop spent its time: shares of `loop_s`.

    `loop_s`       from the first fragment asked for to the end of the last update, without the start of processes
    `collecting`   waiting for fragments, and the loop's own work between two updates (metrics, progress). When collecting
                   overlaps with learning (`max_staleness` above 0), only what is left to wait for after learning
    `learning`     from handing the fragments to the learner until its report is back
    `evaluating`   greedy episodes, on the rollout workers
    `saving`       checkpoints
    `machinery`    the part of collecting and learning above what they must take, given what the processes computed: the
                   slowest worker's fragments, then the learner's updates; or, when they overlap, the longer of the two. It is
                   what Ray, copying, unpickling and waiting for each other cost. Never less than what learning took above
                   the learner's own time: where collecting overlaps, workers also collect while the loop evaluates and saves,
                   so that they may have computed for longer than collecting and learning lasted
    """

    loop_s: float
    collecting: float
    learning: float
    evaluating: float
    saving: float
    machinery: float

    def __str__(self) -> str:
        shares = " · ".join(f"{name} {share:.0%}" for name, share in self.parts().items())
        return f"{self.loop_s:.1f} s in the loop: {shares}; {self.machinery:.0%} of it is machinery"

    def parts(self) -> dict[str, float]:
        """Return the shares that add up to one."""
        return {
            "collecting": self.collecting,
            "learning": self.learning,
            "evaluating": self.evaluating,
            "saving": self.saving,
        }


def time_shares(phases_s: Mapping[str, float], *, overlaps: bool) -> TimeShares | None:
    """Return the shares of the seconds that `TrainResult.phases_s` and `Progress` name; None when no time has passed.

    `overlaps` says that fragments are collected while the learner works.
    """
    loop_s = sum(phases_s[phase] for phase in WALL_PHASES)
    if loop_s == 0:
        return None
    must_s = (max if overlaps else sum)((phases_s["worker_s"], phases_s["learner_s"]))
    above_s = phases_s["collect_s"] + phases_s["learn_s"] - must_s
    machinery_s = max(above_s, phases_s["learn_s"] - phases_s["learner_s"])
    return TimeShares(loop_s, *(phases_s[phase] / loop_s for phase in WALL_PHASES), machinery_s / loop_s)
