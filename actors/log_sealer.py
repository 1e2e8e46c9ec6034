"""Who seals the finished segments of the decision log, so that nobody has to do it by hand: a thread beside the monitor."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from policies.errors import TrimtabError
from policies.sealing import SEAL_AFTER_S, finished_segments, remove_leftovers, seal

SEAL_INTERVAL_S = 30.0
PAUSE_S = 0.002  # after each piece of work of about as long, in which the monitor's own thread gets its turn

logger = logging.getLogger(__name__)


class LogSealer:
    """Seals one segment after the other. One that cannot be sealed is reported once and left alone while this process lives."""

    def __init__(
        self,
        directory: Path,
        *,
        may_seal: Callable[[Path], bool],
        note_error: Callable[[Exception], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._directory = directory
        self._may_seal = may_seal
        self._note_error = note_error
        self._sleep = sleep
        self._failed: set[Path] = set()

    def work(self, now: float, *, min_age_s: float = SEAL_AFTER_S) -> int:
        """Seal what is finished and was read; return how many segments that were."""
        num_sealed = 0
        remove_leftovers(self._directory, now=now, min_age_s=min_age_s)
        for path in finished_segments(self._directory, now=now, min_age_s=min_age_s):
            if path not in self._failed and self._may_seal(path):
                num_sealed += self._seal(path)
        return num_sealed

    def _seal(self, path: Path) -> bool:
        try:
            info = seal(path, pause=lambda: self._sleep(PAUSE_S))
        except TrimtabError as error:  # damaged, or no locks here: the same tomorrow
            self._failed.add(path)
            self._note_error(error)
            return False
        except OSError as error:  # a full disk: perhaps not the same in a while
            self._note_error(error)
            return False
        if info is not None:
            logger.info(
                "event=segment_sealed segment=%s num_rows=%d num_duplicates=%d num_torn_bytes=%d",
                *(path.stem, info.num_rows, info.num_duplicates, info.num_torn_bytes),
            )
        return info is not None
