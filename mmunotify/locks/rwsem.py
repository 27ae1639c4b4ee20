"""A fair reader/writer semaphore that costs nothing to wait for until somebody has to.

The count is laid out as in Linux (kernel/locking/rwsem.c): a writer bit, a bit that says that
somebody waits, and the number of readers above them, so that one test of one integer is the whole
uncontended path. Waiters queue in order of arrival and ownership is handed over to them: whoever
releases gives the lock to the first waiter, and to the readers directly behind a first reader.
Neither readers nor writers can starve, and nobody is woken in vain.
"""

# The checked forms are reached through Lock.__new__, and guards are part of their lock.
# pyright: reportUnusedClass=false, reportPrivateUsage=false

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import anyio
import attrs

from mmunotify.errors import LockNotHeld

from . import lockdep
from .base import READY, Awaited, Lock, next_address

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

_WRITER: Final = 1
_WAITERS: Final = 2
_READER: Final = 1 << 8


@attrs.frozen
class RWSemaphoreStatistics:
    """An object containing debugging information about a reader/writer semaphore."""

    name: str
    readers: int
    """Readers that hold it."""
    writer: bool
    """Whether a writer holds it."""
    waiting_readers: int
    waiting_writers: int


class _Waiter:
    __slots__ = ("event", "granted", "write")

    def __init__(self, write: bool) -> None:
        self.event = anyio.Event()
        self.granted = False
        self.write = write


class RWSemaphore(Lock):
    """A reader/writer semaphore: `async with sem.reading():` and `async with sem.writing():`.

    FIFO-fair. Uncontended it never suspends: there is no checkpoint. A task that is cancelled while
    it waits leaves no trace; cancelled with the lock already handed to it, it passes it on. It is
    not reentrant, not even for readers, who may have a writer waiting between their two calls.

    `name` is for messages, `lock_class` is what lockdep orders by (the first word of the name when
    not given), and `order` lets several locks of one class be held in ascending order, as
    mmap_locks are by address. Source: struct rw_semaphore, include/linux/rwsem.h.
    """

    __slots__ = (
        "_count",
        "_reading",
        "_waiters",
        "_writing",
        "address",
        "taken_by",
    )

    sleepable = True
    """Whether the held part may suspend."""

    def __init__(
        self, name: str, *, lock_class: str | None = None, order: int | None = None
    ) -> None:
        super().__init__(name, lock_class=lock_class, order=order)
        self.address = next_address()
        self.taken_by: object | None = None
        self._count = 0
        self._waiters: deque[_Waiter] | None = None
        self._reading = _Reading(self)
        self._writing = _Writing(self)

    def __repr__(self) -> str:
        found = self.statistics()
        state = " writer" if found.writer else f" readers={found.readers}" if found.readers else ""
        return f"<RWSemaphore {self.name!r}{state}{' contended' * self.is_contended}>"

    def reading(self) -> AbstractAsyncContextManager[None, None]:
        """`async with sem.reading():`, shared with other readers; may suspend."""
        return self._reading

    def writing(self) -> AbstractAsyncContextManager[None, None]:
        """`async with sem.writing():`, alone; may suspend."""
        return self._writing

    async def down_read(self) -> None:
        """Take it for reading; waits for a writer that holds it and for all who wait already."""
        count = self._count
        if count & (_WRITER | _WAITERS):
            await self._wait(write=False)
        else:
            self._count = count + _READER

    async def down_write(self) -> None:
        """Take it for writing; waits for all who hold it and for all who wait already."""
        if self._count:
            await self._wait(write=True)
        else:
            self._count = _WRITER

    def down_read_trylock(self) -> bool:
        """Take it for reading if that needs no waiting; whether it was taken."""
        count = self._count
        if count & (_WRITER | _WAITERS):
            return False
        self._count = count + _READER
        return True

    def down_write_trylock(self) -> bool:
        """Take it for writing if that needs no waiting; whether it was taken."""
        if self._count:
            return False
        self._count = _WRITER
        return True

    def up_read(self) -> None:
        """A reader lets go. Raises `LockNotHeld` when there is no reader."""
        count = self._count - _READER
        if count < 0:
            raise LockNotHeld(f"up_read({self.name}): no reader holds it")
        self._count = count
        if count == _WAITERS:
            self._hand_over()

    def up_write(self) -> None:
        """The writer lets go. Raises `LockNotHeld` when there is none."""
        count = self._count
        if not count & _WRITER:
            raise LockNotHeld(f"up_write({self.name}): no writer holds it")
        self._count = count - _WRITER
        if count != _WRITER:
            self._hand_over()

    def downgrade_write(self) -> None:
        """The writer becomes a reader, and readers at the head of the queue join it.

        Raises `LockNotHeld` when there is no writer.
        """
        count = self._count
        if not count & _WRITER:
            raise LockNotHeld(f"downgrade_write({self.name}): no writer holds it")
        self._count = count - _WRITER + _READER
        if count != _WRITER:
            self._hand_over()

    @property
    def locked(self) -> bool:
        """Whether somebody holds it, in either mode."""
        return self._count != 0

    @property
    def is_contended(self) -> bool:
        """Whether somebody waits (rwsem_is_contended, patch 06 of 2008)."""
        return self._count & _WAITERS != 0

    @property
    def needbreak(self) -> bool:
        """Whether somebody waits whom holding on keeps out: a long holder should let go.

        Linux asks this only where holders can be preempted (rwsem_needbreak). Here the lock is
        handed over at once, so whoever waits is kept out by those who hold it and the answer is
        that of `is_contended`.
        """
        return self._count & _WAITERS != 0

    def statistics(self) -> RWSemaphoreStatistics:
        """A snapshot for debugging."""
        waiters = self._waiters or ()
        writers = sum(waiter.write for waiter in waiters)
        return RWSemaphoreStatistics(
            self.name,
            readers=self._count // _READER,
            writer=self._count & _WRITER != 0,
            waiting_readers=len(waiters) - writers,
            waiting_writers=writers,
        )

    async def _wait(self, *, write: bool) -> None:
        waiter = _Waiter(write)
        if self._waiters is None:
            self._waiters = deque()
        self._waiters.append(waiter)
        self._count |= _WAITERS
        try:
            await waiter.event.wait()
        except BaseException:
            if not waiter.granted:
                self._waiters.remove(waiter)
                self._hand_over()
            elif write:
                RWSemaphore.up_write(self)
            else:
                RWSemaphore.up_read(self)
            raise

    def _hand_over(self) -> None:
        """Give the lock to those at the head of the queue who can have it."""
        waiters = self._waiters
        while waiters:
            waiter = waiters[0]
            if waiter.write:
                if self._count != _WAITERS:
                    return
                self._count |= _WRITER
            else:
                if self._count & _WRITER:
                    return
                self._count += _READER
            waiters.popleft()
            waiter.granted = True
            waiter.event.set()
        self._count &= ~_WAITERS


