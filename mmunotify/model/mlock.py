"""mlock, munlock, mseal and msync: flags of VMAs, and writing back what they map.

Source: mm/mlock.c, mm/mseal.c, mm/msync.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np

from mmunotify.errors import MmError

from . import flags as f
from . import frames as fr
from .memory import PRESENT, SPECIAL, frames_of
from .mmap import pages_of
from .mprotect import mapped
from .vma import find_vma, index_after, modify, vmas_in

if TYPE_CHECKING:
    from .filemap import File
    from .mm import AddressSpace
    from .vma import Vma


async def mlock(mm: AddressSpace[Any], addr: int, length: int, onfault: bool = False) -> None:
    """Keep [addr, addr + length) in memory: fault it in now, or as it is touched (`onfault`).

    ENOMEM at a hole, after the mappings before it were locked, and where a page cannot be had.
    """
    mm.require_alive()
    first, last = _whole_pages(mm, addr, length)
    flags = f.VM_LOCKED | (f.VM_LOCKONFAULT if onfault else 0)
    await mm.machine.cond_resched()
    async with mm.write_locked:
        await _apply(mm, first, last, flags)
    try:
        await mm.populate(first, last)
    except MmError as error:
        number = errno.ENOMEM if error.errno == errno.EFAULT else error.errno or errno.ENOMEM
        raise MmError(number, f"mlock({addr:#x}, {length:#x}): {error}") from None


async def munlock(mm: AddressSpace[Any], addr: int, length: int) -> None:
    """Undo mlock; ENOMEM at a hole, after the mappings before it."""
    mm.require_alive()
    first, last = _whole_pages(mm, addr, length)
    await mm.machine.cond_resched()
    async with mm.write_locked:
        await _apply(mm, first, last, 0)


def _whole_pages(mm: AddressSpace[Any], addr: int, length: int) -> tuple[int, int]:
    inside = addr & 0xFFF
    return pages_of(mm, addr - inside, length + inside, "mlock")


async def _apply(mm: AddressSpace[Any], first: int, last: int, locked: int) -> None:
    at = first
    while at < last:
        vma = find_vma(mm, at)
        if vma is None:
            raise MmError(errno.ENOMEM, f"mlock in {mm.name}: nothing is mapped at {at << 12:#x}")
        end = min(vma.last, last)
        flags = vma.flags & ~f.VM_LOCKED_MASK | locked
        if flags != vma.flags and not vma.flags & (f.VM_SPECIAL | f.VM_HUGETLB):
            was = vma.flags & f.VM_LOCKED
            vma = await modify(mm, vma, at, end, flags)
            mm.vma_start_write(vma)
            vma.flags = flags | vma.flags & f.VM_MAYBE_GUARD
            if bool(was) != bool(locked):
                _mark_pages(mm, at, end, locked=bool(locked))
        at = end


def _mark_pages(mm: AddressSpace[Any], first: int, last: int, *, locked: bool) -> None:
    """Move the pages that are there to the unevictable list, or back (mlock_vma_pages_range)."""
    mm.machine.lru.drain()
    words = mm.machine.frames.words
    bits = np.uint64(fr.PG_MLOCKED | fr.PG_UNEVICTABLE)
    for _, entries in mm.pt.runs(first, last):
        pfns = frames_of(entries[(entries & (PRESENT | SPECIAL)) == PRESENT])
        if locked:
            words[pfns] |= bits
        else:
            words[pfns] &= ~bits
            mm.machine.lru.put_back(pfns)


async def mseal(mm: AddressSpace[Any], addr: int, length: int) -> None:
    """Refuse all further changes of the mappings; ENOMEM, and nothing done, if there is a hole."""
    mm.require_alive()
    first, last = pages_of(mm, addr, length, "mseal")
    async with mm.write_locked:
        if not mapped(mm, first, last):
            raise MmError(errno.ENOMEM, f"mseal({addr:#x}, {length:#x}): not all of it is mapped")
        for vma in vmas_in(mm, first, last):
            if not vma.flags & f.VM_SEALED:
                flags = vma.flags | f.VM_SEALED
                at, end = max(first, vma.first), min(last, vma.last)
                merged = await modify(mm, vma, at, end, flags)
                merged.flags |= f.VM_SEALED


async def msync(mm: AddressSpace[Any], addr: int, length: int, flags: str = "sync") -> None:
    """Write what the range's shared files have dirty ("sync"), or do nothing ("async").

    ENOMEM if there is a hole, when the rest is done.
    """
    mm.require_alive()
    first, last = pages_of(mm, addr, length, "msync")
    await mm.machine.cond_resched()
    hole = False
    at = first
    while at < last:
        work: tuple[File, int, int] | None = None
        async with mm.mmap_lock.reading():
            index = index_after(mm, at)
            if index == len(mm.vmas) or mm.vmas[index].first >= last:
                hole = True
                break
            vma = mm.vmas[index]
            hole = hole or vma.first > at
            at, low = min(vma.last, last), max(at, vma.first)
            work = _work(vma, low, at) if flags == "sync" else None
        if work is not None:
            try:
                await work[0].writeback(work[1], work[2])
            finally:
                work[0].put()
    if hole:
        raise MmError(errno.ENOMEM, f"msync({addr:#x}, {length:#x}): not all of it is mapped")


def _work(vma: Vma, first: int, last: int) -> tuple[File, int, int] | None:
    if vma.file is None or not vma.flags & f.VM_SHARED:
        return None
    vma.file.get()
    low = vma.pgoff + first - vma.first
    return vma.file, low, low + last - first
