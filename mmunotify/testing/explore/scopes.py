"""Cancel scopes: anyio's, with levels, shields and deadlines, on the engine's tasks and clock."""

from __future__ import annotations

import math
from asyncio import CancelledError
from typing import TYPE_CHECKING, Final

import anyio

from .traps import running

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from .task import Task


_new: Final = object.__new__


def is_cancelled(scope: CancelScope | None) -> bool:
    """Whether a cancellation reaches what runs in `scope`."""
    while scope is not None:
        if scope.cancelled:
            return True
        if scope.shielding:
            return False
        scope = scope.parent
    return False


class CancelScope(anyio.CancelScope):
    """`anyio.CancelScope` in an explored run."""

    __slots__ = ("_caught", "_deadline", "cancelled", "host", "parent", "shielding", "timer")

    _caught: bool
    _deadline: float
    cancelled: bool
    shielding: bool
    host: Task | None
    """The task that is in its `with` block."""
    parent: CancelScope | None
    """The next scope outwards, of the same task or of whoever started it."""
    timer: int
    """The number of its timer, while it waits for its deadline."""

    def __new__(cls, *, deadline: float = math.inf, shield: bool = False) -> Self:  # noqa: D102
        if deadline != deadline:
            raise ValueError("deadline must not be NaN")
        self = _new(cls)
        self._deadline = deadline
        self.shielding = shield
        self.cancelled = False
        self.host = None
        self.parent = None
        self._caught = False
        return self

    @classmethod
    def around(cls, task: Task) -> Self:
        """A scope around all that `task` does, inside those that its owner put around it."""
        self = cls()
        outside = self.parent = task.owner.cancel_scope
        if task.scope is outside:
            task.scope = self
            return self
        outermost = task.scope
        while outermost is not None and outermost.parent is not outside:
            outermost = outermost.parent
        if outermost is not None:
            outermost.parent = self
        return self

    def __repr__(self) -> str:
        state = " cancelled" * self.cancelled + " shielded" * self.shielding
        return f"<CancelScope{state} deadline={self._deadline}>"

    def __enter__(self) -> Self:
        if self.host is not None:
            raise RuntimeError("Each CancelScope may only be used for a single 'with' block")
        task = running.execution.current
        self.host = task
        self.parent = task.scope
        task.scope = self
        if self._deadline != math.inf:
            self._arm()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self.leave()
        return exc is not None and self.catches(exc)

    def leave(self) -> None:
        """The `with` block has ended."""
        task = running.execution.current
        if self.host is not task:
            raise RuntimeError(
                "This cancel scope is not active"
                if self.host is None
                else "Attempted to exit cancel scope in a different task than it was entered in"
            )
        if task.scope is not self:
            raise RuntimeError(
                "Attempted to exit a cancel scope that isn't the current task's current cancel "
                "scope"
            )
        task.scope = self.parent
        self.host = None
        self.timer = 0

    def catches(self, exc: BaseException) -> bool:
        """Whether the scope, which is being left, swallows `exc`.

        Of an exception group it swallows the cancellations, and raises a group of the others.
        """
        if not self.cancelled or (not self.shielding and is_cancelled(self.parent)):
            return False
        if isinstance(exc, CancelledError):
            self._caught = True
            return True
        if isinstance(exc, BaseExceptionGroup):
            cancellations, others = exc.split(CancelledError)
            self._caught = cancellations is not None
            if others is None:
                return True
            if cancellations is not None:
                context = others.__context__
                try:
                    raise others
                finally:
                    others.__context__ = context
        return False

    def cancel(self, reason: str | None = None) -> None:
        """Cancel what runs in it, at its next checkpoint or where it waits."""
        if not self.cancelled:
            self.cancelled = True
            self.timer = 0
            running.execution.deliver()

    def move_into(self, parent: CancelScope) -> None:
        """Have it, while it is active, inside another scope than before."""
        self.parent = parent
        if is_cancelled(parent):
            running.execution.deliver()

    def time_out(self) -> None:
        """The clock says its deadline."""
        self.timer = 0
        self.cancel("deadline exceeded")

    def _arm(self) -> None:
        execution = running.execution
        if execution.now >= self._deadline:
            self.cancel("deadline exceeded")
        elif self._deadline != math.inf:
            execution.at(self._deadline, self)

    @property
    def deadline(self) -> float:
        """When it is cancelled, on the virtual clock (s); inf is never."""
        return self._deadline

    @deadline.setter
    def deadline(self, value: float) -> None:
        value = float(value)
        if math.isnan(value):
            raise ValueError("deadline must not be NaN")
        self._deadline = value
        self.timer = 0
        if self.host is not None and not self.cancelled:
            self._arm()

    @property
    def cancel_called(self) -> bool:
        """Whether it has been cancelled, by whomever."""
        return self.cancelled

    @property
    def cancelled_caught(self) -> bool:
        """Whether it has swallowed a cancellation."""
        return self._caught

    @property
    def shield(self) -> bool:
        """Whether it keeps cancellations from outside away."""
        return self.shielding

    @shield.setter
    def shield(self, value: bool) -> None:
        if self.shielding and not value:
            self.shielding = False
            if running.execution.cancelling:
                running.execution.deliver()
        self.shielding = value
