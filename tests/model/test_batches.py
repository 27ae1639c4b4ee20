"""What a CPU puts off until it drains its batches, and who can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import mmunotify as mn
from mmunotify.model import AddressSpace, Machine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PAGE = mn.PAGE_SIZE


class Copies(mn.AtomicDriver):
    """Counts what it is told."""

    told = 0

    def invalidate_range_start(self, rng: mn.Range) -> None:
        self.told += 1


async def given_up(machine: Machine[mn.RwSems], pages: int) -> tuple[AddressSpace[mn.RwSems], int]:
    mm = machine.new_mm("P")
    base = await mm.mmap(64 * PAGE)
    await mm.touch(base, 64 * PAGE, write=True)
    await mm.madvise(base, pages * PAGE, "free")
    return mm, base


def lazy(mm: AddressSpace[mn.RwSems]) -> int:
    return mm.smaps(mm.vmas[0]).get("lf", 0)


@pytest.mark.parametrize(("pages", "seen"), [(30, 0), (31, 31), (40, 31), (62, 62)])
async def test_a_batch_is_done_when_it_is_full(pages: int, seen: int) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, _ = await given_up(machine, pages)
        assert lazy(mm) == seen


async def advise(mm: AddressSpace[mn.RwSems], base: int) -> None:
    await mm.madvise(base + 60 * PAGE, PAGE, "cold")


async def truncate(mm: AddressSpace[mn.RwSems], base: int) -> None:
    file = mm.machine.file(4, fill=True)
    await mm.machine.truncate(file, 0)
    mm.machine.close(file)


async def truncate_nothing(mm: AddressSpace[mn.RwSems], base: int) -> None:
    file = mm.machine.file(4)
    await mm.machine.truncate(file, 0)
    mm.machine.close(file)


async def write_back(mm: AddressSpace[mn.RwSems], base: int) -> None:
    file = mm.machine.file(4, "ext4")
    mm.machine.lru.drain()
    await mm.madvise(base, 8 * PAGE, "free")
    await mm.machine.pwrite(file, 0, b"x")
    await mm.machine.fsync(file)
    mm.machine.close(file)


async def lock(mm: AddressSpace[mn.RwSems], base: int) -> None:
    await mm.mlock(base + 60 * PAGE, PAGE)


async def unmap(mm: AddressSpace[mn.RwSems], base: int) -> None:
    await mm.munmap(base + 60 * PAGE, PAGE)


@pytest.mark.parametrize(
    ("operation", "drains"),
    [
        (advise, True), (truncate, True), (truncate_nothing, False), (write_back, True),
        (lock, True), (unmap, False),
    ],
)  # fmt: skip
async def test_some_operations_drain(
    operation: Callable[[AddressSpace[mn.RwSems], int], Awaitable[None]], drains: bool
) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, base = await given_up(machine, 8)
        await operation(mm, base)
        assert lazy(mm) == (8 if drains else 0)


@pytest.mark.parametrize("drained", [False, True])
async def test_a_page_that_a_batch_holds_is_copied_by_its_only_owner(drained: bool) -> None:
    """Reuse is decided by the reference count, and the batch has a reference."""
    async with Machine(frames=256, contents=True) as machine:
        mm, base = await given_up(machine, 1)
        child = await mm.fork()
        await child.exit()
        if drained:
            machine.lru.drain()
        driver = Copies()
        await mm.register(driver)
        await mm.access(base, True)
        assert driver.told == (not drained)


@pytest.mark.parametrize("drained", [False, True])
async def test_a_page_that_a_locked_mapping_lost_is_held_for_a_while(drained: bool) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm = machine.new_mm("P")
        base = await mm.mmap(PAGE)
        await mm.mlock(base, PAGE)
        child = await mm.fork()
        await mm.access(base, True)
        if drained:
            machine.lru.drain()
        driver = Copies()
        await child.register(driver)
        await child.access(base, True)
        assert driver.told == (not drained)
