"""TLB gate handles: how software has translations dropped.

An invalidate names the first address, the ASID of a region, a page size, how many pages, and the
contexts that run under the ASID. It drops entries of that size, and disarms the misses of those
contexts that it covers. The count is a field of 10 bits which holds one less; all ones means
everything of that ASID, whatever its size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mmunotify import ADDRESS_END, PAGE_SHIFT

from .geometry import PURGE_ALL, REGION_SHIFT, REGIONS

if TYPE_CHECKING:
    from collections.abc import Collection

    from .chiplet import Chiplet


class Dropped(NamedTuple):
    """What an invalidate has found, by page number; software cannot see it, and only counts it."""

    pages: Collection[int]
    huge: Collection[int]
    """In units of PMD_SIZE."""


NOTHING: Final = Dropped((), ())


class Tgh:
    """One handle; its work is done when a method returns."""

    __slots__ = ("chiplet", "invalidates", "number")

    def __init__(self, chiplet: Chiplet, number: int) -> None:
        self.chiplet: Final = chiplet
        self.number: Final = number
        self.invalidates = 0

    def invalidate(self, address: int, asid: int, shift: int, field: int, contexts: int) -> Dropped:
        """Drop `field + 1` pages of `1 << shift` bytes at `address`; a field of 1 023, everything.

        `field` is taken modulo 1 024, as a register of 10 bits takes what is written to it. Returns
        `NOTHING` if nothing was found.
        """
        chiplet = self.chiplet
        tag = asid + (address >> REGION_SHIFT & (REGIONS - 1))
        count = (field & (PURGE_ALL - 1)) + 1
        self.invalidates += 1
        dropped = NOTHING
        if count == PURGE_ALL:
            pages, huge = chiplet.tlb.invalidate_tag(tag)
            if pages or huge:
                dropped = Dropped(pages, huge)
        else:
            found = chiplet.tlb.invalidate(tag, address >> shift, count, shift)
            if found:
                dropped = Dropped(found, ()) if shift == PAGE_SHIFT else Dropped((), found)
        if chiplet.missing:
            start, end = 0, ADDRESS_END
            if count != PURGE_ALL:
                start = address >> shift << shift
                end = start + (count << shift)
            for tfh in chiplet.missing.values():
                tfh.invalidated(tag, start, end, contexts)
        return dropped

    def invalidate_all(self) -> None:
        """Drop every entry of the chiplet, of every ASID (gru_flush_all_tlb)."""
        chiplet = self.chiplet
        self.invalidates += 1
        chiplet.tlb.invalidate_all()
        for tfh in chiplet.missing.values():
            tfh.disarmed += 1
