"""userfaultfd's minor faults: the file has the page, and somebody decides when it is mapped."""

from __future__ import annotations

import errno
from collections import Counter
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mmunotify.errors import MmError
from mmunotify.model import Machine
from mmunotify.model.flags import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from mmunotify.model import AddressSpace

PAGE, PAGES = 4096, 8
RW = PROT_READ | PROT_WRITE


@pytest.fixture
async def machine() -> Any:
    async with Machine(frames=256, swap=256, contents=True) as machine:
        yield machine


async def two_views(machine: Machine[Any]) -> tuple[AddressSpace[Any], int, int]:
    """A file in memory, filled, mapped twice: where nobody watches, and where somebody will."""
    mm = machine.new_mm()
    file = machine.file(PAGES, fill=True)
    return (
        mm,
        await mm.mmap(PAGES * PAGE, RW, MAP_SHARED, file),
        await mm.mmap(PAGES * PAGE, RW, MAP_SHARED, file),
    )


async def test_each_page_waits_once_and_is_the_files(machine: Machine[Any]) -> None:
    mm, plain, watched = await two_views(machine)
    uffd = await mm.userfaultfd()
    await uffd.register(watched, PAGES * PAGE, mode="minor")
    send, receive = anyio.create_memory_object_stream[int](PAGES)
    uffd.on_event = lambda address, flags: send.send_nowait(address)
    asked: Counter[int] = Counter()

    async def supply() -> None:
        async for address in receive:
            page = (address - watched) // PAGE
            asked[page] += 1
            await mm.write(plain + page * PAGE, bytes([100 + page]))
            await uffd.continue_(address, PAGE)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supply)
        for page in range(PAGES):
            assert await mm.read(watched + page * PAGE, 2) == bytes([100 + page, page + 1])
            await mm.write(watched + page * PAGE + 1, b"\xff")
            assert await mm.read(plain + page * PAGE, 2) == bytes([100 + page, 255])
        send.close()
    receive.close()
    assert asked == dict.fromkeys(range(PAGES), 1)
    assert any("ui" in vma.mnemonics for vma in mm.vmas)


async def test_what_cannot_be_continued(machine: Machine[Any]) -> None:
    mm, plain, watched = await two_views(machine)
    uffd = await mm.userfaultfd()
    await uffd.register(watched, 4 * PAGE, mode="minor")
    await uffd.continue_(watched, 2 * PAGE)
    for address, error in ((watched, errno.EEXIST), (plain, errno.ENOENT)):
        with pytest.raises(MmError) as found:
            await uffd.continue_(address, PAGE)
        assert found.value.errno == error
    hole = await mm.mmap(PAGE, RW, MAP_SHARED, machine.file(1))
    await uffd.register(hole, PAGE, mode="minor")
    with pytest.raises(MmError, match="has no page") as found:
        await uffd.continue_(hole, PAGE)
    assert found.value.errno == errno.EFAULT
    assert await mm.read(hole, 1) == b"\0"  # missing from the file too: an ordinary fault


async def test_only_files_in_memory_have_minor_faults(machine: Machine[Any]) -> None:
    mm = machine.new_mm()
    uffd = await mm.userfaultfd()
    for address in (
        await mm.mmap(PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS),
        await mm.mmap(PAGE, RW, MAP_SHARED, machine.file(1, kind="ext4")),
    ):
        with pytest.raises(MmError) as found:
            await uffd.register(address, PAGE, mode="minor")
        assert found.value.errno == errno.EINVAL
    assert not any("ui" in vma.mnemonics for vma in mm.vmas)


async def test_a_fault_goes_on_when_nobody_watches_any_more(machine: Machine[Any]) -> None:
    mm, _, watched = await two_views(machine)
    uffd = await mm.userfaultfd()
    await uffd.register(watched, PAGES * PAGE, mode="minor")
    waits = anyio.Event()
    uffd.on_event = lambda address, flags: waits.set()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mm.write, watched, b"x")
        await waits.wait()
        await uffd.unregister(watched, PAGES * PAGE)
    assert await mm.read(watched, 1) == b"x"
    assert not any("ui" in vma.mnemonics for vma in mm.vmas)
