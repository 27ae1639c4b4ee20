"""One schedule again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmunotify.errors import ScheduleMismatch
from mmunotify.testing.explore.schedule import decode

from .base import Strategy

if TYPE_CHECKING:
    from mmunotify.testing.explore.execution import Execution
    from mmunotify.testing.explore.settings import Path


class Replay(Strategy):
    """The schedule that a failure printed, once.

    Raises `ScheduleMismatch` when it does not fit the scenario, or options of `explore()` that add
    choices (`cancel`, `time`, `faults`, `fairness`) are not those that it was found with.
    """

    shrinks = False

    def __init__(self, schedule: str) -> None:
        self.schedule = schedule
        self._choices = decode(schedule)
        self.start()
        self.decide = self.choose

    def __repr__(self) -> str:
        return f"Replay({self.schedule!r})"

    def start(self) -> None:
        """At the start of the schedule again."""
        self._place = 0
        self._begun = False

    def begin(self, path: Path) -> bool:
        """Once, from the start."""
        if self._begun:
            return False
        self._begun = True
        path.repeat(0)
        return True

    def choose(self, width: int) -> int:
        """What the schedule says, and the first option after its end."""
        place, self._place = self._place, self._place + 1
        if place >= len(self._choices):
            return 0
        if self._choices[place] >= width:
            raise ScheduleMismatch(
                f"choice {place} of the schedule {self.schedule!r} is option "
                f"{self._choices[place]}, but there are {width}: it belongs to another scenario, "
                "or to other options of explore()"
            )
        return self._choices[place]

    def ended(self, execution: Execution) -> None:
        """Is anything left of the schedule?"""
        left = self._choices[self._place :]
        if any(left):
            raise ScheduleMismatch(
                f"the scenario made {self._place} choices, and the schedule {self.schedule!r} has "
                f"{len(self._choices)}: it belongs to another scenario, or to other options of "
                "explore()"
            )
