"""Page faults: anonymous, file, copy on write, swap-in.

`handle_mm_fault` is called with mmap_lock held for reading, or under the per-VMA lock, which here
is "until the next await": what needs no waiting is done by plain functions, which answer RETRY
when they would have to wait. Pages are page numbers.

Source: mm/memory.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mmunotify.ranges import PAGE_SHIFT, Event, Range

from . import device
from . import flags as f
from . import frames as fr
from .hugetlb import hugetlb_fault

if TYPE_CHECKING:
    from .mm import AddressSpace
    from .vma import Vma

RETRY: Final = -1
_FAULT_AROUND: Final = 16
_MANY_REFS: Final = 3
_PLAIN_COPY: Final = (
    fr.PG_ANON | fr.PG_EXCLUSIVE | fr.PG_KSM | fr.PG_SWAPCACHE | fr.PG_HUGE | fr.PG_LARGE
)
_NEW_ANON: Final = fr.MAPPED_ONCE | fr.PG_ANON | fr.PG_EXCLUSIVE | fr.PG_SWAPBACKED
_NEW_ANON_LRU: Final = _NEW_ANON | fr.PG_LRU
_DIRTY_YOUNG: Final = f.PTE_DIRTY | f.PTE_ACCESSED
_NEW_WRITABLE: Final = _DIRTY_YOUNG | f.PTE_RW


async def handle_mm_fault(mm: AddressSpace[Any], vma: Vma, page: int, flags: int) -> int:
    """Make one access possible; returns VM_FAULT_ bits. May suspend and announce (COW)."""
    machine = mm.machine
    if vma.flags & (f.VM_HUGETLB | f.VM_PFNMAP):
        if vma.flags & f.VM_PFNMAP:
            return device.pfn_fault(mm, vma, page, flags)
        return await hugetlb_fault(mm, vma, page, flags)
    while True:
        result = fault_nowait(mm, vma, page, flags)
        if result != RETRY:
            return result
        mm.pt.pmd_alloc(page >> 18)
        entry = mm.pt.get(page)
        if not entry or entry == f.MARKER_UFFD_WP:
            if vma.anonymous:
                if vma.uffd is not None and vma.flags & f.VM_UFFD_MISSING and not entry:
                    await vma.uffd.handle(mm, page, flags)
                    return 0
                if flags & f.FAULT_WRITE and vma.anon_vma is None:
                    await mm.anon_vma_prepare(vma)
                await machine.balance()
                continue
            if vma.uffd is not None and vma.uffd.minor(vma, page) and not entry:
                await vma.uffd.handle(mm, page, flags)
                return 0
            return await _do_fault(mm, vma, page, flags)
        if not entry & f.PTE_PRESENT:
            kind = entry & f.SWP_TYPE_MASK
            if kind == f.SWP_SWAP:
                return await _do_swap_page(mm, vma, page, flags, entry)
            if kind == f.SWP_MIGRATION:
                await machine.wait_migration((entry & f.PFN_MASK) >> PAGE_SHIFT)
                return 0
            return f.VM_FAULT_SIGSEGV
        protected = vma.uffd is not None and entry & f.PTE_UFFD_WP and not vma.uffd.async_wp
        if vma.uffd is not None and protected and flags & f.FAULT_WRITE:
            await vma.uffd.handle(mm, page, flags)
            return 0
        return await _do_wp_page(mm, vma, page, flags, entry)


def fault_nowait(mm: AddressSpace[Any], vma: Vma, page: int, flags: int) -> int:
    """What a fault can do in one step, as VM_FAULT_ bits, or RETRY."""
    leaf = mm.pt.leaves.get(page >> 9)
    entry = leaf.pte[page & 511] if leaf is not None else 0
    if not entry:
        if vma.uffd is not None and (vma.file is not None or vma.flags & f.VM_UFFD_MISSING):
            return RETRY
        if vma.file is not None:
            if vma.flags & (f.VM_HUGETLB | f.VM_PFNMAP):
                return RETRY
            return _do_fault_nowait(mm, vma, page, flags)
        if leaf is None:
            if mm.pt.huge and page >> 9 in mm.pt.huge:
                return _huge_nowait(mm, page, flags)
            if mm.thp_wanted(vma, page) and mm.fault_huge(vma, page, flags):
                return 0
            leaf = mm.pt.leaf_of(page)
        if not flags & f.FAULT_WRITE:
            leaf.pte[page & 511] = mm.machine.zero_entry | vma.prot
            return 0
        frame = _new_anon(mm, vma, page)
        if frame < 0:
            return RETRY
        prot = vma.prot | (_NEW_WRITABLE if vma.flags & f.VM_WRITE else _DIRTY_YOUNG)
        leaf.pte[page & 511] = frame << PAGE_SHIFT | prot
        return 0
    assert leaf is not None
    if not entry & f.PTE_PRESENT:
        return _swap_in_nowait(mm, vma, leaf.pte, page, flags, entry)
    if not flags & (f.FAULT_WRITE | f.FAULT_UNSHARE) or entry & f.PTE_RW:
        young = _DIRTY_YOUNG if flags & f.FAULT_WRITE else f.PTE_ACCESSED
        leaf.pte[page & 511] = entry | young
        return 0
    if entry & f.PTE_UFFD_WP:
        if vma.uffd is None or not vma.uffd.async_wp or flags & f.FAULT_UNSHARE:
            return RETRY
        entry &= ~f.PTE_UFFD_WP
        leaf.pte[page & 511] = entry
    old = (entry & f.PFN_MASK) >> PAGE_SHIFT
    if vma.flags & f.VM_SHARED:
        if entry & f.PTE_SPECIAL or flags & f.FAULT_UNSHARE:
            # A device's frame.
            return RETRY
        # wp_page_shared: page_mkwrite, then the page is dirty.
        leaf.pte[page & 511] = entry | _NEW_WRITABLE
        mm.machine.frames.word[old] |= fr.PG_DIRTY
        return 0
    if not entry & f.PTE_SPECIAL:
        word = mm.machine.frames.word[old]
        if word & _PLAIN_COPY == fr.PG_ANON and word & fr.REF_MASK > 1:
            # Another process has it, too: can_reuse would say no, having drained the batches.
            if word & fr.REF_MASK <= _MANY_REFS and mm.machine.lru.is_new(old):
                mm.machine.lru.drain()
        elif can_reuse(mm, old):
            if not flags & f.FAULT_UNSHARE:
                writable = f.PTE_RW if vma.flags & f.VM_WRITE else 0
                leaf.pte[page & 511] = entry | _DIRTY_YOUNG | writable
            return 0
    return _copy_nowait(mm, vma, leaf.pte, page, entry, bool(flags & f.FAULT_UNSHARE))


def _new_anon(mm: AddressSpace[Any], vma: Vma, page: int) -> int:
    """A fresh anonymous page of a VMA, mapped once, or -1 if that takes more than one step."""
    machine = mm.machine
    frames = machine.frames
    if frames.free <= machine.low:
        return -1
    anon_vma = vma.anon_vma
    if anon_vma is None:
        if not mm.anon_vma_prepare_nowait(vma):
            return -1
        anon_vma = vma.anon_vma
    frame = frames.alloc()
    frames.word[frame] |= _NEW_ANON_LRU
    owner = anon_vma.number << fr.OWNER_SHIFT  # type: ignore[union-attr]
    frames.rmap[frame] = owner | page - vma.first + vma.pgoff
    machine.lru.append(frame)
    if vma.flags & f.VM_LOCKED:
        machine.mlock(frame)
    return frame


def _huge_nowait(mm: AddressSpace[Any], page: int, flags: int) -> int:
    index = page >> 9
    entry = mm.pt.huge[index]
    if not flags & (f.FAULT_WRITE | f.FAULT_UNSHARE) or entry & f.PTE_RW:
        mm.pt.huge[index] = entry | (_DIRTY_YOUNG if flags & f.FAULT_WRITE else f.PTE_ACCESSED)
        return 0
    return RETRY


def can_reuse(mm: AddressSpace[Any], frame: int) -> bool:
    """Whether the only mapping of an anonymous page may write to it without a copy.

    Decided by the refcount: whoever else holds a reference (swap cache, a pin, another process, a
    batch on its way to an LRU list) makes it a copy. Source: wp_can_reuse_anon_folio.
    """
    words = mm.machine.frames.word
    word = words[frame]
    if not word & fr.PG_ANON:
        return False
    if word & fr.PG_EXCLUSIVE:
        return True
    if word & fr.PG_KSM or word & fr.REF_MASK > _MANY_REFS:
        return False
    if mm.machine.lru.holds(frame):
        return False
    if word & fr.PG_HUGE:
        return bool(word & fr.COUNTS_MASK == fr.MAPPED_ONCE) and _reuse_huge(mm, frame)
    refs = word & fr.REF_MASK
    if word & fr.PG_SWAPCACHE:
        if refs != 2 or not mm.machine.swap.try_free(frame):
            return False
    elif refs != 1:
        return False
    words[frame] |= fr.PG_EXCLUSIVE
    return True


def _reuse_huge(mm: AddressSpace[Any], frame: int) -> bool:
    """A page of a large folio is reused only if nobody else maps any page of the folio."""
    frames = mm.machine.frames
    head = frame & ~511
    counts = (frames.words[head : head + 512] & fr.MAP_MASK) >> fr.MAP_SHIFT
    if (counts > 1).any():
        return False
    frames.word[frame] |= fr.PG_EXCLUSIVE
    return True


# ---------------------------------------------------------------------- copy on write


async def _do_wp_page(mm: AddressSpace[Any], vma: Vma, page: int, flags: int, entry: int) -> int:
    if page >> 9 in mm.pt.huge:
        return await mm.wp_huge(vma, page, flags)
    if vma.flags & f.VM_SHARED and not entry & f.PTE_SPECIAL:
        # wp_page_shared: page_mkwrite, then the page is dirty.
        frame = (entry & f.PFN_MASK) >> PAGE_SHIFT
        mm.set_pte(page, (entry & ~f.PTE_UFFD_WP) | _NEW_WRITABLE)
        mm.machine.frames.word[frame] |= fr.PG_DIRTY
        return 0
    return await wp_page_copy(mm, vma, page, entry, unshare=bool(flags & f.FAULT_UNSHARE))


def _copy_nowait(
    mm: AddressSpace[Any], vma: Vma, pte: memoryview, page: int, entry: int, unshare: bool
) -> int:
    """`wp_page_copy` in one step, where nobody has to be awaited."""
    notifiers = mm.notifiers
    machine = mm.machine
    if not notifiers.plain and (machine.era == "v16" or not notifiers.nowait):
        return RETRY
    new = _new_anon(mm, vma, page)
    if new < 0:
        return RETRY
    frames = machine.frames
    zero = entry & f.PTE_SPECIAL
    old = (entry & f.PFN_MASK) >> PAGE_SHIFT
    if not zero and frames.data is not None:
        frames.copy(old, new)
    copied = new << PAGE_SHIFT | vma.prot
    if not unshare:
        copied |= _NEW_WRITABLE if vma.flags & f.VM_WRITE else _DIRTY_YOUNG
    rng = told = None
    failed: object = ()
    if notifiers.armed:
        rng = Range(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT, Event.CLEAR)
        try:
            if machine.era == "v16":
                pte[page & 511] = 0
                failed = notifiers.invalidate_page_atomic(rng.start).failed
            else:
                told = notifiers.invalidate_range_start_nowait(rng)
                if told is None:
                    frames.free_one(new, frames.word[new])
                    return RETRY
        except BaseException:
            pte[page & 511] = entry
            frames.free_one(new, frames.word[new])
            raise
        mm.announced.append(rng)
    pte[page & 511] = copied
    if mm.tlb is not None:
        mm.tlb.flush(page, page + 1)
    if not zero:
        word = frames.word[old] - fr.MAP_ONE
        if not word & fr.MAP_MASK:
            word &= ~(fr.PG_MLOCKED | fr.PG_UNEVICTABLE)
        frames.word[old] = word
        if vma.flags & f.VM_LOCKED:
            machine.lru.munlock(old)
    if told is not None and rng is not None:
        failed = notifiers.invalidate_range_end_atomic(rng, told)
    if failed:
        frames.leaked += 1
    elif not zero:
        word = frames.word[old] - fr.REF_ONE
        if word & fr.REF_MASK and not word & fr.PG_SWAPCACHE:
            frames.word[old] = word
        else:
            machine.put_page(old)
    return 0


async def wp_page_copy(
    mm: AddressSpace[Any], vma: Vma, page: int, entry: int, *, unshare: bool = False
) -> int:
    """Give the process its own copy of a page that others have too.

    The new entry becomes visible after the old one is flushed and before E; the old page is
    released after it (I-COW).
    """
    machine = mm.machine
    frames = machine.frames
    if vma.anon_vma is None and not mm.anon_vma_prepare_nowait(vma):
        await mm.anon_vma_prepare(vma)
    zero = bool(entry & f.PTE_SPECIAL)
    old = (entry & f.PFN_MASK) >> PAGE_SHIFT
    if not zero:
        frames.get(old)
    new = await machine.alloc_frame()
    if not zero:
        frames.copy(old, new)
    notifiers = mm.notifiers
    failed: object = ()
    try:
        if notifiers.armed and machine.era == "v16":
            # As patch 03 of the series: after the page table lock, the old page still referenced.
            done = _install_copy(mm, vma, page, entry, old, new, zero, unshare)
            failed = await notifiers.invalidate_page(page << PAGE_SHIFT)
        elif notifiers.armed:
            rng = Range(page << PAGE_SHIFT, (page + 1) << PAGE_SHIFT, Event.CLEAR)
            mm.announced.append(rng)
            told = await notifiers.invalidate_range_start(rng)
            try:
                done = _install_copy(mm, vma, page, entry, old, new, zero, unshare)
            finally:
                failed = await notifiers.invalidate_range_end(rng, told)
            if told.sync_calls:
                failed = await notifiers.invalidate_range_sync(rng, told)
        else:
            done = _install_copy(mm, vma, page, entry, old, new, zero, unshare)
    except BaseException:
        if not zero:
            frames.put(old)
        raise
    if not done:
        frames.give_back(new)
    if not zero:
        if failed:
            frames.leaked += 1
        else:
            machine.put_page(old)
        if done and not failed:
            machine.put_page(old)
    return 0


def _install_copy(
    mm: AddressSpace[Any],
    vma: Vma,
    page: int,
    entry: int,
    old: int,
    new: int,
    zero: bool,
    unshare: bool,
) -> bool:
    """The PT step of a copy; False if the entry is no longer what was copied."""
    leaf = mm.pt.leaves.get(page >> 9)
    if leaf is None or leaf.pte[page & 511] != entry:
        return False
    leaf.pte[page & 511] = 0
    if mm.tlb is not None:
        mm.tlb.flush(page, page + 1)
    machine = mm.machine
    frames = machine.frames
    # vma.anon_vma is set: every caller has prepared it.
    number = vma.anon_vma.number  # type: ignore[union-attr]
    frames.word[new] |= _NEW_ANON_LRU
    frames.rmap[new] = number << fr.OWNER_SHIFT | (page - vma.first + vma.pgoff)
    machine.lru.append(new)
    if vma.flags & f.VM_LOCKED:
        machine.mlock(new)
    prot = vma.prot
    if not unshare:
        prot |= _NEW_WRITABLE if vma.flags & f.VM_WRITE else _DIRTY_YOUNG
    leaf.pte[page & 511] = new << PAGE_SHIFT | prot
    if not zero:
        machine.remove_rmap(old)
        if vma.flags & f.VM_LOCKED:
            machine.lru.munlock(old)
    return True


# ---------------------------------------------------------------------- files


def _do_fault_nowait(mm: AddressSpace[Any], vma: Vma, page: int, flags: int) -> int:
    """`_do_fault` in one step, for a page that is in memory."""
    file = vma.file
    assert file is not None
    if not flags & f.FAULT_WRITE and _fault_around(mm, vma, page):
        return 0
    index = page - vma.first + vma.pgoff
    frame = file.pages.get(index)
    if frame is None or index >= file.page_end:
        return RETRY
    frames = mm.machine.frames
    if flags & f.FAULT_WRITE and not vma.flags & f.VM_SHARED:
        new = _new_anon(mm, vma, page)
        if new < 0:
            return RETRY
        frames.copy(frame, new)
        frames.word[frame] &= ~fr.PG_READAHEAD
        prot = vma.prot | (_NEW_WRITABLE if vma.flags & f.VM_WRITE else _DIRTY_YOUNG)
        mm.pt.leaf_of(page).pte[page & 511] = new << PAGE_SHIFT | prot
        return 0
    frames.word[frame] &= ~fr.PG_READAHEAD
    prot = vma.prot
    if flags & f.FAULT_WRITE:
        prot |= _NEW_WRITABLE
        frames.word[frame] |= fr.PG_DIRTY
    map_file_page(mm, vma, mm.pt.leaf_of(page).pte, page, frame, prot)
    return 0


async def _do_fault(mm: AddressSpace[Any], vma: Vma, page: int, flags: int) -> int:
    file = vma.file
    assert file is not None
    index = page - vma.first + vma.pgoff
    machine = mm.machine
    if not flags & f.FAULT_WRITE:
        if vma.uffd is None and _fault_around(mm, vma, page):
            return 0
    elif not vma.flags & f.VM_SHARED and not mm.anon_vma_prepare_nowait(vma):
        await mm.anon_vma_prepare(vma)
    if index >= file.page_end:
        return f.VM_FAULT_SIGBUS
    frame, read = await file.page(index, _read_around(vma, index))
    if frame < 0:
        return f.VM_FAULT_SIGBUS
    major = f.VM_FAULT_MAJOR if read else 0
    waited = read and file.kind == "ext4" and not flags & f.FAULT_WRITE and vma.uffd is None
    if waited and _fault_around(mm, vma, page):
        # The fault dropped its lock for the disk, and was tried again with all that was read.
        return major
    frames = machine.frames
    frames.word[frame] &= ~fr.PG_READAHEAD
    if flags & f.FAULT_WRITE and not vma.flags & f.VM_SHARED:
        frames.get(frame)
        try:
            new = await machine.alloc_frame()
            frames.copy(frame, new)
        finally:
            machine.put_page(frame)
        leaf = mm.pt.leaf_of(page)
        if leaf.pte[page & 511] not in (0, f.MARKER_UFFD_WP):
            frames.give_back(new)
            return major
        mm.add_new_anon(vma, page, new)
        prot = vma.prot | (_NEW_WRITABLE if vma.flags & f.VM_WRITE else _DIRTY_YOUNG)
        leaf.pte[page & 511] = new << PAGE_SHIFT | prot
        return major
    leaf = mm.pt.leaf_of(page)
    if leaf.pte[page & 511] in (0, f.MARKER_UFFD_WP):
        prot = vma.prot
        if flags & f.FAULT_WRITE:
            prot |= _NEW_WRITABLE
            frames.word[frame] |= fr.PG_DIRTY
        elif leaf.pte[page & 511]:
            prot = prot & ~f.PTE_RW | f.PTE_UFFD_WP
        map_file_page(mm, vma, leaf.pte, page, frame, prot)
    return major


def _read_around(vma: Vma, index: int) -> tuple[int, int] | None:
    """What a fault reads from the disk with a page, if not as much around it as can be.

    Source: do_sync_mmap_readahead.
    """
    if vma.flags & (f.VM_RAND_READ | f.VM_EXEC) == f.VM_RAND_READ:
        return index, index + 1
    if vma.flags & f.VM_SEQ_READ:
        return index, 1 << 52
    if vma.flags & f.VM_EXEC:
        return index, vma.pgoff + vma.pages
    return None


def map_file_page(
    mm: AddressSpace[Any], vma: Vma, pte: memoryview, page: int, frame: int, prot: int
) -> None:
    """Map a frame of a file at `page`, whose leaf's entries are `pte`."""
    mm.machine.frames.word[frame] += fr.MAPPED_ONCE
    if vma.flags & f.VM_LOCKED:
        mm.machine.mlock(frame)
    pte[page & 511] = frame << PAGE_SHIFT | prot


