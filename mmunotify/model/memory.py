"""Range work on page tables: zap_page_range, unmap_vmas, copy_page_range.

Everything goes in vector steps over runs of leaves; the rare pages (swap cache, KSM, mlocked,
pinned, huge) are picked out and done one by one. All units are pages.

Source: mm/memory.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmunotify.ranges import PAGE_SHIFT, Event

from . import flags as f
from . import frames as fr

if TYPE_CHECKING:
    import numpy.typing as npt

    from .batching import Section
    from .mm import AddressSpace
    from .vma import Vma

    U64 = npt.NDArray[np.uint64]
    I64 = npt.NDArray[np.int64]

PRESENT: Final = np.uint64(f.PTE_PRESENT)
SPECIAL: Final = np.uint64(f.PTE_SPECIAL)
PFN_MASK: Final = np.uint64(f.PFN_MASK)
SHIFT: Final = np.uint64(PAGE_SHIFT)
_MAP_ONE: Final = np.uint64(fr.MAP_ONE)
_MAPPED_ONCE: Final = np.uint64(fr.MAPPED_ONCE)
_RARE: Final = np.uint64(
    fr.PG_SWAPCACHE | fr.PG_KSM | fr.PG_MLOCKED | fr.PG_PAGECACHE | fr.PG_HUGE | fr.PG_LARGE
)
_COUNTS_AND_RARE: Final = np.uint64(fr.COUNTS_MASK) | _RARE


def frames_of(entries: U64) -> I64:
    """The frame numbers in some present entries, ready to index with."""
    return ((entries & PFN_MASK) >> SHIFT).view(np.int64)


class Gather:
    """Pages that are unmapped and not yet released (struct mmu_gather).

    With `hold` they all wait for `finish`, because a deferred driver may use them until its sync;
    otherwise each step flushes the primary TLB and releases, as Linux does when a gather is full.
    """

    __slots__ = ("_held", "frames", "hold", "mm")

    def __init__(self, mm: AddressSpace[Any], *, hold: bool = False) -> None:
        self.mm = mm
        self.hold = hold
        self._held: list[I64] = []
        self.frames = mm.machine.frames

    def add(self, frames: I64) -> None:
        """Release one reference of each of these distinct frames, now or at the end."""
        if self.hold:
            self._held.append(frames)
        else:
            self._release(frames)

    def finish(self, *, leak: bool = False) -> None:
        """tlb_finish_mmu: release what was held; with `leak`, a driver failed and never let go."""
        for frames in self._held:
            if leak:
                self.frames.leaked += len(frames)
            else:
                self._release(frames)
        self._held.clear()

    def _release(self, frames: I64) -> None:
        words = self.frames.words[frames]
        cached = (words & np.uint64(fr.PG_SWAPCACHE | fr.MAP_MASK)) == np.uint64(fr.PG_SWAPCACHE)
        if cached.any():
            for frame in frames[cached].tolist():
                self.mm.machine.swap.try_free(frame)
        self.frames.put_many(frames)


# ---------------------------------------------------------------------- zap


async def zap_page_range(
    mm: AddressSpace[Any],
    vma: Vma,
    first: int,
    last: int,
    *,
    event: Event = Event.CLEAR,
    even_cows: bool = True,
    locked: bool = False,
) -> None:
    """Unmap pages [first, last) of one VMA: S PT E, flush and release (zap_page_range_single).

    mmap_lock is held, or i_mmap (`locked`); may suspend in the section. PTE markers stay.
    """
    async with mm.section(first, last, event, zap=True, locked=locked) as section:
        await zap_pages(mm, vma, first, last, section, even_cows=even_cows)
    if not locked:
        await section.settle()


async def zap_pages(
    mm: AddressSpace[Any],
    vma: Vma,
    first: int,
    last: int,
    section: Section,
    *,
    even_cows: bool = True,
    drop_markers: bool = False,
) -> None:
    """The PT step of a zap of one VMA, inside a section; suspends only to split a huge page."""
    if mm.pt.huge:
        await _zap_huge(mm, vma, first, last, section)
    for page, entries in mm.pt.runs(first, last):
        if zap_run(mm, vma, entries, section.gather, even_cows, drop_markers):
            section.zapped(page, page + len(entries))
            mm.flush_tlb(page, page + len(entries))


def zap_run(
    mm: AddressSpace[Any],
    vma: Vma,
    entries: U64,
    gather: Gather,
    even_cows: bool,
    drop_markers: bool,
) -> bool:
    """Clear the entries of one run and drop what they mapped; whether there was anything."""
    at = np.flatnonzero(entries)
    if not len(at):
        return False
    if len(at) == len(entries):
        found = entries.copy()
        entries[:] = 0
    else:
        found = entries[at]
        entries[at] = 0
    present = (found & PRESENT).view(np.bool_)[::8]
    if not present.all():
        kept = _zap_nonpresent(mm, found[~present], even_cows, drop_markers)
        if kept is not None:
            entries[at[~present]] = kept
        found = found[present]
    if not even_cows:
        keep = _is_anon(mm, found)
        if keep.any():
            entries[at[present][keep]] = found[keep]
            found = found[~keep]
    special = found & SPECIAL
    if special.any():
        found = found[special == 0]
    if len(found):
        _drop_mappings(mm, vma, found, gather)
    return True


def _is_anon(mm: AddressSpace[Any], found: U64) -> npt.NDArray[np.bool_]:
    words = mm.machine.frames.words[frames_of(found)]
    anon = (words & np.uint64(fr.PG_ANON)) != 0
    result: npt.NDArray[np.bool_] = anon & ((found & SPECIAL) == 0)
    return result


def _drop_mappings(mm: AddressSpace[Any], vma: Vma, found: U64, gather: Gather) -> None:
    frames = mm.machine.frames
    pfns = frames_of(found)
    words = frames.words[pfns]
    if not gather.hold and ((words & _COUNTS_AND_RARE) == _MAPPED_ONCE).all():
        frames.free_many(pfns, words)
        return
    if (words & np.uint64(fr.PG_KSM)).any():
        ksm = (words & np.uint64(fr.PG_KSM)) != 0
        for pfn in pfns[ksm].tolist():
            mm.machine.remove_rmap(pfn)
            gather.add(np.array([pfn]))
        found, pfns, words = found[~ksm], pfns[~ksm], words[~ksm]
    file = (words & np.uint64(fr.PG_ANON)) == 0
    if file.any():
        dirty = file & ((found & np.uint64(f.PTE_DIRTY)) != 0)
        words[dirty] |= np.uint64(fr.PG_DIRTY)
        if not vma.flags & (f.VM_RAND_READ | f.VM_SEQ_READ):
            young = file & ((found & np.uint64(f.PTE_ACCESSED)) != 0)
            words[young] |= np.uint64(fr.PG_REFERENCED)
    words -= _MAP_ONE
    if vma.flags & f.VM_LOCKED:
        last = (words & np.uint64(fr.MAP_MASK)) == 0
        words[last] &= ~np.uint64(fr.PG_MLOCKED | fr.PG_UNEVICTABLE)
    frames.words[pfns] = words
    gather.add(pfns)


def _zap_nonpresent(
    mm: AddressSpace[Any], found: U64, even_cows: bool, drop_markers: bool
) -> U64 | None:
    """Drop swap entries and markers; returns what has to stay in the table, if anything."""
    kinds = found & np.uint64(f.SWP_TYPE_MASK)
    swapped = kinds == np.uint64(f.SWP_SWAP)
    migrating = kinds == np.uint64(f.SWP_MIGRATION)
    markers = kinds == np.uint64(f.SWP_MARKER)
    kept = np.zeros_like(found)
    if not even_cows:
        kept[swapped] = found[swapped]
    elif swapped.any():
        mm.machine.swap.drop_many(_distinct(mm, frames_of(found[swapped])))
    if migrating.any():
        for pfn in frames_of(found[migrating]).tolist():
            mm.machine.frames.put(pfn)
    if not drop_markers:
        kept[markers] = found[markers]
    return kept if kept.any() else None


def _distinct(mm: AddressSpace[Any], slots: I64) -> I64:
    """The slots, each once: two entries of one range can hold one slot (KSM); those go singly."""
    if len(slots) < 2:
        return slots
    unique, counts = np.unique(slots, return_counts=True)
    if len(unique) != len(slots):
        for slot, count in zip(unique.tolist(), counts.tolist(), strict=True):
            for _ in range(count - 1):
                mm.machine.swap.drop(slot)
        return unique
    return slots


async def _zap_huge(
    mm: AddressSpace[Any], vma: Vma, first: int, last: int, section: Section
) -> None:
    for index in [i for i in mm.pt.huge if first < (i + 1) << 9 and i << 9 < last]:
        page = index << 9
        if page < first or page + 512 > last:
            await mm.split_huge_pmd(page, vma)
            continue
        entry = mm.pt.clear_huge(index)
        section.zapped(page, page + 512)
        mm.flush_tlb(page, page + 512)
        if not entry & f.PTE_SPECIAL:
            base = (entry & f.PFN_MASK) + np.uint64(f.PTE_PRESENT | entry & f.PTE_DIRTY)
            entries = base + (np.arange(512, dtype=np.uint64) << SHIFT)
            _drop_mappings(mm, vma, entries, section.gather)


# ---------------------------------------------------------------------- fork


def copy_page_range(
    child: AddressSpace[Any], vma: Vma, parent: AddressSpace[Any], source: Vma
) -> bool:
    """Copy the entries of one VMA to a child, write-protecting private ones on both sides.

    The PT step of fork, inside the parent's section. False if pages have to be copied one by one
    and there is no memory for it. Source: copy_page_range.
    """
    cow = source.cow
    for gib in parent.pt.gibs(source.first, source.last):
        child.pt.pmd_alloc(gib)
    for page, entries in parent.pt.runs(source.first, source.last):
        at = np.flatnonzero(entries)
        if not len(at):
            continue
        found = entries[at]
        present = (found & PRESENT).view(np.bool_)[::8]
        mine = found.copy()
        theirs = found.copy()
        if not present.all():
            _copy_nonpresent(parent, vma, mine, theirs, ~present)
        mapped = present & ((found & SPECIAL) == 0)
        if cow:
            mine[present] &= ~np.uint64(f.PTE_RW)
            theirs[present] &= ~np.uint64(f.PTE_RW)
        else:
            theirs[present] &= ~np.uint64(f.PTE_DIRTY)
        theirs[present] &= ~np.uint64(f.PTE_ACCESSED)
        if not vma.flags & f.VM_UFFD_WP:
            theirs[present] &= ~np.uint64(f.PTE_UFFD_WP)
        if mapped.any() and not _share_frames(child, vma, page, at, found, mine, theirs, mapped):
            return False
        entries[at] = mine
        _store(child, page, at, theirs, len(entries))
    for index in [i for i in parent.pt.huge if source.first <= i << 9 < source.last]:
        child.share_huge(parent, index, cow=cow)
    return True


def _store(child: AddressSpace[Any], page: int, at: I64, theirs: U64, length: int) -> None:
    child.pt.populate(page + int(at[0]), page + int(at[-1]) + 1)
    dense = len(at) == length
    for low, entries in child.pt.runs(page, page + length):
        if dense:
            entries[:] = theirs[low - page : low - page + len(entries)]
        else:
            left, right = np.searchsorted(at, (low - page, low - page + len(entries)))
            entries[at[left:right] - (low - page)] = theirs[left:right]


def _copy_nonpresent(
    parent: AddressSpace[Any], vma: Vma, mine: U64, theirs: U64, where: npt.NDArray[np.bool_]
) -> None:
    kinds = mine & np.uint64(f.SWP_TYPE_MASK)
    swapped = where & (kinds == np.uint64(f.SWP_SWAP))
    if swapped.any():
        for slot in frames_of(mine[swapped]).tolist():
            parent.machine.swap.dup(slot)
        mine[swapped] &= ~np.uint64(f.SWP_EXCLUSIVE)
        theirs[swapped] &= ~np.uint64(f.SWP_EXCLUSIVE)
    migrating = where & (kinds == np.uint64(f.SWP_MIGRATION))
    if migrating.any():
        for pfn in frames_of(mine[migrating]).tolist():
            parent.machine.frames.get(pfn)
        mine[migrating] &= ~np.uint64(f.SWP_WRITE | f.SWP_EXCLUSIVE)
        theirs[migrating] &= ~np.uint64(f.SWP_WRITE | f.SWP_EXCLUSIVE)
    if not vma.flags & f.VM_UFFD_WP:
        wp = where & (theirs == np.uint64(f.MARKER_UFFD_WP))
        theirs[wp] = 0
        theirs[swapped] &= ~np.uint64(f.SWP_UFFD_WP)


def _share_frames(
    child: AddressSpace[Any],
    vma: Vma,
    page: int,
    at: I64,
    found: U64,
    mine: U64,
    theirs: U64,
    mapped: npt.NDArray[np.bool_],
) -> bool:
    frames = child.machine.frames
    pfns = frames_of(found[mapped])
    words = frames.words[pfns]
    special = (words & np.uint64(fr.PG_KSM)) != 0
    pinned = (words & np.uint64(fr.PG_PINNED | fr.PG_EXCLUSIVE | fr.PG_ANON)) == np.uint64(
        fr.PG_PINNED | fr.PG_EXCLUSIVE | fr.PG_ANON
    )
    if not (special.any() or pinned.any()):
        frames.words[pfns] = (words & ~np.uint64(fr.PG_EXCLUSIVE)) + _MAPPED_ONCE
        return True
    where = np.flatnonzero(mapped)
    for nth, pfn in zip(where.tolist(), pfns.tolist(), strict=True):
        word = frames.word[pfn]
        if word & fr.PG_ANON and word & fr.PG_PINNED and word & fr.PG_EXCLUSIVE:
            copy = child.machine.alloc_frame_nowait()
            if copy < 0:
                return False
            frames.copy(pfn, copy)
            child.add_new_anon(vma, page + int(at[nth]), copy)
            writable = f.PTE_RW if vma.flags & f.VM_WRITE else 0
            mine[nth] = found[nth]
            theirs[nth] = copy << PAGE_SHIFT | vma.prot | f.PTE_DIRTY | writable
        else:
            frames.word[pfn] = (word & ~fr.PG_EXCLUSIVE) + fr.MAPPED_ONCE
    return True


def iter_present(mm: AddressSpace[Any], first: int, last: int) -> Any:
    """(page, entry) of the present small entries of [first, last), ascending; a snapshot."""
    for page, entries in mm.pt.runs(first, last):
        for at in np.flatnonzero(entries & PRESENT).tolist():
            yield page + at, int(entries[at])
