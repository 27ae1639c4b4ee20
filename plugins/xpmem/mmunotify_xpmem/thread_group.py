"""A thread group: what one process does with /dev/xpmem, and its address space if it exports any.

The operations are XPMEM's, with its names and errors. `make` exports a range of the address space,
`get` asks for a permit for somebody's segment, `attach` maps a part of it. Addresses, offsets and
sizes are bytes.
"""

from __future__ import annotations

import errno
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio
import anyio.lowlevel

from mmunotify import (
    ADDRESS_END,
    PAGE_SHIFT,
    PAGE_SIZE,
    AddressSpaceExited,
    BadAddress,
    StaleTranslation,
)

from . import events
from .attachment import Attachment, Permit
from .errors import (
    MAXADDR_SIZE,
    PERMIT_MODE,
    RDONLY,
    RDWR,
    VERSION,
    XPMEM_ERRNO_NOPROC,
    XpmemError,
    bus_error,
)
from .local import LocalPermit
from .pfns import LAST_PAGE, PfnTable
from .segments import Credentials, Fence, Segment, State, pack_id, wants_write

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from mmunotify import Pin, Primary, Translation

    from .wire import Buffer
    from .xpmem import Xpmem

_ATTACH_BASE: Final = 0x7000_0000_0000
"""Where attachments go that name no address."""
_FENCES: Final = ("lease", "kill", "never")


