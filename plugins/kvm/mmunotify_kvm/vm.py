"""A virtual machine: its memslots, its vCPUs, and what its user may ask of it.

    vm = VirtualMachine(vcpus=2)
    async with mm.attached(vm):
        await vm.set_user_memory_region(0, 0, size, address)
        await vm.vcpus[0].store(0x1000, b"hello")

Source: virt/kvm/kvm_main.c (kvm_set_memory_region and what it calls).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import anyio
import attrs
import numpy as np

from mmunotify import (
    ADDRESS_END,
    PAGE_SHIFT,
    PAGE_SIZE,
    PMD_SIZE,
    SRCU,
    BadAddress,
    RWSemaphore,
    Translation,
)

from .dirty import RESERVED, DirtyBitmap, DirtyRing
from .errors import KvmError
from .faults import FaultResult, can_be_huge, resolve, used
from .log import MEMSLOT_CHANGED, PAGE_FAULT, SLOTS_WAITED
from .memslots import (
    INVALID,
    LOG_DIRTY_PAGES,
    MAX_PAGES,
    MAX_SLOTS,
    READONLY,
    VALID_FLAGS,
    MemorySlot,
    Memslots,
)
from .notifier import MmuNotifier
from .options import KvmOptions
from .spte import (
    ACCESSED,
    FRAME_SHIFT,
    HOST_HUGE,
    HOST_WRITABLE,
    LARGE,
    MMU_WRITABLE,
    PRESENT,
    WRITABLE,
)
from .tables import NR, SpteTable
from .vcpu import VCpu

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import numpy.typing as npt

_UPDATING: Final = 1 << 63
"""In a generation of memslots: a swap is going on (KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS)."""


class VirtualMachine(MmuNotifier):
    """One guest over one address space: register it there, then give it memory.

    Besides `KvmOptions`: `dirty_ring` is the size of each vCPU's ring, 0 for bitmaps;
    `manual_protect` has `get_dirty_log` leave clearing and protecting to `clear_dirty_log`, and
    `initially_set` begins with every page dirty and none protected. `name` is for messages,
    `logger` a structlog logger.
    """

    def __init__(
        self,
        options: KvmOptions | None = None,
        *,
        name: str = "kvm",
        dirty_ring: int = 0,
        manual_protect: bool = False,
        initially_set: bool = False,
        logger: object = None,
    ) -> None:
        options = KvmOptions() if options is None else options
        super().__init__(name, logger)
        if dirty_ring and (dirty_ring & (dirty_ring - 1) or dirty_ring <= RESERVED):
            raise ValueError(
                f"dirty_ring is {dirty_ring}: expected a power of two above {RESERVED}, or 0"
            )
        if initially_set and not manual_protect:
            raise ValueError("initially_set without manual_protect: nothing would be cleared")
        self.options: Final = options
        self.manual_protect: Final = manual_protect
        self.initially_set: Final = initially_set
        self.huge = options.huge
        self.prefetches = options.mmu == "shadow"
        self.fast_page_faults = options.mmu == "tdp"
        self.dirty_at_map = options.dirty == "map"
        self.srcu: Final = SRCU("kvm srcu")
        self.slots_lock: Final = RWSemaphore("slots_lock")
        self.mmio: Final[dict[int, int]] = {}
        """gfns known to have no memory, and the generation of memslots in which that is so."""
        self.on_fault: Callable[[int, bool], object] | None = None
        """Called with gfn and whether it is a write, for every page fault (kvm_page_fault)."""
        self.on_map: Callable[[int, bool, bool], object] | None = None
        """Called with gfn, whether writable, whether prefetched, for every mapping made."""
        self._inactive = Memslots()
        self.vcpus: Final = [
            VCpu(self, number, DirtyRing(dirty_ring) if dirty_ring else None)
            for number in range(options.vcpus)
        ]
        self.mmu.vcpus.extend(self.vcpus)

    def __repr__(self) -> str:
        return f"<VirtualMachine {self.name!r} of {self.serves}, {len(self.memslots)} memslots>"

    # ------------------------------------------------------------------ memslots

    async def set_user_memory_region(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int = 0,
        flags: int = 0,
    ) -> None:
        """Create, move or delete (size 0) a memslot, or change its flags; sizes are bytes.

        Waits for open sections and for page faults; cancelled while it waits for sections, it has
        not happened. Raises KvmError: EINVAL for values that no slot can have, EEXIST for gfns that
        another one has.
        """
        self._check(slot, guest_phys_addr, memory_size, userspace_addr, flags)
        base, pages = guest_phys_addr >> PAGE_SHIFT, memory_size >> PAGE_SHIFT
        async with self.slots_lock.writing():
            old = self.memslots.by_id.get(slot)
            if not pages:
                if old is None:
                    raise KvmError(errno.EINVAL, f"delete memslot {slot}: there is none")
                await self._delete(old)
                return
            if old is None:
                self._check_overlap(slot, base, pages)
                await self._create(self._slot(slot, base, pages, userspace_addr, flags))
                return
            if userspace_addr != old.hva or pages != old.pages or (flags ^ old.flags) & READONLY:
                raise KvmError(
                    errno.EINVAL,
                    f"change memslot {slot}: its size, host memory and READONLY stay as they are",
                )
            if base != old.base:
                self._check_overlap(slot, base, pages)
                await self._move(old, self._slot(slot, base, pages, userspace_addr, flags))
            elif flags != old.flags:
                await self._change_flags(old, flags)

    def _check(self, slot: int, base: int, size: int, hva: int, flags: int) -> None:
        wrong = None
        if flags & ~VALID_FLAGS:
            wrong = f"flags {flags:#x}: expected LOG_DIRTY_PAGES and READONLY only"
        elif not 0 <= slot < MAX_SLOTS:
            wrong = f"expected 0 to {MAX_SLOTS - 1}"
        elif base < 0 or size < 0 or hva < 0 or (base | size | hva) & (PAGE_SIZE - 1):
            wrong = f"[{base:#x}, +{size:#x}) at {hva:#x}: expected whole pages"
        elif base + size > ADDRESS_END or hva + size > ADDRESS_END:
            wrong = f"[{base:#x}, +{size:#x}) at {hva:#x}: beyond the end of addresses"
        elif size >> PAGE_SHIFT > MAX_PAGES:
            wrong = f"{size:#x} bytes: expected {MAX_PAGES} pages at most"
        if wrong is not None:
            raise KvmError(errno.EINVAL, f"memslot {slot}: {wrong}")

    def _check_overlap(self, slot: int, base: int, pages: int) -> None:
        other = self.memslots.meeting(base, base + pages, but=slot)
        if other is not None:
            raise KvmError(
                errno.EEXIST,
                f"memslot {slot}: gfns [{base:#x}, +{pages:#x}) meet those of slot {other.id}",
            )

    def _slot(self, number: int, base: int, pages: int, hva: int, flags: int) -> MemorySlot:
        dirty = self._bitmap(pages) if flags & LOG_DIRTY_PAGES else None
        return MemorySlot(number, base, pages, hva, flags, SpteTable(base, pages), dirty)

    def _bitmap(self, pages: int) -> DirtyBitmap | None:
        if self.vcpus[0].ring is not None:
            return None
        return DirtyBitmap(pages, all_set=self.initially_set)

    async def _create(self, slot: MemorySlot) -> None:
        await self._activate(None, slot)
        self._changed("create", slot)

    async def _delete(self, slot: MemorySlot) -> None:
        invalid = await self._invalidate(slot)
        with anyio.CancelScope(shield=True):
            await self._activate(invalid, None)
        self._changed("delete", slot)

    async def _move(self, old: MemorySlot, new: MemorySlot) -> None:
        invalid = await self._invalidate(old)
        with anyio.CancelScope(shield=True):
            await self._activate(invalid, new)
        self._changed("move", new)

    async def _invalidate(self, slot: MemorySlot) -> MemorySlot:
        """Let no fault use a slot any more, then drop what it has mapped."""
        invalid = attrs.evolve(slot, flags=slot.flags | INVALID)
        await self._activate(slot, invalid)
        # Faults that had found the slot are over: nobody maps anything of it from here on.
        with self.mmu.lock:
            self.zap(slot, 0, slot.pages)
        return invalid

    async def _change_flags(self, old: MemorySlot, flags: int) -> None:
        dirty = old.dirty
        if (flags ^ old.flags) & LOG_DIRTY_PAGES:
            dirty = self._bitmap(old.pages) if flags & LOG_DIRTY_PAGES else None
        new = attrs.evolve(old, flags=flags, dirty=dirty)
        await self._activate(old, new)
        with self.mmu.lock:
            if flags & LOG_DIRTY_PAGES:
                self._begin_logging(new)
            else:
                self._recover_huge(new)
        self._changed("flags", new)

    async def _activate(self, old: MemorySlot | None, new: MemorySlot | None) -> None:
        """Change the set that is not in use, swap, and change the other one when nobody reads it.

        slots_lock is held. The swap waits until no section is open, so that each of them meets the
        same memslots at its start and at its end (kvm_swap_active_memslots).
        """
        fresh, stale = self._inactive, self.memslots
        fresh.replace(old, new)
        if self.active:
            self._log.emit(SLOTS_WAITED, slot=(new or old).id, sections=self.active)  # type: ignore[union-attr]
            try:
                await self.sections_over()
            except BaseException:
                fresh.replace(new, old)
                raise
        fresh.generation = stale.generation | _UPDATING
        self.memslots, self._inactive = fresh, stale
        if self.srcu.readers:
            with anyio.CancelScope(shield=True):
                await self.srcu.synchronize()
        else:
            await self.srcu.synchronize()  # which does not suspend
        stale.replace(old, new)
        # What was found to be a device's during the swap may be memory now.
        fresh.generation = stale.generation = (stale.generation & ~_UPDATING) + 1
        self.mmio.clear()
        self.counters["slot_updates"] += 1

    def _changed(self, change: str, slot: MemorySlot) -> None:
        self._log.emit(
            MEMSLOT_CHANGED,
            slot=slot.id,
            change=change,
            base=slot.base,
            pages=slot.pages,
            hva=slot.hva,
            flags=slot.flags,
        )

    # ------------------------------------------------------------------ dirty logging

    def mark_page_dirty(self, vcpu: VCpu | None, slot: MemorySlot, page: int) -> None:
        """Note that a page of a slot was, or may from now on be written; if that is logged.

        A ring belongs to who writes: what the hypervisor itself writes goes to the first vCPU's.
        """
        if not slot.flags & LOG_DIRTY_PAGES:
            return
        if slot.dirty is not None:
            if slot.dirty.set(page):
                self.counters["dirtied"] += 1
            return
        ring = (vcpu or self.vcpus[0]).ring
        assert ring is not None
        ring.push(slot.id, page)
        self.counters["dirtied"] += 1

    async def get_dirty_log(self, slot: int) -> npt.NDArray[np.int64]:
        """The pages of a slot written since the last call, counted from its first, ascending.

        They are write-protected and forgotten, unless `manual_protect` leaves that to
        `clear_dirty_log`. Raises KvmError (ENOENT) where nothing is logged.
        """
        async with self.slots_lock.reading():
            found = self._logged(slot)
            assert found.dirty is not None
            pages = found.dirty.pages()
            if not self.manual_protect:
                self._protect(found, pages)
            return pages

    async def clear_dirty_log(self, slot: int, pages: npt.NDArray[np.int64]) -> None:
        """Forget some of a slot's written pages, and write-protect them; after reading the log."""
        async with self.slots_lock.reading():
            found = self._logged(slot)
            if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < found.pages:
                raise KvmError(errno.EINVAL, f"clear_dirty_log of slot {slot}: not pages of it")
            assert found.dirty is not None
            known = np.intersect1d(pages, found.dirty.pages())
            self._protect(found, known)

    def _logged(self, number: int) -> MemorySlot:
        slot = self.memslots.by_id.get(number)
        if slot is None or slot.dirty is None:
            raise KvmError(errno.ENOENT, f"dirty log of slot {number}: it keeps no bitmap")
        return slot

    def _protect(self, slot: MemorySlot, pages: npt.NDArray[np.int64]) -> None:
        assert slot.dirty is not None
        with self.mmu.lock:
            slot.dirty.clear(pages)
            if slot.table.write_protect_pages(pages):
                self.mmu.flush(slot.base, slot.end)

    def reset_dirty_rings(self) -> int:
        """Write-protect what has been collected from the rings; how many entries are free again.

        Source: KVM_RESET_DIRTY_RINGS. Never suspends.
        """
        freed = 0
        with self.mmu.lock:
            for vcpu in self.vcpus:
                if vcpu.ring is None:
                    raise KvmError(errno.EINVAL, f"{self.name} logs in bitmaps, not in rings")
                entries = vcpu.ring.reset()
                freed += len(entries)
                for entry in entries:
                    slot = self.memslots.by_id.get(entry.slot)
                    if slot is not None and entry.page < slot.pages:
                        slot.table.write_protect(entry.page, entry.page + 1)
                        self.mmu.flush(slot.base + entry.page, slot.base + entry.page + 1)
        return freed

    def _begin_logging(self, slot: MemorySlot) -> None:
        """Every page is to be noted when it is next written, and by itself."""
        table = slot.table
        for block in table.huge_blocks():
            self._split(slot, block)
        if self.initially_set:
            return
        if table.write_protect(0, slot.pages):
            self.mmu.flush(slot.base, slot.end)

    def _split(self, slot: MemorySlot, block: int) -> None:
        """Map 2 MiB by small entries, or not at all where the host has split it, too."""
        table = slot.table
        start = table.block_start(block)
        spte = table.huge[block]
        address = slot.hva + (start << PAGE_SHIFT)
        assert self.primary is not None
        found = self.primary.translate(address)
        self.zap(slot, start, start + NR)
        if found is None or found.size != PMD_SIZE:
            return
        pages = np.arange(start, start + NR)
        frames = (pages - start + found.frame).astype(np.uint64) << np.uint64(FRAME_SHIFT)
        keep = spte & (PRESENT | ACCESSED | WRITABLE | HOST_WRITABLE | MMU_WRITABLE)
        sptes = frames | np.uint64(keep | HOST_HUGE)
        table.make_many(pages, sptes, np.full(NR, found.generation, np.uint64))
        self.counters["splits"] += 1

    def _recover_huge(self, slot: MemorySlot) -> None:
        """What the host maps by 2 MiB is dropped, to be mapped so at the next fault."""
        table = slot.table
        if self.primary is None or not self.huge:
            return
        for block in table.used_blocks():
            start = table.block_start(block)
            gfn = slot.base + max(start, 0)
            if not can_be_huge(slot, gfn):
                continue
            found = self.primary.translate(slot.address(gfn))
            if found is not None and found.size == PMD_SIZE:
                self.zap(slot, start, start + NR)

    # ------------------------------------------------------------------ the guest's memory

    def trace_fault(self, vcpu: VCpu, gfn: int, write: bool, result: FaultResult | None) -> None:
        """Write down how a page fault ended; None: the host has no page."""
        name = "efault" if result is None else result.name.lower()
        self._log.emit(PAGE_FAULT, vcpu=vcpu.id, gfn=gfn, write=write, result=name)

    def lookup_nowait(self, address: int) -> Translation | None:
        """A page that the host maps for writing now, else None (hva_to_pfn_fast)."""
        found = self.primary.translate(address) if self.primary is not None else None
        return found if found is not None and found.writable else None

    def lookup(self, address: int, write: bool) -> Awaitable[Translation]:
        """Ask the primary MMU for a page of the host; may suspend, may announce to this machine.

        Raises BadAddress.
        """
        if self.primary is None:
            raise BadAddress(
                f"{self.name} has no address space to look {address:#x} up in", address=address
            )
        return self.primary.fault_in(address, write=write)

    def note_used(self, slot: MemorySlot, gfn: int, found: Translation) -> None:
        """Tell the primary MMU that a page of it is in use, and may be written."""
        assert self.primary is not None
        used(self.primary, slot.address(gfn), PAGE_SIZE, dirty=found.writable)

    def read(self, found: Translation, offset: int, size: int) -> bytes:
        """Bytes of a translation's frame. Raises StaleTranslation if it was freed since."""
        assert self.primary is not None
        return self.primary.read(found, offset, size)

    def write(self, found: Translation, offset: int, data: bytes) -> None:
        """Store into a translation's frame; raises like `read`."""
        assert self.primary is not None
        self.primary.write(found, offset, data)

    async def pre_fault_memory(self, guest_phys_addr: int, size: int) -> int:
        """Map guest memory before it is used, for reading at least; how many bytes are left.

        Less than all is done where memory ends. Raises KvmError: EINVAL for what is no range of
        whole pages, ENOENT where the first page already has no memory; BadAddress likewise where
        the host has no page. Source: KVM_PRE_FAULT_MEMORY.
        """
        if size <= 0 or guest_phys_addr < 0 or (guest_phys_addr | size) & (PAGE_SIZE - 1):
            raise KvmError(
                errno.EINVAL, f"pre_fault_memory [{guest_phys_addr:#x}, +{size:#x}): whole pages?"
            )
        gfn, last = guest_phys_addr >> PAGE_SHIFT, (guest_phys_addr + size) >> PAGE_SHIFT
        first = gfn
        vcpu = self.vcpus[0]
        while gfn < last:
            self._map_present(gfn, last)
            slot = self.memslots.find(gfn)
            if slot is not None and slot.table.entry(gfn - slot.base):
                gfn = self._mapped_up_to(slot, gfn, last)
                continue
            try:
                result = await resolve(self, vcpu, gfn)
            except BadAddress:
                if gfn == first:
                    raise
                break
            if result is FaultResult.EMULATE:
                if gfn == first:
                    raise KvmError(errno.ENOENT, f"pre_fault_memory: no memory at gfn {gfn:#x}")
                break
            gfn += 1
        return (last - gfn) << PAGE_SHIFT

    def _mapped_up_to(self, slot: MemorySlot, gfn: int, last: int) -> int:
        entry = slot.table.entry
        last = min(last, slot.end)
        while gfn < last:
            spte = entry(gfn - slot.base)
            if not spte:
                break
            gfn = (gfn & -NR) + NR if spte & LARGE else gfn + 1
        return min(gfn, last)

    def _map_present(self, gfn: int, last: int) -> None:
        """Map what the host has in the rest of a block of 2 MiB, in one go.

        Nothing suspends between lookup and mapping, so nothing but an open section can be in the
        way; what is logged, or mapped by huge pages, is left to page faults.
        """
        slot = self.memslots.find(gfn)
        if slot is None or slot.flags & (INVALID | LOG_DIRTY_PAGES) or self.primary is None:
            return
        table = slot.table
        first, last = gfn - slot.base, min((gfn & -NR) + NR, last, slot.end) - slot.base
        block = table.block(first)
        if last - first < 2 or table.huge[block] & PRESENT or table.used[block]:
            return
        address = slot.address(gfn)
        leaf = self.primary.translate(address)
        if leaf is not None and leaf.size == PMD_SIZE:
            return
        end = slot.hva + (last << PAGE_SHIFT)
        found = self.primary.translate_range(address, end)
        if not len(found):
            return
        mmu = self.mmu
        with mmu.lock:
            if mmu.invalidate_in_progress and (
                mmu.range_start < slot.base + last and gfn < mmu.range_end
            ):
                return
            pages = np.asarray(found.pages, np.int64) - (slot.hva >> PAGE_SHIFT)
            frames = np.asarray(found.frames).astype(np.uint64)
            writable = np.asarray(found.writable).astype(np.bool_)
            if slot.flags & READONLY:
                writable[:] = False
            bits = np.where(
                writable,
                np.uint64(PRESENT | ACCESSED | WRITABLE | MMU_WRITABLE | HOST_WRITABLE),
                np.uint64(PRESENT | ACCESSED),
            )
            sptes = frames << np.uint64(FRAME_SHIFT) | bits
            generations = np.asarray(found.generations).astype(np.uint64)
            self.counters["refaults"] += table.make_many(pages, sptes, generations)
            self.counters["installed"] += len(pages)
            self.primary.mark_young(address, end)
            if self.dirty_at_map and writable.any():
                mask = np.zeros(last - first, np.int64)
                mask[pages[writable] - first] = 1
                self.primary.set_dirty(address, end, mask)  # type: ignore[arg-type]

    @property
    def pages_4k(self) -> int:
        """Small mappings that the guest has (kvm_stat)."""
        return sum(slot.table.pages_4k for slot in self.memslots)

    @property
    def pages_2m(self) -> int:
        """Huge ones."""
        return sum(slot.table.pages_2m for slot in self.memslots)
