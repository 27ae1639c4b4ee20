"""Lockdep: the order of locks, proved from the runs that happened rather than the one that hung.

Locks belong to classes (every `mmap_lock` is one class). Whenever a lock is taken while another is
held, the pair of their classes becomes an edge of a graph, with the lines of both; a new edge that
closes a cycle is a deadlock that waits for its schedule, and raises `LockOrderViolation` with both
chains. Beside the order it finds recursion, sleeping in atomic context, and atomic sections during
which the event loop ran ("scheduling while atomic").

Only locks that are made while lockdep is on are checked; the others are of plain classes that
contain no test. `MMUNOTIFY_LOCKDEP=1` turns it on at import. It follows Linux
(Documentation/locking/lockdep-design.rst) with three differences: a shared acquisition counts as an
exclusive one, because these rwsems are fair and a waiting writer keeps readers out; a class is
named, not found by the line that initialises the lock; and SRCU read sections are left out as the
end of an edge, because entering one never waits.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import anyio
import attrs

from mmunotify.errors import LockNotHeld, LockOrderViolation, LockRecursion, ScheduleWhileAtomic

from .places import Places, at, callers, suspended_at
from .places import await_frames as await_frames

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Generator

enabled: bool = False
"""Whether locks that are made from now on are checked."""


def enable() -> None:
    """Check every lock that is made from now on."""
    global enabled
    enabled = True


def disable() -> None:
    """Make plain locks from now on; those that are checked stay so."""
    global enabled
    enabled = False


@contextmanager
def checking(on: bool = True) -> Generator[None]:
    """`with lockdep.checking():` locks made inside are checked (with `on=False`: are plain)."""
    global enabled
    before, enabled = enabled, on
    try:
        yield
    finally:
        enabled = before


class LockLike(Protocol):
    """What lockdep needs to know of a lock."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def lock_class(self) -> str: ...  # noqa: D102
    @property
    def order(self) -> int | None: ...  # noqa: D102


_CLASS: Final = re.compile(r"[\w.>-]+")


def class_of(name: str) -> str:
    """The lock class of a name: its first word, so that of `mmap_lock[7]` is `mmap_lock`."""
    match = _CLASS.match(name)
    return match[0] if match else name


# Who: tasks and what they hold ------------------------------------------------------------------


@attrs.define(eq=False)
class HeldLock:
    """A lock that a task holds: which, in what mode, and where it was taken."""

    lock: LockLike
    mode: str
    """`"write"`, `"read"` or `"spin"`."""
    task: str
    places: Places
    """The line that took it and its callers, innermost first."""
    owner: _Task = attrs.field(repr=False)
    number: int = attrs.field(repr=False, init=False, factory=itertools.count().__next__)
    atomic: bool = False
    """Nothing may suspend while it is held."""
    depth: int = 1
    """How often its task holds it: SRCU read sections nest."""
    suspended_at: Places | None = None
    """Set when the event loop ran although it is atomic: where its holder was suspended."""

    def __str__(self) -> str:
        text = f"{self.lock.name} ({self.mode}), taken by {self.task} at {at(self.places)}"
        if self.suspended_at is not None:
            text += f"\n  whose task was suspended at {at(self.suspended_at)}"
        return text


class _Task:
    """What lockdep knows of a task that holds something."""

    __slots__ = ("atomic", "held", "identity", "name", "nesting", "thread")

    def __init__(self, identity: object) -> None:
        self.identity = identity
        self.name = _name(identity)
        self.thread = threading.get_ident()
        self.held: dict[str, dict[LockLike, HeldLock]] = {}
        """By class, and in each class in the order in which they were taken."""
        self.atomic: dict[HeldLock, None] = {}
        self.nesting = 0


_tasks: Final[dict[object, _Task]] = {}


def _identity() -> object:
    """The running task: asyncio's or trio's, of another loop its coroutine, or else the thread."""
    # An event loop that runs has been imported, and the others need not be.
    asyncio, trio = sys.modules.get("asyncio"), sys.modules.get("trio")
    try:
        task: object = asyncio and asyncio.current_task()
        if task is not None:
            return task
    except RuntimeError:
        pass
    try:
        if trio is not None:
            return trio.lowlevel.current_task()
    except RuntimeError:
        pass
    try:
        return anyio.get_current_task().coro
    except RuntimeError:
        return threading.current_thread()


def _name(identity: Any) -> str:
    if isinstance(identity, threading.Thread):
        return f"thread {identity.name!r}"
    if hasattr(identity, "get_name"):
        return f"task {identity.get_name()!r}"
    if hasattr(identity, "name"):
        return f"task {identity.name!r}"
    return f"task {anyio.get_current_task().name!r}"


def _current() -> _Task:
    identity = _identity()
    task = _tasks.get(identity)
    if task is None:
        task = _tasks[identity] = _Task(identity)
    return task


