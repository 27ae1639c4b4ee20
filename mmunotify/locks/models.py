"""The locking models: what the reverse-map locks of a family of address spaces are.

Locks are shared between address spaces (files, fork), so the model belongs to the owner of them
all. It is a type parameter (`Notifiers[RwSems]`) and a value (`locks=RwSems`): a driver whose
callbacks sleep is refused under `SpinLocks`, by a type checker and at run time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

from .rwsem import RWSemaphore, RWSemaphoreStatistics
from .spinlock import SpinLockStatistics, SpinRWLock

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager


class RmapLock(Protocol):
    """A reverse-map lock (i_mmap, anon_vma) of either model: see `RWSemaphore`, `SpinRWLock`.

    Code under one is written once, as `async def` with `async with lock.writing():`.
    """

    name: str
    lock_class: str
    order: int | None
    address: int
    """Stands for the address in memory: unique, and ascending in the order of creation."""
    taken_by: object | None
    """The "already taken" mark of `take_all.Flagged`; belongs to whoever holds the lock."""

    @property
    def sleepable(self) -> bool:
        """Whether the held part may suspend."""
        ...

    @property
    def locked(self) -> bool:
        """Whether somebody holds it, in either mode."""
        ...

    @property
    def is_contended(self) -> bool:
        """Whether somebody waits."""
        ...

    @property
    def needbreak(self) -> bool:
        """Whether somebody waits whom holding on keeps out."""
        ...

    def reading(self) -> AbstractAsyncContextManager[None, None]:
        """Held for reading inside `async with`."""
        ...

    def writing(self) -> AbstractAsyncContextManager[None, None]:
        """Held for writing inside `async with`."""
        ...

    async def down_read(self) -> None:
        """Take it for reading."""
        ...

    async def down_write(self) -> None:
        """Take it for writing."""
        ...

    def down_read_trylock(self) -> bool:
        """Take it for reading if that needs no waiting; whether it was taken."""
        ...

    def down_write_trylock(self) -> bool:
        """Take it for writing if that needs no waiting; whether it was taken."""
        ...

    def up_read(self) -> None:
        """A reader lets go."""
        ...

    def up_write(self) -> None:
        """The writer lets go."""
        ...

    def downgrade_write(self) -> None:
        """The writer becomes a reader."""
        ...

    def statistics(self) -> RWSemaphoreStatistics | SpinLockStatistics:
        """A snapshot for debugging."""
        ...


class LockModel(ABC):
    """What the two models have in common. Models are used as classes and never instantiated."""

    name: ClassVar[str]
    sleepable: ClassVar[bool]
    """Whether callbacks under a reverse-map lock may suspend."""

    @staticmethod
    @abstractmethod
    def rmap_lock(name: str, lock_class: str | None = None) -> RmapLock:
        """A new reverse-map lock of this model."""


class SpinLocks(LockModel):
    """Reverse-map locks are spinlocks, as in 2008: atomic and deferred drivers can register."""

    name = "SpinLocks"
    sleepable = False

    @staticmethod
    def rmap_lock(name: str, lock_class: str | None = None) -> SpinRWLock:
        """A `SpinRWLock`."""
        return SpinRWLock(name, lock_class=lock_class)


class RwSems(LockModel):
    """Reverse-map locks are rwsems (patches 07 and 08; Linux today): all drivers can register."""

    name = "RwSems"
    sleepable = True

    @staticmethod
    def rmap_lock(name: str, lock_class: str | None = None) -> RWSemaphore:
        """An `RWSemaphore`."""
        return RWSemaphore(name, lock_class=lock_class)