class _Reading:
    """What `reading()` returns: made once per semaphore, shared by all who take it."""

    __slots__ = ("_sem",)

    def __init__(self, sem: RWSemaphore) -> None:
        self._sem = sem

    def __aenter__(self) -> Awaited:
        sem = self._sem
        count = sem._count
        if count & (_WRITER | _WAITERS):
            return sem._wait(write=False)
        sem._count = count + _READER
        return READY

    def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Awaited:
        self._sem.up_read()
        return READY


class _Writing:
    """What `writing()` returns: made once per semaphore, shared by all who take it.

    Leaving it also releases a lock that was downgraded inside.
    """

    __slots__ = ("_sem",)

    def __init__(self, sem: RWSemaphore) -> None:
        self._sem = sem

    def __aenter__(self) -> Awaited:
        sem = self._sem
        if sem._count:
            return sem._wait(write=True)
        sem._count = _WRITER
        return READY

    def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> Awaited:
        sem = self._sem
        if sem._count & _WRITER:
            sem.up_write()
        else:
            sem.up_read()
        return READY


class _CheckedRWSemaphore(RWSemaphore, checks=RWSemaphore):
    __slots__ = ()

    def __init__(
        self, name: str, *, lock_class: str | None = None, order: int | None = None
    ) -> None:
        super().__init__(name, lock_class=lock_class, order=order)
        self._reading = _CheckedReading(self)
        self._writing = _CheckedWriting(self)

    async def down_read(self) -> None:
        lockdep.acquire(self, f"down_read({self.name})", sleeps=True)
        await super().down_read()
        lockdep.acquired(self, "read")

    async def down_write(self) -> None:
        lockdep.acquire(self, f"down_write({self.name})", sleeps=True)
        await super().down_write()
        lockdep.acquired(self, "write")

    def down_read_trylock(self) -> bool:
        taken = super().down_read_trylock()
        if taken:
            lockdep.acquired(self, "read")
        return taken

    def down_write_trylock(self) -> bool:
        taken = super().down_write_trylock()
        if taken:
            lockdep.acquired(self, "write")
        return taken

    def up_read(self) -> None:
        super().up_read()
        lockdep.released(self)

    def up_write(self) -> None:
        super().up_write()
        lockdep.released(self)

    def downgrade_write(self) -> None:
        super().downgrade_write()
        held = lockdep.holder(self)
        if held is not None:
            held.mode = "read"


class _CheckedReading(_Reading):
    __slots__ = ()

    def __aenter__(self) -> Awaited:
        return self._sem.down_read()


class _CheckedWriting(_Writing):
    __slots__ = ()

    def __aenter__(self) -> Awaited:
        return self._sem.down_write()
