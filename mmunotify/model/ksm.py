"""KSM: pages of equal contents become one, write-protected.

A page is merged when its contents did not change between two scans: it is write-protected (one
announcement) and replaced by the stable copy (another); the first of a pair becomes that copy and
is only write-protected. Contents decide, so a machine without contents merges nothing.

Source: mm/ksm.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmunotify.ranges import PAGE_SHIFT, Event

from . import flags as f
from . import frames as fr

if TYPE_CHECKING:
    from mmunotify.locks import RmapLock

    from .machine import Machine
    from .mm import AddressSpace
    from .rmap import AnonVma
    from .vma import Vma


class StableNode:
    """One merged page, and where it was found: the owner of its frame."""

    def __init__(self, lock: RmapLock) -> None:
        self.number = 0
        self.lock = lock
        self.frame = -1
        self.generation = -1
        self.items: list[tuple[AnonVma, int]] = []

    def mappings(self) -> list[tuple[Vma, int]]:
        """The (VMA, page) that may map it, also in processes forked since (rmap_walk_ksm)."""
        found: dict[tuple[int, int], tuple[Vma, int]] = {}
        for anon_vma, index in self.items:
            for vma in anon_vma.tree.overlapping(index, index + 1):
                page = vma.first + index - vma.pgoff
                found[id(vma), page] = (vma, page)
        return list(found.values())


class Ksm:
    """ksmd of one machine."""

    def __init__(self, machine: Machine[Any]) -> None:
        self.machine: Final = machine
        self._lock: Final = machine.locks.rmap_lock("ksm")
        self._stable: Final[dict[bytes, StableNode]] = {}
        self._seen: dict[tuple[int, int], bytes] = {}

    async def scan(self) -> None:
        """One full scan of every mergeable VMA; may suspend and announce."""
        if self.machine.frames.data is None:
            return
        unstable: dict[bytes, tuple[AddressSpace[Any], int, int]] = {}
        seen: dict[tuple[int, int], bytes] = {}
        for mm in list(self.machine.mms):
            async with mm.mmap_lock.reading():
                for vma in [v for v in mm.vmas if v.flags & f.VM_MERGEABLE and v.anon_vma]:
                    for page in range(vma.first, vma.last):
                        await self._scan_page(mm, vma, page, unstable, seen)
            await self.machine.cond_resched()
        self._seen = seen

    async def _scan_page(
        self,
        mm: AddressSpace[Any],
        vma: Vma,
        page: int,
        unstable: dict[bytes, tuple[AddressSpace[Any], int, int]],
        seen: dict[tuple[int, int], bytes],
    ) -> None:
        frame = self._candidate(mm, page)
        if frame < 0:
            return
        contents = bytes(self.machine.contents_of(frame))
        key = (id(mm), page)
        seen[key] = contents
        node = self._stable_node(contents)
        if node is not None:
            await self._merge(mm, page, frame, node)
            return
        if self._seen.get(key) != contents:
            return
        other = unstable.get(contents)
        if other is None or self._candidate(other[0], other[1]) != other[2]:
            unstable[contents] = (mm, page, frame)
            return
        del unstable[contents]
        if not await self._write_protect(mm, page, frame):
            return
        if not self._unchanged(mm, page, frame, contents):
            return
        node = StableNode(self._lock)
        node.number = self.machine.owners.add(node)
        words = self.machine.frames.word
        node.frame, node.generation = frame, words[frame] & fr.GEN_MASK
        node.items.append(_item(vma, page))
        words[frame] = words[frame] & ~fr.PG_EXCLUSIVE | fr.PG_KSM
        self.machine.frames.set_owner(frame, node.number, 0)
        self._stable[contents] = node
        await self._merge(*other, node)

    def _candidate(self, mm: AddressSpace[Any], page: int) -> int:
        """The frame of a small anonymous page that nobody else maps or holds, or -1."""
        if page >> 9 in mm.pt.huge:
            return -1
        entry = mm.pt.get(page)
        if not entry & f.PTE_PRESENT or entry & f.PTE_SPECIAL:
            return -1
        frame: int = (entry & f.PFN_MASK) >> PAGE_SHIFT
        word = self.machine.frames.word[frame]
        if not word & fr.PG_ANON or word & (fr.PG_KSM | fr.PG_HUGE | fr.PG_PINNED):
            return -1
        return frame

    def _stable_node(self, contents: bytes) -> StableNode | None:
        node = self._stable.get(contents)
        if node is None:
            return None
        word = self.machine.frames.word[node.frame]
        if word & fr.GEN_MASK != node.generation:
            # Its last mapping is gone, and its frame with it.
            del self._stable[contents]
            self.machine.owners.remove(node.number)
            return None
        return node

    async def _write_protect(self, mm: AddressSpace[Any], page: int, frame: int) -> bool:
        async with mm.section(page, page + 1, Event.CLEAR):
            entry = mm.pt.get(page)
            if not mm.maps(page, frame):
                return False
            words = self.machine.frames.word
            if entry & f.PTE_DIRTY:
                words[frame] |= fr.PG_DIRTY
            words[frame] &= ~fr.PG_EXCLUSIVE
            mm.set_pte(page, entry & ~(f.PTE_RW | f.PTE_DIRTY))
            mm.flush_tlb(page, page + 1)
        return True

    def _unchanged(self, mm: AddressSpace[Any], page: int, frame: int, contents: bytes) -> bool:
        """Whether a page that was write-protected still is, and as it was (pages_identical).

        Somebody may have faulted on it and written while the section of that was ending.
        """
        return (
            mm.maps(page, frame)
            and not mm.pt.get(page) & f.PTE_RW
            and bytes(self.machine.contents_of(frame)) == contents
        )

    async def _merge(self, mm: AddressSpace[Any], page: int, frame: int, node: StableNode) -> None:
        """Write-protect a page and let its entry map the stable copy (replace_page)."""
        frames = self.machine.frames
        contents = bytes(self.machine.contents_of(node.frame))
        # Neither must go while sections begin and end.
        frames.get(node.frame)
        frames.get(frame)
        try:
            if not await self._write_protect(mm, page, frame):
                return
            if not self._unchanged(mm, page, frame, contents):
                return
            async with mm.section(page, page + 1, Event.CLEAR):
                entry = mm.pt.get(page)
                # Looked up only now: VMAs are split and merged while sections begin and end.
                vma = mm.find_vma(page)
                if vma is not None and self._unchanged(mm, page, frame, contents):
                    node.items.append(_item(vma, page))
                    frames.word[node.frame] += fr.MAPPED_ONCE
                    keep = entry & ~f.PFN_MASK
                    mm.set_pte(page, node.frame << PAGE_SHIFT | keep)
                    mm.flush_tlb(page, page + 1)
                    self.machine.remove_rmap(frame)
                    frames.put(frame)
        finally:
            self.machine.put_page(frame)
            self.machine.put_page(node.frame)

    async def unmerge(self, mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
        """Give [first, last) pages of its own again: a copy each (break_ksm)."""
        from .fault import handle_mm_fault
        from .uaccess import account

        words = self.machine.frames.words
        for page, entries in mm.pt.runs(first, last):
            present = (entries & np.uint64(f.PTE_PRESENT | f.PTE_SPECIAL)) == np.uint64(
                f.PTE_PRESENT
            )
            at = np.flatnonzero(present)
            pfns = ((entries[at] & np.uint64(f.PFN_MASK)) >> np.uint64(PAGE_SHIFT)).view(np.int64)
            for where in at[(words[pfns] & np.uint64(fr.PG_KSM)) != 0].tolist():
                flags = f.FAULT_REMOTE | f.FAULT_UNSHARE
                account(mm, await handle_mm_fault(mm, vma, page + where, flags))


def _item(vma: Vma, page: int) -> tuple[AnonVma, int]:
    assert vma.anon_vma is not None
    return vma.anon_vma, page - vma.first + vma.pgoff
