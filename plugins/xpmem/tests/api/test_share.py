"""The cases of XPMEM's share tests, by their names, against this API."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mmunotify import BadAddress
from mmunotify_xpmem import RDONLY

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    World = Callable[[], AbstractAsyncContextManager[Any]]

PAGE = 4096
INTS = struct.Struct("<1024i")


async def increment(attachment: Any) -> None:
    """The peer's half: add one to each int, page by page."""
    for page in range(attachment.size // PAGE):
        values = INTS.unpack(await attachment.read(page * PAGE, PAGE))
        await attachment.write(page * PAGE, INTS.pack(*(value + 1 for value in values)))


async def ints(exported: Any, page: int) -> tuple[int, ...]:
    return INTS.unpack(await exported.load(page * PAGE, PAGE))


async def test_base(world: World) -> None:
    """The peer increments each int by one, and the owner sees it."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        for page in range(4):
            await exported.store(page * PAGE, INTS.pack(*range(1024)))
        peer = await w.open()
        await increment(peer.attach(await peer.get(exported.segid)))
        for page in range(4):
            assert await ints(exported, page) == tuple(range(1, 1025))


async def test_two_attach(world: World) -> None:
    """Both attachments of one permit see the same memory."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        peer = await w.open()
        apid = await peer.get(exported.segid)
        one, other = peer.attach(apid), peer.attach(apid, PAGE)
        assert one.address != other.address
        await one.write(PAGE, b"one")
        assert await other.read(0, 3) == b"one"
        await other.write(0, b"two")
        assert await one.read(PAGE, 3) == b"two"
        await one.detach()
        assert await other.read(0, 3) == b"two"


async def test_two_shares(world: World) -> None:
    """Two segments of one owner do not get into each other's way, also where they overlap."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        second = exported.group.make(exported.address + PAGE, 2 * PAGE)
        peer = await w.open()
        one = peer.attach(await peer.get(exported.segid))
        other = peer.attach(await peer.get(second))
        await increment(one)
        await increment(other)
        assert [(await ints(exported, page))[7] for page in range(4)] == [1, 2, 2, 1]
        await exported.group.remove(second)
        with pytest.raises(BadAddress):
            await other.read(0, 1)
        assert INTS.unpack(await one.read(PAGE, PAGE))[7] == 2


async def test_fork(world: World) -> None:
    """The owner forks and writes one page, which is copied: the peer sees the owner's, never the
    child's, and the child has not inherited what is attached."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        peer = await w.open()
        attachment = peer.attach(await peer.get(exported.segid))
        await increment(attachment)
        child = await exported.mm.fork()
        await exported.mm.write(exported.address + PAGE, INTS.pack(*([41] * 1024)))
        await child.write(exported.address + 2 * PAGE, INTS.pack(*([99] * 1024)))
        await increment(attachment)
        assert [(await ints(exported, page))[0] for page in range(4)] == [2, 42, 2, 2]
        theirs = [
            INTS.unpack(await child.read(exported.address + page * PAGE, PAGE))[0]
            for page in range(4)
        ]
        assert theirs == [1, 1, 99, 1]
        await child.exit()


async def test_mem_leak(world: World) -> None:
    """As many pages are unpinned as were pinned, however they came to be let go."""
    async with world() as w:
        exported = await w.exporter(pages=16)
        counters = exported.group.table.counters
        peers = [await w.open() for _ in range(3)]
        apids = [await peer.get(exported.segid) for peer in peers]
        attachments = [peer.attach(apid) for peer, apid in zip(peers, apids, strict=True)]
        for attachment in attachments:
            await attachment.read()
        if w.pin:
            assert exported.pinned == 16
            assert counters["pinned"] - counters["unpinned"] == 16
        await attachments[0].detach()
        await peers[1].release(apids[1])
        await exported.mm.munmap(exported.address, 4 * PAGE)
        await exported.mm.madvise(exported.address + 4 * PAGE, 4 * PAGE, "dontneed")
        await peers[2].close()
        while exported.group.table.holders:
            await anyio.lowlevel.checkpoint()
        assert exported.pinned == 0
        assert counters["pinned"] == counters["unpinned"]
        assert bool(counters["pinned"]) == w.pin


async def test_recall(world: World) -> None:
    """While pages are recalled nobody has them, and who wants them waits."""
    async with world() as w:
        exported = await w.exporter(pages=2)
        peer = await w.open()
        attachment = peer.attach(await peer.get(exported.segid, RDONLY))
        await attachment.read()
        seen = []

        async def read() -> None:
            seen.append(await attachment.read(0, 3))

        whole = exported.group.recalling(exported.address, exported.address + PAGE)
        async with anyio.create_task_group() as tasks, whole:
            assert exported.address >> 12 not in exported.group.table.holders
            tasks.start_soon(read)
            await anyio.wait_all_tasks_blocked()
            assert not seen
            await exported.mm.write(exported.address, b"new")
        assert seen == [b"new"]


async def test_importer_unmaps(world: World) -> None:
    """What the importer unmaps of its own address space is no longer attached there."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        mm = w.machine.new_mm()
        importer = await w.open(mm)
        address = await mm.mmap(4 * PAGE)
        attachment = importer.attach(await importer.get(exported.segid), vaddr=address)
        assert attachment.address == address
        assert await attachment.read(0, 1) == b"\0"
        await mm.munmap(address + PAGE, PAGE)
        assert await attachment.read(2 * PAGE, 1) == b"\0"
        with pytest.raises(BadAddress) as fault:
            await attachment.read(PAGE, 1)
        assert (fault.value.signal, fault.value.code) == ("SEGV", 1)
        await importer.detach(address)


async def test_exporter_exits(world: World) -> None:
    """When the exporting process exits, its importers have nothing left but SIGBUS."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        peer = await w.open()
        attachment = peer.attach(await peer.get(exported.segid))
        await attachment.read()
        await exported.mm.exit()
        with pytest.raises(BadAddress) as fault:
            await attachment.read(0, 1)
        assert fault.value.signal == "BUS"
        assert not w.machine.frames.pins
        await exported.group.close()


async def test_importer_exits(world: World) -> None:
    """When an importing process exits, the exporter has nobody to tell."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        mm = w.machine.new_mm()
        importer = await w.open(mm)
        attachment = importer.attach(await importer.get(exported.segid))
        await attachment.read()
        assert exported.group.table.holders
        await mm.exit()
        assert not exported.group.table.holders
        assert not w.machine.frames.pins
