"""A sequence count: readers that do not lock, and look whether a writer was there meanwhile."""

# The checked forms are reached through Lock.__new__, and guards are part of their lock.
# pyright: reportUnusedClass=false, reportPrivateUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from mmunotify.errors import LockNotHeld, SpinlockHeld

from . import lockdep
from .base import Lock

if TYPE_CHECKING:
    from types import TracebackType


@attrs.frozen
class SeqCountStatistics:
    """An object containing debugging information about a sequence count."""

    name: str
    sequence: int
    """Two for every write section that is over; odd inside one."""


class SeqCount(Lock):
    """A sequence count. Writers exclude each other by a lock of their own, and do not suspend.

        seq = count.read_begin()
        ...                             # copy what the count protects
        if count.read_retry(seq):       # a writer was there: what was copied is worthless

    Linux's `read_begin` spins while a writer is inside. In one thread that is possible only if the
    writer was suspended, and spinning would not end; so here it returns at once and the
    `read_retry` that belongs to it says True, as raw_seqcount_begin() does. Source: seqcount_t,
    include/linux/seqlock.h. With lockdep a write section during which the event loop runs raises
    `ScheduleWhileAtomic` when it is left.
    """

    __slots__ = ("_writing", "sequence")

    def __init__(self, name: str, *, lock_class: str | None = None) -> None:
        super().__init__(name, lock_class=lock_class)
        self.sequence = 0
        """Odd while a writer is inside."""
        self._writing = _Writing(self)

    def __repr__(self) -> str:
        return f"<SeqCount {self.name!r} {self.sequence}>"

    def read_begin(self) -> int:
        """Begin to read; never waits."""
        return self.sequence & ~1

    def read_retry(self, seq: int) -> bool:
        """Whether a writer was inside at any time since the `read_begin` that returned `seq`."""
        return self.sequence != seq

    def write_begin(self) -> None:
        """Begin to write; must not suspend until `write_end`.

        Raises `SpinlockHeld` when another writer is inside.
        """
        if self.sequence & 1:
            raise SpinlockHeld(f"write_begin({self.name}): another writer is inside")
        self.sequence += 1

    def write_end(self) -> None:
        """End to write. Raises `LockNotHeld` when no writer is inside."""
        if not self.sequence & 1:
            raise LockNotHeld(f"write_end({self.name}): no writer is inside")
        self.sequence += 1

    def writing(self) -> _Writing:
        """`with count.writing():`, a write section."""
        return self._writing

    def statistics(self) -> SeqCountStatistics:
        """A snapshot for debugging."""
        return SeqCountStatistics(self.name, self.sequence)


class _Writing:
    __slots__ = ("_count",)

    def __init__(self, count: SeqCount) -> None:
        self._count = count

    def __enter__(self) -> None:
        self._count.write_begin()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._count.write_end()


class _CheckedSeqCount(SeqCount, checks=SeqCount):
    __slots__ = ()

    def write_begin(self) -> None:
        held = lockdep.holder(self) if self.sequence & 1 else None
        if held is not None:
            raise SpinlockHeld(f"write_begin({self.name}): another writer is inside: {held}")
        super().write_begin()
        lockdep.acquired(self, "write", atomic=True)

    def write_end(self) -> None:
        super().write_end()
        lockdep.released(self)
