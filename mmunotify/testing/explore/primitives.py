"""Locks, semaphores and capacity limiters: anyio's, on the explorer's tasks.

They hand over in order of arrival, as those of anyio's own backends do. What suspends there even
without contention suspends here.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import anyio
from anyio import (
    CapacityLimiterStatistics,
    LockStatistics,
    SemaphoreStatistics,
    WouldBlock,
)

from .events import Event, checkpoint_if_cancelled, wait_in, wake_next
from .task import TaskInfo
from .traps import pause_shielded, running

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from .task import Task


class Lock(anyio.Lock):
    """`anyio.Lock` in an explored run."""

    __slots__ = ("_fast", "_owner", "_waiters")

    _fast: bool
    _owner: Task | None
    _waiters: deque[Task]

    def __new__(cls, *, fast_acquire: bool = False) -> Self:  # noqa: D102
        self = object.__new__(cls)
        self._fast = fast_acquire
        self._owner = None
        self._waiters = deque()
        return self

    def __repr__(self) -> str:
        return f"<Lock held by {self._owner.name}>" if self._owner else "<Lock>"

    async def acquire(self) -> None:
        """Take it; suspends once even when it is free, unless made with `fast_acquire`."""
        task = running.execution.current
        if self._owner is None and not self._waiters:
            await checkpoint_if_cancelled()
            self._owner = task
            if not self._fast:
                await pause_shielded()
        elif self._owner is task:
            raise RuntimeError("Attempted to acquire an already held Lock")
        else:
            await wait_in(self._waiters, self)

    def acquire_nowait(self) -> None:
        """Take it, or raise `anyio.WouldBlock`."""
        task = running.execution.current
        if self._owner is task:
            raise RuntimeError("Attempted to acquire an already held Lock")
        if self._owner is not None or self._waiters:
            raise WouldBlock
        self._owner = task

    def release(self) -> None:
        """Give it to who has waited longest."""
        if self._owner is not running.execution.current:
            raise RuntimeError("The current task is not holding this lock")
        self._owner = wake_next(self._waiters)

    def locked(self) -> bool:
        """Whether somebody holds it."""
        return self._owner is not None

    def statistics(self) -> LockStatistics:
        """Who holds it, and how many wait."""
        owner = TaskInfo(self._owner) if self._owner is not None else None
        return LockStatistics(self._owner is not None, owner, len(self._waiters))


class Semaphore(anyio.Semaphore):
    """`anyio.Semaphore` in an explored run."""

    __slots__ = ("_fast", "_max_value", "_value", "_waiters")

    _fast: bool
    _max_value: int | None
    _value: int
    _waiters: deque[Task]

    def __new__(  # noqa: D102
        cls, initial_value: int, *, max_value: int | None = None, fast_acquire: bool = False
    ) -> Self:
        self = object.__new__(cls)
        self._value = initial_value
        self._max_value = max_value
        self._fast = fast_acquire
        self._waiters = deque()
        return self

    def __repr__(self) -> str:
        return f"<Semaphore {self._value}>"

    async def acquire(self) -> None:
        """Take one; suspends once even when there is one, unless made with `fast_acquire`."""
        if self._value > 0 and not self._waiters:
            await checkpoint_if_cancelled()
            self._value -= 1
            if not self._fast:
                await pause_shielded()
        else:
            await wait_in(self._waiters, self)

    def acquire_nowait(self) -> None:
        """Take one, or raise `anyio.WouldBlock`."""
        if self._value == 0:
            raise WouldBlock
        self._value -= 1

    def release(self) -> None:
        """Give one to who has waited longest."""
        if self._max_value is not None and self._value == self._max_value:
            raise ValueError("semaphore released too many times")
        if wake_next(self._waiters) is None:
            self._value += 1

    @property
    def value(self) -> int:
        """How many are there to take."""
        return self._value

    @property
    def max_value(self) -> int | None:
        """How many there can be."""
        return self._max_value

    def statistics(self) -> SemaphoreStatistics:
        """How many tasks wait."""
        return SemaphoreStatistics(len(self._waiters))


class CapacityLimiter(anyio.CapacityLimiter):
    """`anyio.CapacityLimiter` in an explored run."""

    __slots__ = ("_borrowers", "_queue", "_total")

    _borrowers: dict[object, None]
    _queue: dict[object, Event]
    _total: float

    def __new__(cls, total_tokens: float) -> Self:  # noqa: D102
        self = object.__new__(cls)
        self._total = 0
        self._borrowers = {}
        self._queue = {}
        self.total_tokens = total_tokens
        return self

    def __repr__(self) -> str:
        return f"<CapacityLimiter {len(self._borrowers)} of {self._total} borrowed>"

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def total_tokens(self) -> float:
        """How many tokens there are; more may let waiting tasks go on."""
        return self._total

    @total_tokens.setter
    def total_tokens(self, value: float) -> None:
        if not isinstance(value, int) and not math.isinf(value):
            raise TypeError("total_tokens must be an int or math.inf")
        if value < 0:
            raise ValueError("total_tokens must be >= 0")
        self._total = value
        while self._lend():
            pass

    @property
    def borrowed_tokens(self) -> int:
        """How many are borrowed."""
        return len(self._borrowers)

    @property
    def available_tokens(self) -> float:
        """How many are not."""
        return self._total - len(self._borrowers)

    def acquire_nowait(self) -> None:
        """Borrow a token for this task, or raise `anyio.WouldBlock`."""
        self.acquire_on_behalf_of_nowait(running.execution.current)

    def acquire_on_behalf_of_nowait(self, borrower: object) -> None:
        """Borrow a token for `borrower`, or raise `anyio.WouldBlock`."""
        if borrower in self._borrowers:
            raise RuntimeError(
                "this borrower is already holding one of this CapacityLimiter's tokens"
            )
        if self._queue or len(self._borrowers) >= self._total:
            raise WouldBlock
        self._borrowers[borrower] = None

    async def acquire(self) -> None:
        """Borrow a token for this task; suspends once even when there is one."""
        await self.acquire_on_behalf_of(running.execution.current)

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        """Borrow a token for `borrower`; suspends once even when there is one."""
        await checkpoint_if_cancelled()
        try:
            self.acquire_on_behalf_of_nowait(borrower)
        except WouldBlock:
            await self._wait(borrower)
        else:
            await pause_shielded()

    def release(self) -> None:
        """Give the token of this task back."""
        self.release_on_behalf_of(running.execution.current)

    def release_on_behalf_of(self, borrower: object) -> None:
        """Give the token of `borrower` back."""
        try:
            del self._borrowers[borrower]
        except KeyError:
            raise RuntimeError(
                "this borrower isn't holding any of this CapacityLimiter's tokens"
            ) from None
        self._lend()

    def statistics(self) -> CapacityLimiterStatistics:
        """Who has borrowed, and how many wait."""
        return CapacityLimiterStatistics(
            len(self._borrowers), self._total, tuple(self._borrowers), len(self._queue)
        )

    def _lend(self) -> bool:
        """Lend a free token to who has waited longest; whether that was possible."""
        if not self._queue or len(self._borrowers) >= self._total:
            return False
        borrower = next(iter(self._queue))
        self._borrowers[borrower] = None
        self._queue.pop(borrower).set()
        return True

    async def _wait(self, borrower: object) -> None:
        event = self._queue[borrower] = Event()
        try:
            await event.wait()
        except BaseException:
            self._queue.pop(borrower, None)
            if event.is_set():
                del self._borrowers[borrower]
                self._lend()
            raise
