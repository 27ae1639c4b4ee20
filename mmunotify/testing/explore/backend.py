"""The explorer as one of anyio's event loops."""

from __future__ import annotations

import math
from asyncio import CancelledError
from types import coroutine
from typing import TYPE_CHECKING, Any, NoReturn

from anyio.abc import AsyncBackend

from mmunotify.errors import NotExplorable

from .events import Event, checkpoint_if_cancelled
from .groups import TaskGroup
from .primitives import CapacityLimiter, Lock, Semaphore
from .scopes import CancelScope
from .task import TaskInfo
from .traps import PAUSED, pause, pause_shielded, running

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence


def _refusing(name: str, what: str) -> Any:
    """A method of the backend that says that `what` cannot be explored."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        execution = running.execution
        execution.break_off(
            NotExplorable(
                f"{execution.name(execution.current)} called for {what} ({name}), which the "
                "explorer does not do: what happens there is not its to schedule"
            )
        )

    return staticmethod(refuse)


_THREAD = "a thread"
_PROCESS = "a process"
_SOCKET = "a socket"


class ExplorerBackend(AsyncBackend):
    """What anyio asks of an event loop, answered by the execution that runs."""

    checkpoint = staticmethod(pause)
    checkpoint_if_cancelled = staticmethod(checkpoint_if_cancelled)
    cancel_shielded_checkpoint = staticmethod(pause_shielded)

    @staticmethod
    @coroutine
    def sleep(delay: float) -> Generator[int]:
        """Suspend until the virtual clock says `delay` (s) more."""
        if delay <= 0:
            yield PAUSED
            return
        execution = running.execution
        task = execution.current
        if delay != math.inf:
            execution.at(execution.now + delay, task)
        try:
            yield execution.park(f"the clock to say {execution.now + delay:g}")
        finally:
            task.timer = 0

    @classmethod
    def current_time(cls) -> float:
        """The virtual clock (s), which begins at 0 in each execution."""
        return running.execution.now

    @classmethod
    def current_effective_deadline(cls) -> float:
        """The nearest deadline of the scopes that the task is in; -inf when it is cancelled."""
        deadline = math.inf
        scope: CancelScope | None = running.execution.current.scope
        while scope is not None:
            if scope.cancelled:
                return -math.inf
            deadline = min(deadline, scope.deadline)
            if scope.shielding:
                break
            scope = scope.parent
        return deadline

    @classmethod
    def cancelled_exception_class(cls) -> type[BaseException]:
        """asyncio's, for code that knows no other."""
        return CancelledError

    @classmethod
    def create_cancel_scope(
        cls, *, deadline: float = math.inf, shield: bool = False
    ) -> CancelScope:
        """A new cancel scope."""
        return CancelScope(deadline=deadline, shield=shield)

    create_task_group = staticmethod(TaskGroup)
    create_event = staticmethod(Event)

    @classmethod
    def create_lock(cls, *, fast_acquire: bool) -> Lock:
        """A new lock."""
        return Lock(fast_acquire=fast_acquire)

    @classmethod
    def create_semaphore(
        cls, initial_value: int, *, max_value: int | None = None, fast_acquire: bool = False
    ) -> Semaphore:
        """A new semaphore."""
        return Semaphore(initial_value, max_value=max_value, fast_acquire=fast_acquire)

    @classmethod
    def create_capacity_limiter(cls, total_tokens: float) -> CapacityLimiter:
        """A new capacity limiter."""
        return CapacityLimiter(total_tokens)

    @classmethod
    def current_token(cls) -> object:
        """A new object in each execution, which is what `RunVar`s are kept by."""
        return running.execution.tasks[0]

    @classmethod
    def get_current_task(cls) -> TaskInfo:
        """The task whose step it is."""
        return TaskInfo(running.execution.current)

    @classmethod
    def get_running_tasks(cls) -> Sequence[TaskInfo]:
        """All tasks that have not ended."""
        return [TaskInfo(task) for task in running.execution.unfinished()]

    @staticmethod
    @coroutine
    def wait_all_tasks_blocked() -> Generator[int]:
        """Suspend until no other task can run."""
        execution = running.execution
        execution.idlers = [*execution.idlers, execution.current]
        yield execution.park("all other tasks to be blocked")

    run = _refusing("anyio.run", "an event loop")
    run_sync_in_worker_thread = _refusing("anyio.to_thread.run_sync", _THREAD)
    current_default_thread_limiter = _refusing("anyio.to_thread", _THREAD)
    check_cancelled = _refusing("anyio.from_thread.check_cancelled", _THREAD)
    run_async_from_thread = _refusing("anyio.from_thread.run", _THREAD)
    run_sync_from_thread = _refusing("anyio.from_thread.run_sync", _THREAD)
    run_sync_soon = _refusing("anyio.from_thread.run_sync_soon", _THREAD)
    open_process = _refusing("anyio.open_process", _PROCESS)
    setup_process_pool_exit_at_shutdown = _refusing("anyio.to_process.run_sync", _PROCESS)
    connect_tcp = _refusing("anyio.connect_tcp", _SOCKET)
    connect_unix = _refusing("anyio.connect_unix", _SOCKET)
    create_tcp_listener = _refusing("anyio.create_tcp_listener", _SOCKET)
    create_unix_listener = _refusing("anyio.create_unix_listener", _SOCKET)
    create_udp_socket = _refusing("anyio.create_udp_socket", _SOCKET)
    create_unix_datagram_socket = _refusing("anyio.create_unix_datagram_socket", _SOCKET)
    getaddrinfo = _refusing("anyio.getaddrinfo", _SOCKET)
    getnameinfo = _refusing("anyio.getnameinfo", _SOCKET)
    wait_readable = _refusing("anyio.wait_readable", _SOCKET)
    wait_writable = _refusing("anyio.wait_writable", _SOCKET)
    notify_closing = _refusing("anyio.notify_closing", _SOCKET)
    wrap_listener_socket = _refusing("a listener's from_socket", _SOCKET)
    wrap_stream_socket = _refusing("SocketStream.from_socket", _SOCKET)
    wrap_unix_stream_socket = _refusing("UNIXSocketStream.from_socket", _SOCKET)
    wrap_udp_socket = _refusing("UDPSocket.from_socket", _SOCKET)
    wrap_connected_udp_socket = _refusing("ConnectedUDPSocket.from_socket", _SOCKET)
    wrap_unix_datagram_socket = _refusing("UNIXDatagramSocket.from_socket", _SOCKET)
    wrap_connected_unix_datagram_socket = _refusing(
        "ConnectedUNIXDatagramSocket.from_socket", _SOCKET
    )
    open_signal_receiver = _refusing("anyio.open_signal_receiver", "signals")
    create_test_runner = _refusing("anyio's pytest plugin", "a test runner")
