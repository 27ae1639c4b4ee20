"""The cases of XPMEM's multi-process tests, by their names: peers that signal each other through
shared memory, one to many, many to one, and all to all."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mmunotify import BadAddress

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    World = Callable[..., AbstractAsyncContextManager[Any]]

PAGE = 4096
PEERS_AND_PAGES = [
    *((1, 1), (3, 16), (5, 4)),
    *[
        pytest.param(peers, pages, marks=pytest.mark.long)
        for peers in (1, 3, 5, 10)
        for pages in (1, 100)
    ],
    pytest.param(10, 1000, marks=pytest.mark.long),
    pytest.param(3, 10000, marks=pytest.mark.long),
]
many = pytest.mark.parametrize(("peers", "pages"), PEERS_AND_PAGES)


async def wait_for(read: Callable[[], Any], value: bytes) -> None:
    """Poll shared memory until it says so."""
    while await read() != value:
        await anyio.lowlevel.checkpoint()


async def attached(w: Any, exported: Any) -> Any:
    importer = await w.open()
    return importer.attach(await importer.get(exported.segid))


async def test_p2p_simple_signal(world: World) -> None:
    """One raises a flag, the other sees it and raises another."""
    async with world() as w:
        exported = await w.exporter(pages=1)
        attachment = await attached(w, exported)

        async def peer() -> None:
            await wait_for(lambda: attachment.read(0, 1), b"1")
            await attachment.write(1, b"2")

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(peer)
                await exported.store(0, b"1")
                await wait_for(lambda: exported.load(1, 1), b"2")


async def test_p2p_multi_signal(world: World) -> None:
    """The same many times over, in turns."""
    async with world() as w:
        exported = await w.exporter(pages=1)
        attachment = await attached(w, exported)

        async def peer() -> None:
            for turn in range(0, 20, 2):
                await wait_for(lambda: attachment.read(0, 1), bytes([turn + 1]))
                await attachment.write(0, bytes([turn + 2]))

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(peer)
                for turn in range(0, 20, 2):
                    await exported.store(0, bytes([turn + 1]))
                    await wait_for(lambda: exported.load(0, 1), bytes([turn + 2]))


async def test_p2p_multi_chained(world: World) -> None:
    """A signal goes through a chain of peers, each of which exports to the next."""
    async with world() as w:
        chain = [await w.exporter(pages=1) for _ in range(4)]
        links = [
            one.group.attach(await one.group.get(other.segid)) for one, other in pairwise(chain)
        ]

        async def pass_on(own: Any, link: Any) -> None:
            await wait_for(lambda: own.load(0, 1), b"!")
            await link.write(0, b"!")

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for own, link in zip(chain, links, strict=False):
                    tasks.start_soon(pass_on, own, link)
                await chain[0].store(0, b"!")
                await wait_for(lambda: chain[-1].load(0, 1), b"!")


async def fill(exported: Any, pages: int) -> None:
    for page in range(pages):
        await exported.mm.write(exported.address + page * PAGE, (page + 1).to_bytes(4, "little"))


def numbers(data: bytes | bytearray) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), PAGE)]


@many
@pytest.mark.parametrize("faulted", ["", "no_fault", "no_child_fault", "no_parent_fault"])
async def test_simple_one_to_many(world: World, peers: int, pages: int, faulted: str) -> None:
    """Many peers read one segment, whoever has touched the pages before, or nobody."""
    async with world() as w:
        exported = await w.exporter(pages=pages)
        if faulted in ("", "no_child_fault"):
            await fill(exported, pages)
        attachments = [await attached(w, exported) for _ in range(peers)]
        if faulted in ("", "no_parent_fault"):
            for attachment in attachments:
                await attachment.read(0, PAGE)
        async with exported.group.recalling(exported.address, exported.address + pages * PAGE):
            await fill(exported, pages)
        for attachment in attachments:
            assert numbers(await attachment.read()) == list(range(1, pages + 1))


@many
async def test_simple_one_to_many_no_parent_fault_write(
    world: World, peers: int, pages: int
) -> None:
    """Peers write to pages that nobody has ever touched."""
    async with world() as w:
        exported = await w.exporter(pages=pages)
        attachments = [await attached(w, exported) for _ in range(peers)]
        for index, attachment in enumerate(attachments):
            for page in range(index, pages, 7):
                await attachment.write(page * PAGE + index, bytes([index + 1]))
        for index in range(peers):
            for page in range(index, pages, 7):
                assert await exported.load(page * PAGE + index, 1) == bytes([index + 1])


@many
async def test_simple_one_to_many_sparse(world: World, peers: int, pages: int) -> None:
    """Every third page."""
    async with world() as w:
        exported = await w.exporter(pages=pages)
        await fill(exported, pages)
        for _ in range(peers):
            attachment = await attached(w, exported)
            for page in range(0, pages, 3):
                assert numbers(await attachment.read(page * PAGE, PAGE)) == [page + 1]


@many
async def test_simple_one_to_many_memcpy(world: World, peers: int, pages: int) -> None:
    """Each peer copies the whole segment in one go, and copies something else back over it."""
    async with world() as w:
        exported = await w.exporter(pages=pages)
        await fill(exported, pages)
        expected = list(range(1, pages + 1))
        for peer in range(peers):
            attachment = await attached(w, exported)
            memory = bytearray(attachment.size)
            await attachment.read_into(memory)
            assert numbers(memory) == expected
            expected = [number + peer + 1 for number in expected]
            for page, number in enumerate(expected):
                memory[page * PAGE : page * PAGE + 4] = number.to_bytes(4, "little")
            await attachment.write(0, bytes(memory))
            await attachment.detach()
        assert numbers(await exported.load(0, pages * PAGE)) == expected


@many
async def test_parallel_many_to_one(world: World, peers: int, pages: int) -> None:
    """One reads the segments of many at the same time."""
    async with world(frames=1 << 14 if peers * pages < 1 << 13 else 2 * peers * pages) as w:
        exporters = [await w.exporter(pages=pages) for _ in range(peers)]
        reader = await w.open()
        results: dict[int, list[int]] = {}

        async def read(index: int, exported: Any) -> None:
            await fill(exported, pages)
            attachment = reader.attach(await reader.get(exported.segid))
            results[index] = numbers(await attachment.read())

        async with anyio.create_task_group() as tasks:
            for index, exported in enumerate(exporters):
                tasks.start_soon(read, index, exported)
        assert results == {index: list(range(1, pages + 1)) for index in range(peers)}


@many
@pytest.mark.parametrize("order", ["same", "reverse", "random_seq"])
async def test_parallel_multi(world: World, peers: int, pages: int, order: str) -> None:
    """Everybody attaches everybody's segment and adds to its own slot of each page."""
    pages = min(pages, 200)
    async with world() as w:
        everybody = [await w.exporter(pages=pages) for _ in range(peers)]

        async def work(me: int) -> None:
            others = list(enumerate(everybody))
            if order == "reverse":
                others.reverse()
            elif order == "random_seq":
                random.Random(me).shuffle(others)
            group = everybody[me].group
            for _, other in others:
                attachment = group.attach(await group.get(other.segid))
                for page in range(0, pages, max(1, pages // 3)):
                    at = page * PAGE + 8 * me
                    value = int.from_bytes(await attachment.read(at, 8), "little")
                    await attachment.write(at, (value + 1).to_bytes(8, "little"))
                await attachment.detach()

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                for me in range(peers):
                    tasks.start_soon(work, me)
        for exported in everybody:
            for me in range(peers):
                assert await exported.load(8 * me, 8) == (1).to_bytes(8, "little")


@many
async def test_sequential_multi(world: World, peers: int, pages: int) -> None:
    """One after the other passes the same segment on, each having added one."""
    pages = min(pages, 200)
    async with world() as w:
        exported = await w.exporter(pages=pages)
        for turn in range(peers):
            attachment = await attached(w, exported)
            data = await attachment.read(0, PAGE)
            assert data[0] == turn
            await attachment.write(0, bytes([turn + 1]) * PAGE)
        assert await exported.load(PAGE - 1, 1) == bytes([peers])


@many
async def test_fork_of_the_exporter(world: World, peers: int, pages: int) -> None:
    """Both sides write after a fork; importers stay with the one that has exported."""
    pages = min(pages, 200)
    async with world() as w:
        exported = await w.exporter(pages=pages)
        attachments = [await attached(w, exported) for _ in range(peers)]
        await fill(exported, pages)
        for attachment in attachments:
            await attachment.read()
        child = await exported.mm.fork()
        for page in range(pages):
            await child.write(exported.address + page * PAGE, b"child")
        for peer, attachment in enumerate(attachments):
            await attachment.write(8 * (peer + 1), b"peer")
        for peer, attachment in enumerate(attachments):
            assert await exported.load(8 * (peer + 1), 4) == b"peer"
            assert numbers(await attachment.read()) == list(range(1, pages + 1))
        assert await child.read(exported.address, 8) == b"child\0\0\0"
        await child.exit()


async def test_p2p_fault_vma_holes(world: World) -> None:
    """The parts that are mapped can be read; a hole between them is a SIGBUS (the death)."""
    async with world() as w:
        exported = await w.exporter(pages=64)
        await fill(exported, 64)
        await exported.mm.munmap(exported.address + 10 * PAGE, PAGE)
        await exported.mm.munmap(exported.address + 40 * PAGE, 8 * PAGE)
        attachment = await attached(w, exported)
        for first, last in ((0, 10), (11, 40), (48, 64)):
            data = await attachment.read(first * PAGE, (last - first) * PAGE)
            assert numbers(data) == list(range(first + 1, last + 1))
        for hole in (10, 40, 47):
            with pytest.raises(BadAddress) as fault:
                await attachment.read(hole * PAGE, 1)
            assert fault.value.signal == "BUS"
