"""fork, execve, exit: address spaces come and go.

The parent hears one announcement per VMA whose pages become shared for writing; the child, whose
notifiers are its own and empty, none. Nothing is announced for an address space that goes: drivers
are told `release` before its first page is freed.

Source: kernel/fork.c, mm/mmap.c (dup_mmap, exit_mmap).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from mmunotify.errors import MmError
from mmunotify.ranges import Event

from . import flags as f
from . import memory
from .mmap import remove_vma, remove_vma_nowait
from .rmap import WriteLocked, locks_of

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .vma import Vma


_NOT_INHERITED: Final = f.VM_LOCKED_MASK | f.VM_UFFD


async def fork(mm: AddressSpace[Any], name: str = "child") -> AddressSpace[Any]:
    """A child with a copy of this address space; pages are shared until somebody writes.

    Holds both mmap_locks for writing. ENOMEM, and no child, if pinned pages cannot be copied.
    """
    mm.require_alive()
    await mm.machine.cond_resched()
    child: AddressSpace[Any] = mm.machine.new_mm(name)
    child.brk_start, child.brk_end = mm.brk_start, mm.brk_end
    pages = 0
    try:
        async with mm.write_locked, child.write_locked:
            for source in list(mm.vmas):
                if not source.flags & f.VM_DONTCOPY:
                    pages += source.pages
                    await _dup_vma(mm, child, source)
            mm.flush_tlb(0, 1 << 52)
    except BaseException:
        await child.put()
        raise
    await mm.machine.cond_resched(pages)
    return child


async def _dup_vma(mm: AddressSpace[Any], child: AddressSpace[Any], source: Vma) -> None:
    """Copy one VMA to the child, and the entries that it could not fault in again (dup_mmap)."""
    mm.vma_start_write(source)
    vma = source.dup()
    vma.mm = child
    if vma.flags & _NOT_INHERITED:
        vma.flags &= ~_NOT_INHERITED
        vma.set_page_prot()
    vma.uffd = None
    wipe = source.flags & f.VM_WIPEONFORK
    if (source.chain and not wipe) or source.file is not None:
        async with WriteLocked(locks_of((source,))):
            if not wipe:
                mm.machine.anon_vmas.fork(vma, source)
            if vma.file is not None:
                vma.file.i_mmap.insert_after(vma, source)
                vma.file.get()
    child.vma_start_write(vma)
    child.firsts.append(vma.first)
    child.vmas.append(vma)
    if wipe:
        return
    # What is only in the file can be faulted in again, unless an entry says more than that.
    if source.anon_vma is None and not source.flags & (f.VM_PFNMAP | f.VM_MAYBE_GUARD):
        return
    if source.cow:
        huge = source.flags & f.VM_HUGETLB
        event = Event.CLEAR if huge else Event.PROTECTION_PAGE
        async with mm.section(source.first, source.last, event):
            copied = memory.copy_page_range(child, vma, mm, source)
    else:
        copied = memory.copy_page_range(child, vma, mm, source)
    if not copied:
        raise MmError(errno.ENOMEM, f"fork of {mm.name}: no memory to copy pinned pages")


async def execve(mm: AddressSpace[Any]) -> AddressSpace[Any]:
    """Replace the address space by a new, empty one, which is returned; this one exits."""
    mm.require_alive()
    fresh: AddressSpace[Any] = mm.machine.new_mm(mm.name)
    fresh.on_fault = mm.on_fault
    await mm.put()
    return fresh


async def exit_mmap(mm: AddressSpace[Any]) -> None:
    """Tear down: `release` of every driver, then unmap everything, unannounced.

    Called when mm_users has reached zero.
    """
    await mm.notifiers.release()
    async with mm.write_locked:
        if memory.zap_needs_vmas(mm):
            for vma in mm.vmas:
                section = mm.section(vma.first, vma.last, Event.UNMAP)
                await memory.zap_pages(mm, vma, vma.first, vma.last, section, drop_markers=True)
            mm.pt.free_tables(0, 1 << 52, 0, 1 << 52)
        else:
            memory.zap_all(mm)
        mm.flush_tlb(0, 1 << 52)
        vmas = list(mm.vmas)
        mm.vmas.clear()
        mm.firsts.clear()
        for vma in vmas:
            if not remove_vma_nowait(mm, vma):
                await remove_vma(mm, vma)
    mm.machine.forget(mm)
    mm.drop()
