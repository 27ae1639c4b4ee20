"""The plugin's driver: a virtual machine whose user is a replay or a check of recordings.

A replay uses host memory through it as through any device. Guest and host addresses are the same
then, and a mapping of the host becomes a memslot when a page of it is first used, as sandboxes do
that run a process as a guest.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Final

from mmunotify import ADDRESS_END, PAGE_SHIFT, PAGE_SIZE

from .errors import KvmError, MmioExit
from .faults import resolve
from .memslots import LOG_DIRTY_PAGES, MAX_SLOTS
from .options import KvmOptions, parse_size
from .vm import VirtualMachine

if TYPE_CHECKING:
    from collections.abc import Callable

    from .memslots import MemorySlot

CROWDED: Final = 128
"""Memslots from which on those without host memory are looked for."""
SLOT_SIZE: Final = 1 << 30
"""The memslots that a device's accesses make are pieces of what is aligned to so many bytes."""


class KvmDriver(VirtualMachine):
    """A virtual machine as a device (`mmunotify.Device`), and one whose guest can be recorded."""

    def __init__(self, options: KvmOptions | None = None, logger: object = None) -> None:
        super().__init__(options, logger=logger)
        memory = self.options.memory
        self._unused = parse_size(memory) if memory else ADDRESS_END
        """Bytes that device accesses may yet turn into guest memory."""
        self._turns: Final = cycle(self.vcpus)
        self._vcpu = self.vcpus[0]
        self._next = 0
        """The number of the next memslot."""
        self._crowded = CROWDED

    # ------------------------------------------------------------------ a device

    def access(self, address: int, *, write: bool = False) -> bool:
        """The next vCPU uses a host address; whether it could without a fault."""
        gfn = address >> PAGE_SHIFT
        vcpu = self._vcpu = next(self._turns)
        found = vcpu.tlb.get(gfn)
        if found is not None and (found.writable or not write):
            return True
        return vcpu.walk(gfn, write=write) is not None

    async def fault(self, address: int, *, write: bool = False) -> None:
        """Serve the miss of the vCPU that had the last turn.

        Host memory without a memslot becomes one, while there may be more; without, it is MMIO.
        """
        gfn = address >> PAGE_SHIFT
        if self.memslots.find(gfn) is None:
            await self._give(address)
        await resolve(self, self._vcpu, gfn, write)

    async def _give(self, address: int) -> None:
        """Make a memslot of the mapping around an address, as far as it is not one yet."""
        if len(self.memslots) >= self._crowded:
            await self._take_back()
        while self.primary is not None and self.memslots.find(address >> PAGE_SHIFT) is None:
            region = next(iter(self.primary.regions(address, address + 1)), None)
            if region is None or self._unused < PAGE_SIZE:
                return
            before, after = self.memslots.neighbours(address)
            window = address & -SLOT_SIZE
            start = max(region.start, before, window)
            end = min(region.end, after, window + SLOT_SIZE)
            if end - start > self._unused:
                start = address & -PAGE_SIZE
                end = min(end, start + (self._unused & -PAGE_SIZE))
            number, self._next = self._next, (self._next + 1) % MAX_SLOTS
            self._unused -= end - start
            try:
                await self.set_user_memory_region(number, start, end - start, start)
            except BaseException as error:
                self._unused += end - start
                if not isinstance(error, KvmError):
                    raise
                # Another task has taken a part of it, or an old slot has the number: once more.

    async def _take_back(self) -> None:
        """Delete the memslots of mappings that have gone; where none has, expect more of them."""
        gone = [slot for slot in self.memslots if not self._has_memory(slot)]
        for slot in gone:
            await self.set_user_memory_region(slot.id, 0, 0)
            self._unused += slot.hva_end - slot.hva
        if len(gone) < self._crowded // 2:
            self._crowded *= 2

    def _has_memory(self, slot: MemorySlot) -> bool:
        return self.primary is not None and any(self.primary.regions(slot.hva, slot.hva_end))

    # ------------------------------------------------------------------ a recorded guest

    def record(
        self,
        fault: Callable[[int, bool], object],
        mapped: Callable[[int, bool, bool], object],
    ) -> None:
        """Be what was recorded, shadow paging with small pages, and tell of faults and mappings."""
        self.huge = self.fast_page_faults = False
        self.prefetches = True
        self.on_fault, self.on_map = fault, mapped

    async def set_memory(self, address: int | None, size: int) -> None:
        """Guest memory from 0 on is host memory at `address`, or is taken away (None)."""
        if 0 in self.memslots.by_id:
            await self.set_user_memory_region(0, 0, 0)
        if address is not None:
            await self.set_user_memory_region(0, 0, size, address)

    async def log_dirty(self, on: bool) -> None:
        """Start or stop logging which pages are written."""
        slot = self.memslots.by_id.get(0)
        if slot is not None:
            flags = LOG_DIRTY_PAGES if on else 0
            size = slot.pages << PAGE_SHIFT
            await self.set_user_memory_region(0, 0, size, slot.hva, flags)

    async def dirty_log(self) -> list[int] | None:
        """The pages written since the last call, ascending; None when nothing is logged."""
        slot = self.memslots.by_id.get(0)
        if slot is None or slot.dirty is None:
            return None
        pages: list[int] = (await self.get_dirty_log(0)).tolist()
        return pages

    async def load(self, address: int) -> int | None:
        """A byte of guest memory; None without memory there. Raises BadAddress for -EFAULT."""
        try:
            return (await self.vcpus[0].load(address))[0]
        except MmioExit:
            return None

    async def store(self, address: int, value: int) -> bool:
        """Write a byte of guest memory; False without memory there. Raises like `load`."""
        try:
            await self.vcpus[0].store(address, bytes((value,)))
        except MmioExit:
            return False
        return True
