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
from .hugetlb import copy_pinned, expanded

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
_FREEABLE: Final = (
    fr.COUNTS_MASK | fr.PG_SWAPCACHE | fr.PG_KSM | fr.PG_MLOCKED
    | fr.PG_PAGECACHE | fr.PG_HUGE | fr.PG_LARGE
)  # fmt: skip
"""What has to be MAPPED_ONCE and nothing else where unmapping a page frees it."""
_ZAPPED_APART: Final = f.VM_LOCKED | f.VM_RAND_READ | f.VM_SEQ_READ
_RW: Final = np.uint64(f.PTE_RW)
_NOT_EXCLUSIVE: Final = ~np.uint64(fr.PG_EXCLUSIVE)
_COPIED: Final = fr.PG_PINNED | fr.PG_EXCLUSIVE | fr.PG_ANON
"""What a page is that a fork copies, because a device writes to it."""
_AND: Final = np.bitwise_and.reduce
_OR: Final = np.bitwise_or.reduce
FEW: Final = 12
"""Up to so many entries a loop over them costs less than vector steps do."""


def frames_of(entries: U64) -> I64:
    """The frame numbers in some present entries, ready to index with."""
    return ((entries & PFN_MASK) >> SHIFT).view(np.int64)


class Gather:
    """Pages that are unmapped and not yet released (struct mmu_gather).

    With `hold` they all wait for `finish`, because a deferred driver may use them until its sync;
    otherwise each step flushes the primary TLB and releases, as Linux does when a gather is full.
    """

    __slots__ = ("frames", "held", "hold", "mm")

    def __init__(self, mm: AddressSpace[Any], *, hold: bool = False) -> None:
        self.mm = mm
        self.hold = hold
        self.held: tuple[I64, ...] = ()
        self.frames = mm.machine.frames

    def add(self, frames: I64) -> None:
        """Release one reference of each of these distinct frames, now or at the end."""
        if self.hold:
            self.held += (frames,)
        else:
            self._release(frames)

    def finish(self, *, leak: bool = False) -> None:
        """tlb_finish_mmu: release what was held; with `leak`, a driver failed and never let go."""
        for frames in self.held:
            if leak:
                self.frames.leaked += len(frames)
            else:
                self._release(frames)
        self.held = ()

    def _release(self, frames: I64) -> None:
        words = self.frames.words[frames]
        cached = (words & np.uint64(fr.PG_SWAPCACHE | fr.MAP_MASK)) == np.uint64(fr.PG_SWAPCACHE)
        if np.count_nonzero(cached):
            for frame in frames[cached].tolist():
                self.mm.machine.swap.try_free(frame)
        self.frames.put_many(frames)
        if self.mm.machine.hugetlb.used:
            self.mm.machine.hugetlb.collect()


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
    told = expanded(vma, first, last) if vma.flags & f.VM_HUGETLB else (first, last)
    section = mm.section(*told, event, zap=True, locked=locked)
    async with section:
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
            if not section.outside:
                mm.flush_tlb(page, page + len(entries))


def zap_all(mm: AddressSpace[Any]) -> None:
    """Unmap everything and free the page tables, unannounced; no matter what VMAs there are.

    Only where `zap_needs_vmas` is False.
    """
    gather = Gather(mm)
    for found in mm.pt.take_all():
        present = _present(found)
        if present is not None:
            _zap_nonpresent(mm, found[~present], True, True)
            found = found[present]
        _zap_present(mm, 0, found, gather)


def zap_needs_vmas(mm: AddressSpace[Any]) -> bool:
    """Whether it depends on the VMA, or its huge pages, what a zap has to do."""
    return bool(mm.pt.huge) or any(vma.flags & _ZAPPED_APART for vma in mm.vmas)


