"""ASIDs: ascending runs, flushes between them, and generations."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmunotify as mn
from dict_mm import DictMm
from mmunotify_gru import Gru, GruChecker, GruDriver
from mmunotify_gru.asids import AsidAllocator
from mmunotify_gru.hardware.chiplet import Chiplet
from mmunotify_gru.statistics import Statistics

FIRST, LAST = 8, 8 + 8 * 20


def flushes(chiplet: Chiplet) -> int:
    return chiplet.tghs[0].invalidates


@given(steps=st.lists(st.sets(st.integers(1, 20).map(lambda n: 8 * n), max_size=16), max_size=60))
def test_nobody_gets_what_somebody_has(steps: list[set[int]]) -> None:
    """Whoever is loaded when; and nothing is given out twice without a flush in between."""
    loaded: set[int] = set()
    chiplet = Chiplet(0, 0, 8)
    allocator = AsidAllocator(chiplet, lambda: loaded, FIRST, LAST)
    statistics = Statistics()
    since_flush: set[int] = set()
    in_generation: set[int] = set()
    for some in steps:
        # Only what was given out can be loaded, and what is stays what it is.
        before, generation = flushes(chiplet), allocator.generation
        asid = allocator.assign(statistics)
        if flushes(chiplet) != before:
            since_flush.clear()
        if allocator.generation != generation:
            in_generation.clear()
        assert FIRST <= asid < LAST
        assert asid % 8 == 0
        assert asid not in loaded
        assert asid not in since_flush
        assert asid not in in_generation
        since_flush.add(asid)
        in_generation.add(asid)
        loaded.add(asid)
        loaded &= some
    assert statistics.asid_wrap == allocator.generation - 1


@pytest.mark.parametrize(("first", "last"), [(0, 400), (12, 400), (8, 8 + 8 * 16)])
def test_bounds_are_checked(first: int, last: int) -> None:
    """Too few for all contexts, 0, or in the way of the region bits."""
    with pytest.raises(ValueError, match="expected multiples of 8"):
        Gru(first_asid=first, last_asid=last)


async def asid_of(driver: GruDriver, gru: Gru) -> int:
    return driver.asids[gru.states[0]].asid


async def test_an_asid_is_kept_until_it_is_flushed() -> None:
    """Unloaded and loaded again, a context finds its translations; but not after a flush."""
    gru = Gru(blades=1)
    async with DictMm() as mm:
        await mm.map(0x10000, 0x20000)
        async with gru.open(mm.notifiers, chiplet=0) as context:
            await context.vload(0x10000, elements=1)
            driver = gru.drivers[0]
            first = await asid_of(driver, gru)
            context.unload()
            await context.vload(0x10000, elements=1)
            assert await asid_of(driver, gru) == first
            assert (driver.installed, driver.statistics.asid_reuse) == (1, 1)
            context.unload()
            await mm.unmap(0x18000, 0x19000)
            assert driver.statistics.flush_tlb_gru_zero_asid == 1
            with GruChecker(gru):
                await context.vload(0x10000, elements=1)
            assert await asid_of(driver, gru) != first
            assert driver.installed == 2
            assert (driver.refaults, driver.mapped) == (1, 0)


async def test_contexts_of_an_address_space_share_its_asid() -> None:
    """And so what is dropped in for one is there for the other."""
    gru = Gru()
    async with DictMm() as mm:
        await mm.map(0x10000, 0x20000)
        async with (
            gru.open(mm.notifiers, chiplet=0) as one,
            gru.open(mm.notifiers, chiplet=0) as two,
        ):
            await one.vload(0x10000, elements=1)
            await two.vload(0x10000, elements=1)
            driver = gru.drivers[0]
            assert driver.installed == 1
            tracker = driver.asids[gru.states[0]]
            assert tracker.contexts == 0b11
            one.unload()
            assert tracker.contexts == 0b10


async def test_wrapping_flushes_and_begins_a_generation() -> None:
    """Two address spaces take turns until all ASIDs are used up, many times over."""
    gru = Gru(first_asid=8, last_asid=8 + 8 * 17)
    async with DictMm(name="a") as one, DictMm(name="b") as two:
        mms: list[Any] = [one, two]
        for mm in mms:
            await mm.map(0x10000, 0x20000)
            await mm.store(0x10000, mm.notifiers.name.encode() * 8)
        async with (
            gru.open(one.notifiers, chiplet=0) as first,
            gru.open(two.notifiers, chiplet=0) as second,
        ):
            with GruChecker(gru) as checker:
                for turn in range(80):
                    context, mm = ((first, one), (second, two))[turn % 2]
                    await context.vload(0x10000, elements=1)
                    assert await context.get(0, 8) == mm.notifiers.name.encode() * 8
                    checker.check()
                    if turn % 3:
                        context.unload()
                        await mm.notifiers.invalidate(mn.Range(0x10000, 0x11000))
                        checker.check()
        assert gru.statistics.asid_wrap >= 2
        assert gru.statistics.asid_next >= gru.statistics.asid_wrap
