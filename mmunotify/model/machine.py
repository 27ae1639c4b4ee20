"""Machine: the frames, swap, files and processes of one computer, and its locking model."""

from __future__ import annotations

import errno
import itertools
from time import monotonic_ns
from typing import TYPE_CHECKING, Final, Generic, Literal, TypeVar, overload

import anyio
import anyio.lowlevel

from mmunotify.errors import MmError
from mmunotify.locks import SRCU, Flagged, LockModel, RwSems, TakeAll
from mmunotify.locks.base import READY, Awaited
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE

from . import flags as f
from . import frames as fr
from . import huge_memory, migrate, oom_kill
from .device import DeviceFile
from .filemap import File, Kind
from .frames import Frames
from .hugetlb import HugeFile, HugePool
from .ksm import Ksm
from .lru import Lru
from .mm import AddressSpace
from .pgtable import LeafPool
from .rmap import AnonVmas, Owners
from .swap import Swap
from .vmscan import Reclaim

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from .batching import Batching, Section
    from .vma import Vma

L = TypeVar("L", bound=LockModel)
Thp = Literal["never", "madvise", "always"]
Era = Literal["linux-6", "v16"]
GatherAt = Literal["inside", "outside"]
_RESCHED_PAGES: Final = 4096
_RESCHED_NS: Final = 1_000_000


