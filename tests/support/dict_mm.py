"""A small address space of one's own: pages in a dict. The reference implementation of `Primary`.

It does what drivers are told of, in the documented order (S < PT < E, PT < F < R; there is no
primary TLB, so F is nothing): map, unmap, protect, fork with copy on write, eviction to swap, exit.
A page of a section in which a driver failed is leaked. Frames are stamped with a generation and
reused at once, last freed first, so a translation that outlives its frame is found out by its next
use. Who shares `Frames` shares memory, as fork does.
"""

from __future__ import annotations

import errno
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs

import mmunotify as mn
from mmunotify import PAGE_SHIFT, PAGE_SIZE, Event, Region, Translation, Translations
from mmunotify.ranges import page_down, page_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

ZEROES = bytes(PAGE_SIZE)


@attrs.define(eq=False)
class Frame:
    """One page frame of physical memory."""

    number: int
    generation: int = 0
    mapped: int = 0
    """Page table entries that map it, or did until their section is over."""
    pins: int = 0
    contents: bytearray = attrs.Factory(lambda: bytearray(PAGE_SIZE))


class Frames:
    """Physical memory: grows as needed, and reuses what was freed last."""

    def __init__(self) -> None:
        self._frames: list[Frame] = []
        self._free: list[Frame] = []

    @property
    def used(self) -> int:
        """Frames that are mapped, pinned or leaked."""
        return len(self._frames) - len(self._free)

    def __getitem__(self, number: int) -> Frame:
        return self._frames[number]

    def allocate(self, contents: bytes | bytearray) -> Frame:
        """A frame with these contents, mapped once."""
        if not self._free:
            self._free.append(Frame(len(self._frames)))
            self._frames.append(self._free[-1])
        frame = self._free.pop()
        frame.mapped = 1
        frame.contents[:] = contents
        return frame

    def unmap(self, frame: Frame) -> None:
        """One page table entry less."""
        frame.mapped -= 1
        self._settle(frame)

    def unpin(self, frame: Frame) -> None:
        """One pin less."""
        frame.pins -= 1
        self._settle(frame)

    def _settle(self, frame: Frame) -> None:
        if not frame.mapped and not frame.pins:
            frame.generation += 1
            self._free.append(frame)


@attrs.define(eq=False)
class Pte:
    """One page table entry."""

    frame: Frame
    writable: bool
    young: bool = True
    dirty: bool = False


@attrs.define(eq=False)
class DictPin:
    """What `DictMm.pin` holds."""

    translations: Translations
    held: bool = True


