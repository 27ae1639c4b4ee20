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
    from .wire import Buffer

WINDOW: Final = 8
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
        if low + size <= PAGE_SIZE:
            return await self._page(first, low, size)
        data = bytearray(size)
        await self.read_into(offset, memoryview(data))
        return bytes(data)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """The same into `buffer`, which saves a copy."""
        first, low = offset >> PAGE_SHIFT, offset & (PAGE_SIZE - 1)
        size = len(buffer)
        last = -(-(offset + size) >> PAGE_SHIFT)
        if last - first <= MAX_PAGES:
            whole = await self._pages(first, last, last)
            buffer[:] = memoryview(whole)[low : low + size]
            return
        at = -low
        for page in range(first, last, MAX_PAGES):
            part = memoryview(await self._pages(page, min(page + MAX_PAGES, last), last))
            if at < 0:
                part, at = part[-at:], 0
            part = part[: size - at]
            buffer[at : at + len(part)] = part
            at += len(part)

    async def _page(self, page: int, low: int, size: int) -> bytes:
        """A part of one page."""
        grant, clock = self.grant, self.partition.clock
        while True:
            epoch = grant.epoch
            data = grant.bytes_of(page, low, size)
            if data is not None:
                if grant.epoch == epoch and clock() < grant.lease_until:
                    return data
                grant.drop_all()
            await self._fetch(page, page + 1, page + 1)

    async def _pages(self, first: int, last: int, end: int) -> Buffer:
        """Pages [first, last) of one moment, on the way to `end`."""
        grant, clock = self.grant, self.partition.clock
        while True:
            epoch = grant.epoch
            data = grant.whole(first, last) if clock() < grant.lease_until else None
            if data is not None:
                self._ahead_of(last, end)
                if grant.epoch == epoch and clock() < grant.lease_until:
                    return data
                continue
            cache = grant.cache
            missing = [page for page in range(first, last) if page not in cache]
            if missing:
                await self._fetch(missing[0], missing[-1] + 1, end)
            else:
                grant.drop_all()

    async def _fetch(self, first: int, last: int, end: int) -> None:
        """Have pages [first, last), and begin with what comes after them up to `end`."""
        if first == self._expected:
            self._ahead = min(max(AHEAD, 2 * self._ahead), MAX_PAGES)
        else:
            self._ahead = 1
        fault = self._under_way(first) if self.grant.faults else None
        if fault is None:
            fault = self._fault(first, last - first)
        self._expected = first + fault.count
        if last < end:
            self._ahead_of(last, end)
        await self.partition.answered(fault)

    def _ahead_of(self, last: int, end: int) -> None:
        """Have some batches under way of a long read, so that none has to be waited for.

        If they go wrong, the fault that needs them will say so.
        """
        for page in range(last, min(end, last + WINDOW * MAX_PAGES), MAX_PAGES):
            if page not in self.grant.cache and self._under_way(page) is None:
                self._fault(page, min(MAX_PAGES, end - page))
                self.partition.flush()

    def _fault(self, first: int, need: int) -> Faulting:
        count = need
        if count < self._ahead:
            count = max(need, min(self._ahead, self.grant.pages - first))
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
