"""What 2008 announced, next to what Linux announces today."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mmunotify as mn
from mmunotify.model import Machine

if TYPE_CHECKING:
    from mmunotify.model.machine import Era

PAGE = mn.PAGE_SIZE


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
