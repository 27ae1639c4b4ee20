"""Two runs of one schedule, compared: is the schedule all that a run depends on?"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

from .traps import running

if TYPE_CHECKING:
    from .events import Event
    from .task import Task


class Trace:
    """Watches an execution, and keeps what ran when, and who else could have."""

    def __init__(self) -> None:
        self._seen: list[str] = []

    def made(self, event: Event) -> None:
        """Of no interest."""

    def chosen(self, what: str, index: int, width: int) -> None:
        """Keep what was chosen, and of what."""
        execution = running.execution
        ready = ", ".join(execution.name(task) for task in execution.runnable)
        self._seen.append(f"{what}, option {index} of {width}, with {ready or 'nobody'} ready")

    def step_begins(self, task: Task) -> None:
        """Keep whose step it is."""
        self._seen.append(f"step of {running.execution.name(task)}")

    def step_ends(self, task: Task) -> None:
        """Keep how it ended."""
        self._seen.append(f"which left it in state {task.state}")

    def broken_off(self) -> None:
        """Of no interest."""

    def difference(self, other: Trace) -> str | None:
        """The first one; None when the two are the same."""
        for place, (one, two) in enumerate(zip_longest(self._seen, other._seen)):
            if one != two:
                return f"at event {place}: {one or 'the end'}; {two or 'the end'}"
        return None
