"""The guest's page faults: look a page up, and map it unless an invalidation was faster.

    primary.translate                       what the host maps for writing needs no wait
    take note of invalidate_seq             I-SEQ: before any other lookup
    primary.fault_in                        may sleep, and may announce to this very machine
    under mmu_lock: retry?                  I-NOEST, I-INFLIGHT: in the step that maps
    map it, and its neighbours

No reference to the page is kept: it goes when an invalidation takes its entry away (I-FREE).
Source: arch/x86/kvm/mmu/mmu.c (direct_page_fault, is_page_fault_stale, direct_pte_prefetch).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from anyio.lowlevel import checkpoint

from mmunotify import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, BadAddress

from .memslots import INVALID, LOG_DIRTY_PAGES, READONLY
from .spte import (
    ACCESSED,
    DIRTY,
    FRAME_MASK,
    FRAME_SHIFT,
    HOST_HUGE,
    HOST_WRITABLE,
    LARGE,
    MMU_WRITABLE,
    PRESENT,
    WRITABLE,
)
from .tables import NR

if TYPE_CHECKING:
    from mmunotify import Primary, Translation

    from .memslots import MemorySlot
    from .vcpu import VCpu
    from .vm import VirtualMachine

PREFETCH: Final = 8
"""Aligned pages around a fault that are mapped with it (PTE_PREFETCH_NUM)."""
_PREFETCHED: Final = PRESENT | WRITABLE | MMU_WRITABLE | HOST_WRITABLE


class FaultResult(enum.IntEnum):
    """What became of a page fault (RET_PF_*)."""

    RETRY = 0
    """Nothing: the guest is to try again, and will fault again if that is still necessary."""
    FIXED = 1
    SPURIOUS = 2
    """It was mapped already."""
    EMULATE = 3
    """There is no memory to map: an access to a device."""


async def page_fault(vm: VirtualMachine, vcpu: VCpu, gfn: int, write: bool = False) -> FaultResult:
    """Serve one page fault. May suspend. Raises BadAddress where the host has no page (-EFAULT)."""
    counters, memslots = vm.counters, vm.memslots
    if vm.mmio and vm.mmio.get(gfn) == memslots.generation:
        counters["mmio"] += 1
        return FaultResult.EMULATE
    counters["faults"] += 1
    if vm.on_fault is not None:
        vm.on_fault(gfn, write)
    slot = memslots.find(gfn)
    result = decide(vm, vcpu, slot, gfn, write)
    if result is None and slot is not None:
        mmu = vm.mmu
        found = vm.lookup_nowait(slot.hva + ((gfn - slot.base) << PAGE_SHIFT))
        if found is None:
            return await _page_fault_slow(vm, vcpu, slot, gfn, write)
        # Nobody can have overtaken this since `decide` has looked: it has no use for SRCU, nor for
        # an earlier sequence.
        with mmu.lock:
            if vcpu.overtaken is None:
                result = direct_map(vm, vcpu, slot, gfn, found, write)
            else:
                result = _map_or_retry(vm, vcpu, slot, gfn, found, write, mmu.invalidate_seq)
    assert result is not None
    if vm.trace:
        vm.trace_fault(vcpu, gfn, write, result)
    return result


async def _page_fault_slow(
    vm: VirtualMachine, vcpu: VCpu, slot: MemorySlot, gfn: int, write: bool
) -> FaultResult:
    """The rest of a page fault for which the host may have to do something."""
    result = None
    index = vm.srcu.read_lock()
    try:
        mmu = vm.mmu
        seq = mmu.invalidate_seq
        found = await vm.lookup(slot.address(gfn), write)
        with mmu.lock:
            result = _map_or_retry(vm, vcpu, slot, gfn, found, write, seq)
        return result
    except BadAddress:
        vm.counters["efault"] += 1
        raise
    finally:
        vm.srcu.read_unlock(index)
        if vm.trace:
            vm.trace_fault(vcpu, gfn, write, result)


def _map_or_retry(
    vm: VirtualMachine,
    vcpu: VCpu,
    slot: MemorySlot,
    gfn: int,
    found: Translation,
    write: bool,
    seq: int,
) -> FaultResult:
    """What was found since `seq` is mapped, or worthless; mmu_lock is held."""
    if vm.mmu.retry(seq, gfn):
        vm.counters["retries"] += 1
        vcpu.overtaken = (gfn, found)
        return FaultResult.RETRY
    if vcpu.overtaken is not None:
        vm.counters["false_retries"] += vcpu.overtaken == (gfn, found)
        vcpu.overtaken = None
    return direct_map(vm, vcpu, slot, gfn, found, write)


async def resolve(vm: VirtualMachine, vcpu: VCpu, gfn: int, write: bool = False) -> FaultResult:
    """Page faults until one of them is not to be retried. May suspend; raises like `page_fault`."""
    tries = 0
    while (result := await page_fault(vm, vcpu, gfn, write)) is FaultResult.RETRY:
        tries += 1
        await before_retry(vm, gfn, tries)
    return result


async def before_retry(vm: VirtualMachine, gfn: int, tries: int) -> None:
    """Wait for a section that covers the page, instead of asking again and again.

    The first retry for other reasons is made at once: it was most often the lookup's own section.
    """
    if vm.mmu.covered(gfn):
        await vm.mmu.section_over()
    elif tries > 1:
        await checkpoint()


def decide(
    vm: VirtualMachine, vcpu: VCpu, slot: MemorySlot | None, gfn: int, write: bool
) -> FaultResult | None:
    """What becomes of a fault without looking anything up; None: that takes a lookup."""
    counters = vm.counters
    if slot is None:
        vm.mmio[gfn] = vm.memslots.generation
        counters["mmio"] += 1
        return FaultResult.EMULATE
    if slot.flags & INVALID:
        # On its way out, with its entries still there: neither memory nor yet a device.
        return FaultResult.RETRY
    if write:
        if slot.flags & READONLY:
            counters["mmio"] += 1
            return FaultResult.EMULATE
        table = slot.table
        if (
            vm.fast_page_faults
            and (table.leaf[gfn - slot.base] & PRESENT or table.pages_2m)
            and fast_page_fault(vm, vcpu, slot, gfn)
        ):
            return FaultResult.FIXED
    if vm.mmu.invalidate_in_progress and vm.mmu.covered(gfn):
        # A lookup would be in vain; asked without the lock, since it is only a saving.
        counters["retries"] += 1
        return FaultResult.RETRY
    return None


def fast_page_fault(vm: VirtualMachine, vcpu: VCpu, slot: MemorySlot, gfn: int) -> bool:
    """Give back what only dirty logging has taken: without mmu_lock and without a lookup.

    No entry can be taken and made anew in between, as it could on a CPU: this does not suspend.
    """
    page = gfn - slot.base
    spte = slot.table.entry(page)
    wanted = PRESENT | MMU_WRITABLE | HOST_WRITABLE
    if spte & wanted != wanted or spte & WRITABLE:
        return False
    slot.table.set_entry(page, spte | WRITABLE | ACCESSED)
    vm.mark_page_dirty(vcpu, slot, page)
    vm.counters["fast_faults"] += 1
    return True


def direct_map(
    vm: VirtualMachine, vcpu: VCpu, slot: MemorySlot, gfn: int, found: Translation, write: bool
) -> FaultResult:
    """Map what was found; mmu_lock is held, and nothing has suspended since `retry` was asked.

    A small page goes into the vCPU's TLB as well: the access that faulted is done again at once,
    unless the vCPU has a ring, which may be full now.
    """
    counters, primary = vm.counters, vm.primary
    assert primary is not None
    host_writable = found.writable and not slot.flags & READONLY
    table, page = slot.table, gfn - slot.base
    address = slot.hva + (page << PAGE_SHIFT)
    spte = PRESENT | ACCESSED | found.frame << FRAME_SHIFT
    if host_writable:
        spte |= WRITABLE | MMU_WRITABLE | HOST_WRITABLE
        if write or vm.dirty_at_map:
            spte |= DIRTY
    if found.size == PMD_SIZE:
        if vm.huge and can_be_huge(slot, gfn):
            return _map_huge(vm, slot, gfn, found, spte | LARGE)
        spte += (address - found.address >> PAGE_SHIFT) << FRAME_SHIFT
        spte |= HOST_HUGE
    if (table.leaf[page] & PRESENT or table.pages_2m) and (old := table.entry(page)):
        if (old | ACCESSED | DIRTY) == (spte | ACCESSED | DIRTY):
            table.leaf[page] = old | ACCESSED
            counters["spurious"] += 1
            return FaultResult.SPURIOUS
        if old & LARGE or (old ^ spte) & FRAME_MASK:
            vm.zap(slot, page, page + 1)
    if table.make(page, spte, found.generation):
        counters["refaults"] += 1
    counters["installed"] += 1
    if host_writable and slot.flags & LOG_DIRTY_PAGES:
        vm.mark_page_dirty(vcpu, slot, page)
    if vm.on_map is not None:
        vm.on_map(gfn, host_writable, False)
    primary.mark_young(address, address + PAGE_SIZE)
    if host_writable and vm.dirty_at_map:
        primary.set_dirty(address, address + PAGE_SIZE)
    if found.size == PAGE_SIZE and vcpu.ring is None:
        found.writable = spte & DIRTY != 0
        vcpu.fill(gfn, found)
    if vm.prefetches and not vm.mmu.invalidate_in_progress:
        _prefetch(vm, slot, primary, gfn)
    return FaultResult.FIXED


def can_be_huge(slot: MemorySlot, gfn: int) -> bool:
    """Whether the slot has all of a page's 2 MiB, aligned as the host has them, and unlogged."""
    start = (gfn & -NR) - slot.base
    return (
        start >= 0
        and start + NR <= slot.pages
        and not (slot.base ^ slot.hva >> PAGE_SHIFT) & (NR - 1)
        and not slot.flags & LOG_DIRTY_PAGES
    )


