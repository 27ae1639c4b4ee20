"""A driver in the place of XPMEM's on the exporting side: it counts what that would be told.

It exports nothing, so there is no attached mapping to recall and nothing to wait for; XPMEM's own
waits for importers to let go of their page tables, which is why this one is sleepable. Which
callbacks XPMEM implements: kernel/xpmem_mmu_notifier.c of github.com/hpc/xpmem.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import structlog

from mmunotify import SleepableDriver

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from mmunotify import Primary, Range


class XpmemDriver(SleepableDriver):
    """Counts callbacks by name, and the pages that starts announce; logs attach and release."""

    def __init__(self, logger: FilteringBoundLogger | None = None) -> None:
        self.counters: Counter[str] = Counter()
        """Calls by callback, and `pages`: the sum of the pages of all starts."""
        self.log = (logger or structlog.get_logger("mmunotify_xpmem")).bind(driver="xpmem")

    def attach(self, primary: Primary | None) -> None:
        """Note it in the log."""
        self.log.info("attached")

    async def invalidate_range_start(self, rng: Range) -> None:
        """Count the section and its pages."""
        self.counters["invalidate_range_start"] += 1
        self.counters["pages"] += rng.pages

    async def invalidate_range_end(self, rng: Range) -> None:
        """Count the section's end."""
        self.counters["invalidate_range_end"] += 1

    async def release(self) -> None:
        """Log the counters."""
        self.counters["release"] += 1
        self.log.info("released", **self.counters)
