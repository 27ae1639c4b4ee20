"""Deferred drivers: mark under the locks, sync after them, pages held until it has returned."""

from __future__ import annotations

import anyio
import pytest

import mmunotify as mn
from recorders import Atomic, Deferred, Sleepable, Stop
from steps import run_now, settle

pytestmark = pytest.mark.usefixtures("both_forms", "lines")


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


@pytest.mark.parametrize("locks", [mn.SpinLocks, mn.RwSems])
async def test_marked_at_the_start_and_synced_after_the_end(locks: type[mn.LockModel]) -> None:
    notifiers = mn.Notifiers(locks)
    told: list[str] = []
    await notifiers.register(Deferred("d", told))
    await notifiers.register(Atomic("a", told))
    async with notifiers.invalidating(page()):
        told.append("the ptes change")
    assert told == ["a start", "d mark", "the ptes change", "a end", "d sync"]


async def test_the_sync_can_be_owed_until_the_locks_are_dropped() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Deferred("d", told))
    mmap_lock = mn.RWSemaphore("mmap_lock")
    async with mmap_lock.writing(), notifiers.invalidating(page(), sync=False) as section:
        pass
    assert told == ["d mark"]
    await section.sync()
    assert told == ["d mark", "d sync"]


async def test_a_section_under_a_spinlock_owes_its_sync_always() -> None:
    notifiers = mn.Notifiers(mn.SpinLocks)
    told: list[str] = []
    await notifiers.register(Deferred("d", told))
    with mn.SpinLock("page_table_lock"), notifiers.invalidating_atomic(page()) as section:
        pass
    assert told == ["d mark"]
    await section.sync()
    assert told == ["d mark", "d sync"]


async def test_the_sync_may_suspend_and_the_section_does_not_return_before_it() -> None:
    """I-FREE: the pages are released only when the sync has returned."""
    notifiers = mn.Notifiers(mn.SpinLocks)
    order: list[str] = []
    gate = anyio.Event()
    await notifiers.register(Deferred("d", sync=gate.wait))

    async def unmap() -> None:
        async with notifiers.invalidating(page()):
            pass
        order.append("pages are released")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(unmap)
        await settle()
        order.append("the device is done")
        gate.set()
    assert order == ["the device is done", "pages are released"]


async def test_the_sync_is_told_also_when_the_body_raises() -> None:
    notifiers = mn.Notifiers()
    driver = Deferred("d")
    await notifiers.register(driver)
    with pytest.raises(KeyError):
        async with notifiers.invalidating(page()):
            raise KeyError
    assert driver.told == ["d mark", "d sync"]


async def test_the_sync_is_told_also_when_an_end_is_interrupted() -> None:
    def interrupt() -> None:
        raise Stop

    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Deferred("d", told))
    await notifiers.register(Atomic("bad", told, end=interrupt))
    section = notifiers.invalidating(page())
    await section.__aenter__()
    with pytest.raises(Stop):
        await section.__aexit__(None, None, None)
    assert told[-1] == "d sync"


async def test_every_mark_has_its_sync_with_an_equal_range() -> None:
    class Ranges(mn.DeferredDriver):
        def __init__(self) -> None:
            self.seen: list[tuple[str, int, int]] = []

        def invalidate_range(self, rng: mn.Range) -> None:
            self.seen.append(("mark", rng.start, rng.end))

        async def invalidate_range_sync(self, rng: mn.Range) -> None:
            self.seen.append(("sync", rng.start, rng.end))

    notifiers = mn.Notifiers()
    driver = Ranges()
    await notifiers.register(driver)
    await notifiers.invalidate(mn.Range(0x1000, 0x4000))
    await notifiers.invalidate_page(0x5123)
    audience = notifiers.invalidate_atomic(mn.Range(0x8000, 0x9000))
    await notifiers.invalidate_range_sync(mn.Range(0x8000, 0x9000), audience)
    assert driver.seen == [
        *(("mark", 0x1000, 0x4000), ("sync", 0x1000, 0x4000)),
        *(("mark", 0x5000, 0x6000), ("sync", 0x5000, 0x6000)),
        *(("mark", 0x8000, 0x9000), ("sync", 0x8000, 0x9000)),
    ]


async def test_who_leaves_between_mark_and_sync_is_not_asked_to_sync() -> None:
    """Its release has dropped everything: there is nothing left to finish."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    sub = await notifiers.register(Deferred("gone", told))
    await notifiers.register(Deferred("there", told))
    async with notifiers.invalidating(page(), sync=False) as section:
        pass
    await notifiers.unregister(sub)
    told.clear()
    await section.sync()
    assert told == ["there sync"]


async def test_who_comes_between_mark_and_sync_is_not_asked_to_sync() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Deferred("old", told))
    async with notifiers.invalidating(page(), sync=False) as section:
        pass
    await notifiers.register(Deferred("new", told))
    told.clear()
    await section.sync()
    assert told == ["old sync"]


async def test_deferred_drivers_beside_sleepable_ones() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Deferred("d", told))
    await notifiers.register(Sleepable("s", told))
    async with notifiers.invalidating(page()):
        pass
    assert told == ["s start", "d mark", "s end", "d sync"]


async def test_a_driver_that_only_marks_needs_no_sync() -> None:
    class Marks(mn.DeferredDriver):
        marks = 0

        def invalidate_range(self, rng: mn.Range) -> None:
            self.marks += 1

    notifiers = mn.Notifiers()
    driver = Marks()
    await notifiers.register(driver)
    audience = notifiers.invalidate_atomic(page())
    assert not audience.sync_calls
    run_now(notifiers.invalidate(page()))
    assert driver.marks == 2


async def test_a_put_between_mark_and_sync() -> None:
    """Freed when the section is over; the sync that is still owed must not reach it."""
    notifiers = mn.Notifiers()
    sub = await notifiers.get(Deferred, lambda: Deferred("d"))
    async with notifiers.invalidating(page(), sync=False) as section:
        notifiers.put(sub)
    assert sub.driver.told == ["d mark", "d free"]
    await section.sync()
    assert sub.driver.told == ["d mark", "d free"]