def _fault_around(mm: AddressSpace[Any], vma: Vma, page: int) -> bool:
    """Map the cached pages of the 16 around a read fault; whether the page itself was one.

    Bounded by the VMA, the end of the file and the page table. A table that is not there is made
    only if the first folio ends before the last page of the file, or the file is shmem. Source:
    do_fault_around, filemap_map_pages.
    """
    file = vma.file
    assert file is not None
    at = page & 511
    inside = page - vma.first
    low = max(at & ~(_FAULT_AROUND - 1), at - min(at, inside))
    high = min(low + _FAULT_AROUND, 512, at + vma.last - vma.first - inside)
    base = page - at
    pte: Any = None
    words = mm.machine.frames.word
    cached = file.pages.get
    shift = base + vma.pgoff - vma.first
    prot = vma.prot
    locked = vma.flags & f.VM_LOCKED
    for near in range(low, min(high, file.page_end - shift)):
        frame = cached(near + shift)
        if frame is None:
            continue
        word = words[frame]
        if word & fr.PG_READAHEAD:
            continue
        if pte is None:
            if page >> 9 not in mm.pt.leaves and file.reaches_end(near + shift):
                return False
            pte = mm.pt.leaf_of(page).pte
        if not pte[near]:
            words[frame] = word + fr.MAPPED_ONCE
            if locked:
                mm.machine.mlock(frame)
            pte[near] = frame << PAGE_SHIFT | prot
    return pte is not None and bool(pte[at] & f.PTE_PRESENT)


