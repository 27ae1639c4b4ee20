"""The arithmetic of a flush: a range of addresses as operations of a TLB gate handle.

The original computes min((length + 4095) >> 12, 1024) - 1 once, for the region of the first
address. For [0, 2**64 - 1) the sum overflows to 0, and the field becomes -1, which ten bits cut to
1 023: everything of one region, by accident. What lies in the other regions stays, and so does
whatever was dropped in as a huge page. Here each region gets its operation, each page size too, and
nothing overflows.
"""

from __future__ import annotations

from mmunotify import PAGE_SHIFT

from .hardware.geometry import PURGE_ALL, REGION_SHIFT


def purges(start: int, end: int, shift: int = PAGE_SHIFT) -> list[tuple[int, int]]:
    """(address, field) of the operations that drop the pages of one size in [start, end), in bytes.

    `shift` is the page size. Partly covered pages are dropped whole. More pages than a field can
    say are everything of their region, which drops all page sizes.
    """
    if start >> REGION_SHIFT == end - 1 >> REGION_SHIFT:
        pages = (-(-end >> shift)) - (start >> shift)
        return [(start, pages - 1 if pages < PURGE_ALL else PURGE_ALL - 1)]
    found = []
    while start < end:
        stop = min(end, ((start >> REGION_SHIFT) + 1) << REGION_SHIFT)
        found += purges(start, stop, shift)
        start = stop
    return found
