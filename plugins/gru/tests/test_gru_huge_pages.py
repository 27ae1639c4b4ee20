"""Huge pages: dropped in whole where they may be, in parts where they must."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import mmunotify as mn
from mmunotify import PAGE_SIZE, PMD_SIZE
from mmunotify.errors import MmError
from mmunotify.model import Machine
from mmunotify_gru import Gru, GruChecker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mmunotify_gru import Context

    Test = Callable[[Any, int, Gru, Context, GruChecker], Awaitable[None]]


async def with_huge_pages(test: Test, miss: str = "interrupt") -> None:
    """Four megabytes of two huge pages, and a context."""
    gru = Gru()
    async with Machine(frames=1 << 13, swap=1 << 12, thp="always", contents=True) as machine:
        mm = machine.new_mm()
        heap = (await mm.mmap(4 * PMD_SIZE) + PMD_SIZE) & -PMD_SIZE
        for huge in (heap, heap + PMD_SIZE):
            await mm.write(huge, b"first")
            await mm.write(huge + PMD_SIZE - 4, b"last")
        with GruChecker(gru) as checker:
            checker.watch(mm.notifiers)
            async with gru.open(mm.notifiers, chiplet=0, dseg=8192, miss=miss) as context:
                await test(mm, heap, gru, context, checker)
                checker.check()


class Dawdler(mn.SleepableDriver):
    """Keeps sections open for a while."""

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await checkpoint()

    async def invalidate_range_end(self, rng: mn.Range) -> None:
        await checkpoint()


def sizes(gru: Gru) -> list[int]:
    return sorted(entry.size for _, entry in gru.chiplets[0].tlb)


@pytest.mark.parametrize("miss", ["interrupt", "poll"])
async def test_one_entry_maps_a_huge_page(miss: str) -> None:
    """Once the chiplet knows that there are such; both ends are reached through it."""

    async def test(mm: Any, heap: int, gru: Gru, context: Context, checker: GruChecker) -> None:
        await context.bcopy(heap + PMD_SIZE - 4, heap + PMD_SIZE + 100, 4)
        assert sizes(gru) == [PMD_SIZE, PMD_SIZE]
        assert await mm.read(heap + PMD_SIZE + 100, 4) == b"last"
        driver = gru.drivers[0]
        assert (driver.installed, driver.statistics.tlb_dropin) == (1024, 2)
        # A context that is loaded again still knows.
        context.unload()
        context.flush_tlb(heap, heap + 2 * PMD_SIZE)
        await context.vload(heap, elements=1)
        assert sizes(gru) == [PMD_SIZE] * 3
        assert driver.refaults == 512

    await with_huge_pages(test, miss)


@pytest.mark.parametrize("offset", [0, 5 * PAGE_SIZE, PMD_SIZE - PAGE_SIZE])
async def test_a_small_range_takes_the_huge_entry(offset: int) -> None:
    """The rest of the page is had again as what the primary has made of it."""

    async def test(mm: Any, heap: int, gru: Gru, context: Context, checker: GruChecker) -> None:
        await context.vset(heap + PMD_SIZE - 64, 7, elements=1)
        assert sizes(gru) == [PMD_SIZE]
        page = mn.Range(heap + offset, heap + offset + PAGE_SIZE)
        await mm.notifiers.invalidate(page)
        assert sizes(gru) == []
        assert gru.drivers[0].mapped == 1
        await context.vset(heap + PMD_SIZE - 64, 7, elements=1)
        await mm.munmap(page.start, PAGE_SIZE)
        assert sizes(gru) == []
        await context.vload(heap + PAGE_SIZE, elements=1)
        assert sizes(gru) == [PAGE_SIZE]

    await with_huge_pages(test)


async def test_part_of_a_huge_page_while_another_part_is_covered() -> None:
    """The page of the miss alone: it is not covered, the whole is."""

    async def test(mm: Any, heap: int, gru: Gru, context: Context, checker: GruChecker) -> None:
        await context.vload(heap + PMD_SIZE, elements=1)
        section = mn.Range(heap + 9 * PAGE_SIZE, heap + 10 * PAGE_SIZE)
        async with mm.notifiers.invalidating(section):
            await context.vload(heap, elements=1)
            checker.check()
            assert sizes(gru) == [PAGE_SIZE, PMD_SIZE]
            # And what is covered waits.
            with anyio.move_on_after(0.01) as waited:
                await context.vload(heap + 9 * PAGE_SIZE, elements=1)
            assert waited.cancelled_caught
        await context.vload(heap + 9 * PAGE_SIZE, elements=1)
        assert sizes(gru) == [PAGE_SIZE, PMD_SIZE, PMD_SIZE]

    await with_huge_pages(test)


@pytest.mark.parametrize("seed", range(4))
async def test_a_storm_over_huge_pages(seed: int) -> None:
    """Collapsed, split, copied and swapped while a context stores and loads across their border."""
    dice = random.Random(seed)
    gru = Gru(tlb=8)
    async with Machine(frames=1 << 13, swap=1 << 12, thp="always", contents=True) as machine:
        mm = machine.new_mm()
        heap = (await mm.mmap(4 * PMD_SIZE) + PMD_SIZE) & -PMD_SIZE
        base, size = heap + PMD_SIZE - 3 * PAGE_SIZE, 6 * PAGE_SIZE
        expected = bytearray(dice.randbytes(size))
        await mm.write(base, bytes(expected))
        with GruChecker(gru) as checker:
            checker.watch(mm.notifiers)
            async with (
                mm.attached(Dawdler()),
                gru.open(mm.notifiers, miss=("interrupt", "poll")[seed % 2]) as context,
                anyio.create_task_group() as tg,
            ):

                async def storm() -> None:
                    while True:
                        match dice.randrange(5):
                            case 0:
                                with suppress(MmError):  # somebody else has the page just now
                                    await mm.madvise(heap, 2 * PMD_SIZE, "collapse")
                            case 1:
                                child = await mm.fork()
                                await checkpoint()
                                await child.exit()
                            case 2:
                                await mm.madvise(base, 2 * PAGE_SIZE, "pageout")
                            case 3:
                                unused = heap + PMD_SIZE + 64 * PAGE_SIZE
                                await mm.madvise(unused, PAGE_SIZE, "dontneed")
                            case 4:
                                context.unload()
                        await checkpoint()

                tg.start_soon(storm)
                for number in range(60):
                    await checkpoint()
                    at = 8 * dice.randrange(size // 8)
                    word = number.to_bytes(8, "little")
                    await context.vset(base + at, number, elements=1)
                    expected[at : at + 8] = word
                    await context.vload(base, elements=size // 512, stride=64)
                    loaded = await context.get(0, size // 64)
                    wanted = (expected[at : at + 8] for at in range(0, size, 512))
                    assert loaded == b"".join(wanted)
                tg.cancel_scope.cancel()
            assert await mm.read(base, size) == expected
