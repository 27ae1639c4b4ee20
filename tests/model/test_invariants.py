"""The checker says which rule was broken, and nothing about runs that break none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import mmunotify as mn
from mmunotify.errors import InvariantViolated
from mmunotify.model import AddressSpace, Machine
from mmunotify.model import flags as f
from mmunotify.model.invariants import InvariantChecker

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = mn.PAGE_SIZE


async def a_process(machine: Machine[mn.RwSems]) -> tuple[AddressSpace[mn.RwSems], int]:
    mm = machine.new_mm("P")
    address = await mm.mmap(8 * PAGE)
    await mm.write(address, b"x" * 8 * PAGE)
    return mm, address


def forget_page(mm: AddressSpace[mn.RwSems], page: int) -> None:
    frame = mm.pt.get(page) >> 12
    mm.set_pte(page, 0)
    mm.machine.remove_rmap(frame & 0xFFFFFF)
    mm.machine.frames.put(frame & 0xFFFFFF)


def swap_two(mm: AddressSpace[mn.RwSems], page: int) -> None:
    first, second = mm.pt.get(page), mm.pt.get(page + 1)
    mm.set_pte(page, second)
    mm.set_pte(page + 1, first)


def protect(mm: AddressSpace[mn.RwSems], page: int) -> None:
    mm.set_pte(page, mm.pt.get(page) & ~f.PTE_RW)


@pytest.mark.parametrize(
    ("rule", "misdeed"),
    [("I-FREE", forget_page), ("I-COW", swap_two), ("I-PERM", protect)],
)
async def test_change_behind_the_back_is_named(
    rule: str, misdeed: Callable[[AddressSpace[mn.RwSems], int], None]
) -> None:
    async with Machine(frames=256, contents=True) as machine:
        mm, address = await a_process(machine)
        checker = InvariantChecker(machine)
        checker.watch(mm)
        misdeed(mm, address >> 12)
        with pytest.raises(InvariantViolated, match=rule):
            checker.check()


async def test_section_left_open_is_named() -> None:
    async with Machine(frames=256) as machine:
        mm, address = await a_process(machine)
        checker = InvariantChecker(machine)
        checker.watch(mm)
        rng = mn.Range(address, address + PAGE)
        told = await mm.notifiers.invalidate_range_start(rng)
        with pytest.raises(InvariantViolated, match="I-PROG"):
            checker.__exit__(None, None, None)
        await mm.notifiers.invalidate_range_end(rng, told)


async def test_every_operation_keeps_the_rules() -> None:
    async with Machine(frames=512, swap=512, contents=True) as machine:
        with InvariantChecker(machine) as checker:
            mm, address = await a_process(machine)
            child = await mm.fork(name="c")
            await mm.write(address, b"y" * PAGE)
            await child.write(address + PAGE, b"z" * 2 * PAGE)
            await mm.mprotect(address, 4 * PAGE, f.PROT_READ)
            await mm.mprotect(address, 4 * PAGE, f.PROT_READ | f.PROT_WRITE)
            moved = await mm.mremap(address, 4 * PAGE, 4 * PAGE, 3, address + 64 * PAGE)
            await mm.madvise(moved, 4 * PAGE, "pageout")
            assert await mm.read(moved, 1) == b"y"
            await machine.reclaim()
            assert await child.read(address + PAGE, 1) == b"z"
            await machine.migrate(child, address + PAGE)
            await mm.madvise(moved, PAGE, "dontneed")
            await mm.munmap(address, 128 * PAGE)
            await child.exit()
        assert checker.step > 40
    assert machine.frames.used == 1
    assert machine.swap.used == 0