def _settle(task: _Task) -> None:
    """Forget a task that holds nothing any more."""
    if not task.held and not task.atomic and not task.nesting:
        _tasks.pop(task.identity, None)


# The graph ------------------------------------------------------------------------------------


class _Edge(NamedTuple):
    """Somebody who held a lock of one class called for one of another."""

    held_class: str
    task: str
    held: str
    held_at: Places
    call: str
    called_at: Places

    def __str__(self) -> str:
        return (
            f"  {self.task} held {self.held}, taken at {at(self.held_at)}\n"
            f"    and called {self.call} at {at(self.called_at)}"
        )


_graph: Final[dict[str, dict[str, _Edge]]] = {}


def reset() -> None:
    """Forget the order of locks and who holds what, for tests that use one class in two ways."""
    _graph.clear()
    _tasks.clear()


def _path(start: str, goal: str) -> list[_Edge] | None:
    """The edges that lead from one class to another, fewest first; None when none do."""
    came: dict[str, _Edge | None] = {start: None}
    queue = [start]
    for node in queue:
        if node == goal:
            path: list[_Edge] = []
            while (edge := came[node]) is not None:
                path.append(edge)
                node = edge.held_class
            return path[::-1]
        for following, edge in _graph.get(node, {}).items():
            if following not in came:
                came[following] = edge
                queue.append(following)
    return None


def _add_edge(held: HeldLock, lock: LockLike, what: str) -> None:
    before, after = held.lock.lock_class, lock.lock_class
    if after in _graph.get(before, ()):
        return
    edge = _Edge(before, held.task, f"{held.lock.name} ({held.mode})", held.places, what, callers())
    path = _path(after, before)
    if path is not None:
        classes = " -> ".join((before, *(step.held_class for step in path), before))
        raise LockOrderViolation(
            f"the order {classes} can deadlock, each of these can wait for the next:\n"
            + "\n".join(map(str, (edge, *path)))
        )
    _graph.setdefault(before, {})[after] = edge


def _check_same_class(task: _Task, lock: LockLike, what: str) -> None:
    records = task.held[lock.lock_class]
    own = records.get(lock)
    if own is not None:
        raise LockRecursion(
            f"{what} by {task.name} at {at(callers())}\n"
            f"  would wait for itself, it already holds {own}"
        )
    if task.nesting:
        return
    for held in records.values():
        if lock.order is None or held.lock.order is None:
            raise LockRecursion(
                f"{what} by {task.name} at {at(callers())}\n"
                f"  which already holds a lock of class {lock.lock_class}: {held}\n"
                "  (give the locks an order=, or declare it with lockdep.nest)"
            )
        if lock.order <= held.lock.order:
            raise LockOrderViolation(
                f"locks of class {lock.lock_class} are taken in ascending order; {what} of order "
                f"{lock.order:#x} by {task.name} at {at(callers())}\n"
                f"  which already holds order {held.lock.order:#x}: {held}"
            )


# What the checked locks call --------------------------------------------------------------------


def acquire(lock: LockLike, what: str, *, sleeps: bool) -> None:
    """A lock is about to be taken, or waited for: `what` names the call."""
    task = _tasks.get(_identity()) if _tasks else None
    if task is None:
        return
    if sleeps and task.atomic:
        raise _sleeping(task, what)
    for lock_class, records in task.held.items():
        if lock_class == lock.lock_class:
            _check_same_class(task, lock, what)
        else:
            _add_edge(next(reversed(records.values())), lock, what)


def acquired(lock: LockLike, mode: str, *, atomic: bool = False) -> HeldLock:
    """A lock was taken by the current task."""
    task = _current()
    records = task.held.setdefault(lock.lock_class, {})
    held = records.get(lock)
    if held is not None:
        held.depth += 1
        return held
    held = records[lock] = HeldLock(lock, mode, task.name, callers(), task, atomic)
    if atomic:
        task.atomic[held] = None
        _watch(task.identity)
    return held


def find(lock: LockLike) -> HeldLock | None:
    """How the current task holds a lock; None when it does not."""
    task = _tasks.get(_identity())
    return task.held.get(lock.lock_class, {}).get(lock) if task else None


def holder(lock: LockLike) -> HeldLock | None:
    """Any task's hold on a lock, the current task's first."""
    own = find(lock)
    if own is not None:
        return own
    records = (task.held.get(lock.lock_class, {}).get(lock) for task in tuple(_tasks.values()))
    return next((held for held in records if held is not None), None)


def released(lock: LockLike) -> None:
    """A lock was released, by whoever took it or by somebody to whom it was handed.

    Raises `ScheduleWhileAtomic` when nothing may suspend while it is held and its holder did.
    """
    held = holder(lock)
    if held is None:
        return
    held.depth -= 1
    if held.depth:
        return
    task = held.owner
    records = task.held[lock.lock_class]
    del records[lock]
    if not records:
        del task.held[lock.lock_class]
    task.atomic.pop(held, None)
    _settle(task)
    if held.suspended_at is not None:
        raise ScheduleWhileAtomic(f"scheduling while atomic: the event loop ran under {held}")


