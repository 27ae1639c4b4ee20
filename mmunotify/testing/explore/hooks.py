"""What a scenario, or a fake that it uses, can say to the explorer.

All of it may stand in code that runs on a real event loop as well, where it says nothing.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from mmunotify.errors import FaultInjected

from .traps import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .execution import Execution

T = TypeVar("T")


def exploring() -> Execution | None:
    """The execution that the caller is part of; None outside an exploration."""
    return getattr(running, "execution", None)


def choose(*options: T, what: str = "choose") -> T:
    """One of `options`; each of them in some schedule, and the first outside an exploration.

    `what` names the choice in reports. Does not suspend.
    """
    execution = exploring()
    if execution is None or len(options) == 1:
        return options[0]
    return options[execution.decide(what, len(options), options)]


def always(check: Callable[[], object]) -> None:
    """Call `check()` after each step from now on: to raise or to return False is a failure."""
    execution = exploring()
    if execution is not None:
        execution.always(check)


def touches(*writes: object, reads: Iterable[object] = ()) -> None:
    """All that this step shares with other tasks is what its calls of this name.

    A step is what runs between two suspensions. Steps that touch different things, or only read the
    same, need not be tried in both orders, and `SleepSets` does not. Names are any hashable values.
    A step that wakes, starts, parks or cancels a task, or ends one, touches everything, and so does
    one that declares nothing; a step that declares less than it does hides interleavings.
    """
    execution = exploring()
    if execution is not None:
        read, written = execution.footprint or (frozenset(), frozenset())
        execution.footprint = read.union(reads), written.union(writes)


def fault_point(name: str, error: Callable[[], BaseException] | None = None) -> None:
    """Here something can fail: raises `error()`, or `FaultInjected`, when the schedule says so.

    It fails only if `explore(faults={...})` has a pattern that matches `name`, and only as many
    times in one execution as is said there. Costs a look-up outside an exploration.
    """
    execution = exploring()
    if execution is None or not execution.settings.faults:
        return
    if execution.faults is None:
        execution.faults = dict(execution.settings.faults)
    budget = execution.faults
    for pattern, left in budget.items():
        if fnmatchcase(name, pattern):
            execution.settings.unmatched.discard(pattern)
        if left and fnmatchcase(name, pattern):
            if execution.decide(f"fault point {name!r}", 2, ("goes well", "fails")):
                budget[pattern] = left - 1
                raise FaultInjected(f"fault point {name!r} failed") if error is None else error()
            return
