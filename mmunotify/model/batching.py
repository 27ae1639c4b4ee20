"""How a change of the page tables is told: the section around it, or the gather's flush within.

    range     S before, E after, outside the page table lock            (what Linux does)
    gather    start and end when the gather flushes, before pages are freed, no S before PT
    pte512    start and end per <= 512 entries, under the page table lock
    page      invalidate_page per page, under the page table lock       (2008)

Only zaps are told differently by `batching`; what write-protects or moves has its section in any
case. With nobody registered a section costs one test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

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

    __slots__ = ("_batched", "_locked", "_page", "_told", "_zap", "gather", "mm", "pending", "rng")

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
        self.mm = mm
        self.rng = Range(first << PAGE_SHIFT, last << PAGE_SHIFT, event)
        self._told: Audience | None = None
        self.pending: list[tuple[Range, Audience]] = []
        self._batched = zap and mm.machine.batching != "range"
        self._zap = zap
        # 2008 told what the reverse map does to one page in one call, once the entry is gone.
        self._page = mm.machine.era == "v16" and not zap and last - first == 1
        self._locked = locked
        self.gather = Gather(mm)

    async def __aenter__(self) -> Section:
        notifiers = self.mm.notifiers
        if notifiers.armed:
            self.mm.announced.append(self.rng)
            if self._batched:
                self.gather.hold = True
            elif not self._page:
                self._told = await notifiers.invalidate_range_start(self.rng)
                self.gather.hold = bool(self._told.sync_calls) or bool(self._told.failed)
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._page and self.mm.notifiers.armed:
            await self.mm.notifiers.invalidate_page(self.rng.start)
        elif self._told is not None:
            await self.mm.notifiers.invalidate_range_end(self.rng, self._told)
            if self._told.sync_calls:
                self.pending.append((self.rng, self._told))
        elif self._batched and self.mm.machine.batching == "gather" and self.gather.hold:
            await self.mm.notifiers.invalidate(self.rng)
        if self._locked:
            self.mm.machine.owed.append(self)
        elif self.pending and not self._zap:
            await self.settle()

    async def settle(self) -> None:
        """Let deferred drivers finish, then release the pages that were unmapped."""
        pending, self.pending = self.pending, []
        failed = self.failed
        for rng, told in pending:
            failed = bool(await self.mm.notifiers.invalidate_range_sync(rng, told)) or failed
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
        notifiers = self.mm.notifiers
        batching = self.mm.machine.batching
        if batching == "page":
            for page in range(first, last):
                rng = Range(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT, self.rng.event)
                self._marked(rng, notifiers.invalidate_page_atomic(page << PAGE_SHIFT))
        elif batching == "pte512":
            while first < last:
                end = min(last, (first | 511) + 1)
                rng = Range(first << PAGE_SHIFT, end << PAGE_SHIFT, self.rng.event)
                self._marked(rng, notifiers.invalidate_atomic(rng))
                first = end

    def _marked(self, rng: Range, told: Audience) -> None:
        if told.sync_calls:
            self.pending.append((rng, told))
