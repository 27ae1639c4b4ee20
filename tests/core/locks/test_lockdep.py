"""Lockdep: each way to use locks wrongly, and the message that it gets."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from mmunotify.errors import (
    LockNotHeld,
    LockOrderViolation,
    LockRecursion,
    ScheduleWhileAtomic,
    SpinlockHeld,
)
from mmunotify.locks import (
    SRCU,
    RWSemaphore,
    SeqCount,
    SpinLock,
    SpinRWLock,
    lockdep,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
    from contextlib import AbstractAsyncContextManager


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    with lockdep.checking():
        yield


def line_of(function: Callable[..., object], text: str) -> str:
    """Where the first line of `function` is that contains `text`, as lockdep writes it."""
    lines, first = inspect.getsourcelines(function)
    number = next(n for n, line in enumerate(lines, first) if text in line)
    return f"{__file__}:{number} in "


# On and off -------------------------------------------------------------------------------------


def test_off_the_classes_are_plain() -> None:
    with lockdep.checking(False):
        assert type(SpinLock("a")) is SpinLock
        assert type(SpinRWLock("a")) is SpinRWLock
        assert type(RWSemaphore("a")) is RWSemaphore
        assert type(SRCU()) is SRCU
        assert type(SeqCount("a")) is SeqCount


def test_on_they_are_subclasses() -> None:
    for one, plain in (
        (SpinLock("a"), SpinLock),
        (SpinRWLock("a"), SpinRWLock),
        (RWSemaphore("a"), RWSemaphore),
        (SRCU(), SRCU),
        (SeqCount("a"), SeqCount),
    ):
        assert isinstance(one, plain)
        assert type(one) is not plain


def test_a_lock_stays_what_it_was_made() -> None:
    checked = SpinLock("a")
    with lockdep.checking(False), checked, pytest.raises(ScheduleWhileAtomic):
        lockdep.might_sleep("kmalloc")


def test_enable_and_disable() -> None:
    assert lockdep.enabled
    lockdep.disable()
    assert type(SpinLock("a")) is SpinLock
    lockdep.enable()
    assert type(SpinLock("a")) is not SpinLock


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_turns_it_on(value: str | None, on: bool) -> None:
    environment = {key: text for key, text in os.environ.items() if key != "MMUNOTIFY_LOCKDEP"}
    if value is not None:
        environment["MMUNOTIFY_LOCKDEP"] = value
    code = "from mmunotify.locks import lockdep; print(lockdep.enabled)"
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == str(on)


@pytest.mark.parametrize(
    ("name", "lock_class"),
    [
        ("mmap_lock", "mmap_lock"),
        ("mmap_lock[7]", "mmap_lock"),
        ("srcu of mm 3", "srcu"),
        ("mm->page_table_lock#2", "mm->page_table_lock"),
        ("[odd]", "[odd]"),
    ],
)
def test_the_class_of_a_name(name: str, lock_class: str) -> None:
    assert SpinLock(name).lock_class == lock_class
    assert SpinLock(name, lock_class="other").lock_class == "other"


# Order ------------------------------------------------------------------------------------------


def take(
    outer: AbstractAsyncContextManager[None, None], inner: AbstractAsyncContextManager[None, None]
) -> Callable[[], Coroutine[Any, Any, None]]:
    async def nested() -> None:
        async with outer, inner:
            pass

    return nested


async def test_opposite_orders_raise_with_both_chains() -> None:
    """The two never run at the same time: the order alone is enough."""
    mmap_lock, i_mmap = RWSemaphore("mmap_lock[1]"), RWSemaphore("i_mmap[2]")

    async def fault() -> None:
        async with mmap_lock.reading(), i_mmap.reading():
            pass

    async def truncate() -> None:
        async with i_mmap.writing(), mmap_lock.writing():
            pytest.fail("taken in both orders")

    await fault()
    with pytest.raises(LockOrderViolation) as caught:
        await truncate()
    message = str(caught.value)
    assert "i_mmap -> mmap_lock -> i_mmap" in message
    for function, text in (
        (fault, "mmap_lock.reading"),
        (fault, "i_mmap.reading"),
        (truncate, "i_mmap.writing"),
        (truncate, "mmap_lock.writing"),
    ):
        assert line_of(function, text) in message
    assert message.count(" held ") == message.count(" and called ") == 2
    assert "mmap_lock[1]" in message
    assert "i_mmap[2]" in message
    assert not i_mmap.locked
    assert not mmap_lock.locked
    assert lockdep.held() == ()


async def test_the_chains_name_their_tasks() -> None:
    a, b = RWSemaphore("a"), RWSemaphore("b")
    message = ""

    async def second() -> None:
        nonlocal message
        try:
            await take(b.reading(), a.reading())()
        except LockOrderViolation as error:
            message = str(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take(a.reading(), b.reading()), name="the first")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(second, name="the second")
    assert "task 'the first' held a" in message
    assert "task 'the second' held b" in message


async def test_a_longer_cycle_shows_every_chain() -> None:
    a, b, c = RWSemaphore("a"), RWSemaphore("b"), RWSemaphore("c")
    await take(a.reading(), b.reading())()
    await take(b.reading(), c.reading())()
    with pytest.raises(LockOrderViolation) as caught:
        await take(c.reading(), a.reading())()
    assert "c -> a -> b -> c" in str(caught.value)
    assert str(caught.value).count(" and called ") == 3


async def test_two_readers_are_an_order_too() -> None:
    """The rwsem is fair, so a writer that waits between them makes them wait."""
    a, b = RWSemaphore("a"), RWSemaphore("b")
    await take(a.reading(), b.reading())()
    with pytest.raises(LockOrderViolation):
        await take(b.reading(), a.reading())()


async def test_spinlocks_and_rwsems_share_one_graph() -> None:
    sem, ptl = SpinRWLock("i_mmap"), SpinLock("page_table_lock")
    async with sem.writing():
        with ptl:
            pass
    with pytest.raises(LockOrderViolation, match="page_table_lock -> i_mmap"), ptl:
        await sem.down_write()


async def test_the_same_order_again_is_fine() -> None:
    a, b, c = RWSemaphore("a"), RWSemaphore("b"), RWSemaphore("c")
    for _ in range(2):
        await take(a.reading(), b.writing())()
        await take(a.writing(), c.writing())()
        await take(b.writing(), c.reading())()


async def test_a_trylock_is_no_order_but_what_is_taken_under_it_is() -> None:
    a, b = RWSemaphore("a"), RWSemaphore("b")
    await take(a.reading(), b.reading())()
    async with b.writing():
        assert a.down_write_trylock(), "it would have given up rather than wait"
        a.up_write()
    assert b.down_write_trylock()
    with pytest.raises(LockOrderViolation):
        await a.down_write()
    b.up_write()


async def test_reset_forgets() -> None:
    a, b = RWSemaphore("a"), RWSemaphore("b")
    await take(a.reading(), b.reading())()
    lockdep.reset()
    await take(b.reading(), a.reading())()


# Recursion, and several locks of one class ------------------------------------------------------


@pytest.mark.parametrize("first", ["down_read", "down_write"])
@pytest.mark.parametrize("second", ["down_read", "down_write"])
async def test_taking_an_rwsem_twice(first: str, second: str) -> None:
    sem = RWSemaphore("mmap_lock")
    await getattr(sem, first)()
    with pytest.raises(LockRecursion) as caught:
        await getattr(sem, second)()
    message = str(caught.value)
    assert f"{second}(mmap_lock)" in message
    here = test_taking_an_rwsem_twice
    assert line_of(here, "await getattr(sem, first)") in message
    assert line_of(here, "await getattr(sem, second)") in message
    (sem.up_read if first == "down_read" else sem.up_write)()


async def test_two_locks_of_one_class_need_an_order() -> None:
    one, two = RWSemaphore("anon_vma[1]"), RWSemaphore("anon_vma[2]")
    with pytest.raises(LockRecursion, match=r"lock of class anon_vma: anon_vma\[1\]"):
        await take(one.writing(), two.writing())()


async def test_mmap_locks_are_taken_in_ascending_order() -> None:
    low = RWSemaphore("mmap_lock[low]", order=0x1000)
    middle = RWSemaphore("mmap_lock[middle]", order=0x2000)
    high = RWSemaphore("mmap_lock[high]", order=0x3000)
    async with low.reading():
        await take(middle.reading(), high.writing())()
        await take(high.reading(), RWSemaphore("other").reading())()
    with pytest.raises(LockOrderViolation) as caught:
        await take(high.reading(), low.reading())()
    assert "order 0x1000" in str(caught.value)
    assert "order 0x3000" in str(caught.value)


async def test_nest_declares_that_many_of_a_class_are_held() -> None:
    outer = RWSemaphore("mm_all_locks_mutex")
    one, two = RWSemaphore("anon_vma[1]"), RWSemaphore("anon_vma[2]")
    async with outer.writing():
        with lockdep.nest(outer):
            await take(two.writing(), one.writing())()
            async with one.writing():
                with pytest.raises(LockRecursion):
                    await one.down_write()
        with pytest.raises(LockRecursion):
            await take(two.writing(), one.writing())()


def test_nest_wants_the_outer_lock_held() -> None:
    with pytest.raises(LockNotHeld, match="mutex"), lockdep.nest(RWSemaphore("mutex")):
        pytest.fail("nobody holds it")


# Sleeping in atomic context ---------------------------------------------------------------------


def sleepers() -> list[Any]:
    return [
        pytest.param(lambda: RWSemaphore("sem").down_read(), id="down_read"),
        pytest.param(lambda: RWSemaphore("sem").down_write(), id="down_write"),
        pytest.param(lambda: RWSemaphore("sem").reading().__aenter__(), id="reading"),
        pytest.param(lambda: RWSemaphore("sem").writing().__aenter__(), id="writing"),
        pytest.param(lambda: SRCU().synchronize(), id="synchronize"),
        pytest.param(lambda: SRCU().barrier(), id="barrier"),
    ]


@pytest.mark.parametrize("sleep", sleepers())
async def test_what_may_sleep_is_refused_under_a_spinlock(
    sleep: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Even though none of them would have to wait here."""
    ptl = SpinLock("page_table_lock")
    with ptl:
        with pytest.raises(ScheduleWhileAtomic) as caught:
            await sleep()
        message = str(caught.value)
        assert "page_table_lock" in message
        assert line_of(test_what_may_sleep_is_refused_under_a_spinlock, "with ptl:") in message
        assert line_of(test_what_may_sleep_is_refused_under_a_spinlock, "sleep()") in message
    await sleep()


