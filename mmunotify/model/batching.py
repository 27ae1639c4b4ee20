"""How a change of the page tables is told: the section around it, or the gather's flush within.

    range     S before, E after, outside the page table lock            (what Linux does)
    gather    start and end when the gather flushes, before pages are freed, no S before PT
    pte512    start and end per <= 512 entries, under the page table lock
    page      invalidate_page per page, under the page table lock       (2008)

A gather begins inside of the section, as patches 4 and 5 of 2008 put it, or outside around it.

Only zaps are told differently by `batching`; what write-protects or moves has its section in any
case. With nobody registered a section costs one test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mmunotify.locks.base import READY, Awaited
from mmunotify.ranges import PAGE_SHIFT, Event, Range

from .memory import Gather

if TYPE_CHECKING:
    from mmunotify.audience import Audience

    from .mm import AddressSpace

Batching = Literal["page", "pte512", "gather", "range"]


class Section:
    """`async with`: the drivers of one address space drop pages [first, last) and may look again.

    `gather` is where a zap puts the pages that it unmapped. What deferred drivers have marked they
    finish in `settle`, before the pages are released: on the way out if nothing is `zap`ped, by the
    caller otherwise. Under a reverse-map lock (`locked`) the section is owed to the machine, which
    settles when the lock is dropped.
    """

    __slots__ = (
        "_batched", "_event", "_first", "_last", "_locked", "_page", "_told", "_zap",
        "gather", "mm", "outside", "pending", "rng",
    )  # fmt: skip

    def __init__(
        self,
        mm: AddressSpace[Any],
        first: int,
        last: int,
        event: Event,
        *,
        zap: bool = False,
        locked: bool = False,
    ) -> None:
        machine = mm.machine
        self.mm = mm
        self._first = first
        self._last = last
        self._event = event
        self.rng: Range | None = None
        """What is told; None while nobody listens."""
        self._told: Audience | None = None
        self.pending: tuple[tuple[Range, Audience], ...] = ()
        self._batched = zap and machine.batching != "range"
        self._zap = zap
        # 2008 told what the reverse map does to one page in one call, once the entry is gone.
        self._page = machine.era == "v16" and locked and not zap and last - first == 1
        self._locked = locked
        self.outside = zap and machine.gather == "outside"
        """Whether the gather was begun before the start, so that nobody may suspend until its end,
        after which the primary TLB is flushed and the pages are released."""
        self.gather = Gather(mm, hold=self.outside)

    def __aenter__(self) -> Awaited:
        notifiers = self.mm.notifiers
        if not notifiers.armed:
            return READY
        rng = self.rng = Range(self._first << PAGE_SHIFT, self._last << PAGE_SHIFT, self._event)
        self.mm.announced.append(rng)
        if self._batched:
            self.gather.hold = True
        elif not self._page:
            if self.outside:
                self._begun(notifiers.invalidate_range_start_atomic(rng))
                return READY
            told = notifiers.invalidate_range_start_nowait(rng)
            if told is None:
                return self._start(rng)
            self._begun(told)
        return READY

    async def _start(self, rng: Range) -> None:
        self._begun(await self.mm.notifiers.invalidate_range_start(rng))

    def _begun(self, told: Audience) -> None:
        self._told = told
        if told.sync_calls or told.failed:
            self.gather.hold = True

    def __aexit__(self, *exc: object) -> Awaited:
        rng, told = self.rng, self._told
        if rng is None:
            return READY
        if told is None or told.ends_suspend or told.sync_calls:
            return self._end(rng)
        self.mm.notifiers.invalidate_range_end_atomic(rng, told)
        if self._locked and (self.gather.held or self.outside):
            self.mm.machine.owed.append(self)
        return READY

    async def _end(self, rng: Range) -> None:
        notifiers = self.mm.notifiers
        if self._told is not None:
            await notifiers.invalidate_range_end(rng, self._told)
            if self._told.sync_calls:
                self.pending += ((rng, self._told),)
        elif self._page:
            await notifiers.invalidate_page(rng.start)
        elif self._batched and self.mm.machine.batching == "gather":
            await notifiers.invalidate(rng)
        if self._locked:
            self.mm.machine.owed.append(self)
        elif self.pending and not self._zap:
            await self._settle()

    def settle(self) -> Awaited:
        """Let deferred drivers finish, then release the pages that were unmapped."""
        if self.pending or self.gather.held or self.outside:
            return self._settle()
        return READY

    async def _settle(self) -> None:
        pending, self.pending = self.pending, ()
        failed = self.failed
        for rng, told in pending:
            failed = bool(await self.mm.notifiers.invalidate_range_sync(rng, told)) or failed
        if self.outside:
            self.mm.flush_tlb(self._first, self._last)
        self.gather.finish(leak=failed)

    @property
    def failed(self) -> bool:
        """Whether a driver failed, so that the pages must be leaked."""
        return (self._told is not None and bool(self._told.failed)) or any(
            told.failed for _, told in self.pending
        )

    def zapped(self, first: int, last: int) -> None:
        """Entries of [first, last) are gone: told at once where zaps are told in small batches."""
        if not (self._batched and self.gather.hold):
            return
        event = self._event
        notifiers = self.mm.notifiers
        batching = self.mm.machine.batching
        if batching == "page":
            for page in range(first, last):
                rng = Range(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT, event)
                self._marked(rng, notifiers.invalidate_page_atomic(page << PAGE_SHIFT))
        elif batching == "pte512":
            while first < last:
                end = min(last, (first | 511) + 1)
                rng = Range(first << PAGE_SHIFT, end << PAGE_SHIFT, event)
                self._marked(rng, notifiers.invalidate_atomic(rng))
                first = end

    def _marked(self, rng: Range, told: Audience) -> None:
        if told.sync_calls:
            self.pending += ((rng, told),)
