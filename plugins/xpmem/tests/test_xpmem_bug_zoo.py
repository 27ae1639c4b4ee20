"""Bugs that XPMEM has had, each as a sequence of events that must end well here."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify.model.flags import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_READ
from mmunotify_xpmem import Credentials, MemoryHub, Partition, Xpmem
from mmunotify_xpmem.wire import Inv, Page, decode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGE = mn.PAGE_SIZE
FIXED = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
BOTH = pytest.mark.parametrize("across", [False, True], ids=["within", "across"])


@asynccontextmanager
async def sharing(
    across: bool, *, pin: bool = False, hub: MemoryHub | None = None, **options: Any
) -> AsyncIterator[tuple[Any, Any, Any]]:
    """An address space, its thread group, and one that imports."""
    hub = hub or MemoryHub()
    machine = Machine(frames=512, swap=64, contents=True, **options)
    async with machine, AsyncExitStack() as stack:
        device: Any = Xpmem()
        other: Any = device
        if across:
            who = Credentials.mine()
            device, other = [
                await stack.enter_async_context(Partition(hub.engine(who), part, lease=60.0))
                for part in (1, 2)
            ]
        mm = machine.new_mm()
        exporter = await stack.enter_async_context(device.opened(mm.notifiers, pin=pin))
        importer = await stack.enter_async_context(other.opened())
        yield mm, exporter, importer


async def attach(exporter: Any, importer: Any, address: int, size: int) -> Any:
    return importer.attach(await importer.get(exporter.make(address, size)))


@BOTH
async def test_z26_munmap_of_several_mappings(across: bool) -> None:
    """A munmap over several mappings reaches pages of all of them, though they are detached before
    anybody is told and another one stays in the range."""
    async with sharing(across) as (mm, exporter, importer):
        address = await mm.mmap(6 * PAGE)
        await mm.mprotect(address + 2 * PAGE, 2 * PAGE, PROT_READ)
        attachment = await attach(exporter, importer, address, 6 * PAGE)
        assert len(await attachment.read()) == 6 * PAGE
        await mm.munmap(address, 5 * PAGE)
        assert set(exporter.table.holders) <= {(address >> 12) + 5}
        await mm.mmap(5 * PAGE, flags=FIXED, addr=address)
        await mm.write(address + 2 * PAGE, b"new")
        assert await attachment.read(2 * PAGE, 3) == b"new"


@BOTH
async def test_z27_somebody_else_unmaps(across: bool) -> None:
    """Another process truncates the file, or the machine reclaims the page: the importer does not
    keep what the exporter does not have any more."""
    async with sharing(across) as (mm, exporter, importer):
        file = mm.machine.file(pages=4, kind="memfd")
        address = await mm.mmap(4 * PAGE, flags=MAP_SHARED, file=file)
        await mm.write(address + 3 * PAGE, b"old")
        attachment = await attach(exporter, importer, address, 4 * PAGE)
        assert await attachment.read(3 * PAGE, 3) == b"old"
        await mm.machine.truncate(file, PAGE)
        with pytest.raises(mn.BadAddress) as fault:
            await attachment.read(3 * PAGE, 3)
        assert fault.value.signal == "BUS"
        await mm.machine.truncate(file, 4 * PAGE)
        assert await attachment.read(3 * PAGE, 3) == bytes(3)

        anonymous = await mm.mmap(PAGE)
        await mm.write(anonymous, b"swapped")
        attachment = await attach(exporter, importer, anonymous, PAGE)
        assert await attachment.read(0, 7) == b"swapped"
        await mm.reclaim(anonymous, anonymous + PAGE)
        await mm.write(anonymous, b"SWAPPED")
        assert await attachment.read(0, 7) == b"SWAPPED"


class Overtaken:
    """An address space in which something happens between a lookup and its return."""

    def __init__(self, primary: Any, change: Any) -> None:
        self.primary = primary
        self.change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.primary, name)

    async def fault_in(self, address: int, *, write: bool = False) -> Any:
        found = await self.primary.fault_in(address, write=write)
        await self.overtake()
        return found

    async def pin(self, start: int, end: int, *, write: bool = True) -> Any:
        pin = await self.primary.pin(start, end, write=write)
        await self.overtake()
        return pin

    async def overtake(self) -> None:
        change, self.change = self.change, None
        if change is not None:
            await change()


@BOTH
@pytest.mark.parametrize("pin", [False, True], ids=["", "pinned"])
async def test_z28_page_goes_while_it_is_faulted(across: bool, pin: bool) -> None:
    """The page is taken away after it was looked up, and before it is used: the importer gets the
    page that is there; no SIGBUS, no old one, and nothing stays pinned."""
    async with sharing(across, pin=pin) as (mm, exporter, importer):
        address = await mm.mmap(PAGE)
        await mm.write(address, b"old")
        await mm.reclaim(address, address + PAGE)
        attachment = await attach(exporter, importer, address, PAGE)

        async def change() -> None:
            await mm.madvise(address, PAGE, "dontneed")
            await mm.write(address, b"new")

        exporter.enter(Overtaken(mm.primary, change))
        assert await attachment.read(0, 3) == b"new"
        assert exporter.table.counters["retries"] == pin
        await mm.munmap(address, PAGE)
        assert not mm.machine.frames.pins


@BOTH
@pytest.mark.parametrize("pin", [False, True], ids=["", "pinned"])
async def test_z29_read_only_mapping(across: bool, pin: bool) -> None:
    """A mapping that the exporter may not write, attached for writing: it can be read, a store is
    a SIGBUS, and neither is tried for ever."""
    async with sharing(across, pin=pin, thp="always") as (mm, exporter, importer):
        address = await mm.mmap(2 * PAGE)
        await mm.write(address, b"constant")
        await mm.mprotect(address, 2 * PAGE, PROT_READ)
        attachment = await attach(exporter, importer, address, 2 * PAGE)
        with anyio.fail_after(30):
            assert await attachment.read(0, 8) == b"constant"
            with pytest.raises(mn.BadAddress) as fault:
                await attachment.write(0, b"variable")
        assert fault.value.signal == "BUS"
        assert await attachment.read(0, 8) == b"constant"


async def test_z30_reply_is_overtaken() -> None:
    """The reply to a fault is overtaken by the invalidation of its page: it is thrown away, and the
    fault is made again."""
    hub = MemoryHub(manual=True)

    def deliver(*kinds: type) -> None:
        """Let everything arrive but messages of some kinds."""
        held = []
        while hub.carried:
            one = hub.carried.popleft()
            if isinstance(decode(memoryview(one.frame))[0], kinds):
                held.append(one)
            else:
                hub.deliver(one)
        hub.carried.extend(held)

    async def pump(*kinds: type) -> None:
        while True:
            await anyio.lowlevel.checkpoint()
            deliver(*kinds)

    seen = []
    async with anyio.create_task_group() as ground:
        ground.start_soon(pump, Page)
        async with sharing(True, hub=hub) as (mm, exporter, importer):
            address = await mm.mmap(PAGE)
            await mm.write(address, b"old")
            attachment = await attach(exporter, importer, address, PAGE)

            async def read() -> None:
                seen.append(await attachment.read(0, 3))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                while not hub.carried:
                    await anyio.lowlevel.checkpoint()
                (overtaken,) = hub.carried
                # The invalidation is acknowledged, so the page is gone; the reply is not there.
                await mm.madvise(address, PAGE, "dontneed")
                await mm.write(address, b"new")
                assert not seen
                hub.carried.clear()
                hub.deliver(overtaken)
                await anyio.lowlevel.checkpoint()
                assert not seen
                while not seen:
                    deliver()
                    await anyio.lowlevel.checkpoint()
            assert seen == [b"new"]
            hub.deliver(overtaken)
            assert await attachment.read(0, 3) == b"new"
            ground.start_soon(pump)
        ground.cancel_scope.cancel()


async def test_z31_exit_with_a_deaf_importer() -> None:
    """The exporter exits while an importer does not answer. It waits no longer than the lease, and
    an unregistration elsewhere on the machine, which waits for its callback, is not held up."""
    hub = MemoryHub()

    class Deaf:
        """An importer's engine that hears no invalidation."""

        def __init__(self) -> None:
            self.heard = 0

        def __call__(self, one: Any) -> None:
            if isinstance(decode(memoryview(one.frame))[0], Inv):
                self.heard += 1
            else:
                deliver(one)

    deliver = hub.deliver
    deaf = Deaf()
    async with Machine(frames=256, swap=16, contents=True) as machine:
        who = Credentials.mine()
        silent = hub.engine(who)
        async with (
            Partition(hub.engine(who), 1, lease=0.2, heartbeat=0.05) as device,
            Partition(silent, 2) as other,
        ):
            mm, bystander = machine.new_mm(), machine.new_mm()
            exporter = await device.open(mm.notifiers)
            importer = await other.open()
            address = await mm.mmap(PAGE)
            attachment = await attach(exporter, importer, address, PAGE)
            await attachment.read()
            subscription = await bystander.register(Listener())
            hub.deliver = deaf  # type: ignore[method-assign,assignment]
            other.importer.tick = lambda now: None  # type: ignore[method-assign]
            with anyio.fail_after(60):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(mm.exit)
                    tasks.start_soon(bystander.unregister, subscription)
            assert deaf.heard
            assert not exporter.table.holders
            hub.deliver = deliver  # type: ignore[method-assign]
            with pytest.raises(mn.BadAddress):
                await attachment.read()


