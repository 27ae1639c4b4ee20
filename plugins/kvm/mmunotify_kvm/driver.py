"""A driver in the place of KVM's: it is told what kvm_mmu_notifier_ops would be, and counts it.

It keeps no shadow page table, so it has nothing to drop and answers "not accessed" to every query.
Which callbacks KVM implements: virt/kvm/kvm_main.c.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from mmunotify import AtomicDriver, Log, define_event

if TYPE_CHECKING:
    from mmunotify import Range

COUNTED: Final = define_event(
    "kvm_counted",
    "info",
    "driver pages invalidate_range_start invalidate_range_end clear_flush_young clear_young "
    "test_young",
    "At release: how often each callback was called, and the pages that the starts announced.",
)


class KvmDriver(AtomicDriver):
    """Counts its callbacks, and the pages that starts announce; logs the counters at release.

    `logger` is a structlog logger.
    """

    def __init__(self, logger: object = None) -> None:
        self.counters: Final[Counter[str]] = Counter()
        """Calls by callback; `pages` is the sum of the pages of all starts."""
        self._log = Log(logger, driver="kvm")

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
        self._log.emit(COUNTED, **self.counters)