def zap_run(
    mm: AddressSpace[Any],
    vma: Vma,
    entries: U64,
    gather: Gather,
    even_cows: bool,
    drop_markers: bool,
) -> bool:
    """Clear the entries of one run and drop what they mapped; whether there was anything."""
    if len(entries) > FEW and _AND(entries) & PRESENT:
        # All are there: nothing has to be picked out.
        at = None
        found = entries.copy()
        entries.fill(0)
    else:
        at = entries.nonzero()[0]
        if not len(at):
            return False
        if len(at) <= FEW and not gather.hold:
            _zap_few(mm, vma, entries.data, at.tolist(), even_cows, drop_markers)
            return True
        found = entries[at]
        entries[at] = 0
        present = _present(found)
        if present is not None:
            kept = _zap_nonpresent(mm, found[~present], even_cows, drop_markers)
            if kept is not None:
                entries[at[~present]] = kept
            at, found = at[present], found[present]
    if not even_cows:
        keep = _is_anon(mm, found)
        if np.count_nonzero(keep):
            entries[keep if at is None else at[keep]] = found[keep]
            found = found[~keep]
    _zap_present(mm, vma.flags, found, gather)
    return True


def _present(found: U64) -> npt.NDArray[np.bool_] | None:
    """Which of some entries are present, or None for all of them."""
    if _AND(found) & PRESENT:
        return None
    return (found & PRESENT).view(np.bool_)[::8]


def _zap_present(mm: AddressSpace[Any], vm_flags: int, found: U64, gather: Gather) -> None:
    if _OR(found) & SPECIAL:
        found = found[(found & SPECIAL) == 0]
    if len(found):
        _drop_mappings(mm, vm_flags, found, gather)


def _zap_few(
    mm: AddressSpace[Any],
    vma: Vma,
    pte: memoryview,
    where: list[int],
    even_cows: bool,
    drop_markers: bool,
) -> None:
    """Clear the entries of a run that are not empty, one by one, and release what they mapped.

    Backwards, so that frames are allocated again in the order of the pages.
    """
    frames = mm.machine.frames
    word = frames.word
    for at in reversed(where):
        entry = pte[at]
        if not entry & f.PTE_PRESENT:
            kind = entry & f.SWP_TYPE_MASK
            if kind == f.SWP_SWAP:
                if not even_cows:
                    continue
                mm.machine.swap.drop_unmapped((entry & f.PFN_MASK) >> PAGE_SHIFT)
            elif kind == f.SWP_MIGRATION:
                frames.put((entry & f.PFN_MASK) >> PAGE_SHIFT)
            elif kind == f.SWP_MARKER and not drop_markers:
                continue
            pte[at] = 0
            continue
        if entry & f.PTE_SPECIAL:
            pte[at] = 0
            continue
        frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
        was = word[frame]
        if was & fr.PG_ANON:
            if not even_cows:
                continue
            pte[at] = 0
            if was & _FREEABLE == fr.MAPPED_ONCE:
                frames.free_one(frame, was)
                continue
        else:
            pte[at] = 0
            if entry & f.PTE_DIRTY:
                was |= fr.PG_DIRTY
            if entry & f.PTE_ACCESSED and not vma.flags & (f.VM_RAND_READ | f.VM_SEQ_READ):
                was |= fr.PG_REFERENCED
        was -= fr.MAP_ONE
        if not was & fr.MAP_MASK and (vma.flags & f.VM_LOCKED or was & fr.PG_KSM):
            was &= ~(fr.PG_MLOCKED | fr.PG_UNEVICTABLE)
        word[frame] = was
        if vma.flags & f.VM_LOCKED and was & fr.MAP_MASK:
            mm.machine.lru.munlock(frame)
        if was & (fr.PG_SWAPCACHE | fr.MAP_MASK) == fr.PG_SWAPCACHE:
            mm.machine.swap.try_free(frame)
        frames.put(frame)


def _is_anon(mm: AddressSpace[Any], found: U64) -> npt.NDArray[np.bool_]:
    words = mm.machine.frames.words[frames_of(found)]
    anon = (words & np.uint64(fr.PG_ANON)) != 0
    result: npt.NDArray[np.bool_] = anon & ((found & SPECIAL) == 0)
    return result


