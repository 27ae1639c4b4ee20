"""Drivers that opt in are awaited at the same time; the others in order, meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

import mmunotify as mn
from mmunotify.locks import lockdep
from recorders import Atomic, Concurrent, Deferred, Sleepable
from steps import settle

pytestmark = pytest.mark.usefixtures("both_forms", "lines")


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


class Meeting:
    """Who comes waits for the others: it takes place only if all come at the same time."""

    def __init__(self, size: int) -> None:
        self.missing = size
        self.full = anyio.Event()

    async def join(self) -> None:
        self.missing -= 1
        if not self.missing:
            self.full.set()
        await self.full.wait()


@pytest.mark.parametrize("callback", ["start", "end"])
async def test_they_are_told_at_the_same_time(callback: str) -> None:
    notifiers = mn.Notifiers()
    meeting = Meeting(3)
    drivers = [Concurrent(name, None, **{callback: meeting.join}) for name in "abc"]
    for driver in drivers:
        await notifiers.register(driver)

    async def section() -> None:
        async with notifiers.invalidating(page()):
            assert all(driver.open == 1 for driver in drivers)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(section)
        await settle()
        met = meeting.full.is_set()
        meeting.full.set()
    assert met
    assert [driver.told for driver in drivers] == [[f"{n} start", f"{n} end"] for n in "abc"]


@pytest.mark.parametrize("form", ["invalidate", "invalidate_page", "sync"])
async def test_so_they_are_by_the_forms_that_do_all_at_once(form: str) -> None:
    class Deferring(Deferred):
        concurrent = True

    notifiers = mn.Notifiers()
    meeting = Meeting(2)
    for name in "ab":
        if form == "sync":
            await notifiers.register(Deferring(name, sync=meeting.join))
        else:
            await notifiers.register(Concurrent(name, start=meeting.join))
    async with anyio.create_task_group() as tasks:
        if form == "invalidate_page":
            tasks.start_soon(notifiers.invalidate_page, 0x1000)
        else:
            tasks.start_soon(notifiers.invalidate, page())
        await settle()
        met = meeting.full.is_set()
        meeting.full.set()
    assert met


async def test_the_sync_of_a_section_too() -> None:
    class Deferring(Deferred):
        concurrent = True

    notifiers = mn.Notifiers(mn.SpinLocks)
    meeting = Meeting(2)
    for name in "ab":
        await notifiers.register(Deferring(name, sync=meeting.join))
    async with anyio.create_task_group() as tasks:
        with notifiers.invalidating_atomic(page()) as section:
            pass
        tasks.start_soon(section.sync)
        await settle()
        met = meeting.full.is_set()
        meeting.full.set()
    assert met


async def test_the_others_are_told_in_order_meanwhile() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    await notifiers.register(Concurrent("c1", told, start=gate.wait))
    await notifiers.register(Sleepable("s", told))
    await notifiers.register(Atomic("a", told))
    await notifiers.register(Deferred("d", told))
    await notifiers.register(Concurrent("c2", told, start=gate.wait))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page())
        await settle()
        early = list(told)
        gate.set()
    assert [one for one in early if one[0] != "c"] == ["d mark", "a start", "s start"]
    assert {"c1 start", "c2 start"} < set(early)


async def test_one_alone_gains_nothing_and_is_awaited_in_order() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Sleepable("s", told))
    await notifiers.register(Concurrent("c", told))
    async with notifiers.invalidating(page()):
        pass
    assert told == ["c start", "s start", "c end", "s end"]


async def test_a_plain_driver_that_opts_in_is_still_plain() -> None:
    class Eager(Atomic):
        concurrent = True

    notifiers = mn.Notifiers(mn.SpinLocks)
    told: list[str] = []
    for name in "ab":
        await notifiers.register(Eager(name, told))
    with notifiers.invalidating_atomic(page()):
        pass
    assert told == ["b start", "a start", "b end", "a end"]


async def test_a_cancelled_start_ends_those_that_had_succeeded() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    await notifiers.register(Concurrent("slow", told, start=gate.wait))
    await notifiers.register(Concurrent("quick", told))
    await notifiers.register(Sleepable("s", told))
    await notifiers.register(Deferred("d", told))
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(notifiers.invalidating(page()).__aenter__)
            await settle()
            scope.cancel()
    assert scope.cancelled_caught
    assert sorted(told[4:]) == ["d sync", "quick end", "s end"]
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=4, quarantined=0, open_sections=0, srcu_readers=0
    )


async def test_a_native_cancellation_interrupts_none_of_the_ends(anyio_backend: Any) -> None:
    """It hits who waits for them: they go on, the section ends, then it is raised."""
    if anyio_backend[0] != "asyncio":
        pytest.skip("native cancellation of a task is asyncio's")
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    finished: list[str] = []

    async def end() -> None:
        await gate.wait()
        finished.append("end")

    subs = [await notifiers.register(Concurrent(name, told, end=end)) for name in "ab"]

    async def section() -> None:
        async with notifiers.invalidating(page()):
            pass

    task = asyncio.create_task(section())
    await settle()
    task.cancel()
    await settle()
    assert not task.done()
    gate.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert finished == ["end", "end"]
    assert [sub.failure for sub in subs] == [None, None]
    assert notifiers.statistics().open_sections == 0


@pytest.mark.parametrize("checked", [False, True])
async def test_a_trace_sees_the_section_around_its_callbacks(checked: bool) -> None:
    with lockdep.checking(checked):
        notifiers = mn.Notifiers()
    gates = [anyio.Event(), anyio.Event()]
    for name, gate in zip("ab", gates, strict=True):
        await notifiers.register(Concurrent(name, start=gate.wait, end=gate.wait))
    ring = mn.Ring()
    notifiers.trace = ring.append
    async with anyio.create_task_group() as tasks:

        async def section() -> None:
            async with notifiers.invalidating(page()):
                pass

        tasks.start_soon(section)
        await settle()
        for gate in gates:
            gate.set()
    records = list(ring)
    first, *callbacks, last = records
    assert (first.event, first.phase) == ("invalidate_range", "start")
    assert (last.event, last.phase) == ("invalidate_range", "end")
    assert len(callbacks) == 8
    assert {record.parent_id for record in callbacks} == {first.span_id}
    assert all(record.event == "callback" for record in callbacks)