async def test_refused_under_a_spinning_rmap_lock() -> None:
    async with SpinRWLock("i_mmap_lock").writing():
        with pytest.raises(ScheduleWhileAtomic, match="i_mmap_lock"):
            await RWSemaphore("mmap_lock").down_read()


async def test_refused_in_a_non_blockable_section() -> None:
    with lockdep.non_block("oom reaper"):
        with pytest.raises(ScheduleWhileAtomic, match="inside oom reaper"):
            await RWSemaphore("mmap_lock").down_read()
        assert RWSemaphore("mmap_lock").down_read_trylock(), "a trylock does not sleep"


def test_might_sleep() -> None:
    lockdep.might_sleep("kmalloc")
    refused = pytest.raises(ScheduleWhileAtomic, match=r"kmalloc may sleep[^$]*page_table_lock")
    with SpinLock("page_table_lock"), refused:
        lockdep.might_sleep("kmalloc")
    lockdep.might_sleep("kmalloc")


async def test_another_tasks_spinlock_does_not_forbid_sleeping() -> None:
    """It is a bug as well, but the bug of that other task."""
    ptl = SpinLock("page_table_lock")

    slept = False

    async def holder() -> None:
        with pytest.raises(ScheduleWhileAtomic, match="page_table_lock"), ptl:
            await anyio.wait_all_tasks_blocked()

    async def sleeper() -> None:
        nonlocal slept
        while not ptl.locked:
            await nap()
        await RWSemaphore("mmap_lock").down_read()
        slept = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(holder)
        tasks.start_soon(sleeper)
    assert slept