def _map_huge(
    vm: VirtualMachine, slot: MemorySlot, gfn: int, found: Translation, spte: int
) -> FaultResult:
    table, counters = slot.table, vm.counters
    block = table.block(gfn - slot.base)
    old = table.huge[block]
    if (old | ACCESSED | DIRTY) == (spte | ACCESSED | DIRTY):
        table.huge[block] = old | ACCESSED
        counters["spurious"] += 1
        return FaultResult.SPURIOUS
    start = table.block_start(block)
    if old & PRESENT or table.used[block]:
        vm.zap(slot, start, start + NR)
    table.make_huge(block, spte, found.generation)
    counters["installed"] += NR
    counters["huge"] += 1
    if old:
        counters["refaults"] += NR
    writable = spte & WRITABLE != 0
    if vm.on_map is not None:
        vm.on_map(gfn, writable, False)
    assert vm.primary is not None
    used(vm.primary, found.address, PMD_SIZE, dirty=writable and vm.dirty_at_map)
    return FaultResult.FIXED


def used(primary: Primary, address: int, size: int, *, dirty: bool) -> None:
    """Tell the primary MMU what the guest may do from now on without its knowing.

    Source: kvm_release_page_clean, kvm_release_page_dirty.
    """
    primary.mark_young(address, address + size)
    if dirty:
        primary.set_dirty(address, address + size)


