"""Reverse maps: from a frame to the VMAs that map it (anon_vma, i_mmap).

A frame's owner is an anon_vma or a file, found by number; each keeps its VMAs in an interval tree
by page offset. Walks run under the owner's lock for reading and visit VMAs in offset order, which
is the order of announcements; whoever changes a VMA's place takes it for writing. Offsets are
pages.

Source: mm/rmap.c, mm/interval_tree.c.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

from mmunotify.locks.base import READY, Awaited

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mmunotify.locks import LockModel, RmapLock

    from .filemap import File
    from .ksm import StableNode
    from .vma import Vma


class IntervalTree:
    """VMAs by the page offsets that they map: a list sorted by first offset.

    Equal offsets keep the order of insertion. `_longest` bounds how far left an overlap can begin.
    """

    __slots__ = ("_keys", "_longest", "vmas")

    def __init__(self) -> None:
        self._keys: list[int] = []
        self.vmas: list[Vma] = []
        self._longest = 0

    def __len__(self) -> int:
        return len(self.vmas)

    def insert(self, vma: Vma) -> None:
        """Add a VMA behind those of the same offset."""
        self._insert_at(bisect_right(self._keys, vma.pgoff), vma)

    def insert_after(self, vma: Vma, prev: Vma) -> None:
        """Add a VMA right behind another of the same offset (a child's behind its parent's)."""
        self._insert_at(self._find(prev) + 1, vma)

    def remove(self, vma: Vma) -> None:
        """Take a VMA out, whose offset is still what it was when it went in."""
        at = self._find(vma)
        del self._keys[at], self.vmas[at]

    def overlapping(self, first: int, last: int) -> list[Vma]:
        """The VMAs that map any of the offsets [first, last), in order; a snapshot."""
        low = bisect_left(self._keys, first - self._longest)
        high = bisect_left(self._keys, last)
        return [vma for vma in self.vmas[low:high] if vma.pgoff + vma.last - vma.first > first]

    def _insert_at(self, at: int, vma: Vma) -> None:
        self._keys.insert(at, vma.pgoff)
        self.vmas.insert(at, vma)
        if vma.last - vma.first > self._longest:
            self._longest = vma.last - vma.first

    def _find(self, vma: Vma) -> int:
        at = bisect_left(self._keys, vma.pgoff)
        while self.vmas[at] is not vma:
            at += 1
        return at


class AnonVma:
    """What the anonymous pages of related VMAs are found by.

    `active` counts the VMAs that add pages to it, `children` the anon_vmas forked from it (a root
    counts itself); one that has neither two children nor an active VMA can be used again by a fork.
    """

    __slots__ = ("active", "children", "lock", "number", "parent", "root", "tree")

    def __init__(self, lock: RmapLock | None, parent: AnonVma | None) -> None:
        self.number = 0
        self.tree = IntervalTree()
        self.active = 0
        self.children = 0
        self.root: AnonVma = self if parent is None else parent.root
        self.parent: AnonVma = self if parent is None else parent
        self.lock: RmapLock = lock if lock is not None else self.root.lock
        """That of the root: a family has one."""


class Owners:
    """Numbers for what can own a frame: anon_vmas, files, KSM's stable nodes."""

    def __init__(self) -> None:
        self.table: Final[list[AnonVma | File | StableNode | None]] = [None]
        """By number; `owners[number]` for who is not in a hurry."""
        self._free: list[int] = []

    def add(self, owner: AnonVma | File | StableNode) -> int:
        """Give it a number."""
        if self._free:
            number = self._free.pop()
            self.table[number] = owner
            return number
        self.table.append(owner)
        return len(self.table) - 1

    def remove(self, number: int) -> None:
        """Take the number back."""
        self.table[number] = None
        self._free.append(number)

    def __getitem__(self, number: int) -> AnonVma | File | StableNode | None:
        return self.table[number]


