"""A permit within one process: the importer maps the exporter's frames themselves.

Nothing is copied, so what either side stores the other sees at once. An invalidation takes the
translations away in one step and waits for nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mmunotify import PAGE_SHIFT, PAGE_SIZE, BadAddress

from .errors import bus_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mmunotify import Translation

    from .segments import Segment
    from .thread_group import ThreadGroup


class LocalPermit:
    """Access to a segment of a thread group of this process; a holder of its PFN table."""

    remote: Final = False

    def __init__(self, exporter: ThreadGroup, segment: Segment, *, write: bool) -> None:
        self.exporter: Final = exporter
        self.segment: Final = segment
        self.write: Final = write
        self.size: Final = segment.size
        self.ptes: Final[dict[int, Translation]] = {}
        """Translations by page number of the exporter's address space."""
        self._released = False

    @property
    def held(self) -> Iterable[int]:
        """The pages that the table has it for."""
        return self.ptes

    def drop(self, pages: Sequence[int]) -> None:
        """Let go of these pages."""
        for page in pages:
            del self.ptes[page]

    async def fault(self, page: int, *, write: bool) -> Translation:
        """Map a page of the exporter; waits while it is being invalidated. May notify."""
        if write and not self.write:
            raise BadAddress(
                f"{page << PAGE_SHIFT:#x}: the permit is read-only",
                code=2,
                address=page << PAGE_SHIFT,
            )
        exporter, segment = self.exporter, self.segment
        found = None if self._released else exporter.look_up_nowait(segment, page)
        if found is not None:
            self._map(page, found)
            return found
        primary = exporter.get_memory(segment, page)
        try:
            try:
                found = await exporter.look_up(segment, page, write=write)
            except BadAddress as error:
                # As its fault handler: whatever is wrong over there is SIGBUS here.
                raise bus_error(str(error.strerror), page << PAGE_SHIFT) from error
            if self._released:
                exporter.table.let_go_unheld(page, page + 1)
                raise BadAddress(
                    f"{page << PAGE_SHIFT:#x}: the permit is released", address=page << PAGE_SHIFT
                )
            self._map(page, found)
            return found
        finally:
            await primary.put()

    def _map(self, page: int, found: Translation) -> None:
        self.ptes[page] = found
        self.exporter.table.enter_page(page, self)

    async def read_bytes(self, offset: int, size: int) -> bytes:
        """Bytes of the segment; each page as it is when its turn comes."""
        parts = []
        for page, low, length in _pieces(self.segment.start + offset, size):
            found = self.ptes.get(page) or await self.fault(page, write=False)
            at = (page << PAGE_SHIFT) + low - found.address
            parts.append(self.exporter.memory.read(found, at, length))
        return b"".join(parts)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """The same into `buffer`."""
        buffer[:] = await self.read_bytes(offset, len(buffer))

    async def write_bytes(self, offset: int, data: bytes) -> None:
        """Store into the segment, page by page."""
        done = 0
        for page, low, length in _pieces(self.segment.start + offset, len(data)):
            found = self.ptes.get(page)
            if found is None or not found.writable or not self.write:
                found = await self.fault(page, write=True)
            at = (page << PAGE_SHIFT) + low - found.address
            self.exporter.memory.write(found, at, data[done : done + length])
            done += length

    async def detach(self, offset: int, size: int) -> None:
        """Unmap pages of the segment."""
        first = self.segment.first + (offset >> PAGE_SHIFT)
        last = self.segment.first + -(-(offset + size) >> PAGE_SHIFT)
        self._leave([page for page in self.ptes if first <= page < last])

    async def release(self) -> None:
        """Unmap everything; faults that are under way find nothing."""
        self._released = True
        self._leave(list(self.ptes))

    def _leave(self, pages: list[int]) -> None:
        self.exporter.table.leave(self, pages)
        self.drop(pages)


def _pieces(address: int, size: int) -> Iterable[tuple[int, int, int]]:
    """Page number, offset in it, length: of each page that [address, +size) touches."""
    while size > 0:
        low = address & (PAGE_SIZE - 1)
        length = min(size, PAGE_SIZE - low)
        yield address >> PAGE_SHIFT, low, length
        address += length
        size -= length
