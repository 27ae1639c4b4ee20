"""The primary CPU's TLB keeps what nobody flushes, and flushes come when Linux's come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import mmunotify as mn
from mmunotify.model import AddressSpace, Machine
from mmunotify.model import flags as f
from mmunotify.model.tlb import Tlb

if TYPE_CHECKING:
    from mmunotify.model.machine import GatherAt

PAGE = mn.PAGE_SIZE
MOVE = f.MREMAP_MAYMOVE | f.MREMAP_FIXED


async def moved_and_freed(mm: AddressSpace[mn.RwSems]) -> int:
    """A page that the CPU has used is moved, and then freed at its new address."""
    old = await mm.mmap(16 * PAGE)
    mm.tlb = Tlb(mm)
    await mm.write(old, b"secret")
    new = await mm.mremap(old, PAGE, PAGE, MOVE, old + 8 * PAGE)
    await mm.madvise(new, PAGE, "dontneed")
    return old


async def test_a_move_flushes_before_the_page_can_be_freed_at_its_new_address() -> None:
    async with Machine(frames=64, contents=True) as machine:
        mm = machine.new_mm("P")
        old = await moved_and_freed(mm)
        assert mm.tlb is not None
        assert mm.tlb.load(old) is None


async def test_a_move_that_forgets_to_flush_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Machine(frames=64, contents=True) as machine:
        mm = machine.new_mm("P")
        with monkeypatch.context() as patch:
            patch.setattr(AddressSpace, "flush_tlb", lambda mm, first, last: None)
            old = await moved_and_freed(mm)
        assert mm.tlb is not None
        with pytest.raises(mn.StaleTranslation, match="no flush came before"):
            mm.tlb.load(old)


class AtTheEnd(mn.AtomicDriver):
    """Looks into the TLB when a section is over."""

    mm: AddressSpace[mn.RwSems]

    def __init__(self) -> None:
        self.cached: list[bool] = []

    def invalidate_range_end(self, rng: mn.Range) -> None:
        assert self.mm.tlb is not None
        self.cached.append(self.mm.tlb.load(rng.start) is not None)


@pytest.mark.parametrize(
    ("operation", "lazily"), [("mprotect", True), ("fork", True), ("munmap", False)]
)
async def test_a_flush_comes_after_the_end_where_it_does_in_linux(
    operation: str, lazily: bool
) -> None:
    """A write-protected page may still be written through the TLB when the section is over."""
    async with Machine(frames=64) as machine:
        mm = machine.new_mm("P")
        driver = AtTheEnd()
        driver.mm = mm
        await mm.register(driver)
        address = await mm.mmap(PAGE)
        mm.tlb = Tlb(mm)
        await mm.access(address, True)
        if operation == "mprotect":
            await mm.mprotect(address, PAGE, f.PROT_READ)
        elif operation == "fork":
            await mm.fork()
        else:
            await mm.munmap(address, PAGE)
        assert driver.cached == [lazily]
        assert mm.tlb.load(address) is None


@pytest.mark.parametrize("gather", ["inside", "outside"])
async def test_where_the_gather_stands_says_when_it_is_flushed(gather: GatherAt) -> None:
    """Outside of the section, one flush for all mappings comes after the end, and the release."""
    async with Machine(frames=64, gather=gather) as machine:
        mm = machine.new_mm("P")
        driver = AtTheEnd()
        driver.mm = mm
        await mm.register(driver)
        address = await mm.mmap(2 * PAGE)
        mm.tlb = Tlb(mm)
        await mm.access(address, True)
        await mm.munmap(address, PAGE)
        assert driver.cached == [gather == "outside"]
        assert mm.tlb.load(address) is None
        await mm.access(address + PAGE, True)
        await mm.madvise(address + PAGE, PAGE, "dontneed")
        assert mm.tlb.flushes == 2
        assert machine.frames.used == 1


class Sleepy(mn.SleepableDriver):
    async def invalidate_range_start(self, rng: mn.Range) -> None:
        """May suspend."""


async def test_nobody_may_suspend_inside_of_a_gather() -> None:
    """Why XPMEM needed patches 4 and 5: nothing has been unmapped when that is found out."""
    async with Machine(frames=64, gather="outside") as machine:
        mm = machine.new_mm("P")
        address = await mm.mmap(PAGE)
        await mm.access(address, True)
        subscription = await mm.register(Sleepy())
        with pytest.raises(mn.ScheduleWhileAtomic):
            await mm.munmap(address, PAGE)
        await mm.access(address)
        await mm.unregister(subscription)
        await mm.munmap(address, PAGE)