# Scheduling while atomic ------------------------------------------------------------------------


async def nap() -> None:
    await anyio.lowlevel.checkpoint()


async def test_suspended_while_holding_a_spinlock() -> None:
    ptl = SpinLock("page_table_lock")

    async def holder() -> None:
        with ptl:
            await nap()

    with pytest.raises(ScheduleWhileAtomic) as caught:
        await holder()
    message = str(caught.value)
    assert "page_table_lock" in message
    assert line_of(holder, "with ptl:") in message
    suspended = message[message.index("suspended at") :]
    first = suspended.splitlines()[0]
    assert line_of(nap, "checkpoint()") in first, "the innermost line that is not the event loop's"
    assert line_of(holder, "await nap()") in suspended
    assert not ptl.locked


async def test_suspended_while_holding_a_spinning_rmap_lock() -> None:
    rmap = SpinRWLock("i_mmap_lock")
    with pytest.raises(ScheduleWhileAtomic, match="i_mmap_lock"):
        async with rmap.writing():
            await nap()
    assert not rmap.locked


async def test_suspended_in_a_non_blockable_section() -> None:
    with pytest.raises(ScheduleWhileAtomic, match="oom reaper"), lockdep.non_block("oom reaper"):
        await nap()


async def test_suspended_while_writing_under_a_sequence_count() -> None:
    with pytest.raises(ScheduleWhileAtomic, match="mm_seq"), SeqCount("mm_seq").writing():
        await nap()


