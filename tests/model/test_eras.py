"""What 2008 announced, next to what Linux announces today."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

import mmunotify as mn
from mmunotify.model import AddressSpace, Machine
from mmunotify.model import flags as f

if TYPE_CHECKING:
    from mmunotify.model.machine import Era

PAGE = mn.PAGE_SIZE
FIXED = f.MAP_PRIVATE | f.MAP_ANONYMOUS | f.MAP_FIXED


class Heard(mn.AtomicDriver):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def invalidate_range_start(self, rng: mn.Range) -> None:
        self.calls.append(("range", rng.start, rng.end))

    def invalidate_page(self, address: int) -> None:
        self.calls.append(("page", address, address + PAGE))


async def heard(era: Era) -> tuple[int, list[tuple[str, int, int]]]:
    """A copy on write, a page-out, a dirty-tracking reset and an unmap in one process."""
    async with Machine(frames=64, swap=64, era=era) as machine:
        mm = machine.new_mm("P")
        base = await mm.mmap(2 * PAGE)
        await mm.touch(base, 2 * PAGE, write=True)
        child = await mm.fork()
        driver = Heard()
        await mm.register(driver)
        await mm.access(base, write=True)
        await child.exit()
        await mm.madvise(base, PAGE, "pageout")
        await mm.clear_refs(4)
        await mm.munmap(base, 2 * PAGE)
        return base, driver.calls


async def test_2008_told_single_pages_by_page() -> None:
    base, calls = await heard("v16")
    page = ("page", base, base + PAGE)
    assert calls == [page, page, ("range", base, base + 2 * PAGE)]


async def test_today_everything_is_a_range() -> None:
    base, calls = await heard("linux-6")
    page = ("range", base, base + PAGE)
    whole = ("range", 0, mn.ULONG_MAX)
    assert calls == [page, page, whole, ("range", base, base + 2 * PAGE)]


class Case(NamedTuple):
    """An operation on 200 pages, of which the first 100 are there, and what 2008 told, in pages."""

    name: str
    calls: list[tuple[str, int, int]]


CHUNKS = [("range", 0, 64), ("range", 64, 128), ("range", 128, 192), ("range", 192, 200)]
CASES = [
    Case("munmap", [("range", 0, 200)]),
    Case("dontneed", [("range", 10, 20)]),
    Case("mprotect", [("range", 10, 20)]),
    Case("mprotect of nothing", [("range", 150, 160)]),
    Case("mprotect of one page", [("range", 5, 6)]),
    # Chunks of 64 pages are moved one by one, then the source is unmapped.
    Case(
        "mremap",
        [*CHUNKS, ("range", 0, 200)],
    ),
    Case("fork", [("range", 0, 200)]),
    Case("write after fork", [("page", 3, 4)]),
    Case("first write after a read", [("page", 120, 121)]),
    Case("pageout", [("page", 7, 8), ("page", 8, 9)]),
    Case("migrate", [("page", 4, 5)]),
    Case("clear_refs", []),
    Case("split of a vma", []),
    Case("exit", []),
]


async def do(
    machine: Machine[mn.RwSems], mm: AddressSpace[mn.RwSems], base: int, what: str
) -> None:
    def at(page: int) -> int:
        return base + page * PAGE

    match what:
        case "munmap":
            await mm.munmap(base, 200 * PAGE)
        case "dontneed":
            await mm.madvise(at(10), 10 * PAGE, "dontneed")
        case "mprotect":
            await mm.mprotect(at(10), 10 * PAGE, f.PROT_READ)
        case "mprotect of nothing":
            await mm.mprotect(at(150), 10 * PAGE, f.PROT_READ)
        case "mprotect of one page":
            await mm.mprotect(at(5), PAGE, f.PROT_READ)
        case "mremap":
            to = base + (4 << 20)
            await mm.mremap(base, 200 * PAGE, 200 * PAGE, f.MREMAP_MAYMOVE | f.MREMAP_FIXED, to)
        case "fork":
            await mm.fork()
        case "write after fork":
            await mm.access(at(3), True)
        case "first write after a read":
            await mm.access(at(120))
            await mm.access(at(120), True)
        case "pageout":
            await mm.madvise(at(7), 2 * PAGE, "pageout")
        case "migrate":
            await machine.migrate(mm, at(4))
        case "clear_refs":
            await mm.clear_refs(4)
        case "split of a vma":
            await mm.madvise(at(10), PAGE, "dontfork")
        case "exit":
            await mm.exit()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_2008_operation_by_operation(case: Case) -> None:
    async with Machine(frames=1024, swap=64, era="v16") as machine:
        mm = machine.new_mm("P")
        base = await mm.mmap(4 << 20, addr=64 << 20, flags=FIXED)
        await mm.munmap(base + 200 * PAGE, (4 << 20) - 200 * PAGE)
        await mm.touch(base, 100 * PAGE, write=True)
        if case.name == "write after fork":
            await mm.fork()
        driver = Heard()
        await mm.register(driver)
        await do(machine, mm, base, case.name)
        heard = [
            (how, (low - base) // PAGE, (high - base) // PAGE) for how, low, high in driver.calls
        ]
        assert heard == case.calls
