"""Events, and how the other primitives wait: anyio's, on the explorer's tasks."""

from __future__ import annotations

from collections import deque
from types import coroutine
from typing import TYPE_CHECKING

import anyio
from anyio import EventStatistics

from .scopes import is_cancelled
from .traps import DOOMED, pause, running

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Self

    from .task import Task


@coroutine
def checkpoint_if_cancelled() -> Generator[int]:
    """Suspend, to be cancelled, if a cancellation has come; otherwise do not."""
    execution = running.execution
    if execution.cancelling and is_cancelled(execution.current.scope):
        yield DOOMED


@coroutine
def wait_in(waiters: deque[Task], waits_for: object) -> Generator[int]:
    """Wait in `waiters` to be taken out and woken; cancelled, leave."""
    execution = running.execution
    task = execution.current
    waiters.append(task)
    try:
        yield execution.park(waits_for)
    except BaseException:
        if task in waiters:
            waiters.remove(task)
        raise


def wake_next(waiters: deque[Task]) -> Task | None:
    """Wake the first of `waiters` that has not been cancelled."""
    while waiters:
        task = waiters.popleft()
        if running.execution.wake(task):
            return task
    return None


class Event(anyio.Event):
    """`anyio.Event` in an explored run.

    It hashes by its number, so that sets of events, which anyio's memory streams have, are gone
    through in the same order in each run.
    """

    __slots__ = ("_is_set", "_number", "_waiters", "made_at")

    _is_set: bool
    _number: int
    _waiters: deque[Task] | None
    made_at: str
    """Where it was made; known in replays."""

    def __new__(cls) -> Self:  # noqa: D102
        execution = running.execution
        self = object.__new__(cls)
        self._is_set = False
        self._waiters = None
        execution.serial = self._number = execution.serial + 1
        if execution.settings.watcher is not None:
            execution.settings.watcher.made(self)
        return self

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        made = f", made at {self.made_at}" if hasattr(self, "made_at") else ""
        return f"<Event {self._number}{' set' * self._is_set}{made}>"

    def set(self) -> None:
        """Set it, and wake all who wait."""
        self._is_set = True
        if self._waiters is not None:
            waiters, self._waiters = self._waiters, None
            for task in waiters:
                running.execution.wake(task)

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._is_set

    async def wait(self) -> None:
        """Wait until it is set; only a checkpoint when it is."""
        if self._is_set:
            await pause()
            return
        if self._waiters is None:
            self._waiters = deque()
        await wait_in(self._waiters, self)

    def statistics(self) -> EventStatistics:
        """How many tasks wait."""
        return EventStatistics(len(self._waiters or ()))