async def test_suspended_inside_an_async_generator_is_found_too() -> None:
    async def pages() -> AsyncGenerator[int]:
        await nap()
        yield 1

    async def walk() -> None:
        with SpinLock("page_table_lock"):
            async for _ in pages():
                pass

    with pytest.raises(ScheduleWhileAtomic) as caught:
        await walk()
    assert line_of(nap, "checkpoint()") in str(caught.value)
    assert line_of(walk, "async for") in str(caught.value)


async def test_not_suspended_is_fine_however_often_the_loop_runs_around_it() -> None:
    ptl, rmap = SpinLock("page_table_lock"), SpinRWLock("i_mmap_lock")
    for _ in range(3):
        with ptl:
            pass
        await nap()
        async with rmap.writing():
            with ptl:
                pass
        await nap()


async def test_who_finds_it_held_learns_who_holds_it_and_where() -> None:
    ptl = SpinLock("page_table_lock")

    async def holder() -> None:
        with pytest.raises(ScheduleWhileAtomic), ptl:
            await anyio.wait_all_tasks_blocked()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(holder, name="the holder")
        while not ptl.locked:
            await nap()
        found_held = pytest.raises(SpinlockHeld)
        with found_held as caught, ptl:
            pytest.fail("two holders")
        message = str(caught.value)
    assert "taken by task 'the holder'" in message
    taken, _, suspended = message.partition("suspended at")
    assert line_of(holder, "ptl:") in taken
    assert line_of(holder, "wait_all_tasks_blocked") in suspended


async def test_every_suspension_is_found_not_only_the_first() -> None:
    for _ in range(3):
        with pytest.raises(ScheduleWhileAtomic), SpinLock("page_table_lock"):
            await nap()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_a_holder_that_runs_beneath_an_eager_task_is_not_suspended(
    anyio_backend_name: str,
) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("eager tasks are asyncio's")
    ptl = SpinLock("page_table_lock")

    async def eager() -> str:
        with pytest.raises(SpinlockHeld) as caught, ptl:
            pytest.fail("two holders")
        return str(caught.value)

    make_task: Any = asyncio.Task
    with ptl:
        task = make_task(eager(), loop=asyncio.get_running_loop(), eager_start=True)
    assert "was suspended at" not in await task


def test_another_backend_reports_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither asyncio nor trio: a loop of anyio's that runs one coroutine by hand."""
    ptl = SpinLock("page_table_lock")

    class Step:
        def __await__(self) -> Generator[None, None, None]:
            yield

    async def holder() -> None:
        with ptl:
            await Step()

    coroutine = holder()
    current = anyio.TaskInfo(1, None, "the holder", coroutine)
    monkeypatch.setattr(anyio, "get_current_task", lambda: current)
    coroutine.send(None)
    lockdep.after_step()
    with pytest.raises(ScheduleWhileAtomic, match="taken by task 'the holder'") as caught:
        coroutine.send(None)
    suspended = str(caught.value).partition("suspended at")[2]
    assert line_of(holder, "await Step()") in suspended


def test_a_step_of_one_thread_says_nothing_of_another() -> None:
    with SpinLock("page_table_lock"):
        thread = threading.Thread(target=lockdep.after_step)
        thread.start()
        thread.join()


# SRCU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", ["synchronize", "barrier"])
async def test_waiting_inside_ones_own_read_section(wait: str) -> None:
    srcu = SRCU("srcu of mm")
    with srcu.reading(), srcu.reading(), pytest.raises(LockRecursion) as caught:
        await getattr(srcu, wait)()
    message = str(caught.value)
    assert "inside the caller's own read section" in message
    assert "srcu of mm" in message
    function = test_waiting_inside_ones_own_read_section
    assert line_of(function, "with srcu.reading(), srcu.reading()") in message
    await getattr(srcu, wait)()


async def test_a_nested_section_is_left_once_per_entry() -> None:
    srcu = SRCU()
    outer, inner = srcu.read_lock(), srcu.read_lock()
    srcu.read_unlock(inner)
    with pytest.raises(LockRecursion):
        await srcu.synchronize()
    srcu.read_unlock(outer)
    await srcu.synchronize()


