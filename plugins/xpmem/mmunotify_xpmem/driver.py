"""A driver in the place of XPMEM's on the exporting side: it counts what that would be told.

It exports nothing, so there is no attached mapping to recall and nothing to wait for; XPMEM's own
waits for importers to let go of their page tables, which is why this one is sleepable. Which
callbacks XPMEM implements: kernel/xpmem_mmu_notifier.c of github.com/hpc/xpmem.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from mmunotify import Log, SleepableDriver, define_event

if TYPE_CHECKING:
    from mmunotify import Range

COUNTED: Final = define_event(
    "xpmem_counted",
    "info",
    "driver pages invalidate_range_start invalidate_range_end",
    "At release: how often each callback was called, and the pages that the starts announced.",
)


class XpmemDriver(SleepableDriver):
    """Counts its callbacks, and the pages that starts announce; logs the counters at release.

    `logger` is a structlog logger.
    """

    def __init__(self, logger: object = None) -> None:
        self.counters: Final[Counter[str]] = Counter()
        """Calls by callback; `pages` is the sum of the pages of all starts."""
        self._log = Log(logger, driver="xpmem")

    async def invalidate_range_start(self, rng: Range) -> None:
        """Count the section and its pages."""
        self.counters["invalidate_range_start"] += 1
        self.counters["pages"] += rng.pages

    async def invalidate_range_end(self, rng: Range) -> None:
        """Count the section's end."""
        self.counters["invalidate_range_end"] += 1

    async def release(self) -> None:
        """Log the counters."""
        self._log.emit(COUNTED, **self.counters)