class DictMm:
    """An address space. mm_users is 1 at the start; `async with` gives that one back."""

    def __init__(
        self,
        frames: Frames | None = None,
        *,
        locks: type[mn.LockModel] = mn.RwSems,
        name: str = "mm",
    ) -> None:
        self.frames = Frames() if frames is None else frames
        self.locks = locks
        self.mmap_lock = mn.RWSemaphore(f"mmap_lock[{name}]")
        self.anon_vma = locks.rmap_lock(f"anon_vma[{name}]")
        self.notifiers: mn.Notifiers[Any] = mn.Notifiers(
            locks, name=name, primary=self, quiesce=self._excluding_sections
        )
        self.mm_users = 1
        """References to the address space: its pages live while there is one."""
        self.mm_count = 1
        """References to this object: one for all users together, and one for each `grab`."""
        self._regions: list[Region] = []
        self._ptes: dict[int, Pte] = {}
        self._swap: dict[int, bytes] = {}

    async def __aenter__(self) -> DictMm:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.put()

    # ------------------------------------------------------------------ what the process does

    async def map(self, start: int, end: int, *, writable: bool = True) -> None:
        """Make [start, end), page aligned and unused so far, a mapping of zeroes."""
        if start % PAGE_SIZE or end % PAGE_SIZE or start >= end:
            raise ValueError(f"map [{start:#x}, {end:#x}): expected page aligned, start < end")
        async with self.mmap_lock.writing():
            if any(self.regions(start, end)):
                raise ValueError(f"map [{start:#x}, {end:#x}): expected no mapping there")
            self._insert(Region(start, end, readable=True, writable=writable))

    async def unmap(self, start: int, end: int) -> None:
        """Take [start, end) away; what is not mapped there does not matter."""
        rng = mn.Range(start, end, Event.UNMAP)
        async with self._section(rng, self.mmap_lock.writing()) as zapped:
            self._carve(start, end)
            for page in self._pages(start, end):
                zapped.append(self._ptes.pop(page).frame)
                self._swap.pop(page, None)

    async def protect(self, start: int, end: int, *, writable: bool) -> None:
        """Forbid writing to [start, end), or allow it; who may write finds out by faulting."""
        rng = mn.Range(start, end, Event.PROTECTION_VMA)
        async with self._section(rng, self.mmap_lock.writing()):
            for region in self._carve(start, end):
                self._insert(attrs.evolve(region, writable=writable))
            if not writable:
                for page in self._pages(start, end):
                    self._ptes[page].writable = False

    async def fork(self, name: str = "child") -> DictMm:
        """A copy that shares every page until one of the two writes; pinned pages it has copies of.

        Raises ValueError for an address space without a mapping.
        """
        if not self._regions:
            raise ValueError("fork: expected an address space with a mapping")
        child = DictMm(self.frames, locks=self.locks, name=name)
        start, end = self._regions[0].start, self._regions[-1].end
        rng = mn.Range(start, end, Event.PROTECTION_PAGE)
        async with self._section(rng, self.mmap_lock.writing()):
            child._regions = [attrs.evolve(region) for region in self._regions]
            child._swap = dict(self._swap)
            for page, pte in self._ptes.items():
                if pte.frame.pins:
                    copy = self.frames.allocate(pte.frame.contents)
                    child._ptes[page] = attrs.evolve(pte, frame=copy)
                else:
                    pte.frame.mapped += 1
                    pte.writable = False
                    child._ptes[page] = attrs.evolve(pte)
        return child

    async def load(self, address: int, size: int) -> bytes:
        """Bytes as the process reads them."""
        data = b""
        for start, end in _by_page(address, address + size):
            pte = await self._access(start, write=False)
            data += pte.frame.contents[start % PAGE_SIZE :][: end - start]
        return data

    async def store(self, address: int, data: bytes) -> None:
        """The process writes."""
        for start, end in _by_page(address, address + len(data)):
            pte = await self._access(start, write=True)
            pte.dirty = True
            part = data[start - address : end - address]
            offset = start % PAGE_SIZE
            pte.frame.contents[offset : offset + len(part)] = part

    # ------------------------------------------------------------------ what reclaim does

    async def evict(self, address: int) -> bool:
        """Swap the page at `address` out, by the reverse map: mmap_lock is not taken.

        Whether it was evicted; absent and pinned pages are not. Writes back only what is dirty.
        """
        page = address >> PAGE_SHIFT
        start = page_down(address)
        rng = mn.Range(start, start + PAGE_SIZE, Event.CLEAR)
        async with self._section(rng, self.anon_vma.writing()) as zapped:
            pte = self._ptes.get(page)
            if pte is None or pte.frame.pins:
                return False
            del self._ptes[page]
            if pte.dirty:
                self._swap[page] = bytes(pte.frame.contents)
            zapped.append(pte.frame)
        return True

    def referenced(self, address: int) -> bool:
        """Whether the page was used since the last call, by anybody (I-AGE); clears it."""
        pte = self._ptes.get(address >> PAGE_SHIFT)
        if pte is None:
            return False
        young, pte.young = pte.young, False
        start = page_down(address)
        return self.notifiers.clear_flush_young(start, start + PAGE_SIZE) or young

    # ------------------------------------------------------------------ Primary

    def translate(self, address: int) -> Translation | None:
        page = address >> PAGE_SHIFT
        pte = self._ptes.get(page)
        if pte is None:
            return None
        frame = pte.frame
        return Translation(
            page << PAGE_SHIFT, frame.number, pte.writable, PAGE_SIZE, frame.generation
        )

    def translate_range(self, start: int, end: int) -> Translations:
        return self._columns(self._pages(start, end))

    async def fault_in(self, address: int, *, write: bool = False) -> Translation:
        await self._access(address, write=write)
        translation = self.translate(address)
        assert translation is not None
        return translation

    async def fault_in_range(self, start: int, end: int, *, write: bool = False) -> Translations:
        while True:
            for low, _ in _by_page(start, end):
                await self._access(low, write=write)
            # An early page may have gone while a late one was faulted in.
            if len(found := self.translate_range(start, end)) == mn.Range(start, end).pages and (
                not write or all(found.writable)
            ):
                return found

    async def pin(self, start: int, end: int, *, write: bool = True) -> DictPin:
        found = await self.fault_in_range(start, end, write=write)
        for number in found.frames:
            self.frames[number].pins += 1
        return DictPin(found)

    def unpin(self, pin: mn.Pin) -> None:
        assert isinstance(pin, DictPin)
        if not pin.held:
            raise ValueError("unpin: expected a pin that is still held")
        pin.held = False
        for number in pin.translations.frames:
            self.frames.unpin(self.frames[number])

    def read(self, translation: Translation, offset: int, size: int) -> bytes:
        return bytes(self._bytes(translation, offset, size))

    def write(self, translation: Translation, offset: int, data: bytes) -> None:
        if not translation.writable:
            raise PermissionError(errno.EACCES, f"{translation} is not writable")
        self._bytes(translation, offset, len(data))[:] = data

    def set_dirty(self, start: int, end: int, mask: Sequence[int] | None = None) -> None:
        first = start >> PAGE_SHIFT
        for page in self._pages(start, end):
            if mask is None or mask[page - first]:
                self._ptes[page].dirty = True

    def mark_young(self, start: int, end: int) -> None:
        for page in self._pages(start, end):
            self._ptes[page].young = True

    def regions(self, start: int, end: int) -> Iterator[Region]:
        return (region for region in self._regions if region.start < end and start < region.end)

    def tryget(self) -> bool:
        self.mm_users += self.mm_users > 0
        return self.mm_users > 0

    async def put(self) -> None:
        self.mm_users -= 1
        if self.mm_users:
            return
        try:
            await self.notifiers.release()
        finally:
            for pte in self._ptes.values():
                self.frames.unmap(pte.frame)
            self._ptes.clear()
            self._swap.clear()
            self._regions.clear()
            self.drop()

    # ------------------------------------------------------------------ mm_count

    def grab(self) -> None:
        """Keep this object, but not its pages (mmgrab)."""
        self.mm_count += 1

    def drop(self) -> None:
        """Give a `grab` back (mmdrop)."""
        self.mm_count -= 1

    # ------------------------------------------------------------------ inside

    @asynccontextmanager
    async def _excluding_sections(self) -> AsyncIterator[None]:
        async with self.mmap_lock.writing(), self.anon_vma.writing():
            yield

    @asynccontextmanager
    async def _section(
        self, rng: mn.Range, lock: AbstractAsyncContextManager[None]
    ) -> AsyncIterator[list[Frame]]:
        """S on entry, E on exit; then, without locks, the syncs, and R for the frames appended."""
        section = self.notifiers.invalidating(rng, sync=False)
        zapped: list[Frame] = []
        begun = False
        try:
            async with lock, section:
                begun = True
                yield zapped
        finally:
            if begun:
                await section.sync()
        if not section.failed:
            for frame in zapped:
                self.frames.unmap(frame)

    async def _access(self, address: int, *, write: bool) -> Pte:
        """What the process's own access does until it succeeds; there is no await after that."""
        page = address >> PAGE_SHIFT
        while True:
            async with self.mmap_lock.reading():
                region = next(self.regions(address, address + 1), None)
                if region is None or (write and not region.writable):
                    raise mn.BadAddress(
                        f"{'write' if write else 'read'} at {address:#x}: expected an address "
                        f"that is mapped{' writable' if write else ''}"
                    )
                pte = self._ptes.get(page)
                if pte is None:
                    frame = self.frames.allocate(self._swap.get(page, ZEROES))
                    pte = self._ptes[page] = Pte(frame, region.writable)
                elif write and pte.frame.mapped == 1:
                    pte.writable = True
                if pte.writable or not write:
                    pte.young = True
                    return pte
            await self._break_cow(page, pte)

    async def _break_cow(self, page: int, pte: Pte) -> None:
        start = page << PAGE_SHIFT
        rng = mn.Range(start, start + PAGE_SIZE, Event.CLEAR)
        async with self._section(rng, self.mmap_lock.reading()) as zapped:
            if self._ptes.get(page) is pte:  # nobody was faster while the drivers were told
                copy = self.frames.allocate(pte.frame.contents)
                self._ptes[page] = Pte(copy, writable=True, dirty=True)
                zapped.append(pte.frame)

    def _bytes(self, translation: Translation, offset: int, size: int) -> memoryview:
        if not 0 <= offset <= offset + size <= translation.size:
            raise ValueError(
                f"[{offset}, {offset + size}): expected bytes of a page of {translation.size}"
            )
        frame = self.frames[translation.frame]
        if frame.generation != translation.generation:
            raise mn.StaleTranslation(
                f"{translation}: frame {frame.number} is of generation {frame.generation} by now"
            )
        return memoryview(frame.contents)[offset : offset + size]

    def _pages(self, start: int, end: int) -> list[int]:
        first, last = start >> PAGE_SHIFT, page_up(end) >> PAGE_SHIFT
        return sorted(page for page in self._ptes if first <= page < last)

    def _columns(self, pages: list[int]) -> Translations:
        ptes = [self._ptes[page] for page in pages]
        return Translations(
            pages,
            [pte.frame.number for pte in ptes],
            [int(pte.writable) for pte in ptes],
            [pte.frame.generation for pte in ptes],
        )

    def _insert(self, region: Region) -> None:
        self._regions.append(region)
        self._regions.sort(key=lambda region: region.start)

    def _carve(self, start: int, end: int) -> list[Region]:
        """Cut [start, end) out of the regions; what was there."""
        inside = []
        for region in list(self.regions(start, end)):
            self._regions.remove(region)
            low, high = max(start, region.start), min(end, region.end)
            inside.append(attrs.evolve(region, start=low, end=high))
            if region.start < low:
                self._insert(attrs.evolve(region, end=low))
            if high < region.end:
                self._insert(attrs.evolve(region, start=high))
        return inside


def _by_page(start: int, end: int) -> Iterator[tuple[int, int]]:
    """[start, end) cut at page boundaries."""
    while start < end:
        cut = min(end, page_down(start) + PAGE_SIZE)
        yield start, cut
        start = cut
