"""An attachment: a part of a segment, mapped at an address of the importer."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, Protocol

from mmunotify import BadAddress

from .errors import XpmemError

if TYPE_CHECKING:
    from .thread_group import ThreadGroup


class Permit(Protocol):
    """Access to a segment, whichever partition it is in. Offsets are bytes from its start."""

    @property
    def size(self) -> int:
        """Of the segment, in bytes."""
        ...

    @property
    def write(self) -> bool:
        """Whether it permits stores."""
        ...

    async def read_bytes(self, offset: int, size: int) -> bytes:
        """Load. Raises BadAddress where the exporter itself would get a signal."""
        ...

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Load into `buffer`. Raises like `read_bytes`."""
        ...

    async def write_bytes(self, offset: int, data: bytes) -> None:
        """Store. Raises like `read_bytes`."""
        ...

    async def detach(self, offset: int, size: int) -> None:
        """Nobody of the importer maps [offset, +size) any longer."""
        ...

    async def release(self) -> None:
        """Give it back."""
        ...


class Attachment:
    """[offset, offset + size) of a segment, at `address` of the importer. Sizes are bytes.

    Several attachments of one permit see the same memory. What was unmapped at the importer
    (munmap of a part of it) raises BadAddress; what is no longer there at the exporter does, too,
    with signal BUS.
    """

    def __init__(
        self,
        group: ThreadGroup,
        apid: int,
        permit: Permit,
        offset: int,
        size: int,
        address: int,
        *,
        bound: bool,
    ) -> None:
        self.group: Final = group
        self.apid: Final = apid
        self.permit: Final = permit
        self.offset: Final = offset
        self.size: Final = size
        self.address: Final = address
        self.bound: Final = bound
        """Whether the address is one of the importer's own address space, and goes with it."""
        self.detached = False
        self._holes: list[tuple[int, int]] = []

    def __repr__(self) -> str:
        state = " detached" if self.detached else ""
        return f"<Attachment [{self.address:#x}, {self.end:#x}) of {self.apid:#x}{state}>"

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.address + self.size

    async def read(self, start: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from byte `start` of the attachment; to its end by default.

        Each page is as it was at one moment while this ran, and no older than its last recall.
        Raises BadAddress, ExporterGone, and XpmemError (EINVAL) outside of the attachment.
        """
        if size is None:
            size = self.size - start
        self._check(start, size)
        return await self.permit.read_bytes(self.offset + start, size)

    async def read_into(self, buffer: bytearray | memoryview, start: int = 0) -> None:
        """`read` of as many bytes as `buffer` has, into it, which saves a copy."""
        view = memoryview(buffer).cast("B")
        self._check(start, len(view))
        await self.permit.read_into(self.offset + start, view)

    async def write(self, start: int, data: bytes) -> None:
        """Store at byte `start` of the attachment. Raises like `read`, and FencedError."""
        self._check(start, len(data))
        await self.permit.write_bytes(self.offset + start, data)

    def _check(self, start: int, size: int) -> None:
        if self.detached:
            raise BadAddress(f"{self!r}: nothing is mapped", address=self.address + start)
        if start < 0 or size < 0 or start + size > self.size:
            raise XpmemError(errno.EINVAL, f"[{start}, +{size}) is outside of {self!r}")
        for low, high in self._holes:
            if start < high and low < start + size:
                address = self.address + max(start, low)
                raise BadAddress(f"{address:#x}: unmapped at the importer", address=address)

    def unmap(self, start: int, end: int) -> None:
        """The importer has unmapped addresses [start, end) of it."""
        low, high = max(start, self.address), min(end, self.end)
        if low < high:
            self._holes.append((low - self.address, high - self.address))

    async def detach(self) -> None:
        """Undo the attachment; `ThreadGroup.detach`."""
        await self.group.detach(self)