def _drop_mappings(mm: AddressSpace[Any], vm_flags: int, found: U64, gather: Gather) -> None:
    frames = mm.machine.frames
    pfns = frames_of(found)
    words = frames.words[pfns]
    every, some = int(_AND(words)), int(_OR(words))
    if not gather.hold and every & _FREEABLE == some & _FREEABLE == fr.MAPPED_ONCE:
        frames.free_many(pfns, words)
        return
    if some & fr.PG_KSM:
        ksm = (words & np.uint64(fr.PG_KSM)) != 0
        for pfn in pfns[ksm].tolist():
            mm.machine.remove_rmap(pfn)
            gather.add(np.array([pfn]))
        found, pfns, words = found[~ksm], pfns[~ksm], words[~ksm]
    if not every & fr.PG_ANON:
        file = (words & np.uint64(fr.PG_ANON)) == 0
        dirty = file & ((found & np.uint64(f.PTE_DIRTY)) != 0)
        if np.count_nonzero(dirty):
            words[dirty] |= np.uint64(fr.PG_DIRTY)
        if not vm_flags & (f.VM_RAND_READ | f.VM_SEQ_READ):
            young = file & ((found & np.uint64(f.PTE_ACCESSED)) != 0)
            words[young] |= np.uint64(fr.PG_REFERENCED)
    words -= _MAP_ONE
    if vm_flags & f.VM_LOCKED:
        last = (words & np.uint64(fr.MAP_MASK)) == 0
        words[last] &= ~np.uint64(fr.PG_MLOCKED | fr.PG_UNEVICTABLE)
        for frame in pfns[~last].tolist():
            mm.machine.lru.munlock(frame)
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
    elif np.count_nonzero(swapped):
        mm.machine.swap.drop_many(_distinct(mm, frames_of(found[swapped])))
    if np.count_nonzero(migrating):
        for pfn in frames_of(found[migrating]).tolist():
            mm.machine.frames.put(pfn)
    if not drop_markers:
        kept[markers] = found[markers]
    return kept if np.count_nonzero(kept) else None


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
            _drop_mappings(mm, vma.flags, entries, section.gather)


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
        at = entries.nonzero()[0]
        if not len(at):
            continue
        if len(at) <= FEW:
            if not _copy_few(child, vma, parent, source, page, entries.data, at.tolist()):
                return False
            continue
        found = entries[at]
        present = _present(found)
        plain = present is None and not _OR(found) & SPECIAL
        mapped = None if plain else ((found & (PRESENT | SPECIAL)) == PRESENT)
        drop = np.uint64(f.PTE_ACCESSED | (0 if vma.flags & f.VM_UFFD_WP else f.PTE_UFFD_WP))
        if cow:
            mine = found & ~_RW
            theirs = mine & ~drop
        else:
            mine = found.copy()
            theirs = found & ~(drop | np.uint64(f.PTE_DIRTY))
        if present is not None:
            absent = ~present
            mine[absent] = theirs[absent] = found[absent]
            _copy_nonpresent(parent, vma, mine, theirs, absent)
        if not _share_frames(child, vma, page, at, found, mine, theirs, mapped):
            return False
        if cow or present is not None:
            entries[at] = mine
        _store(child, page, at, theirs, len(entries))
    for index in [i for i in parent.pt.huge if source.first <= i << 9 < source.last]:
        copied = 0
        if vma.flags & f.VM_HUGETLB:
            copied = copy_pinned(child, vma, index, parent.pt.huge[index])
        if copied < 0:
            return False
        if not copied:
            child.share_huge(parent, index, cow=cow)
    return True


def _copy_few(
    child: AddressSpace[Any],
    vma: Vma,
    parent: AddressSpace[Any],
    source: Vma,
    page: int,
    pte: memoryview,
    where: list[int],
) -> bool:
    """`copy_page_range` of the entries of a run that are not empty, one by one."""
    word = child.machine.frames.word
    swap = child.machine.swap
    cow = source.cow
    leaves = child.pt.leaves
    uffd_wp = vma.flags & f.VM_UFFD_WP
    drop = f.PTE_ACCESSED | (f.PTE_RW if cow else f.PTE_DIRTY) | (0 if uffd_wp else f.PTE_UFFD_WP)
    for at in where:
        entry = pte[at]
        theirs = entry & ~drop
        if entry & f.PTE_PRESENT:
            if not entry & f.PTE_SPECIAL:
                frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
                was = word[frame]
                if was & _COPIED == _COPIED:
                    theirs = _copy_pinned(child, vma, page + at, frame)
                    if not theirs:
                        return False
                else:
                    word[frame] = (was & ~fr.PG_EXCLUSIVE) + fr.MAPPED_ONCE
                    if cow:
                        pte[at] = entry & ~f.PTE_RW
            elif cow:
                pte[at] = entry & ~f.PTE_RW
        else:
            kind = entry & f.SWP_TYPE_MASK
            theirs = entry
            if kind == f.SWP_SWAP:
                swap.dup((entry & f.PFN_MASK) >> PAGE_SHIFT)
                pte[at] = theirs = entry & ~f.SWP_EXCLUSIVE
                if not uffd_wp:
                    theirs &= ~f.SWP_UFFD_WP
            elif kind == f.SWP_MIGRATION:
                child.machine.frames.get((entry & f.PFN_MASK) >> PAGE_SHIFT)
                pte[at] = theirs = entry & ~(f.SWP_WRITE | f.SWP_EXCLUSIVE)
            elif entry == f.MARKER_UFFD_WP and not uffd_wp:
                continue
        leaf = leaves.get((page + at) >> 9)
        if leaf is None:
            leaf = child.pt.leaf_of(page + at)
        leaf.pte[(page + at) & 511] = theirs
    return True