# ---------------------------------------------------------------------- swap


async def _do_swap_page(mm: AddressSpace[Any], vma: Vma, page: int, flags: int, entry: int) -> int:
    machine = mm.machine
    swap, frames = machine.swap, machine.frames
    slot = (entry & f.PFN_MASK) >> PAGE_SHIFT
    major = 0
    frame = swap.cache.get(slot, -1)
    cached = frame >= 0
    if cached:
        swap.hit(vma, page, frame)
        frames.get(frame)
    else:
        major = f.VM_FAULT_MAJOR
        if swap.uses(slot) == 1:
            frame = await machine.alloc_frame()
            swap.read(slot, frame)
            frames.get(frame)
        else:
            frame = await _swapin_readahead(mm, vma, page, slot)
            if frame < 0:
                return 0
            cached = True
    if mm.pt.get(page) != entry or (cached and swap.cache.get(slot) != frame):
        machine.put_page(frame)
        return major
    write = flags & f.FAULT_WRITE
    exclusive = bool(entry & f.SWP_EXCLUSIVE) or not cached
    swap.drop(slot)
    word = frames.word[frame]
    if (
        cached
        and word & fr.PG_SWAPCACHE
        and (vma.flags & f.VM_LOCKED or word & fr.PG_MLOCKED or (write and word & fr.REF_MASK == 2))
    ):
        swap.try_free(frame)
        word = frames.word[frame]
    prot = vma.prot | (entry & f.SWP_UFFD_WP)
    flag = fr.PG_ANON | fr.PG_SWAPBACKED
    if exclusive or word & fr.REF_MASK == 1:
        flag |= fr.PG_EXCLUSIVE
        if vma.flags & f.VM_WRITE and not entry & f.SWP_UFFD_WP:
            prot |= f.PTE_RW
            if write:
                prot |= f.PTE_DIRTY
                write = 0
    if not word & fr.PG_ANON:
        assert vma.anon_vma is not None
        # A page that may be shared belongs to the whole family, one that is not to this VMA.
        owner = vma.anon_vma if flag & fr.PG_EXCLUSIVE else vma.anon_vma.root
        frames.set_owner(frame, owner.number, page - vma.first + vma.pgoff)
    elif flag & fr.PG_EXCLUSIVE and not cached:
        assert vma.anon_vma is not None
        frames.set_owner(frame, vma.anon_vma.number, page - vma.first + vma.pgoff)
    frames.word[frame] = (frames.word[frame] | flag) + fr.MAP_ONE
    if not cached:
        machine.lru.add(frame, file=False)
    if vma.flags & f.VM_LOCKED:
        machine.mlock(frame)
    mm.set_pte(page, frame << PAGE_SHIFT | prot)
    if write:
        result = fault_nowait(mm, vma, page, f.FAULT_WRITE)
        if result == RETRY:
            result = await _do_wp_page(mm, vma, page, flags, mm.pt.get(page))
        return result | major
    return major


