"""How a task suspends, and where the objects of an execution find it.

What suspends is a generator that is awaited as it is, without a coroutine around it: that is the
cheapest suspension that Python has.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from types import coroutine
from typing import TYPE_CHECKING, Final

from mmunotify.errors import NotExplorable

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from .execution import Execution

# How a task stands; a task suspends by yielding one of the first five.
PAUSED: Final = 0
"""At a checkpoint: can run, and is cancelled there if a cancellation has come."""
SHIELDED: Final = 1
"""Can run, and does not look for a cancellation: it is new, was woken, or is shielded."""
DOOMED: Final = 2
"""Can run, with a cancellation, come what may."""
PARKED: Final = 3
"""Waits until somebody wakes it; a cancellation does."""
PINNED: Final = 4
"""Waits until somebody wakes it; a cancellation does not."""
DONE: Final = 5


@coroutine
def pause() -> Generator[int]:
    """A checkpoint: be cancelled if a cancellation has come."""
    yield PAUSED


@coroutine
def pause_shielded() -> Generator[int]:
    """Let others run, whatever has been cancelled."""
    yield SHIELDED


class Running:
    """Has the execution that runs, of which there is one at a time in a process, and no more."""

    __slots__ = ("_taken", "execution")
    execution: Execution

    def __init__(self) -> None:
        self._taken = False

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Executions run inside. Raises `NotExplorable` when others do, in another thread."""
        if self._taken:
            raise NotExplorable("an exploration is running already in another thread")
        self._taken = True
        try:
            yield
        finally:
            self._taken = False
            with suppress(AttributeError):
                del self.execution


running: Final = Running()
