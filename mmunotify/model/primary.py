"""`mmunotify.primary.Primary` over an address space of the model: what its drivers may ask.

A translation that is used after its frame was freed raises StaleTranslation: the generation stamp
tells, and the text, which is built only then, names who holds it, since when, and the announcement
that it missed.

Frames are read and written by number, as a device does it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from mmunotify.drivers import Driver
from mmunotify.errors import BadAddress, MmError, StaleTranslation
from mmunotify.primary import Region, Translation, Translations
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE, PMD_SHIFT, PMD_SIZE, Range

from . import flags as f
from . import frames as fr
from .gup import faultin_nowait, faultin_page
from .memory import PRESENT, frames_of
from .vma import find_vma, vmas_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from mmunotify.primary import Pin

    from .mm import AddressSpace

_READABLE: Final = f.PTE_PRESENT | f.PTE_USER
_MEMORY_BITS: Final = f.PTE_PRESENT | f.PTE_SPECIAL
"""What of an entry says that it maps a frame of memory."""
_MEMORY: Final = np.uint64(_MEMORY_BITS)
_IN_USE: Final = fr.PG_REFERENCED | fr.PG_ACTIVE
"""A page that has both cannot be more in use than it is."""
_PG_DIRTY: Final = np.uint64(fr.PG_DIRTY)
_FEW: Final = 16
"""Up to so many pages a loop is faster than arrays."""
_FAST: Final = _READABLE | f.PTE_RW
NOTHING: Final = "nothing"
"""What was announced last, if nothing was."""


class Watcher(Protocol):
    """Sees the translations of one address space from lookup to use."""

    def looked_up(self, translation: Translation) -> None:
        """A driver has been given a translation."""
        ...

    def used(self, translation: Translation) -> None:
        """A device reads or writes through a translation."""
        ...

    def marked_young(self, start: int, end: int) -> None:
        """A driver says itself that its device uses [start, end)."""
        ...


class ModelPrimary:
    """What a driver may ask; one per address space."""

    __slots__ = ("mm", "watcher")

    def __init__(self, mm: AddressSpace[Any]) -> None:
        self.mm = mm
        self.watcher: Watcher | None = None
        """Who sees what drivers do with translations, if somebody checks."""

    def translate(self, address: int) -> Translation | None:
        """The leaf that maps `address`, or None. Never suspends, never faults."""
        pt, page = self.mm.pt, address >> PAGE_SHIFT
        leaf = pt.leaves.get(page >> 9)
        entry = leaf.pte[page & 511] if leaf is not None else pt.get(page)
        return self._translation(address, entry) if entry & _READABLE == _READABLE else None

    def _translation(self, address: int, entry: int) -> Translation:
        mm = self.mm
        size = PAGE_SIZE
        huge = mm.pt.huge
        if huge and address >> PMD_SHIFT in huge:
            size = PMD_SIZE
            entry = huge[address >> PMD_SHIFT]
        frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
        translation = Translation(
            address & -size,
            frame,
            entry & f.PTE_RW != 0,
            size,
            mm.machine.frames.word[frame] >> fr.GEN_SHIFT,
            mm.announced[-1] if mm.announced else NOTHING,
        )
        if self.watcher is not None:
            self.watcher.looked_up(translation)
        return translation

    def translate_range(self, start: int, end: int) -> Translations:
        """What is present in [start, end), as arrays or lists. Never suspends, never faults."""
        mm = self.mm
        if end - start <= _FEW << PAGE_SHIFT:
            return self._translate_few(start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT))
        pages, found = [], []
        for index in mm.pt.indices(start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)):
            low = max(index << 9, start >> PAGE_SHIFT)
            high = min((index + 1) << 9, -(-end >> PAGE_SHIFT))
            huge = mm.pt.huge.get(index)
            if huge is None:
                entries = mm.pt.leaves[index].entries[low - (index << 9) : high - (index << 9)]
                at = ((entries & np.uint64(_READABLE)) == np.uint64(_READABLE)).nonzero()[0]
            else:
                at = np.arange(high - low)
                shift = np.uint64(PAGE_SHIFT)
                first = np.uint64(huge + ((low - (index << 9)) << PAGE_SHIFT))
                entries = (at.astype(np.uint64) << shift) + first
            pages.append(at + low)
            found.append(entries[at])
        if not pages:
            empty = np.zeros(0, np.int64)
            return _columns(empty, empty, empty, empty)
        entries = np.concatenate(found)
        frames = frames_of(entries)
        words = mm.machine.frames.words[frames]
        if self.watcher is not None:
            for page, entry in zip(np.concatenate(pages).tolist(), entries.tolist(), strict=True):
                self._translation(page << PAGE_SHIFT, entry)
        return _columns(
            np.concatenate(pages),
            frames,
            ((entries & np.uint64(f.PTE_RW)) != 0).astype(np.int64),
            (words >> np.uint64(fr.GEN_SHIFT)).view(np.int64),
        )

    def _entries(self, first: int, last: int) -> list[int]:
        """The entries of a few pages."""
        pt = self.mm.pt
        leaf = pt.leaves.get(first >> 9)
        if leaf is not None and last - first == 1:
            return [leaf.pte[first & 511]]
        if leaf is None or (last - 1) >> 9 != first >> 9:
            return [pt.get(page) for page in range(first, last)]
        found: list[int] = leaf.pte[first & 511 : ((last - 1) & 511) + 1].tolist()
        return found

    def _translate_few(self, first: int, last: int) -> Translations:
        word = self.mm.machine.frames.word
        pages, frames, writable, generations = [], [], [], []
        for page, entry in enumerate(self._entries(first, last), first):
            if entry & _READABLE == _READABLE:
                frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
                pages.append(page)
                frames.append(frame)
                writable.append(1 if entry & f.PTE_RW else 0)
                generations.append(word[frame] >> fr.GEN_SHIFT)
        return Translations(pages, frames, writable, generations)

    async def fault_in(self, address: int, *, write: bool = False) -> Translation:
        """Make `address` present, as the process's own access would; may suspend and notify.

        The page counts as used once, unless it was there and writable (get_user_pages, FOLL_TOUCH).
        """
        mm = self.mm
        page = address >> PAGE_SHIFT
        leaf = mm.pt.leaves.get(page >> 9)
        entry = leaf.pte[page & 511] if leaf is not None else mm.pt.get(page)
        if entry & _FAST == _FAST:
            return self._translation(address, entry)
        entry = faultin_nowait(mm, page, write=write)
        if entry:
            if not entry & f.PTE_SPECIAL:
                mm.machine.mark_accessed((entry & f.PFN_MASK) >> PAGE_SHIFT)
            return self._translation(address, entry)
        async with mm.mmap_lock.reading():
            vma = find_vma(mm, page)
            allowed = vma is not None and vma.flags & (f.VM_WRITE if write else f.VM_ACCESS_FLAGS)
            if vma is None or not allowed:
                raise BadAddress(
                    f"fault_in({address:#x}) in {mm.name}: "
                    + ("nothing is mapped there" if vma is None else f"{vma!r} forbids it"),
                    code=1 if vma is None else 2,
                    address=address,
                )
            entry = await faultin_page(mm, vma, page, write=write)
            if not entry & f.PTE_SPECIAL:
                mm.machine.mark_accessed((entry & f.PFN_MASK) >> PAGE_SHIFT)
            found = self.translate(address)
        if found is None:
            raise BadAddress(f"fault_in({address:#x}) in {mm.name}: it is gone", address=address)
        return found

    async def fault_in_range(self, start: int, end: int, *, write: bool = False) -> Translations:
        """`fault_in` for every page of [start, end), all or error."""
        for address in range(start & ~(PAGE_SIZE - 1), end, PAGE_SIZE):
            await self.fault_in(address, write=write)
        return self.translate_range(start, end)

    async def pin(self, start: int, end: int, *, write: bool = True) -> Pin:
        """Fault in [start, end) and hold its frames (FOLL_LONGTERM)."""
        return await self.mm.pin(start, end, write=write)

    def unpin(self, pin: Pin) -> None:
        """Drop the references that `pin` took; once."""
        from .gup import Pinned

        assert isinstance(pin, Pinned)
        self.mm.unpin(pin)

    def read(self, translation: Translation, offset: int, size: int) -> bytes:
        """Bytes of the mapped frame; zeros if the machine keeps no contents."""
        self._check(translation, offset, size)
        data = self.mm.machine.frames.data
        if data is None:
            return bytes(size)
        out = bytearray()
        while size:
            frame = translation.frame + (offset >> PAGE_SHIFT)
            low = offset & (PAGE_SIZE - 1)
            part = min(size, PAGE_SIZE - low)
            contents = data.get(frame)
            out += contents[low : low + part] if contents is not None else bytes(part)
            offset += part
            size -= part
        return bytes(out)

    def write(self, translation: Translation, offset: int, data: bytes) -> None:
        """Store through the translation; PermissionError if it is not writable."""
        self._check(translation, offset, len(data))
        if not translation.writable:
            raise PermissionError(f"{translation!r} is not writable")
        frames = self.mm.machine.frames
        if frames.data is None and offset >> PAGE_SHIFT == offset + len(data) - 1 >> PAGE_SHIFT:
            frames.word[translation.frame + (offset >> PAGE_SHIFT)] |= fr.PG_DIRTY
            return
        at = 0
        while at < len(data):
            frame = translation.frame + ((offset + at) >> PAGE_SHIFT)
            low = (offset + at) & (PAGE_SIZE - 1)
            part = min(len(data) - at, PAGE_SIZE - low)
            frames.word[frame] |= fr.PG_DIRTY
            if frames.data is not None:
                contents = frames.data.setdefault(frame, bytearray(PAGE_SIZE))
                contents[low : low + part] = data[at : at + part]
            at += part

    def _check(self, translation: Translation, offset: int, size: int) -> None:
        if offset < 0 or offset + size > translation.size:
            raise MmError(22, f"[{offset}, +{size}) is outside of {translation!r}")
        if self.watcher is not None:
            self.watcher.used(translation)
        generation = self.mm.machine.frames.word[translation.frame] >> fr.GEN_SHIFT
        if generation != translation.generation:
            raise StaleTranslation(self._story(translation, generation))

    def _story(self, translation: Translation, generation: int) -> str:
        """Who holds a stale translation, since when, and the announcement that it missed."""
        mm = self.mm
        since = translation.since
        start, end = translation.address, translation.address + translation.size
        missed = mm.first_announcement(start, end, since)
        told = f"it missed {missed}" if missed else "nobody announced it"
        when = f", since {since!r} was announced," if isinstance(since, Range) else ""
        if since is NOTHING:
            when = ", since before anything was announced,"
        return (
            f"{_holder()} of {mm.name} holds{when} a translation of {translation.address:#x} to "
            f"frame {translation.frame} in its generation {translation.generation}, which is now "
            f"{generation}: the frame was freed, and {told}; registered: {mm.notifiers!r}"
        )

    def set_dirty(self, start: int, end: int, mask: Sequence[int] | None = None) -> None:
        """Hand dirty bits over before a mapping is dropped (I-DIRTY); set_page_dirty."""
        mm = self.mm
        first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
        if last - first == 1 and mask is None:
            leaf = mm.pt.leaves.get(first >> 9)
            entry = leaf.pte[first & 511] if leaf is not None else mm.pt.get(first)
            if entry & _MEMORY_BITS == f.PTE_PRESENT:
                mm.machine.frames.word[(entry & f.PFN_MASK) >> PAGE_SHIFT] |= fr.PG_DIRTY
            return
        if last - first <= _FEW:
            word = mm.machine.frames.word
            for at, entry in enumerate(self._entries(first, last)):
                if entry & _MEMORY_BITS == f.PTE_PRESENT and (mask is None or mask[at]):
                    word[(entry & f.PFN_MASK) >> PAGE_SHIFT] |= fr.PG_DIRTY
            return
        wanted = None if mask is None else np.asarray(mask, np.bool_)
        words = mm.machine.frames.words
        for page, entries in mm.pt.runs(first, last):
            able = (entries & _MEMORY) == PRESENT
            if wanted is not None:
                able &= wanted[page - first : page - first + len(entries)]
            words[frames_of(entries[able])] |= _PG_DIRTY
        for page, entry in self._huge_entries(first, last):
            head = (entry & f.PFN_MASK) >> PAGE_SHIFT
            low, high = max(first, page), min(last, page + 512)
            part = words[head + low - page : head + high - page]
            if wanted is None:
                part |= _PG_DIRTY
            else:
                part[wanted[low - first : high - first]] |= _PG_DIRTY

    def mark_young(self, start: int, end: int) -> None:
        """Tell reclaim that the device has used these pages (mark_page_accessed)."""
        if self.watcher is not None:
            self.watcher.marked_young(start, end)
        mm = self.mm
        first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
        mark_accessed = mm.machine.mark_accessed
        huge, word = mm.pt.huge, mm.machine.frames.word
        if last - first == 1:
            leaf = mm.pt.leaves.get(first >> 9)
            entry = leaf.pte[first & 511] if leaf is not None else huge.get(first >> 9, 0)
            frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
            if entry & _MEMORY_BITS == f.PTE_PRESENT and word[frame] & _IN_USE != _IN_USE:
                mark_accessed(frame)
            return
        if last - first <= _FEW:
            for page, entry in enumerate(self._entries(first, last), first):
                if entry & _MEMORY_BITS == f.PTE_PRESENT:
                    if huge:  # of a huge page only the first frame is on a list
                        entry = huge.get(page >> 9, entry)
                    frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
                    if word[frame] & _IN_USE != _IN_USE:
                        mark_accessed(frame)
            return
        for _, entry in self._huge_entries(first, last):
            mark_accessed((entry & f.PFN_MASK) >> PAGE_SHIFT)
        for _, entries in mm.pt.runs(first, last):
            for entry in entries[(entries & PRESENT) != 0].tolist():
                if not entry & f.PTE_SPECIAL:
                    mark_accessed((entry & f.PFN_MASK) >> PAGE_SHIFT)

    def _huge_entries(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(first page, entry) of the 2 MiB of memory that meet pages [first, last)."""
        huge = self.mm.pt.huge
        if huge:
            for index in list(self.mm.pt.indices(first, last)):
                if not huge.get(index, f.PTE_SPECIAL) & f.PTE_SPECIAL:
                    yield index << 9, huge[index]

    def regions(self, start: int, end: int) -> Iterator[Region]:
        """The mappings that meet [start, end), ascending. A lock-free look: a hint."""
        for vma in vmas_in(self.mm, start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)):
            yield Region(
                vma.start, vma.end, bool(vma.flags & f.VM_READ), bool(vma.flags & f.VM_WRITE)
            )

    def tryget(self) -> bool:
        """Take a reference on the address space unless it is exiting (mmget_not_zero)."""
        return self.mm.tryget()

    async def put(self) -> None:
        """Give a `tryget` reference back; the last one tears the address space down (mmput)."""
        await self.mm.put()


def _columns(
    pages: npt.NDArray[np.int64],
    frames: npt.NDArray[np.int64],
    writable: npt.NDArray[np.int64],
    generations: npt.NDArray[np.int64],
) -> Translations:
    """Arrays are sequences of integers, which numpy's own types do not say."""
    columns: tuple[Any, ...] = (pages, frames, writable, generations)
    return Translations(*columns)


def _holder() -> str:
    """The driver whose code uses a translation: the nearest caller's, if one is a driver's."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, Driver):
            return type(caller).__qualname__
    return "somebody"