# Sleeping in atomic context ---------------------------------------------------------------------


def _sleeping(task: _Task, what: str) -> ScheduleWhileAtomic:
    return ScheduleWhileAtomic(
        f"{what} may sleep: called by {task.name} at {at(callers())}\n"
        f"  inside {next(reversed(task.atomic))}"
    )


def might_sleep(what: str) -> None:
    """Raise `ScheduleWhileAtomic` if the caller holds a spinlock or is in a non-blockable section.

    `what` names the call that may suspend. Source: might_sleep(), include/linux/kernel.h.
    """
    task = _tasks.get(_identity()) if _tasks else None
    if task is not None and task.atomic:
        raise _sleeping(task, what)


@attrs.define(eq=False)
class _NonBlock:
    name: str
    lock_class: str = "non-blockable section"
    order: int | None = None


@contextmanager
def non_block(name: str = "non-blockable section") -> Generator[None]:
    """A section in which nothing may suspend although no spinlock is held (the OOM reaper).

    Source: non_block_start() and non_block_end(), include/linux/kernel.h.
    """
    if not enabled:
        yield
        return
    section = _NonBlock(name)
    acquired(section, "atomic", atomic=True)
    try:
        yield
    finally:
        released(section)


@contextmanager
def nest(outer: LockLike | None = None) -> Generator[None]:
    """Several locks of one class may be taken inside, in any order, because `outer` is held.

    Source: down_write_nest_lock(), include/linux/rwsem.h.
    """
    if not enabled:
        yield
        return
    if outer is not None:
        assert_held(outer)
    task = _current()
    task.nesting += 1
    try:
        yield
    finally:
        task.nesting -= 1
        _settle(task)


def assert_held(lock: LockLike) -> None:
    """Raise `LockNotHeld` unless the current task holds `lock`; nothing when lockdep is off."""
    if enabled and find(lock) is None:
        other = holder(lock)
        raise LockNotHeld(
            f"{lock.name} must be held by {_name(_identity())} at {at(callers())}"
            + (f"\n  it is held as {other}" if other is not None else "; nobody holds it")
        )


def held() -> tuple[HeldLock, ...]:
    """What the current task holds, in the order in which it was taken."""
    task = _tasks.get(_identity())
    if task is None:
        return ()
    records = (held for records in task.held.values() for held in records.values())
    return tuple(sorted(records, key=lambda held: held.number))


# Scheduling while atomic ------------------------------------------------------------------------


def after_step() -> None:
    """An event loop calls this between two tasks: atomic sections that are open were left open.

    On asyncio and trio lockdep sees to that; another of anyio's backends calls it after each step
    of a task. Whoever leaves such a section gets `ScheduleWhileAtomic`.
    """
    for task in tuple(_tasks.values()):  # Other threads add theirs meanwhile.
        for held in task.atomic:
            _note_suspension(held)


def _note_suspension(held: HeldLock) -> None:
    """Write down where the holder is suspended, unless it runs: in another thread, or beneath us.

    A task can run beneath another that it started eagerly.
    """
    coroutine = _coroutine(held.owner.identity)
    running = getattr(coroutine, "cr_running", False)
    if held.suspended_at is None and held.owner.thread == threading.get_ident() and not running:
        held.suspended_at = suspended_at(coroutine)


def found_held(lock: LockLike) -> HeldLock | None:
    """Whose hold it is that a spinlock was found with; None when that is not known."""
    held = holder(lock)
    if held is not None and held is not find(lock):
        _note_suspension(held)
    return held


def _coroutine(identity: Any) -> Any:
    """The coroutine of a task: asyncio's has a method for it, trio's an attribute."""
    if hasattr(identity, "get_coro"):
        return identity.get_coro()
    return getattr(identity, "coro", identity)


class _TrioInstrument:
    def after_task_step(self, task: object) -> None:
        after_step()


_trio_instrument: Final = _TrioInstrument()
_watched_loops: Final[weakref.WeakSet[asyncio.AbstractEventLoop]] = weakref.WeakSet()


def _watch(identity: Any) -> None:
    """Have `after_step` called when the current task, which this is, is suspended."""
    if hasattr(identity, "get_loop"):
        # Ready callbacks run in order, so one that is queued now runs before this task's next step.
        loop = identity.get_loop()
        if loop not in _watched_loops:
            _watched_loops.add(loop)
            loop.call_soon(_asyncio_watch, loop)
    elif (trio := sys.modules.get("trio")) is not None:
        with suppress(RuntimeError):
            trio.lowlevel.add_instrument(_trio_instrument)


def _asyncio_watch(loop: asyncio.AbstractEventLoop) -> None:
    _watched_loops.discard(loop)
    after_step()


if os.environ.get("MMUNOTIFY_LOCKDEP", "") not in ("", "0"):
    enable()
