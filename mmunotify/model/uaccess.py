"""The process's own accesses, and the kernel's to user memory: where page faults come from.

An access that the entry permits sets its accessed and dirty bits and costs nothing else; one
that it does not is a page fault. `touch` is the fast way for many pages: fresh anonymous memory is
filled in vector steps, which the single access does not share.

Source: arch/x86/mm/fault.c.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mmunotify.errors import BadAddress
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE

from . import flags as f
from . import frames as fr
from .fault import _NEW_ANON_LRU, RETRY, fault_nowait, handle_mm_fault
from .vma import Vma, find_vma, index_after, vmas_in

if TYPE_CHECKING:
    from .mm import AddressSpace

_PAGE_BITS: Final = PAGE_SIZE - 1
_READABLE: Final = f.PTE_PRESENT | f.PTE_USER
_WRITABLE: Final = _READABLE | f.PTE_RW
_STACK_GAP: Final = 256
_STACK_PAGES: Final = 2048
_DIRTY_YOUNG: Final = f.PTE_DIRTY | f.PTE_ACCESSED
_STEP: Final = 512 * 8
_FEW: Final = 8
"""Up to so many pages are touched one by one, which is cheaper than vector steps then."""
_RESCHED_PAGES: Final = 16
"""Accesses one by one that take less than the millisecond after which others may run."""


async def access(
    mm: AddressSpace[Any], addr: int, write: bool = False, value: int | None = None
) -> int:
    """Load or store one byte as the process does; the byte that is there afterwards.

    A store without `value` leaves the byte as it is. Raises BadAddress for a signal; may suspend.
    """
    entry = access_nowait(mm, addr, write)
    while not entry:
        await fault(mm, addr >> PAGE_SHIFT, f.FAULT_WRITE if write else 0)
        entry = access_nowait(mm, addr, write)
    data = mm.machine.frames.data
    if data is None:
        return 0
    frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
    contents = data.get(frame)
    if write and value is not None:
        if contents is None:
            contents = data[frame] = bytearray(PAGE_SIZE)
        contents[addr & _PAGE_BITS] = value
        return value
    return contents[addr & _PAGE_BITS] if contents is not None else 0


def access_nowait(mm: AddressSpace[Any], addr: int, write: bool = False) -> int:
    """`access` without a value in one step: the page's entry, or 0.

    0 if it may have to wait, or ends in a signal. A fault is handled under the per-VMA lock: nobody
    can change the VMA before the next await.
    """
    page = addr >> PAGE_SHIFT
    at = page & 511
    pt = mm.pt
    leaf = pt.leaves.get(page >> 9)
    needed = _WRITABLE if write else _READABLE
    used = _DIRTY_YOUNG if write else f.PTE_ACCESSED
    while True:
        if leaf is not None:
            entry: int = leaf.pte[at]
            if entry & needed == needed:
                if entry & used != used:
                    leaf.pte[at] = entry | used
                break
        elif pt.huge:
            entry = pt.get(page)
            if entry & needed == needed:
                pt.huge[page >> 9] |= used
                break
        if mm.on_fault is not None or not mm.users:
            return 0
        nth = bisect_right(mm.firsts, page) - 1
        if nth < 0:
            return 0
        vma = mm.vmas[nth]
        allowed = f.VM_WRITE if write else f.VM_ACCESS_FLAGS
        if page >= vma.last or not vma.flags & allowed or vma.lock_seq == mm.lock_seq:
            return 0
        result = fault_nowait(mm, vma, page, f.FAULT_WRITE if write else 0)
        if result == RETRY:
            return 0
        if result:
            account(mm, result)
        else:
            mm.min_flt += 1
        leaf = pt.leaves.get(page >> 9)
    if mm.tlb is not None:
        mm.tlb.fill(page, entry)
    return entry


async def fault(mm: AddressSpace[Any], page: int, flags: int) -> None:
    """One page fault exception, handled; raises BadAddress if it ends in a signal."""
    if not mm.users:
        mm.require_alive()
    if mm.on_fault is not None:
        present = mm.pt.get(page) & _READABLE == _READABLE
        mm.on_fault(page << PAGE_SHIFT, flags | f.FAULT_PRESENT if present else flags)
    vma = find_vma(mm, page)
    needed = f.VM_WRITE if flags & f.FAULT_WRITE else f.VM_ACCESS_FLAGS
    if vma is not None and vma.flags & needed and vma.lock_seq != mm.lock_seq:
        # The per-VMA lock: nobody can change this VMA before the next await.
        result = fault_nowait(mm, vma, page, flags)
        if result != RETRY:
            account(mm, result)
            return
    async with mm.mmap_lock.reading():
        vma = find_vma(mm, page) or expand_stack(mm, page)
        if vma is None:
            raise _signal(mm, page, "SEGV", 1, "nothing is mapped there")
        if _refused(vma, flags):
            raise _signal(mm, page, "SEGV", 2, f"{vma!r} does not permit it")
        result = await handle_mm_fault(mm, vma, page, flags)
    account(mm, result)
    if result & f.VM_FAULT_SIGBUS:
        raise _signal(mm, page, "BUS", 2, f"beyond the end of {vma.file!r}")
    if result & f.VM_FAULT_SIGSEGV:
        raise _signal(mm, page, "SEGV", 1, "a guard page")


def account(mm: AddressSpace[Any], result: int) -> None:
    """Count a handled fault (mm_account_fault)."""
    if result & f.VM_FAULT_ERROR:
        return
    if result & f.VM_FAULT_MAJOR:
        mm.maj_flt += 1
    else:
        mm.min_flt += 1


def _refused(vma: Vma, flags: int) -> bool:
    if flags & f.FAULT_WRITE:
        return not vma.flags & f.VM_WRITE
    return not vma.flags & f.VM_ACCESS_FLAGS


def _signal(mm: AddressSpace[Any], page: int, signal: str, code: int, why: str) -> BadAddress:
    address = page << PAGE_SHIFT
    return BadAddress(
        f"access to {address:#x} in {mm.name}: SIG{signal}, {why}",
        signal=signal,
        code=code,
        address=address,
    )


def expand_stack(mm: AddressSpace[Any], page: int) -> Vma | None:
    """Let a growsdown VMA above reach down to the page, if its guard gap and limit allow."""
    at = index_after(mm, page)
    if at == len(mm.vmas):
        return None
    vma = mm.vmas[at]
    if not vma.flags & f.VM_GROWSDOWN or vma.last - page > _STACK_PAGES:
        return None
    if at:
        prev = mm.vmas[at - 1]
        gap = page - prev.last
        if not prev.flags & f.VM_GROWSDOWN and prev.flags & f.VM_ACCESS_FLAGS and gap < _STACK_GAP:
            return None
    if not mm.anon_vma_prepare_nowait(vma):
        return None
    vma.set_range(page, vma.last, vma.pgoff - (vma.first - page))
    mm.firsts[at] = page
    return vma


# ---------------------------------------------------------------------- many bytes, many pages


async def read(mm: AddressSpace[Any], addr: int, size: int) -> bytes:
    """`size` bytes as the process loads them; BadAddress at the first that it cannot."""
    out = bytearray()
    data = mm.machine.frames.data
    while size > 0:
        low = addr & _PAGE_BITS
        part = min(size, PAGE_SIZE - low)
        await access(mm, addr)
        frame = (mm.pt.get(addr >> PAGE_SHIFT) & f.PFN_MASK) >> PAGE_SHIFT
        contents = data.get(frame) if data is not None else None
        out += contents[low : low + part] if contents is not None else bytes(part)
        addr += part
        size -= part
        await mm.machine.cond_resched(1)
    return bytes(out)


async def write(mm: AddressSpace[Any], addr: int, data: bytes) -> None:
    """Store bytes as the process does; BadAddress at the first page that it cannot."""
    frames = mm.machine.frames
    at = 0
    while at < len(data):
        low = addr & _PAGE_BITS
        part = min(len(data) - at, PAGE_SIZE - low)
        await access(mm, addr, write=True)
        if frames.data is not None:
            frame = (mm.pt.get(addr >> PAGE_SHIFT) & f.PFN_MASK) >> PAGE_SHIFT
            contents = frames.data.get(frame)
            if contents is None:
                contents = frames.data[frame] = bytearray(PAGE_SIZE)
            contents[low : low + part] = data[at : at + part]
        at += part
        addr += part
        await mm.machine.cond_resched(1)


async def touch(
    mm: AddressSpace[Any],
    addr: int,
    length: int,
    write: bool = False,
    value: int | None = None,
    step: int = PAGE_SIZE,
) -> None:
    """One access every `step` bytes of [addr, addr + length); BadAddress at the first bad one.

    Fresh anonymous memory is filled in vector steps if no contents are kept or stored.
    """
    machine = mm.machine
    stored = value and machine.frames.data is not None
    if step != PAGE_SIZE or mm.on_fault is not None or stored:
        for at in range(addr, addr + length, step):
            await access(mm, at, write, value)
            await machine.cond_resched(1)
        return
    page = addr >> PAGE_SHIFT
    last = (addr + length + _PAGE_BITS) >> PAGE_SHIFT
    while page < last:
        end = min(last, (page // _STEP + 1) * _STEP)
        if write:
            # No further than memory lasts; the page after that reclaims.
            end = min(end, page + max(1, machine.frames.free - machine.low))
        if end - page > _FEW and _touch_range(mm, page, end, write):
            await machine.cond_resched(end - page)
        else:
            for at in range(page, end):
                if not access_nowait(mm, at << PAGE_SHIFT, write):
                    await access(mm, at << PAGE_SHIFT, write)
                if not at % _RESCHED_PAGES:
                    await machine.cond_resched(_RESCHED_PAGES)
        page = end


def _touch_range(mm: AddressSpace[Any], first: int, last: int, write: bool) -> bool:
    """Touch pages [first, last) without suspending; False if a page needs more than that."""
    vmas = vmas_in(mm, first, last)
    if len(vmas) != 1 or vmas[0].first > first or vmas[0].last < last or mm.pt.huge:
        return False
    vma = vmas[0]
    machine = mm.machine
    if vma.lock_seq == mm.lock_seq or _refused(vma, f.FAULT_WRITE if write else 0) or mm.tlb:
        return False
    fresh = (
        vma.file is None
        and vma.uffd is None
        and not vma.flags & (f.VM_LOCKED | f.VM_HUGEPAGE)
        and machine.thp != "always"
        and machine.frames.free - (last - first) >= machine.low
        and (not write or mm.anon_vma_prepare_nowait(vma))
    )
    if fresh:
        mm.pt.populate(first, last)
    needed = _WRITABLE if write else _READABLE
    bits = np.uint64(_DIRTY_YOUNG if write else f.PTE_ACCESSED)
    for page, entries in mm.pt.runs(first, last):
        if not np.count_nonzero(entries):
            if not fresh:
                return False
            if write:
                _fill(mm, vma, page, entries, None)
            else:
                entries.fill(machine.zero_entry | vma.prot)
            mm.min_flt += len(entries)
            first += len(entries)
            continue
        used = entries if _every(entries) & needed else entries[entries.nonzero()[0]]
        if _every(used) & needed != needed:
            return False
        if used is entries:
            entries |= bits
        elif not fresh:
            return False
        else:
            entries[entries.nonzero()[0]] |= bits
            empty = (entries == 0).nonzero()[0]
            if write:
                _fill(mm, vma, page, entries, empty)
            else:
                entries[empty] = machine.zero_entry | vma.prot
            mm.min_flt += len(empty)
        first += len(entries)
    return first == last


def _every(entries: np.ndarray[Any, np.dtype[np.uint64]]) -> int:
    """The bits that all of some entries have."""
    return int(np.bitwise_and.reduce(entries))


def _fill(
    mm: AddressSpace[Any],
    vma: Vma,
    page: int,
    entries: np.ndarray[Any, np.dtype[np.uint64]],
    empty: np.ndarray[Any, np.dtype[np.int64]] | None,
) -> None:
    """Put fresh anonymous pages where a run is empty, which is everywhere without `empty`."""
    machine = mm.machine
    frames = machine.frames
    count = len(entries if empty is None else empty)
    new = frames.alloc_many(count)
    pfns = new.astype(np.uint64)
    assert vma.anon_vma is not None
    owner = vma.anon_vma.number << fr.OWNER_SHIFT | page - vma.first + vma.pgoff
    where = np.arange(owner, owner + count, dtype=np.uint64)
    if empty is not None:
        where = empty.view(np.uint64) + np.uint64(owner)
    index = pfns.view(np.int64)
    frames.words[index] |= np.uint64(_NEW_ANON_LRU)
    frames.rmaps[index] = where
    machine.lru.append_many(index)
    pfns <<= np.uint64(PAGE_SHIFT)
    pfns |= np.uint64(vma.prot | f.PTE_RW | f.PTE_DIRTY | f.PTE_ACCESSED)
    if empty is None:
        entries[:] = pfns
    else:
        entries[empty] = pfns


# ---------------------------------------------------------------------- the kernel's accesses


async def copy_from_user(mm: AddressSpace[Any], addr: int, length: int) -> int:
    """The kernel reads the pages of [addr, addr + length); how many it could.

    An absent page faults twice: with faults disabled, and again to bring it in.
    """
    return await _kernel_access(mm, addr, length, None)


async def copy_to_user(mm: AddressSpace[Any], addr: int, length: int, value: int = 0) -> int:
    """The kernel fills the pages of [addr, addr + length) with a byte; how many it could."""
    return await _kernel_access(mm, addr, length, value)


async def _kernel_access(mm: AddressSpace[Any], addr: int, length: int, value: int | None) -> int:
    write = value is not None
    flags = f.FAULT_KERNEL | (f.FAULT_WRITE if write else 0)
    needed = _WRITABLE if write else _READABLE
    first = addr >> PAGE_SHIFT
    last = (addr + length + _PAGE_BITS) >> PAGE_SHIFT
    for page in range(first, last):
        while mm.pt.get(page) & needed != needed:
            if not write and mm.on_fault is not None:
                mm.on_fault(page << PAGE_SHIFT, flags)
            try:
                await fault(mm, page, flags)
            except BadAddress:
                return page - first
        await access(mm, page << PAGE_SHIFT, write)
        data = mm.machine.frames.data
        if value is not None and data is not None:
            frame = (mm.pt.get(page) & f.PFN_MASK) >> PAGE_SHIFT
            data[frame] = bytearray([value]) * PAGE_SIZE
    return last - first
