"""Spinlocks: held parts that never suspend, so one that is found held is a bug, not a wait.

In one thread nobody else can run between `with lock:` and its end unless the held part suspends.
What a kernel would spin on for ever is therefore raised at once, as `SpinlockHeld`.
"""

# The checked forms are reached through Lock.__new__, and guards are part of their lock.
# pyright: reportUnusedClass=false, reportPrivateUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from mmunotify.errors import LockNotHeld, SpinlockHeld

from . import lockdep
from .base import READY, Awaited, Lock, next_address

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType


@attrs.frozen
class SpinLockStatistics:
    """An object containing debugging information about a spinlock."""

    name: str
    locked: bool


class SpinLock(Lock):
    """A lock for `with lock:`, whose held part must not suspend.

    `name` is for messages, `lock_class` is what lockdep orders by (the first word of the name when
    not given), and `order` lets several locks of one class be held in ascending order. Source:
    spinlock_t, include/linux/spinlock.h.

    Raises `SpinlockHeld` when it is found held. With lockdep the message has the holder's task and
    line, and leaving it raises `ScheduleWhileAtomic` if the event loop ran since it was taken.
    """

    __slots__ = ("locked",)

    def __init__(
        self, name: str, *, lock_class: str | None = None, order: int | None = None
    ) -> None:
        super().__init__(name, lock_class=lock_class, order=order)
        self.locked = False
        """Whether somebody holds it."""

    def __repr__(self) -> str:
        return f"<SpinLock {self.name!r}{' locked' * self.locked}>"

    def __enter__(self) -> None:
        if self.locked:
            raise _found_held(self)
        self.locked = True

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.locked = False

    def statistics(self) -> SpinLockStatistics:
        """A snapshot for debugging."""
        return SpinLockStatistics(self.name, self.locked)


class _CheckedSpinLock(SpinLock, checks=SpinLock):
    __slots__ = ()

    def __enter__(self) -> None:
        if self.locked:
            raise _found_held(self)
        lockdep.acquire(self, f"spin_lock({self.name})", sleeps=False)
        self.locked = True
        lockdep.acquired(self, "spin", atomic=True)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.locked = False
        lockdep.released(self)


def _found_held(lock: SpinLock | SpinRWLock) -> SpinlockHeld:
    held = lockdep.found_held(lock)
    if held is None:
        return SpinlockHeld(f"spinlock {lock.name} is held: its holder suspended, or took it twice")
    return SpinlockHeld(f"spinlock is held: {held}")


class SpinRWLock(Lock):
    """A reverse-map lock as 2008 had it: a spinlock behind the interface of `RWSemaphore`.

    It never suspends, so that code under a reverse-map lock is written once, with
    `async with lock.writing():`, and serves both locking models. i_mmap_lock and the anon_vma lock
    of 2.6.26 had one mode: `reading()` excludes `reading()`. Raises `SpinlockHeld` when it is found
    held. Source: struct address_space.i_mmap_lock, struct anon_vma.lock (Linux 2.6.26).
    """

    __slots__ = ("_guard", "address", "locked", "taken_by")

    sleepable = False
    """Whether the held part may suspend."""

    def __init__(
        self, name: str, *, lock_class: str | None = None, order: int | None = None
    ) -> None:
        super().__init__(name, lock_class=lock_class, order=order)
        self.locked = False
        """Whether somebody holds it."""
        self.address = next_address()
        self.taken_by: object | None = None
        self._guard = _SpinGuard(self)

    def __repr__(self) -> str:
        return f"<SpinRWLock {self.name!r}{' locked' * self.locked}>"

    def reading(self) -> AbstractAsyncContextManager[None, None]:
        """`async with lock.reading():`, exclusive as writing is; never suspends."""
        return self._guard

    def writing(self) -> AbstractAsyncContextManager[None, None]:
        """`async with lock.writing():`; never suspends."""
        return self._guard

    def down_write_trylock(self) -> bool:
        """Take it if it is free; whether it was."""
        if self.locked:
            return False
        self.locked = True
        return True

    down_read_trylock = down_write_trylock

    async def down_write(self) -> None:
        """Take it; never suspends. Raises `SpinlockHeld`."""
        if not self.down_write_trylock():
            raise _found_held(self)

    async def down_read(self) -> None:
        """Take it; never suspends. Raises `SpinlockHeld`."""
        await self.down_write()

    def up_write(self) -> None:
        """Release it. Raises `LockNotHeld`."""
        if not self.locked:
            raise LockNotHeld(f"spinlock {self.name} is released, but nobody holds it")
        self.locked = False

    def up_read(self) -> None:
        """Release it. Raises `LockNotHeld`."""
        self.up_write()

    def downgrade_write(self) -> None:
        """Nothing: there is one mode. Raises `LockNotHeld`."""
        if not self.locked:
            raise LockNotHeld(f"spinlock {self.name} is downgraded, but nobody holds it")

    @property
    def is_contended(self) -> bool:
        """Whether somebody waits: nobody can."""
        return False

    @property
    def needbreak(self) -> bool:
        """Whether somebody waits whom holding on keeps out: nobody can."""
        return False

    def statistics(self) -> SpinLockStatistics:
        """A snapshot for debugging."""
        return SpinLockStatistics(self.name, self.locked)


class _SpinGuard:
    """What `reading()` and `writing()` return: made once per lock, shared by all who take it."""

    __slots__ = ("_lock",)

    def __init__(self, lock: SpinRWLock) -> None:
        self._lock = lock

    def __aenter__(self) -> Awaited:
        lock = self._lock
        if lock.locked:
            raise _found_held(lock)
        lock.locked = True
        return READY

    def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Awaited:
        self._lock.up_write()
        return READY


class _CheckedSpinRWLock(SpinRWLock, checks=SpinRWLock):
    __slots__ = ()

    def __init__(
        self, name: str, *, lock_class: str | None = None, order: int | None = None
    ) -> None:
        super().__init__(name, lock_class=lock_class, order=order)
        self._guard = _CheckedSpinGuard(self)

    def down_write_trylock(self) -> bool:
        if self.locked:
            return False
        self.locked = True
        lockdep.acquired(self, "spin", atomic=True)
        return True

    down_read_trylock = down_write_trylock

    async def down_write(self) -> None:
        if self.locked:
            raise _found_held(self)
        lockdep.acquire(self, f"spin_lock({self.name})", sleeps=False)
        self.down_write_trylock()

    def up_write(self) -> None:
        super().up_write()
        lockdep.released(self)


class _CheckedSpinGuard(_SpinGuard):
    __slots__ = ()

    def __aenter__(self) -> Awaited:
        return self._lock.down_write()
