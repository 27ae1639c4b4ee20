"""Transparent huge pages: PMD mappings, their splits, copies, collapse and swap-out.

A folio of 512 frames is mapped by one entry, or by 512 small ones after a split; its frames count
references and mappings one by one, and only its first frame is on an LRU list.

Source: mm/huge_memory.c, mm/khugepaged.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE, Event

from . import flags as f
from . import frames as fr

if TYPE_CHECKING:
    from .machine import Machine
    from .mm import AddressSpace
    from .vma import Vma

NR: Final = 512
_HUGE: Final = (
    fr.MAPPED_ONCE | fr.PG_ANON | fr.PG_EXCLUSIVE | fr.PG_SWAPBACKED | fr.PG_LRU | fr.PG_HUGE
)
_KEEP_IN_SPLIT: Final = ~(f.PTE_PSE | f.PFN_MASK)


def thp_wanted(mm: AddressSpace[Any], vma: Vma, page: int) -> bool:
    """Whether a fault at a page may map 2 MiB: the mode, the advice, and room in the VMA."""
    mode = mm.machine.thp
    if mode == "never" or vma.file is not None or vma.flags & f.VM_NOHUGEPAGE:
        return False
    if mode != "always" and not vma.flags & f.VM_HUGEPAGE:
        return False
    base = page & ~(NR - 1)
    return base >= vma.first and base + NR <= vma.last and vma.uffd is None


def fault_huge(mm: AddressSpace[Any], vma: Vma, page: int, flags: int) -> bool:
    """Map 2 MiB of fresh or zero memory; False if there is no such block. Never suspends."""
    index = page >> 9
    if not mm.anon_vma_prepare_nowait(vma):
        return False
    if not flags & f.FAULT_WRITE:
        mm.pt.set_huge(index, mm.machine.zero_entry | vma.prot | f.PTE_PSE)
        return True
    head = alloc_huge(mm.machine)
    if head < 0:
        return False
    _map_new(mm, vma, index, head)
    return True


def alloc_huge(machine: Machine[Any]) -> int:
    """The first of 512 frames, or -1."""
    if machine.frames.free <= machine.low + NR:
        return -1
    return machine.frames.alloc_huge()


def _map_new(mm: AddressSpace[Any], vma: Vma, index: int, head: int) -> None:
    assert vma.anon_vma is not None
    frames = mm.machine.frames
    frames.words[head : head + NR] |= np.uint64(_HUGE)
    owner = vma.anon_vma.number << fr.OWNER_SHIFT
    first = (index << 9) - vma.first + vma.pgoff
    frames.rmaps[head : head + NR] = np.arange(owner | first, (owner | first) + NR, dtype=np.uint64)
    mm.machine.lru.move(head)
    writable = f.PTE_RW if vma.flags & f.VM_WRITE else 0
    mm.pt.set_huge(
        index,
        head << PAGE_SHIFT | vma.prot | writable | f.PTE_DIRTY | f.PTE_ACCESSED | f.PTE_PSE,
    )


async def wp_huge(mm: AddressSpace[Any], vma: Vma, page: int, flags: int) -> int:
    """A write to a 2 MiB page that is not writable: reuse, the zero page's copy, or a split.

    A shared page is split, and its small page copied. Source: do_huge_pmd_wp_page.
    """
    from .fault import handle_mm_fault

    index = page >> 9
    entry = mm.pt.huge[index]
    if entry & f.PTE_SPECIAL:
        if vma.anon_vma is None:
            await mm.anon_vma_prepare(vma)
        head = alloc_huge(mm.machine)
        if head >= 0:
            async with mm.section(index << 9, (index + 1) << 9, Event.CLEAR):
                if mm.pt.huge.get(index) == entry:
                    mm.flush_tlb(index << 9, (index + 1) << 9)
                    _map_new(mm, vma, index, head)
            return 0
    else:
        head = (entry & f.PFN_MASK) >> PAGE_SHIFT
        words = mm.machine.frames.words[head : head + NR]
        exclusive = (words & np.uint64(fr.PG_EXCLUSIVE)) != 0
        alone = (words & np.uint64(fr.MAP_MASK)) <= np.uint64(fr.MAP_ONE)
        if exclusive.all() or alone.all():
            words |= np.uint64(fr.PG_EXCLUSIVE)
            if not flags & f.FAULT_UNSHARE:
                writable = f.PTE_RW if vma.flags & f.VM_WRITE else 0
                mm.pt.huge[index] = entry | writable | f.PTE_DIRTY | f.PTE_ACCESSED
            return 0
    await split_huge_pmd(mm, index << 9, vma)
    return await handle_mm_fault(mm, vma, page, flags)


async def split_huge_pmd(
    mm: AddressSpace[Any], page: int, vma: Vma, *, locked: bool = False
) -> None:
    """Map 2 MiB by small entries; announced even if nothing huge is there (__split_huge_pmd)."""
    async with mm.section(page, page + NR, Event.CLEAR, locked=locked):
        split_entry(mm, page >> 9)


def split_entry(mm: AddressSpace[Any], index: int) -> None:
    """The PT step of a split; nothing if there is no huge entry."""
    entry = mm.pt.huge.get(index)
    if entry is None:
        return
    leaf = mm.pt.replace_huge(index)
    pfn = (entry & f.PFN_MASK) >> PAGE_SHIFT
    if entry & f.PTE_SPECIAL:
        leaf.entries[:] = np.uint64(entry & _KEEP_IN_SPLIT | pfn << PAGE_SHIFT)
    else:
        low = np.uint64(entry & _KEEP_IN_SPLIT)
        leaf.entries[:] = (np.arange(pfn, pfn + NR, dtype=np.uint64) << np.uint64(PAGE_SHIFT)) | low
    mm.flush_tlb(index << 9, (index + 1) << 9)


def share_huge(
    child: AddressSpace[Any], parent: AddressSpace[Any], index: int, *, cow: bool
) -> None:
    """fork: the child maps the same 2 MiB, write-protected on both sides (copy_huge_pmd)."""
    entry = parent.pt.huge[index]
    if entry & f.PTE_SPECIAL:
        child.pt.set_huge(index, entry)
        return
    head = (entry & f.PFN_MASK) >> PAGE_SHIFT
    words = parent.machine.frames.words[head : head + NR]
    words += np.uint64(fr.MAPPED_ONCE)
    if cow:
        words &= ~np.uint64(fr.PG_EXCLUSIVE)
        entry &= ~f.PTE_RW
        parent.pt.huge[index] = entry
    child.pt.set_huge(index, entry & ~f.PTE_ACCESSED)


def split_folio(machine: Machine[Any], mm: AddressSpace[Any], page: int) -> None:
    """Make small pages of the folio that a leaf maps; those of zeros become the zero page.

    The caller has split the entry. Source: split_huge_page_to_list_to_order.
    """
    frames = machine.frames
    leaf = mm.pt.leaves[page >> 9]
    for at in range(NR):
        entry = leaf.pte[at]
        if not entry & f.PTE_PRESENT or entry & f.PTE_SPECIAL:
            continue
        frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
        frames.word[frame] &= ~fr.PG_HUGE
        once = frames.word[frame] & fr.COUNTS_MASK == fr.MAPPED_ONCE
        if once and frames.data is not None and not any(frames.data.get(frame, b"")):
            keep = entry & ~(f.PFN_MASK | f.PTE_RW | f.PTE_DIRTY)
            leaf.pte[at] = machine.zero_entry | keep
            machine.remove_rmap(frame)
            machine.put_page(frame)
        else:
            machine.lru.move(frame)


async def pageout_huge(
    machine: Machine[Any], mm: AddressSpace[Any], vma: Vma, page: int, first: int, last: int
) -> bool:
    """MADV_PAGEOUT meets 2 MiB: whole pages go whole; others are split, and True says "go on"."""
    entry = mm.pt.huge[page >> 9]
    if entry & f.PTE_SPECIAL:
        return False
    head = (entry & f.PFN_MASK) >> PAGE_SHIFT
    words = machine.frames.words[head : head + NR]
    if (words & np.uint64(fr.MAP_MASK) != np.uint64(fr.MAP_ONE)).any():
        return False
    if first <= page and page + NR <= last:
        await swap_out(machine, mm, page, head)
        return False
    await split_huge_pmd(mm, page, vma)
    split_folio(machine, mm, page)
    return True


async def swap_out(machine: Machine[Any], mm: AddressSpace[Any], page: int, head: int) -> bool:
    """Write a folio that only this entry maps to swap, as a whole, and free it."""
    frames, swap = machine.frames, machine.swap
    words = frames.words[head : head + NR]
    if swap.free < NR or (words & np.uint64(fr.PG_PINNED)).any():
        return False
    async with mm.section(page, page + NR, Event.CLEAR):
        entry = mm.pt.huge.get(page >> 9, 0)
        if (entry & f.PFN_MASK) >> PAGE_SHIFT != head or entry & f.PTE_SPECIAL:
            return False
        leaf = mm.pt.replace_huge(page >> 9)
        mm.flush_tlb(page, page + NR)
        for at in range(NR):
            slot = swap.alloc()
            swap.write(head + at, slot)
            swap.dup(slot)
            leaf.pte[at] = slot << PAGE_SHIFT | f.SWP_SWAP | f.SWP_EXCLUSIVE
            machine.remove_rmap(head + at)
    for at in range(NR):
        machine.put_page(head + at)
    return True


async def collapse(
    machine: Machine[Any], mm: AddressSpace[Any], vma: Vma, first: int, last: int
) -> None:
    """MADV_COLLAPSE: put each whole 2 MiB of anonymous memory into one folio.

    EINVAL where the VMA cannot have huge pages, where the range has none, and, when the rest is
    done, where nothing is mapped; ENOMEM without a block of memory, EAGAIN where a page is held by
    somebody else.
    """
    low, high = (first + NR - 1) & ~(NR - 1), last & ~(NR - 1)
    # Memory that was never written has no anon_vma, and cannot have them either.
    never = vma.anon_vma is None or vma.flags & (f.VM_SPECIAL | f.VM_HUGETLB | f.VM_NOHUGEPAGE)
    room = ((vma.last - NR) & ~(NR - 1)) >= vma.first
    if never or vma.file is not None or not room or machine.thp == "never" or high < low:
        raise MmError(errno.EINVAL, f"madvise(collapse): not for {vma!r}")
    empty = False
    for page in range(low, high, NR):
        if page >> 9 in mm.pt.leaves:
            await _collapse_one(machine, mm, vma, page)
        elif page >> 9 not in mm.pt.huge:
            empty = True
    if empty:
        raise MmError(errno.EINVAL, f"madvise(collapse) in {vma!r}: part of it has no page table")


async def _collapse_one(machine: Machine[Any], mm: AddressSpace[Any], vma: Vma, page: int) -> None:
    frames = machine.frames
    head = alloc_huge(machine)
    if head < 0:
        raise MmError(errno.ENOMEM, f"madvise(collapse) at {page << PAGE_SHIFT:#x}: no block")
    if vma.anon_vma is None:
        await mm.anon_vma_prepare(vma)
    from .gup import faultin_page

    leaf = mm.pt.leaf_of(page)
    for at in range(NR):
        if leaf.pte[at] and not leaf.pte[at] & f.PTE_PRESENT:
            await faultin_page(mm, vma, page + at, write=False)
    old: list[int] = []
    blocked = False
    async with mm.section(page, page + NR, Event.CLEAR):
        for at in range(NR):
            entry = leaf.pte[at]
            if not entry or entry & f.PTE_SPECIAL:
                continue
            word = frames.word[(entry & f.PFN_MASK) >> PAGE_SHIFT]
            blocked |= word & fr.COUNTS_MASK != fr.MAPPED_ONCE or not word & fr.PG_ANON
        if not blocked:
            for at in range(NR):
                entry = leaf.pte[at]
                leaf.pte[at] = 0
                if entry and not entry & f.PTE_SPECIAL:
                    frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
                    frames.copy(frame, head + at)
                    machine.remove_rmap(frame)
                    old.append(frame)
            mm.flush_tlb(page, page + NR)
            detached = mm.pt.detach(page >> 9)
            assert detached is not None
            mm.pt.pool.free(detached)
            # Before anybody is told the end: a fault would find nothing here, and map zeroes.
            _map_new(mm, vma, page >> 9, head)
    if blocked:
        for at in range(NR):
            frames.give_back(head + at)
        raise MmError(errno.EAGAIN, f"madvise(collapse) at {page << PAGE_SHIFT:#x}: pages in use")
    for frame in old:
        machine.put_page(frame)


def contents_of(machine: Machine[Any], frame: int) -> bytes:
    """The bytes of a frame, zeros if none were stored."""
    data = machine.frames.data
    found = data.get(frame) if data is not None else None
    return bytes(found) if found is not None else bytes(PAGE_SIZE)
