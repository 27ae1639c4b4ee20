"""Tasks: what the explorer knows of a coroutine that it runs, and what a program can ask of it."""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from .anyio_parts import Handle
from .events import Event
from .scopes import CancelScope, is_cancelled
from .traps import DONE, DOOMED, SHIELDED, running

if TYPE_CHECKING:
    from collections.abc import Coroutine


class Owner(Protocol):
    """Who runs a task and is told of its end."""

    @property
    def host(self) -> Task | None:
        """The task that started it, as others see it."""

    @property
    def cancel_scope(self) -> CancelScope | None:
        """The scope around the task."""

    def finished(self, task: Task, error: BaseException | None) -> None:
        """The task has ended; with `error`, if it left one."""


class Task(Handle):
    """A coroutine that is being run; the scenario itself is number 0 of its execution.

    It is its own `anyio.TaskHandle`, whose event and cancel scope are made when they are asked for.
    """

    __slots__ = (
        "_ended",
        "_root",
        "context",
        "debts",
        "owner",
        "scope",
        "state",
        "timer",
        "waits_for",
    )

    def __init__(self, coro: Coroutine[Any, Any, Any], label: object, owner: Owner) -> None:
        self.coro = coro
        self.context = copy_context()
        self.label = label
        """A name, or the function that is run."""
        self.owner = owner
        self.scope = owner.cancel_scope
        """The innermost scope that the task is in."""
        self.state = SHIELDED
        self._root: CancelScope | None = None
        self._ended: Event | None = None
        execution = running.execution
        execution.tasks.append(self)
        execution.runnable.append(self)
        execution.loud = True
        if execution.settings.cancel:
            execution.consider(self)

    def __repr__(self) -> str:
        return f"<Task {self.name}>"

    @property
    def number(self) -> int:
        """Its place among the tasks of the execution, in order of their start."""
        return running.execution.tasks.index(self)

    @property
    def root(self) -> CancelScope:
        """The scope around all that the task does: to cancel it is to cancel the task."""
        if self._root is None:
            self._root = CancelScope.around(self)
        return self._root

    @property
    def ended(self) -> Event:
        """Is set when the task has ended."""
        if self._ended is None:
            self._ended = Event()
            if self.state == DONE:
                self._ended.set()
        return self._ended

    def time_out(self) -> None:
        """The clock says what the task sleeps for."""
        self.timer = 0
        running.execution.wake(self)

    def end(self, result: Any, error: BaseException | None) -> BaseException | None:
        """Leave the root scope, and tell who waits for the end; the error that is left."""
        if self.scope is not (self._root or self.owner.cancel_scope):
            error = RuntimeError(f"{self!r} ended in {self.scope!r}, which it has not left")
        self.result, self.error = result, error
        if self._ended is not None:
            self._ended.set()
        if error is not None and self._root is not None:
            try:
                if self._root.catches(error):
                    return None
            except BaseExceptionGroup as others:
                return others
        return error


class TaskInfo(anyio.TaskInfo):
    """`anyio.TaskInfo` in an explored run; ids count from 1 in each execution."""

    __slots__ = ("_task",)

    def __init__(self, task: Task) -> None:
        host = task.owner.host
        super().__init__(task.number + 1, host and host.number + 1, task.name, task.coro)
        self._task = task

    def has_pending_cancellation(self) -> bool:
        """Whether the task is cancelled when it goes on, or at its next checkpoint."""
        return self._task.state == DOOMED or is_cancelled(self._task.scope)
