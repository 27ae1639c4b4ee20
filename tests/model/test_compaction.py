"""Compaction: pages move to other frames, their addresses stay, and every mapping is told."""

from __future__ import annotations

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify.model.invariants import InvariantChecker

PAGE = mn.PAGE_SIZE


class Heard(mn.AtomicDriver):
    def __init__(self) -> None:
        self.pages: list[int] = []

    def invalidate_range_start(self, rng: mn.Range) -> None:
        assert rng.end - rng.start == PAGE
        self.pages.append(rng.start)


async def test_free_memory_is_in_one_piece_again() -> None:
    """Every other page was freed: no 2 MiB are left, until the others have moved together."""
    async with Machine(frames=2300, contents=True) as machine:
        mm = machine.new_mm("P")
        base = await mm.mmap(2200 * PAGE)
        for page in range(2200):
            await mm.access(base + page * PAGE, True, page & 255)
        for page in range(0, 2200, 2):
            await mm.madvise(base + page * PAGE, PAGE, "dontneed")
        assert machine.frames.alloc_huge() == -1
        heard = Heard()
        await mm.register(heard)
        moved = await machine.compact()
        assert moved == len(heard.pages) > 400
        # In clusters of 32, the highest frame of each first.
        first = heard.pages[:32]
        assert first == sorted(first, reverse=True)
        for page in range(1, 2200, 2):
            assert await mm.access(base + page * PAGE) == page & 255
        head = machine.frames.alloc_huge()
        assert head >= 0
        for frame in range(head, head + 512):
            machine.frames.give_back(frame)
    assert machine.frames.used == 1


async def test_pages_that_are_held_stay() -> None:
    async with Machine(frames=64) as machine:
        mm = machine.new_mm("P")
        spare = await mm.mmap(8 * PAGE)
        await mm.touch(spare, 8 * PAGE, write=True)
        base = await mm.mmap(2 * PAGE)
        await mm.touch(base, 2 * PAGE, write=True)
        pin = await mm.pin(spare, spare + PAGE)
        await mm.munmap(spare + 4 * PAGE, 4 * PAGE)
        before = mm.primary.translate(spare)
        with InvariantChecker(machine):
            assert await machine.compact() > 0
        assert mm.primary.translate(spare) == before
        mm.unpin(pin)
