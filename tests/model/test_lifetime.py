"""mm_users and mm_count: whoever looks at an exiting process gets all of it or nothing."""

from __future__ import annotations

import anyio
import pytest

import mmunotify as mn
from mmunotify.errors import AddressSpaceExited
from mmunotify.model import AddressSpace, Machine

PAGE = mn.PAGE_SIZE


class Slow(mn.SleepableDriver):
    """Its release takes a few turns of the loop, and counts how often it ran."""

    releases = 0

    async def release(self) -> None:
        self.releases += 1
        for _ in range(3):
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("head_start", range(8))
async def test_tryget_never_meets_an_address_space_half_torn_down(head_start: int) -> None:
    """get_task_mm is safe as it is: who gets a reference finds the memory, however late it is."""
    async with Machine(frames=64, contents=True) as machine:
        mm = machine.new_mm("P")
        driver = Slow()
        await mm.register(driver)
        address = await mm.mmap(PAGE)
        await mm.write(address, b"alive")
        mm.grab()
        answers: list[bool] = []

        async def look() -> None:
            for _ in range(12):
                got = mm.tryget()
                answers.append(got)
                if got:
                    assert await mm.read(address, 5) == b"alive"
                    await anyio.lowlevel.checkpoint()
                    await mm.put()
                await anyio.lowlevel.checkpoint()

        async def leave() -> None:
            for _ in range(head_start):
                await anyio.lowlevel.checkpoint()
            await mm.exit()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            tasks.start_soon(leave)
        # Once it is gone it stays gone, and it went once.
        assert answers == sorted(answers, reverse=True)
        assert not mm.tryget()
        assert driver.releases == 1
        assert mm.count == 1
        mm.drop()
    assert machine.frames.used == 1


async def test_memory_goes_with_the_last_user_and_not_before() -> None:
    async with Machine(frames=64) as machine:
        mm = machine.new_mm("P")
        address = await mm.mmap(PAGE)
        await mm.access(address, True)
        assert mm.tryget()
        await mm.exit()
        assert mm in machine.mms
        await mm.access(address)
        await mm.put()
        assert mm not in machine.mms
        with pytest.raises(AddressSpaceExited):
            await mm.mmap(PAGE)


async def beating(mm: AddressSpace[mn.RwSems], size: int) -> int:
    """How often another task ran while `size` bytes were touched."""
    address = await mm.mmap(size)
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await anyio.lowlevel.checkpoint()
            beats += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(beat)
        await mm.touch(address, size, write=True)
        tasks.cancel_scope.cancel()
    await mm.munmap(address, size)
    return beats


async def test_a_heartbeat_keeps_its_beat_while_two_gibibytes_are_touched() -> None:
    """A checkpoint after 4 096 pages at the latest."""
    async with Machine(frames=1 << 20) as machine:
        mm = machine.new_mm("P")
        size = 2 << 30
        assert await beating(mm, size) > size // PAGE // 4096 * 9 // 10


async def test_a_deadline_around_a_large_munmap_is_honoured() -> None:
    """The section is not cut short; what was unmapped is released, then the deadline is raised."""
    async with Machine(frames=1 << 20) as machine:
        mm = machine.new_mm("P")
        address = await mm.mmap(2 << 30)
        await mm.touch(address, 2 << 30, write=True)
        used = machine.frames.used
        with anyio.CancelScope(deadline=0) as scope:
            await mm.munmap(address, 2 << 30)
        assert scope.cancelled_caught
        assert machine.frames.used in (1, used)
        assert not mm.vmas or machine.frames.used == used
