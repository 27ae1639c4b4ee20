"""What the explorer reaches is what asyncio and trio reach when their schedulers are random."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from mmunotify.testing.explore import explore

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

RUNS = 3_000
"""Enough for the rarest outcome; most programs need a hundred."""


class AnyNext(deque[Any]):
    """A queue that is left at a random place."""

    def popleft(self) -> Any:
        self.rotate(-random.randrange(len(self)))
        return super().popleft()


def on_asyncio(program: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    def random_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop()
        vars(loop)["_ready"] = AnyNext(vars(loop)["_ready"])
        return loop

    return anyio.run(program, backend_options={"loop_factory": random_loop})


class OneOfThem(deque[Any]):
    """A queue that shows one of its items, and is cleared of that one."""

    def __iter__(self) -> Iterator[Any]:
        self.rotate(-random.randrange(len(self)) if self else 0)
        yield from [self[0]] if self else []

    def clear(self) -> None:
        if self:
            self.popleft()


def on_trio(program: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    pytest.importorskip("trio")
    from trio._core._run import GLOBAL_RUN_CONTEXT
    from trio.abc import Instrument

    class RandomScheduler(Instrument):
        def before_run(self) -> None:
            runner: Any = GLOBAL_RUN_CONTEXT.runner
            runner.runq = OneOfThem(list(runner.runq))

    return anyio.run(program, backend="trio", backend_options={"instruments": [RandomScheduler()]})


async def counter() -> Any:
    """A lost update."""
    count = 0

    async def increment() -> None:
        nonlocal count
        seen = count
        await checkpoint()
        count = seen + 1

    async with anyio.create_task_group() as tg:
        for _ in range(3):
            tg.start_soon(increment)
    return count


async def lock_order() -> Any:
    """Who gets a lock when."""
    order: list[str] = []
    lock = anyio.Lock()

    async def user(name: str) -> None:
        async with lock:
            order.append(name)

    async with anyio.create_task_group() as tg:
        for name in "abc":
            tg.start_soon(user, name)
    return "".join(order)


async def cancelled_waiter() -> Any:
    """An event and a cancellation race for a waiter."""
    event = anyio.Event()
    scope = anyio.CancelScope()
    seen: list[str] = []

    async def waiter() -> None:
        with scope:
            await event.wait()
            seen.append("woken")
            await checkpoint()
            seen.append("past a checkpoint")

    async def setter() -> None:
        await checkpoint()
        event.set()

    async def canceller() -> None:
        await checkpoint()
        scope.cancel()

    async with anyio.create_task_group() as tg:
        tg.start_soon(waiter)
        tg.start_soon(setter)
        tg.start_soon(canceller)
    return (*seen, scope.cancelled_caught)


async def failing_sibling() -> Any:
    """A task fails and its group is cancelled, wherever the others are."""
    seen: list[str] = []

    async def fails() -> None:
        await checkpoint()
        raise ValueError

    async def works() -> None:
        for step in "ab":
            await checkpoint()
            seen.append(step)

    async def is_shielded() -> None:
        with anyio.CancelScope(shield=True):
            await checkpoint()
            seen.append("s")
        await checkpoint()
        seen.append("t")

    try:
        async with anyio.create_task_group() as tg:
            tg.start_soon(fails)
            tg.start_soon(works)
            tg.start_soon(is_shielded)
    except* ValueError:
        seen.append("!")
    return "".join(seen)


async def stream() -> Any:
    """Two senders, one receiver, one place."""
    send, receive = anyio.create_memory_object_stream[str](1)

    async def sender(end: Any, items: str) -> None:
        with end:
            for item in items:
                await end.send(item)

    async with anyio.create_task_group() as tg, send:
        tg.start_soon(sender, send.clone(), "ab")
        tg.start_soon(sender, send.clone(), "x")
        send.close()
        with receive:
            got = [item async for item in receive]
    return "".join(got)


async def started() -> Any:
    """A task that reports its start, and one that gets in between."""
    seen: list[str] = []

    async def service(*, task_status: Any) -> None:
        await checkpoint()
        seen.append("s")
        task_status.started("value")
        seen.append("t")
        await checkpoint()
        seen.append("u")

    async def other() -> None:
        seen.append("o")
        await checkpoint()
        seen.append("p")

    async with anyio.create_task_group() as tg:
        tg.start_soon(other)
        seen.append(await tg.start(service))
    return "".join(seen)


async def condition() -> Any:
    """A notification for one of two waiters, one of whom is cancelled."""
    condition = anyio.Condition()
    scope = anyio.CancelScope()
    tokens, taken = 0, []

    async def taker(name: str, around: anyio.CancelScope) -> None:
        nonlocal tokens
        with around:
            async with condition:
                while not tokens:
                    await condition.wait()
                tokens -= 1
                taken.append(name)

    async def giver() -> None:
        nonlocal tokens
        async with condition:
            tokens += 1
            condition.notify()
        scope.cancel()
        await checkpoint()
        async with condition:
            tokens += 1
            condition.notify()

    async with anyio.create_task_group() as tg:
        tg.start_soon(taker, "a", scope)
        tg.start_soon(taker, "b", anyio.CancelScope())
        tg.start_soon(giver)
    return "".join(taken)


async def semaphore() -> Any:
    """Two places for three, and how many are in at once."""
    semaphore, limiter = anyio.Semaphore(2), anyio.CapacityLimiter(1)
    inside, seen = 0, []

    async def user(name: str) -> None:
        nonlocal inside
        async with semaphore:
            inside += 1
            seen.append(f"{name}{inside}")
            async with limiter:
                seen.append(name)
            inside -= 1

    async with anyio.create_task_group() as tg:
        for name in "ab":
            tg.start_soon(user, name)
    return " ".join(seen)


async def nested_scopes() -> Any:
    """An outer and an inner scope are cancelled, in whatever order."""
    seen: list[str] = []
    inner, outer = anyio.CancelScope(), anyio.CancelScope()

    async def work() -> None:
        with outer:
            with inner:
                try:
                    await anyio.sleep_forever()
                finally:
                    seen.append("f")
            seen.append("between")
            await checkpoint()
            seen.append("in outer")

    async def cancels(scope: anyio.CancelScope) -> None:
        await checkpoint()
        scope.cancel()

    async with anyio.create_task_group() as tg:
        tg.start_soon(work)
        tg.start_soon(cancels, inner)
        tg.start_soon(cancels, outer)
    return (*seen, inner.cancelled_caught, outer.cancelled_caught)


PROGRAMS = [
    counter,
    lock_order,
    cancelled_waiter,
    failing_sibling,
    stream,
    started,
    condition,
    semaphore,
    nested_scopes,
]


@pytest.mark.parametrize("run", [on_asyncio, on_trio])
@pytest.mark.parametrize("program", PROGRAMS)
def test_same_outcomes(
    program: Callable[[], Coroutine[Any, Any, Any]],
    run: Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any],
) -> None:
    """No outcome of a real loop is missed, and none is made up."""
    explored = explore(program, schedules=200_000).check()
    assert explored.exhausted
    random.seed(0)
    seen = set()
    for _ in range(RUNS):
        seen.add(run(program))
        if seen == set(explored.outcomes):
            break
    assert seen == set(explored.outcomes)
