"""AddressSpace: one mm_struct, its locks, its page tables, and the operations as its methods.

`mm_users` keeps the address space alive, `mm_count` the structure: a driver that holds the second
must take the first (`tryget`) before it touches a mapping, and fails once the last user is gone.

Locking is Linux's. mmap_lock is an rwsem; a VMA that a writer changes carries the writer's sequence
number (`vma_start_write`), and a fault on any other VMA needs no lock, because what does not
suspend cannot be interleaved. A fault that may suspend takes mmap_lock for reading.

Source: include/linux/mm_types.h, kernel/fork.c (mmput), mm/mmap.c (exit_mmap).
"""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast, overload

from mmunotify.errors import AddressSpaceExited
from mmunotify.locks import LockModel, RWSemaphore, RwSems
from mmunotify.locks.base import READY, Awaited
from mmunotify.notifiers import Notifiers
from mmunotify.ranges import PAGE_SHIFT, Event, Range

from . import device as _device
from . import flags as f
from . import fork as _fork
from . import frames as fr
from . import gup as _gup
from . import huge_memory as _huge
from . import madvise as _madvise
from . import memory as _memory
from . import mlock as _mlock
from . import mmap as _mmap
from . import mprotect as _mprotect
from . import mremap as _mremap
from . import task_mmu as _task_mmu
from . import uaccess as _uaccess
from . import userfaultfd as _userfaultfd
from .batching import Section
from .pgtable import PageTable
from .primary import ModelPrimary
from .rmap import WriteLocked, locks_of
from .vma import find_vma

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from mmunotify.audience import Subscription
    from mmunotify.drivers import AnyDriver, AtomicDriver, DeferredDriver

    from .machine import Machine
    from .rmap import AnonVma
    from .tlb import Tlb
    from .vma import Vma

    A = TypeVar("A", bound="AtomicDriver | DeferredDriver")
    D = TypeVar("D", bound="AnyDriver")

L = TypeVar("L", bound=LockModel)


class _MmapWrite:
    """`async with`: mmap_lock for writing; on the way out every VMA lock is released too."""

    __slots__ = ("_mm",)

    def __init__(self, mm: AddressSpace[Any]) -> None:
        self._mm = mm

    def __aenter__(self) -> Awaited:
        lock = self._mm.mmap_lock
        return READY if lock.down_write_trylock() else lock.down_write()

    def __aexit__(self, *exc: object) -> Awaited:
        self._mm.lock_seq += 1
        self._mm.mmap_lock.up_write()
        return READY


