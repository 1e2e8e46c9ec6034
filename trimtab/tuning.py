"""A hyper-parameter search from the loop file to its result: run it, rank its trials, keep table and picture."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.controller import TrainResult
from actors.tuning import OnTrial, search
from policies.errors import UsageError
from policies.integrity import canonical_json, write_atomic
from policies.storage import NAME_PATTERN, Storage
from training.runs import read_config
from training.tuning import Trial, TrialStatus, best_of, ranked
from trimtab.loop_file import LoopConfig
from trimtab.parallel_coordinates import draw_parallel_coordinates, save_figure

RESULT_SCHEMA_VERSION = 1
RESULT = "result.json"
MAX_NAME = 50  # a run's id is longer than its search's, and has to be a name as well


@dataclass(frozen=True)
class SearchResult:
    """What a search came to: its trials from the best to the worst, and the settings that made the best one."""

    search_id: str
    directory: Path
    scheduler: str
    trials: list[Trial]
    best: Trial | None
    settings: dict[str, Any]
    pictures: list[Path]
    continued: TrainResult | None = None

    @property
    def is_interrupted(self) -> bool:
        return any(trial.status is TrialStatus.INTERRUPTED for trial in self.trials)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": RESULT_SCHEMA_VERSION,
            "search_id": self.search_id,
            "directory": str(self.directory),
            "scheduler": self.scheduler,
            "is_interrupted": self.is_interrupted,
            "trials": [{"rank": rank, **trial.to_json()} for rank, trial in enumerate(self.trials, 1)],
            "best": self.best and {"run_id": self.best.run_id, "training": self.settings},
            "pictures": [str(path) for path in self.pictures],
            "continued": self.continued and self.continued.to_json(),
        }


def run_search(
    loop: LoopConfig,
    storage: Storage,
    search_id: str,
    *,
    on_trial: OnTrial,
    on_message: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> SearchResult:
    """Search, and keep the result below the storage root's `tuning/<search id>`, also when it was stopped in the middle."""
    directory = _claim(storage, search_id)
    report = {"on_trial": on_trial, "on_message": on_message, "should_stop": should_stop}
    try:
        trials = search(loop.environment, loop.training, loop.tuning, storage, search_id, **report)
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: then it says more than its absence would
            directory.rmdir()
        raise
    target = loop.training.target_return
    best = best_of(trials, target)
    result = SearchResult(
        search_id=search_id,
        directory=directory,
        scheduler=loop.tuning.scheduler,
        trials=ranked(trials, target),
        best=best,
        settings=read_config(storage.run(best.run_id)).tuned_settings() if best else {},
        pictures=save_figure(draw_parallel_coordinates(trials, loop.tuning.parameters, best), directory) if best else [],
    )
    keep_result(result)
    return result


def keep_result(result: SearchResult) -> None:
    write_atomic(result.directory / RESULT, canonical_json(result.to_json()))


def _claim(storage: Storage, search_id: str) -> Path:
    if not NAME_PATTERN.fullmatch(search_id) or len(search_id) > MAX_NAME:
        raise UsageError(f"search id {search_id!r} must match {NAME_PATTERN.pattern} and have at most {MAX_NAME} characters")
    directory = storage.tuning(search_id)
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"search {search_id!r} exists already in {directory}; name another one") from None
    return directory
