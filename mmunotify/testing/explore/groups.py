"""Task groups: anyio's, on the engine's tasks."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Coroutine
from types import CoroutineType, coroutine
from typing import TYPE_CHECKING, Any, Final, NoReturn

from anyio.abc import TaskGroup as AbstractTaskGroup
from anyio.abc import TaskStatus as AbstractTaskStatus

from .scopes import CancelScope, is_cancelled
from .task import Task
from .traps import SHIELDED, running

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextvars import Context
    from types import TracebackType
    from typing import Self


_scope: Final = CancelScope.__new__  # Spares the call of the type.


_NOT_ACTIVE: Final = "This task group is not active; no new tasks can be started."


class TaskGroup(AbstractTaskGroup):
    """`anyio.abc.TaskGroup` in an explored run."""

    __slots__ = ("_children", "_entered", "_errors", "_waiting", "cancel_scope", "host")

    def __init__(self) -> None:
        self.cancel_scope: CancelScope = _scope(CancelScope)
        self.host: Task | None = None
        """The task that is in its `async with` block."""
        self._entered = False
        self._children = 0
        self._errors: list[BaseException] | None = None
        self._waiting = False

    def __repr__(self) -> str:
        return f"<TaskGroup with {self._children} tasks>"

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("TaskGroup cannot be entered more than once")
        self._entered = True
        scope = self.cancel_scope
        self.host = scope.host = task = running.execution.current
        scope.parent = task.scope
        task.scope = scope
        return self

    @coroutine
    def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Generator[int, None, bool]:
        scope, raised = self.cancel_scope, exc
        if exc is not None:
            scope.cancel()
            if not isinstance(exc, CancelledError):
                self._errors = [exc, *(self._errors or ())]
        if self._children:
            self._waiting = True
            try:
                yield running.execution.park(self)
            except CancelledError as cancellation:
                scope.cancel()
                raised = exc or cancellation
                if self._children:
                    yield running.execution.pin(self)
        else:
            yield SHIELDED
        scope.leave()
        self.host = None
        if self._errors is not None:
            raised = BaseExceptionGroup("unhandled errors in a TaskGroup", self._errors)
            self._errors = None
        if raised is None or raised is exc:
            return raised is not None and scope.catches(raised)
        if scope.catches(raised):
            return True
        raise raised from None

    def create_task(
        self,
        coro: Coroutine[Any, Any, Any],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> Any:
        """Run `coro` as a task of this group."""
        if not isinstance(coro, Coroutine):
            raise TypeError(f"expected a coroutine, got {type(coro).__qualname__}")
        if self.cancel_scope.host is None:
            self._refuse(coro)
        self._children += 1
        label = coro if name is None else str(name)
        native = coro if type(coro) is CoroutineType else _awaiting(coro)
        return context.run(Task, native, label, self) if context else Task(native, label, self)

    def start_soon(  # type: ignore[misc,override]  # Final since anyio 4.14, abstract before.
        self, func: Callable[..., Coroutine[Any, Any, Any]], *args: Any, name: object = None
    ) -> Any:
        """Run `func(*args)` as a task of this group."""
        coro = func(*args)
        if type(coro) is not CoroutineType:
            coro = _native(func, coro)
        if self.cancel_scope.host is None:
            self._refuse(coro)
        self._children += 1
        return Task(coro, func if name is None else str(name), self)

    async def start(
        self,
        func: Callable[..., Coroutine[Any, Any, Any]],
        *args: object,
        name: object = None,
        return_handle: bool = False,
    ) -> Any:
        """Run `func(*args, task_status=...)` as a task, and wait until it says it has started."""
        if self.cancel_scope.host is None:
            raise RuntimeError(_NOT_ACTIVE)
        start = _Start(self, running.execution.current)
        coro = _native(func, func(*args, task_status=start))
        self._children += 1
        start.task = task = Task(coro, func if name is None else str(name), start)
        if start.pending:
            await start.wait()
        if start.error is not None:
            raise start.error
        return task if return_handle else start.value

    def _refuse(self, coro: Coroutine[Any, Any, Any]) -> NoReturn:
        coro.close()
        raise RuntimeError(_NOT_ACTIVE)

    def finished(self, task: Task, error: BaseException | None) -> None:
        """A task of it has ended."""
        if error is not None:
            self.fail(error)
        self._children -= 1
        if self._waiting and not self._children:
            assert self.host is not None
            running.execution.wake(self.host)

    def fail(self, error: BaseException) -> None:
        """A task of it has failed: cancel the others."""
        if not isinstance(error, CancelledError):
            self._errors = [*(self._errors or ()), error]
        if not is_cancelled(self.cancel_scope):
            self.cancel_scope.cancel()


class _Start(AbstractTaskStatus[Any]):
    """The `task_status` of a task that `TaskGroup.start` runs, and the task's owner.

    Until the task has started, it is cancelled with its caller and not with the group.
    """

    def __init__(self, group: TaskGroup, caller: Task) -> None:
        self.task: Task | None = None
        self.host: Task | None = caller
        self.cancel_scope: CancelScope | None = caller.scope
        self.pending = True
        """Whether the caller waits for `started()`."""
        self.value: Any = None
        self.error: BaseException | None = None
        self._group = group
        self._caller = caller
        self._abandoned = False

    def __repr__(self) -> str:
        return f"<start of {self.task.name if self.task else 'a task'}>"

    def started(self, value: Any = None) -> None:
        """Go on as a task of the group, and let the caller go on with `value`."""
        if self._abandoned:
            return
        if not self.pending:
            raise RuntimeError("called 'started' twice on the same task status")
        self.pending = False
        self.value = value
        if self.task is None:  # Called before there was a coroutine.
            self._join_group()
            return
        self.task.told = value
        root = self.task.root
        self._join_group()
        root.move_into(self._group.cancel_scope)
        running.execution.wake(self._caller)

    def _join_group(self) -> None:
        self.host = self._group.host
        self.cancel_scope = self._group.cancel_scope

    @coroutine
    def wait(self) -> Generator[int]:
        """Wait for `started()`; cancelled, cancel the task and wait for its end."""
        execution = running.execution
        try:
            yield execution.park(self)
        except CancelledError:
            assert self.task is not None
            if self.pending:
                self.pending = False
                self._abandoned = True
                self.task.root.cancel()
                yield execution.pin(self)
            raise

    def finished(self, task: Task, error: BaseException | None) -> None:
        """The task has ended, before it had started or after."""
        if self.pending:
            self.error = error or RuntimeError("Child exited without calling task_status.started()")
        if self.pending or self._abandoned:
            self.pending = False
            running.execution.wake(self._caller)
            error = None
        self._group.finished(task, error)


def _native(func: Callable[..., object], coro: Any) -> Coroutine[Any, Any, Any]:
    """The coroutine that `func` returned, as one of Python's own."""
    if type(coro) is CoroutineType:
        return coro
    if isinstance(coro, Coroutine):
        return _awaiting(coro)
    name = getattr(func, "__qualname__", func)
    raise TypeError(
        f"Expected {name}() to return a coroutine, but the return value ({coro!r}) is not a "
        "coroutine object"
    )


async def _awaiting(coro: Coroutine[Any, Any, Any]) -> Any:
    return await coro
