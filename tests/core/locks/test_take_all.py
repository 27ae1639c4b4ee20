"""Taking every reverse-map lock of an address space: four ways, one promise each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from mmunotify.errors import (
    Interrupted,
    LockOrderViolation,
    ScheduleWhileAtomic,
    SpinlockHeld,
    TooManyVmas,
    WouldBlock,
)
from mmunotify.locks import (
    Flagged,
    LockModel,
    MmBarrier,
    RwSems,
    SortedArray,
    SpinLocks,
    StopMachine,
    TakeAll,
    lockdep,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mmunotify.locks import RmapLock

pytestmark = pytest.mark.usefixtures("both_forms")

MODELS = [SpinLocks, RwSems]
HOLDERS: list[Callable[[], TakeAll]] = [SortedArray, Flagged]
"""Those that hold the locks all the time."""
ALL: list[Callable[[], TakeAll]] = [*HOLDERS, lambda: StopMachine(lambda: 0), MmBarrier]
NAMES = ["SortedArray", "Flagged", "StopMachine", "MmBarrier"]


def reached_by_vmas(model: type[LockModel], vmas: int = 6) -> list[RmapLock]:
    """What VMAs reach in VMA order: two files and two anon_vmas, again and again."""
    files = [model.rmap_lock(f"i_mmap[{n}]") for n in range(2)]
    anons = [model.rmap_lock(f"anon_vma[{n}]") for n in range(2)]
    return [files[(n + 1) % 2] for n in range(vmas)] + [anons[(n + 1) % 2] for n in range(vmas)]


def held(locks: Iterable[RmapLock]) -> set[str]:
    return {lock.name for lock in locks if lock.locked}


def finish(taking: Callable[[], object]) -> None:
    """Run a coroutine function that must not suspend, without an event loop."""
    with pytest.raises(StopIteration):
        taking().send(None)  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", HOLDERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_lock_is_held_once_and_nothing_suspends(
    make: Callable[[], TakeAll], model: type[LockModel]
) -> None:
    locks = reached_by_vmas(model)

    async def register() -> None:
        async with make().taking(locks):
            assert held(locks) == {lock.name for lock in locks}
            assert not any(lock.down_read_trylock() for lock in locks), "held for writing"

    finish(register)
    assert held(locks) == set()
    finish(register)


@pytest.mark.parametrize("make", ALL, ids=NAMES)
@pytest.mark.parametrize("model", MODELS)
async def test_an_exception_inside_leaves_nothing_held(
    make: Callable[[], TakeAll], model: type[LockModel]
) -> None:
    locks = reached_by_vmas(model)
    take_all = make()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            async with take_all.taking(locks):
                raise ZeroDivisionError
        assert held(locks) == set()


@pytest.mark.parametrize("make", ALL, ids=NAMES)
async def test_no_locks_at_all(make: Callable[[], TakeAll]) -> None:
    async with make().taking([]):
        pass
    async with make().taking(iter(())):
        pass


@pytest.mark.parametrize("make", [SortedArray, Flagged, MmBarrier])
async def test_it_waits_for_the_sections_that_are_open(make: Callable[[], TakeAll]) -> None:
    locks = reached_by_vmas(RwSems)
    order: list[str] = []

    async def register() -> None:
        async with make().taking(locks):
            order.append("registered")

    async with anyio.create_task_group() as tasks, locks[3].reading():
        tasks.start_soon(register)
        await anyio.wait_all_tasks_blocked()
        order.append("section over")
    assert order == ["section over", "registered"]
    assert held(locks) == set()


@pytest.mark.parametrize("make", [SortedArray, Flagged, MmBarrier])
async def test_cancelled_in_the_middle_nothing_is_held(make: Callable[[], TakeAll]) -> None:
    locks = reached_by_vmas(RwSems)
    last = locks[-1]
    take_all = make()
    entered = False

    async def register(scope: anyio.CancelScope) -> None:
        nonlocal entered
        with scope:
            async with take_all.taking(locks):
                entered = True

    async with anyio.create_task_group() as tasks, last.writing():
        scope = anyio.CancelScope()
        tasks.start_soon(register, scope)
        await anyio.wait_all_tasks_blocked()
        assert last.is_contended
        assert len(held(locks)) == 1 if make is MmBarrier else len(held(locks)) > 2
        scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert scope.cancelled_caught
        assert not entered
        assert held(locks) == {last.name}
        assert not last.is_contended
    async with take_all.taking(locks):
        pass
    assert held(locks) == set()


@pytest.mark.parametrize("make", ALL, ids=NAMES)
@pytest.mark.parametrize("model", MODELS)
async def test_a_pending_signal_is_eintr(
    make: Callable[[], TakeAll], model: type[LockModel]
) -> None:
    locks = reached_by_vmas(model)
    with pytest.raises(Interrupted):
        async with make().taking(locks, signal_pending=lambda: True):
            pytest.fail("interrupted, but entered")
    assert held(locks) == set()
    async with make().taking(locks, signal_pending=lambda: False):
        pass


@pytest.mark.parametrize("make", HOLDERS)
@pytest.mark.parametrize("model", MODELS)
async def test_a_signal_in_the_middle_releases_what_was_taken(
    make: Callable[[], TakeAll], model: type[LockModel]
) -> None:
    locks = reached_by_vmas(model)
    found: list[int] = []

    def signal_pending() -> bool:
        found.append(len(held(locks)))
        return len(found) == 3

    with pytest.raises(Interrupted, match="2 locks"):
        async with make().taking(locks, signal_pending=signal_pending):
            pytest.fail("interrupted, but entered")
    assert found == [0, 1, 2]
    assert held(locks) == set()


@pytest.mark.parametrize("make", [SortedArray, Flagged, MmBarrier])
async def test_a_spinlock_that_is_held_is_an_error_and_the_others_are_released(
    make: Callable[[], TakeAll],
) -> None:
    locks = reached_by_vmas(SpinLocks)
    with lockdep.checking(False):
        locks[-2] = SpinLocks.rmap_lock("anon_vma[held]")
    assert locks[-2].down_write_trylock()
    with pytest.raises(SpinlockHeld, match=r"anon_vma\[held\]"):
        async with make().taking(locks):
            pytest.fail("entered")
    assert held(locks) == {"anon_vma[held]"}


@pytest.mark.parametrize("make", [SortedArray, Flagged, MmBarrier])
async def test_long_lists_of_rwsems_yield(make: Callable[[], TakeAll]) -> None:
    with lockdep.checking(False):
        locks = [RwSems.rmap_lock("anon_vma") for _ in range(10_000)]
    take_all = make()
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with take_all.taking(locks):
            pytest.fail("10 000 locks without a checkpoint")
    assert scope.cancelled_caught
    assert held(locks) == set()


@pytest.mark.parametrize("make", HOLDERS)
def test_long_lists_of_spinlocks_do_not(make: Callable[[], TakeAll]) -> None:
    with lockdep.checking(False):
        locks = [SpinLocks.rmap_lock("anon_vma") for _ in range(10_000)]

    async def register() -> None:
        async with make().taking(locks):
            assert all(lock.locked for lock in locks)

    finish(register)


def test_which_of_them_keep_sections_out() -> None:
    assert [make().excludes for make in ALL] == [True, True, True, False]


# SortedArray ------------------------------------------------------------------------------------


async def test_sorted_array_takes_in_order_of_address_class_by_class() -> None:
    locks = reached_by_vmas(RwSems)
    order: list[str] = []

    def signal_pending() -> bool:
        order.extend(held(locks) - set(order))
        return False

    async with SortedArray().taking(locks, signal_pending=signal_pending):
        signal_pending()
    assert order == ["i_mmap[0]", "i_mmap[1]", "anon_vma[0]", "anon_vma[1]"]


async def test_sorted_array_has_a_cap() -> None:
    locks = reached_by_vmas(RwSems, vmas=6)
    async with SortedArray(max_vmas=6).taking(locks):
        pass
    with pytest.raises(TooManyVmas, match="6 VMAs have a lock of class i_mmap, expected at most 5"):
        async with SortedArray(max_vmas=5).taking(locks):
            pytest.fail("entered")
    assert held(locks) == set()


# Flagged ----------------------------------------------------------------------------------------


async def test_flagged_lets_one_task_at_a_time_take_many() -> None:
    """Two address spaces meet the locks that they share in opposite orders, and do not deadlock."""
    take_all = Flagged()
    one: list[RmapLock] = [RwSems.rmap_lock(f"anon_vma[{n}]") for n in range(3)]
    order: list[str] = []

    async def register(name: str, locks: list[RmapLock]) -> None:
        async with take_all.taking(locks):
            order.append(f"{name} in")
            await anyio.wait_all_tasks_blocked()
            order.append(f"{name} out")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(register, "one", [*one])
        tasks.start_soon(register, "two", one[::-1])
    assert [line.split()[1] for line in order] == ["in", "out", "in", "out"]
    assert order[0].split()[0] == order[1].split()[0]


async def test_flagged_leaves_no_mark() -> None:
    locks = reached_by_vmas(RwSems)
    async with Flagged().taking(locks):
        assert all(lock.taken_by is not None for lock in locks)
    assert all(lock.taken_by is None for lock in locks)


# StopMachine ------------------------------------------------------------------------------------


async def test_stop_machine_takes_no_lock() -> None:
    locks = reached_by_vmas(RwSems)
    async with StopMachine(lambda: 0).taking(locks):
        assert held(locks) == set()


async def test_stop_machine_is_refused_inside_sections() -> None:
    locks = reached_by_vmas(RwSems)
    with pytest.raises(WouldBlock, match="2 sections are open"):
        async with StopMachine(lambda: 2).taking(locks):
            pytest.fail("entered")
    async with locks[4].reading():
        with pytest.raises(WouldBlock, match=r"i_mmap\[1\] is held"):
            async with StopMachine(lambda: 0).taking(locks):
                pytest.fail("entered")


async def test_stop_machine_body_must_not_suspend() -> None:
    with lockdep.checking(), pytest.raises(ScheduleWhileAtomic, match="stop_machine"):
        async with StopMachine(lambda: 0).taking([]):
            await anyio.lowlevel.checkpoint()


# MmBarrier --------------------------------------------------------------------------------------


async def test_mm_barrier_passes_each_lock_once_and_keeps_none() -> None:
    locks = reached_by_vmas(RwSems)
    found: list[set[str]] = []

    def signal_pending() -> bool:
        found.append(held(locks))
        return False

    async with MmBarrier().taking(locks, signal_pending=signal_pending):
        assert held(locks) == set()
    assert found == [set()] * 4


# With lockdep -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", HOLDERS)
async def test_suspending_under_spinlocks_is_reported_and_all_are_released(
    make: Callable[[], TakeAll],
) -> None:
    with lockdep.checking():
        locks = reached_by_vmas(SpinLocks)
        with pytest.raises(ScheduleWhileAtomic):
            async with make().taking(locks):
                await anyio.lowlevel.checkpoint()
    assert held(locks) == set()
    assert lockdep.held() == ()


@pytest.mark.parametrize("make", HOLDERS)
async def test_classes_keep_their_order(make: Callable[[], TakeAll]) -> None:
    """The walk takes i_mmap before anon_vma, so code that nests them otherwise is found."""
    with lockdep.checking():
        locks = reached_by_vmas(RwSems)
        async with make().taking(locks):
            pass
        async with locks[-1].writing():
            with pytest.raises(LockOrderViolation, match="i_mmap"):
                await locks[0].down_write()
