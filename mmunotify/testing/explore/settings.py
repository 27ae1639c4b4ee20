"""What an exploration is told, and what its parts tell each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .events import Event
    from .task import Task

Footprint = tuple[frozenset[object], frozenset[object]]
"""What a step reads, and what it writes."""


class Watcher(Protocol):
    """Told of each choice and each step; for replays and checks, not while exploring."""

    def made(self, event: Event) -> None:
        """A new event."""

    def chosen(self, what: str, index: int, width: int) -> None:
        """Of `width` options `index` was taken: `what`."""

    def step_begins(self, task: Task) -> None:
        """`task` is about to run."""

    def step_ends(self, task: Task) -> None:
        """`task` has suspended or ended."""

    def broken_off(self) -> None:
        """The execution has failed, perhaps within a step, which then does not end."""


@attrs.frozen
class Settings:
    """What is explored besides the order of tasks, and where an execution is given up."""

    cancel: tuple[str, ...] = ()
    """Names (or fnmatch patterns) of tasks that may be cancelled wherever they are suspended."""
    time: Literal["auto", "choice"] = "auto"
    """When the clock moves: only when nothing can run, or at any step."""
    faults: Mapping[str, int] = attrs.Factory(dict)
    """How many calls of each fault point, by name or pattern, may fail in one execution."""
    steps: int = 100_000
    """Steps after which an execution is a livelock, even if things happen."""
    stall: int = 10_000
    """Steps in which nobody is woken, started or finished, after which it is one."""
    fairness: int = 32
    """Steps that a task may take in a row before all others that can run have to take one."""
    choose: Callable[[int], int] | None = None
    """Beyond the path, which of that many options to take; None: the first."""
    decide: Callable[[int], int] | None = None
    """The same for the choices that a step makes itself."""
    every_step: bool = False
    """Whether a step without an alternative is a choice as well, of one."""
    unmatched: set[str] = attrs.Factory(set)
    """Patterns of `cancel` and `faults` that no task and no fault point has matched so far."""
    checks: Sequence[Callable[[], object]] = ()
    """Called after every step; to raise or to return False is a failure."""
    watcher: Watcher | None = None
    attended: bool = attrs.field(init=False)
    """Whether anybody looks at what each step did."""
    special: bool = attrs.field(init=False)
    """Whether there is more to do at a choice than to take one of all that can run."""

    @attended.default
    def _attended(self) -> bool:
        return self.watcher is not None or bool(self.checks)

    @special.default
    def _special(self) -> bool:
        return (
            bool(self.cancel)
            or self.time == "choice"
            or self.every_step
            or self.watcher is not None
        )


class Path:
    """The choices of an execution: those that it is to repeat, and those that it adds to them."""

    __slots__ = ("costly", "plan", "taken", "widths")

    def __init__(self, choices: Sequence[int] = ()) -> None:
        self.plan = list(reversed(choices))
        """What is still to be repeated, the next choice last."""
        self.taken = list(choices)
        self.widths: list[int] = []
        """Of how many options each was."""
        self.costly: list[int] = []
        """The options from 1 up to this one preempt a task that could have gone on."""

    def choices(self) -> list[int]:
        """Those that were choices, of more than one option."""
        return [choice for choice, width in zip(self.taken, self.widths, strict=True) if width > 1]

    def repeat(self, length: int) -> None:
        """Keep the first `length` choices, for the next execution to repeat."""
        del self.taken[length:], self.widths[length:], self.costly[length:]
        self.plan = self.taken[::-1]


class Pruned(BaseException):
    """The strategy knows all that would follow, and gives the execution up."""