class AddressSpace(Generic[L]):
    """One process's memory. Made by `Machine.new_mm` and `fork`, ended by `exit`.

    Addresses and sizes are bytes. Operations may suspend and announce; they raise MmError with the
    errno that Linux would return, having announced what Linux would have.
    """

    def __init__(self, machine: Machine[L], name: str) -> None:
        self.machine: Final = machine
        self.name: Final = name
        self.mmap_lock: Final = RWSemaphore(
            f"mmap_lock[{name}]", lock_class="mmap_lock", order=machine.next_order()
        )
        self.write_locked: Final = _MmapWrite(self)
        self.lock_seq = 0
        self.pt: Final = PageTable(machine.leaves)
        self.vmas: Final[list[Vma]] = []
        """Ascending; `firsts` has their first pages."""
        self.firsts: Final[list[int]] = []
        self.primary: Final = ModelPrimary(self)
        # Which locking model the machine has, the type parameter says.
        self.notifiers: Final[Notifiers[L]] = Notifiers(
            cast("type[L]", machine.locks), name=name, primary=self.primary, quiesce=self._quiesce,
            srcu=machine.srcu, logger=machine.logger,
        )  # fmt: skip
        self.users = 1
        """mm_users."""
        self.count = 1
        """mm_count."""
        self.brk_start = self.brk_end = _mmap.BRK_BASE
        self.min_flt = 0
        self.maj_flt = 0
        self.on_fault: Callable[[int, int], None] | None = None
        """Called with (address, FAULT_ flags) for every page fault exception."""
        self.tlb: Tlb | None = None
        """The primary CPU's TLB, if somebody watches it."""
        self.oom_skip = False
        self.announced: Final[deque[Range]] = deque(maxlen=1024)
        """The latest announcements, for the text of StaleTranslation."""

    def __repr__(self) -> str:
        return f"<AddressSpace {self.name} {len(self.vmas)} vmas>"

    # ------------------------------------------------------------------ drivers

    @overload
    async def register(self, driver: A) -> Subscription[A]: ...
    @overload
    async def register(self: AddressSpace[RwSems], driver: D) -> Subscription[D]: ...
    async def register(self, driver: Any) -> Subscription[Any]:
        """`Notifiers.register` with mmap_lock and every reverse-map lock held for writing."""
        return await self.notifiers.register(driver)

    @overload
    def attached(
        self, driver: A, *, grace: float = ...
    ) -> AbstractAsyncContextManager[Subscription[A]]: ...
    @overload
    def attached(
        self: AddressSpace[RwSems], driver: D, *, grace: float = ...
    ) -> AbstractAsyncContextManager[Subscription[D]]: ...
    def attached(
        self, driver: Any, *, grace: float = float("inf")
    ) -> AbstractAsyncContextManager[Subscription[Any]]:
        """`register` on entry, `unregister` on exit."""
        return self.notifiers.attached(driver, grace=grace)

    async def unregister(self, subscription: Subscription[AnyDriver]) -> None:
        """`Notifiers.unregister`."""
        await self.notifiers.unregister(subscription)

    @asynccontextmanager
    async def _quiesce(self) -> AsyncIterator[None]:
        async with self.write_locked:
            for vma in self.vmas:
                self.vma_start_write(vma)
            files = [vma.file.i_mmap_lock for vma in self.vmas if vma.file is not None]
            anons = [anon.lock for vma in self.vmas for anon in vma.chain]
            async with self.machine.take_all.taking([*files, *anons]):
                yield

    # ------------------------------------------------------------------ lifetime

    def tryget(self) -> bool:
        """Take a reference on mm_users unless the address space is exiting (mmget_not_zero)."""
        if not self.users:
            return False
        self.users += 1
        return True

    async def put(self) -> None:
        """Drop a reference on mm_users; the last one tears the address space down (mmput)."""
        self.users -= 1
        if not self.users:
            await _fork.exit_mmap(self)

    def grab(self) -> None:
        """Take a reference on mm_count: the structure stays, its mappings may go (mmgrab)."""
        self.count += 1

    def drop(self) -> None:
        """Drop a reference on mm_count (mmdrop)."""
        self.count -= 1

    async def exit(self) -> None:
        """The process ends. Its drivers' `release` runs first; no range is announced."""
        self.require_alive()
        await self.put()

    def require_alive(self) -> None:
        """Raise AddressSpaceExited after the last user has gone."""
        if not self.users:
            raise AddressSpaceExited(f"{self.name} has exited: expected a living address space")

    # ------------------------------------------------------------------ sections and entries

    def section(
        self, first: int, last: int, event: Event, *, zap: bool = False, locked: bool = False
    ) -> Section:
        """`async with`: drivers drop pages [first, last) on entry, may look again on exit.

        A caller that zaps settles the section itself; one that holds a reverse-map lock says
        `locked` and calls `Machine.settle` when it has dropped it.
        """
        return Section(self, first, last, event, zap=zap, locked=locked)

    zap_page_range = _memory.zap_page_range

    def split_entry(self, index: int) -> None:
        """Map a huge page by small entries, without a word."""
        _huge.split_entry(self, index)

    def find_vma(self, page: int) -> Vma | None:
        """The VMA that maps a page number, if any."""
        return find_vma(self, page)

    def first_announcement(self, start: int, end: int, after: object) -> str:
        """The first announcement that met [start, end) bytes, as text; empty if none is known.

        Of those after `after`, the latest at that time; of all that are known if it is not there.
        """
        found = ""
        for rng in reversed(self.announced):
            if rng is after:
                break
            if rng.overlaps(start, end):
                found = repr(rng)
        return found

    def vma_start_write(self, vma: Vma) -> None:
        """Keep faults off a VMA until mmap_lock, which is held for writing, is released."""
        vma.lock_seq = self.lock_seq

    def set_pte(self, page: int, entry: int) -> None:
        """Set the entry of a page whose leaf exists."""
        self.pt.leaves[page >> 9].pte[page & 511] = entry

    def maps(self, page: int, frame: int) -> bool:
        """Whether the entry of a page maps this frame."""
        entry = self.pt.get(page)
        return bool(
            entry & f.PTE_PRESENT
            and (entry & f.PFN_MASK) >> PAGE_SHIFT == frame
            and not entry & f.PTE_SPECIAL
        )

    def flush_tlb(self, first: int, last: int) -> None:
        """Flush pages [first, last) from the primary's TLB."""
        if self.tlb is not None:
            self.tlb.flush(first, last)

    def add_new_anon(self, vma: Vma, page: int, frame: int) -> None:
        """A fresh frame becomes an anonymous page of a VMA, exclusive, mapped once."""
        assert vma.anon_vma is not None
        frames = self.machine.frames
        frames.word[frame] |= fr.MAPPED_ONCE | fr.PG_ANON | fr.PG_EXCLUSIVE | fr.PG_SWAPBACKED
        frames.set_owner(frame, vma.anon_vma.number, page - vma.first + vma.pgoff)
        self.machine.lru.add(frame, file=False)
        if vma.flags & f.VM_LOCKED:
            self.machine.mlock(frame)

    # ------------------------------------------------------------------ anon_vma

    def anon_vma_prepare_nowait(self, vma: Vma) -> bool:
        """Give a VMA an anon_vma; False if a neighbour's would need waiting for its lock."""
        if vma.anon_vma is not None:
            return True
        anon_vma = self._mergeable_anon_vma(vma)
        if anon_vma is None:
            self._use_anon_vma(vma, self.machine.anon_vmas.alloc())
            return True
        if not anon_vma.lock.down_write_trylock():
            return False
        self._use_anon_vma(vma, anon_vma)
        anon_vma.lock.up_write()
        return True

    async def anon_vma_prepare(self, vma: Vma) -> None:
        """Give a VMA an anon_vma: a neighbour's, so that they can merge later, or a new one."""
        while not self.anon_vma_prepare_nowait(vma):
            anon_vma = self._mergeable_anon_vma(vma)
            if anon_vma is not None:
                async with WriteLocked([anon_vma.lock]):
                    if vma.anon_vma is None and self._mergeable_anon_vma(vma) is anon_vma:
                        self._use_anon_vma(vma, anon_vma)

    def _use_anon_vma(self, vma: Vma, anon_vma: AnonVma) -> None:
        vma.anon_vma = anon_vma
        self.machine.anon_vmas.link(vma, anon_vma)
        anon_vma.active += 1

    def _mergeable_anon_vma(self, vma: Vma) -> AnonVma | None:
        after = find_vma(self, vma.last)
        if after is not None and after.anon_vma is not None and _could_merge(vma, after):
            return after.anon_vma
        before = find_vma(self, vma.first - 1)
        if before is not None and before.anon_vma is not None and _could_merge(before, vma):
            return before.anon_vma
        return None

    async def reclaim(self, start: int, end: int) -> int:
        """Swap out or drop the pages of [start, end) bytes, as a recording says; how many."""
        return await self.machine.vmscan.reclaim_range(self, start >> PAGE_SHIFT, end >> PAGE_SHIFT)

    def age(self, start: int, end: int) -> bool:
        """Clear the accessed bits of [start, end) bytes, the drivers' too; whether any was set."""
        return self.machine.vmscan.age_range(self, start >> PAGE_SHIFT, end >> PAGE_SHIFT)

    def locks_of(self, *vmas: Vma) -> WriteLocked:
        """The reverse-map locks of some VMAs, for writing."""
        return WriteLocked(locks_of(vmas))

    # ------------------------------------------------------------------ system calls

    mmap = _mmap.mmap
    munmap = _mmap.munmap
    brk = _mmap.brk
    mprotect = _mprotect.mprotect
    mremap = _mremap.mremap
    madvise = _madvise.madvise
    process_madvise = _madvise.process_madvise
    mlock = _mlock.mlock
    munlock = _mlock.munlock
    mseal = _mlock.mseal
    msync = _mlock.msync
    fork = _fork.fork
    execve = _fork.execve
    clear_refs = _task_mmu.clear_refs
    pagemap_scan = _task_mmu.pagemap_scan
    userfaultfd = _userfaultfd.open_uffd

    # ------------------------------------------------------------------ accesses

    access = _uaccess.access
    access_nowait = _uaccess.access_nowait
    touch = _uaccess.touch
    read = _uaccess.read
    write = _uaccess.write
    copy_from_user = _uaccess.copy_from_user
    copy_to_user = _uaccess.copy_to_user
    fault = _uaccess.fault
    access_remote = _gup.access_remote
    populate = _gup.populate
    insert_pfn = _device.insert_pfn
    zap_vma_ptes = _device.zap_vma_ptes
    pin = _gup.pin
    unpin = _gup.unpin

    # ------------------------------------------------------------------ huge pages

    thp_wanted = _huge.thp_wanted
    fault_huge = _huge.fault_huge
    wp_huge = _huge.wp_huge
    split_huge_pmd = _huge.split_huge_pmd
    share_huge = _huge.share_huge

    # ------------------------------------------------------------------ watching

    smaps = _task_mmu.smaps
    pagemap = _task_mmu.pagemap


def _could_merge(before: Vma, after: Vma) -> bool:
    """Whether only permissions keep two neighbours apart (anon_vma_compatible)."""
    return (
        before.last == after.first
        and before.file is after.file
        and not (before.flags ^ after.flags) & ~f.VM_ACCESS_FLAGS
        and after.pgoff == before.pgoff + before.pages
        and len((before if before.anon_vma is not None else after).chain) == 1
    )
