"""A driver in the place of the SGI GRU's: it is told what gru_mmuops would be, and counts it.

It drives no TLB, so it has nothing to flush. Which callbacks the GRU implements:
drivers/misc/sgi-gru/grutlbpurge.c.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from mmunotify import AtomicDriver, Log, define_event

if TYPE_CHECKING:
    from mmunotify import Range

COUNTED: Final = define_event(
    "gru_counted",
    "info",
    "driver pages invalidate_range_start invalidate_range_end",
    "At release: how often each callback was called, and the pages that the starts announced.",
)


class GruDriver(AtomicDriver):
    """Counts its callbacks, and the pages that starts announce; logs the counters at release.

    `logger` is a structlog logger.
    """

    def __init__(self, logger: object = None) -> None:
        self.counters: Final[Counter[str]] = Counter()
        """Calls by callback; `pages` is the sum of the pages of all starts."""
        self._log = Log(logger, driver="gru")

    def invalidate_range_start(self, rng: Range) -> None:
        """Count the section and its pages."""
        self.counters["invalidate_range_start"] += 1
        self.counters["pages"] += rng.pages

    def invalidate_range_end(self, rng: Range) -> None:
        """Count the section's end."""
        self.counters["invalidate_range_end"] += 1

    async def release(self) -> None:
        """Log the counters."""
        self._log.emit(COUNTED, **self.counters)
