"""Classic concurrency bugs: the broken program is caught, the right one explored to the end.

Counts of schedules are part of the contract: the same on every Python, in every run.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from mmunotify.errors import ExplorationFailed
from mmunotify.testing.explore import (
    DFS,
    PCT,
    Exploration,
    Hypothesis,
    Random,
    SleepSets,
    Strategy,
    explore,
)

# Lost update: read, suspend, write --------------------------------------------------------------


async def lost_update() -> None:
    count = 0

    async def increment() -> None:
        nonlocal count
        seen = count
        await checkpoint()
        count = seen + 1

    async with anyio.create_task_group() as tg:
        tg.start_soon(increment)
        tg.start_soon(increment)
    assert count == 2


async def no_lost_update() -> None:
    count = 0
    lock = anyio.Lock()

    async def increment() -> None:
        nonlocal count
        async with lock:
            seen = count
            await checkpoint()
            count = seen + 1

    async with anyio.create_task_group() as tg:
        tg.start_soon(increment)
        tg.start_soon(increment)
    assert count == 2


# Deadlock by lock order -------------------------------------------------------------------------


async def _transfer(first: anyio.Lock, second: anyio.Lock) -> None:
    async with first, second:
        await checkpoint()


async def locks_in_both_orders() -> None:
    a, b = anyio.Lock(), anyio.Lock()
    async with anyio.create_task_group() as tg:
        tg.start_soon(_transfer, a, b)
        tg.start_soon(_transfer, b, a)


async def locks_in_one_order() -> None:
    a, b = anyio.Lock(), anyio.Lock()
    async with anyio.create_task_group() as tg:
        tg.start_soon(_transfer, a, b)
        tg.start_soon(_transfer, a, b)


# Missed wake-up: looked, and then waited ---------------------------------------------------------


async def missed_wakeup() -> None:
    ready = False
    waiting: list[anyio.Event] = []

    async def consumer() -> None:
        if not ready:
            await checkpoint()
            waiting.append(anyio.Event())
            await waiting[-1].wait()

    async def producer() -> None:
        nonlocal ready
        await checkpoint()
        ready = True
        for event in waiting:
            event.set()

    async with anyio.create_task_group() as tg:
        tg.start_soon(consumer)
        tg.start_soon(producer)


async def no_missed_wakeup() -> None:
    ready = False
    condition = anyio.Condition()

    async def consumer() -> None:
        async with condition:
            while not ready:
                await condition.wait()

    async def producer() -> None:
        nonlocal ready
        await checkpoint()
        async with condition:
            ready = True
            condition.notify()

    async with anyio.create_task_group() as tg:
        tg.start_soon(consumer)
        tg.start_soon(producer)


# A cancelled waiter swallows a notification ------------------------------------------------------


class Baton:
    """A binary semaphore whose release is handed to the first waiter."""

    def __init__(self, *, passes_on: bool) -> None:
        self.free = True
        self._waiters: deque[anyio.Event] = deque()
        self._passes_on = passes_on

    async def take(self) -> None:
        if self.free:
            self.free = False
            return
        event = anyio.Event()
        self._waiters.append(event)
        try:
            await event.wait()
        except BaseException:
            if event in self._waiters:
                self._waiters.remove(event)
            elif self._passes_on:
                self.give()
            raise

    def give(self) -> None:
        if self._waiters:
            self._waiters.popleft().set()
        else:
            self.free = True


async def _three_take_it(baton: Baton) -> None:
    async def user() -> None:
        await baton.take()
        try:
            await checkpoint()
        finally:
            baton.give()

    async with anyio.create_task_group() as tg:
        for name in ("first", "second", "third"):
            tg.start_soon(user, name=name)


async def swallowed_notification() -> None:
    await _three_take_it(Baton(passes_on=False))


async def passed_on_notification() -> None:
    await _three_take_it(Baton(passes_on=True))


# Starvation: readers that never let a writer in --------------------------------------------------


class ReadersWriter:
    """A reader/writer lock that counts the readers who came after a waiting writer."""

    def __init__(self, *, fair: bool) -> None:
        self.overtaken = 0
        self._fair = fair
        self._readers = 0
        self._writer_waits: anyio.Event | None = None
        self._readers_wait = anyio.Event()

    async def read_lock(self) -> None:
        while self._fair and self._writer_waits is not None:
            await self._readers_wait.wait()
        self.overtaken += self._writer_waits is not None
        self._readers += 1

    def read_unlock(self) -> None:
        self._readers -= 1
        if not self._readers and self._writer_waits is not None:
            self._writer_waits.set()

    async def write(self) -> None:
        if self._readers:
            self._writer_waits = anyio.Event()
            await self._writer_waits.wait()
            self._writer_waits = None
            self._readers_wait.set()


async def _readers_and_a_writer(lock: ReadersWriter) -> int:
    async def reader() -> None:
        for _ in range(2):
            await lock.read_lock()
            await checkpoint()
            lock.read_unlock()

    async with anyio.create_task_group() as tg:
        tg.start_soon(reader)
        tg.start_soon(reader)
        tg.start_soon(lock.write)
    return lock.overtaken


async def starved_writer() -> int:
    overtaken = await _readers_and_a_writer(ReadersWriter(fair=False))
    assert overtaken < 2, f"{overtaken} readers went before the writer who waited"
    return overtaken


async def fair_writer() -> int:
    overtaken = await _readers_and_a_writer(ReadersWriter(fair=True))
    assert overtaken == 0
    return overtaken


# ABA: the value is the same and nothing else is --------------------------------------------------


class Stack:
    """A stack of cells that are reused; `pop` swings the top if it is what it was."""

    def __init__(self, *, counted: bool) -> None:
        self.next: dict[str, str | None] = {"a": "b", "b": None}
        self.top: str | None = "a"
        self._counted = counted
        self._count = 0

    async def pop(self) -> str | None:
        while True:
            top, count = self.top, self._count
            if top is None:
                return None
            following = self.next[top]
            await checkpoint()
            if self.top == top and (not self._counted or self._count == count):
                self.top = following
                self._count += 1
                return top

    def push(self, cell: str) -> None:
        self.next[cell] = self.top
        self.top = cell
        self._count += 1


async def _pop_against_pop_pop_push(stack: Stack) -> None:
    popped: list[str | None] = []

    async def one() -> None:
        popped.append(await stack.pop())

    async def other() -> None:
        a, b = await stack.pop(), await stack.pop()
        if a is not None:
            stack.push(a)
        popped.append(b)

    async with anyio.create_task_group() as tg:
        tg.start_soon(one)
        tg.start_soon(other)
    left = stack.top
    while left is not None:
        popped.append(left)
        left = stack.next[left]
    owned = [cell for cell in popped if cell is not None]
    assert len(owned) == len(set(owned)), f"a cell has two owners: {popped}"


async def aba() -> None:
    await _pop_against_pop_pop_push(Stack(counted=False))


async def counted_aba() -> None:
    await _pop_against_pop_pop_push(Stack(counted=True))


# program, options, error, schedules in all, how many of them fail, the first of them, its replay
BROKEN: list[Any] = [
    pytest.param(lost_update, {}, "AssertionError", 6, 4, 2, "01", id="lost update"),
    pytest.param(locks_in_both_orders, {}, "Deadlock", 10, 4, 4, "01", id="lock order"),
    pytest.param(missed_wakeup, {}, "Deadlock", 6, 2, 2, "01", id="missed wake-up"),
    pytest.param(
        swallowed_notification,
        {"cancel": "second"},
        "Deadlock",
        140,
        8,
        24,
        "0111",
        id="swallowed notification",
    ),
    pytest.param(starved_writer, {}, "AssertionError", 202, 74, 20, "002", id="writer starvation"),
    pytest.param(aba, {}, "AssertionError", 12, 2, 2, "01", id="aba"),
]
RIGHT: list[Any] = [
    pytest.param(no_lost_update, {}, 6, id="lost update"),
    pytest.param(locks_in_one_order, {}, 8, id="lock order"),
    pytest.param(no_missed_wakeup, {}, 7, id="missed wake-up"),
    pytest.param(passed_on_notification, {"cancel": "second"}, 140, id="swallowed notification"),
    pytest.param(fair_writer, {}, 184, id="writer starvation"),
    pytest.param(counted_aba, {}, 12, id="aba"),
]


@pytest.mark.parametrize(
    ("program", "options", "kind", "schedules", "failing", "first", "replay"), BROKEN
)
def test_broken_program_is_caught(
    program: Any,
    options: dict[str, Any],
    kind: str,
    schedules: int,
    failing: int,
    first: int,
    replay: str,
) -> None:
    """At a known schedule, which replays; and so many of all schedules fail."""
    found = explore(program, **options)
    assert found.failure is not None
    assert (found.failure.kind, found.schedules, found.failure.schedule) == (kind, first, replay)
    with pytest.raises(ExplorationFailed, match=kind):
        explore(program, replay=replay, **options).check()
    every = explore(program, stop=False, **options)
    assert (every.schedules, every.failures, every.exhausted) == (schedules, failing, True)


@pytest.mark.parametrize(("program", "options", "schedules"), RIGHT)
def test_right_program_is_exhausted(program: Any, options: dict[str, Any], schedules: int) -> None:
    """No schedule fails, and the tree of them has a known size."""
    found = explore(program, **options).check()
    assert (found.schedules, found.exhausted, found.bounds) == (schedules, True, ())


@pytest.mark.parametrize(
    "strategy",
    ["dfs", "random", "pct", "hypothesis", "sleep sets"],
)
@pytest.mark.parametrize(("program", "options", "kind"), [case.values[:3] for case in BROKEN])
def test_every_strategy_finds_every_bug(
    program: Any, options: dict[str, Any], kind: str, strategy: str
) -> None:
    """And each prints a schedule that fails again."""
    chosen: dict[str, Strategy] = {
        "dfs": DFS(preemptions=2),
        "random": Random(seed=1),
        "pct": PCT(seed=1),
        "hypothesis": Hypothesis(examples=200),
        "sleep sets": SleepSets(),
    }
    found = explore(program, strategy=chosen[strategy], schedules=2_000, **options)
    assert found.failure is not None
    assert found.failure.kind == kind
    again = explore(program, replay=found.failure.schedule, **options)
    assert again.failure is not None
    assert again.failure.kind == kind


@pytest.mark.parametrize(("program", "options"), [case.values[:2] for case in RIGHT])
def test_repeated_exploration_is_the_same(program: Any, options: dict[str, Any]) -> None:
    """Everything but the time it took, whatever the strategy."""

    def explored(strategy: Strategy) -> Exploration:
        found = explore(program, strategy=strategy, schedules=300, **options)
        found.seconds = 0
        return found

    for make in (DFS, lambda: Random(7), lambda: PCT(3, 7), SleepSets):
        assert explored(make()) == explored(make())
