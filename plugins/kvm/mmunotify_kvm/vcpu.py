"""A virtual CPU: what a guest's loads and stores do, and the TLB that they go through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from anyio.lowlevel import checkpoint

from mmunotify import PAGE_SHIFT, PAGE_SIZE

from .errors import DirtyRingFull, MmioExit
from .faults import FaultResult, before_retry, page_fault
from .spte import ACCESSED, DIRTY, PRESENT, WRITABLE

if TYPE_CHECKING:
    from mmunotify import Translation

    from .dirty import DirtyRing
    from .vm import VirtualMachine

TLB_ENTRIES: Final = 1536
_SLICE: Final = 4096
"""Accesses after which a guest lets others run."""
_OFFSET: Final = PAGE_SIZE - 1


class VCpu:
    """One of a virtual machine's CPUs, driven by one task at a time.

    Addresses are guest physical, in bytes. A load or a store uses what the TLB has; else it walks
    the shadow page tables, which marks the page accessed; else it faults, which may suspend. Every
    few thousand accesses are a checkpoint.
    """

    __slots__ = ("_left", "id", "overtaken", "ring", "tlb", "vm")

    def __init__(self, vm: VirtualMachine, number: int, ring: DirtyRing | None) -> None:
        self.vm: Final = vm
        self.id: Final = number
        self.ring: Final = ring
        """Where its writes are noted, if that is how the machine logs them."""
        self.tlb: Final[dict[int, Translation]] = {}
        """By gfn. What is not writable here may be in the tables: the first write has to tell."""
        self.overtaken: tuple[int, Translation] | None = None
        """What its last lookup had found for which gfn, when an invalidation was faster."""
        self._left = _SLICE

    def __repr__(self) -> str:
        return f"<VCpu {self.id} of {self.vm.name}>"

    async def load(self, address: int, size: int = 1) -> bytes:
        """The guest reads; zeros where the address space keeps no contents.

        Raises MmioExit where there is no memory, BadAddress where the host cannot supply the page
        (KVM_RUN's -EFAULT), DirtyRingFull.
        """
        out = b""
        while True:
            offset = address & _OFFSET
            part = min(size - len(out), PAGE_SIZE - offset)
            found = self.tlb.get(address >> PAGE_SHIFT)
            if found is None:
                found = await self._miss(address, part, None)
            at = offset if found.size == PAGE_SIZE else self._offset(address, found)
            out += self.vm.read(found, at, part)
            if len(out) == size:
                break
            address += part
        self._left -= 1
        if self._left < 0:
            await self._resched()
        return out

    async def store(self, address: int, data: bytes) -> None:
        """The guest writes; raises like `load`, and MmioExit where memory is read-only."""
        at = 0
        while True:
            offset = address & _OFFSET
            part = min(len(data) - at, PAGE_SIZE - offset)
            piece = data[at : at + part]
            found = self.tlb.get(address >> PAGE_SHIFT)
            if found is None or not found.writable:
                found = await self._miss(address, part, piece)
            if found.size != PAGE_SIZE:
                offset = self._offset(address, found)
            self.vm.write(found, offset, piece)
            at += part
            if at >= len(data):
                break
            address += part
        self._left -= 1
        if self._left < 0:
            await self._resched()

    def walk(self, gfn: int, *, write: bool = False) -> Translation | None:
        """What the shadow page tables map a page to, if that allows the access; fills the TLB.

        As the hardware does it: the entry is marked accessed, and dirty by a write.
        """
        slot = self.vm.memslots.find(gfn)
        if slot is None:
            return None
        page = gfn - slot.base
        spte = slot.table.entry(page)
        if not spte & (WRITABLE if write else PRESENT):
            return None
        marked = spte | ACCESSED | DIRTY if write else spte | ACCESSED
        if marked != spte:
            slot.table.set_entry(page, marked)
        found = slot.table.translation(page, marked, slot.address(gfn))
        if not marked & DIRTY:
            found.writable = False
        self.fill(gfn, found)
        return found

    def fill(self, gfn: int, found: Translation) -> None:
        """Put a translation into the TLB, writable only if its entry is dirty already."""
        tlb = self.tlb
        if len(tlb) >= TLB_ENTRIES:
            tlb.clear()
        tlb[gfn] = found

    async def _miss(self, address: int, size: int, data: bytes | None) -> Translation:
        gfn = address >> PAGE_SHIFT
        write = data is not None
        tries = 0
        while True:
            if self.ring is not None and self.ring.soft_full:
                raise DirtyRingFull(f"vCPU {self.id}: {len(self.ring)} of {self.ring.size} entries")
            found = self.tlb.get(gfn) if tries else None
            if found is None or (write and not found.writable):
                found = self.walk(gfn, write=write)
            if found is not None:
                return found
            result = await page_fault(self.vm, self, gfn, write)
            if result is FaultResult.EMULATE:
                raise MmioExit(address, size, data)
            tries += 1
            if result is FaultResult.RETRY:
                await before_retry(self.vm, gfn, tries)

    def _offset(self, address: int, found: Translation) -> int:
        """Where a guest address is in a translation, which may be one of the host's 2 MiB."""
        slot = self.vm.memslots.find(address >> PAGE_SHIFT)
        assert slot is not None
        return slot.hva + address - (slot.base << PAGE_SHIFT) - found.address

    async def _resched(self) -> None:
        self._left = _SLICE
        await checkpoint()