class Machine(Generic[L]):
    """One computer. `async with Machine(frames=…) as machine:` ends every process on the way out.

    `frames` and `swap` are pages. `locks` is the locking model of the reverse maps, which decides
    which drivers can register. `contents` gives pages real bytes. `batching` says how zaps are told
    and `era` what is announced. `hugepages` of 2 MiB are set aside for hugetlb. `gather` says
    where an unmap collects its pages: inside of its section, or outside around it with preemption
    off, which was so before patches 4 and 5 of 2008 and lets nobody suspend in it. `take_all` is
    how registration keeps sections out.
    """

    @overload
    def __init__(
        self: Machine[RwSems], frames: int = ..., swap: int = ..., locks: type[RwSems] = ..., *,
        contents: bool = ..., batching: Batching = ..., era: Era = ..., thp: Thp = ...,
        hugepages: int = ..., gather: GatherAt = ..., take_all: TakeAll | None = ...,
        name: str = ..., logger: object = ...,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self, frames: int, swap: int, locks: type[L], *,
        contents: bool = ..., batching: Batching = ..., era: Era = ..., thp: Thp = ...,
        hugepages: int = ..., gather: GatherAt = ..., take_all: TakeAll | None = ...,
        name: str = ..., logger: object = ...,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self, frames: int = ..., swap: int = ..., *, locks: type[L],
        contents: bool = ..., batching: Batching = ..., era: Era = ..., thp: Thp = ...,
        hugepages: int = ..., gather: GatherAt = ..., take_all: TakeAll | None = ...,
        name: str = ..., logger: object = ...,
    ) -> None: ...  # fmt: skip
    def __init__(
        self,
        frames: int = 1 << 16,
        swap: int = 1 << 16,
        locks: type[LockModel] = RwSems,
        *,
        contents: bool = False,
        batching: Batching = "range",
        era: Era = "linux-6",
        thp: Thp = "madvise",
        hugepages: int = 0,
        gather: GatherAt = "inside",
        take_all: TakeAll | None = None,
        name: str = "machine",
        logger: object = None,
    ) -> None:
        if frames < 2:
            raise MmError(errno.EINVAL, f"Machine(frames={frames}): expected at least 2")
        self.name: Final = name
        self.locks: Final = locks
        self.batching: Final[Batching] = batching
        self.era: Final[Era] = era
        self.gather: Final[GatherAt] = gather
        self.thp: Final[Thp] = thp
        self.take_all: Final[TakeAll] = take_all if take_all is not None else Flagged()
        self.logger: Final = logger
        self.srcu: Final = SRCU(f"srcu of {name}")
        self.frames: Final = Frames(frames, contents=contents)
        self.leaves: Final = LeafPool()
        self.owners: Final = Owners()
        self.anon_vmas: Final = AnonVmas(self.owners, locks)
        self.lru: Final = Lru(self.frames)
        self.swap: Final = Swap(swap, self.frames)
        self.vmscan: Final = Reclaim(self)
        self.ksm: Final = Ksm(self)
        self.mms: Final[list[AddressSpace[L]]] = []
        """The living address spaces, oldest first."""
        self.files: Final[list[File]] = []
        self.on_new_mm: Callable[[AddressSpace[L]], object] | None = None
        """Called with every new address space, if somebody checks."""
        self.owed: Final[list[Section]] = []
        """Sections under a reverse-map lock, whose deferred drivers have yet to finish."""
        self.migrating: Final[dict[int, anyio.Event]] = {}
        self.hugetlb: Final = HugePool(self, hugepages)
        zero = self.frames.alloc()
        self.frames.get(zero)
        self.zero_entry: Final = zero << PAGE_SHIFT | f.PTE_SPECIAL
        # Watermarks: below `low` an allocation reclaims until `high` is reached.
        self.low: Final = min(frames // 64, 1024)
        self.high: Final = self.low + min(frames // 32, 2048)
        self._orders = itertools.count()
        self._file_names = itertools.count()
        self._work = 0
        self._rested_ns = monotonic_ns()

    def __repr__(self) -> str:
        return (
            f"<Machine {self.name} ({self.locks.__name__}): {self.frames.used} of "
            f"{self.frames.count} frames, {self.swap.used} of {self.swap.count} slots in use>"
        )

    async def __aenter__(self) -> Machine[L]:
        return self

    async def __aexit__(self, *exc: object) -> None:
        with anyio.CancelScope(shield=True):
            for mm in list(self.mms):
                if mm.users:
                    mm.users = 1
                    await mm.exit()

    # ------------------------------------------------------------------ processes

    def new_mm(self, name: str = "") -> AddressSpace[L]:
        """An empty address space."""
        mm: AddressSpace[L] = AddressSpace(self, name or f"mm{len(self.mms)}")
        self.mms.append(mm)
        if self.on_new_mm is not None:
            self.on_new_mm(mm)
        return mm

    def forget(self, mm: AddressSpace[L]) -> None:
        """The address space is torn down."""
        self.mms.remove(mm)

    def next_order(self) -> int:
        """A number for lockdep: mmap_locks of several processes are taken parent first."""
        return next(self._orders)

    def cond_resched(self, pages: int = 0) -> Awaited:
        """Let others run, after every 4 096 pages of work or millisecond of it; await the answer.

        Called where no spinlock is held and no section is open; cancellation is delivered here.
        """
        self._work += pages
        if self._work < _RESCHED_PAGES and monotonic_ns() - self._rested_ns < _RESCHED_NS:
            return READY
        return self._rest()

    async def _rest(self) -> None:
        self._work = 0
        await anyio.lowlevel.checkpoint()
        self._rested_ns = monotonic_ns()

    def settle(self) -> Awaited:
        """Settle the sections that were owed, now that no reverse-map lock is held; await it."""
        return self._settle() if self.owed else READY

    async def _settle(self) -> None:
        while self.owed:
            await self.owed.pop().settle()

    # ------------------------------------------------------------------ frames

    def alloc_frame_nowait(self) -> int:
        """A fresh frame, or -1 where one would have to be reclaimed first."""
        return self.frames.alloc()

    async def alloc_frame(self) -> int:
        """A fresh frame; reclaims if memory is low, which may announce. ENOMEM if there is none."""
        if self.frames.free <= self.low:
            await self.vmscan.balance()
        frame = self.frames.alloc()
        if frame < 0:
            raise MmError(errno.ENOMEM, f"{self.name}: no free frame of {self.frames.count}")
        return frame

    async def balance(self) -> None:
        """Reclaim if memory is low."""
        await self.vmscan.balance()

    def put_page(self, frame: int) -> None:
        """Drop a reference; a page that only the swap cache still wants goes with its slot."""
        word = self.frames.word[frame]
        if word & (fr.PG_SWAPCACHE | fr.MAP_MASK) == fr.PG_SWAPCACHE and word & fr.REF_MASK == 2:
            self.swap.try_free(frame)
        self.frames.put(frame)

    def remove_rmap(self, frame: int) -> None:
        """One mapping less (folio_remove_rmap); the reference is the caller's."""
        word = self.frames.word[frame] - fr.MAP_ONE
        if not word & fr.MAP_MASK:
            word &= ~(fr.PG_MLOCKED | fr.PG_UNEVICTABLE)
        self.frames.word[frame] = word

    def mlock(self, frame: int) -> None:
        """Keep a page off the lists that reclaim looks at."""
        self.frames.word[frame] |= fr.PG_MLOCKED | fr.PG_UNEVICTABLE

    def mark_accessed(self, frame: int) -> None:
        """Used: an inactive page is referenced, then active (folio_mark_accessed)."""
        word = self.frames.word[frame]
        if not word & fr.PG_REFERENCED:
            self.frames.word[frame] = word | fr.PG_REFERENCED
        elif word & fr.PG_LRU and not word & (fr.PG_ACTIVE | fr.PG_UNEVICTABLE):
            self.lru.activate(frame)
            self.frames.word[frame] &= ~fr.PG_REFERENCED

    def forget_references(self, entries: npt.NDArray[np.uint64]) -> None:
        """Clear the referenced flags of the pages that some present entries map."""
        from .memory import SPECIAL, frames_of

        pfns = frames_of(entries[(entries & SPECIAL) == 0])
        self.frames.words[pfns] &= ~self.frames.words.dtype.type(fr.PG_REFERENCED)

    def contents_of(self, frame: int) -> bytes:
        """The bytes of a frame, zeros if the machine keeps none."""
        return huge_memory.contents_of(self, frame)

    async def read_swap_cache(self, slot: int, *, readahead: bool) -> int:
        """Read a slot into the swap cache; its frame, which the cache holds."""
        frame = await self.alloc_frame()
        if slot in self.swap.cache:
            self.frames.give_back(frame)
            return self.swap.cache[slot]
        self.swap.read(slot, frame)
        self.swap.add_to_cache(frame, slot)
        self.frames.word[frame] |= fr.PG_SWAPBACKED | (fr.PG_READAHEAD if readahead else 0)
        self.lru.add(frame, file=False)
        return frame

    # ------------------------------------------------------------------ files

    def file(
        self, pages: int = 0, kind: Kind = "memfd", fill: bool = False, name: str = ""
    ) -> File:
        """A file of `pages` pages; with `fill`, page i holds the byte (i + 1) & 255.

        An ext4 file begins on the disk and in the page cache, clean.
        """
        file = File(self, name or f"f{next(self._file_names)}", pages << PAGE_SHIFT, kind)
        self.files.append(file)
        if fill:
            for index in range(pages):
                frame = self.frames.alloc()
                if frame < 0:
                    raise MmError(errno.ENOMEM, f"{self.name}: no frame for {file!r}")
                contents = bytearray([(index + 1) & 255]) * PAGE_SIZE
                if self.frames.data is not None:
                    self.frames.data[frame] = contents
                    if kind == "ext4":
                        file.disk[index] = bytearray(contents)
                file.add(index, frame)
                if kind == "memfd":
                    self.frames.word[frame] |= fr.PG_DIRTY
            if kind == "ext4":
                self.lru.drain()
        return file

    def shmem_file(self, size: int) -> File:
        """The file behind shared anonymous memory of `size` bytes."""
        file = File(self, f"f{next(self._file_names)}", size, "memfd")
        self.files.append(file)
        return file

    def huge_file(self, size: int, owner: AddressSpace[L] | None) -> HugeFile:
        """The file behind a hugetlb mapping of `size` bytes; private if it has an owner."""
        file = HugeFile(self, f"f{next(self._file_names)}", size, owner)
        self.files.append(file)
        return file

    def device(
        self, size: int, frame_of: Callable[[int], int] | None = None, name: str = "device"
    ) -> DeviceFile:
        """A device of `size` bytes, whose frames shared mappings of it map without counting."""
        file = DeviceFile(self, name, size, frame_of)
        self.files.append(file)
        return file

    def close(self, file: File) -> None:
        """Close the descriptor; mappings keep the file."""
        file.put()

    async def truncate(self, file: File, size: int) -> None:
        """Set the size in bytes; what is mapped behind it is unmapped."""
        await self.cond_resched()
        await file.truncate(size)

    async def fallocate(self, file: File, mode: str, offset: int, length: int) -> None:
        """Make a hole ("punch"), take out ("collapse") or zero ("zero") a range of bytes."""
        await self.cond_resched()
        await file.fallocate(mode, offset, length)

    async def pread(self, file: File, offset: int, size: int) -> bytes:
        """Bytes of the file."""
        await self.cond_resched()
        return await file.pread(offset, size)

    async def pwrite(self, file: File, offset: int, data: bytes) -> None:
        """Write bytes through the page cache."""
        await self.cond_resched()
        await file.pwrite(offset, data)

    async def fsync(self, file: File) -> None:
        """Write the dirty pages back; each is write-protected where it is shared."""
        await self.cond_resched()
        await file.writeback()

    def drop_cache(self, file: File) -> None:
        """Forget clean pages that nobody maps (POSIX_FADV_DONTNEED)."""
        file.drop_cache()

    # ------------------------------------------------------------------ who else moves pages

    async def reclaim(self) -> None:
        """Reclaim everything that can be (memory.force_empty)."""
        await self.cond_resched()
        await self.vmscan.force_empty()

    async def reclaim_pages(self, frames: list[int]) -> int:
        """Reclaim these pages, used or not (MADV_PAGEOUT); how many were freed."""
        return await self.vmscan.shrink(frames, force=True)

    async def ksm_scan(self) -> None:
        """One full scan of ksmd."""
        await self.cond_resched()
        await self.ksm.scan()

    async def migrate(self, mm: AddressSpace[L], addr: int) -> int:
        """Move the page at `addr` to another frame; its number."""
        await self.cond_resched()
        return await migrate.migrate_page(self, mm, addr)

    async def compact(self) -> int:
        """Move pages together, so that blocks of 2 MiB become free; how many were moved."""
        await self.cond_resched()
        return await migrate.compact(self)

    async def wait_migration(self, frame: int) -> None:
        """Wait until a page that is being moved has arrived."""
        done = self.migrating.get(frame)
        if done is not None:
            await done.wait()

    async def oom_reap(self, mm: AddressSpace[L]) -> bool:
        """The OOM reaper takes the private memory of `mm`; False if some had to be left."""
        await self.cond_resched()
        return oom_kill.oom_reap(mm)

    async def collapse(self, mm: AddressSpace[L], vma: Vma, first: int, last: int) -> None:
        """MADV_COLLAPSE of pages [first, last)."""
        await huge_memory.collapse(self, mm, vma, first, last)

    async def pageout_huge(
        self, mm: AddressSpace[L], vma: Vma, page: int, first: int, last: int
    ) -> bool:
        """MADV_PAGEOUT of 2 MiB at `page`; True if small pages are left to do."""
        return await huge_memory.pageout_huge(self, mm, vma, page, first, last)

    async def split_folio(self, mm: AddressSpace[L], page: int) -> None:
        """Make small pages of the folio at `page`."""
        huge_memory.split_folio(self, mm, page)
