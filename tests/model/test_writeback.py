"""What writing a file back tells, and that the next write is noticed again."""

from __future__ import annotations

import pytest

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify.model import flags as f

PAGE = mn.PAGE_SIZE
PAGES = 16
FOLIO = range(4, 8)


class Told(mn.AtomicDriver):
    """Keeps the ranges that it is told."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def invalidate_range_start(self, rng: mn.Range) -> None:
        self.ranges.append((rng.start, rng.end))


class SleepableTold(mn.SleepableDriver):
    """The same as a coroutine."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        self.ranges.append((rng.start, rng.end))


class SometimesWaits(SleepableTold):
    """Has to wait for every third."""

    nonblock_first = True
    asked = 0

    def invalidate_range_start_nonblock(self, rng: mn.Range) -> bool:
        self.asked += 1
        if self.asked % 3 == 0:
            return False
        self.ranges.append((rng.start, rng.end))
        return True


@pytest.mark.parametrize("driver", [Told, SleepableTold, SometimesWaits])
@pytest.mark.parametrize("mappings", [1, 2])
async def test_pages_singly_and_a_folio_as_a_whole(
    driver: type[Told] | type[SleepableTold], mappings: int
) -> None:
    async with Machine(frames=256) as machine:
        mm = machine.new_mm("P")
        file = machine.file(PAGES, "ext4")
        # Absent pages that one write brings in are one folio.
        await machine.pwrite(file, FOLIO.start * PAGE, bytes(len(FOLIO) * PAGE))
        bases = [
            await mm.mmap(PAGES * PAGE, flags=f.MAP_SHARED, file=file) for _ in range(mappings)
        ]
        for base in bases:
            await mm.touch(base, PAGES * PAGE, write=True)
        told = driver()
        async with mm.attached(told):
            await machine.fsync(file)
            parts = [range(at, at + 1) for at in range(PAGES) if at not in FOLIO]
            parts = sorted([*parts, FOLIO], key=lambda part: part.start)
            # By offset, and for one offset in the order of the mappings.
            assert told.ranges == [
                (base + part.start * PAGE, base + part.stop * PAGE)
                for part in parts
                for base in bases
            ]
            told.ranges.clear()
            await machine.fsync(file)
            assert told.ranges == []
            faults = mm.min_flt
            for at in (2, 5):
                await mm.access(bases[0] + at * PAGE, write=True)
            assert mm.min_flt == faults + 2
            await machine.fsync(file)
            assert len(told.ranges) == 2 * mappings
        machine.close(file)
