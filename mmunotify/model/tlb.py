"""A primary CPU's TLB, for those who watch it: it keeps what it has until somebody flushes.

`mm.tlb = Tlb(mm)` makes every access fill it. `load` reads through it as the CPU would, which is
how a page that is freed before its flush is found (a mremap that flushed late was CVE-2018-18281).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mmunotify.errors import StaleTranslation
from mmunotify.ranges import PAGE_SHIFT, page_down

from . import flags as f
from . import frames as fr

if TYPE_CHECKING:
    from .mm import AddressSpace


class Tlb:
    """Translations that the CPU may still use: page to (entry, generation of its frame)."""

    def __init__(self, mm: AddressSpace[Any]) -> None:
        self.mm: Final = mm
        self.entries: Final[dict[int, tuple[int, int]]] = {}
        self.flushes = 0
        """Flushes that found something."""

    def fill(self, page: int, entry: int) -> None:
        """The CPU walked the page table."""
        frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
        self.entries[page] = (entry, self.mm.machine.frames.word[frame] >> fr.GEN_SHIFT)

    def flush(self, first: int, last: int) -> None:
        """Forget pages [first, last)."""
        if last - first > len(self.entries):
            gone = [page for page in self.entries if first <= page < last]
        else:
            gone = [page for page in range(first, last) if page in self.entries]
        for page in gone:
            del self.entries[page]
        self.flushes += bool(gone)

    def load(self, addr: int) -> int | None:
        """The frame that the CPU would read at `addr`, or None for a miss.

        Raises StaleTranslation if that frame was freed since: a flush came too late.
        """
        cached = self.entries.get(addr >> PAGE_SHIFT)
        if cached is None:
            return None
        entry, generation = cached
        frame: int = (entry & f.PFN_MASK) >> PAGE_SHIFT
        if not entry & f.PTE_SPECIAL and self.mm.machine.frames.label(frame)[1] != generation:
            raise StaleTranslation(
                f"the TLB of {self.mm.name} maps {page_down(addr):#x} to frame {frame}, generation "
                f"{generation}, which was freed: no flush came before"
            )
        return frame