def _swap_in_nowait(
    mm: AddressSpace[Any], vma: Vma, pte: Any, page: int, flags: int, entry: int
) -> int:
    """`_do_swap_page` in one step, for a slot that only this entry holds."""
    machine = mm.machine
    swap, frames = machine.swap, machine.frames
    slot = (entry & f.PFN_MASK) >> PAGE_SHIFT
    write = flags & f.FAULT_WRITE
    protected = entry & f.SWP_UFFD_WP or not vma.flags & f.VM_WRITE
    if (
        entry & f.SWP_TYPE_MASK != f.SWP_SWAP
        or swap.uses(slot) != 1
        or slot in swap.cache
        or frames.free <= machine.low
        or vma.anon_vma is None
        or (write and protected)
    ):
        return RETRY
    frame = frames.alloc()
    swap.swap_in(slot, frame)
    frames.word[frame] |= _NEW_ANON_LRU
    frames.rmap[frame] = vma.anon_vma.number << fr.OWNER_SHIFT | (page - vma.first + vma.pgoff)
    machine.lru.append(frame)
    if vma.flags & f.VM_LOCKED:
        machine.mlock(frame)
    prot = vma.prot | entry & f.SWP_UFFD_WP
    if not protected:
        prot |= f.PTE_RW | f.PTE_DIRTY if write else f.PTE_RW
    pte[page & 511] = frame << PAGE_SHIFT | prot
    return f.VM_FAULT_MAJOR


async def _swapin_readahead(mm: AddressSpace[Any], vma: Vma, page: int, slot: int) -> int:
    """Read a shared slot and its neighbours into the swap cache; the frame with a reference.

    Source: swap_vma_readahead.
    """
    machine = mm.machine
    first, last = machine.swap.window(vma, page)
    for near in range(first, last):
        entry = mm.pt.get(near)
        if entry & (f.PTE_PRESENT | f.SWP_TYPE_MASK) != f.SWP_SWAP:
            continue
        other = (entry & f.PFN_MASK) >> PAGE_SHIFT
        if other not in machine.swap.cache:
            await machine.read_swap_cache(other, readahead=near != page)
    frame = machine.swap.cache.get(slot)
    if frame is None:
        if mm.pt.get(page) & f.PTE_PRESENT or not machine.swap.uses(slot):
            return -1
        frame = await machine.read_swap_cache(slot, readahead=False)
    machine.frames.get(frame)
    return frame