class AnonVmas:
    """Makes and frees the anon_vmas of one machine."""

    def __init__(self, owners: Owners, locks: type[LockModel]) -> None:
        self.owners: Final = owners
        self._locks: Final = locks
        self.count = 0
        """How many exist."""

    def alloc(self, parent: AnonVma | None = None) -> AnonVma:
        """A new anon_vma, the root of a family unless it has a parent."""
        lock = None if parent is not None else self._locks.rmap_lock("anon_vma")
        anon_vma = AnonVma(lock, parent)
        anon_vma.number = self.owners.add(anon_vma)
        anon_vma.parent.children += 1
        self.count += 1
        return anon_vma

    def link(self, vma: Vma, anon_vma: AnonVma) -> None:
        """Let an anon_vma find the pages of a VMA."""
        vma.chain.append(anon_vma)
        anon_vma.tree.insert(vma)

    def clone(self, vma: Vma, source: Vma) -> None:
        """Link a VMA to all anon_vmas of another, whose pages it has copies or parts of."""
        for anon_vma in source.chain:
            self.link(vma, anon_vma)
            if (
                vma.anon_vma is None
                and source.anon_vma is not None
                and anon_vma.children < 2
                and anon_vma.active == 0
            ):
                vma.anon_vma = anon_vma
        if vma.anon_vma is not None:
            vma.anon_vma.active += 1

    def fork(self, vma: Vma, source: Vma) -> None:
        """Give a child's VMA its own anon_vma below its parent's, and links to those above."""
        if source.anon_vma is None:
            return
        self.clone(vma, source)
        if vma.anon_vma is None:
            vma.anon_vma = self.alloc(source.anon_vma)
            vma.anon_vma.active += 1
            self.link(vma, vma.anon_vma)

    def unlink(self, vma: Vma) -> None:
        """The VMA goes: free the anon_vmas that nobody else is linked to."""
        empty = []
        for anon_vma in vma.chain:
            anon_vma.tree.remove(vma)
            if not len(anon_vma.tree):
                anon_vma.parent.children -= 1
                empty.append(anon_vma)
        if vma.anon_vma is not None:
            vma.anon_vma.active -= 1
            vma.anon_vma = None
        vma.chain.clear()
        for anon_vma in empty:
            self.owners.remove(anon_vma.number)
            self.count -= 1

    def dup(self, vma: Vma, source: Vma) -> None:
        """Before a merge: a VMA without an anon_vma takes over that of its neighbour."""
        if source.anon_vma is not None and vma.anon_vma is None:
            vma.anon_vma = source.anon_vma
            self.clone(vma, source)


def locks_of(vmas: Iterable[Vma | None]) -> list[RmapLock]:
    """The distinct reverse-map locks of some VMAs: i_mmap first, then anon_vma."""
    files: list[RmapLock] = []
    anons: list[RmapLock] = []
    for vma in vmas:
        if vma is None:
            continue
        if vma.file is not None and vma.file.i_mmap_lock not in files:
            files.append(vma.file.i_mmap_lock)
        for anon_vma in vma.chain:
            if anon_vma.lock not in anons:
                anons.append(anon_vma.lock)
    return files + anons


def trylock_write(locks: list[RmapLock]) -> bool:
    """Take some locks for writing if none of them has to be waited for; whether they were taken."""
    for taken, lock in enumerate(locks):
        if not lock.down_write_trylock():
            for other in locks[:taken]:
                other.up_write()
            return False
    return True


class WriteLocked:
    """`async with`: some reverse-map locks held for writing (vma_prepare to vma_complete).

    Uncontended it does not suspend.
    """

    __slots__ = ("_locks",)

    def __init__(self, locks: list[RmapLock]) -> None:
        self._locks = locks

    def __aenter__(self) -> Awaited:
        for taken, lock in enumerate(self._locks):
            if not lock.down_write_trylock():
                return self._wait(taken)
        return READY

    async def _wait(self, taken: int) -> None:
        try:
            for lock in self._locks[taken:]:
                if not lock.down_write_trylock():
                    await lock.down_write()
                taken += 1
        except BaseException:
            for lock in self._locks[:taken]:
                lock.up_write()
            raise

    def __aexit__(self, *exc: object) -> Awaited:
        for lock in reversed(self._locks):
            lock.up_write()
        return READY


def page_of(vma: Vma, index: int) -> int:
    """The page at which a VMA maps offset `index`."""
    return vma.first + index - vma.pgoff


def walk(tree: IntervalTree, index: int) -> Iterator[tuple[Vma, int]]:
    """(VMA, page) of every VMA that may map offset `index`; whether it does, its entry tells."""
    for vma in tree.overlapping(index, index + 1):
        yield vma, vma.first + index - vma.pgoff
