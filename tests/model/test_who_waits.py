"""Reclaim and copies under drivers that find out when they are told whether they have to wait."""

from __future__ import annotations

import pytest

import mmunotify as mn
from mmunotify.model import Machine

PAGE = mn.PAGE_SIZE


class Copies(mn.SleepableDriver):
    """Says to every `every`th question that it has to wait; knows which pages it was told of."""

    nonblock_first = True
    every = 0

    def __init__(self) -> None:
        self.asked = 0
        self.waited = 0
        self.told: list[int] = []

    def invalidate_range_start_nonblock(self, rng: mn.Range) -> bool:
        self.asked += 1
        if self.every and self.asked % self.every == 0:
            return False
        self.told.append(rng.start)
        return True

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        self.waited += 1
        self.told.append(rng.start)


class Always(Copies):
    every = 1


class Sometimes(Copies):
    every = 3


@pytest.mark.parametrize("kind", [Copies, Sometimes, Always])
async def test_every_page_is_told_and_goes(kind: type[Copies]) -> None:
    async with Machine(frames=256, swap=256) as machine:
        mm = machine.new_mm("P")
        base = await mm.mmap(16 * PAGE)
        await mm.touch(base, 16 * PAGE, write=True)
        driver = kind()
        await mm.register(driver)
        await mm.madvise(base, 16 * PAGE, "pageout")
        assert machine.swap.used == 16
        assert sorted(driver.told) == [base + n * PAGE for n in range(16)]
        assert driver.waited == (16 if kind is Always else 0)


@pytest.mark.parametrize("kind", [Copies, Sometimes, Always])
async def test_every_copy_is_told(kind: type[Copies]) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm = machine.new_mm("P")
        base = await mm.mmap(16 * PAGE)
        for n in range(16):
            await mm.access(base + n * PAGE, True, n)
        child = await mm.fork()
        driver = kind()
        await child.register(driver)
        for n in range(16):
            await child.access(base + n * PAGE, True, 100 + n)
        assert driver.told == [base + n * PAGE for n in range(16)]
        assert driver.waited == (16 if kind is Always else 0)
        found = [
            (await mm.access(base + n * PAGE), await child.access(base + n * PAGE))
            for n in range(16)
        ]
        assert found == [(n, 100 + n) for n in range(16)]
        await child.exit()
        assert machine.frames.used == 17
