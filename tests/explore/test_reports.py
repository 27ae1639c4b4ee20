"""What is said of a schedule that fails, and of a scenario that cannot be explored."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from mmunotify.errors import BadExploration, ExplorationFailed
from mmunotify.testing.explore import Exploration, Failure, Random, always, choose, explore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


def failure_of(found: Exploration) -> Failure:
    assert found.failure is not None
    return found.failure


# Deadlock and livelock ---------------------------------------------------------------------------


async def crossed() -> None:
    a, b = anyio.Lock(), anyio.Lock()

    async def both(first: anyio.Lock, second: anyio.Lock) -> None:
        async with first, second:
            pass

    async with anyio.create_task_group() as tg:
        tg.start_soon(both, a, b, name="ab")
        tg.start_soon(both, b, a, name="ba")


def test_deadlock_says_who_waits_for_what_and_where() -> None:
    failure = failure_of(explore(crossed))
    assert failure.kind == "Deadlock"
    message = str(failure.error)
    assert "main waits for <TaskGroup with 2 tasks>" in message
    assert "ab waits for <Lock held by ba>" in message
    assert "ba waits for <Lock held by ab>" in message
    assert re.search(r"at tests/explore/test_reports\.py:\d+ in crossed\.both|in both", message)


def test_deadlock_of_an_event_says_where_it_was_made() -> None:
    async def waits() -> None:
        await anyio.Event().wait()

    assert "main waits for <Event 1, made at " in str(failure_of(explore(waits)))


def test_livelock_is_steps_without_progress() -> None:
    async def spins() -> None:
        while True:
            await checkpoint()

    failure = failure_of(explore(spins, stall=200))
    assert failure.kind == "Livelock"
    assert "nobody was woken, started or finished" in str(failure.error)
    assert "main can run" in str(failure.error)
    assert "such steps in a row" in failure.picture


def test_livelock_names_a_clock_that_stands_still() -> None:
    async def polls() -> None:
        with anyio.fail_after(5):
            while True:
                await checkpoint()

    failure = failure_of(explore(polls, stall=200))
    assert "the clock stands still as long as somebody can run" in str(failure.error)


def test_livelock_is_also_to_be_busy_for_ever() -> None:
    async def ping_pong() -> None:
        events = [anyio.Event(), anyio.Event()]

        async def player(me: int) -> None:
            while True:
                await events[me].wait()
                events[me] = anyio.Event()
                events[1 - me].set()

        async with anyio.create_task_group() as tg:
            tg.start_soon(player, 0)
            tg.start_soon(player, 1)
            events[0].set()

    failure = failure_of(explore(ping_pong, steps=500))
    assert failure.kind == "Livelock"
    assert "not over after" in str(failure.error)


# Nondeterminism ----------------------------------------------------------------------------------


def test_a_hidden_input_is_found_by_running_a_schedule_twice() -> None:
    runs = itertools.count()

    async def differs() -> None:
        async with anyio.create_task_group() as tg:
            for _ in range(1 + next(runs) % 2):
                tg.start_soon(checkpoint)

    failure = failure_of(explore(differs))
    assert failure.kind == "Nondeterminism"


def test_a_failure_that_does_not_come_again_is_nondeterminism() -> None:
    runs = itertools.count()

    async def fails_once() -> None:
        await checkpoint()
        assert next(runs) != 3

    failure = failure_of(explore(fails_once, strategy="random", verify=0))
    assert failure.kind == "Nondeterminism"
    assert "run again" in str(failure.error)


def test_options_that_went_away_are_nondeterminism() -> None:
    runs = itertools.count()

    async def fewer() -> None:
        choose(*range(3 if next(runs) < 2 else 2))

    failure = failure_of(explore(fewer, verify=0))
    assert failure.kind == "Nondeterminism"
    assert "option 2 was taken at choice 0 before, and now there are 2" in str(failure.error)


# Invariants --------------------------------------------------------------------------------------


async def for_one_step(value: list[int]) -> None:
    await checkpoint()
    value[0] = 1
    await checkpoint()
    value[0] = 0


def must_be_zero(value: list[int]) -> Callable[[], bool]:
    def is_zero() -> bool:
        return value[0] == 0

    return is_zero


def must_assert_zero(value: list[int]) -> Callable[[], None]:
    def is_zero() -> None:
        assert value[0] == 0, "not zero"

    return is_zero


@pytest.mark.parametrize("how", ["argument", "hook"])
@pytest.mark.parametrize("must", [must_be_zero, must_assert_zero])
def test_an_invariant_is_looked_at_after_every_step(how: str, must: Any) -> None:
    """Also one that is broken for one step only, and at the end holds again."""
    value = [0]

    async def scenario() -> None:
        value[0] = 0
        if how == "hook":
            always(must(value))
        await for_one_step(value)

    failure = failure_of(explore(scenario, invariant=must(value) if how == "argument" else None))
    assert failure.kind == "InvariantViolated"
    expected = "is_zero is False" if must is must_be_zero else "is_zero: not zero"
    assert expected in str(failure.error)
    assert "value[0] = 1" in failure.picture.splitlines()[-2]


# The whole report --------------------------------------------------------------------------------


async def lost_update() -> None:
    count = 0

    async def increment() -> None:
        nonlocal count
        seen = count
        await checkpoint()
        count = seen + 1

    async with anyio.create_task_group() as tg:
        tg.start_soon(increment, name="one")
        tg.start_soon(increment, name="two")
    assert count == 2, f"count is {count}"


def test_report_has_the_error_the_picture_and_the_schedule() -> None:
    with pytest.raises(ExplorationFailed) as raised:
        explore(lost_update).check()
    assert isinstance(raised.value.__cause__, AssertionError)
    report = str(raised.value)
    first, _, rest = report.partition("\n\n")
    assert first.startswith("DFS(): 2 schedules, not exhausted; 5 states, 1 outcome, 1 failure, ")
    assert rest.startswith("AssertionError: count is 1")
    assert rest.endswith("schedule 2; to see it again: replay='01'")


def test_picture_has_a_column_for_each_task_and_its_lines_in_order() -> None:
    where, head, *body = failure_of(explore(lost_update)).picture.splitlines()
    assert where == "lines of test_reports.py"
    columns = {name: head.index(name) for name in ("main", "one", "two")}
    assert columns["main"] < columns["one"] < columns["two"]

    def at(line: str) -> list[int]:
        return [row.index(line) - 5 for row in body if row.endswith(line)]

    one, two = columns["one"], columns["two"]
    assert at("seen = count") == [one, two]
    assert at("count = seen + 1") == [two, one]
    assert body[-1].strip() == "! AssertionError: count is 1"


def test_picture_notes_what_was_chosen_besides() -> None:
    async def scenario() -> None:
        async def victim() -> None:
            await anyio.sleep_forever()

        with anyio.move_on_after(5):
            async with anyio.create_task_group() as tg:
                tg.start_soon(victim, name="victim")
        assert choose("tails", "heads", what="coin") == "tails"

    failure = failure_of(explore(scenario, cancel="victim", time="choice", schedules=100))
    assert "* coin: heads" in failure.picture


def test_every_failure_is_counted_when_it_does_not_stop() -> None:
    found = explore(lost_update, stop=False)
    assert (found.schedules, found.failures, found.exhausted) == (6, 4, True)
    assert failure_of(found).number == 2


def test_progress_is_told_of_each_schedule() -> None:
    seen: list[int] = []
    found = explore(crossed, stop=False, progress=lambda found: seen.append(found.schedules))
    assert seen == list(range(1, found.schedules + 1))


def test_dropped_generators_are_closed() -> None:
    """At once, and cancelled where they await, so that nothing depends on the collector."""
    closed: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        except GeneratorExit:
            closed.append("exit")
            raise
        finally:
            try:
                await checkpoint()
            except anyio.get_cancelled_exc_class():
                closed.append("cancelled")
                raise

    async def drops() -> None:
        async for _ in numbers():
            break
        await checkpoint()
        assert closed == ["exit", "cancelled"]
        closed.clear()

    explore(drops).check()


# What is no scenario -----------------------------------------------------------------------------


def plain() -> None: ...


async def takes(something: int) -> None: ...


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (plain, "plain returned None: expected a function of `async def`"),
        (takes, "takes is called without arguments: missing a required argument: 'something'"),
        (3, "3 is no scenario: expected a function of `async def`"),
    ],
)
def test_what_is_no_scenario_is_refused(scenario: Any, message: str) -> None:
    with pytest.raises(BadExploration, match=f"^{re.escape(message)}$"):
        explore(scenario)


def test_a_coroutine_is_no_scenario() -> None:
    """And is closed, so that nothing warns that it was never awaited."""
    scenario: Any = lost_update()
    with pytest.raises(
        BadExploration, match=r"lost_update\(\) can run once: expected the function"
    ):
        explore(scenario)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedules": 0}, "schedules=0, expected a number above 0"),
        ({"seconds": -1}, "seconds=-1, expected a number above 0"),
        ({"fairness": 0}, "fairness=0, expected a number above 0"),
        ({"verify": -1}, "verify=-1, expected a number from 0 on"),
        ({"faults": {"disk": -1}}, "disk=-1, expected a number from 0 on"),
        ({"time": "real"}, "time='real', expected 'auto' or 'choice'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(BadExploration, match=f"^{re.escape(message)}$"):
        explore(lost_update, **options)


def test_outcomes_are_hashable() -> None:
    async def returns_a_list() -> list[int]:
        return []

    with pytest.raises(TypeError, match=r"the scenario returned \[\]; outcomes are counted"):
        explore(returns_a_list)


def test_an_exploration_says_how_far_it_went() -> None:
    found = explore(crossed, strategy=Random(3), schedules=1)
    assert re.fullmatch(
        r"Random\(seed=3\): 1 schedule, not exhausted; \d+ states, \d outcomes?, \d failures?, "
        r"[\d.e-]+ s",
        str(found),
    )
