"""A driver in the place of the SGI GRU's: it is told what gru_mmuops would be, and counts it.

It drives no TLB, so it has nothing to flush. Which callbacks the GRU implements:
drivers/misc/sgi-gru/grutlbpurge.c.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import structlog

from mmunotify import AtomicDriver

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from mmunotify import Primary, Range


class GruDriver(AtomicDriver):
    """Counts callbacks by name, and the pages that starts announce; logs attach and release."""

    def __init__(self, logger: FilteringBoundLogger | None = None) -> None:
        self.counters: Counter[str] = Counter()
        """Calls by callback, and `pages`: the sum of the pages of all starts."""
        self.log = (logger or structlog.get_logger("mmunotify_gru")).bind(driver="gru")

    def attach(self, primary: Primary | None) -> None:
        """Note it in the log."""
        self.log.info("attached")

    def invalidate_range_start(self, rng: Range) -> None:
        """Count the section and its pages."""
        self.counters["invalidate_range_start"] += 1
        self.counters["pages"] += rng.pages

    def invalidate_range_end(self, rng: Range) -> None:
        """Count the section's end."""
        self.counters["invalidate_range_end"] += 1

    async def release(self) -> None:
        """Log the counters."""
        self.counters["release"] += 1
        self.log.info("released", **self.counters)
