"""madvise: what a process says about its memory, and what that announces.

Advice that changes flags splits and merges VMAs with mmap_lock held for writing; the rest works on
pages under mmap_lock for reading. A hole gives ENOMEM after everything else was done.

Source: mm/madvise.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT, Event

from . import flags as f
from . import frames as fr
from .memory import PRESENT, SPECIAL, frames_of
from .mmap import pages_of
from .vma import Vma, index_after, modify

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from .mm import AddressSpace

_SET_CLEAR: Final[dict[str, tuple[int, int]]] = {
    "normal": (0, f.VM_RAND_READ | f.VM_SEQ_READ),
    "random": (f.VM_RAND_READ, f.VM_SEQ_READ),
    "sequential": (f.VM_SEQ_READ, f.VM_RAND_READ),
    "dontfork": (f.VM_DONTCOPY, 0),
    "dofork": (0, f.VM_DONTCOPY),
    "wipeonfork": (f.VM_WIPEONFORK, 0),
    "keeponfork": (0, f.VM_WIPEONFORK),
    "dontdump": (f.VM_DONTDUMP, 0),
    "dodump": (0, f.VM_DONTDUMP),
    "mergeable": (f.VM_MERGEABLE, 0),
    "unmergeable": (0, f.VM_MERGEABLE),
    "hugepage": (f.VM_HUGEPAGE, f.VM_NOHUGEPAGE),
    "nohugepage": (f.VM_NOHUGEPAGE, f.VM_HUGEPAGE),
}
_OTHERS_MAY: Final = ("cold", "pageout", "willneed", "collapse")
_CLEAN_OLD: Final = ~np.uint64(f.PTE_DIRTY | f.PTE_ACCESSED)
_OLD: Final = ~np.uint64(f.PTE_ACCESSED)


async def madvise(mm: AddressSpace[Any], addr: int, length: int, advice: str) -> None:
    """Advise [addr, addr + length) bytes; `advice` is the name behind MADV_ in lower case.

    EINVAL if unaligned, unknown, or not for such a mapping; ENOMEM at holes, when the rest is
    done; EACCES, EPERM and EFAULT as each advice says. May suspend.
    """
    mm.require_alive()
    first, last = pages_of(mm, addr, length, f"madvise({advice})")
    if advice not in _SET_CLEAR and advice not in _PAGES and advice not in _POPULATE:
        raise MmError(errno.EINVAL, f"madvise({addr:#x}, {length:#x}): unknown advice {advice!r}")
    if first == last:
        return
    await mm.machine.cond_resched()
    if advice in _POPULATE:
        await _populate(mm, first, last, write=advice == "populate_write")
    elif advice in _SET_CLEAR:
        async with mm.write_locked:
            await _walk(mm, first, last, advice)
    elif advice == "remove":
        await _remove(mm, first, last)
    else:
        async with mm.mmap_lock.reading():
            await _walk(mm, first, last, advice)
    await mm.machine.cond_resched(last - first)


async def process_madvise(
    mm: AddressSpace[Any], ranges: Iterable[tuple[int, int]], advice: str
) -> int:
    """Another process advises this one: (addr, length) in bytes; how many bytes were advised.

    Less than was asked for if a range after the first cannot be advised, whose error is raised if
    it is the first. EINVAL for advice that only the process itself may give.
    """
    if advice not in _OTHERS_MAY:
        raise MmError(errno.EINVAL, f"process_madvise({advice}): expected one of {_OTHERS_MAY}")
    done = 0
    for addr, length in ranges:
        try:
            await madvise(mm, addr, length, advice)
        except MmError:
            if done:
                break
            raise
        done += length
    return done


async def _walk(mm: AddressSpace[Any], first: int, last: int, advice: str) -> None:
    hole = False
    at = first
    while at < last:
        index = index_after(mm, at)
        if index == len(mm.vmas):
            hole = True
            break
        vma = mm.vmas[index]
        if at < vma.first:
            hole = True
            at = vma.first
            if at >= last:
                break
        end = min(vma.last, last)
        if advice in _SET_CLEAR:
            await _change_flags(mm, vma, at, end, advice)
        else:
            await _PAGES[advice](mm, vma, at, end)
        at = end
    if hole:
        raise MmError(
            errno.ENOMEM,
            f"madvise({advice}) in {mm.name}: not all of [{first << PAGE_SHIFT:#x}, "
            f"{last << PAGE_SHIFT:#x}) is mapped",
        )


def _refuse(vma: Vma, advice: str, number: int = errno.EINVAL) -> MmError:
    return MmError(number, f"madvise({advice}): not for {vma!r}")


async def _change_flags(
    mm: AddressSpace[Any], vma: Vma, first: int, last: int, advice: str
) -> None:
    set_, clear = _SET_CLEAR[advice]
    if advice == "wipeonfork" and (vma.file is not None or vma.flags & f.VM_SHARED):
        raise _refuse(vma, advice)
    no_ksm = f.VM_SHARED | f.VM_MAYSHARE | f.VM_SPECIAL | f.VM_HUGETLB
    if advice == "mergeable" and vma.flags & no_ksm:
        return
    if advice == "unmergeable" and vma.flags & f.VM_MERGEABLE and vma.anon_vma is not None:
        await mm.machine.ksm.unmerge(mm, vma, first, last)
    flags = vma.flags & ~clear | set_
    if flags == vma.flags:
        return
    vma = await modify(mm, vma, first, last, flags)
    mm.vma_start_write(vma)
    vma.flags = flags | vma.flags & f.VM_MAYBE_GUARD


# ---------------------------------------------------------------------- dropping pages


def _may_discard(vma: Vma, advice: str) -> None:
    forbidden = f.VM_PFNMAP | (0 if advice == "dontneed_locked" else f.VM_LOCKED)
    if vma.flags & forbidden:
        raise _refuse(vma, advice)
    if vma.flags & f.VM_SEALED and vma.anonymous and not vma.flags & f.VM_WRITE:
        raise _refuse(vma, advice, errno.EPERM)


async def _dontneed(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    _may_discard(vma, "dontneed")
    await _discard(mm, vma, first, last)


async def _dontneed_locked(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    _may_discard(vma, "dontneed_locked")
    await _discard(mm, vma, first, last)


async def _discard(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    if vma.flags & f.VM_HUGETLB:
        # No more than was asked for: a huge page that only begins in the range stays.
        if first & 511:
            raise _refuse(vma, "dontneed")
        last &= ~511
        if first == last:
            return
    await mm.zap_page_range(vma, first, last)
    mm.pt.reclaim_tables(first, last)


async def _free(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    """Let reclaim drop the pages unless they are written again (lazyfree)."""
    _may_discard(vma, "free")
    if not vma.anonymous:
        raise _refuse(vma, "free")
    mm.machine.lru.drain()
    async with mm.section(first, last, Event.CLEAR):
        await _free_huge(mm, vma, first, last)
        for _, entries in mm.pt.runs(first, last):
            _free_entries(mm, entries)
        mm.flush_tlb(first, last)


def _free_entries(mm: AddressSpace[Any], entries: npt.NDArray[np.uint64]) -> None:
    frames, swap = mm.machine.frames, mm.machine.swap
    swapped = np.flatnonzero(
        (entries & np.uint64(f.PTE_PRESENT | f.SWP_TYPE_MASK)) == np.uint64(f.SWP_SWAP)
    )
    for where in swapped.tolist():
        slot = int(entries[where] & np.uint64(f.PFN_MASK)) >> PAGE_SHIFT
        entries[where] = 0
        swap.drop(slot)
        swap.reclaim_unmapped(slot)
    at = ((entries & (PRESENT | SPECIAL)) == PRESENT).nonzero()[0]
    pfns = frames_of(entries[at])
    words = frames.words[pfns]
    keep = np.zeros(len(pfns), np.bool_)
    for nth in np.flatnonzero(words & np.uint64(fr.PG_SWAPCACHE | fr.PG_DIRTY)).tolist():
        # What is dirty, or in swap, may be what another process wants to keep.
        word, frame = int(words[nth]), int(pfns[nth])
        keep[nth] = word & fr.MAP_MASK != fr.MAP_ONE or (
            bool(word & fr.PG_SWAPCACHE) and not swap.try_free(frame)
        )
    at, pfns = at[~keep], pfns[~keep]
    entries[at] &= _CLEAN_OLD
    frames.words[pfns] &= ~np.uint64(fr.PG_DIRTY)
    mm.machine.lru.lazyfree(pfns)


async def _free_huge(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    for index in [i for i in mm.pt.huge if first < (i + 1) << 9 and i << 9 < last]:
        page = index << 9
        if page < first or page + 512 > last:
            await mm.split_huge_pmd(page, vma)
            await mm.machine.split_folio(mm, page)
        else:
            entry = mm.pt.huge[index]
            mm.pt.huge[index] = entry & ~(f.PTE_DIRTY | f.PTE_ACCESSED)
            if not entry & f.PTE_SPECIAL:
                head = (entry & f.PFN_MASK) >> PAGE_SHIFT
                mm.machine.frames.words[head : head + 512] &= ~np.uint64(
                    fr.PG_DIRTY | fr.PG_SWAPBACKED | fr.PG_ACTIVE | fr.PG_REFERENCED
                )
                mm.machine.lru.move(head)


# ---------------------------------------------------------------------- ageing and paging out


def _may_age(vma: Vma, advice: str) -> None:
    if vma.flags & (f.VM_LOCKED | f.VM_PFNMAP | f.VM_HUGETLB):
        raise _refuse(vma, advice)


async def _cold(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    """Clear the accessed bits of pages that nobody shares; the drivers' are left as they are."""
    _may_age(vma, "cold")
    mm.machine.lru.drain()
    for index in [i for i in mm.pt.huge if first < (i + 1) << 9 and i << 9 < last]:
        mm.pt.huge[index] &= ~f.PTE_ACCESSED
    for page, entries in mm.pt.runs(first, last):
        at, pfns = _alone(mm, entries)
        entries[at] &= _OLD
        mm.machine.lru.deactivate(pfns)
        mm.flush_tlb(page, page + len(entries))


