"""Sleepable read-copy-update: readers that are counted, and waiting for those of now.

Linux (kernel/rcu/srcutree.c) counts readers in two counters and flips between them twice per grace
period, which is why a synchronizer there can wait for readers that came after it. Here each flip
leaves a generation of its own behind, which lives until its readers have left; a grace period is
over when the generations up to it are gone, so it waits for the readers of its start and for no
other. Synchronizers between whom no reader came share a generation, and its event.
"""

# The checked forms are reached through Lock.__new__, and guards are part of their lock.
# pyright: reportUnusedClass=false, reportPrivateUsage=false

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import anyio
import attrs

from mmunotify import log
from mmunotify.errors import LockNotHeld, LockRecursion

from . import lockdep
from .base import Lock

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


@attrs.frozen
class SRCUStatistics:
    """An object containing debugging information about an SRCU domain."""

    name: str
    readers: int
    """Read sections that are open."""
    grace_periods: int
    """Grace periods that readers still hold open."""
    callbacks: int
    """Callbacks that are queued."""
    callback_errors: int
    """Callbacks that have raised."""


@attrs.define(eq=False)
class _Generation:
    """The readers that were there at one flip, and what happens when they have left."""

    index: int
    readers: int
    callbacks: deque[Callable[[], object]] = attrs.Factory(lambda: deque["Callable[[], object]"]())
    over: anyio.Event | None = None


class SRCU(Lock):
    """An SRCU domain. Source: struct srcu_struct; Documentation/RCU/whatisRCU.rst.

    Read sections nest, may span awaits, and may be left by another task than entered them. `name`
    is for messages and `lock_class` is what lockdep orders by, as for a lock: the domain is a node
    of its graph, held by readers and waited for by synchronizers.
    """

    __slots__ = (
        "_advancing",
        "_draining",
        "_errors",
        "_index",
        "_readers",
    )

    def __init__(self, name: str = "srcu", *, lock_class: str | None = None) -> None:
        super().__init__(name, lock_class=lock_class)
        self._index = 0
        self._readers = 0
        """The readers since the last flip; those before it are in `_draining`, oldest first."""
        self._draining: deque[_Generation] = deque()
        self._advancing = False
        self._errors = 0

    def __repr__(self) -> str:
        return f"<SRCU {self.name!r} readers={self.readers}>"

    def read_lock(self) -> int:
        """Enter a read section; never waits. `read_unlock` wants the index that is returned."""
        self._readers += 1
        return self._index

    def read_unlock(self, index: int) -> None:
        """Leave a read section. The last of its generation runs the callbacks that wait for it.

        Raises `LockNotHeld` when no read section with this index is open.
        """
        if index == self._index and self._readers:
            self._readers -= 1
        else:
            self._leave(index)

    def reading(self) -> SRCUReadSection:
        """`with srcu.reading():`, an object per section, since sections nest and overlap."""
        return SRCUReadSection(self)

    async def synchronize(self) -> None:
        """Wait for the readers that are there now, and for no later one.

        Does not suspend when no reader is there; cancelled, it leaves no trace. In a read section
        of the caller's own it would wait for itself: with lockdep that raises `LockRecursion`.
        Source: synchronize_srcu().
        """
        generation = self._flip()
        if generation is not None:
            await _over(generation)

    def call(self, callback: Callable[[], object]) -> None:
        """Have `callback()` called when the readers that are there now have left.

        It is plain, and runs inline in whoever ends the grace period: the last reader's
        `read_unlock`, or this call when no reader is there. One that raises does not harm that
        reader: it is logged as `callback_raised`, and counted. Source: call_srcu().
        """
        generation = self._flip()
        if generation is not None:
            generation.callbacks.append(callback)
        else:
            self._run(callback)

    async def barrier(self) -> None:
        """Wait until all callbacks that are queued now have run. Source: srcu_barrier()."""
        for generation in reversed(self._draining):
            if generation.callbacks:
                await _over(generation)
                return

    @property
    def readers(self) -> int:
        """How many read sections are open."""
        return self._readers + sum(generation.readers for generation in self._draining)

    def statistics(self) -> SRCUStatistics:
        """A snapshot for debugging."""
        return SRCUStatistics(
            self.name,
            readers=self.readers,
            grace_periods=len(self._draining),
            callbacks=sum(len(generation.callbacks) for generation in self._draining),
            callback_errors=self._errors,
        )

    def _flip(self) -> _Generation | None:
        """The generation that the readers of now belong to; None when there are no readers."""
        if self._readers:
            self._draining.append(_Generation(self._index, self._readers))
            self._index += 1
            self._readers = 0
        return self._draining[-1] if self._draining else None

    def _leave(self, index: int) -> None:
        for generation in self._draining:
            if generation.index == index and generation.readers:
                generation.readers -= 1
                self._advance()
                return
        raise LockNotHeld(f"srcu_read_unlock({self.name}): no reader of index {index} is there")

    def _advance(self) -> None:
        """End the grace periods whose readers have all left, in order."""
        if self._advancing:  # A callback left a read section: the loop below goes on with it.
            return
        self._advancing = True
        try:
            while self._draining and not self._draining[0].readers:
                generation = self._draining[0]
                while generation.callbacks:
                    self._run(generation.callbacks.popleft())
                self._draining.popleft()
                if generation.over is not None:
                    generation.over.set()
        except BaseException:  # KeyboardInterrupt and its like; the others are still owed theirs.
            self._advancing = False
            self._advance()
            raise
        self._advancing = False

    def _run(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except Exception as error:
            self._errors += 1
            name = getattr(callback, "__qualname__", repr(callback))
            log.Log().emit(
                log.CALLBACK_RAISED,
                srcu=self.name,
                callback=name,
                error=repr(error),
                exc_info=error,
            )


async def _over(generation: _Generation) -> None:
    if generation.over is None:
        generation.over = anyio.Event()
    await generation.over.wait()


class SRCUReadSection:
    """One read section: what `SRCU.reading()` returns."""

    __slots__ = ("_index", "_srcu")

    def __init__(self, srcu: SRCU) -> None:
        self._srcu = srcu

    def __enter__(self) -> None:
        self._index = self._srcu.read_lock()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._srcu.read_unlock(self._index)


class _CheckedSRCU(SRCU, checks=SRCU):
    __slots__ = ()

    def read_lock(self) -> int:
        index = super().read_lock()
        lockdep.acquired(self, "read")
        return index

    def read_unlock(self, index: int) -> None:
        # First, since the callbacks that may run now do not run in this read section.
        lockdep.released(self)
        super().read_unlock(index)

    async def synchronize(self) -> None:
        self._wait_for_readers("synchronize_srcu")
        await super().synchronize()

    async def barrier(self) -> None:
        self._wait_for_readers("srcu_barrier")
        await super().barrier()

    def _wait_for_readers(self, what: str) -> None:
        own = lockdep.find(self)
        if own is not None:
            raise LockRecursion(
                f"{what}({self.name}) inside the caller's own read section of it would wait for "
                f"itself; the section: {own}"
            )
        lockdep.acquire(self, f"{what}({self.name})", sleeps=True)
