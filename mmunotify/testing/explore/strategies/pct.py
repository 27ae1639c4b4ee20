"""Probabilistic concurrency testing: random priorities, and few changes of them."""

from __future__ import annotations

from random import Random as Generator
from typing import TYPE_CHECKING, Final

from mmunotify.errors import BadExploration
from mmunotify.testing.explore.traps import running

from .base import Strategy

if TYPE_CHECKING:
    from mmunotify.testing.explore.execution import Execution
    from mmunotify.testing.explore.settings import Path

_OFFER: Final = 1 / 8
"""How often a cancellation, or the clock, is taken where it is on offer."""


class PCT(Strategy):
    """The task with the highest priority runs; `depth - 1` times it is made the lowest.

    A bug that needs `depth` ordering constraints is found by each schedule of `k` choices and `n`
    tasks with a probability of at least 1/(n * k ** (depth - 1)). The first execution measures `k`.
    Source: Burckhardt et al., A randomized scheduler with probabilistic guarantees of finding bugs,
    2010.
    """

    endless = True

    def __init__(self, depth: int = 3, seed: int = 0) -> None:
        if depth < 1:
            raise BadExploration(f"depth={depth}, expected at least 1")
        self.depth = depth
        self.seed = seed
        self.start()

    def __repr__(self) -> str:
        return f"PCT(depth={self.depth}, seed={self.seed})"

    def start(self) -> None:
        """At the first schedule again."""
        self._random = Generator(self.seed)
        self._length = 1
        """The most choices that an execution had so far."""

    def begin(self, path: Path) -> bool:
        """Repeat nothing; draw the places at which priorities will change."""
        path.repeat(0)
        self._place = 0
        self._priorities: dict[int, float] = {}
        changes = min(self.depth - 1, self._length)
        places = self._random.sample(range(self._length), changes)
        self._changes = dict(zip(places, range(-1, -changes - 1, -1), strict=True))
        return True

    def choose(self, width: int) -> int:
        """The option of the task with the highest priority; sometimes one that is no task."""
        tasks = running.execution.runnable[:width]
        if len(tasks) < width and (not tasks or self._random.random() < _OFFER):
            return self._random.randrange(len(tasks), width)
        priorities = self._priorities
        for task in tasks:
            if task.number not in priorities:
                priorities[task.number] = self._random.random()
        highest = max(tasks, key=lambda task: priorities[task.number])
        lowered = self._changes.get(self._place)
        self._place += 1
        if lowered is not None:
            priorities[highest.number] = lowered
            highest = max(tasks, key=lambda task: priorities[task.number])
        return tasks.index(highest)

    def decide(self, width: int) -> int:
        """Any value."""
        return self._random.randrange(width)

    def ended(self, execution: Execution) -> None:
        """Learn how long executions are."""
        self._length = max(self._length, self._place)
