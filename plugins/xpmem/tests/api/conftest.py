from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from mmunotify import LockModel, RwSems, SpinLocks
from mmunotify.model import Machine
from mmunotify_xpmem import Credentials, MemoryHub, Partition, ThreadGroup, Xpmem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from mmunotify.model.mm import AddressSpace

OWNER = Credentials(1000, 100)


@attrs.define
class World:
    """One machine, and processes that use XPMEM: all of one partition, or each of its own."""

    machine: Machine[Any]
    stack: AsyncExitStack
    across: bool
    pin: bool
    hub: MemoryHub = attrs.field(factory=MemoryHub)
    device: Xpmem = attrs.field(factory=Xpmem)
    count: int = 0

    async def open(
        self, mm: AddressSpace[Any] | None = None, who: Credentials = OWNER
    ) -> ThreadGroup:
        """A process that opens the device; across partitions, in a partition of its own."""
        device = self.device
        if self.across:
            self.count += 1
            engine = self.hub.engine(who)
            device = await self.stack.enter_async_context(
                Partition(engine, self.count, lease=60.0, heartbeat=20.0)
            )
        notifiers = None if mm is None else mm.notifiers
        group = await device.open(notifiers, credentials=who, pin=self.pin)
        self.stack.push_async_callback(group.close)
        return group

    async def exporter(self, pages: int = 4, mode: int = 0o600) -> Exported:
        """A process that exports `pages` pages of zeros."""
        mm = self.machine.new_mm()
        group = await self.open(mm)
        address = await mm.mmap(pages * 4096)
        return Exported(mm, group, address, group.make(address, pages * 4096, mode))


@attrs.define
class Exported:
    mm: AddressSpace[Any]
    group: ThreadGroup
    address: int
    segid: int

    async def store(self, offset: int, data: bytes) -> None:
        """What every importer is to see, as the exporter stores it."""
        await self.group.write(self.address + offset, data)

    async def load(self, offset: int, size: int) -> bytes:
        return await self.mm.read(self.address + offset, size)

    @property
    def pinned(self) -> int:
        """Pages that are pinned, as the machine counts them."""
        frames: Any = self.mm.machine.frames
        return sum(frames.pins.values())


SETTINGS = [
    pytest.param((locks, across, pin), id="-".join(words))
    for locks, across, pin, words in (
        (RwSems, False, False, ("rwsem", "within")),
        (SpinLocks, False, True, ("spin", "within", "pinned")),
        (RwSems, True, True, ("rwsem", "across", "pinned")),
        (SpinLocks, True, False, ("spin", "across")),
    )
]


@pytest.fixture(params=SETTINGS)
def world(request: pytest.FixtureRequest) -> Callable[..., AbstractAsyncContextManager[World]]:
    """Both answers of 2008, within a process and across, pinned and not; with `frames` frames."""
    locks: type[LockModel]
    locks, across, pin = request.param

    @asynccontextmanager
    async def made(frames: int = 1 << 14) -> AsyncIterator[World]:
        machine = Machine(frames=frames, swap=1 << 10, locks=locks, contents=True)
        async with machine, AsyncExitStack() as stack:
            yield World(machine, stack, across, pin)

    return made
