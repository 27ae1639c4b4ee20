"""Which schedules a strategy tries, how many there are, and what becomes of one that fails."""

from __future__ import annotations

from itertools import pairwise, product
from math import comb
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from mmunotify.errors import ExplorationFailed, ScheduleMismatch
from mmunotify.testing.explore import (
    DFS,
    PCT,
    Drawn,
    Hypothesis,
    Random,
    SleepSets,
    choose,
    explore,
    touches,
)
from mmunotify.testing.explore.schedule import decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from mmunotify.testing.explore import Strategy

    Scenario = Callable[[], Coroutine[Any, Any, Any]]


def taking_turns(steps: int, *names: str) -> Scenario:
    """Each task writes its name down `steps` times, with a suspension in between."""

    async def scenario() -> str:
        order: list[str] = []

        async def turn(name: str) -> None:
            for left in reversed(range(steps)):
                order.append(name)
                if left:
                    await checkpoint()

        async with anyio.create_task_group() as tg:
            for name in names:
                tg.start_soon(turn, name, name=name)
        return "".join(order)

    return scenario


async def spins() -> None:
    async def spin() -> None:
        while True:
            await checkpoint()

    async with anyio.create_task_group() as tg:
        tg.start_soon(spin)
        tg.start_soon(spin)


# Depth first -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_depth_first_tries_each_order_once(steps: int) -> None:
    """As many as there are ways to merge two lists of steps, or more only where nobody sees it."""
    found = explore(taking_turns(steps, "a", "b")).check()
    assert found.exhausted
    assert found.bounds == ()
    assert len(found.outcomes) == comb(2 * steps, steps)
    assert set(found.outcomes.values()) == {1}


@pytest.mark.parametrize("bound", [0, 1, 2, 3])
def test_preemptions_are_bounded(bound: int) -> None:
    """Only orders in which a task is left so often before it is done; and it says what it left."""
    found = explore(taking_turns(3, "a", "b"), strategy=DFS(preemptions=bound)).check()
    assert found.exhausted
    assert found.bounds == (f"preemptions <= {bound}",)
    every = ("".join(order) for order in product("ab", repeat=6) if order.count("a") == 3)
    assert set(found.outcomes) == {order for order in every if preemptions(order) <= bound}


def preemptions(order: str) -> int:
    return sum(
        here != following and here in order[place + 1 :]
        for place, (here, following) in enumerate(pairwise(order))
    )


def test_a_bound_that_leaves_nothing_out_is_not_reported() -> None:
    found = explore(taking_turns(2, "a", "b"), strategy=DFS(preemptions=9)).check()
    assert (found.exhausted, found.bounds) == (True, ())


def test_a_budget_ends_an_exploration() -> None:
    found = explore(taking_turns(4, "a", "b"), schedules=10).check()
    assert (found.schedules, found.exhausted) == (10, False)


# Sleep sets --------------------------------------------------------------------------------------


def writers(*wheres: str) -> Scenario:
    """Each task writes twice where it says."""

    async def scenario() -> Any:
        order: dict[str, str] = dict.fromkeys(wheres, "")

        async def write(name: int, where: str) -> None:
            for _ in range(2):
                touches(where)
                order[where] += str(name)
                await checkpoint()

        async with anyio.create_task_group() as tg:
            for number, where in enumerate(wheres):
                tg.start_soon(write, number, where)
        return tuple(order.values())

    return scenario


@pytest.mark.parametrize("wheres", ["xx", "xy", "xyx", "xyz"])
def test_sleep_sets_reach_the_same_outcomes_by_fewer_schedules(wheres: str) -> None:
    every = explore(writers(*wheres)).check()
    fewer = explore(writers(*wheres), strategy=SleepSets()).check()
    assert fewer.exhausted
    assert set(fewer.outcomes) == set(every.outcomes)
    if len(set(wheres)) > 1:
        assert fewer.schedules < every.schedules
    else:
        assert fewer.schedules <= every.schedules


def test_steps_that_declare_nothing_are_tried_in_every_order() -> None:
    every = explore(taking_turns(3, "a", "b")).check()
    assert set(explore(taking_turns(3, "a", "b"), strategy=SleepSets()).outcomes) == set(
        every.outcomes
    )


# At random ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Random, lambda seed: PCT(3, seed)], ids=["random", "pct"])
def test_seeds_differ_and_repeat(make: Callable[[int], Strategy]) -> None:
    def outcomes(seed: int) -> Any:
        found = explore(taking_turns(4, "a", "b", "c"), strategy=make(seed), schedules=50)
        return found.check().outcomes

    assert outcomes(1) == outcomes(1)
    assert outcomes(1) != outcomes(2)


def test_endless_strategies_stop() -> None:
    found = explore(taking_turns(1, "a", "b"), strategy="random", schedules=30).check()
    assert (found.schedules, found.exhausted) == (30, False)


def needs_three_orders() -> Scenario:
    """Fails when `b` is passed between the steps of `a`, and then once more."""

    async def scenario() -> None:
        stage = 0

        async def one() -> None:
            nonlocal stage
            for at in (0, 2):
                for _ in range(3):
                    await checkpoint()
                stage += stage == at

        async def other() -> None:
            nonlocal stage
            for _ in range(6):
                await checkpoint()
            stage += stage == 1
            await checkpoint()

        async with anyio.create_task_group() as tg:
            tg.start_soon(one)
            tg.start_soon(other)
        assert stage < 3

    return scenario


def test_pct_finds_what_needs_as_many_orders_as_its_depth() -> None:
    assert explore(needs_three_orders(), strategy=PCT(depth=3), schedules=2_000).failure
    assert not explore(needs_three_orders(), strategy=PCT(depth=1), schedules=2_000).failure


