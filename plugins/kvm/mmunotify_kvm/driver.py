"""A driver in the place of KVM's: it is told what kvm_mmu_notifier_ops would be, and counts it.

It keeps no shadow page table, so it has nothing to drop and answers "not accessed" to every query.
Which callbacks KVM implements: virt/kvm/kvm_main.c.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import structlog

from mmunotify import AtomicDriver

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from mmunotify import Primary, Range


class KvmDriver(AtomicDriver):
    """Counts callbacks by name, and the pages that starts announce; logs attach and release."""

    def __init__(self, logger: FilteringBoundLogger | None = None) -> None:
        self.counters: Counter[str] = Counter()
        """Calls by callback, and `pages`: the sum of the pages of all starts."""
        self.log = (logger or structlog.get_logger("mmunotify_kvm")).bind(driver="kvm")

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

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Count the query; nothing was accessed through a table that does not exist."""
        self.counters["clear_flush_young"] += 1
        return False

    def clear_young(self, start: int, end: int) -> bool:
        """As `clear_flush_young`."""
        self.counters["clear_young"] += 1
        return False

    def test_young(self, address: int) -> bool:
        """As `clear_flush_young`."""
        self.counters["test_young"] += 1
        return False

    async def release(self) -> None:
        """Log the counters."""
        self.counters["release"] += 1
        self.log.info("released", **self.counters)
