"""The explorer's event loop is anyio's: scopes, groups, primitives, streams, time.

Each program holds what anyio promises, and is run under all its schedules, or the first thousand.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import signal
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint, checkpoint_if_cancelled

from mmunotify.testing.explore import explore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine


def all_schedules(program: Callable[[], Coroutine[Any, Any, Any]]) -> Callable[[], None]:
    """Make a test of a program: no schedule of it fails."""

    def test() -> None:
        explore(program, schedules=1_000).check()

    test.__doc__ = program.__doc__
    test.__name__ = program.__name__
    return test


# Cancel scopes -----------------------------------------------------------------------------------


@all_schedules
async def test_cancellation_is_a_level() -> None:
    """Each checkpoint in a cancelled scope raises again, until the scope is left."""
    cancelled = anyio.get_cancelled_exc_class()
    with anyio.CancelScope() as scope:
        scope.cancel()
        for _ in range(3):
            with pytest.raises(cancelled):
                await checkpoint()
        with pytest.raises(cancelled):
            await anyio.Event().wait()
        with pytest.raises(cancelled):
            await anyio.sleep(1)
        with pytest.raises(cancelled):
            await checkpoint_if_cancelled()
        await cancel_shielded_checkpoint()
        assert scope.cancel_called
        assert not scope.cancelled_caught
        await checkpoint()
    assert scope.cancelled_caught
    await checkpoint()


@all_schedules
async def test_a_scope_that_nothing_was_cancelled_in_catches_nothing() -> None:
    """Cancelled after its last checkpoint."""
    with anyio.CancelScope() as scope:
        await checkpoint()
        scope.cancel()
    assert scope.cancel_called
    assert not scope.cancelled_caught


@all_schedules
async def test_shields() -> None:
    """A shield keeps outer cancellations out, its own in, and lets through when it is lowered."""
    with anyio.CancelScope() as outer:
        with anyio.CancelScope(shield=True) as inner:
            outer.cancel()
            await checkpoint()
            inner.shield = False
            assert not inner.cancel_called
            await checkpoint()
        raise AssertionError("the outer cancellation was lost")
    assert outer.cancelled_caught
    assert not inner.cancelled_caught
    with anyio.CancelScope(shield=True) as own:
        own.cancel()
        await checkpoint()
        raise AssertionError("a shield is no shield against its own scope")
    assert own.cancelled_caught


@all_schedules
async def test_lowering_a_shield_from_outside_reaches_who_waits() -> None:
    """The task is parked inside, and cancelled where it is."""
    shield = anyio.CancelScope(shield=True)

    async def waits() -> None:
        with shield:
            await anyio.sleep_forever()

    async with anyio.create_task_group() as tg:
        tg.start_soon(waits)
        await anyio.wait_all_tasks_blocked()
        tg.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
        shield.shield = False


@all_schedules
async def test_nested_scopes_are_caught_by_the_outermost_that_was_cancelled() -> None:
    """The inner one lets the exception through when the outer is cancelled as well."""
    with anyio.CancelScope() as outer:
        with anyio.CancelScope() as inner:
            inner.cancel()
            outer.cancel()
            await checkpoint()
        raise AssertionError("unreachable")
    assert (inner.cancelled_caught, outer.cancelled_caught) == (False, True)


@all_schedules
async def test_deadlines() -> None:
    """On the virtual clock, to the second; moved, removed, passed already."""
    assert anyio.current_time() == 0
    with anyio.move_on_after(5) as scope:
        await anyio.sleep(10)
    assert scope.cancelled_caught
    assert anyio.current_time() == 5
    with pytest.raises(TimeoutError):
        with anyio.fail_after(1):
            await anyio.sleep_forever()
    assert anyio.current_time() == 6
    with anyio.move_on_after(1) as scope:
        scope.deadline = math.inf
        await anyio.sleep(10)
    assert not scope.cancelled_caught
    with anyio.CancelScope() as scope:
        scope.deadline = anyio.current_time() + 1
        await anyio.sleep(10)
    assert scope.cancelled_caught
    assert anyio.current_time() == 17
    with anyio.CancelScope(deadline=3) as scope:  # noqa: ASYNC100
        assert scope.cancel_called
    with pytest.raises(ValueError, match="NaN"):
        anyio.CancelScope(deadline=math.nan)


@all_schedules
async def test_effective_deadline() -> None:
    """The nearest one that can reach the task; -inf when it is cancelled."""
    assert anyio.current_effective_deadline() == math.inf
    with anyio.CancelScope(deadline=10), anyio.CancelScope(deadline=20):  # noqa: ASYNC100
        assert anyio.current_effective_deadline() == 10
        with anyio.CancelScope(shield=True, deadline=30) as scope:  # noqa: ASYNC100
            assert anyio.current_effective_deadline() == 30
            scope.cancel()
            assert anyio.current_effective_deadline() == -math.inf


@all_schedules
async def test_scopes_are_for_one_task_and_one_block() -> None:
    """Misuse is an error, as it is on asyncio."""
    scope = anyio.CancelScope()
    with pytest.raises(RuntimeError, match="not active"):
        scope.__exit__(None, None, None)
    with scope:
        with pytest.raises(RuntimeError, match="single 'with'"):
            scope.__enter__()
        inner = anyio.CancelScope()
        with inner, pytest.raises(RuntimeError, match="current cancel scope"):
            scope.__exit__(None, None, None)


# Task groups -------------------------------------------------------------------------------------


@all_schedules
async def test_errors_of_all_tasks_are_grouped() -> None:
    """The body's own among them; those that are cancelled for it do not count."""

    async def fails(error: Exception) -> None:
        with anyio.CancelScope(shield=True):
            await checkpoint()
        raise error

    caught: list[str] = []
    try:
        async with anyio.create_task_group() as tg:
            tg.start_soon(fails, ValueError())
            tg.start_soon(fails, KeyError())
            tg.start_soon(anyio.sleep_forever)
            raise OSError
    except BaseExceptionGroup as group:
        caught = sorted(type(error).__name__ for error in group.exceptions)
    assert caught == ["KeyError", "OSError", "ValueError"]