# Hypothesis --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_hypothesis_draws_each_schedule_once(steps: int) -> None:
    """And knows when there are no more."""
    found = explore(taking_turns(steps, "a", "b"), strategy=Hypothesis(100)).check()
    assert (found.schedules, found.exhausted) == (comb(2 * steps, steps), True)
    assert set(found.outcomes.values()) == {1}


def test_hypothesis_stops_at_what_it_was_told() -> None:
    found = explore(taking_turns(4, "a", "b"), strategy=Hypothesis(20)).check()
    assert (found.schedules, found.exhausted) == (20, False)
    found = explore(taking_turns(4, "a", "b"), strategy=Hypothesis(20), schedules=10).check()
    assert (found.schedules, found.exhausted) == (10, False)
    found = explore(taking_turns(3, "a", "b", "c"), strategy="hypothesis", schedules=130).check()
    assert (found.schedules, found.exhausted) == (130, False)


def test_hypothesis_gives_a_long_program_its_end() -> None:
    """An execution with more choices than can be drawn is run all the same."""
    found = explore(spins, strategy=Hypothesis(5), stall=3_000)
    assert found.failure is not None
    assert found.failure.kind == "Livelock"
    assert "choices <= 2000" in found.bounds


def test_hypothesis_fails_once() -> None:
    """Other schedules that fail are not counted while one is made simpler."""

    async def fails() -> None:
        assert choose(*range(10)) < 5

    found = explore(fails, strategy=Hypothesis(100))
    assert (found.failures, found.exhausted) == (1, False)
    assert found.failure is not None
    assert found.failure.schedule == "5"


def test_drawn_shrinks_what_the_test_draws_together_with_the_schedule() -> None:
    """Hypothesis is left with the fewest tasks, and a schedule that is hardly one."""
    smallest: tuple[int, str] | None = None

    @settings(database=None, derandomize=True, deadline=None, max_examples=200)
    @given(st.integers(1, 6), st.data())
    def test(tasks: int, data: st.DataObject) -> None:
        nonlocal smallest

        async def scenario() -> None:
            count = 0

            async def increment() -> None:
                nonlocal count
                seen = count
                await checkpoint()
                count = seen + 1

            async with anyio.create_task_group() as tg:
                for _ in range(tasks):
                    tg.start_soon(increment)
            assert count == tasks

        found = explore(scenario, strategy=Drawn(data))
        if found.failure is not None:
            smallest = tasks, found.failure.schedule
        found.check()

    with pytest.raises(ExplorationFailed, match="AssertionError"):
        test()
    assert smallest == (2, "01")


# All of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [DFS(), DFS(preemptions=1), SleepSets(), Random(), PCT(), Hypothesis()],
    ids=repr,
)
def test_a_strategy_that_was_used_begins_anew(strategy: Strategy) -> None:
    """It does not take what it has tried in another exploration for done."""
    first = explore(taking_turns(3, "a", "b"), strategy=strategy, schedules=100).check()
    again = explore(taking_turns(3, "a", "b"), strategy=strategy, schedules=100).check()
    first.seconds = again.seconds = 0
    assert first == again
    assert first.schedules > 1


# A schedule that fails ---------------------------------------------------------------------------


def lost_update(tasks: int, steps: int) -> Scenario:
    async def scenario() -> None:
        count = 0

        async def increment() -> None:
            nonlocal count
            for _ in range(steps):
                seen = count
                await checkpoint()
                count = seen + 1

        async with anyio.create_task_group() as tg:
            for _ in range(tasks):
                tg.start_soon(increment)
        assert count == tasks * steps

    return scenario


@pytest.mark.parametrize("seed", range(10))
def test_a_failing_schedule_is_made_simple(seed: int) -> None:
    """Dozens of choices at random become the one preemption that matters."""
    found = explore(lost_update(4, 5), strategy=Random(seed))
    assert found.failure is not None
    assert sum(map(bool, decode(found.failure.schedule))) == 1


def test_a_long_failure_is_made_simple_in_known_time() -> None:
    """Even where each attempt takes thousands of steps."""
    found = explore(lost_update(3, 3_000), strategy="random", stall=100_000)
    assert found.failure is not None
    assert found.failure.kind == "AssertionError"


def test_replay_tells_when_the_schedule_does_not_fit() -> None:
    for schedule in ("9", "0000000000000000001"):
        with pytest.raises(ScheduleMismatch, match="another scenario"):
            explore(taking_turns(2, "a", "b"), replay=schedule)
    for schedule in ("?", "1{", "(x)"):
        with pytest.raises(ScheduleMismatch, match="is no schedule"):
            explore(taking_turns(2, "a", "b"), replay=schedule)


def test_replay_runs_one_schedule() -> None:
    every = explore(taking_turns(2, "a", "b")).check()
    found = explore(taking_turns(2, "a", "b"), replay="01").check()
    assert found.schedules == 1
    assert set(found.outcomes) < set(every.outcomes)
    assert "abab" not in found.outcomes


@given(st.lists(st.integers(0, 100) | st.just(0), max_size=40))
def test_schedules_are_strings(choices: list[int]) -> None:
    """Nothing but zeros at the end is lost."""
    text = encode(choices)
    assert " " not in text
    decoded = decode(text)
    assert decoded + [0] * (len(choices) - len(decoded)) == choices or decoded == [0]
    assert encode(decoded) == text


def test_strategies_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="preemptions=-1"):
        DFS(preemptions=-1)
    with pytest.raises(ValueError, match="depth=0"):
        PCT(depth=0)
    with pytest.raises(ValueError, match="strategy='bfs', expected one of dfs, sleep-sets, random"):
        explore(spins, strategy="bfs")
