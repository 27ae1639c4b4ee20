"""Depth first, without the orders of steps that declare that they do not touch each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from mmunotify.testing.explore.settings import Pruned
from mmunotify.testing.explore.traps import PARKED, running

from .base import Strategy

if TYPE_CHECKING:
    from mmunotify.testing.explore.settings import Footprint, Path


@attrs.define
class _Point:
    """A choice on the path that is being explored."""

    tasks: list[int]
    """The tasks that its first options would run, by number."""
    width: int
    index: int
    asleep: dict[int, Footprint]
    """Tasks whose next step was tried before, and nothing that touches it has happened since."""
    tried: dict[int, Footprint | None]
    """What the next steps of the options that were tried touch."""

    def next(self) -> bool:
        """Go to the next option that is not asleep; False when there is none."""
        while self.index + 1 < self.width:
            self.index += 1
            if self.index >= len(self.tasks) or self.tasks[self.index] not in self.asleep:
                return True
        return False

    @property
    def task(self) -> int | None:
        """The task that the option runs, if it is one that runs a task."""
        return self.tasks[self.index] if self.index < len(self.tasks) else None


class SleepSets(Strategy):
    """`DFS`, but two steps that touch different things are tried in one order only.

    What a step touches it says by `touches()`; steps that say nothing are tried in every order. All
    outcomes, deadlocks and failed assertions are found; an invariant that looks, between two steps,
    at things that both declared apart may miss a state. Source: Godefroid, Partial-order methods
    for the verification of concurrent systems, 1996.
    """

    every_step = True
    shrinks = False

    def __init__(self) -> None:
        self.start()

    def __repr__(self) -> str:
        return "SleepSets()"

    def start(self) -> None:
        """At the first schedule again."""
        self._points: list[_Point] = []
        self._depth = 0
        self._begun = False

    def begin(self, path: Path) -> bool:
        """Go to the next option of the last choice that has one."""
        path.repeat(0)
        points = self._points
        while points and not points[-1].next():
            points.pop()
        done = self._begun and not points
        self._begun = True
        self._depth = 0
        return not done

    def choose(self, width: int) -> int:
        """As before, or else the first option that is not asleep."""
        tasks = [task.number for task in running.execution.runnable[:width]]
        return self._choose(tasks, width)

    def decide(self, width: int) -> int:
        """As before, or else the first value."""
        return self._choose([], width)

    def _choose(self, tasks: list[int], width: int) -> int:
        asleep = self._look_back()
        if self._depth == len(self._points):
            point = _Point(tasks, width, -1, asleep, {})
            if not point.next():
                raise Pruned
            self._points.append(point)
        point = self._points[self._depth]
        self._depth += 1
        return point.index

    def _look_back(self) -> dict[int, Footprint]:
        """Learn what the latest step touched; who sleeps on after it."""
        if self._depth == 0:
            return {}
        point, execution = self._points[self._depth - 1], running.execution
        task = point.task
        loud = execution.loud or execution.current.state >= PARKED
        touched = None if task is None or loud else execution.footprint
        asleep = {
            sleeper: footprint
            for sleeper, footprint in (*point.asleep.items(), *point.tried.items())
            if sleeper != task and footprint and touched and _independent(footprint, touched)
        }
        if task is not None:
            point.tried[task] = touched
        return asleep


def _independent(one: Footprint, other: Footprint) -> bool:
    (reads, writes), (other_reads, other_writes) = one, other
    return writes.isdisjoint(other_writes | other_reads) and other_writes.isdisjoint(reads)
