"""One shadow page table entry: 64 bits, laid out as on x86 where x86 has the bit.

      62      59 58 57     51            12   7   6 5    1 0
    ZAPPED ... HOST_HUGE MMU HOST  frame     PSE  D A ... W P

An entry that was dropped keeps ZAPPED, so that making it again is known to be a refault.
Source: arch/x86/kvm/mmu/spte.h.
"""

from __future__ import annotations

from typing import Final

PRESENT: Final = 1 << 0
WRITABLE: Final = 1 << 1
"""The guest may write now."""
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
LARGE: Final = 1 << 7
"""Maps 2 MiB."""
FRAME_SHIFT: Final = 12
FRAME_MASK: Final = ((1 << 40) - 1) << FRAME_SHIFT
HOST_WRITABLE: Final = 1 << 57
"""The primary MMU lets the guest write (I-PERM)."""
MMU_WRITABLE: Final = 1 << 58
"""WRITABLE may be set without looking anything up: only dirty logging has cleared it."""
HOST_HUGE: Final = 1 << 59
"""A small mapping of a part of the host's 2 MiB: its generation is that of the whole."""
ZAPPED: Final = 1 << 62
"""Not present, and once was."""
