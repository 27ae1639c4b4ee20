"""The MMU notifier of a thread group, in two colours, and its importers as a device.

XPMEM is the driver that has to wait: its importers are in other partitions, and must have let go of
a page before it is freed. Where reverse-map locks are rwsems it waits in the callback; where they
are spinlocks it marks, and waits after they are dropped. Everything but that is shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmunotify import PAGE_SHIFT, DeferredDriver, Event, SleepableDriver

from . import events
from .errors import MAXADDR_SIZE
from .local import LocalPermit
from .options import XpmemOptions
from .pfns import merged
from .thread_group import ThreadGroup
from .xpmem import Xpmem

if TYPE_CHECKING:
    from collections import Counter

    from mmunotify import Primary, Range

    from .pfns import PfnTable


class _Body:
    """What both colours share: a thread group, and its importers."""

    def __init__(self, options: XpmemOptions | None = None, logger: object = None) -> None:
        options = options or XpmemOptions()
        self._serve(
            ThreadGroup(Xpmem(logger=logger), None, pin=options.pin), importers=options.importers
        )

    def _serve(self, group: ThreadGroup, importers: int) -> None:
        self.group: ThreadGroup = group
        self.table: PfnTable = group.table
        self.counters: Counter[str] = group.table.counters
        """See `mmunotify.Device`."""
        self._importers: list[LocalPermit] = []
        self._wanted = importers
        self._turn = 0

    def attach(self, primary: Primary | None) -> None:
        """Learn the address space; importers attach all of it."""
        group = self.group
        group.enter(primary)
        if primary is not None and self._wanted:
            segid = group.make(0, MAXADDR_SIZE)
            segment = group.segments[segid]
            self._importers = [LocalPermit(group, segment, write=True) for _ in range(self._wanted)]

    async def release(self) -> None:
        """The address space exits, or the driver leaves it: nobody has a page of it afterwards."""
        await self.group.exit()
        self.group.xpmem.log.emit(events.COUNTED, **self.counters)

    # ------------------------------------------------------------------ the device

    def access(self, address: int, *, write: bool = False) -> bool:
        """Whether the importer whose turn it is has a translation that allows this."""
        importers = self._importers
        if not importers:
            return True
        found = importers[self._turn].ptes.get(address >> PAGE_SHIFT)
        if found is None or (write and not found.writable):
            return False
        if len(importers) > 1:
            self._turn = (self._turn + 1) % len(importers)
        return True

    async def fault(self, address: int, *, write: bool = False) -> None:
        """Have the importer whose turn it is fault the page in."""
        importers = self._importers
        if importers:
            importer = importers[self._turn]
            self._turn = (self._turn + 1) % len(importers)
            await importer.fault(address >> PAGE_SHIFT, write=write)

    # ------------------------------------------------------------------ sections

    def _unmapped(self, rng: Range) -> None:
        """An UNMAP takes attachments of the process itself away, too."""
        if rng.event is Event.UNMAP:
            self.group.unmapped(rng.start, rng.end)


class XpmemDriver(_Body, SleepableDriver):
    """XPMEM where it may sleep: the start returns when every importer has acknowledged."""

    nonblock_first = True

    @classmethod
    def serving(cls, group: ThreadGroup) -> XpmemDriver:
        """The driver of a thread group that is there already; without importers of its own."""
        driver = cls.__new__(cls)
        driver._serve(group, importers=0)
        return driver

    async def invalidate_range_start(self, rng: Range) -> None:
        """Recall the range from all importers, and hold their faults off until the end."""
        table = self.table
        first, last = rng.start >> PAGE_SHIFT, -(-rng.end >> PAGE_SHIFT)
        table.open.append((first, last))
        wait = table.invalidate(first, last)
        if wait is not None:
            try:
                await self.group.xpmem.settle(table, wait)
            except BaseException:
                table.end(first, last)
                self.group.xpmem.flush()
                raise

    def invalidate_range_start_nonblock(self, rng: Range) -> bool:
        """The same if no other partition has any of it: then there is nothing to wait for."""
        table = self.table
        first, last = rng.start >> PAGE_SHIFT, -(-rng.end >> PAGE_SHIFT)
        if table.holders or table.pins or table.remotes:
            if not table.local(first, last):
                return False
            table.invalidate(first, last)
        table.open.append((first, last))
        return True

    def invalidate_range_end_nonblock(self, rng: Range) -> None:
        """Let faults in again."""
        if self.group.attachments:
            self._unmapped(rng)
        self.table.end(rng.start >> PAGE_SHIFT, -(-rng.end >> PAGE_SHIFT))
        if self.group.xpmem.exporter.outbox:
            self.group.xpmem.flush()


class DeferredXpmemDriver(_Body, DeferredDriver):
    """XPMEM where it may not: it marks, and recalls what was marked when the locks are dropped.

    Marks of many sections become one batch for each partition.
    """

    def __init__(self, options: XpmemOptions | None = None, logger: object = None) -> None:
        super().__init__(options, logger)
        self._unmark()

    @classmethod
    def serving(cls, group: ThreadGroup) -> DeferredXpmemDriver:
        """The driver of a thread group that is there already; without importers of its own."""
        driver = cls.__new__(cls)
        driver._serve(group, importers=0)
        driver._unmark()
        return driver

    def _unmark(self) -> None:
        self._marks: list[tuple[int, int]] = []
        # The latest mark, which the next one mostly goes on where it ends.
        self._low = self._high = 0

    def invalidate_range(self, rng: Range) -> None:
        """Mark the range."""
        if rng.start != self._high:
            if self._high:
                self._marks.append((self._low, self._high))
            self._low = rng.start
        self._high = rng.end

    async def invalidate_range_sync(self, rng: Range) -> None:
        """Recall everything that is marked, and wait for it."""
        table = self.table
        self._unmapped(rng)
        marks, low, high = self._marks, self._low, self._high
        self._unmark()
        if not (table.holders or table.pins or table.remotes):
            return
        # What was marked by others may be recalled early; what is marked here must be now.
        ranges = [(rng.start >> PAGE_SHIFT, -(-rng.end >> PAGE_SHIFT))]
        if high and (marks or low != rng.start or high != rng.end):
            marks.append((low, high))
            ranges = merged(
                ranges + [(low >> PAGE_SHIFT, -(-high >> PAGE_SHIFT)) for low, high in marks]
            )
        waits = [table.invalidate(first, last) for first, last in ranges]
        for wait in waits:
            if wait is not None:
                await self.group.xpmem.settle(table, wait)

    def invalidate_range_start_nonblock(self, rng: Range) -> bool:
        """Recall the range if no other partition has any of it."""
        table = self.table
        first, last = rng.start >> PAGE_SHIFT, -(-rng.end >> PAGE_SHIFT)
        if not table.local(first, last):
            return False
        table.invalidate(first, last)
        return True
