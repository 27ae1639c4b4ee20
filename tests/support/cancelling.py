"""Cancelling a coroutine at each of its suspension points, in each way that there is."""

from __future__ import annotations

import asyncio
import math
import types
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

ANYIO = ("scope", "deadline")
NATIVE = ("native", "native timeout")


@types.coroutine
def watched(
    coroutine: Coroutine[Any, Any, object], suspends: Callable[[], object]
) -> Generator[Any, Any, None]:
    """Run a coroutine, and call `suspends` in its task each time that it is about to suspend."""
    resume: Callable[[], Any] = lambda: coroutine.send(None)  # noqa: E731
    while True:
        try:
            trap = resume()
        except StopIteration:
            return
        suspends()
        try:
            value = yield trap
        except BaseException as thrown:
            resume = lambda thrown=thrown: coroutine.throw(thrown)  # type: ignore[misc]  # noqa: E731
        else:
            resume = lambda value=value: coroutine.send(value)  # type: ignore[misc]  # noqa: E731


async def cancel_at(
    number: int,
    how: str,
    victim: Callable[[], Coroutine[Any, Any, object]],
    note: Callable[[], object],
) -> bool:
    """Run `victim()` and cancel it when it suspends for the `number`th time; whether it did.

    `note` is called in its task just before. It is an error if the cancellation does not come out
    in the end.
    """
    count = 0
    cancel: Callable[[], object]

    def suspends() -> None:
        nonlocal count
        count += 1
        if count == number:
            note()
            cancel()

    async def run() -> None:
        await watched(victim(), suspends)
        if count >= number:
            await anyio.lowlevel.checkpoint()  # a cancellation that was held back comes now

    cancelled = False
    if how == "scope":
        with anyio.CancelScope() as scope:
            cancel = scope.cancel
            await run()
        cancelled = scope.cancelled_caught
    elif how == "deadline":
        try:
            with anyio.fail_after(math.inf) as scope:

                def cancel() -> None:
                    scope.deadline = anyio.current_time()

                await run()
        except TimeoutError:
            cancelled = True
    elif how == "native":

        def cancel() -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

        task = asyncio.create_task(run())
        await asyncio.wait([task])
        cancelled = task.cancelled()
        if not cancelled:
            task.result()
    else:
        try:
            async with asyncio.timeout(None) as timeout:

                def cancel() -> None:
                    timeout.reschedule(asyncio.get_running_loop().time())

                await run()
        except TimeoutError:
            cancelled = True
    reached = count >= number
    assert cancelled is reached, f"cancellation at suspension {number} was lost"
    return reached


async def at_each_suspension(scene: Callable[[int], Awaitable[bool]]) -> int:
    """Play `scene(1)`, `scene(2)` and so on, until one is not reached; how many were."""
    number = 1
    while await scene(number):
        number += 1
    return number - 1
