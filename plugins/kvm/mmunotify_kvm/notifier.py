"""The side of a virtual machine that the address space talks to (kvm_mmu_notifier_ops).

    S    count it, take pfn caches away, then for the memslots that it meets, under mmu_lock:
         count it once more, widen the range, drop the entries, flush the TLBs
    E    the same memslots: the sequence grows, the counts fall, and who waits to change memslots
         is woken

Start and end must meet the same memslots, or the counts go astray; so memslots do not change while
`active` is above 0. None of these takes slots_lock: its holder waits for them.
Source: virt/kvm/kvm_main.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from mmunotify import ADDRESS_END, PAGE_SHIFT, PAGE_SIZE, AtomicDriver, Log

from .counters import new_counters
from .log import AGED, RELEASED, UNBALANCED, UNMAPPED
from .memslots import Memslots
from .mmu import Mmu
from .spte import ACCESSED, PRESENT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmunotify import Primary, Range

    from .memslots import MemorySlot
    from .pfn_cache import GfnToPfnCache
    from .tables import DirtySink


class MmuNotifier(AtomicDriver):
    """The callbacks, and the state that they share with everything else."""

    def __init__(self, name: str, logger: object = None) -> None:
        self.name: Final = name
        self.counters: Final = new_counters()
        """What happened so far, by name; see `mmunotify_kvm.counters`."""
        self.primary: Primary | None = None
        """The address space; None before it is attached, and once it has been released."""
        self.mmu: Final = Mmu(self.counters)
        self.memslots = Memslots()
        """The set in use. Read it under SRCU, or where nothing suspends."""
        self.active = 0
        """Sections that are open, meeting a memslot or not (mn_active_invalidate_count)."""
        self.trace = False
        """Write an event for every page fault, zap and question of age."""
        self.dirty_at_map = True
        self.pfn_caches: Final[list[GfnToPfnCache]] = []
        self._latest: tuple[Range | None, int] = (None, 0)
        """The range of the section that was the last to meet a memslot, in which generation."""
        self._idle: anyio.Event | None = None
        self._log = Log(logger, driver=name)

    def attach(self, primary: Primary | None) -> None:
        """Learn what to translate with."""
        self.primary = primary

    # ------------------------------------------------------------------ invalidations

    def invalidate_range_start(self, rng: Range) -> None:
        """Drop what maps the range, and let no fault map it again before the end."""
        self.active += 1
        start, end = rng.start, rng.end
        if self.pfn_caches:
            self._invalidate_caches(start, end)
        memslots = self.memslots
        met = memslots.overlapping(start, end)
        if met:
            self._latest = rng, memslots.generation
            mmu = self.mmu
            with mmu.lock:
                mmu.begin()
                self._unmap(met, start, end)

    def invalidate_range_end(self, rng: Range) -> None:
        """Let faults in again."""
        mmu = self.mmu
        # Without a section that met a memslot this one has not: they have not changed since.
        if mmu.invalidate_in_progress:
            latest, generation = self._latest
            memslots = self.memslots
            if (rng is latest and generation == memslots.generation) or memslots.overlapping(
                rng.start, rng.end
            ):
                with mmu.lock:
                    mmu.end()
        self.active -= 1
        assert self.active >= 0, f"{self.name}: a section ended that had not begun"
        if self._idle is not None and not self.active:
            self._idle.set()
            self._idle = None

    def invalidate_page(self, address: int) -> None:
        """2008's form: the pte is gone already, so there is a moment and no section."""
        start = address & -PAGE_SIZE
        if self.pfn_caches:
            self._invalidate_caches(start, start + PAGE_SIZE)
        met = self.memslots.overlapping(start, start + PAGE_SIZE)
        if met:
            mmu = self.mmu
            with mmu.lock:
                mmu.invalidate_seq += 1
                self._unmap(met, start, start + PAGE_SIZE)

    def _unmap(self, met: Sequence[MemorySlot], start: int, end: int) -> None:
        mmu = self.mmu
        zapped = 0
        for slot in met:
            hva, base = slot.hva, slot.base
            # `_pages` without a call: everything that anybody is told comes by here.
            first = (start - hva) >> PAGE_SHIFT if start > hva else 0
            last = (end - hva + PAGE_SIZE - 1) >> PAGE_SHIFT if end < slot.hva_end else slot.pages
            mmu.range_add(base + first, base + last)
            zapped += self.zap(slot, first, last)
        counters = self.counters
        counters["zaps"] += 1
        if self.trace:
            progress = mmu.invalidate_in_progress
            self._log.emit(UNMAPPED, start=start, end=end, pages=zapped, in_progress=progress)
        if zapped:
            counters["mapped"] += zapped
            counters["flushes"] += 1

    def zap(self, slot: MemorySlot, first: int, last: int) -> int:
        """Drop what maps pages [first, last) of a slot; flush; how many were mapped.

        mmu_lock is held: the flush comes before it is let go.
        """
        table = slot.table
        huge = table.pages_2m
        if not huge:
            if not table.pages_4k:
                return 0
            if last - first == 1 and not table.leaf[first] & PRESENT:
                return 0
        sink = None if self.dirty_at_map else self._dirty_sink(slot)
        zapped = table.zap(first, last, sink)
        if zapped:
            if huge != table.pages_2m:
                # A huge entry goes whole, also what of it lies outside of the range.
                first = max(table.block_start(table.block(first)), 0)
                last = min(table.block_start(table.block(last - 1) + 1), slot.pages)
            self.mmu.flush(slot.base + first, slot.base + last)
        return zapped

    def _dirty_sink(self, slot: MemorySlot) -> DirtySink:
        primary = self.primary
        assert primary is not None
        hva = slot.hva

        def hand_over(first: int, last: int, mask: object) -> None:
            primary.set_dirty(
                hva + (first << PAGE_SHIFT),
                hva + (last << PAGE_SHIFT),
                mask,  # type: ignore[arg-type]  # an array is a sequence of integers
            )

        return hand_over

    def _invalidate_caches(self, start: int, end: int) -> None:
        for cache in self.pfn_caches:
            cache.invalidate(start, end)

    async def sections_over(self) -> None:
        """Wait until no section is open: then memslots may change."""
        while self.active:
            if self._idle is None:
                self._idle = anyio.Event()
            await self._idle.wait()

    # ------------------------------------------------------------------ ageing

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Whether the guest has used [start, end) since the last time; later uses will be seen."""
        return self._age(start, end, clear=True, flush=True)

    def clear_young(self, start: int, end: int) -> bool:
        """The same without the flush: a use through a TLB goes unseen."""
        return self._age(start, end, clear=True, flush=False)

    def test_young(self, address: int) -> bool:
        """Whether the guest has used a page; changes nothing."""
        return self._age(address, address + 1, clear=False, flush=False)

    def _age(self, start: int, end: int, *, clear: bool, flush: bool) -> bool:
        young = False
        for slot in self.memslots.overlapping(start, end):
            table = slot.table
            first, last = _pages(slot, start, end)
            self.counters["aged"] += last - first
            if not table.pages_2m:
                if not table.pages_4k:
                    continue
                if last - first == 1 and not table.leaf[first] & ACCESSED:
                    continue
            if table.age(first, last, clear=clear):
                young = True
                if flush:
                    self.mmu.flush(slot.base + first, slot.base + last)
        if young:
            self.counters["young"] += 1
        if self.trace:
            self._log.emit(AGED, start=start, end=end, young=young)
        return young

    # ------------------------------------------------------------------ the end

    def zap_all(self) -> int:
        """Drop every entry, and flush; how many pages were mapped (kvm_mmu_zap_all)."""
        with self.mmu.lock:
            return sum(self.zap(slot, 0, slot.pages) for slot in self.memslots)

    async def release(self) -> None:
        """Drop everything: no page of the address space has been freed yet.

        A fault that is looking a page up finds that it was overtaken, and nothing to look up in.
        """
        self.zap_all()
        self.primary = None
        with self.mmu.lock:
            self.mmu.invalidate_seq += 1
        self.mmu.wake()
        self._invalidate_caches(0, ADDRESS_END)
        self._log.emit(RELEASED, **self.counters)

    def free(self) -> None:
        """No end will come for sections that are open still: nobody may wait for one."""
        if self.active:
            self._log.emit(UNBALANCED, sections=self.active)
            self.active = 0
            self.mmu.reset()
        if self._idle is not None:
            self._idle.set()
            self._idle = None


def _pages(slot: MemorySlot, start: int, end: int) -> tuple[int, int]:
    """The pages of a slot that [start, end) in bytes touches, counted from its first."""
    first = (start - slot.hva) >> PAGE_SHIFT
    last = -((slot.hva - end) >> PAGE_SHIFT)
    return max(0, first), min(slot.pages, last)
