"""What an exploration found."""

from __future__ import annotations

from typing import Any

import attrs

from mmunotify.errors import ExplorationFailed


@attrs.define
class Failure:
    """A schedule that fails."""

    error: BaseException
    """What it raised; an exception group of one is taken apart."""
    schedule: str
    """Replays it: `explore(scenario, replay=schedule)`, with the same options."""
    picture: str
    """What the tasks did, line by line."""
    number: int
    """Which of the schedules that were tried it was, from 1; a shrunk one fails likewise."""

    @property
    def kind(self) -> str:
        """The class of the error."""
        return type(self.error).__name__

    def report(self, again: str) -> str:
        """What went wrong, the picture, and `again`, which is what shows it again."""
        what = f"{self.kind}: {self.error}".removesuffix(": ")
        return f"{what}\n\n{self.picture}\n\nschedule {self.number}; to see it again: {again}"

    def __str__(self) -> str:
        return self.report(f"replay={self.schedule!r}")


@attrs.define
class Exploration:
    """What `explore()` has tried and seen. Repeated, it is the same but for `seconds`."""

    strategy: str
    schedules: int = 0
    """Executions that were run to their end, or to a failure."""
    states: int = 0
    """Points of choice and ends that were reached for the first time (in a tree), or at all."""
    steps: int = 0
    """Steps in all of them."""
    outcomes: dict[Any, int] = attrs.Factory(dict)
    """What the scenario returned, and in how many schedules."""
    failures: int = 0
    """Schedules that failed: at most one, unless all were asked for."""
    failure: Failure | None = None
    """The first of them."""
    exhausted: bool = False
    """Whether the strategy tried all that it would ever try."""
    bounds: tuple[str, ...] = ()
    """What was left out by bounds on what is tried."""
    unmatched: tuple[str, ...] = ()
    """Options `cancel` and `faults` that had no effect: nothing in the scenario is named so."""
    pruned: int = 0
    """Executions that were given up because all that follows was known."""
    seconds: float = 0.0

    def check(self) -> Exploration:
        """Raise `ExplorationFailed`, with the whole report, if there is a failure."""
        if self.failure is not None:
            raise ExplorationFailed(f"{self}\n\n{self.failure}") from self.failure.error
        return self

    def __str__(self) -> str:
        extent = "exhausted" if self.exhausted else "not exhausted"
        within = f" within {', '.join(self.bounds)}" if self.bounds else ""
        counts = ", ".join(
            (
                _counted(self.states, "state"),
                _counted(len(self.outcomes), "outcome"),
                _counted(self.failures, "failure"),
                f"{self.seconds:.3g} s",
            )
        )
        missed = "".join(f"; {option} met nothing of that name" for option in self.unmatched)
        schedules = _counted(self.schedules, "schedule")
        return f"{self.strategy}{within}: {schedules}, {extent}; {counts}{missed}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