def _alone(
    mm: AddressSpace[Any], entries: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the pages are that are on an LRU list and mapped once, and their frames."""
    at = ((entries & (PRESENT | SPECIAL)) == PRESENT).nonzero()[0]
    pfns = frames_of(entries[at])
    words = mm.machine.frames.words[pfns]
    alone = (words & np.uint64(fr.MAP_MASK | fr.PG_LRU)) == np.uint64(fr.MAP_ONE | fr.PG_LRU)
    return at[alone], pfns[alone]


async def _pageout(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    """Reclaim what only this process maps, a page table at a time, in address order."""
    _may_age(vma, "pageout")
    mm.machine.lru.drain()
    for index in mm.pt.indices(first, last):
        page = index << 9
        if index in mm.pt.huge and not await mm.machine.pageout_huge(mm, vma, page, first, last):
            continue
        for _, entries in mm.pt.runs(max(first, page), min(last, page + 512)):
            _, pfns = _alone(mm, entries)
            evictable = (
                mm.machine.frames.words[pfns] & np.uint64(fr.PG_UNEVICTABLE | fr.PG_MLOCKED)
            ) == 0
            if len(pfns):
                await mm.machine.reclaim_pages(pfns[evictable].tolist())


async def _willneed(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    """Begin to read what is not in memory: swap into its cache, files into theirs."""
    if vma.file is not None:
        low = vma.pgoff + first - vma.first
        await vma.file.readahead(low, min(low + last - first, vma.file.page_end))
        if not vma.file.writenotify:
            mm.machine.lru.drain()
        return
    for _, entries in mm.pt.runs(first, last):
        slots = frames_of(
            entries[(entries & np.uint64(f.PTE_PRESENT | f.SWP_TYPE_MASK)) == np.uint64(f.SWP_SWAP)]
        )
        for slot in slots.tolist():
            if slot not in mm.machine.swap.cache:
                await mm.machine.read_swap_cache(slot, readahead=False)
    mm.machine.lru.drain()


# ---------------------------------------------------------------------- guard pages


async def _guard_install(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    """Make every access to the range a SEGV; what was mapped there is dropped."""
    if vma.flags & (f.VM_SPECIAL | f.VM_HUGETLB | f.VM_LOCKED):
        raise _refuse(vma, "guard_install")
    vma.flags |= f.VM_MAYBE_GUARD
    if vma.anonymous and vma.anon_vma is None:
        await mm.anon_vma_prepare(vma)
    mapped = any(first < (i + 1) << 9 and i << 9 < last for i in mm.pt.huge)
    guard = np.uint64(f.MARKER_GUARD)
    mapped = mapped or any(
        ((entries != 0) & (entries != guard)).any() for _, entries in mm.pt.runs(first, last)
    )
    if mapped:
        await mm.zap_page_range(vma, first, last)
    mm.pt.populate(first, last)
    for _, entries in mm.pt.runs(first, last):
        entries[:] = guard


async def _guard_remove(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    if vma.flags & (f.VM_SPECIAL | f.VM_HUGETLB):
        raise _refuse(vma, "guard_remove")
    for _, entries in mm.pt.runs(first, last):
        entries[entries == np.uint64(f.MARKER_GUARD)] = 0


# ---------------------------------------------------------------------- the rest


async def _collapse(mm: AddressSpace[Any], vma: Vma, first: int, last: int) -> None:
    await mm.machine.collapse(mm, vma, first, last)


async def _remove(mm: AddressSpace[Any], first: int, last: int) -> None:
    """Punch a hole into the file; mmap_lock is not held while the file does it."""
    at = first
    hole = False
    while at < last:
        async with mm.mmap_lock.reading():
            index = index_after(mm, at)
            if index == len(mm.vmas) or mm.vmas[index].first >= last:
                hole = True
                break
            vma = mm.vmas[index]
            hole = hole or vma.first > at
            at = max(at, vma.first)
            end = min(last, vma.last)
            file = vma.file
            if vma.flags & f.VM_LOCKED or file is None:
                raise _refuse(vma, "remove")
            if vma.flags & (f.VM_SHARED | f.VM_MAYWRITE) != f.VM_SHARED | f.VM_MAYWRITE:
                raise _refuse(vma, "remove", errno.EACCES)
            offset = vma.pgoff + at - vma.first
            file.get()
        try:
            await file.fallocate("punch", offset << PAGE_SHIFT, (end - at) << PAGE_SHIFT)
        finally:
            file.put()
        at = end
    if hole:
        raise MmError(errno.ENOMEM, f"madvise(remove) in {mm.name}: not all of it is mapped")


async def _populate(mm: AddressSpace[Any], first: int, last: int, *, write: bool) -> None:
    await mm.populate(first, last, write=write, madvise=True)


_POPULATE: Final = ("populate_read", "populate_write")
_PAGES: Final[dict[str, Any]] = {
    "dontneed": _dontneed,
    "dontneed_locked": _dontneed_locked,
    "free": _free,
    "cold": _cold,
    "pageout": _pageout,
    "willneed": _willneed,
    "remove": _remove,
    "guard_install": _guard_install,
    "guard_remove": _guard_remove,
    "collapse": _collapse,
}