async def test_z31_release_in_a_read_section_waits_for_who_waits_for_readers() -> None:
    """The xpmem deadlock, found from two runs that each went well on its own."""
    srcu, segment = SRCU("srcu of mm"), RWSemaphore("segment->sema")

    async def exit_mmap() -> None:
        with srcu.reading():
            async with segment.writing():
                pass

    async def unregister() -> None:
        async with segment.reading():
            await srcu.synchronize()

    await exit_mmap()
    with pytest.raises(LockOrderViolation) as caught:
        await unregister()
    message = str(caught.value)
    for function, text in (
        (exit_mmap, "srcu.reading()"),
        (exit_mmap, "segment.writing()"),
        (unregister, "segment.reading()"),
        (unregister, "srcu.synchronize()"),
    ):
        assert line_of(function, text) in message

    lockdep.reset()
    await unregister()
    with pytest.raises(LockOrderViolation):
        await exit_mmap()


async def test_entering_a_read_section_waits_for_nobody() -> None:
    """Either order of a lock and a reader is fine as long as nobody synchronizes under the lock."""
    srcu, sem = SRCU(), RWSemaphore("mmap_lock")
    async with sem.reading():
        with srcu.reading():
            pass
    with srcu.reading():
        async with sem.writing():
            pass
    await srcu.synchronize()


async def test_two_domains_that_wait_for_each_others_readers() -> None:
    one, two = SRCU("one"), SRCU("two")
    with one.reading():
        await two.synchronize()
    with two.reading(), pytest.raises(LockOrderViolation, match="two -> one -> two"):
        await one.synchronize()


async def test_a_callback_runs_outside_the_section_that_ended() -> None:
    srcu, found = SRCU(), list[object]()
    index = srcu.read_lock()
    srcu.call(lambda: found.append(lockdep.held()))
    srcu.read_unlock(index)
    assert found == [()]


# Who holds what ---------------------------------------------------------------------------------


async def test_held_lists_locks_in_the_order_in_which_they_were_taken() -> None:
    sem, srcu, ptl = RWSemaphore("mmap_lock"), SRCU(), SpinLock("page_table_lock")
    assert lockdep.held() == ()
    async with sem.writing():
        with srcu.reading(), ptl:
            found = lockdep.held()
            assert [one.lock for one in found] == [sem, srcu, ptl]
            assert [one.mode for one in found] == ["write", "read", "spin"]
        sem.downgrade_write()
        (one,) = lockdep.held()
        assert one.mode == "read"
        here = test_held_lists_locks_in_the_order_in_which_they_were_taken
        assert f"{__file__}:{one.places[0].line} in " == line_of(here, "sem.writing()")
    assert lockdep.held() == ()


async def test_assert_held() -> None:
    sem = RWSemaphore("mmap_lock")
    with pytest.raises(LockNotHeld, match=r"mmap_lock must be held by .*; nobody holds it"):
        lockdep.assert_held(sem)
    async with sem.reading():
        lockdep.assert_held(sem)
        message = ""

        async def other() -> None:
            nonlocal message
            with pytest.raises(LockNotHeld) as caught:
                lockdep.assert_held(sem)
            message = str(caught.value)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
        assert line_of(test_assert_held, "sem.reading()") in message
    with lockdep.checking(False):
        lockdep.assert_held(sem)


def test_without_an_event_loop_the_thread_is_the_task() -> None:
    ptl = SpinLock("page_table_lock")
    with ptl:
        with pytest.raises(SpinlockHeld, match=f"thread '{threading.current_thread().name}'"), ptl:
            pytest.fail("two holders")
        elsewhere: list[object] = []
        thread = threading.Thread(target=lambda: elsewhere.append(lockdep.held()))
        thread.start()
        thread.join()
        assert elsewhere == [()]


async def test_a_lock_that_was_handed_over_is_held_by_who_waited() -> None:
    sem = RWSemaphore("mmap_lock")
    found: list[str] = []

    async def waiter() -> None:
        async with sem.writing():
            found.extend(one.task for one in lockdep.held())

    async with anyio.create_task_group() as tasks, sem.writing():
        tasks.start_soon(waiter, name="the waiter")
        await anyio.wait_all_tasks_blocked()
    assert found == ["task 'the waiter'"]
    assert lockdep.held() == ()


async def test_a_cancelled_waiter_holds_nothing() -> None:
    sem = RWSemaphore("mmap_lock")
    found: list[object] = []

    async def waiter(scope: anyio.CancelScope) -> None:
        with scope:
            await sem.down_write()
        found.append(lockdep.held())

    async with anyio.create_task_group() as tasks, sem.reading():
        scope = anyio.CancelScope()
        tasks.start_soon(waiter, scope)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
    assert found == [()]


async def test_a_lock_may_be_released_by_another_task() -> None:
    sem = RWSemaphore("mmap_lock")
    await sem.down_read()

    async def other() -> None:
        sem.up_read()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
    assert lockdep.held() == ()
    await sem.down_write()
    sem.up_write()