class Listener(mn.SleepableDriver):
    async def invalidate_range_start(self, rng: mn.Range) -> None: ...


async def test_cancelled_invalidation_frees_nothing() -> None:
    """Who gives up waiting for a deaf importer has not freed the page; the next one waits again,
    says whom for, and is done with its acknowledgement. Nobody that must not wait gets through."""
    hub = MemoryHub()
    deliver = hub.deliver
    held: list[Any] = []

    def deaf(one: Any) -> None:
        if isinstance(decode(memoryview(one.frame))[0], Inv):
            held.append(one)
        else:
            deliver(one)

    async with sharing(True, hub=hub) as (mm, exporter, importer):
        address = await mm.mmap(PAGE)
        await mm.write(address, b"kept")
        attachment = await attach(exporter, importer, address, PAGE)
        assert await attachment.read(0, 4) == b"kept"
        hub.deliver = deaf  # type: ignore[method-assign,assignment]
        with (
            pytest.raises(mn.WouldBlock),
            mm.notifiers.invalidating_nonblock(mn.Range(address, address + PAGE)),
        ):
            pass
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mm.madvise, address, PAGE, "dontneed")
            while not held:
                await anyio.lowlevel.checkpoint()
            assert exporter.xpmem.status()["waiting_for"] == ["2"]
            tasks.cancel_scope.cancel()
        assert await mm.read(address, 4) == b"kept"
        assert not exporter.table.open
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mm.madvise, address, PAGE, "dontneed")
            await anyio.wait_all_tasks_blocked()
            assert mm.primary.translate(address) is not None
            hub.deliver = deliver  # type: ignore[method-assign]
            deliver(held[0])
        assert await attachment.read(0, 4) == bytes(4)
