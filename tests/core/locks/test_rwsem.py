"""The rwsem: who gets it, in which order, and what a cancellation leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mmunotify.errors import LockNotHeld
from mmunotify.locks import RWSemaphore, lockdep

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

pytestmark = pytest.mark.usefixtures("both_forms")


@pytest.fixture
def sem() -> RWSemaphore:
    return RWSemaphore("mmap_lock")


def run_without_a_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that must not suspend: with no event loop there is nothing to suspend to."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


class Crowd:
    """Tasks that take a semaphore one after another and hold it until they are told to let go."""

    def __init__(self, sem: RWSemaphore, tasks: TaskGroup) -> None:
        self.sem = sem
        self.tasks = tasks
        self.inside: set[str] = set()
        """Who holds it now."""
        self.scopes: dict[str, anyio.CancelScope] = {}
        self._gates: dict[str, anyio.Event] = {}

    async def arrive(self, *names: str) -> None:
        """Each name takes it: for reading if it begins with r, for writing if with w."""
        for name in names:
            self._gates[name] = anyio.Event()
            self.scopes[name] = anyio.CancelScope()
            self.tasks.start_soon(self._hold, name)
            await anyio.wait_all_tasks_blocked()

    async def leave(self, *names: str) -> None:
        for name in names:
            self._gates[name].set()
            await anyio.wait_all_tasks_blocked()

    async def give_up(self, name: str) -> None:
        self.scopes[name].cancel()
        await anyio.wait_all_tasks_blocked()

    async def _hold(self, name: str) -> None:
        guard = self.sem.reading() if name.startswith("r") else self.sem.writing()
        with self.scopes[name]:
            async with guard:
                self.inside.add(name)
                try:
                    await self._gates[name].wait()
                finally:
                    self.inside.remove(name)


async def test_readers_share_it(sem: RWSemaphore) -> None:
    async with sem.reading(), anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await crowd.arrive("r1", "r2")
        assert crowd.inside == {"r1", "r2"}
        assert sem.statistics().readers == 3
        await crowd.leave("r1", "r2")


async def test_a_writer_is_alone(sem: RWSemaphore) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        async with sem.writing():
            await crowd.arrive("r1", "w2")
            assert not crowd.inside
        await anyio.wait_all_tasks_blocked()
        assert crowd.inside == {"r1"}
        await crowd.leave("r1")
        assert crowd.inside == {"w2"}
        await crowd.leave("w2")
    assert not sem.locked


async def test_first_come_first_served(sem: RWSemaphore) -> None:
    """Each gets it in order of arrival, and readers in a row together."""
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await crowd.arrive("w1", "r2", "r3", "w4", "r5", "w6", "w7")
        for leaver, then in (
            ("w1", {"r2", "r3"}),
            ("r2", {"r3"}),
            ("r3", {"w4"}),
            ("w4", {"r5"}),
            ("r5", {"w6"}),
            ("w6", {"w7"}),
            ("w7", set[str]()),
        ):
            await crowd.leave(leaver)
            assert crowd.inside == then
    assert not sem.locked
    assert not sem.is_contended


async def test_readers_do_not_starve_a_writer(sem: RWSemaphore) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await crowd.arrive("r1", "w", "r2")
        assert crowd.inside == {"r1"}
        await crowd.leave("r1")
        assert crowd.inside == {"w"}
        await crowd.leave("w", "r2")


async def test_one_who_comes_back_at_once_queues_behind_those_who_wait(sem: RWSemaphore) -> None:
    order: list[str] = []

    async def greedy(name: str) -> None:
        for _ in range(3):
            async with sem.writing():
                order.append(name)
                await anyio.wait_all_tasks_blocked()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(greedy, "a")
        tasks.start_soon(greedy, "b")
    assert order in (["a", "b"] * 3, ["b", "a"] * 3)


async def test_a_release_wakes_those_who_get_it_and_nobody_else(sem: RWSemaphore) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await crowd.arrive("w1", "w2", "w3", "w4")
        await crowd.leave("w1")
        found = sem.statistics()
        assert (found.writer, found.waiting_writers) == (True, 2)
        await crowd.leave("w2", "w3", "w4")


def test_uncontended_it_needs_no_event_loop(sem: RWSemaphore) -> None:
    async def each() -> None:
        async with sem.reading():
            assert sem.statistics().readers == 1
        async with sem.writing():
            assert sem.statistics().writer
        await sem.down_read()
        sem.up_read()
        await sem.down_write()
        sem.downgrade_write()
        sem.up_read()

    run_without_a_loop(each())
    assert not sem.locked


def test_guards_are_shared(sem: RWSemaphore) -> None:
    assert sem.reading() is sem.reading()
    assert sem.writing() is sem.writing()


async def test_a_guard_is_an_ordinary_async_context_manager(sem: RWSemaphore) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(sem.reading())
        assert sem.statistics().readers == 1
    assert not sem.locked


def test_what_entering_returns_is_a_coroutine_that_is_done() -> None:
    with lockdep.checking(False):
        sem = RWSemaphore("mmap_lock")
    done = sem.reading().__aenter__()
    assert isinstance(done, Coroutine)
    with pytest.raises(StopIteration):
        done.send(None)
    with pytest.raises(ZeroDivisionError):
        done.throw(ZeroDivisionError())
    done.close()
    sem.up_read()


async def test_an_exception_inside_releases_it(sem: RWSemaphore) -> None:
    for guard in (sem.reading(), sem.writing()):
        with pytest.raises(ZeroDivisionError):
            async with guard:
                raise ZeroDivisionError
        assert not sem.locked


def test_trylock(sem: RWSemaphore) -> None:
    assert sem.down_write_trylock()
    assert not sem.down_write_trylock()
    assert not sem.down_read_trylock()
    sem.up_write()
    assert sem.down_read_trylock()
    assert sem.down_read_trylock()
    assert not sem.down_write_trylock()
    sem.up_read()
    sem.up_read()
    assert not sem.locked


async def test_trylock_does_not_overtake(sem: RWSemaphore) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await crowd.arrive("r1", "w")
        assert not sem.down_read_trylock()
        await crowd.leave("r1")
        assert not sem.down_read_trylock()
        await crowd.leave("w")
        assert sem.down_read_trylock()
        sem.up_read()


async def test_downgrade_lets_the_readers_at_the_head_in(sem: RWSemaphore) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        async with sem.writing():
            await crowd.arrive("r1", "r2", "w3", "r4")
            sem.downgrade_write()
            await anyio.wait_all_tasks_blocked()
            assert crowd.inside == {"r1", "r2"}
            assert sem.statistics().readers == 3
        await crowd.leave("r1", "r2")
        assert crowd.inside == {"w3"}
        await crowd.leave("w3", "r4")
    assert not sem.locked


async def test_downgrade_keeps_a_writer_out(sem: RWSemaphore) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await sem.down_write()
        await crowd.arrive("w")
        sem.downgrade_write()
        await anyio.wait_all_tasks_blocked()
        assert not crowd.inside
        sem.up_read()
        await anyio.wait_all_tasks_blocked()
        assert crowd.inside == {"w"}
        await crowd.leave("w")


async def test_contention_is_seen_by_the_holder(sem: RWSemaphore) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        async with sem.reading():
            assert (sem.is_contended, sem.needbreak) == (False, False)
            await crowd.arrive("w")
            assert (sem.is_contended, sem.needbreak) == (True, True)
        await anyio.wait_all_tasks_blocked()
        assert (sem.is_contended, sem.needbreak) == (False, False)
        await crowd.leave("w")


def test_releasing_what_nobody_holds(sem: RWSemaphore) -> None:
    with pytest.raises(LockNotHeld, match=r"up_read\(mmap_lock\): no reader"):
        sem.up_read()
    with pytest.raises(LockNotHeld, match=r"up_write\(mmap_lock\): no writer"):
        sem.up_write()
    with pytest.raises(LockNotHeld, match=r"downgrade_write\(mmap_lock\): no writer"):
        sem.downgrade_write()
    assert sem.down_write_trylock()
    with pytest.raises(LockNotHeld):
        sem.up_read()
    sem.up_write()
    assert sem.down_read_trylock()
    with pytest.raises(LockNotHeld):
        sem.up_write()
    with pytest.raises(LockNotHeld):
        sem.downgrade_write()
    sem.up_read()
    assert not sem.locked


async def test_statistics_and_repr(sem: RWSemaphore) -> None:
    assert repr(sem) == "<RWSemaphore 'mmap_lock'>"
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await crowd.arrive("r1", "r2", "w3", "r4", "r5", "w6")
        found = sem.statistics()
        assert (found.name, found.readers, found.writer) == ("mmap_lock", 2, False)
        assert (found.waiting_readers, found.waiting_writers) == (2, 2)
        assert repr(sem) == "<RWSemaphore 'mmap_lock' readers=2 contended>"
        await crowd.leave("r1", "r2")
        assert repr(sem) == "<RWSemaphore 'mmap_lock' writer contended>"
        await crowd.leave("w3", "r4", "r5", "w6")


# Cancellation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r", "w"])
async def test_cancelled_while_waiting_leaves_no_trace(sem: RWSemaphore, name: str) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        async with sem.writing():
            await crowd.arrive(name)
            await crowd.give_up(name)
            assert not sem.is_contended
        await anyio.wait_all_tasks_blocked()
        assert not crowd.inside
        assert not sem.locked


async def test_a_cancelled_writer_lets_the_readers_behind_it_in(sem: RWSemaphore) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await crowd.arrive("r1", "w2", "r3", "r4", "w5")
        await crowd.give_up("w2")
        assert crowd.inside == {"r1", "r3", "r4"}
        await crowd.leave("r1", "r3", "r4")
        assert crowd.inside == {"w5"}
        await crowd.leave("w5")


async def test_a_cancelled_reader_keeps_the_order_of_the_others(sem: RWSemaphore) -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await crowd.arrive("w1", "r2", "w3", "r4")
        await crowd.give_up("r2")
        assert sem.is_contended
        await crowd.leave("w1")
        assert crowd.inside == {"w3"}
        await crowd.leave("w3")
        assert crowd.inside == {"r4"}
        await crowd.leave("r4")


async def test_release_and_cancel_in_one_step(sem: RWSemaphore) -> None:
    """Whichever of the two wins, the lock ends with somebody who wants it, or with nobody."""
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(sem, tasks)
        await sem.down_write()
        await crowd.arrive("w1", "w2")
        sem.up_write()
        crowd.scopes["w1"].cancel()
        await anyio.wait_all_tasks_blocked()
        assert crowd.inside == {"w2"}
        await crowd.leave("w2")
    assert not sem.locked


async def test_cancelled_before_it_waits(sem: RWSemaphore) -> None:
    async with sem.writing():
        with anyio.CancelScope() as scope:
            scope.cancel()
            # Not the checked form's, which would see that this task waits for itself.
            await RWSemaphore.down_read(sem)
        assert scope.cancelled_caught
        assert not sem.is_contended


@pytest.fixture
def asyncio_only(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("native cancellation of a task is asyncio's")


@pytest.mark.usefixtures("asyncio_only")
@pytest.mark.parametrize("write", [False, True], ids=["reader", "writer"])
async def test_native_cancel_after_it_was_granted_passes_it_on(
    sem: RWSemaphore, write: bool
) -> None:
    async def take(name: str) -> None:
        async with sem.writing() if write else sem.reading():
            order.append(name)

    async def take_after(name: str) -> None:
        async with sem.writing():
            order.append(name)

    order: list[str] = []
    await sem.down_write()
    first = asyncio.ensure_future(take("first"))
    await anyio.wait_all_tasks_blocked()
    second = asyncio.ensure_future(take_after("second"))
    await anyio.wait_all_tasks_blocked()
    sem.up_write()
    assert sem.locked, "handed over, before the waiter ran"
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert order == ["second"]
    assert not sem.locked


@pytest.mark.usefixtures("asyncio_only")
async def test_native_cancel_while_waiting(sem: RWSemaphore) -> None:
    await sem.down_read()
    writer = asyncio.ensure_future(sem.down_write())
    await anyio.wait_all_tasks_blocked()
    reader = asyncio.ensure_future(sem.down_read())
    await anyio.wait_all_tasks_blocked()
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writer
    await reader
    assert sem.statistics().readers == 2
    sem.up_read()
    sem.up_read()


@pytest.mark.usefixtures("asyncio_only")
async def test_a_waiter_that_is_closed_leaves_no_trace(sem: RWSemaphore) -> None:
    await sem.down_read()
    waiter = RWSemaphore.down_write(sem)
    waiter.send(None)
    assert sem.statistics().waiting_writers == 1
    waiter.close()
    assert not sem.is_contended
    sem.up_read()
