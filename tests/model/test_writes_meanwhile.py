"""The process writes while a section ends that somebody else has opened: nothing of it is lost."""

from __future__ import annotations

import anyio
import pytest

import mmunotify as mn
from mmunotify.model import AddressSpace, Machine

PAGE = mn.PAGE_SIZE


class Meanwhile(mn.SleepableDriver):
    """Lets somebody write while the `number`-th section after `begin` ends."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._begun = False
        self.now = anyio.Event()
        self.written = anyio.Event()

    def begin(self) -> None:
        self._begun = True

    async def invalidate_range_end(self, rng: mn.Range) -> None:
        self._left -= self._begun
        if self._begun and self._left == 0:
            self.now.set()
            await self.written.wait()

    async def writes(self, mm: AddressSpace[mn.RwSems], address: int, data: bytes) -> None:
        await self.now.wait()
        self._begun = False
        await mm.write(address, data)
        self.written.set()


@pytest.mark.parametrize("section", [1, 2, 3])
@pytest.mark.parametrize("which", [0, 1])
async def test_ksm_merges_no_page_that_was_written_meanwhile(section: int, which: int) -> None:
    """Two equal pages: the write is in its page, and in no other."""
    async with Machine(frames=1 << 10, contents=True) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(2 * PAGE)
        await mm.write(heap, b"equal".ljust(PAGE, b".") * 2)
        await mm.madvise(heap, 2 * PAGE, "mergeable")
        await machine.ksm_scan()
        driver = Meanwhile(section)
        async with mm.attached(driver), anyio.create_task_group() as tg:
            tg.start_soon(driver.writes, mm, heap + which * PAGE, b"other")
            driver.begin()
            await machine.ksm_scan()
            driver.now.set()
        for page in (0, 1):
            expected = b"other" if page == which else b"equal"
            assert await mm.read(heap + page * PAGE, 6) == expected + b"."


@pytest.mark.parametrize("section", [1, 2])
async def test_collapse_loses_no_write(section: int) -> None:
    """The huge page is there before anybody can fault on what was there before it."""
    async with Machine(frames=1 << 12, contents=True) as machine:
        mm = machine.new_mm()
        heap = (await mm.mmap(2 * mn.PMD_SIZE) + mn.PMD_SIZE - 1) & -mn.PMD_SIZE
        await mm.touch(heap, mn.PMD_SIZE, write=True)
        await mm.write(heap, b"before")
        driver = Meanwhile(section)
        async with mm.attached(driver), anyio.create_task_group() as tg:
            tg.start_soon(driver.writes, mm, heap + PAGE, b"meanwhile")
            driver.begin()
            await mm.madvise(heap, mn.PMD_SIZE, "collapse")
            driver.now.set()
        assert await mm.read(heap, 7) == b"before\0"
        assert await mm.read(heap + PAGE, 10) == b"meanwhile\0"
