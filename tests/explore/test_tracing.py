"""The picture of a failure is traced, and nothing else ever is."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from mmunotify.testing.explore import choose, explore, fault_point

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    Scenario = Callable[[], Coroutine[Any, Any, Any]]


@pytest.fixture(autouse=True, params=["untraced", "traced"])
def tracer(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whoever traced before, a debugger or nobody, does so afterwards, and sees each test off."""

    def somebody(frame: object, event: str, arg: object) -> None:
        pass

    before = sys.gettrace()
    found = somebody if request.param == "traced" else None
    sys.settrace(found)
    try:
        yield
        assert sys.gettrace() is found
    finally:
        sys.settrace(before)


async def fails() -> None:
    await checkpoint()
    raise ValueError


async def deadlocks() -> None:
    await anyio.Event().wait()


async def never_ends() -> None:
    while True:
        await checkpoint()


async def awaits_what_is_not_anyios() -> None:
    await asyncio.sleep(0)


async def uses_a_thread() -> None:
    with contextlib.suppress(Exception):
        await anyio.to_thread.run_sync(print)


async def explores() -> None:
    explore(fails)


async def leaves_a_scope_open() -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(_enters)


async def _enters() -> None:
    anyio.CancelScope().__enter__()


async def does_not_close() -> None:
    try:
        await deadlocks()
    finally:
        while True:
            await checkpoint()


async def has_a_fault() -> None:
    fault_point("disk")


@pytest.mark.parametrize(
    "scenario",
    [
        fails,
        deadlocks,
        never_ends,
        awaits_what_is_not_anyios,
        uses_a_thread,
        explores,
        leaves_a_scope_open,
        does_not_close,
        has_a_fault,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_failure_leaves_no_tracer(scenario: Scenario) -> None:
    """However the execution ends that the picture is of."""
    found = explore(scenario, faults={"disk": 1}, steps=1_000, stall=500)
    assert found.failure is not None
    assert "step" in found.failure.picture


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["step", "check", "child"])
def test_interrupt_leaves_no_tracer(error: type[BaseException], where: str) -> None:
    """Ctrl-C comes while the failing schedule is being replayed for its picture."""
    runs = 0

    def interrupt() -> None:
        if runs == 2:
            raise error

    async def child() -> None:
        interrupt()

    async def scenario() -> None:
        nonlocal runs
        runs += 1
        await checkpoint()
        if where == "step":
            interrupt()
        if where == "child":
            async with anyio.create_task_group() as tg:
                tg.start_soon(child)
        await checkpoint()
        raise ValueError

    with pytest.raises(error):
        explore(scenario, invariant=interrupt if where == "check" else None)


def test_failure_that_does_not_come_again_leaves_no_tracer() -> None:
    """The schedule leads somewhere else when it is replayed."""
    runs = 0

    async def scenario() -> None:
        nonlocal runs
        runs += 1
        await checkpoint()
        if choose(*range(3 if runs == 2 else 1)) or runs == 2:
            raise ValueError
        await asyncio.sleep(0)

    found = explore(scenario, verify=0)
    assert found.failure is not None
    assert found.failure.kind == "Nondeterminism"
