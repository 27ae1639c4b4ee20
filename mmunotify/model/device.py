"""Memory of a device in a process: page frames without a page (VM_PFNMAP).

Whose frames they are knows only who put them there: nothing counts how often they are mapped, and
reclaim, migration, pins and fork's copies do not see them. MADV_DONTNEED refuses such a mapping,
which is why a driver that must take its frames back needs `zap_vma_ptes` (2008: zap_page_range).

Source: mm/memory.c (vmf_insert_pfn, zap_vma_ptes).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT

from . import flags as f
from .filemap import File
from .mmap import pages_of
from .vma import Vma, find_vma

if TYPE_CHECKING:
    from collections.abc import Callable

    from .machine import Machine
    from .mm import AddressSpace

_WRITTEN = f.PTE_RW | f.PTE_DIRTY | f.PTE_ACCESSED


class DeviceFile(File):
    """What a driver lets processes map; shared mappings of it are VM_PFNMAP.

    `frame_of` is asked at a fault which frame stands behind a page of it, by index; -1, or nobody
    to ask, is a SIGBUS. It is a plain function: the page table lock is held.
    """

    def __init__(
        self,
        machine: Machine[Any],
        name: str,
        size: int,
        frame_of: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__(machine, name, size, "memfd")
        self.frame_of = frame_of
        self.vm_flags = f.VM_PFNMAP | f.VM_DONTEXPAND


def pfn_fault(mm: AddressSpace[Any], vma: Vma, page: int, flags: int) -> int:
    """A fault in a mapping of frames without pages; returns VM_FAULT_ bits."""
    file = vma.file
    assert isinstance(file, DeviceFile)
    entry = mm.pt.get(page)
    if not entry:
        index = page - vma.first + vma.pgoff
        frame = file.frame_of(index) if file.frame_of and index < file.page_end else -1
        if frame < 0:
            return f.VM_FAULT_SIGBUS
        entry = frame << PAGE_SHIFT | vma.prot & ~f.PTE_RW | f.PTE_SPECIAL
    if flags & f.FAULT_WRITE:
        entry |= _WRITTEN
    mm.pt.leaf_of(page).pte[page & 511] = entry | f.PTE_ACCESSED
    return 0


def insert_pfn(mm: AddressSpace[Any], addr: int, frame: int, *, writable: bool = True) -> None:
    """Map a frame at `addr` (bytes); announced to nobody, as nothing was there. Never suspends.

    EINVAL outside of a device's mapping, EBUSY where something is mapped already.
    """
    page, _ = pages_of(mm, addr, 1, "insert_pfn")
    vma = find_vma(mm, page)
    if vma is None or not vma.flags & f.VM_PFNMAP:
        raise MmError(errno.EINVAL, f"insert_pfn({addr:#x}) in {mm.name}: no device's mapping")
    pte = mm.pt.leaf_of(page).pte
    if pte[page & 511]:
        raise MmError(errno.EBUSY, f"insert_pfn({addr:#x}) in {mm.name}: something is mapped there")
    prot = vma.prot if writable else vma.prot & ~f.PTE_RW
    pte[page & 511] = frame << PAGE_SHIFT | prot | f.PTE_SPECIAL


async def zap_vma_ptes(mm: AddressSpace[Any], addr: int, length: int) -> None:
    """Take frames out of a device's mapping: S PT E over the request, and nothing is released.

    EINVAL unless [addr, addr + length) lies in one device's mapping. Takes mmap_lock for reading.
    """
    mm.require_alive()
    first, last = pages_of(mm, addr, length, "zap_vma_ptes")
    async with mm.mmap_lock.reading():
        vma = find_vma(mm, first)
        if vma is None or not vma.flags & f.VM_PFNMAP or last > vma.last:
            raise MmError(
                errno.EINVAL,
                f"zap_vma_ptes({addr:#x}, {length:#x}) in {mm.name}: expected a part of one "
                f"device's mapping, found {vma!r}",
            )
        await mm.zap_page_range(vma, first, last)