@all_schedules
async def test_a_group_is_not_left_before_its_tasks() -> None:
    """Not even when its host is cancelled."""
    order = []

    async def slow() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(5)
            order.append("task")

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tg:
            tg.start_soon(slow)
            await checkpoint()
            scope.cancel()
        order.append("never")
    order.append("host")
    assert order == ["task", "host"]
    assert scope.cancelled_caught


@all_schedules
async def test_groups_are_entered_once_and_closed_afterwards() -> None:
    """Misuse is an error."""
    async with anyio.create_task_group() as tg:
        with pytest.raises(RuntimeError, match="more than once"):
            await tg.__aenter__()
    with pytest.raises(RuntimeError, match="not active"):
        tg.start_soon(anyio.sleep, 0)
    with pytest.raises(RuntimeError, match="not active"):
        await tg.start(anyio.sleep, 0)
    async with anyio.create_task_group() as tg:
        with pytest.raises(TypeError, match="return a coroutine"):
            tg.start_soon(lambda: None)  # type: ignore[arg-type, return-value]


@all_schedules
async def test_start() -> None:
    """The value that is told, the failures before it, and the group's cancellation after it."""

    async def service(value: int, *, task_status: anyio.abc.TaskStatus[int]) -> None:
        await checkpoint()
        task_status.started(value)
        with pytest.raises(RuntimeError, match="twice"):
            task_status.started(value)
        await anyio.sleep_forever()

    async def fails(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        raise ValueError

    async def never(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        await checkpoint()

    async with anyio.create_task_group() as tg:
        assert await tg.start(service, 7) == 7
        with pytest.raises(ValueError):  # noqa: PT011
            await tg.start(fails)
        with pytest.raises(RuntimeError, match="without calling"):
            await tg.start(never)
        tg.cancel_scope.cancel()


@all_schedules
async def test_start_that_is_cancelled_waits_for_its_task() -> None:
    """The task is cancelled with its caller, and ends before the caller goes on."""
    order: list[str] = []

    async def slow(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await checkpoint()
            order.append("task")

    async with anyio.create_task_group() as tg:
        with anyio.move_on_after(1) as scope:
            await tg.start(slow)
        order.append("caller")
    assert scope.cancelled_caught
    assert order == ["task", "caller"]


@pytest.mark.skipif(not hasattr(anyio, "TaskHandle"), reason="since anyio 4.14")
def test_task_handles() -> None:
    """Waited for, cancelled, asked for what became of them."""

    async def returns(value: int) -> int:
        await checkpoint()
        return value

    async def fails() -> None:
        raise ValueError

    async def program() -> None:
        async with anyio.create_task_group() as tg:
            one = tg.start_soon(returns, 1, name="one")
            sleeper = tg.start_soon(anyio.sleep_forever)
            two = tg.create_task(returns(2))
            with pytest.raises(anyio.TaskNotFinished):
                _ = one.return_value
            assert isinstance(one, anyio.TaskHandle)
            assert await one == 1
            await two.wait()
            assert two.return_value == 2
            assert one.name == "one"
            assert "one" in repr(one)
            assert sleeper.status.name == "PENDING"
            sleeper.cancel()
            assert sleeper.status.name == "CANCELLING"
            await sleeper.wait()
            assert sleeper.status.name == "CANCELLED"
            with pytest.raises(anyio.TaskCancelled):
                _ = sleeper.return_value
        with pytest.raises(BaseExceptionGroup):
            async with anyio.create_task_group() as tg:
                failed = tg.start_soon(fails)
        assert isinstance(failed.exception, ValueError)

    explore(program, schedules=1_000).check()


@all_schedules
async def test_each_task_has_its_own_context() -> None:
    """A variable that a task sets is seen by the tasks that it starts, and by no other."""
    variable = contextvars.ContextVar("variable", default="outside")

    async def child(expected: str) -> None:
        await checkpoint()
        assert variable.get() == expected
        variable.set("child")
        await checkpoint()
        assert variable.get() == "child"

    variable.set("main")
    async with anyio.create_task_group() as tg:
        tg.start_soon(child, "main")
        tg.start_soon(child, "main")
        await checkpoint()
        assert variable.get() == "main"


@all_schedules
async def test_tasks_know_themselves() -> None:
    """Names, ids, parents; who runs; and run variables, which end with the execution."""
    found: list[anyio.TaskInfo] = []
    counter = anyio.lowlevel.RunVar[int]("counter", 0)
    counter.set(counter.get() + 1)
    assert counter.get() == 1

    async def child() -> None:
        found.append(anyio.get_current_task())
        await checkpoint()

    me = anyio.get_current_task()
    async with anyio.create_task_group() as tg:
        tg.start_soon(child)
        tg.start_soon(child, name="other")
        assert {task.name for task in anyio.get_running_tasks()} == {"main", "child", "other"}
    assert {task.parent_id for task in found} == {me.id}
    assert len({task.id for task in (me, *found)}) == 3
    assert me == anyio.get_current_task()
    assert not me.has_pending_cancellation()


# Primitives --------------------------------------------------------------------------------------


@all_schedules
async def test_event() -> None:
    """All who wait are woken, and nobody waits for one that is set."""
    event = anyio.Event()
    async with anyio.create_task_group() as tg:
        for _ in range(2):
            tg.start_soon(event.wait)
        await anyio.wait_all_tasks_blocked()
        assert event.statistics().tasks_waiting == 2
        event.set()
        assert event.statistics().tasks_waiting == 0
    assert event.is_set()
    await event.wait()


@all_schedules
async def test_lock() -> None:
    """First come, first served; its owner is known; misuse is an error."""
    lock = anyio.Lock()
    order = []

    async def user(name: str) -> None:
        async with lock:
            order.append(name)
            with pytest.raises(RuntimeError, match="already held"):
                await lock.acquire()

    async with lock:
        async with anyio.create_task_group() as tg:
            for name in "ab":
                tg.start_soon(user, name)
                await anyio.wait_all_tasks_blocked()
            statistics = lock.statistics()
            assert statistics.tasks_waiting == 2
            assert statistics.owner == anyio.get_current_task()
            assert lock.locked()
            with pytest.raises(RuntimeError, match="already held"):
                lock.acquire_nowait()
            lock.release()
            assert lock.locked(), "handed over"
            with pytest.raises(RuntimeError, match="not holding"):
                lock.release()
            with pytest.raises(anyio.WouldBlock):
                lock.acquire_nowait()
        lock.acquire_nowait()
    assert order == ["a", "b"]
    assert not lock.locked()


@all_schedules
async def test_semaphore_and_limiter() -> None:
    """Counts, bounds, and who borrows."""
    semaphore = anyio.Semaphore(1, max_value=1)
    async with semaphore:
        assert semaphore.value == 0
        with pytest.raises(anyio.WouldBlock):
            semaphore.acquire_nowait()
    with pytest.raises(ValueError, match="too many times"):
        semaphore.release()
    assert (semaphore.max_value, semaphore.statistics().tasks_waiting) == (1, 0)
    with pytest.raises(TypeError):
        anyio.Semaphore("1")  # type: ignore[arg-type]
    limiter = anyio.CapacityLimiter(1)
    async with anyio.create_task_group() as tg:
        async with limiter:
            with pytest.raises(RuntimeError, match="already holding"):
                limiter.acquire_nowait()
            with pytest.raises(anyio.WouldBlock):
                limiter.acquire_on_behalf_of_nowait("somebody")
            tg.start_soon(limiter.acquire_on_behalf_of, "else")
            await anyio.wait_all_tasks_blocked()
            assert limiter.statistics().tasks_waiting == 1
            limiter.total_tokens = 2
            assert limiter.borrowed_tokens == 2
        assert limiter.available_tokens == 1
    limiter.release_on_behalf_of("else")
    with pytest.raises(RuntimeError, match="isn't holding"):
        limiter.release()
    with pytest.raises(TypeError):
        limiter.total_tokens = 1.5
    with pytest.raises(ValueError, match=">= 0"):
        limiter.total_tokens = -1


@all_schedules
async def test_cancelled_limiter_waiter_leaves_no_trace() -> None:
    """Whether the token was lent to it already or not."""
    limiter = anyio.CapacityLimiter(1)
    scope = anyio.CancelScope()

    async def waits() -> None:
        with scope:
            async with limiter:
                pass

    async with anyio.create_task_group() as tg:
        async with limiter:
            tg.start_soon(waits)
            await checkpoint()
        scope.cancel()
    assert limiter.borrowed_tokens == 0
    assert limiter.statistics().tasks_waiting == 0


@all_schedules
async def test_adapters_made_outside_a_loop() -> None:
    """Made before the exploration, as a module's globals are; bound when first used."""
    assert type(OUTSIDE).__name__ == "EventAdapter"
    with anyio.move_on_after(1):
        await OUTSIDE.wait()


OUTSIDE = anyio.Event()


@all_schedules
async def test_streams() -> None:
    """Memory object streams: order, capacity, the ends of both sides."""
    send, receive = anyio.create_memory_object_stream[int](1)

    async def producer() -> None:
        async with send:
            for number in range(3):
                await send.send(number)

    got = []
    async with anyio.create_task_group() as tg:
        tg.start_soon(producer)
        async with receive:
            while True:
                try:
                    got.append(await receive.receive())
                except anyio.EndOfStream:
                    break
    assert got == [0, 1, 2]


@all_schedules
async def test_async_generators() -> None:
    """Suspended in the middle of one, and closed."""

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(3):
                await checkpoint()
                yield number
        finally:
            await checkpoint()

    generator = numbers()
    async for number in generator:
        if number == 1:
            break
    await generator.aclose()  # type: ignore[attr-defined]


# Time --------------------------------------------------------------------------------------------


@all_schedules
async def test_time_is_virtual() -> None:
    """A year passes in no time, in the order of the clock."""
    order = []

    async def sleeper(seconds: float) -> None:
        await anyio.sleep(seconds)
        order.append(seconds)

    async with anyio.create_task_group() as tg:
        for seconds in (3e7, 1, 2):
            tg.start_soon(sleeper, seconds)
    assert order == [1, 2, 3e7]
    assert anyio.current_time() == 3e7


# What it does not do -----------------------------------------------------------------------------


async def a_thread() -> None:
    await anyio.to_thread.run_sync(print)


async def a_socket() -> None:
    await anyio.connect_tcp("localhost", 80)


async def a_process() -> None:
    await anyio.run_process(["true"])


async def a_signal() -> None:
    with anyio.open_signal_receiver(signal.SIGTERM):
        pass


async def asyncio_itself() -> None:
    import asyncio

    await asyncio.sleep(0)


async def swallowed() -> None:
    with contextlib.suppress(Exception):
        await anyio.to_thread.run_sync(print)


@pytest.mark.parametrize(
    ("program", "what"),
    [
        (a_thread, "a thread"),
        (a_socket, "a socket"),
        (a_process, "a process"),
        (a_signal, "signals"),
        (asyncio_itself, "no anyio primitive"),
        (swallowed, "a thread"),
    ],
)
def test_refusals(program: Callable[[], Coroutine[Any, Any, Any]], what: str) -> None:
    """Refused by name, even if the program would hide it."""
    failure = explore(program).failure
    assert failure is not None
    assert failure.kind == "NotExplorable"
    assert what in str(failure.error)


async def test_not_inside_an_event_loop() -> None:
    """explore() is one itself."""
    from mmunotify.errors import NotExplorable

    with pytest.raises(NotExplorable, match="inside"):
        explore(a_thread)
