"""I-PROG: how long a storm of invalidations can delay a fault (the bound is in `faults.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint

import mmunotify as mn
from dict_mm import DictMm
from mmunotify_gru import Gru, GruDriver

if TYPE_CHECKING:
    from mmunotify_gru import Context

BASE = 0x10000
PAGE = mn.Range(BASE, BASE + 0x1000, mn.Event.PROTECTION_VMA)
ELSEWHERE = mn.Range(1 << 30, (1 << 30) + 0x1000)


async def overlapping(mm: DictMm, rng: mn.Range, sections: int) -> int:
    """Two tasks' worth of sections, of which one is open at any time; how many there were."""
    done = 0
    old = mm.notifiers.invalidating(rng)
    await old.__aenter__()
    try:
        while done < sections:
            await checkpoint()
            new = mm.notifiers.invalidating(mn.Range(rng.start, rng.end))
            await new.__aenter__()
            await old.__aexit__(None, None, None)
            old = new
            done += 1
    finally:
        await old.__aexit__(None, None, None)
    return done


async def load_under(mm: DictMm, gru: Gru, rng: mn.Range, sections: int) -> bool:
    """Whether a load was done before a storm of that many sections was over."""
    first = False
    async with gru.open(mm.notifiers) as context, anyio.create_task_group() as tg:
        await context.nop()
        storming = True

        async def load() -> None:
            nonlocal first
            await context.vload(BASE, elements=1)
            first = storming

        async def storm() -> None:
            nonlocal storming
            await overlapping(mm, rng, sections)
            storming = False

        tg.start_soon(storm)
        await checkpoint()
        await checkpoint()
        tg.start_soon(load)
    return first


class OriginalGru(Gru):
    """Counts open sections instead of looking at them (ms_range_active)."""

    def make_driver(self) -> GruDriver:
        class Original(GruDriver):
            def covered(self, address: int, size: int) -> bool:
                return bool(self.sections)

        return Original(gru=self)


@pytest.mark.parametrize(("gru_type", "progress"), [(Gru, True), (OriginalGru, False)])
@pytest.mark.parametrize("present", [True, False])
async def test_a_storm_elsewhere_delays_nobody(
    gru_type: type[Gru], progress: bool, present: bool
) -> None:
    """Not even if a section is open at any time; the original waits to the end of the storm."""
    async with DictMm() as mm:
        await mm.map(BASE, BASE + 0x1000)
        if present:
            await mm.store(BASE, b"present")
        gru = gru_type()
        assert await load_under(mm, gru, ELSEWHERE, 200) is progress
        if progress:
            assert gru.statistics.call_os_wait_queue == 0
            assert gru.statistics.tlb_dropin_fail_range_active == 0


@pytest.mark.parametrize("storm", [5, 10, 50])
async def test_each_covering_section_delays_at_most_once(storm: int) -> None:
    """While one is always open there must be no translation; the fault waits once for each."""
    async with DictMm() as mm:
        await mm.map(BASE, BASE + 0x1000)
        await mm.store(BASE, b"present")
        gru = Gru()
        await load_under(mm, gru, PAGE, storm)
        assert 1 <= gru.statistics.call_os_wait_queue <= storm
        assert gru.statistics.tlb_dropin_fail_range_active <= storm + 1


async def test_who_waits_is_not_woken_by_others() -> None:
    """Sections elsewhere end by the hundred while one covers the page."""
    async with DictMm() as mm:
        await mm.map(BASE, BASE + 0x1000)
        gru = Gru()
        async with gru.open(mm.notifiers) as context, anyio.create_task_group() as tg:
            await context.nop()
            told = mm.notifiers.invalidate_range_start_atomic(PAGE)
            tg.start_soon(load_into, context)
            await anyio.wait_all_tasks_blocked()
            for _ in range(200):
                await mm.notifiers.invalidate(ELSEWHERE)
                await checkpoint()
            mm.notifiers.invalidate_range_end_atomic(PAGE, told)
        assert gru.statistics.call_os_wait_queue == 1


@pytest.mark.parametrize("miss", ["interrupt", "poll"])
async def test_a_block_that_waits_is_not_in_the_way_of_others(miss: str) -> None:
    """One block of a context waits for a section, another faults a page in meanwhile."""
    async with DictMm() as mm:
        await mm.map(BASE, BASE + 0x3000)
        gru = Gru()
        async with gru.open(mm.notifiers, miss=miss) as context, anyio.create_task_group() as tg:
            await context.nop()
            told = mm.notifiers.invalidate_range_start_atomic(PAGE)
            tg.start_soon(load_into, context)
            await anyio.wait_all_tasks_blocked()
            await context.vset(BASE + 0x1000, 7, elements=1)
            # Not even a context that is taken away is.
            assert context.unload()
            await context.vset(BASE + 0x2000, 7, elements=1)
            mm.notifiers.invalidate_range_end_atomic(PAGE, told)
        assert gru.statistics.call_os_wait_queue == 1


async def test_the_first_gap_is_enough() -> None:
    """A gap in which nobody but the section's end runs: the element is done before it returns."""
    async with DictMm() as mm:
        await mm.map(BASE, BASE + 0x1000)
        await mm.store(BASE, b"contents")
        gru = Gru()
        async with gru.open(mm.notifiers) as context, anyio.create_task_group() as tg:
            await context.nop()
            told = mm.notifiers.invalidate_range_start_atomic(PAGE)
            tg.start_soon(load_into, context)
            await anyio.wait_all_tasks_blocked()
            assert gru.statistics.call_os_wait_queue == 1
            mm.notifiers.invalidate_range_end_atomic(PAGE, told)
            again = mn.Range(PAGE.start, PAGE.end)
            told = mm.notifiers.invalidate_range_start_atomic(again)
            assert await context.get(0, 8) == b"contents"
            await anyio.wait_all_tasks_blocked()
            assert gru.statistics.call_os_wait_queue == 1
            mm.notifiers.invalidate_range_end_atomic(again, told)


async def load_into(context: Context) -> None:
    await context.vload(BASE, elements=1)


async def test_a_page_that_is_taken_away_each_time_is_had_at_last() -> None:
    """Sections that take the page, with gaps: one fault for each that has come in between."""
    async with DictMm() as mm:
        await mm.map(BASE, BASE + 0x1000)
        await mm.store(BASE, b"contents")
        gru = Gru()
        async with gru.open(mm.notifiers) as context, anyio.create_task_group() as tg:

            async def storm() -> None:
                while True:
                    await mm.evict(BASE)
                    await checkpoint()

            tg.start_soon(storm)
            for _ in range(50):
                await checkpoint()
                await context.vload(BASE, elements=1)
                assert await context.get(0, 8) == b"contents"
            tg.cancel_scope.cancel()
        statistics = gru.statistics
        assert statistics.call_os <= 2 * 50
