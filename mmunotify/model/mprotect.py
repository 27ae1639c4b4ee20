"""mprotect: one announcement per VMA whose flags change, none where no page table exists.

Source: mm/mprotect.c.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any

import numpy as np

from mmunotify.errors import BadAddress, MmError
from mmunotify.ranges import Event

from . import flags as f
from . import frames as fr
from . import gup, hugetlb
from .memory import PFN_MASK, PRESENT, SHIFT, SPECIAL
from .mmap import pages_of
from .vma import find_vma, modify, vmas_in

if TYPE_CHECKING:
    import numpy.typing as npt

    from .mm import AddressSpace
    from .vma import Vma

_PROT_BITS = np.uint64(f.PTE_RW | f.PTE_USER | f.PTE_NX)
_P4D_PAGES = 1 << 27


async def mprotect(mm: AddressSpace[Any], addr: int, length: int, prot: int) -> None:
    """Change the permissions of [addr, addr + length) bytes.

    EINVAL if unaligned; ENOMEM at the first hole, after the VMAs before it were done; EACCES where
    the mapping may not be what is asked; EPERM if sealed. Takes mmap_lock for writing.
    """
    mm.require_alive()
    first, last = pages_of(mm, addr, length, "mprotect")
    if first == last:
        return
    await mm.machine.cond_resched()
    async with mm.write_locked:
        vma = find_vma(mm, first)
        if vma is None:
            raise _hole(mm, first, addr, length)
        at = first
        while at < last:
            vma = find_vma(mm, at)
            if vma is None:
                raise _hole(mm, at, addr, length)
            flags = vma.flags & ~f.VM_ACCESS_FLAGS | prot & 7
            if flags & ~(flags >> 4) & f.VM_ACCESS_FLAGS:
                raise MmError(errno.EACCES, f"mprotect({addr:#x}, prot={prot}): {vma!r} may not")
            if vma.flags & f.VM_SEALED:
                raise MmError(errno.EPERM, f"mprotect({addr:#x}): {vma!r} is sealed (mseal)")
            end = min(vma.last, last)
            await _mprotect_fixup(mm, vma, at, end, flags)
            at = end
    await mm.machine.cond_resched(last - first)


def _hole(mm: AddressSpace[Any], page: int, addr: int, length: int) -> MmError:
    return MmError(
        errno.ENOMEM,
        f"mprotect({addr:#x}, {length:#x}) in {mm.name}: nothing is mapped at {page << 12:#x}",
    )


async def _mprotect_fixup(
    mm: AddressSpace[Any], vma: Vma, first: int, last: int, flags: int
) -> None:
    if flags == vma.flags:
        return
    accounted = f.VM_ACCOUNT | f.VM_WRITE | f.VM_HUGETLB | f.VM_SHARED | f.VM_NORESERVE
    if flags & f.VM_WRITE:
        if not vma.flags & accounted:
            flags |= f.VM_ACCOUNT
    elif vma.flags & f.VM_ACCOUNT and vma.anonymous and vma.anon_vma is None:
        flags &= ~f.VM_ACCOUNT
    old = vma.flags
    vma = await modify(mm, vma, first, last, flags)
    mm.vma_start_write(vma)
    vma.flags = flags | vma.flags & f.VM_MAYBE_GUARD
    vma.set_page_prot()
    await change_protection(mm, vma, first, last)
    if old & (f.VM_WRITE | f.VM_SHARED | f.VM_LOCKED) == f.VM_LOCKED and flags & f.VM_WRITE:
        # Locked memory that becomes writable gets its private copies now.
        with contextlib.suppress(MmError, BadAddress):
            await gup.populate_vma(mm, vma, first, last)


async def change_protection(
    mm: AddressSpace[Any], vma: Vma, first: int, last: int, *, uffd_wp: bool | None = None
) -> None:
    """Bring the entries of [first, last) of a VMA in line with its protection.

    Announced once per 512 GiB, from the first GiB that has a PMD table to the end of the range;
    `uffd_wp` sets or clears userfaultfd's write protection instead. Source: change_protection.
    """
    if vma.flags & f.VM_HUGETLB:
        await hugetlb.change_protection(mm, vma, first, last)
        return
    if mm.machine.era == "v16":
        # Around all of it, tables or not, and flushed before the end.
        async with mm.section(first, last, Event.PROTECTION_VMA):
            await _change_range(mm, vma, first, last, uffd_wp)
            mm.flush_tlb(first, last)
        return
    while first < last:
        end = min(last, (first // _P4D_PAGES + 1) * _P4D_PAGES)
        gibs = mm.pt.gibs(first, end)
        if gibs:
            low = max(first, gibs[0] << 18)
            async with mm.section(low, end, Event.PROTECTION_VMA):
                await _change_range(mm, vma, low, end, uffd_wp)
            mm.flush_tlb(low, end)
        first = end


async def _change_range(
    mm: AddressSpace[Any], vma: Vma, first: int, last: int, uffd_wp: bool | None
) -> None:
    for index in [i for i in mm.pt.huge if first < (i + 1) << 9 and i << 9 < last]:
        page = index << 9
        if page < first or page + 512 > last or uffd_wp is not None:
            await mm.split_huge_pmd(page, vma)
        else:
            mm.pt.huge[index] = _new_huge(mm, vma, mm.pt.huge[index])
    for _, entries in mm.pt.runs(first, last):
        if uffd_wp is None:
            _change_entries(mm, vma, entries)
        elif uffd_wp:
            _set_uffd_wp(vma, entries)
        else:
            entries[entries == np.uint64(f.MARKER_UFFD_WP)] = 0
            entries &= ~np.uint64(f.PTE_UFFD_WP)
            _change_entries(mm, vma, entries)
    if uffd_wp and not vma.anonymous:
        mm.pt.populate(first, last)
        for _, entries in mm.pt.runs(first, last):
            entries[entries == 0] = np.uint64(f.MARKER_UFFD_WP)


def _set_uffd_wp(vma: Vma, entries: npt.NDArray[np.uint64]) -> None:
    used = entries != 0
    entries[used] |= np.uint64(f.PTE_UFFD_WP)
    present = (entries & PRESENT) != 0
    entries[present] &= ~np.uint64(f.PTE_RW)


def _change_entries(mm: AddressSpace[Any], vma: Vma, entries: npt.NDArray[np.uint64]) -> None:
    present = (entries & PRESENT) != 0
    count = np.count_nonzero(present)
    if not count:
        return
    whole = count == len(entries)
    found = entries if whole else entries[present]
    changed = found & ~_PROT_BITS | np.uint64(vma.prot) & _PROT_BITS
    if vma.prot & f.PTE_RW:
        # Special entries of a shared mapping do not exist; write protection of uffd stays.
        changed[(changed & np.uint64(f.PTE_UFFD_WP)) != 0] &= ~np.uint64(f.PTE_RW)
    elif vma.flags & f.VM_WRITE:
        changed[_may_write(mm, vma, changed)] |= np.uint64(f.PTE_RW)
    entries[...] = changed if whole else entries
    if not whole:
        entries[present] = changed


def _may_write(
    mm: AddressSpace[Any], vma: Vma, found: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Which entries need no fault before they are written (can_change_pte_writable)."""
    clear = (found & np.uint64(f.PTE_UFFD_WP)) == 0
    result: npt.NDArray[np.bool_]
    if vma.flags & f.VM_SHARED:
        result = clear & ((found & np.uint64(f.PTE_DIRTY)) != 0)
        return result
    words = mm.machine.frames.words[((found & PFN_MASK) >> SHIFT).view(np.int64)]
    exclusive = np.uint64(fr.PG_ANON | fr.PG_EXCLUSIVE)
    result = clear & ((found & SPECIAL) == 0) & ((words & exclusive) == exclusive)
    return result


def _new_huge(mm: AddressSpace[Any], vma: Vma, entry: int) -> int:
    entry = entry & ~(f.PTE_RW | f.PTE_USER | f.PTE_NX) | vma.prot & int(_PROT_BITS)
    frame = (entry & f.PFN_MASK) >> 12
    if (
        vma.flags & f.VM_WRITE
        and not entry & f.PTE_SPECIAL
        and mm.machine.frames.word[frame] & fr.PG_EXCLUSIVE
    ):
        entry |= f.PTE_RW
    return entry


def mapped(mm: AddressSpace[Any], first: int, last: int) -> bool:
    """Whether [first, last) is mapped without a hole."""
    at = first
    for vma in vmas_in(mm, first, last):
        if vma.first > at:
            return False
        at = vma.last
    return at >= last
