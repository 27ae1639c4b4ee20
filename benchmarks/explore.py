"""The explorer: schedules a second, against other explorers of async Python, on one program."""

from __future__ import annotations

import asyncio
from time import perf_counter_ns
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

from mmunotify.locks import lockdep
from mmunotify.testing.explore import explore as explore_schedules

from ._bench import Row, at_least, bare_calls, peer, printed, undisturbed, unmeasured

if TYPE_CHECKING:
    from collections.abc import Callable


class Shadow:
    """A page table, a copy of it, and the count that tells the copy of changes."""

    def __init__(self) -> None:
        self.table = {0: 7}
        self.copy: dict[int, int] = {}
        self.seq = 0

    async def invalidate(self) -> None:
        self.copy.pop(0, None)
        await checkpoint()
        del self.table[0]
        await checkpoint()
        self.copy.pop(0, None)
        self.seq += 1
        await checkpoint()

    async def fault(self) -> None:
        retry = True
        while retry:
            seen = self.seq
            await checkpoint()
            frame = self.table.get(0)
            await checkpoint()
            if not (retry := seen != self.seq) and frame is not None:
                self.copy[0] = frame

    def holds(self) -> bool:
        return not self.copy or self.copy == self.table


async def scenario() -> None:
    shadow = Shadow()
    async with anyio.create_task_group() as tg:
        tg.start_soon(shadow.invalidate)
        tg.start_soon(shadow.fault)
    assert shadow.holds()


def ours() -> int:
    """Every schedule, depth first; none is run again to see that it repeats, as by the others."""
    found = explore_schedules(scenario, verify=0)
    assert found.exhausted
    assert found.failure is None
    return found.schedules


def with_frontrun() -> Callable[[], int] | str:
    """By its default, which is DPOR within two preemptions."""
    frontrun = peer("frontrun")
    if isinstance(frontrun, str):
        return frontrun

    async def explored() -> int:
        found = await frontrun.explore(
            setup=Shadow, workers=[Shadow.invalidate, Shadow.fault], invariant=Shadow.holds
        )
        assert found.property_holds
        return int(found.num_explored)

    return lambda: asyncio.run(explored())


def with_simloom() -> Callable[[], int] | str:
    """Systematically, within two delays; not to the end, which it does not come to."""
    simloom = peer("simloom")
    if isinstance(simloom, str):
        return simloom

    def explored() -> int:
        found = simloom.explore_systematic(scenario, max_schedules=20)
        assert not found.failed
        return int(found.schedules)

    return explored


def _per_schedule(*explored: Callable[[], int], rounds: int) -> list[float]:
    """Nanoseconds, the best of so many rounds, in turns."""
    best = [float("inf")] * len(explored)
    with undisturbed():
        for _ in range(rounds):
            for index, explore in enumerate(explored):
                began = perf_counter_ns()
                schedules = explore()
                best[index] = min(best[index], (perf_counter_ns() - began) / schedules)
    return best


def run() -> list[Row]:
    rows: list[Row] = []
    with lockdep.checking(False):
        for name, explored in (("frontrun", with_frontrun()), ("simloom", with_simloom())):
            title = f"a schedule, {name} : ours"
            if isinstance(explored, str):
                rows.append(unmeasured(title, ">= 300", name, explored))
            else:
                mine, theirs = _per_schedule(ours, explored, rounds=40)
                rows.append(at_least(title, theirs / mine, 300, name))
        found = explore_schedules(scenario)
        steps = found.steps / found.schedules

        def a_thousand_calls() -> int:
            bare_calls(1000)
            return 1000

        mine, call = _per_schedule(ours, a_thousand_calls, rounds=300)
    return [
        *rows,
        printed("a step, with its share of all else", mine / call / steps, "a call", "calls"),
        printed("schedules in a second", 1e9 / mine, f"{steps:.1f} steps each", "a second"),
    ]
