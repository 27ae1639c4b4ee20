"""What /proc/pid tells of an address space: smaps, pagemap, clear_refs, PAGEMAP_SCAN.

Source: fs/proc/task_mmu.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE, ULONG_MAX, Event, Range

from . import flags as f
from . import frames as fr
from .vma import Vma, vmas_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .mm import AddressSpace


def _entries(mm: AddressSpace[Any], first: int, last: int) -> Iterator[tuple[int, int]]:
    """(page, entry) of every entry that is not zero, those of huge pages as small ones."""
    for index in mm.pt.indices(first, last):
        base = index << 9
        huge = mm.pt.huge.get(index)
        if huge is not None:
            for page in range(max(first, base), min(last, base + 512)):
                yield page, huge + ((page - base) << PAGE_SHIFT)
            continue
        entries = mm.pt.leaves[index].entries
        for at in entries.nonzero()[0].tolist():
            if first <= base + at < last:
                yield base + at, int(entries[at])


def smaps(mm: AddressSpace[Any], vma: Vma) -> dict[str, int]:
    """Page counts of one VMA as /proc/pid/smaps gives them, zeros left out.

    R Rss, pd pc sd sc private or shared, dirty or clean, y Referenced, an Anonymous, k KSM,
    lf LazyFree, ah sh fh huge, sw Swap, lk Locked.
    """
    counts: dict[str, int] = {}

    def add(name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    words = mm.machine.frames.word
    seen = set()
    locked = 0
    if vma.flags & f.VM_HUGETLB:
        return counts
    for page, entry in _entries(mm, vma.first, vma.last):
        seen.add(page)
        if not entry & f.PTE_PRESENT:
            if entry & f.SWP_TYPE_MASK == f.SWP_SWAP:
                add("sw")
            continue
        if entry & f.PTE_SPECIAL:
            continue
        word = words[(entry & f.PFN_MASK) >> PAGE_SHIFT]
        add("R")
        dirty = bool(entry & f.PTE_DIRTY or word & fr.PG_DIRTY)
        shared = word & fr.MAP_MASK > fr.MAP_ONE
        add(("s" if shared else "p") + ("d" if dirty else "c"))
        if entry & f.PTE_ACCESSED or word & fr.PG_REFERENCED:
            add("y")
        if word & fr.PG_ANON:
            add("an")
            if not dirty and not word & fr.PG_SWAPBACKED:
                add("lf")
        if word & fr.PG_KSM:
            add("k")
        if page >> 9 in mm.pt.huge:
            add("ah" if word & fr.PG_ANON else "fh")
        if vma.flags & f.VM_LOCKED:
            # Pss: a page counts by its share, in units of 1/4096 byte.
            locked += (PAGE_SIZE << 12) // ((word & fr.MAP_MASK) >> fr.MAP_SHIFT)
    if locked >> 12 >= PAGE_SIZE:
        counts["lk"] = locked >> 12 >> PAGE_SHIFT
    if vma.file is not None:
        private = vma.flags & (f.VM_SHARED | f.VM_WRITE) == f.VM_WRITE
        for index in vma.file.swapped:
            page = vma.first + index - vma.pgoff
            if vma.first <= page < vma.last and not (private and page in seen):
                add("sw")
    return counts


def pagemap(mm: AddressSpace[Any], start: int, end: int) -> list[tuple[int, str, int | None]]:
    """(page number, code, frame or None) of the pages in [start, end) bytes that have an entry.

    a anonymous, f file, upper case if mapped more than once; z zero page, p a device's frame,
    k KSM, s swap; then h part of a huge folio, c in the swap cache, w write-protected by uffd,
    g guard.
    """
    words = mm.machine.frames.word
    found: list[tuple[int, str, int | None]] = []
    for page, entry in _entries(mm, start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)):
        wp = "w" if entry & f.PTE_UFFD_WP else ""
        if not entry & f.PTE_PRESENT:
            guard = "g" if entry == f.MARKER_GUARD else ""
            found.append((page, "s" + wp + guard, None))
            continue
        if entry & f.PTE_SPECIAL:
            zero = page >> 9 in mm.pt.huge or not (entry ^ mm.machine.zero_entry) & f.PFN_MASK
            found.append((page, ("z" if zero else "p") + wp, None))
            continue
        frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
        # What PAGEMAP says of a huge page's sharing, it takes from the first of its frames.
        word = words[frame & ~511 if page >> 9 in mm.pt.huge else frame]
        code = "a" if word & fr.PG_ANON else "f"
        if word & fr.MAP_MASK > fr.MAP_ONE:
            code = code.upper()
        if word & fr.PG_KSM:
            code = "k"
        code += "h" if word & (fr.PG_HUGE | fr.PG_LARGE) else ""
        code += "c" if word & fr.PG_SWAPCACHE else ""
        found.append((page, code + wp, frame))
    return found


async def clear_refs(mm: AddressSpace[Any], value: int) -> None:
    """Write to /proc/pid/clear_refs: 1 all, 2 anonymous, 3 file pages, 4 soft-dirty, 5 peak RSS.

    4 announces the whole address space even where soft-dirty is not configured; the drivers'
    accessed bits are not asked for by any. EINVAL for other values.
    """
    mm.require_alive()
    if not 1 <= value <= 5:
        raise MmError(errno.EINVAL, f"clear_refs({value}): expected 1 to 5")
    await mm.machine.cond_resched()
    if value == 5:
        return
    if value == 4:
        async with mm.write_locked:
            if mm.notifiers.armed and mm.machine.era != "v16":
                async with mm.notifiers.invalidating(Range(0, ULONG_MAX, Event.SOFT_DIRTY)):
                    pass
        return
    old = ~np.uint64(f.PTE_ACCESSED)
    async with mm.mmap_lock.reading():
        for vma in mm.vmas:
            if (value == 2 and vma.file is not None) or (value == 3 and vma.file is None):
                continue
            for index in mm.pt.huge:
                if vma.first <= index << 9 < vma.last:
                    mm.pt.huge[index] &= ~f.PTE_ACCESSED
            for _, entries in mm.pt.runs(vma.first, vma.last):
                used = entries[(entries & np.uint64(f.PTE_PRESENT)) != 0]
                mm.machine.forget_references(used)
                entries[(entries & np.uint64(f.PTE_PRESENT)) != 0] = used & old
        mm.flush_tlb(0, 1 << 52)


async def pagemap_scan(
    mm: AddressSpace[Any],
    start: int,
    end: int,
    wp_matching: bool = False,
    check_wpasync: bool = False,
) -> list[tuple[int, int]]:
    """Ranges, in bytes, of mapped pages: those written and those not, apart (PAGEMAP_SCAN).

    With `wp_matching` only those written since they were write-protected, which they are again, in
    one section over the whole request; mappings without asynchronous uffd write protection are left
    out, or with `check_wpasync` refused (EPERM).
    """
    mm.require_alive()
    first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
    await mm.machine.cond_resched()
    ranges: list[tuple[int, int, bool]] = []
    async with mm.mmap_lock.reading():
        for vma in vmas_in(mm, first, last):
            if check_wpasync and not _async_wp(vma):
                raise MmError(errno.EPERM, f"pagemap_scan: {vma!r} has no asynchronous uffd-wp")
        if not wp_matching:
            _written(mm, first, last, ranges, protect=False)
        else:
            async with mm.section(first, last, Event.PROTECTION_VMA):
                _written(mm, first, last, ranges, protect=True)
                mm.flush_tlb(first, last)
    return [(low << PAGE_SHIFT, high << PAGE_SHIFT) for low, high, _ in ranges]


def _async_wp(vma: Vma) -> bool:
    return vma.uffd is not None and vma.uffd.async_wp


def _written(
    mm: AddressSpace[Any],
    first: int,
    last: int,
    ranges: list[tuple[int, int, bool]],
    *,
    protect: bool,
) -> None:
    for page, entry in _entries(mm, first, last):
        vma = mm.find_vma(page)
        if protect and (vma is None or not _async_wp(vma)):
            continue
        written = not entry & f.PTE_UFFD_WP
        if protect and not written:
            continue
        if ranges and ranges[-1][1:] == (page, written):
            ranges[-1] = (ranges[-1][0], page + 1, written)
        else:
            ranges.append((page, page + 1, written))
        if protect and page >> 9 not in mm.pt.huge:
            mm.set_pte(page, (entry | f.PTE_UFFD_WP) & ~(f.PTE_RW if entry & 1 else 0))