def _copy_pinned(child: AddressSpace[Any], vma: Vma, page: int, frame: int) -> int:
    """Give the child its own copy of a page that a device writes to; its entry, 0 for no memory."""
    copy = child.machine.alloc_frame_nowait()
    if copy < 0:
        return 0
    child.machine.frames.copy(frame, copy)
    child.add_new_anon(vma, page, copy)
    writable = f.PTE_RW if vma.flags & f.VM_WRITE else 0
    return copy << PAGE_SHIFT | vma.prot | f.PTE_DIRTY | writable


def _store(child: AddressSpace[Any], page: int, at: I64, theirs: U64, length: int) -> None:
    child.pt.populate(page + int(at[0]), page + int(at[-1]) + 1)
    dense = len(at) == length
    for low, entries in child.pt.runs(page, page + length):
        if dense:
            entries[:] = theirs[low - page : low - page + len(entries)]
        elif low == page and len(entries) == length:
            entries[at] = theirs
        else:
            left, right = np.searchsorted(at, (low - page, low - page + len(entries)))
            entries[at[left:right] - (low - page)] = theirs[left:right]


def _copy_nonpresent(
    parent: AddressSpace[Any], vma: Vma, mine: U64, theirs: U64, where: npt.NDArray[np.bool_]
) -> None:
    kinds = mine & np.uint64(f.SWP_TYPE_MASK)
    swapped = where & (kinds == np.uint64(f.SWP_SWAP))
    if np.count_nonzero(swapped):
        for slot in frames_of(mine[swapped]).tolist():
            parent.machine.swap.dup(slot)
        mine[swapped] &= ~np.uint64(f.SWP_EXCLUSIVE)
        theirs[swapped] &= ~np.uint64(f.SWP_EXCLUSIVE)
    migrating = where & (kinds == np.uint64(f.SWP_MIGRATION))
    if np.count_nonzero(migrating):
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
    mapped: npt.NDArray[np.bool_] | None,
) -> bool:
    """One mapping more of each mapped page; copies of the pinned. False if memory is lacking."""
    frames = child.machine.frames
    pfns = frames_of(found if mapped is None else found[mapped])
    words = frames.words[pfns]
    some = int(_OR(words))
    if not some & (fr.PG_KSM | fr.PG_PINNED):
        frames.words[pfns] = (words & _NOT_EXCLUSIVE) + _MAPPED_ONCE
        return True
    copied = (words & np.uint64(_COPIED)) == np.uint64(_COPIED)
    if np.count_nonzero(copied) > frames.free:
        return False
    where = range(len(found)) if mapped is None else mapped.nonzero()[0].tolist()
    for nth, pfn in zip(where, pfns.tolist(), strict=True):
        word = frames.word[pfn]
        if word & _COPIED == _COPIED:
            mine[nth] = found[nth]
            theirs[nth] = _copy_pinned(child, vma, page + int(at[nth]), pfn)
        else:
            frames.word[pfn] = (word & ~fr.PG_EXCLUSIVE) + fr.MAPPED_ONCE
    return True


def iter_present(mm: AddressSpace[Any], first: int, last: int) -> Any:
    """(page, entry) of the present small entries of [first, last), ascending; a snapshot."""
    for page, entries in mm.pt.runs(first, last):
        for at in (entries & PRESENT).nonzero()[0].tolist():
            yield page + at, int(entries[at])
