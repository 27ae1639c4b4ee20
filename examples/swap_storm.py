"""A swap storm: a guest that lives in swap, beside a process that allocates and frees in a loop.

It is the stress that KVM's patches were tested with in 2008. The guest's memory is larger than what
the machine has, and the guest touches all of it in every loop, through a shadow page table that
holds no reference to any page: reclaim asks it for the accessed bit of each page that it looks at
(`clear_flush_young`) and tells it of each page that it takes (`invalidate_range_start`). One
callback too few, and the guest writes to memory that belongs to somebody else by then, which the
model finds out at once and raises as StaleTranslation.

    python examples/swap_storm.py            6 MiB of frames, 8 MiB of guest and of process
    python examples/swap_storm.py --full     1.5 GiB of frames, 2 GiB of guest and of process
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import attrs

import mmunotify as mn
from mmunotify.model import Machine

if TYPE_CHECKING:
    from mmunotify.model.mm import AddressSpace

FULL = 1 << 19
"""Pages of 2 GiB."""
YOUNG = 1 << 63
GENERATION_SHIFT = 40
FRAME_MASK = (1 << GENERATION_SHIFT) - 1


class ShadowPageTable(mn.AtomicDriver):
    """Translations of `pages` pages from address `base` on: frame, generation, accessed bit."""

    def __init__(self, base: int, pages: int) -> None:
        self.base = base
        self.entries = array("Q", bytes(8 * pages))
        self.open = 0
        """Sections that have begun and not ended: no translation may be made meanwhile."""
        self.faults = self.aged = self.unmapped = 0

    def attach(self, primary: mn.Primary | None) -> None:
        assert primary is not None
        self.primary = primary

    def invalidate_range_start(self, rng: mn.Range) -> None:
        self.open += 1
        entries = self.entries
        first = max(rng.start - self.base >> 12, 0)
        for page in range(first, min(rng.end - self.base >> 12, len(entries))):
            if entries[page]:
                entries[page] = 0
                self.unmapped += 1

    def invalidate_range_end(self, rng: mn.Range) -> None:
        self.open -= 1

    def clear_flush_young(self, start: int, end: int) -> bool:
        page = start - self.base >> 12
        self.aged += 1
        if not 0 <= page < len(self.entries):
            return False
        entry = self.entries[page]
        self.entries[page] = entry & ~YOUNG
        return entry >= YOUNG

    async def touch(self, page: int) -> None:
        """The guest writes to one of its pages; StaleTranslation if it is not its own any more."""
        address = self.base + (page << 12)
        entry = self.entries[page]
        if entry:
            generation = (entry & ~YOUNG) >> GENERATION_SHIFT
            found = mn.Translation(address, entry & FRAME_MASK, True, 4096, generation)
            self.primary.write(found, 0, b"")
            self.entries[page] = entry | YOUNG
            return
        self.faults += 1
        found = await self.primary.fault_in(address, write=True)
        while self.open:
            await anyio.lowlevel.checkpoint()
            found = await self.primary.fault_in(address, write=True)
        # No await since it was found, and no section is open: nobody can have taken the page.
        self.entries[page] = YOUNG | found.generation << GENERATION_SHIFT | found.frame


@attrs.define
class Storm:
    """What a run of `swap_storm` did, in pages."""

    touched: int
    """By the guest and by the process."""
    faults: int
    """Of the guest: touches of pages that it had no translation for."""
    aged: int
    """How often reclaim asked for the accessed bit of one of the guest's pages."""
    unmapped: int
    """Translations that the guest lost."""


async def swap_storm(
    machine: Machine[mn.RwSems],
    pages: int,
    loops: int,
    shadow_type: type[ShadowPageTable] = ShadowPageTable,
) -> Storm:
    """Run a guest and a process, of `pages` pages each, on a machine that has fewer frames."""
    guest = machine.new_mm("guest")
    shadow = shadow_type(await guest.mmap(pages << 12), pages)
    async with guest.attached(shadow), anyio.create_task_group() as tasks:
        tasks.start_soon(run_guest, guest, shadow, loops)
        tasks.start_soon(run_process, machine.new_mm("process"), pages, loops)
    return Storm(2 * loops * pages, shadow.faults, shadow.aged, shadow.unmapped)


def machine_for(pages: int) -> Machine[mn.RwSems]:
    """Three quarters as many frames as the guest has pages, and swap for both."""
    return Machine(frames=pages // 4 * 3, swap=2 * pages)


async def run_guest(mm: AddressSpace[mn.RwSems], shadow: ShadowPageTable, loops: int) -> None:
    for _ in range(loops):
        for page in range(len(shadow.entries)):
            await shadow.touch(page)
            await mm.machine.cond_resched(1)
        # What it has a translation for is its own still.
        for page, entry in enumerate(shadow.entries):
            if entry:
                await shadow.touch(page)
                await mm.machine.cond_resched(1)


async def run_process(mm: AddressSpace[mn.RwSems], pages: int, loops: int) -> None:
    for _ in range(loops):
        address = await mm.mmap(pages << 12)
        await mm.touch(address, pages << 12, write=True)
        await mm.munmap(address, pages << 12)


async def main() -> None:
    pages = FULL if "--full" in sys.argv else 1 << 11
    async with machine_for(pages) as machine:
        storm = await swap_storm(machine, pages, 2)
    for name, count in attrs.asdict(storm).items():
        print(f"{name:8} {count:8} pages")


if __name__ == "__main__":
    anyio.run(main)
