"""A permit for a segment of another partition: pages are copies, kept while nobody recalls them.

A read is served from the copies as long as the lease runs, and checks epoch and lease again after
it has copied: a process that was stopped, and taken for dead, must not hand out what it had. What
is not there is faulted in, by itself where accesses are scattered, in batches of 16 to 64 pages
where they go forward. A store goes through to the exporter, which recalls the page from everybody
first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from mmunotify import PAGE_SHIFT, PAGE_SIZE, BadAddress

from .wire import MAX_PAGES

if TYPE_CHECKING:
    from .importer import Faulting, Grant, Pending
    from .partition import Partition

WINDOW: Final = 4
"""Batches of a long read that are under way at a time."""
AHEAD: Final = 16
"""Pages of the first batch that is read ahead."""


class RemotePermit:
    """Access to a segment of another partition."""

    def __init__(self, partition: Partition, grant: Grant) -> None:
        self.partition: Final = partition
        self.grant: Final = grant
        self.write: Final = grant.write
        self.size: Final = grant.pages << PAGE_SHIFT
        self._storing = anyio.Lock(fast_acquire=True)
        self._expected = -1
        self._ahead = 1

    async def read_bytes(self, offset: int, size: int) -> bytes:
        """Bytes of the segment; up to 64 pages at a time are of one moment."""
        first, low = offset >> PAGE_SHIFT, offset & (PAGE_SIZE - 1)
        last = -(-(offset + size) >> PAGE_SHIFT)
        if last - first == 1:
            return (await self._pages(first, last, last))[low : low + size]
        parts = [
            await self._pages(page, min(page + MAX_PAGES, last), last)
            for page in range(first, last, MAX_PAGES)
        ]
        data = b"".join(parts) if len(parts) > 1 else parts[0]
        return data if low == 0 and size == len(data) else data[low : low + size]

    async def _pages(self, first: int, last: int, end: int) -> bytes:
        """Pages [first, last) of one moment, on the way to `end`."""
        grant = self.grant
        cache = grant.cache
        clock = self.partition.clock
        while True:
            missing = [page for page in range(first, last) if page not in cache]
            if not missing:
                epoch = grant.epoch
                if clock() < grant.lease_until:
                    data = (
                        cache[first]
                        if last - first == 1
                        else b"".join([cache[page] for page in range(first, last)])
                    )
                    if grant.epoch == epoch and clock() < grant.lease_until:
                        return data
                grant.drop_all()
                continue
            await self._fetch(missing[0], missing[-1] + 1, end)

    async def _fetch(self, first: int, last: int, end: int) -> None:
        """Have pages [first, last), and begin with what comes after them up to `end`."""
        grant = self.grant
        sequential = first == self._expected
        self._ahead = min(max(AHEAD, 2 * self._ahead), MAX_PAGES) if sequential else 1
        fault = self._under_way(first) or self._fault(first, last - first)
        self._expected = first + fault.count
        if end > last:
            for page in range(last, min(end, last + WINDOW * MAX_PAGES), MAX_PAGES):
                if page not in grant.cache and self._under_way(page) is None:
                    self._fault(page, min(MAX_PAGES, end - page))
        await self.partition.answered(fault)
        # What else it asked for may have gone wrong since; the next fault will say so.

    def _fault(self, first: int, need: int) -> Faulting:
        count = min(max(need, self._ahead), MAX_PAGES, max(need, self.grant.pages - first))
        partition = self.partition
        return partition.importer.fault(self.grant, first, need, count, partition.clock())

    def _under_way(self, page: int) -> Faulting | None:
        for fault in self.grant.faults.values():
            if fault.first <= page < fault.first + fault.need:
                return fault
        return None

    async def write_bytes(self, offset: int, data: bytes) -> None:
        """Store through; returns when it is done and no importer has what was there before."""
        if not self.write:
            address = (self.grant.base << PAGE_SHIFT) + offset
            raise BadAddress(f"{address:#x}: the permit is read-only", code=2, address=address)
        partition, grant = self.partition, self.grant
        at = 0
        async with self._storing:
            while at < len(data):
                room = MAX_PAGES * PAGE_SIZE - ((offset + at) & (PAGE_SIZE - 1))
                part = data[at : at + room]
                if grant.source is None and grant.getting is not None:
                    await partition.answered(grant.getting)
                store: Pending = partition.importer.store(
                    grant, offset + at, part, partition.clock()
                )
                await partition.answered(store)
                at += len(part)

    async def detach(self, offset: int, size: int) -> None:
        """Drop pages, and have the exporter forget that they were here."""
        self.partition.importer.detach(
            self.grant, offset >> PAGE_SHIFT, -(-(offset + size) >> PAGE_SHIFT)
        )
        self.partition.flush()

    async def release(self) -> None:
        """Give the permit back; returns when the exporter knows, or has been silent too long."""
        pending = self.partition.importer.release(self.grant, self.partition.clock())
        if pending is not None:
            await self.partition.answered(pending)
