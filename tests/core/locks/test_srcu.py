"""SRCU: whom a grace period waits for, and who runs the callbacks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import anyio
import pytest
import structlog

from mmunotify.errors import LockNotHeld
from mmunotify.locks import SRCU

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio.abc import TaskGroup

pytestmark = pytest.mark.usefixtures("both_forms")


@pytest.fixture
def srcu() -> SRCU:
    return SRCU("srcu of mm")


class Reader:
    """A task that is inside a read section until it is told to leave."""

    def __init__(self, srcu: SRCU) -> None:
        self.srcu = srcu
        self.leave = anyio.Event()

    async def __call__(self) -> None:
        with self.srcu.reading():
            await self.leave.wait()


class Waiter:
    """A task that awaits something, and whether it has come back."""

    def __init__(self, wait: Callable[[], Awaitable[None]]) -> None:
        self.wait = wait
        self.scope = anyio.CancelScope()
        self.over = False

    async def __call__(self) -> None:
        with self.scope:
            await self.wait()
            self.over = True


T = TypeVar("T", Reader, Waiter)


class Scene:
    """Starts readers and waiters one after another, each to where it waits."""

    def __init__(self, srcu: SRCU, tasks: TaskGroup) -> None:
        self.srcu = srcu
        self.tasks = tasks

    async def reader(self) -> Reader:
        return await self._start(Reader(self.srcu))

    async def waiter(self, wait: Callable[[], Awaitable[None]] | None = None) -> Waiter:
        return await self._start(Waiter(wait or self.srcu.synchronize))

    async def leave(self, *readers: Reader) -> None:
        for reader in readers:
            reader.leave.set()
        await anyio.wait_all_tasks_blocked()

    async def _start(self, one: T) -> T:
        self.tasks.start_soon(one)
        await anyio.wait_all_tasks_blocked()
        return one


def test_without_readers_nothing_suspends(srcu: SRCU) -> None:
    async def use() -> None:
        await srcu.synchronize()
        await srcu.barrier()
        with srcu.reading():
            pass
        await srcu.synchronize()

    with pytest.raises(StopIteration):
        use().send(None)


async def test_synchronize_waits_for_the_readers_of_now(srcu: SRCU) -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(srcu, tasks)
        first, second = await scene.reader(), await scene.reader()
        grace = await scene.waiter()
        assert not grace.over
        await scene.leave(first)
        assert not grace.over
        await scene.leave(second)
        assert grace.over


async def test_synchronize_does_not_wait_for_later_readers(srcu: SRCU) -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(srcu, tasks)
        early = await scene.reader()
        grace = await scene.waiter()
        late = await scene.reader()
        await scene.leave(early)
        assert grace.over
        assert srcu.readers == 1
        await scene.leave(late)
        assert srcu.readers == 0


async def test_a_second_synchronize_does_not_wait_for_later_readers_either(srcu: SRCU) -> None:
    """With two counters that are flipped it would: a reader of between the two is in either."""
    async with anyio.create_task_group() as tasks:
        scene = Scene(srcu, tasks)
        first = await scene.reader()
        one = await scene.waiter()
        second = await scene.reader()
        two = await scene.waiter()
        third = await scene.reader()
        await scene.leave(second)
        assert (one.over, two.over) == (False, False), "two waits for the first reader as well"
        await scene.leave(first)
        assert (one.over, two.over) == (True, True)
        await scene.leave(third)


async def test_synchronizers_share_a_grace_period(srcu: SRCU) -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(srcu, tasks)
        reader = await scene.reader()
        waiters = [await scene.waiter() for _ in range(3)]
        assert srcu.statistics().grace_periods == 1
        await scene.leave(reader)
        assert all(waiter.over for waiter in waiters)
        assert srcu.statistics().grace_periods == 0


async def test_read_sections_nest_across_a_grace_period(srcu: SRCU) -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(srcu, tasks)
        outer = srcu.read_lock()
        waiter = await scene.waiter()
        inner = srcu.read_lock()
        assert srcu.readers == 2
        srcu.read_unlock(inner)
        await anyio.wait_all_tasks_blocked()
        assert not waiter.over
        srcu.read_unlock(outer)
        await anyio.wait_all_tasks_blocked()
        assert waiter.over


def test_an_index_that_nobody_holds(srcu: SRCU) -> None:
    with pytest.raises(LockNotHeld, match="srcu of mm"):
        srcu.read_unlock(0)
    index = srcu.read_lock()
    with pytest.raises(LockNotHeld, match="index 7"):
        srcu.read_unlock(7)
    srcu.read_unlock(index)
    assert srcu.readers == 0


def test_an_index_that_was_given_back_while_an_older_reader_stays(srcu: SRCU) -> None:
    old = srcu.read_lock()
    srcu.call(lambda: None)
    young = srcu.read_lock()
    srcu.call(lambda: None)
    srcu.read_unlock(young)
    with pytest.raises(LockNotHeld, match="index 1"):
        srcu.read_unlock(young)
    srcu.read_unlock(old)
    assert srcu.statistics().grace_periods == 0


async def test_an_exception_inside_leaves_the_section(srcu: SRCU) -> None:
    with pytest.raises(ZeroDivisionError), srcu.reading():
        raise ZeroDivisionError
    assert srcu.readers == 0


# Callbacks --------------------------------------------------------------------------------------


def test_a_callback_without_readers_runs_at_once(srcu: SRCU) -> None:
    ran: list[str] = []
    srcu.call(lambda: ran.append("freed"))
    assert ran == ["freed"]


def test_a_callback_runs_in_the_last_reader_that_it_waits_for(srcu: SRCU) -> None:
    ran: list[str] = []
    first, second = srcu.read_lock(), srcu.read_lock()
    srcu.call(lambda: ran.append("freed"))
    late = srcu.read_lock()
    srcu.read_unlock(second)
    assert ran == []
    assert srcu.statistics().callbacks == 1
    srcu.read_unlock(first)
    assert ran == ["freed"]
    srcu.read_unlock(late)
    assert srcu.statistics().callbacks == 0


def test_callbacks_run_in_order(srcu: SRCU) -> None:
    ran: list[int] = []
    first = srcu.read_lock()
    srcu.call(lambda: ran.append(1))
    srcu.call(lambda: ran.append(2))
    second = srcu.read_lock()
    srcu.call(lambda: ran.append(3))
    srcu.read_unlock(second)
    assert ran == []
    srcu.read_unlock(first)
    assert ran == [1, 2, 3]


def test_a_callback_may_queue_another_and_read(srcu: SRCU) -> None:
    ran: list[str] = []

    def outer() -> None:
        with srcu.reading():
            srcu.call(lambda: ran.append("inner"))
            ran.append("outer")

    index = srcu.read_lock()
    srcu.call(outer)
    srcu.read_unlock(index)
    assert ran == ["outer", "inner"]
    assert srcu.statistics().grace_periods == 0


def test_a_callback_that_ends_another_grace_period_goes_on_in_order(srcu: SRCU) -> None:
    ran: list[str] = []
    first = srcu.read_lock()

    def leave_second() -> None:
        srcu.read_unlock(second)
        ran.append("one")

    srcu.call(leave_second)
    srcu.call(lambda: ran.append("two"))
    second = srcu.read_lock()
    srcu.call(lambda: ran.append("three"))
    srcu.read_unlock(first)
    assert ran == ["one", "two", "three"]


def test_a_callback_that_raises_is_logged_and_harms_nobody(srcu: SRCU) -> None:
    ran: list[str] = []

    def broken() -> None:
        raise ZeroDivisionError("no such page")

    with structlog.testing.capture_logs() as logs:
        index = srcu.read_lock()
        srcu.call(broken)
        srcu.call(lambda: ran.append("after"))
        srcu.read_unlock(index)
        srcu.call(broken)
    assert ran == ["after"]
    assert srcu.statistics().callback_errors == 2
    assert [entry["event"] for entry in logs] == ["callback_raised"] * 2
    assert logs[0]["srcu"] == "srcu of mm"
    assert "broken" in logs[0]["callback"]
    assert "no such page" in logs[0]["error"]


def test_an_interrupt_in_a_callback_does_not_cost_the_others_theirs(srcu: SRCU) -> None:
    ran: list[str] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    index = srcu.read_lock()
    srcu.call(interrupted)
    srcu.call(lambda: ran.append("after"))
    with pytest.raises(KeyboardInterrupt):
        srcu.read_unlock(index)
    assert ran == ["after"]
    assert srcu.statistics().grace_periods == 0


async def test_barrier_waits_for_the_callbacks_that_are_queued(srcu: SRCU) -> None:
    ran: list[str] = []
    async with anyio.create_task_group() as tasks:
        scene = Scene(srcu, tasks)
        first = await scene.reader()
        srcu.call(lambda: ran.append("one"))
        second = await scene.reader()
        srcu.call(lambda: ran.append("two"))
        barrier = await scene.waiter(srcu.barrier)
        await scene.leave(first)
        assert ran == ["one"]
        assert not barrier.over
        await scene.leave(second)
        assert ran == ["one", "two"]
        assert barrier.over


async def test_barrier_waits_for_no_reader_without_a_callback(srcu: SRCU) -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(srcu, tasks)
        first = await scene.reader()
        srcu.call(lambda: None)
        second = await scene.reader()
        grace = await scene.waiter()
        barrier = await scene.waiter(srcu.barrier)
        await scene.leave(first)
        assert (barrier.over, grace.over) == (True, False)
        await scene.leave(second)


# Cancellation -----------------------------------------------------------------------------------


async def test_cancelled_synchronize_leaves_no_trace(srcu: SRCU) -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(srcu, tasks)
        reader = await scene.reader()
        cancelled, patient = await scene.waiter(), await scene.waiter()
        cancelled.scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert (cancelled.over, patient.over) == (False, False)
        await scene.leave(reader)
        assert (cancelled.over, patient.over) == (False, True)
        found = srcu.statistics()
        assert (found.readers, found.grace_periods) == (0, 0)


async def test_cancelled_alone_and_asked_again(srcu: SRCU) -> None:
    async with anyio.create_task_group() as tasks:
        scene = Scene(srcu, tasks)
        reader = await scene.reader()
        cancelled = await scene.waiter()
        cancelled.scope.cancel()
        later = await scene.reader()
        await scene.leave(reader)
        again = await scene.waiter()
        assert not again.over
        await scene.leave(later)
        assert again.over


async def test_native_cancel_of_synchronize(srcu: SRCU, anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("native cancellation of a task is asyncio's")
    index = srcu.read_lock()
    # Made elsewhere, so that with lockdep it is not this task that waits for itself.
    waiter = asyncio.ensure_future(srcu.synchronize())
    await anyio.wait_all_tasks_blocked()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    srcu.read_unlock(index)
    assert srcu.statistics().grace_periods == 0
