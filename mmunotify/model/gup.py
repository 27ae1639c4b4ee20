"""get_user_pages: populate, pins, and writes by others that force their way.

These take no exception: the faults are counted, and `on_fault` does not hear of them.
Source: mm/gup.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

import attrs

from mmunotify.errors import BadAddress, MmError
from mmunotify.primary import Translations
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE

from . import flags as f
from . import frames as fr
from .fault import RETRY, fault_nowait, handle_mm_fault
from .uaccess import account, expand_stack
from .vma import Vma, find_vma, vmas_in

if TYPE_CHECKING:
    from .mm import AddressSpace

_READABLE: Final = f.PTE_PRESENT | f.PTE_USER


def faultin_nowait(mm: AddressSpace[Any], page: int, *, write: bool) -> int:
    """`faultin_page` in one step under the per-VMA lock; 0 if it takes more than that."""
    vma = find_vma(mm, page)
    needed = f.VM_WRITE if write else f.VM_ACCESS_FLAGS
    if vma is None or not vma.flags & needed or vma.lock_seq == mm.lock_seq:
        return 0
    wanted = _READABLE | f.PTE_RW if write else _READABLE
    pt = mm.pt
    leaf = pt.leaves.get(page >> 9)
    entry = leaf.pte[page & 511] if leaf is not None else pt.get(page)
    if entry & wanted != wanted:
        result = fault_nowait(mm, vma, page, f.FAULT_REMOTE | (f.FAULT_WRITE if write else 0))
        if result == RETRY:
            return 0
        if result:
            account(mm, result)
        else:
            mm.min_flt += 1
        entry = leaf.pte[page & 511] if leaf is not None else pt.get(page)
    return entry if entry & wanted == wanted else 0


async def faultin_page(
    mm: AddressSpace[Any],
    vma: Vma,
    page: int,
    *,
    write: bool,
    force: bool = False,
    forgets: bool = False,
) -> int:
    """The entry of a page, present and fit for what is wanted; may suspend and announce.

    With `force` a page that only others may write is made the process's own copy. A caller that
    `forgets` begins anew after a wait for a disk, which makes the fault a minor one. Raises
    BadAddress where a fault ends in a signal. mmap_lock is held.
    """
    while True:
        entry = mm.pt.get(page)
        present = entry & f.PTE_PRESENT and (entry & f.PTE_USER or force)
        if present and (not write or entry & f.PTE_RW or _may_force(mm, vma, entry, force)):
            return entry
        flags = f.FAULT_REMOTE | (f.FAULT_WRITE if write else 0)
        result = await handle_mm_fault(mm, vma, page, flags)
        if forgets and vma.file is not None and vma.file.writenotify:
            result &= ~f.VM_FAULT_MAJOR
        account(mm, result)
        if result & f.VM_FAULT_ERROR:
            bus = result & f.VM_FAULT_SIGBUS
            raise BadAddress(
                f"{page << PAGE_SHIFT:#x} in {mm.name}: cannot be faulted in",
                signal="BUS" if bus else "SEGV",
                code=2 if bus else 1,
                address=page << PAGE_SHIFT,
            )


def _may_force(mm: AddressSpace[Any], vma: Vma, entry: int, force: bool) -> bool:
    if not force or vma.flags & (f.VM_SHARED | f.VM_WRITE) or entry & f.PTE_SPECIAL:
        return False
    word = mm.machine.frames.word[(entry & f.PFN_MASK) >> PAGE_SHIFT]
    exclusive = fr.PG_ANON | fr.PG_EXCLUSIVE
    return bool(word & exclusive == exclusive)


def _permits(vma: Vma, *, write: bool, force: bool) -> bool:
    """Whether a mapping may be accessed so (check_vma_flags)."""
    if vma.flags & f.VM_PFNMAP:
        return False
    if write:
        return bool(vma.flags & f.VM_WRITE) or (force and vma.cow)
    return bool(vma.flags & f.VM_READ) or (force and bool(vma.flags & f.VM_MAYREAD))


async def populate(
    mm: AddressSpace[Any],
    first: int,
    last: int,
    *,
    write: bool | None = None,
    madvise: bool = False,
    ignore_errors: bool = False,
) -> None:
    """Fault in pages [first, last); private writable mappings get pages of their own.

    For madvise: `write` says for what, permissions are checked (EINVAL), holes are ENOMEM and
    signals EFAULT. Otherwise holes and lock-on-fault mappings are skipped, and errors too with
    `ignore_errors`. Source: __mm_populate, madvise_populate.
    """
    try:
        at = first
        while at < last:
            async with mm.mmap_lock.reading():
                vmas = vmas_in(mm, at, last)
                if madvise and (not vmas or vmas[0].first > at):
                    raise MmError(
                        errno.ENOMEM, f"populate in {mm.name}: nothing at {at << PAGE_SHIFT:#x}"
                    )
                if not vmas:
                    return
                vma = vmas[0]
                low, at = max(at, vma.first), min(vma.last, last)
                try:
                    await populate_vma(mm, vma, low, at, write=write, madvise=madvise)
                except BadAddress as error:
                    if not ignore_errors:
                        raise MmError(errno.EFAULT, str(error)) from None
                except MmError:
                    if not ignore_errors:
                        raise
            await mm.machine.cond_resched(at - low)
    finally:
        if madvise:
            mm.machine.lru.drain()


async def populate_vma(
    mm: AddressSpace[Any],
    vma: Vma,
    first: int,
    last: int,
    *,
    write: bool | None = None,
    madvise: bool = False,
) -> None:
    """`populate` of pages of one VMA, for a caller that holds mmap_lock in either mode."""
    force = False
    if not madvise:
        if vma.flags & (f.VM_LOCKONFAULT | f.VM_PFNMAP):
            return
        if not vma.flags & f.VM_ACCESS_FLAGS:
            raise MmError(errno.EFAULT, f"populate: {vma!r} permits nothing")
        write = vma.flags & (f.VM_WRITE | f.VM_SHARED) == f.VM_WRITE
        force = True
    try:
        if not _permits(vma, write=bool(write), force=force):
            number = errno.EINVAL if madvise else errno.EFAULT
            raise MmError(number, f"populate: {vma!r} does not permit it")
        for page in range(first, last):
            entry = await faultin_page(
                mm, vma, page, write=bool(write), force=force, forgets=not madvise
            )
            _touched(mm, page, entry, bool(write))
    finally:
        if not madvise:
            mm.machine.lru.drain()


def _touched(mm: AddressSpace[Any], page: int, entry: int, write: bool) -> None:
    """FOLL_TOUCH: the page was accessed, whatever the entry says."""
    if entry & f.PTE_SPECIAL or page >> 9 in mm.pt.huge:
        return
    frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
    if write and not entry & f.PTE_DIRTY:
        mm.machine.frames.word[frame] |= fr.PG_DIRTY
    mm.machine.mark_accessed(frame)


async def access_remote(mm: AddressSpace[Any], addr: int, data: bytes) -> None:
    """Write bytes into the process as /proc/pid/mem does: private copies of read-only pages.

    BadAddress or MmError (EFAULT) at the first page that cannot be, the pages before it written.
    """
    at = 0
    while at < len(data):
        page, low = addr >> PAGE_SHIFT, addr & (PAGE_SIZE - 1)
        part = min(len(data) - at, PAGE_SIZE - low)
        async with mm.mmap_lock.reading():
            vma = find_vma(mm, page) or expand_stack(mm, page)
            if vma is None or not _permits(vma, write=True, force=True):
                raise MmError(errno.EFAULT, f"access_remote({addr:#x}) in {mm.name}: not writable")
            entry = await faultin_page(mm, vma, page, write=True, force=True)
            frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
            frames = mm.machine.frames
            frames.word[frame] |= fr.PG_DIRTY
            if frames.data is not None:
                contents = frames.data.setdefault(frame, bytearray(PAGE_SIZE))
                contents[low : low + part] = data[at : at + part]
        at += part
        addr += part


@attrs.define(slots=True)
class Pinned:
    """What `pin` holds: frames that are neither freed nor moved until `unpin`."""

    start: int
    end: int
    translations: Translations
    released: bool = False


async def pin(mm: AddressSpace[Any], start: int, end: int, *, write: bool = True) -> Pinned:
    """Fault in [start, end) bytes and hold the frames (FOLL_LONGTERM).

    Pages that others share are copied first, so that the process and the device see the same.
    BadAddress if a page cannot be had; nothing is held then. May suspend.
    """
    first, last = start >> PAGE_SHIFT, (end + PAGE_SIZE - 1) >> PAGE_SHIFT
    frames = mm.machine.frames
    held: list[int] = []
    # Up to the first page that is not there as wanted, nothing but the tables is looked at.
    fast = True
    wanted = _READABLE | f.PTE_RW if write else _READABLE
    try:
        async with mm.mmap_lock.reading():
            for page in range(first, last):
                vma = find_vma(mm, page)
                if vma is None or not _pinnable(vma, write):
                    raise BadAddress(
                        f"pin of {page << PAGE_SHIFT:#x} in {mm.name}: not permitted",
                        code=1 if vma is None else 2,
                        address=page << PAGE_SHIFT,
                    )
                fast = fast and mm.pt.get(page) & wanted == wanted
                entry = await faultin_page(mm, vma, page, write=write)
                if not fast:
                    _touched(mm, page, entry, write)
                frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
                while not write and not entry & f.PTE_SPECIAL and _shared_anon(mm, frame):
                    await handle_mm_fault(mm, vma, page, f.FAULT_REMOTE | f.FAULT_UNSHARE)
                    entry = await faultin_page(mm, vma, page, write=write)
                    frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
                frames.pin(frame)
                held.append(frame)
    except BaseException:
        for frame in held:
            frames.unpin(frame)
        raise
    translations = Translations(
        pages=range(first, last),
        frames=held,
        writable=[int(write)] * len(held),
        generations=[frames.word[frame] >> fr.GEN_SHIFT for frame in held],
    )
    return Pinned(start, end, translations)


def _pinnable(vma: Vma, write: bool) -> bool:
    if write and vma.flags & f.VM_SHARED and vma.file is not None and vma.file.writenotify:
        return False
    return _permits(vma, write=write, force=False)


def _shared_anon(mm: AddressSpace[Any], frame: int) -> bool:
    word = mm.machine.frames.word[frame]
    return bool(word & (fr.PG_ANON | fr.PG_EXCLUSIVE) == fr.PG_ANON)


def unpin(mm: AddressSpace[Any], pinned: Pinned) -> None:
    """Let the frames of a `pin` go; once. Never suspends."""
    if pinned.released:
        raise MmError(errno.EINVAL, f"unpin of [{pinned.start:#x}, {pinned.end:#x}): done already")
    pinned.released = True
    for frame in pinned.translations.frames:
        mm.machine.frames.unpin(frame)
    if mm.machine.hugetlb.used:
        mm.machine.hugetlb.collect()
