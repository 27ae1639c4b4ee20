"""Migration: a page gets another frame (compaction, NUMA balancing, memory offlining).

Every mapping is announced and replaced by a migration entry, at which faults wait; then the
contents move and the entries map the new frame, which is told to nobody. Source: mm/migrate.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import anyio
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

_CLUSTER = 32


async def migrate_page(machine: Machine[Any], mm: AddressSpace[Any], addr: int) -> int:
    """Move the page at `addr` to a new frame, whose number is returned; one section per mapping.

    ENOENT if no page is there, EBUSY if somebody holds it (a pin), ENOMEM without a frame. Contents
    and permissions stay. May suspend.
    """
    page = addr >> PAGE_SHIFT
    entry = mm.pt.get(page)
    if not entry & f.PTE_PRESENT or entry & f.PTE_SPECIAL or page >> 9 in mm.pt.huge:
        raise MmError(errno.ENOENT, f"migrate({addr:#x}) in {mm.name}: no small page is there")
    frames = machine.frames
    old: int = (entry & f.PFN_MASK) >> PAGE_SHIFT
    if frames.word[old] & (fr.PG_PINNED | fr.PG_KSM) or old in machine.migrating:
        raise MmError(errno.EBUSY, f"migrate({addr:#x}) in {mm.name}: frame {old} is held")
    new = await machine.alloc_frame()
    if not await _migrate(machine, old, new):
        raise MmError(errno.EBUSY, f"migrate({addr:#x}) in {mm.name}: frame {old} is held")
    return new


async def compact(machine: Machine[Any]) -> int:
    """Move pages from low frames to high ones, so that free memory is in one piece; how many.

    Those that nobody holds go in batches of 32, in each the highest first; an address stays mapped,
    and every mapping is told of one page. Source: mm/compaction.c (compact_zone).
    """
    machine.lru.drain()
    frames = machine.frames
    moved = 0
    listed = np.flatnonzero(frames.words & np.uint64(fr.PG_LRU))
    for at in range(0, len(listed), _CLUSTER):
        batch = [frame for frame in listed[at : at + _CLUSTER].tolist() if _movable(machine, frame)]
        if not batch:
            continue
        targets = frames.alloc_high(batch[0], len(batch))
        if not targets:
            break
        for old in reversed(batch):
            if targets and targets[0] > old and _movable(machine, old):
                moved += await _migrate(machine, old, targets.pop(0))
        for target in targets:
            frames.give_back(target)
        await machine.cond_resched(_CLUSTER)
    return moved


def _movable(machine: Machine[Any], frame: int) -> bool:
    word = machine.frames.word[frame]
    held = word & (fr.PG_PINNED | fr.PG_KSM | fr.PG_HUGE | fr.PG_LARGE)
    return bool(word & fr.PG_LRU and not held and frame not in machine.migrating)


async def _migrate(machine: Machine[Any], old: int, new: int) -> bool:
    """Move what is in one frame to another, which is given back if somebody holds the first."""
    done = machine.migrating[old] = anyio.Event()
    machine.frames.get(old)
    try:
        moved = await _move(machine, old, new)
    finally:
        del machine.migrating[old]
        done.set()
    machine.put_page(old)
    if not moved:
        machine.frames.give_back(new)
    return moved


async def _move(machine: Machine[Any], old: int, new: int) -> bool:
    lock, _ = machine.vmscan.mappings(old)
    if lock is None:
        return False
    frames = machine.frames
    places: list[tuple[Vma, int]] = []
    async with lock.reading():
        try:
            for vma, page in machine.vmscan.mappings(old)[1]:
                async with vma.mm.section(page, page + 1, Event.CLEAR, locked=True):
                    if _to_migration(machine, vma, page, old):
                        places.append((vma, page))
        finally:
            # The migration entries hold a reference each; the cache and this function one.
            word = frames.word[old]
            cached = bool(word & (fr.PG_PAGECACHE | fr.PG_SWAPCACHE))
            free = word & fr.REF_MASK == len(places) + 1 + cached
            if free:
                _replace(machine, old, new)
            for vma, page in places:
                _restore(machine, vma, page, old, new if free else old)
    await machine.settle()
    return bool(free)


def _to_migration(machine: Machine[Any], vma: Vma, page: int, old: int) -> bool:
    mm = vma.mm
    if not mm.maps(page, old) or page >> 9 in mm.pt.huge:
        return False
    entry = mm.pt.get(page)
    word = machine.frames.word[old]
    left = old << PAGE_SHIFT | f.SWP_MIGRATION | entry & f.PTE_UFFD_WP
    if entry & f.PTE_RW:
        left |= f.SWP_WRITE
    if word & fr.PG_EXCLUSIVE:
        left |= f.SWP_EXCLUSIVE
    if entry & f.PTE_DIRTY:
        machine.frames.word[old] |= fr.PG_DIRTY
    mm.set_pte(page, left)
    mm.flush_tlb(page, page + 1)
    machine.remove_rmap(old)
    return True


def _replace(machine: Machine[Any], old: int, new: int) -> None:
    """Give the new frame the old one's identity: owner, flags, contents, places in caches."""
    frames = machine.frames
    moved = frames.word[old] & (0xFFFF << 32) & ~(fr.PG_PAGECACHE | fr.PG_SWAPCACHE)
    frames.word[new] |= moved
    frames.rmap[new] = frames.rmap[old]
    frames.copy(old, new)
    word = frames.word[old]
    if word & fr.PG_SWAPCACHE:
        slot = machine.swap.slot_of.pop(old)
        frames.word[old] &= ~fr.PG_SWAPCACHE
        frames.put(old)
        machine.swap.add_to_cache(new, slot)
    if word & fr.PG_PAGECACHE:
        where = frames.rmap[old]
        owner = machine.owners[where >> fr.OWNER_SHIFT]
        assert isinstance(owner, File)
        owner.pages[where & fr.INDEX_MASK] = new
        frames.word[new] = frames.word[new] + fr.REF_ONE | fr.PG_PAGECACHE
        frames.word[old] &= ~(fr.PG_PAGECACHE | fr.PG_DIRTY)
        frames.put(old)
    machine.lru.move(new)


def _restore(machine: Machine[Any], vma: Vma, page: int, old: int, frame: int) -> None:
    mm = vma.mm
    entry = mm.pt.get(page)
    if entry & (f.PTE_PRESENT | f.SWP_TYPE_MASK) != f.SWP_MIGRATION:
        return
    if (entry & f.PFN_MASK) >> PAGE_SHIFT != old:
        return
    frames = machine.frames
    back = frame << PAGE_SHIFT | vma.prot & ~(f.PTE_RW | f.PTE_ACCESSED) | entry & f.PTE_UFFD_WP
    if entry & f.SWP_WRITE:
        back |= f.PTE_RW
    frames.word[frame] += fr.MAPPED_ONCE
    mm.set_pte(page, back)
    frames.put(old)
