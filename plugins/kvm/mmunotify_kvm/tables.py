"""The shadow page tables of one memslot: a column of entries per mapping size, in numpy arrays.

Pages are counted from the slot's first one. With one address space per guest a page has at most one
entry of each size, so the column is the slot's reverse map as well (rmap in `struct
kvm_arch_memory_slot`): whoever has a page number has its entry, and whoever has a range has a
slice. One page is scalar work through a memoryview, a range is vector work.

Whoever calls these holds mmu_lock, and flushes TLBs before it lets go where entries were taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from mmunotify import PAGE_SHIFT, PAGE_SIZE, PMD_SHIFT, PMD_SIZE, Translation

from .spte import (
    ACCESSED,
    DIRTY,
    FRAME_MASK,
    FRAME_SHIFT,
    HOST_HUGE,
    LARGE,
    PRESENT,
    WRITABLE,
    ZAPPED,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Column: TypeAlias = npt.NDArray[np.uint64]
    DirtySink: TypeAlias = Callable[[int, int, npt.NDArray[np.bool_] | None], object]
    """Told [first, last) of pages and which of them were written; None: all."""

NR: Final = PMD_SIZE // PAGE_SIZE
"""Small pages in a block of 2 MiB."""
_NR_SHIFT: Final = PMD_SHIFT - PAGE_SHIFT
_SCALAR: Final = 16
"""Up to so many pages a loop is faster than arrays."""
_SPARSE: Final = 64
"""Blocks that are worth visiting one by one instead of looking at all entries."""
_PRESENT: Final = np.uint64(PRESENT)
_DIRTY: Final = np.uint64(DIRTY)
_WRITABLE: Final = np.uint64(WRITABLE)
_ACCESSED: Final = np.uint64(ACCESSED)
_ZAPPED: Final = np.uint64(ZAPPED)
_ZAPPED_BIT: Final = ZAPPED.bit_length() - 1
"""The highest bit of an entry that is used: what is left of one that is shifted by it."""


class SpteTable:
    """The entries of `pages` pages, of which the first has the guest page number `base`."""

    __slots__ = (
        "generation",
        "generations",
        "huge",
        "huge_column",
        "huge_generation",
        "leaf",
        "leaf_column",
        "pages",
        "pages_2m",
        "pages_4k",
        "skew",
        "used",
        "used_column",
    )

    def __init__(self, base: int, pages: int) -> None:
        self.pages: Final = pages
        self.skew: Final = base & (NR - 1)
        blocks = (self.skew + pages + NR - 1) >> _NR_SHIFT
        # What nobody has touched of an array of zeros takes no memory.
        self.leaf_column: Final[Column] = np.zeros(pages, np.uint64)
        self.leaf: Final[Any] = self.leaf_column.data
        """The same, for one page: its items are plain integers."""
        self.generations: Final[Column] = np.zeros(pages, np.uint64)
        self.generation: Final[Any] = self.generations.data
        """Frame stamp of each entry (Translation.generation)."""
        self.huge_column: Final[Column] = np.zeros(blocks, np.uint64)
        self.huge: Final[Any] = self.huge_column.data
        self.huge_generation: Final[Any] = np.zeros(blocks, np.uint64).data
        self.used_column: Final[npt.NDArray[np.int64]] = np.zeros(blocks, np.int64)
        self.used: Final[Any] = self.used_column.data
        """How many small entries of each block are present."""
        self.pages_4k = 0
        """Small entries that are present (kvm_stat's pages_4k)."""
        self.pages_2m = 0
        """And huge ones (pages_2m)."""

    def block(self, page: int) -> int:
        """The block that a page is in."""
        return (page + self.skew) >> _NR_SHIFT

    def block_start(self, block: int) -> int:
        """Its first page; below 0 where the slot begins inside the block."""
        return (block << _NR_SHIFT) - self.skew

    def entry(self, page: int) -> int:
        """What maps a page, small or huge; 0 if nothing does."""
        spte: int = self.leaf[page]
        if spte & PRESENT:
            return spte
        if self.pages_2m:
            spte = self.huge[(page + self.skew) >> _NR_SHIFT]
            if spte & PRESENT:
                return spte
        return 0

    def set_entry(self, page: int, spte: int) -> None:
        """Change the bits of the entry that maps a page."""
        if spte & LARGE:
            self.huge[(page + self.skew) >> _NR_SHIFT] = spte
        else:
            self.leaf[page] = spte

    def translation(self, page: int, spte: int, address: int) -> Translation:
        """What the primary MMU gave for an entry; `address` is the host's of the page, in bytes."""
        frame = (spte & FRAME_MASK) >> FRAME_SHIFT
        writable = spte & WRITABLE != 0
        if spte & LARGE:
            generation = self.huge_generation[(page + self.skew) >> _NR_SHIFT]
            return Translation(address & -PMD_SIZE, frame, writable, PMD_SIZE, generation)
        generation = self.generation[page]
        if spte & HOST_HUGE:
            frame -= (address >> PAGE_SHIFT) & (NR - 1)
            return Translation(address & -PMD_SIZE, frame, writable, PMD_SIZE, generation)
        return Translation(address, frame, writable, PAGE_SIZE, generation)

    # ------------------------------------------------------------------ making

    def make(self, page: int, spte: int, generation: int) -> bool:
        """Put a small entry where none is present; whether there was one once."""
        old: int = self.leaf[page]
        self.leaf[page] = spte
        self.generation[page] = generation
        if old & PRESENT:
            return False
        self.pages_4k += 1
        self.used[(page + self.skew) >> _NR_SHIFT] += 1
        return old & ZAPPED != 0

    def make_few(self, page: int, sptes: list[int], generations: Sequence[int]) -> int:
        """Small entries for pages in a row, of one block, that have none; how many had one once."""
        leaf, stamps = self.leaf, self.generation
        refaults = 0
        for at, spte in enumerate(sptes, page):
            refaults += leaf[at] >> _ZAPPED_BIT
            leaf[at] = spte
            stamps[at] = generations[at - page]
        self.pages_4k += len(sptes)
        self.used[(page + self.skew) >> _NR_SHIFT] += len(sptes)
        return refaults

    def make_huge(self, block: int, spte: int, generation: int) -> None:
        """Put a huge entry where the block has neither one nor small ones."""
        self.huge[block] = spte | LARGE
        self.huge_generation[block] = generation
        self.pages_2m += 1

    def make_many(self, pages: npt.NDArray[np.int64], sptes: Column, generations: Column) -> int:
        """Small entries for ascending pages that have none; how many there were once."""
        refaults = int(np.count_nonzero(self.leaf_column[pages] & _ZAPPED))
        self.leaf_column[pages] = sptes
        self.generations[pages] = generations
        self._use(pages, 1)
        return refaults

    def _use(self, pages: npt.NDArray[np.int64], sign: int) -> None:
        if not len(pages):
            return
        first = self.block(int(pages[0]))
        counts = np.bincount(((pages + self.skew) >> _NR_SHIFT) - first)
        self.used_column[first : first + len(counts)] += sign * counts
        self.pages_4k += sign * len(pages)

    # ------------------------------------------------------------------ dropping

    def zap(self, first: int, last: int, dirty: DirtySink | None = None) -> int:
        """Drop what maps pages of [first, last); how many pages were mapped by what was dropped.

        A huge entry goes whole. `dirty` is told what the guest has written through them.
        """
        zapped = self._zap_huge(first, last, dirty) if self.pages_2m else 0
        if self.pages_4k:
            if last - first <= _SCALAR:
                zapped += self._zap_few(first, last, dirty)
            else:
                zapped += self._zap_many(first, last, dirty)
        return zapped

    def _zap_few(self, first: int, last: int, dirty: DirtySink | None) -> int:
        leaf, used, skew = self.leaf, self.used, self.skew
        zapped = 0
        for page in range(first, last):
            spte = leaf[page]
            if spte & PRESENT:
                leaf[page] = ZAPPED
                used[(page + skew) >> _NR_SHIFT] -= 1
                zapped += 1
                if dirty is not None and spte & DIRTY:
                    dirty(page, page + 1, None)
        self.pages_4k -= zapped
        return zapped

    def _zap_many(self, first: int, last: int, dirty: DirtySink | None) -> int:
        low, high = self.block(first), self.block(last - 1) + 1
        if high - low > _SPARSE and self.pages_4k < last - first >> 3:
            blocks = np.flatnonzero(self.used_column[low:high])
            if len(blocks) <= _SPARSE:
                return sum(
                    self._zap_slice(max(start, first), min(start + NR, last), dirty)
                    for start in map(self.block_start, (blocks + low).tolist())
                )
        return self._zap_slice(first, last, dirty)

    def _zap_slice(self, first: int, last: int, dirty: DirtySink | None) -> int:
        column = self.leaf_column[first:last]
        at = np.flatnonzero(column & _PRESENT)
        if not len(at):
            return 0
        if dirty is not None:
            mask = (column & _DIRTY) != 0
            if mask.any():
                dirty(first, last, mask)
        if len(at) == len(column):
            column[:] = _ZAPPED
        else:
            column[at] = _ZAPPED
        self._use(at + first, -1)
        return len(at)

    def _zap_huge(self, first: int, last: int, dirty: DirtySink | None) -> int:
        low, high = self.block(first), self.block(last - 1) + 1
        zapped = 0
        for block in (np.flatnonzero(self.huge_column[low:high] & _PRESENT) + low).tolist():
            spte = self.huge[block]
            self.huge[block] = ZAPPED
            self.pages_2m -= 1
            zapped += NR
            if dirty is not None and spte & DIRTY:
                start = self.block_start(block)
                dirty(start, start + NR, None)
        return zapped

    # ------------------------------------------------------------------ permissions and ageing

    def write_protect(self, first: int, last: int) -> bool:
        """Let nobody write [first, last) any more; whether somebody could.

        Only small entries: dirty logging has split the others.
        """
        column = self.leaf_column[first:last]
        at = np.flatnonzero(column & _WRITABLE)
        column[at] &= ~_WRITABLE
        return bool(len(at))

    def write_protect_pages(self, pages: npt.NDArray[np.int64]) -> bool:
        """The same for some pages."""
        found = pages[(self.leaf_column[pages] & _WRITABLE) != 0]
        self.leaf_column[found] &= ~_WRITABLE
        return bool(len(found))

    def age(self, first: int, last: int, *, clear: bool) -> bool:
        """Whether a page of [first, last) was accessed; with `clear` it is not any more."""
        young = False
        if self.pages_2m:
            low, high = self.block(first), self.block(last - 1) + 1
            for block in range(low, high):
                spte = self.huge[block]
                if spte & ACCESSED:
                    young = True
                    if clear:
                        self.huge[block] = spte & ~ACCESSED
        if last - first <= _SCALAR:
            leaf = self.leaf
            for page in range(first, last):
                spte = leaf[page]
                if spte & ACCESSED:
                    young = True
                    if clear:
                        leaf[page] = spte & ~ACCESSED
            return young
        column = self.leaf_column[first:last]
        at = np.flatnonzero(column & _ACCESSED)
        if len(at) and clear:
            column[at] &= ~_ACCESSED
        return young or bool(len(at))

    def huge_blocks(self) -> list[int]:
        """The blocks that a huge entry maps."""
        found: list[int] = np.flatnonzero(self.huge_column & _PRESENT).tolist()
        return found

    def used_blocks(self) -> list[int]:
        """The blocks that small entries map, in part or whole."""
        found: list[int] = np.flatnonzero(self.used_column).tolist()
        return found
