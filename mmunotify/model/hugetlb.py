"""hugetlb: pages of 2 MiB that were set aside, reserved by mmap and mapped by one entry each.

The pool keeps a reference of each of its frames, so that a page whose last mapping goes comes back
to it instead of to the allocator. Behind every such mapping, private or shared, stands a file; a
private one's pages are anonymous. Nothing here is ever reclaimed, moved or split, and addresses and
sizes are whole huge pages (EINVAL otherwise).

Source: mm/hugetlb.c, fs/hugetlbfs/inode.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT, Event

from . import flags as f
from . import frames as fr
from .filemap import File

if TYPE_CHECKING:
    from .machine import Machine
    from .mm import AddressSpace
    from .vma import Vma

NR: Final = 512
_PUD: Final = 1 << 18
_ONE: Final = np.uint64(fr.REF_ONE)
_MAPPED_ONCE: Final = np.uint64(fr.MAPPED_ONCE)
_PROT_BITS: Final = f.PTE_RW | f.PTE_USER | f.PTE_NX
_YOUNG: Final = f.PTE_ACCESSED | f.PTE_PSE
_WRITTEN: Final = f.PTE_RW | f.PTE_DIRTY | f.PTE_ACCESSED


class HugePool:
    """The huge pages of one machine (struct hstate). Counts are huge pages; nothing suspends."""

    def __init__(self, machine: Machine[Any], count: int) -> None:
        self.frames: Final = machine.frames
        self._free: Final = [self.frames.alloc_huge() for _ in range(count)]
        if -1 in self._free:
            raise MmError(errno.ENOMEM, f"{machine.name}: no room for {count} huge pages")
        self._used: Final[set[int]] = set()
        self.reserved = 0
        """Free ones that are promised to a mapping."""
        for head in self._free:
            self.frames.words[head : head + NR] |= _ONE

    @property
    def available(self) -> int:
        """Free ones that nobody was promised."""
        return len(self._free) - self.reserved

    @property
    def used(self) -> int:
        """Those that somebody has."""
        return len(self._used)

    def take(self, file: HugeFile, index: int) -> int:
        """The first frame of a page for offset `index` of a file, or -1 if there is none."""
        if index in file.reserved:
            file.reserved.remove(index)
            self.reserved -= 1
        elif self.available <= 0:
            return -1
        head = self._free.pop()
        self._used.add(head)
        return head

    def collect(self) -> None:
        """Take back the pages of which only the pool has a reference."""
        for head in list(self._used):
            words = self.frames.words[head : head + NR]
            if ((words & np.uint64(fr.REF_MASK)) != _ONE).any():
                continue
            if self.frames.on_free is not None:
                for frame in range(head, head + NR):
                    self.frames.on_free(frame)
            words[:] = ((words & np.uint64(fr.GEN_MASK)) + np.uint64(fr.GEN_ONE)) | _ONE
            if self.frames.data is not None:
                for frame in range(head, head + NR):
                    self.frames.data.pop(frame, None)
            self._used.remove(head)
            self._free.append(head)


class HugeFile(File):
    """The file behind one mapping made with MAP_HUGETLB; `pages` are those of shared mappings.

    `owner` is the process that a private mapping's reservation is for.
    """

    def __init__(
        self, machine: Machine[Any], name: str, size: int, owner: AddressSpace[Any] | None
    ) -> None:
        super().__init__(machine, name, size, "memfd")
        self.owner = owner
        self.reserved: set[int] = set()

    def reserve(self) -> bool:
        """Promise it all its pages; False if there are too few."""
        pool, wanted = self.machine.hugetlb, self.page_end // NR
        if pool.available < wanted:
            return False
        pool.reserved += wanted
        self.reserved = set(range(0, self.page_end, NR))
        return True

    def closed(self, vma: Vma) -> None:
        """A mapping goes: what it alone was promised, others may have."""
        if vma.mm is not self.owner:
            return
        last = vma.pgoff + vma.pages
        for index in [i for i in self.reserved if vma.pgoff <= i < last]:
            mapped = self.i_mmap.overlapping(index, index + NR)
            if not any(other.mm is self.owner for other in mapped):
                self._unreserve(index)

    def _unreserve(self, index: int) -> None:
        self.reserved.remove(index)
        self.machine.hugetlb.reserved -= 1

    def put(self) -> None:
        """Drop a reference; the last one drops the pages and the reservation."""
        super().put()
        if not self.refs:
            for index in list(self.reserved):
                self._unreserve(index)

    def add(self, index: int, frame: int) -> None:
        """Put a fresh huge page into the page cache."""
        frames = self.machine.frames
        frames.words[frame : frame + NR] += np.uint64(fr.REF_ONE + fr.PG_PAGECACHE)
        first = self.number << fr.OWNER_SHIFT | index
        frames.rmaps[frame : frame + NR] = np.arange(first, first + NR, dtype=np.uint64)
        self.pages[index] = frame

    def remove(self, index: int) -> None:
        """Take a huge page out of the cache."""
        head = self.pages.pop(index)
        words = self.machine.frames.words[head : head + NR]
        words -= np.uint64(fr.REF_ONE + fr.PG_PAGECACHE)
        self.machine.hugetlb.collect()

    async def readahead(self, first: int, last: int) -> None:
        """Nothing: there is no device to read from."""

    async def fallocate(self, mode: str, offset: int, length: int) -> None:
        """Make a hole of the huge pages that lie wholly in a range of bytes ("punch")."""
        if mode != "punch":
            raise MmError(errno.EOPNOTSUPP, f"fallocate {mode} of {self.name}, of huge pages")
        size = NR << PAGE_SHIFT
        first, last = -(-offset // size) * NR, (offset + length) // size * NR
        if first < last:
            await self.unmap_mapping_range(first, last, even_cows=True)
            self.drop_pages(first, last)


# ---------------------------------------------------------------------- faults


async def hugetlb_fault(mm: AddressSpace[Any], vma: Vma, page: int, flags: int) -> int:
    """Make one access to a huge page possible; returns VM_FAULT_ bits. May suspend and announce."""
    index = page // NR
    mm.pt.pmd_alloc(page >> 18)
    if vma.anon_vma is None and not vma.flags & f.VM_SHARED:
        await mm.anon_vma_prepare(vma)
    entry = mm.pt.huge.get(index, 0)
    if not entry:
        return _no_page(mm, vma, index, flags)
    if not flags & (f.FAULT_WRITE | f.FAULT_UNSHARE) or entry & f.PTE_RW:
        written = f.PTE_DIRTY if flags & f.FAULT_WRITE else 0
        mm.pt.huge[index] = entry | written | f.PTE_ACCESSED
        return 0
    return await _wp_page(mm, vma, index, entry, flags)


def _no_page(mm: AddressSpace[Any], vma: Vma, index: int, flags: int) -> int:
    """Map a page that is not there yet (hugetlb_no_page)."""
    machine, file = mm.machine, vma.file
    assert isinstance(file, HugeFile)
    offset = index * NR - vma.first + vma.pgoff
    if offset >= file.page_end:
        return f.VM_FAULT_SIGBUS
    head = file.pages.get(offset, -1) if vma.flags & f.VM_SHARED else -1
    if head < 0:
        head = machine.hugetlb.take(file, offset)
        if head < 0:
            return f.VM_FAULT_SIGBUS
        if vma.flags & f.VM_SHARED:
            file.add(offset, head)
    prot = vma.prot | _YOUNG
    if vma.flags & f.VM_SHARED:
        machine.frames.words[head : head + NR] += _MAPPED_ONCE
    else:
        _new_anon(mm, vma, index, head)
    if flags & f.FAULT_WRITE:
        prot |= _WRITTEN
    mm.pt.set_huge(index, head << PAGE_SHIFT | prot)
    return 0


def _new_anon(mm: AddressSpace[Any], vma: Vma, index: int, head: int) -> None:
    assert vma.anon_vma is not None
    frames = mm.machine.frames
    frames.words[head : head + NR] += np.uint64(fr.MAPPED_ONCE | fr.PG_ANON | fr.PG_EXCLUSIVE)
    first = vma.anon_vma.number << fr.OWNER_SHIFT | index * NR - vma.first + vma.pgoff
    frames.rmaps[head : head + NR] = np.arange(first, first + NR, dtype=np.uint64)


async def _wp_page(mm: AddressSpace[Any], vma: Vma, index: int, entry: int, flags: int) -> int:
    """A write to a page that is not writable: reuse by its only mapping, or a copy (hugetlb_wp)."""
    machine, file = mm.machine, vma.file
    assert isinstance(file, HugeFile)
    frames, pool = machine.frames, machine.hugetlb
    unshare = flags & f.FAULT_UNSHARE
    head = (entry & f.PFN_MASK) >> PAGE_SHIFT
    words = frames.words[head : head + NR]
    alone = frames.word[head] & fr.MAP_MASK == fr.MAP_ONE
    if vma.flags & f.VM_SHARED or alone or frames.word[head] & fr.PG_EXCLUSIVE:
        if not vma.flags & f.VM_SHARED:
            words |= np.uint64(fr.PG_EXCLUSIVE)
        if not unshare:
            mm.pt.huge[index] = entry | _WRITTEN
        return 0
    offset = index * NR - vma.first + vma.pgoff
    new = pool.take(file, offset)
    if new < 0 and mm is file.owner:
        # It was promised the page; the children that have it must do without.
        await _unmap_others(file, vma, offset)
        return 0
    if new < 0:
        return f.VM_FAULT_SIGBUS
    for at in range(NR):
        frames.copy(head + at, new + at)
    words += _ONE
    async with mm.section(index * NR, (index + 1) * NR, Event.CLEAR):
        done = mm.pt.huge.get(index) == entry
        if done:
            mm.flush_tlb(index * NR, (index + 1) * NR)
            words -= _MAPPED_ONCE
            _new_anon(mm, vma, index, new)
            prot = vma.prot | _YOUNG | (0 if unshare else _WRITTEN)
            mm.pt.huge[index] = new << PAGE_SHIFT | prot
    words -= _ONE
    pool.collect()
    return 0


async def _unmap_others(file: HugeFile, vma: Vma, offset: int) -> None:
    """Take a page from every mapping but one (unmap_ref_private)."""
    async with file.i_mmap_lock.reading():
        for other in file.i_mmap.overlapping(offset, offset + NR):
            if other is not vma and not other.flags & f.VM_SHARED:
                first = other.first + offset - other.pgoff
                await other.mm.zap_page_range(other, first, first + NR, locked=True)
    await file.machine.settle()


# ---------------------------------------------------------------------- ranges


def expanded(vma: Vma, first: int, last: int) -> tuple[int, int]:
    """A range with the 1 GiB around it whose tables others may share.

    Source: adjust_range_if_pmd_sharing_possible.
    """
    low, high = -(-vma.first // _PUD) * _PUD, vma.last // _PUD * _PUD
    if not vma.flags & f.VM_MAYSHARE or high <= low or last <= low or first >= high:
        return first, last
    if first > low:
        first = first // _PUD * _PUD
    if last < high:
        last = -(-last // _PUD) * _PUD
    return first, last


async def change_protection(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    """Bring the entries of [first, last) in line; announced even if there are none."""
    async with mm.section(*expanded(vma, first, last), Event.PROTECTION_VMA):
        for index in [i for i in mm.pt.huge if first <= i * NR < last]:
            mm.pt.huge[index] = mm.pt.huge[index] & ~_PROT_BITS | vma.prot & _PROT_BITS
        mm.flush_tlb(first, last)


def copy_pinned(child: AddressSpace[Any], vma: Vma, index: int, entry: int) -> int:
    """fork: give the child a copy of a page that a device writes to; 1, 0 if not pinned, -1."""
    machine = child.machine
    frames = machine.frames
    head = (entry & f.PFN_MASK) >> PAGE_SHIFT
    words = frames.words[head : head + NR]
    if not (words & np.uint64(fr.PG_PINNED)).any() or not frames.word[head] & fr.PG_EXCLUSIVE:
        return 0
    assert isinstance(vma.file, HugeFile)
    new = machine.hugetlb.take(vma.file, -1)
    if new < 0:
        return -1
    for at in range(NR):
        frames.copy(head + at, new + at)
    _new_anon(child, vma, index, new)
    child.pt.set_huge(index, new << PAGE_SHIFT | vma.prot | f.PTE_DIRTY | _YOUNG)
    return 1
