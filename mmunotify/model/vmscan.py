"""Reclaim: which pages go, asking the drivers first, and how each is taken away.

A page is aged (`folio_referenced`: its entries' accessed bits and the drivers', I-AGE), unmapped
everywhere (`try_to_unmap`, one announcement per VMA that may map it), written if need be, and
freed. Reverse-map locks are held for reading around both walks.

Source: mm/vmscan.c, mm/rmap.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE, Event, Range

from . import flags as f
from . import frames as fr
from . import huge_memory, memory
from . import lru as lists
from .filemap import File
from .ksm import StableNode
from .rmap import AnonVma

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mmunotify.locks import RmapLock

    from .machine import Machine
    from .mm import AddressSpace
    from .vma import Vma

_BATCH: Final = 32
_MAX_BATCH: Final = 256
_MAPPING: Final = f.PFN_MASK | f.PTE_PRESENT | f.PTE_SPECIAL
_KEPT: Final = fr.PG_UNEVICTABLE | fr.PG_MLOCKED
_COMMON: Final = fr.MAPPED_ONCE | fr.PG_ANON | fr.PG_SWAPBACKED | fr.PG_LRU
_COMMON_MASK: Final = (
    fr.COUNTS_MASK
    | _COMMON
    | _KEPT
    | fr.PG_SWAPCACHE
    | fr.PG_KSM
    | fr.PG_PINNED
    | fr.PG_HUGE
    | fr.PG_LARGE
)


class Reclaim:
    """The part of a machine that takes pages back."""

    def __init__(self, machine: Machine[Any]) -> None:
        self.machine: Final = machine

    # ------------------------------------------------------------------ reverse map walks

    def mappings(self, frame: int) -> tuple[RmapLock | None, list[tuple[Vma, int]]]:
        """The lock of a page's reverse map, and the (VMA, page) that may map it, in order."""
        where = self.machine.frames.rmap[frame]
        index = where & fr.INDEX_MASK
        owner = self.machine.owners[where >> fr.OWNER_SHIFT]
        if isinstance(owner, StableNode):
            return owner.lock, owner.mappings()
        if owner is None:
            return None, []
        if isinstance(owner, AnonVma):
            tree, lock = owner.tree, owner.lock
        else:
            tree, lock = owner.i_mmap, owner.i_mmap_lock
        return lock, [
            (vma, vma.first + index - vma.pgoff) for vma in tree.overlapping(index, index + 1)
        ]

    async def referenced(self, frame: int) -> tuple[int, int]:
        """How many mappings were accessed since last asked, and their VM_ flags (folio_referenced).

        Clears the accessed bits of entries and drivers, whoever has them.
        """
        lock, mapped = self.mappings(frame)
        if lock is None:
            return 0, 0
        if lock.down_read_trylock():
            try:
                return _clear_references(frame, mapped)
            finally:
                lock.up_read()
        async with lock.reading():
            return _clear_references(frame, self.mappings(frame)[1])

    async def try_to_unmap(self, frame: int) -> bool:
        """Take a page out of every page table; False if somebody must keep it."""
        lock, _ = self.mappings(frame)
        if lock is None:
            return True
        words = self.machine.frames.word
        async with lock.reading():
            for vma, page in self.mappings(frame)[1]:
                if vma.mm.users and not await self._unmap_one(vma, page, frame):
                    break
                if not words[frame] & fr.MAP_MASK:
                    break
        await self.machine.settle()
        return not words[frame] & fr.MAP_MASK

    async def _unmap_one(self, vma: Vma, page: int, frame: int) -> bool:
        mm = vma.mm
        notifiers = mm.notifiers
        if not notifiers.armed:
            return self._clear_entry(vma, page, frame)
        section = mm.section(page, page + 1, Event.CLEAR, locked=True)
        async with section:
            done = self._clear_entry(vma, page, frame)
        if section.failed:
            self.machine.frames.get(frame)
            self.machine.frames.leaked += 1
        return done

    def _clear_entry(self, vma: Vma, page: int, frame: int) -> bool:
        """The PT step: put a swap entry, or nothing, where the page was."""
        mm = vma.mm
        if not mm.maps(page, frame):
            return True
        if vma.flags & f.VM_LOCKED:
            self.machine.mlock(frame)
            return False
        frames, swap = self.machine.frames, self.machine.swap
        pte = mm.pt.leaf_of(page).pte
        entry = pte[page & 511]
        pte[page & 511] = 0
        mm.flush_tlb(page, page + 1)
        word = frames.word[frame]
        left = 0
        if word & fr.PG_ANON:
            if word & fr.PG_SWAPBACKED:
                slot = swap.slot_of[frame]
                swap.dup(slot)
                left = slot << PAGE_SHIFT | f.SWP_SWAP | entry & f.PTE_UFFD_WP
                if word & fr.PG_EXCLUSIVE:
                    left |= f.SWP_EXCLUSIVE
                if entry & f.PTE_DIRTY:
                    frames.word[frame] |= fr.PG_DIRTY
            elif entry & f.PTE_DIRTY or word & fr.PG_DIRTY:
                # Written since MADV_FREE: it is put back, and is swap-backed again.
                pte[page & 511] = entry
                frames.word[frame] |= fr.PG_SWAPBACKED | fr.PG_DIRTY
                return False
            elif word & fr.REF_MASK != 1 + ((word & fr.MAP_MASK) >> fr.MAP_SHIFT):
                pte[page & 511] = entry
                return False
        else:
            if entry & f.PTE_DIRTY:
                frames.word[frame] |= fr.PG_DIRTY
            if entry & f.PTE_UFFD_WP:
                left = f.MARKER_UFFD_WP
        pte[page & 511] = left
        self.machine.remove_rmap(frame)
        frames.put(frame)
        return True

    # ------------------------------------------------------------------ one page

    async def shrink(self, frames: Iterable[int], *, force: bool) -> int:
        """Try to free pages that `Lru.take` or a caller isolated; how many were freed.

        With `force` nobody is asked whether the page was used (MADV_PAGEOUT).
        """
        words = self.machine.frames.word
        batch = list(frames)
        freed = at = 0
        while at < len(batch):
            done, some = self._walk_alike(batch, at, force=force)
            at += done
            freed += some
            if done:
                continue
            frame = batch[at]
            at += 1
            if not words[frame] & fr.PG_LRU:
                continue
            generation = words[frame] & fr.GEN_MASK
            if words[frame] & fr.PG_HUGE:
                freed += await self._shrink_huge(frame, force)
                continue
            self.machine.frames.get(frame)
            try:
                await self._shrink_one(frame, force)
            finally:
                self.machine.put_page(frame)
            if words[frame] & fr.GEN_MASK != generation:
                freed += 1
            elif not words[frame] & _KEPT:
                self.machine.lru.move(frame)
        return freed

    def _walk_alike(
        self, batch: list[int], at: int, *, force: bool = False, deactivate: bool = False
    ) -> tuple[int, int]:
        """`_shrink_one` (or ageing, to `deactivate`) of as many pages as can be had in one step.

        How many that were, and how many of them were freed. For what reclaim mostly meets: a row of
        anonymous pages of one anon_vma, with one VMA whose drivers, if any, can be told in one
        step; each is mapped by one entry, and not in the swap cache, where nobody could find it.
        The reverse-map lock is taken once for all of them.
        """
        machine = self.machine
        frames, lru, swap = machine.frames, machine.lru, machine.swap
        words, rmaps = frames.word, frames.rmap
        number = rmaps[batch[at]] >> fr.OWNER_SHIFT
        owner = machine.owners.table[number]
        if not isinstance(owner, AnonVma) or len(owner.tree.vmas) != 1:
            return 0, 0
        vma = owner.tree.vmas[0]
        mm = vma.mm
        notifiers, leaves = mm.notifiers, mm.pt.leaves
        one_step = notifiers.plain or (notifiers.nowait and machine.era != "v16")
        if vma.flags & f.VM_LOCKED or not mm.users or not owner.lock.down_read_trylock():
            return 0, 0
        first, freed = at, 0
        active: list[int] = []
        inactive: list[int] = []
        shift = vma.first - vma.pgoff - (number << fr.OWNER_SHIFT)
        try:
            while at < len(batch):
                frame = batch[at]
                page = rmaps[frame] + shift
                leaf = leaves.get(page >> 9)
                if leaf is None or words[frame] & _COMMON_MASK != _COMMON:
                    break
                pte = leaf.pte
                entry = pte[page & 511]
                if entry & _MAPPING != frame << PAGE_SHIFT | f.PTE_PRESENT or not one_step:
                    break
                at += 1
                young = 0
                if not force:
                    # Test and clear the accessed bits of the entry and of the drivers (I-AGE).
                    young = entry & f.PTE_ACCESSED
                    if young:
                        pte[page & 511] = entry & ~f.PTE_ACCESSED
                        if mm.tlb is not None:
                            mm.tlb.flush(page, page + 1)
                    if notifiers.armed:
                        start = page << PAGE_SHIFT
                        young |= notifiers.clear_flush_young(start, start + PAGE_SIZE)
                word = words[frame]
                if deactivate:
                    word &= ~fr.PG_ACTIVE
                elif young:
                    word |= fr.PG_ACTIVE if word & fr.PG_REFERENCED else fr.PG_REFERENCED
                elif swap.free:
                    gone = self._swap_out(mm, pte, page, frame)
                    if gone is None:
                        at -= 1
                        break
                    freed += gone
                    continue
                else:
                    word = word & ~fr.PG_REFERENCED | fr.PG_ACTIVE
                words[frame] = word
                (active if word & fr.PG_ACTIVE else inactive).append(frame)
        finally:
            owner.lock.up_read()
            lru.append_all(active, lists.ACTIVE_ANON)
            lru.append_all(inactive, lists.INACTIVE_ANON)
        return at - first, freed

    def _swap_out(self, mm: AddressSpace[Any], pte: Any, page: int, frame: int) -> int | None:
        """Put the only copy of a page where its entry says, announce it, and free the frame.

        Whether it was freed; None, and nothing is done, if a driver has to wait.
        """
        machine = self.machine
        frames, swap, notifiers = machine.frames, machine.swap, mm.notifiers
        rng = told = None
        if notifiers.armed:
            rng = Range(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT, Event.CLEAR)
            if machine.era != "v16":
                told = notifiers.invalidate_range_start_nowait(rng)
                if told is None:
                    return None
            mm.announced.append(rng)
        slot = swap.swap_out(frame)
        word = frames.word[frame]
        left = slot << PAGE_SHIFT | f.SWP_SWAP | pte[page & 511] & f.PTE_UFFD_WP
        pte[page & 511] = left | f.SWP_EXCLUSIVE if word & fr.PG_EXCLUSIVE else left
        if mm.tlb is not None:
            mm.tlb.flush(page, page + 1)
        frames.word[frame] = (word - fr.MAP_ONE) & ~fr.PG_DIRTY
        failed: object = ()
        if rng is not None and told is not None:
            failed = notifiers.invalidate_range_end_atomic(rng, told)
        elif rng is not None:
            failed = notifiers.invalidate_page_atomic(rng.start).failed
        if failed:
            frames.leaked += 1
            return 0
        frames.put(frame)
        return 1

    async def _shrink_one(self, frame: int, force: bool) -> None:
        machine = self.machine
        words, swap = machine.frames.word, machine.swap
        if words[frame] & _KEPT:
            return
        if not force and not await self._is_cold(frame):
            return
        word = words[frame]
        if word & fr.PG_ANON and word & fr.PG_SWAPBACKED and not word & fr.PG_SWAPCACHE:
            slot = -1 if word & fr.PG_PINNED else swap.alloc()
            if slot < 0:
                words[frame] |= fr.PG_ACTIVE
                return
            swap.add_to_cache(frame, slot)
            words[frame] |= fr.PG_DIRTY
        if words[frame] & fr.MAP_MASK and not await self.try_to_unmap(frame):
            words[frame] |= fr.PG_ACTIVE
            if words[frame] & fr.PG_SWAPCACHE and words[frame] & fr.PG_MLOCKED:
                swap.try_free(frame)
            return
        word = words[frame]
        if word & fr.PG_PINNED:
            words[frame] |= fr.PG_ACTIVE
            return
        if word & fr.PG_DIRTY and not self._write_out(frame):
            return
        word = words[frame]
        if word & fr.REF_MASK != 2:
            return
        if machine.frames.on_drop is not None:
            machine.frames.on_drop(frame)
        if word & fr.PG_SWAPCACHE:
            swap.delete_from_cache(frame)
        elif word & fr.PG_PAGECACHE:
            where = machine.frames.rmap[frame]
            owner = machine.owners[where >> fr.OWNER_SHIFT]
            assert isinstance(owner, File)
            owner.remove(where & fr.INDEX_MASK)

    async def _shrink_huge(self, frame: int, force: bool) -> int:
        """Try to free the folio of a frame: whole if one huge entry maps it, or as small pages."""
        machine = self.machine
        words = machine.frames.word
        head = frame & ~511
        if not force and not await self._is_cold(head):
            machine.lru.move(head)
            return 0
        for vma, page in self.mappings(head)[1]:
            mm = vma.mm
            if page >> 9 in mm.pt.huge and mm.maps(page, head):
                if words[head] & fr.COUNTS_MASK == fr.MAPPED_ONCE:
                    if await huge_memory.swap_out(machine, mm, page, head):
                        return 512
                    machine.lru.move(head)
                    return 0
                await huge_memory.split_huge_pmd(mm, page, vma)
        # Small entries map it: its pages are taken one by one from now on.
        for part in range(head, head + 512):
            if words[part] & fr.PG_HUGE:
                words[part] &= ~fr.PG_HUGE
                machine.lru.move(part)
        return 0

    async def _is_cold(self, frame: int) -> bool:
        """Whether reclaim may take a page of the inactive list (folio_check_references)."""
        words = self.machine.frames.word
        count, flags = await self.referenced(frame)
        if flags & f.VM_LOCKED:
            self.machine.mlock(frame)
            return False
        was = words[frame] & fr.PG_REFERENCED
        words[frame] &= ~fr.PG_REFERENCED
        if not count:
            return True
        words[frame] |= fr.PG_REFERENCED
        file = not words[frame] & fr.PG_SWAPBACKED
        if was or count > 1 or (flags & f.VM_EXEC and file):
            words[frame] |= fr.PG_ACTIVE
        return False

    def _write_out(self, frame: int) -> bool:
        """Write a dirty page to swap; False if it has to wait for the flusher (pageout)."""
        machine = self.machine
        words, swap = machine.frames.word, machine.swap
        word = words[frame]
        if word & fr.PG_SWAPCACHE:
            if word & fr.REF_MASK != 2:
                return False
            swap.write(frame, swap.slot_of[frame])
            return True
        if not word & fr.PG_PAGECACHE:
            return True
        where = machine.frames.rmap[frame]
        owner = machine.owners[where >> fr.OWNER_SHIFT]
        index = where & fr.INDEX_MASK
        assert isinstance(owner, File)
        if owner.kind == "ext4":
            # PG_reclaim: the flusher will free it; until then fault-around leaves it alone.
            words[frame] |= fr.PG_READAHEAD | fr.PG_ACTIVE
            return False
        if word & fr.REF_MASK != 2:
            return False
        slot = swap.alloc()
        if slot < 0:
            words[frame] |= fr.PG_ACTIVE
            return False
        swap.write(frame, slot)
        swap.dup(slot)
        owner.swapped[index] = slot
        return True

    # ------------------------------------------------------------------ as somebody else decided

    async def reclaim_range(self, mm: AddressSpace[Any], first: int, last: int) -> int:
        """Take the pages of [first, last) from this address space alone; how many it had.

        For who knows what has to go (a recording): nothing is aged, absent and kept pages are
        skipped, pages that others map too are taken from this one. One announcement per page.
        """
        taken = 0
        for page, entry in memory.iter_present(mm, first, last):
            frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
            if entry & f.PTE_SPECIAL or not mm.maps(page, frame):
                continue
            word = self.machine.frames.word[frame]
            if word & fr.MAP_MASK == fr.MAP_ONE:
                await self.shrink([frame], force=True)
            elif not word & (_KEPT | fr.PG_PINNED | fr.PG_HUGE | fr.PG_KSM):
                await self._take_from(mm, page, frame)
            taken += not mm.maps(page, frame)
            await self.machine.cond_resched(1)
        return taken

    async def _take_from(self, mm: AddressSpace[Any], page: int, frame: int) -> None:
        word, swap = self.machine.frames.word[frame], self.machine.swap
        lock, _ = self.mappings(frame)
        vma = mm.find_vma(page)
        if lock is None or vma is None:
            return
        if word & fr.PG_ANON and word & fr.PG_SWAPBACKED and not word & fr.PG_SWAPCACHE:
            slot = swap.alloc()
            if slot < 0:
                return
            swap.add_to_cache(frame, slot)
            self.machine.frames.word[frame] |= fr.PG_DIRTY
        async with lock.reading():
            await self._unmap_one(vma, page, frame)
        await self.machine.settle()

    def age_range(self, mm: AddressSpace[Any], first: int, last: int) -> bool:
        """Clear the accessed bits of [first, last) and of the drivers; whether any was set."""
        young = False
        for page, entry in memory.iter_present(mm, first, last):
            if not entry & f.PTE_SPECIAL:
                young |= _clear_young(mm, page)
        return young

    # ------------------------------------------------------------------ the lists

    async def reclaim(self, wanted: int) -> int:
        """Free at least `wanted` pages if that can be; how many were freed.

        Inactive pages first; active ones are made inactive, unless they were used, while the
        inactive list is the shorter one. May suspend.
        """
        lru = self.machine.lru
        freed = 0
        scanned = 0
        # Twice round all lists without a page: whatever is left cannot be taken.
        limit = 3 * sum(lru.size(which) for which in range(4)) + _BATCH
        while freed < wanted and scanned < limit:
            before = freed
            batch = min(max(wanted - freed, _BATCH), _MAX_BATCH)
            for inactive in (lists.INACTIVE_FILE, lists.INACTIVE_ANON):
                if lru.size(inactive) <= lru.size(inactive + 1):
                    await self._shrink_active(inactive + 1, batch)
                freed += await self.shrink(lru.take(inactive, batch), force=False)
                if freed >= wanted:
                    break
            scanned = 0 if freed > before else scanned + batch
            await self.machine.cond_resched(batch)
        return freed

    async def _shrink_active(self, which: int, batch: int) -> None:
        """Age the `batch` oldest active pages; executable file pages that were used stay."""
        machine = self.machine
        words = machine.frames.word
        frames = machine.lru.take(which, batch)
        at = 0
        while at < len(frames):
            done, _ = self._walk_alike(frames, at, deactivate=True)
            at += done
            if done:
                continue
            frame = frames[at]
            at += 1
            count, flags = await self.referenced(frame)
            file = not words[frame] & fr.PG_SWAPBACKED
            if not (count and flags & f.VM_EXEC and file):
                words[frame] &= ~fr.PG_ACTIVE
            if words[frame] & fr.PG_LRU:
                machine.lru.move(frame)

    async def balance(self) -> None:
        """Reclaim until there is room for allocations; MmError (ENOMEM) if there is none."""
        machine = self.machine
        frames = machine.frames
        if frames.free > machine.low:
            return
        freed = await self.reclaim(machine.high - frames.free)
        if not freed and frames.free == 0:
            raise MmError(
                errno.ENOMEM,
                f"{machine.name}: out of memory, {frames.used} frames and {machine.swap.used} "
                "swap slots in use",
            )

    async def force_empty(self) -> None:
        """Reclaim everything that can be (memory.force_empty): write back, age, take."""
        for file in list(self.machine.files):
            await file.writeback()
        lru = self.machine.lru
        for _ in range(16):
            freed = 0
            total = 0
            for which in (lists.ACTIVE_FILE, lists.ACTIVE_ANON):
                for _ in range(lru.size(which) // _BATCH + 1):
                    await self._shrink_active(which, _BATCH)
            for which in (lists.INACTIVE_FILE, lists.INACTIVE_ANON):
                isolated = lru.take(which, lru.size(which))
                total += len(isolated)
                freed += await self.shrink(isolated, force=False)
            if not total:
                break


def _clear_references(frame: int, mapped: list[tuple[Vma, int]]) -> tuple[int, int]:
    count = flags = 0
    for vma, page in mapped:
        if not vma.mm.maps(page, frame):
            continue
        if vma.flags & f.VM_LOCKED:
            return 0, f.VM_LOCKED
        if _clear_young(vma.mm, page):
            count += 1
            flags |= vma.flags
    return count, flags


def _clear_young(mm: AddressSpace[Any], page: int) -> bool:
    """Test and clear the accessed bit of an entry and of the drivers (ptep_clear_flush_young)."""
    huge = page >> 9 in mm.pt.huge
    entry = mm.pt.get(page)
    young = bool(entry & f.PTE_ACCESSED)
    if young:
        if huge:
            mm.pt.huge[page >> 9] &= ~f.PTE_ACCESSED
        else:
            mm.set_pte(page, entry & ~f.PTE_ACCESSED)
        mm.flush_tlb(page, page + 1)
    if mm.notifiers.armed:
        span = 512 if huge else 1
        start = page & ~(span - 1)
        young |= mm.notifiers.clear_flush_young(start << PAGE_SHIFT, (start + span) << PAGE_SHIFT)
    return young
