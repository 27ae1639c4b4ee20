"""What is chosen besides whose turn it is: cancellations, time, faults, values, the network."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from mmunotify.errors import FaultInjected
from mmunotify.testing.explore import Network, choose, explore, exploring, fault_point

if TYPE_CHECKING:
    from collections.abc import Callable

# Cancellation ------------------------------------------------------------------------------------


async def three_points() -> str:
    """Suspends before "a", before "b" and before the end."""
    got = ""

    async def victim() -> None:
        nonlocal got
        try:
            await checkpoint()
            got += "a"
            await anyio.sleep(1)
            got += "b"
            await checkpoint()
        except anyio.get_cancelled_exc_class():
            got += "!"
            raise
        got += "."

    async with anyio.create_task_group() as tg:
        tg.start_soon(victim, name="victim")
    return got


def test_a_task_is_cancelled_at_each_of_its_suspension_points() -> None:
    """Once in an execution, or not at all, and never before it has begun.

    One that comes after the clock has woken it is delivered where it suspends next.
    """
    found = explore(three_points, cancel="victim").check()
    assert found.exhausted
    assert found.outcomes == {"ab.": 1, "!": 1, "a!": 1, "ab!": 2}


def test_patterns_say_who_is_cancelled() -> None:
    async def two() -> tuple[str, ...]:
        left: list[str] = []

        async def wait(name: str) -> None:
            await anyio.sleep(1)
            left.append(name)

        async with anyio.create_task_group() as tg:
            tg.start_soon(wait, "reader", name="reader")
            tg.start_soon(wait, "writer", name="writer")
        return tuple(sorted(left))

    def outcomes(cancel: bool | str | tuple[str, ...]) -> set[tuple[str, ...]]:
        return set(explore(two, cancel=cancel).check().outcomes)

    both, reader, writer = ("reader", "writer"), ("reader",), ("writer",)
    assert outcomes(False) == {both}
    assert outcomes("reader") == {both, writer}
    assert outcomes("w*") == {both, reader}
    assert outcomes(("reader", "writer")) == {both, reader, writer, ()}
    assert outcomes(True) == {both, reader, writer, ()}


def test_tasks_of_one_name_are_told_apart() -> None:
    async def two() -> tuple[int, ...]:
        left: list[int] = []

        async def wait(number: int) -> None:
            await anyio.sleep(1)
            left.append(number)

        async with anyio.create_task_group() as tg:
            for number in (1, 2):
                tg.start_soon(wait, number, name="wait")
        return tuple(sorted(left))

    assert set(explore(two, cancel="wait#2").check().outcomes) == {(1, 2), (1,)}


def test_shields_keep_it_away() -> None:
    async def shielded() -> bool:
        done = False

        async def victim() -> None:
            nonlocal done
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)
                await checkpoint()
                done = True
            await cancel_shielded_checkpoint()

        async with anyio.create_task_group() as tg:
            tg.start_soon(victim, name="victim")
        return done

    assert set(explore(shielded, cancel=True).check().outcomes) == {True}


def test_names_that_nobody_has_are_reported() -> None:
    found = explore(three_points, cancel=("victim", "viktim"), faults={"disk": 1}).check()
    assert found.unmatched == ("cancel='viktim'", "faults='disk'")
    assert "cancel='viktim' met nothing of that name" in str(found)


# Time --------------------------------------------------------------------------------------------


def test_a_deadline_strikes_wherever_it_can_when_time_is_a_choice() -> None:
    async def steps_before_the_deadline() -> int:
        steps = 0
        with anyio.move_on_after(1):
            for _ in range(3):
                await checkpoint()
                steps += 1
        return steps

    assert set(explore(steps_before_the_deadline).check().outcomes) == {3}
    found = explore(steps_before_the_deadline, time="choice").check()
    assert set(found.outcomes) == {0, 1, 2, 3}


def test_the_clock_moves_by_itself_and_nobody_sleeps() -> None:
    async def a_year() -> float:
        await anyio.sleep(365 * 86_400)
        return anyio.current_time()

    assert set(explore(a_year, schedules=10).check().outcomes) == {365 * 86_400}


# Faults and values -------------------------------------------------------------------------------


async def three_writes() -> tuple[str, ...]:
    done = []
    for name in ("disk.write", "disk.sync", "net.send"):
        try:
            fault_point(name)
        except FaultInjected:
            done.append(name)
    return tuple(done)


@pytest.mark.parametrize(
    ("faults", "failed"),
    [
        ({}, {()}),
        ({"disk.write": 1}, {(), ("disk.write",)}),
        ({"disk.*": 1}, {(), ("disk.write",), ("disk.sync",)}),
        ({"disk.*": 2}, {(), ("disk.write",), ("disk.sync",), ("disk.write", "disk.sync")}),
        ({"disk.sync": 0, "net.*": 1}, {(), ("net.send",)}),
    ],
)
def test_fault_points_fail_as_often_as_is_said(
    faults: dict[str, int], failed: set[tuple[str, ...]]
) -> None:
    """At any of their calls."""
    found = explore(three_writes, faults=faults).check()
    assert found.exhausted
    assert set(found.outcomes) == failed


def test_fault_points_raise_what_the_real_thing_would() -> None:
    async def writes() -> str:
        try:
            fault_point("disk", lambda: OSError(28, "No space left on device"))
        except OSError as error:
            return str(error.strerror)
        return "written"

    found = explore(writes, faults={"disk": 1}).check()
    assert set(found.outcomes) == {"written", "No space left on device"}


async def test_hooks_say_nothing_outside_an_exploration() -> None:
    assert exploring() is None
    assert choose(1, 2, 3) == 1
    fault_point("disk")


def test_values_are_chosen_in_every_combination() -> None:
    async def two_values() -> tuple[int, str]:
        return choose(1, 2, 3), choose("a", "b")

    found = explore(two_values).check()
    assert found.outcomes == dict.fromkeys(((n, c) for n in (1, 2, 3) for c in "ab"), 1)


# The network -------------------------------------------------------------------------------------


def messages(count: int, **budgets: int) -> Callable[[], object]:
    async def scenario() -> tuple[int, ...]:
        here, there = Network(**budgets).link()
        for number in range(count):
            await here.send(number)
        await here.aclose()
        return tuple([message async for message in there])

    return scenario


@pytest.mark.parametrize(
    ("budgets", "received"),
    [
        ({}, {(0, 1, 2)}),
        ({"loss": 1}, {(0, 1, 2), (1, 2), (0, 2), (0, 1)}),
        ({"duplication": 1}, {(0, 1, 2), (0, 0, 1, 2), (0, 1, 1, 2), (0, 1, 2, 2)}),
        ({"reordering": 9}, set(permutations(range(3)))),
        ({"reordering": 1}, {(0, 1, 2), (1, 0, 2), (0, 2, 1)}),
    ],
)
def test_messages_are_lost_doubled_and_overtaken(
    budgets: dict[str, int], received: set[tuple[int, ...]]
) -> None:
    found = explore(messages(3, **budgets)).check()  # type: ignore[arg-type]
    assert found.exhausted
    assert set(found.outcomes) == received


async def test_a_network_is_a_pair_of_streams_on_any_event_loop() -> None:
    network = Network(loss=5, duplication=5, reordering=5)
    here, there = network.link("here", "there")
    received: list[int] = []

    async def receive() -> None:
        received.extend([message async for message in there])

    async with anyio.create_task_group() as tg:
        tg.start_soon(receive)
        for number in range(3):
            await here.send(number)
        await here.aclose()
    assert received == [0, 1, 2]
    counts = network.statistics()
    assert (counts.sent, counts.received, counts.lost, counts.duplicated) == (3, 3, 0, 0)
    with pytest.raises(anyio.ClosedResourceError):
        await here.send(3)
    with pytest.raises(anyio.BrokenResourceError):
        await there.send(3)
    with pytest.raises(anyio.EndOfStream):
        await there.receive()