def _prefetch(vm: VirtualMachine, slot: MemorySlot, primary: Primary, gfn: int) -> None:
    """Map the unmapped runs of the aligned pages around one, as far as the host can write them.

    A run of which not even the first page can be mapped ends the attempt; so does one that begins
    outside of memory or runs past the end of its slot, and one that dirty logging watches.
    """
    first = gfn & -PREFETCH
    table, page = slot.table, first - slot.base
    if page < 0 or page + PREFETCH > slot.pages or table.pages_2m:
        _prefetch_at_an_edge(vm, slot, primary, first)
        return
    leaf = table.leaf
    start = -1
    for near in range(page, page + PREFETCH):
        if not leaf[near] & PRESENT:
            if start < 0:
                start = near
        elif start >= 0:
            if not _prefetch_run(vm, slot, primary, start, near):
                return
            start = -1
    if start >= 0:
        _prefetch_run(vm, slot, primary, start, page + PREFETCH)


def _prefetch_at_an_edge(
    vm: VirtualMachine, slot: MemorySlot, primary: Primary, first: int
) -> None:
    """The same where the pages may belong to several slots, to none, or to huge mappings."""
    start = -1
    for gfn in range(first, first + PREFETCH + 1):
        near = vm.memslots.find(gfn)
        mapped = near is not None and near.table.entry(gfn - near.base) != 0
        if gfn < first + PREFETCH and not mapped:
            if start < 0:
                start = gfn
        elif start >= 0:
            of = vm.memslots.find(start)
            if of is None or gfn > of.end:
                return
            if not _prefetch_run(vm, of, primary, start - of.base, gfn - of.base):
                return
            start = -1


def _prefetch_run(
    vm: VirtualMachine, slot: MemorySlot, primary: Primary, first: int, last: int
) -> bool:
    """Map pages [first, last) of a slot up to the first that the host cannot write; any at all?"""
    if slot.flags & (LOG_DIRTY_PAGES | READONLY | INVALID):
        return False
    table, counters = slot.table, vm.counters
    start = slot.hva + (first << PAGE_SHIFT)
    found = primary.translate_range(start, slot.hva + (last << PAGE_SHIFT))
    due = start >> PAGE_SHIFT
    sptes: list[int] = []
    for page, frame, writable in zip(found.pages, found.frames, found.writable, strict=True):
        if page != due or not writable:
            break
        # Not accessed yet.
        sptes.append(frame << FRAME_SHIFT | _PREFETCHED)
        due += 1
    count = len(sptes)
    if not count:
        return False
    counters["refaults"] += table.make_few(first, sptes, found.generations)
    counters["installed"] += count
    counters["prefetched"] += count
    if vm.on_map is not None:
        for page in range(first, first + count):
            vm.on_map(slot.base + page, True, True)
    used(primary, start, count << PAGE_SHIFT, dirty=vm.dirty_at_map)
    return True