class ThreadGroup:
    """One opener of /dev/xpmem. Made by `Xpmem.open`.

    `pin` holds the frames of pages that importers have (FOLL_LONGTERM), as XPMEM does today;
    without it notifications alone keep translations and frames in step.
    """

    def __init__(self, xpmem: Xpmem, credentials: Credentials | None, *, pin: bool = False) -> None:
        self.xpmem: Final = xpmem
        self.credentials: Final = credentials or Credentials.mine()
        self.pin: Final = pin
        self.primary: Primary | None = None
        """The address space that it exports from; None before there is one and after its exit."""
        self.table: Final = PfnTable(self._unpin)
        self.leave: Callable[[], Awaitable[object]] | None = None
        """Unregisters its driver, if it has one."""
        self.segments: Final[dict[int, Segment]] = {}
        self.permits: Final[dict[int, Permit]] = {}
        self.attachments: Final[list[Attachment]] = []
        self._space: Primary | None = None
        self._numbers = 0
        self._next_address = _ATTACH_BASE
        self.exited = False

    # ------------------------------------------------------------------ the exporter's operations

    def make(
        self,
        vaddr: int,
        size: int,
        mode: int = 0o600,
        permit_type: int = PERMIT_MODE,
        *,
        fence: Fence = "lease",
        name: str = "",
    ) -> int:
        """Export [vaddr, vaddr + size) of the address space; the segid, by which others find it.

        `mode` says who may `get` it (owner, group, other; 4 to read, 6 to write); MAXADDR_SIZE as
        `size` exports everything from `vaddr` on. `fence` says what becomes of a partition that is
        silent for longer than its lease. Raises XpmemError: EINVAL, XPMEM_ERRNO_NOPROC.
        """
        what = f"make({vaddr:#x}, {size:#x}, {mode:o})"
        if permit_type != PERMIT_MODE or not 0 <= mode <= 0o777:
            raise XpmemError(errno.EINVAL, f"{what}: expected PERMIT_MODE and a mode up to 0o777")
        if fence not in _FENCES:
            raise XpmemError(errno.EINVAL, f"{what}: fence is {fence!r}: expected {_FENCES}")
        if size == MAXADDR_SIZE:
            size = ADDRESS_END - vaddr
        if vaddr < 0 or size <= 0 or vaddr % PAGE_SIZE or size % PAGE_SIZE:
            raise XpmemError(errno.EINVAL, f"{what}: expected whole pages, at least one")
        if vaddr + size > ADDRESS_END:
            raise XpmemError(errno.EINVAL, f"{what}: ends beyond 2**64")
        if self.primary is None:
            raise XpmemError(XPMEM_ERRNO_NOPROC, f"{what}: there is no address space to export")
        for attachment in self.attachments:
            if attachment.bound and attachment.address < vaddr + size and vaddr < attachment.end:
                raise XpmemError(errno.EINVAL, f"{what}: {attachment!r} cannot be exported again")
        segid = self.xpmem.new_segid()
        pages = size >> PAGE_SHIFT
        segment = Segment(
            segid, self, vaddr >> PAGE_SHIFT, pages, mode, self.credentials, fence, name
        )
        self.segments[segid] = self.xpmem.exporter.segments[segid] = segment
        self.xpmem.log.emit(
            events.SEGMENT_MADE, segid=segid, start=vaddr, end=vaddr + size, mode=mode, fence=fence
        )
        return segid

    async def remove(self, segid: int) -> None:
        """Export it no longer; returns when nobody has a page of it. Later accesses get SIGBUS.

        Bounded by the leases of those who have it attached. Cancelled, it can be called again.
        Raises XpmemError: EINVAL, ENOENT; EACCES if it is somebody else's.
        """
        if segid <= 0:
            raise XpmemError(errno.EINVAL, f"remove({segid}): no segid")
        segment = self.segments.get(segid)
        if segment is None:
            known = segid in self.xpmem.exporter.segments
            raise XpmemError(
                errno.EACCES if known else errno.ENOENT,
                f"remove({segid:#x}): {'made by somebody else' if known else 'no such segment'}",
            )
        segment.state = State.DESTROYING
        await self._recall(segment.first, segment.last)
        self._destroyed(segment)
        self.xpmem.flush()

    def _destroyed(self, segment: Segment) -> None:
        self.segments.pop(segment.segid, None)
        self.xpmem.exporter.remove(segment)
        self.xpmem.log.emit(events.SEGMENT_REMOVED, segid=segment.segid)

    @asynccontextmanager
    async def recalling(self, start: int, end: int) -> AsyncIterator[None]:
        """Inside, no importer has a page of [start, end), nor can get one (PFN recall).

        Around stores of the exporter itself, which importers in other partitions, having copies,
        do not see otherwise; around fork; before memory is taken away by other means.
        """
        first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
        table = self.table
        table.counters["recalls"] += 1
        table.open.append((first, last))
        try:
            await self._recall(first, last)
            yield
        finally:
            table.end(first, last)
            self.xpmem.flush()

    async def write(self, address: int, data: bytes) -> None:
        """Store into the exporter's own memory, so that every importer sees it from now on."""
        if self.primary is None:
            raise XpmemError(XPMEM_ERRNO_NOPROC, f"write({address:#x}): no address space")
        async with self.recalling(address, address + len(data)):
            await self.store(address, data)

    async def store(self, address: int, data: bytes) -> None:
        """Write through the address space: pages are made writable as the process's own would.

        Inside `recalling`. Raises BadAddress like the process's own access.
        """
        primary = self.memory
        at = 0
        while at < len(data):
            low = (address + at) & (PAGE_SIZE - 1)
            length = min(len(data) - at, PAGE_SIZE - low)
            await primary.fault_in(address + at, write=True)
            found = primary.translate(address + at)
            if found is None or not found.writable:
                await anyio.lowlevel.checkpoint()
                continue
            primary.write(found, address + at - found.address, data[at : at + length])
            at += length

    async def _recall(self, first: int, last: int, *, announced: bool = True) -> None:
        wait = self.table.invalidate(first, last, announced=announced)
        if wait is not None:
            await self.xpmem.settle(self.table, wait)

    # ------------------------------------------------------------------ the importer's operations

    async def get(
        self,
        segid: int,
        flags: int = RDWR,
        permit_type: int = PERMIT_MODE,
        permit_value: object = None,
    ) -> int:
        """Ask for access to a segment; the apid, with which it can be attached.

        `flags` is RDONLY or RDWR. Raises XpmemError: EINVAL, ENOENT (no such segment), EACCES (its
        mode does not permit it), and what only another partition answers: ExporterGone, EPERM (its
        segments kill silent importers, which it cannot do to this one), EMFILE.
        """
        what = f"get({segid:#x}, {flags})"
        if segid <= 0 or flags not in (RDONLY, RDWR):
            raise XpmemError(errno.EINVAL, f"{what}: expected a segid, and RDONLY or RDWR")
        if permit_type != PERMIT_MODE or permit_value is not None:
            raise XpmemError(errno.EINVAL, f"{what}: expected PERMIT_MODE and None")
        write = wants_write(flags)
        permit: Permit
        if segid >> 32 != self.xpmem.part:
            permit = await self.xpmem.get_remote(segid, write=write)
        else:
            segment = self.xpmem.exporter.segments.get(segid)
            if segment is None or segment.state is not State.LIVING:
                raise XpmemError(errno.ENOENT, f"{what}: no such segment")
            if not segment.permits(self.credentials, write=write):
                raise XpmemError(errno.EACCES, f"{what}: its mode is {segment.mode:o}")
            assert isinstance(segment.memory, ThreadGroup)
            permit = LocalPermit(segment.memory, segment, write=write)
        self._numbers += 1
        apid = pack_id(self.xpmem.part, self._numbers)
        self.permits[apid] = permit
        return apid

    def attach(
        self, apid: int, offset: int = 0, size: int | None = None, vaddr: int = 0
    ) -> Attachment:
        """Map [offset, offset + size) of the segment; all from `offset` on by default.

        `vaddr` is an address of the importer's own address space: when it unmaps that, the
        attachment goes with it. Raises XpmemError: EINVAL, ENOENT (no such apid).
        """
        if apid <= 0:
            raise XpmemError(errno.EINVAL, f"attach({apid}): no apid")
        permit = self.permits.get(apid)
        what = f"attach({apid:#x}, {offset:#x}, {'all' if size is None else hex(size)})"
        if permit is None:
            raise XpmemError(errno.ENOENT, f"{what}: no such apid")
        if size is None:
            size = permit.size - offset
        if offset < 0 or size <= 0 or offset % PAGE_SIZE or size % PAGE_SIZE:
            raise XpmemError(errno.EINVAL, f"{what}: expected whole pages, at least one")
        if offset + size > permit.size:
            raise XpmemError(errno.EINVAL, f"{what}: the segment has {permit.size:#x} bytes")
        bound = bool(vaddr)
        if not bound:
            vaddr = self._next_address
            self._next_address += size + PAGE_SIZE
        self._check_target(what, vaddr, vaddr + size)
        attachment = Attachment(self, apid, permit, offset, size, vaddr, bound=bound)
        self.attachments.append(attachment)
        return attachment

    def _check_target(self, what: str, start: int, end: int) -> None:
        if start % PAGE_SIZE:
            raise XpmemError(errno.EINVAL, f"{what} at {start:#x}: expected a page's address")
        for segment in self.segments.values():
            if segment.pages < LAST_PAGE - segment.first and (
                segment.start < end and start < segment.start + segment.size
            ):
                raise XpmemError(errno.EINVAL, f"{what} at {start:#x}: is exported itself")
        for other in self.attachments:
            if other.address < end and start < other.end:
                raise XpmemError(errno.EINVAL, f"{what} at {start:#x}: {other!r} is there")

    async def detach(self, attachment: Attachment | int) -> None:
        """Undo an attachment, given as such or by its address.

        Raises XpmemError (EINVAL) where none is.
        """
        found = next(
            (known for known in self.attachments if attachment in (known, known.address)), None
        )
        if found is None:
            raise XpmemError(errno.EINVAL, f"detach({attachment!r}): nothing is attached there")
        self.attachments.remove(found)
        found.detached = True
        rest = [(found.offset, found.offset + found.size)]
        for other in self.attachments:
            if other.permit is found.permit:
                rest = _without(rest, other.offset, other.offset + other.size)
        for low, high in rest:
            await found.permit.detach(low, high - low)

    async def release(self, apid: int) -> None:
        """Give a permit back; its attachments are detached. Raises XpmemError: EINVAL, ENOENT."""
        if apid <= 0:
            raise XpmemError(errno.EINVAL, f"release({apid}): no apid")
        permit = self.permits.pop(apid, None)
        if permit is None:
            raise XpmemError(errno.ENOENT, f"release({apid:#x}): no such apid")
        for attachment in [known for known in self.attachments if known.permit is permit]:
            self.attachments.remove(attachment)
            attachment.detached = True
        await permit.release()

    @staticmethod
    def version() -> int:
        """The version of this interface."""
        return VERSION

    async def close(self) -> None:
        """Close the device: permits are given back, segments removed, the address space is left."""
        if self.exited:
            return
        if self.leave is None:
            await self.exit()
        else:
            await self.leave()

    # ------------------------------------------------------------------ the address space

    def enter(self, primary: Primary | None) -> None:
        """The driver has an address space to export from."""
        self.primary = self._space = primary

    async def exit(self) -> None:
        """The process, or its use of the device, ends: nobody has a page of it afterwards.

        Bounded by the leases of who has it attached. Cancelled, it waits for nobody: permits are
        void, and who has copies is fenced.
        """
        if self.exited:
            return
        self.exited = True
        self.primary = None
        for segment in self.segments.values():
            segment.state = State.DESTROYING
        try:
            await self._recall(0, LAST_PAGE, announced=False)
        finally:
            for segment in list(self.segments.values()):
                self._destroyed(segment)
            self.xpmem.flush()
            self.xpmem.groups.discard(self)
            with anyio.CancelScope(shield=True):
                for apid in list(self.permits):
                    await self.release(apid)

    @property
    def memory(self) -> Primary:
        """The address space; to be used inside `using`, or with a translation in hand."""
        assert self._space is not None
        return self._space

    def _unpin(self, pin: Pin) -> None:
        self.memory.unpin(pin)

    @asynccontextmanager
    async def using(self, segment: Segment, page: int) -> AsyncIterator[None]:
        """Keep the address space while pages of it are looked up."""
        primary = self.get_memory(segment, page)
        try:
            yield
        finally:
            await primary.put()

    def get_memory(self, segment: Segment, page: int) -> Primary:
        """The address space with a reference, to be put (mmget_not_zero). Raises `bus_error`."""
        primary = self.primary
        if primary is None or not primary.tryget():
            raise bus_error(f"segment {segment.segid:#x}: its process has exited", page << 12)
        return primary

    def look_up_nowait(self, segment: Segment, page: int) -> Translation | None:
        """`look_up` of a page that is there and writable; None if it may take more than a look.

        Nothing can come between the look and the table, so no reference is needed.
        """
        primary = self.primary
        if (
            primary is None
            or self.pin
            or segment.state is not State.LIVING
            or self.table.closed(page, page + 1)
        ):
            return None
        found = primary.translate(page << PAGE_SHIFT)
        return found if found is not None and found.writable else None

    async def look_up(self, segment: Segment, page: int, *, write: bool) -> Translation:
        """Make a page present and pin it if pages are; waits while a section is open over it.

        Enter it into the table before anything else runs: what is returned holds until then. The
        caller is in `using`.
        """
        table = self.table
        address = page << PAGE_SHIFT
        while True:
            if segment.state is not State.LIVING:
                raise bus_error(f"segment {segment.segid:#x} is removed", address)
            if table.closed(page, page + 1):
                opened = anyio.Event()
                table.park(page, page + 1, opened.set)
                await opened.wait()
                continue
            found = await self._fault_in(page, write=write)
            if found is not None and segment.state is State.LIVING:
                return found
            table.let_go_unheld(page, page + 1)
            table.counters["retries"] += 1
            await anyio.lowlevel.checkpoint()

    async def _fault_in(self, page: int, *, write: bool) -> Translation | None:
        """The translation of a page, or None if an invalidation has overtaken the lookup."""
        table, primary = self.table, self.memory
        address = page << PAGE_SHIFT
        if not self.pin:
            await primary.fault_in(address, write=write)
            # No await from here on: what the lookup says now holds when it is installed.
            return None if table.closed(page, page + 1) else primary.translate(address)
        pin = None
        if page not in table.pins:
            # As its mapping is: writable frames are pinned for writing, others stay shared.
            regions = list(primary.regions(address, address + PAGE_SIZE))
            writable = any(region.writable for region in regions)
            pin = await primary.pin(address, address + PAGE_SIZE, write=write or writable)
            if page in table.pins:
                primary.unpin(pin)
                pin = None
        elif write:
            await primary.fault_in(address, write=True)
        found = None if table.closed(page, page + 1) else primary.translate(address)
        if pin is None:
            return found if page in table.pins else None
        frames = pin.translations
        at = 0 if found is None else (address - found.address) >> PAGE_SHIFT
        if found is None or found.frame + at != frames.frames[0]:
            primary.unpin(pin)
            return None
        table.pins[page] = pin
        table.counters["pinned"] += 1
        return found

    def copy(self, first: int, need: int, count: int) -> tuple[int, Buffer] | None:
        """`Memory.copy`: what is present, and pinned if pages are; never suspends."""
        primary = self.primary
        if primary is None:
            return None
        parts: list[bytes] = []
        page, last = first, first + count
        if self.pin:
            pins = self.table.pins
            last = next((other for other in range(first, last) if other not in pins), last)
        try:
            while page < last:
                address = page << PAGE_SHIFT
                found = primary.translate(address)
                if found is None:
                    break
                span = min(last, (found.address + found.size) >> PAGE_SHIFT) - page
                parts.append(primary.read(found, address - found.address, span << PAGE_SHIFT))
                page += span
        except (BadAddress, StaleTranslation, AddressSpaceExited):
            return None
        if page - first < need:
            return None
        return page - first, parts[0] if len(parts) == 1 else b"".join(parts)

    # ------------------------------------------------------------------ the driver's side

    def unmapped(self, start: int, end: int) -> None:
        """The importer's own address space unmaps [start, end)."""
        for attachment in self.attachments:
            if attachment.bound:
                attachment.unmap(start, end)


def _without(ranges: list[tuple[int, int]], low: int, high: int) -> list[tuple[int, int]]:
    """`ranges` less [low, high)."""
    found = []
    for first, last in ranges:
        if first < min(last, low):
            found.append((first, min(last, low)))
        if max(first, high) < last:
            found.append((max(first, high), last))
    return found
