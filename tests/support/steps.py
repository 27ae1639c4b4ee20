"""How tests drive coroutines: in one step, or until everybody waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")


def run_now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that must not suspend, and give its result."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    coroutine.close()
    raise AssertionError(f"{coroutine} has suspended")


async def settle() -> None:
    """Let the other tasks run until all of them wait for something."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()
