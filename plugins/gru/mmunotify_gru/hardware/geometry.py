"""How many there are of everything, and how large. Source: drivers/misc/sgi-gru/gruhandles.h."""

from __future__ import annotations

from typing import Final

from mmunotify import PAGE_SHIFT

CHIPLETS_PER_BLADE: Final = 2
NUM_CCH: Final = 16
"""Contexts of a chiplet."""
NUM_CBR: Final = 128
"""Control blocks of a chiplet; each has its TLB fault handle."""
NUM_DSR_BYTES: Final = 32 * 1024
"""Data segment of a chiplet."""
NUM_TGH: Final = 24
"""TLB gate handles of a chiplet."""
CBR_AU: Final = 2
"""Control blocks come in units of this many."""
DSR_AU: Final = 1024
"""The data segment comes in units of this many bytes."""
CACHE_LINE: Final = 64

MIN_ASID: Final = 8
MAX_ASID: Final = 0xFFFFF0
ASID_STEP: Final = 8
"""The low bits of a tag are the region."""
REGION_SHIFT: Final = 61
REGIONS: Final = 4

PURGE_ALL: Final = 1024
"""As the count of an invalidate: everything of that ASID. Its field holds count - 1, in 10 bits."""
PAGE_MASK: Final = (1 << PAGE_SHIFT) - 1
ADDRESS_MASK: Final = (1 << 64) - 1


def tag_of(asid: int, address: int) -> int:
    """What the TLB is tagged with: the ASID, and the region of the address (GRUASID)."""
    return asid + (address >> REGION_SHIFT & (REGIONS - 1))
