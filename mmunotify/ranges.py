"""Page arithmetic, the range that a notification speaks of, and why it was sent.

Addresses and sizes are bytes. Ranges are half-open. The last legal end is 2**64, and Linux's
own "everything" is [0, 2**64 - 1) (clear_refs, exit): both are ordinary input here, which is
why clamping and rounding are done in this file and nowhere else.
"""

from __future__ import annotations

import enum
from typing import Final

from .errors import RangeError

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PMD_SHIFT: Final = 21
PMD_SIZE: Final = 1 << PMD_SHIFT
ULONG_MAX: Final = (1 << 64) - 1
ADDRESS_END: Final = 1 << 64


class Event(enum.IntEnum):
    """Why a range is invalidated (`enum mmu_notifier_event`, include/linux/mmu_notifier.h)."""

    UNMAP = 0
    """The addresses go away: munmap, mremap, exit, the OOM reaper."""
    CLEAR = 1
    """The ptes are cleared and the addresses stay: truncate, DONTNEED, COW, reclaim, KSM."""
    PROTECTION_VMA = 2
    """Permissions change for a whole range: mprotect, NUMA hinting, uffd-wp."""
    PROTECTION_PAGE = 3
    """Permissions change page by page: fork, page_mkclean."""
    SOFT_DIRTY = 4
    """Dirty tracking write-protects everything: clear_refs 4."""
    RELEASE = 5
    """The address space exits; only interval notifiers hear of it this way."""
    MIGRATE = 6
    """Pages move to device memory; a driver ignores the event when it is the `owner`."""
    EXCLUSIVE = 7
    """A device takes a page for itself; a driver ignores the event when it is the `owner`."""


class Range:
    """What one notification speaks of: [start, end) in bytes, and why.

    `blockable` is False inside a section that must not suspend (the OOM reaper), `cancellable` is
    False when the start cannot be undone because the ptes have changed already; the notifiers
    set both, whoever makes a range does not. `owner` is meaningful only for MIGRATE, EXCLUSIVE and
    a CLEAR that undoes them. A range belongs to the section that was opened with it and is not
    changed by drivers. `span` identifies the section in a trace, 0 when nobody traces. Source:
    struct mmu_notifier_range.
    """

    __slots__ = ("blockable", "cancellable", "end", "event", "owner", "span", "start")

    def __init__(
        self, start: int, end: int, event: Event = Event.UNMAP, *, owner: object = None
    ) -> None:
        if not 0 <= start < end <= ADDRESS_END:
            raise RangeError(
                f"range [{start:#x}, {end:#x}): expected 0 <= start < end <= 2**64, in bytes"
            )
        self.start = start
        self.end = end
        self.event = event
        self.blockable = True
        self.cancellable = True
        self.owner = owner
        self.span = 0

    def __repr__(self) -> str:
        extra = "" if self.blockable else " nonblock"
        return f"<Range [{self.start:#x}, {self.end:#x}) {self.event.name}{extra}>"

    @property
    def pages(self) -> int:
        """Size in pages, partly covered ones included."""
        return page_count(self.start, self.end)

    def clamp(self, start: int, end: int) -> tuple[int, int] | None:
        """The part of this range inside [start, end) in bytes, or None if they do not meet."""
        low = max(self.start, start)
        high = min(self.end, end)
        return (low, high) if low < high else None

    def overlaps(self, start: int, end: int) -> bool:
        """Whether this range and [start, end), in bytes, have an address in common."""
        return self.start < end and start < self.end and start < end


def page_down(address: int) -> int:
    """Round an address down to its page."""
    return address >> PAGE_SHIFT << PAGE_SHIFT


def page_up(address: int) -> int:
    """Round an address up to a page boundary; 2**64 - 1 becomes 2**64, not 0."""
    return -(-address >> PAGE_SHIFT) << PAGE_SHIFT


def page_count(start: int, end: int) -> int:
    """How many pages [start, end) touches."""
    return (-(-end >> PAGE_SHIFT)) - (start >> PAGE_SHIFT)
