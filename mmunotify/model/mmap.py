"""mmap, munmap and brk: mappings come and go.

An unmap is announced once, over the whole range that was asked for, holes and all; before it come
the announcements of the splits at its two ends. Source: mm/vma.c, mm/mmap.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from mmunotify.errors import MmError
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE, Event

from . import flags as f
from . import memory
from .hugetlb import HugeFile
from .rmap import locks_of, trylock_write
from .vma import Vma, find_vma, index_after, link, merge_new, split, unlink, vmas_in

if TYPE_CHECKING:
    from .filemap import File
    from .mm import AddressSpace

TASK_SIZE: Final = 1 << 47
_TASK_PAGES: Final = TASK_SIZE >> PAGE_SHIFT
_MMAP_BASE: Final = 0x7F00_0000_0000 >> PAGE_SHIFT
BRK_BASE: Final = 0x5555_5555_0000
MAX_MAP_COUNT: Final = 65530


def pages_of(mm: AddressSpace[Any], addr: int, length: int, what: str) -> tuple[int, int]:
    """[first, last) in pages of a range in bytes, its end rounded up; EINVAL if unaligned."""
    if addr & (PAGE_SIZE - 1) or addr < 0 or length < 0:
        raise MmError(
            errno.EINVAL,
            f"{what}({addr:#x}, {length:#x}) in {mm.name}: expected a page-aligned address",
        )
    return addr >> PAGE_SHIFT, (addr + length + PAGE_SIZE - 1) >> PAGE_SHIFT


def hole(mm: AddressSpace[Any], count: int) -> int:
    """Where `count` pages fit, from the top down (get_unmapped_area)."""
    high = _MMAP_BASE
    for vma in reversed(mm.vmas):
        if vma.first >= high:
            continue
        if high - vma.last >= count:
            return high - count
        high = vma.first
    if high < count + 16:
        raise MmError(errno.ENOMEM, f"mmap in {mm.name}: no hole of {count} pages")
    return high - count


async def mmap(
    mm: AddressSpace[Any],
    length: int,
    prot: int = f.PROT_READ | f.PROT_WRITE,
    flags: int = f.MAP_PRIVATE | f.MAP_ANONYMOUS,
    file: File | None = None,
    offset: int = 0,
    *,
    addr: int = 0,
) -> int:
    """Map `length` bytes; the address. With MAP_FIXED, what was at `addr` is unmapped first.

    Shared anonymous memory is a memfd of its own. Takes mmap_lock for writing; may suspend.
    """
    mm.require_alive()
    await mm.machine.cond_resched()
    if length <= 0 or offset & (PAGE_SIZE - 1):
        raise MmError(errno.EINVAL, f"mmap({length:#x}, offset={offset:#x}) in {mm.name}")
    count = (length + PAGE_SIZE - 1) >> PAGE_SHIFT
    fixed = flags & (f.MAP_FIXED | f.MAP_FIXED_NOREPLACE)
    if flags & f.MAP_HUGETLB:
        count = (count + 511) & ~511
        if (addr if fixed else 0) & (512 * PAGE_SIZE - 1):
            raise MmError(errno.EINVAL, f"mmap({addr:#x}, hugetlb): expected a multiple of 2 MiB")
    async with mm.write_locked:
        if fixed:
            first = pages_of(mm, addr, length, "mmap")[0]
            if first + count > _TASK_PAGES:
                raise MmError(errno.ENOMEM, f"mmap at {addr:#x} in {mm.name}: beyond the task size")
            if flags & f.MAP_FIXED_NOREPLACE and vmas_in(mm, first, first + count):
                raise MmError(
                    errno.EEXIST, f"mmap({addr:#x}, {length:#x}, NOREPLACE): something is mapped"
                )
        elif flags & f.MAP_HUGETLB:
            first = hole(mm, count + 511) + 511 & ~511
        else:
            first = hole(mm, count)
        vm_flags = _vm_flags(prot, flags)
        owned: File | None = None
        if flags & f.MAP_HUGETLB and file is None:
            vm_flags |= f.VM_HUGETLB | f.VM_DONTEXPAND
            owner = None if flags & f.MAP_SHARED else mm
            file = owned = mm.machine.huge_file(count << PAGE_SHIFT, owner)
        elif file is not None and file.vm_flags:
            if not flags & f.MAP_SHARED:
                raise MmError(errno.EINVAL, f"mmap of {file!r} in {mm.name}: expected MAP_SHARED")
            vm_flags |= file.vm_flags
        elif flags & f.MAP_SHARED and file is None:
            file = owned = mm.machine.shmem_file(count << PAGE_SHIFT)
        try:
            await _mmap_region(mm, first, first + count, vm_flags, file, offset >> PAGE_SHIFT)
        finally:
            if owned is not None:
                owned.put()
    if flags & (f.MAP_POPULATE | f.MAP_LOCKED):
        await mm.populate(first, first + count, ignore_errors=True)
    return first << PAGE_SHIFT


def _vm_flags(prot: int, flags: int) -> int:
    vm_flags = (prot & 7) | f.VM_MAYREAD | f.VM_MAYWRITE | f.VM_MAYEXEC
    if flags & f.MAP_SHARED:
        vm_flags |= f.VM_SHARED | f.VM_MAYSHARE
    if flags & f.MAP_GROWSDOWN:
        vm_flags |= f.VM_GROWSDOWN
    if flags & f.MAP_LOCKED:
        vm_flags |= f.VM_LOCKED
    if flags & f.MAP_NORESERVE:
        vm_flags |= f.VM_NORESERVE
    elif vm_flags & (f.VM_WRITE | f.VM_SHARED) == f.VM_WRITE and not flags & f.MAP_HUGETLB:
        vm_flags |= f.VM_ACCOUNT
    return vm_flags


async def _mmap_region(
    mm: AddressSpace[Any], first: int, last: int, flags: int, file: File | None, pgoff: int
) -> Vma:
    if vmas_in(mm, first, last):
        await do_munmap(mm, first, last)
    if len(mm.vmas) >= MAX_MAP_COUNT:
        raise MmError(errno.ENOMEM, f"mmap in {mm.name}: {MAX_MAP_COUNT} mappings already")
    if isinstance(file, HugeFile) and not flags & f.VM_NORESERVE and not file.reserve():
        async with mm.section(first, last, Event.UNMAP):
            pass
        raise MmError(
            errno.ENOMEM,
            f"mmap of {last - first} pages in {mm.name}: {mm.machine.hugetlb.available} huge pages "
            "are available",
        )
    if file is None:
        pgoff = first
    merged = await merge_new(mm, first, last, flags, pgoff, file)
    if merged is not None:
        return merged
    vma = Vma(mm, first, last, flags, pgoff, file)
    mm.vma_start_write(vma)
    await link_file(vma)
    link(mm, vma)
    return vma


async def link_file(vma: Vma) -> None:
    """Let the file find a new VMA that maps it, and keep the file."""
    if vma.file is not None:
        async with vma.file.i_mmap_lock.writing():
            vma.file.i_mmap.insert(vma)
        vma.file.get()


async def munmap(mm: AddressSpace[Any], addr: int, length: int) -> None:
    """Unmap [addr, addr + length) bytes; holes in it are no error.

    EINVAL if unaligned or empty, EPERM if part of it is sealed. May suspend; a cancellation that
    comes once the range is unmapped is raised when its pages are released.
    """
    mm.require_alive()
    first, last = pages_of(mm, addr, length, "munmap")
    if first == last or last > _TASK_PAGES:
        raise MmError(errno.EINVAL, f"munmap({addr:#x}, {length:#x}): expected a range, in bytes")
    await mm.machine.cond_resched()
    async with mm.write_locked:
        await do_munmap(mm, first, last)
    await mm.machine.cond_resched(last - first)


async def do_munmap(mm: AddressSpace[Any], first: int, last: int) -> None:
    """Split the edges, detach the VMAs, announce, zap, free the tables, release the pages.

    mmap_lock is held for writing. Source: do_vmi_align_munmap.
    """
    vmas = vmas_in(mm, first, last)
    if not vmas:
        return
    if vmas[0].flags & f.VM_SEALED and vmas[0].first < first:
        raise _sealed(vmas[0])
    if vmas[0].first < first:
        await split(mm, vmas[0], first, new_below=True)
    for vma in vmas:
        if vma.flags & f.VM_SEALED:
            raise _sealed(vma)
        if vma.last > last:
            await split(mm, vma, last, new_below=False)
    for vma in vmas:
        mm.vma_start_write(vma)
        unlink(mm, vma)
    at = index_after(mm, first)
    floor = mm.vmas[at - 1].last if at else 0
    ceiling = mm.vmas[at].first if at < len(mm.vmas) else 1 << 52
    section = mm.section(first, last, Event.UNMAP, zap=True)
    try:
        await section.__aenter__()
    except BaseException:
        # Cancelled before anything was unmapped: the mappings are put back.
        for vma in vmas:
            link(mm, vma)
        raise
    try:
        for vma in vmas:
            await memory.zap_pages(mm, vma, vma.first, vma.last, section, drop_markers=True)
    finally:
        await section.__aexit__(None, None, None)
    for vma in vmas:
        if not remove_vma_nowait(mm, vma):
            await remove_vma(mm, vma)
    mm.pt.free_tables(first, last, floor, ceiling)
    await section.settle()


def remove_vma_nowait(mm: AddressSpace[Any], vma: Vma) -> bool:
    """`remove_vma` if no lock has to be waited for; whether it was done."""
    locks = locks_of((vma,))
    if not trylock_write(locks):
        return False
    mm.machine.anon_vmas.unlink(vma)
    if vma.file is not None:
        vma.file.i_mmap.remove(vma)
    for lock in locks:
        lock.up_write()
    if vma.file is not None:
        vma.file.put()
    return True


async def remove_vma(mm: AddressSpace[Any], vma: Vma) -> None:
    """Unlink a detached VMA from the reverse maps and drop its file (free_pgtables, remove_vma)."""
    if vma.file is not None or vma.chain:
        async with mm.locks_of(vma):
            mm.machine.anon_vmas.unlink(vma)
            if vma.file is not None:
                vma.file.i_mmap.remove(vma)
    if vma.file is not None:
        if vma.flags & f.VM_HUGETLB:
            vma.file.closed(vma)
        vma.file.put()


def _sealed(vma: Vma) -> MmError:
    return MmError(errno.EPERM, f"{vma!r} is sealed (mseal)")


async def brk(mm: AddressSpace[Any], addr: int) -> int:
    """Move the end of the heap to `addr`; returns where it is now, unmoved if it cannot be."""
    mm.require_alive()
    if addr < mm.brk_start:
        return mm.brk_end
    await mm.machine.cond_resched()
    old = (mm.brk_end + PAGE_SIZE - 1) >> PAGE_SHIFT
    new = (addr + PAGE_SIZE - 1) >> PAGE_SHIFT
    async with mm.write_locked:
        if new < old:
            await do_munmap(mm, new, old)
        elif new > old:
            if vmas_in(mm, old, new + 1) or new > _TASK_PAGES:
                return mm.brk_end
            flags = _vm_flags(f.PROT_READ | f.PROT_WRITE, f.MAP_PRIVATE)
            if await merge_new(mm, old, new, flags, old, None, just_expand=True) is None:
                vma = Vma(mm, old, new, flags, old, None)
                mm.vma_start_write(vma)
                link(mm, vma)
        mm.brk_end = addr
    heap = find_vma(mm, new - 1)
    if new > old and heap is not None and heap.flags & f.VM_LOCKED:
        await mm.populate(old, new, ignore_errors=True)
    return addr
