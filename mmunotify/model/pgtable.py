"""Radix page tables: leaves of 512 entries in slabs, PMD tables above them.

Two views of the same memory: a leaf's `pte` is a memoryview for one entry, and `runs` yields numpy
views over as many neighbouring leaves as lie next to each other in their slab, so that range work
takes vector steps of up to 64 leaves. `leaves` is a flat look-aside by 2 MiB index. The two upper
levels of x86 (PUD, PGD) hold nothing that anybody can observe and are one sorted list of GiBs; a
"PMD table" is what exists or not for a GiB, which decides whether mprotect announces anything.

All page numbers are address >> 12. Nothing here suspends.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    U64 = npt.NDArray[np.uint64]

ENTRIES: Final = 512
RUN_LEAVES: Final = 64
_SLAB_LEAVES: Final = 1024


class Leaf:
    """A page table page: 512 entries."""

    __slots__ = ("entries", "pte", "row", "slab")

    def __init__(self, slab: U64, row: int) -> None:
        self.slab = slab
        self.row = row
        self.entries: U64 = slab[row * ENTRIES : (row + 1) * ENTRIES]
        self.pte: Any = self.entries.data
        """The same memory, for one entry."""


class LeafPool:
    """Where the leaves of one machine come from: slabs of 1024, taken in order."""

    def __init__(self) -> None:
        self._free: list[Leaf] = []
        self._slab: U64 = np.zeros(0, np.uint64)
        self._next = _SLAB_LEAVES
        self.used = 0
        """Leaves in use."""

    def alloc(self) -> Leaf:
        """A leaf of zeros."""
        self.used += 1
        if self._free:
            return self._free.pop()
        if self._next == _SLAB_LEAVES:
            self._slab = np.zeros(_SLAB_LEAVES * ENTRIES, np.uint64)
            self._next = 0
        leaf = Leaf(self._slab, self._next)
        self._next += 1
        return leaf

    def free(self, leaf: Leaf) -> None:
        """Give a leaf back, whose entries the caller has cleared."""
        self.used -= 1
        self._free.append(leaf)

    def free_many(self, leaves: list[Leaf]) -> None:
        """`free` of leaves that are handed out in this order again."""
        self.used -= len(leaves)
        self._free.extend(reversed(leaves))


class PageTable:
    """The page tables of one address space."""

    def __init__(self, pool: LeafPool) -> None:
        self.pool: Final = pool
        self.leaves: Final[dict[int, Leaf]] = {}
        """By page >> 9."""
        self.huge: Final[dict[int, int]] = {}
        """Entries of 2 MiB, by page >> 9; an index is in `leaves` or here, never in both."""
        self._pmds: Final[dict[int, list[int]]] = {}
        self._gibs: Final[list[int]] = []

    # ------------------------------------------------------------------ one entry

    def get(self, page: int) -> int:
        """The entry of a page, 0 if there is none; a huge page's entry as that of its small one."""
        leaf = self.leaves.get(page >> 9)
        if leaf is not None:
            entry: int = leaf.pte[page & 511]
            return entry
        huge = self.huge.get(page >> 9, 0)
        return huge + ((page & 511) << 12) if huge else 0

    def leaf_of(self, page: int) -> Leaf:
        """The leaf that holds a page's entry, made with its PMD table if need be (pte_alloc)."""
        index = page >> 9
        leaf = self.leaves.get(index)
        if leaf is None:
            leaf = self.leaves[index] = self.pool.alloc()
            insort(self.pmd_alloc(page >> 18), index)
        return leaf

    def pmd_alloc(self, gib: int) -> list[int]:
        """The PMD table of a GiB, as the ascending indices of what it holds; made if need be."""
        pmds = self._pmds.get(gib)
        if pmds is None:
            pmds = self._pmds[gib] = []
            insort(self._gibs, gib)
        return pmds

    def has_pmd(self, page: int) -> bool:
        """Whether a PMD table exists for the page's GiB (mm_find_pmd)."""
        return page >> 18 in self._pmds

    def set_huge(self, index: int, entry: int) -> None:
        """Map 2 MiB at `index` << 9; the caller has taken the leaf away if there was one."""
        if index not in self.huge:
            insort(self.pmd_alloc(index >> 9), index)
        self.huge[index] = entry

    def clear_huge(self, index: int) -> int:
        """Take the 2 MiB entry away and return it."""
        self._pmds[index >> 9].remove(index)
        return self.huge.pop(index)

    def replace_huge(self, index: int) -> Leaf:
        """Put an empty leaf where a 2 MiB entry was."""
        del self.huge[index]
        leaf = self.leaves[index] = self.pool.alloc()
        return leaf

    def detach(self, index: int) -> Leaf | None:
        """Take a leaf out of the tree, entries and all (to move it, or to collapse it)."""
        leaf = self.leaves.pop(index, None)
        if leaf is not None:
            self._pmds[index >> 9].remove(index)
        return leaf

    def attach(self, index: int, leaf: Leaf) -> None:
        """Put a detached leaf in."""
        self.leaves[index] = leaf
        insort(self.pmd_alloc(index >> 9), index)

    # ------------------------------------------------------------------ ranges

    def gibs(self, start: int, end: int) -> list[int]:
        """The GiBs of pages [start, end) that have a PMD table, ascending."""
        gibs = self._gibs
        return gibs[bisect_left(gibs, start >> 18) : bisect_left(gibs, (end + 262143) >> 18)]

    def indices(self, start: int, end: int) -> list[int]:
        """The 2 MiB indices that hold something in pages [start, end), ascending; a snapshot."""
        first, last = start >> 9, (end + 511) >> 9
        found: list[int] = []
        for gib in self.gibs(start, end):
            pmds = self._pmds[gib]
            if pmds and (pmds[0] < first or pmds[-1] >= last):
                found += pmds[bisect_left(pmds, first) : bisect_left(pmds, last)]
            else:
                found += pmds
        return found

    def runs(self, start: int, end: int) -> list[tuple[int, U64]]:
        """(first page, its entries and those after it): all leaves that meet pages [start, end).

        A run is contiguous in address and memory, at most 64 leaves, cut to the range. Huge entries
        are left out. Leaves must not come or go while this is being read.
        """
        leaves = self.leaves
        at = start >> 9
        if end <= (at + 1) << 9:
            leaf = leaves.get(at)
            if leaf is None or start >= end:
                return []
            return [(start, leaf.entries[start & 511 : end - (at << 9)])]
        found = []
        slab: U64 | None = None
        row = index = count = 0
        for at in self.indices(start, end):
            leaf = leaves.get(at)
            if leaf is None:
                continue
            if (
                leaf.slab is slab
                and at == index + count
                and leaf.row == row + count
                and count < RUN_LEAVES
            ):
                count += 1
                continue
            if slab is not None:
                found.append(_cut(slab, row, index, count, start, end))
            slab, row, index, count = leaf.slab, leaf.row, at, 1
        if slab is not None:
            found.append(_cut(slab, row, index, count, start, end))
        return found

    def take_all(self) -> Iterator[U64]:
        """Clear and free every leaf; what was in them, by ascending address, some at a time.

        Nothing else may be left in the tree. Leaves need not lie next to each other: they are
        gathered, which for many that are almost empty is cheaper than going through them.
        """
        leaves = [self.leaves[index] for index in sorted(self.leaves)]
        self.leaves.clear()
        self._pmds.clear()
        self._gibs.clear()
        at = 0
        while at < len(leaves):
            slab = leaves[at].slab
            rows = []
            for leaf in leaves[at : at + RUN_LEAVES]:
                if leaf.slab is not slab:
                    break
                rows.append(leaf.row)
            at += len(rows)
            table = slab.reshape(-1, ENTRIES)
            entries = table[rows].ravel()
            table[rows] = 0
            yield entries[entries.nonzero()[0]]
        self.pool.free_many(leaves)

    def populate(self, start: int, end: int) -> None:
        """Make the leaves of pages [start, end)."""
        leaves = self.leaves
        for index in range(start >> 9, (end + 511) >> 9):
            if index not in leaves and index not in self.huge:
                self.leaf_of(index << 9)

    def reclaim_tables(self, start: int, end: int) -> None:
        """Free the leaves wholly inside pages [start, end) that have become empty (PT_RECLAIM)."""
        # Backwards, so that the pool hands them out in the order in which they lie.
        low, high = (start + 511) & ~511, end & ~511
        for index in reversed(self.indices(low, max(low, high))):
            leaf = self.leaves.get(index)
            if leaf is not None and not np.count_nonzero(leaf.entries):
                self.detach(index)
                self.pool.free(leaf)

    def free_tables(self, start: int, end: int, floor: int, ceiling: int) -> None:
        """Free the empty tables of pages [start, end) that no mapping outside needs.

        `floor` is where the mapping before ends, `ceiling` where the one after begins. Source:
        free_pgd_range.
        """
        low = start >> 9 if (start >> 9 << 9) >= floor else (start >> 9) + 1
        high = (end + 511) >> 9 if ((end + 511) >> 9 << 9) <= ceiling else end >> 9
        for index in reversed(self.indices(low << 9, max(high, low) << 9)):
            leaf = self.detach(index)
            if leaf is not None:
                self.pool.free(leaf)
        for gib in self.gibs(start, end):
            if gib << 18 >= floor and (gib + 1) << 18 <= ceiling and not self._pmds[gib]:
                del self._pmds[gib]
                self._gibs.remove(gib)


def _cut(slab: U64, row: int, index: int, count: int, start: int, end: int) -> tuple[int, U64]:
    first = max(start, index << 9)
    last = min(end, (index + count) << 9)
    base = row * ENTRIES - (index << 9)
    return first, slab[base + first : base + last]
