"""The answers of 2008 to "register must not land inside a section", side by side.

A driver that registers between a section's start and its end would be told of an end that had no
start, and could hold translations of pages that the section is about to free. Sections run under
reverse-map locks, so whoever holds all of them that an address space can reach is alone:

    SortedArray   v16: collect all locks in arrays, sort them by address, take them in that order
    Flagged       v17, and Linux since: one global mutex, and a mark in each lock that is taken
    StopMachine   run while nothing else runs; right only if nobody is suspended inside a section
    MmBarrier     take and release each lock once: waits for the sections of now, keeps out none

All are used as `async with take_all.taking(locks):`, where `locks` are the locks that the VMAs
reach, in VMA order and with repetitions, one class after the other in the order in which they nest
(all i_mmap locks before all anon_vma locks). The caller holds mmap_lock for writing.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

import anyio.lowlevel

from mmunotify.errors import Interrupted, ScheduleWhileAtomic, TooManyVmas, WouldBlock

from . import lockdep
from .rwsem import RWSemaphore

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable
    from contextlib import AbstractAsyncContextManager

    from .models import RmapLock

_BATCH: Final = 4096
"""After so many locks a long walk yields, where it may."""


class TakeAll(Protocol):
    """How an address space keeps all sections out while a driver registers."""

    excludes: ClassVar[bool]
    """Whether no section can be open inside `taking`: what register needs (I-REG)."""

    def taking(
        self, locks: Iterable[RmapLock], *, signal_pending: Callable[[], bool] | None = None
    ) -> AbstractAsyncContextManager[None]:
        """`async with take_all.taking(locks):`, each distinct lock once, released at the end.

        May suspend where a lock is contended, and after every 4 096 rwsems. Raises `Interrupted`
        when `signal_pending()` says so. Then, and when it is cancelled, nothing is held.
        """
        ...


class SortedArray:
    """v16's mm_lock(): every lock goes into an array, and the sorted arrays are taken in order.

    One array per class, each in order of address, so that two tasks that take overlapping sets
    cannot wait for each other. `max_vmas` is the cap that was proposed for it (1 024, then 512):
    a class that the VMAs reach more often raises `TooManyVmas`. Source: mm_lock(), mm/mmap.c of
    the series' v16.
    """

    excludes: ClassVar[bool] = True

    def __init__(self, max_vmas: int = 65_536) -> None:
        self.max_vmas = max_vmas

    @asynccontextmanager
    async def taking(
        self, locks: Iterable[RmapLock], *, signal_pending: Callable[[], bool] | None = None
    ) -> AsyncGenerator[None]:
        """See `TakeAll.taking`. Raises `TooManyVmas` before any lock is taken."""
        arrays: dict[str, list[RmapLock]] = {}
        for lock in locks:
            array = arrays.get(lock.lock_class)
            if array is None:
                array = arrays[lock.lock_class] = []
            array.append(lock)
        for lock_class, array in arrays.items():
            if len(array) > self.max_vmas:
                raise TooManyVmas(
                    f"{len(array)} VMAs have a lock of class {lock_class}, "
                    f"expected at most {self.max_vmas}"
                )
        taken: list[RmapLock] = []
        try:
            with lockdep.nest():
                for array in arrays.values():
                    array = sorted(set(array), key=attrgetter("address"))
                    await _take(array, taken, signal_pending, mark=None)
            yield
        finally:
            _release(taken)


class Flagged:
    """v17's mm_take_all_locks(): nothing is sorted, since only one task at a time does this.

    A mutex is held for the whole time, so the order within a class does not matter, and a mark in
    the lock itself says that it is taken already. One instance serves all address spaces that
    share locks. Source: mm_take_all_locks(), mm/vma.c.
    """

    excludes: ClassVar[bool] = True

    def __init__(self) -> None:
        self.mutex = RWSemaphore("mm_all_locks_mutex")
        """Held for writing from the first lock to the last."""

    @asynccontextmanager
    async def taking(
        self, locks: Iterable[RmapLock], *, signal_pending: Callable[[], bool] | None = None
    ) -> AsyncGenerator[None]:
        """See `TakeAll.taking`. Waits for another address space that is doing the same."""
        async with self.mutex.writing():
            taken: list[RmapLock] = []
            try:
                with lockdep.nest(self.mutex):
                    await _take(locks, taken, signal_pending, mark=self)
                yield
            finally:
                _release(taken)


class StopMachine:
    """stop_machine(): what is inside runs while nothing else does, and no lock is taken.

    In one thread that is any code without an await, which the body of `taking` has to be (lockdep
    sees to it). It says nothing about tasks that are suspended in the middle of a section, so it
    is refused with `WouldBlock` while one of the locks is held or `open_sections()` is not zero:
    this answer was rejected because callbacks that sleep make that the normal case.
    """

    excludes: ClassVar[bool] = True

    def __init__(self, open_sections: Callable[[], int]) -> None:
        self.open_sections = open_sections

    @asynccontextmanager
    async def taking(
        self, locks: Iterable[RmapLock], *, signal_pending: Callable[[], bool] | None = None
    ) -> AsyncGenerator[None]:
        """See `TakeAll.taking`; never suspends. Raises `WouldBlock`."""
        if signal_pending is not None and signal_pending():
            raise _interrupted(0)
        count = self.open_sections()
        if count:
            raise WouldBlock(f"the machine cannot be stopped: {count} sections are open")
        for lock in locks:
            if lock.locked:
                raise WouldBlock(f"the machine cannot be stopped: {lock.name} is held")
        with lockdep.non_block("stop_machine"):
            yield


class MmBarrier:
    """mm_barrier(): each lock is taken and released once, one at a time, in any order.

    Every section that was open when it began has ended inside `taking`, but new ones may be open:
    enough to unregister, where an end without a start is harmless, and not to register.
    """

    excludes: ClassVar[bool] = False

    @asynccontextmanager
    async def taking(
        self, locks: Iterable[RmapLock], *, signal_pending: Callable[[], bool] | None = None
    ) -> AsyncGenerator[None]:
        """See `TakeAll.taking`; inside, nothing is held."""
        trylock = not lockdep.enabled
        for number, lock in enumerate(dict.fromkeys(locks), 1):
            if signal_pending is not None and signal_pending():
                raise _interrupted(0)
            if not (trylock and lock.down_write_trylock()):
                await lock.down_write()
            lock.up_write()
            if number % _BATCH == 0:
                await anyio.lowlevel.checkpoint()
        yield


async def _take(
    locks: Iterable[RmapLock],
    taken: list[RmapLock],
    signal_pending: Callable[[], bool] | None,
    mark: object | None,
) -> None:
    """Take locks for writing and append them to `taken`; those that bear the mark are taken."""
    trylock = not lockdep.enabled  # It saves an await, and tells lockdep nothing of the order.
    remaining = iter(locks)
    while batch := tuple(islice(remaining, _BATCH)):
        for lock in batch:
            if mark is not None and lock.taken_by is mark:
                continue
            if signal_pending is not None and signal_pending():
                raise _interrupted(len(taken))
            if not (trylock and lock.down_write_trylock()):
                await lock.down_write()
            taken.append(lock)
            lock.taken_by = mark
        if len(batch) == _BATCH and batch[0].sleepable:
            await anyio.lowlevel.checkpoint()


def _release(taken: list[RmapLock]) -> None:
    """Release the locks, each of them even where lockdep objects to what was done under them."""
    objection: ScheduleWhileAtomic | None = None
    for lock in reversed(taken):
        lock.taken_by = None
        try:
            lock.up_write()
        except ScheduleWhileAtomic as error:
            objection = objection or error
    if objection is not None:
        raise objection


def _interrupted(taken: int) -> Interrupted:
    return Interrupted(f"a signal is pending: {taken} locks had been taken and are released")
