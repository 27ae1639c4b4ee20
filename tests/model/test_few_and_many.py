"""Few entries are done by a loop and many by vector steps: both do the same."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import anyio
import pytest

from mmunotify.model import Machine, filemap, memory, uaccess
from mmunotify.model.check import Excuses, Report, read_recordings

RANDOM = Path(__file__).parents[1] / "data" / "oracle" / "random.jsonl.xz"
PAGE = 4096
PMD = 512 * PAGE


@pytest.mark.parametrize("few", [0, 1 << 20], ids=["vector steps", "loops"])
def test_recording_agrees_whichever_is_taken(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "FEW", few)
    monkeypatch.setattr(uaccess, "_FEW", few)
    monkeypatch.setattr(filemap, "_FEW", few)
    report = Report(RANDOM)

    async def check() -> None:
        for sequence in islice(read_recordings(RANDOM), 0, None, 6):
            await report.check(sequence, Excuses.load())

    anyio.run(check)
    assert report.agrees, "\n".join(islice(report.differences(), 60))
    assert report.operations > 0


async def test_exit_frees_all_and_leaves_others_alone() -> None:
    """Page tables of two processes that lie in turns, over several slabs; swap, and a child."""
    tables = 700
    async with Machine(frames=1 << 12, contents=True) as machine:
        one, two = machine.new_mm("one"), machine.new_mm("two")
        heaps = [await mm.mmap(tables * PMD) for mm in (one, two)]
        for index in range(tables):
            for mm, heap in zip((one, two), heaps, strict=True):
                await mm.access(heap + index * PMD, write=True, value=1 + index % 255)
        await one.madvise(heaps[0], 100 * PMD, "pageout")
        await two.madvise(heaps[1], 50 * PMD, "pageout")
        child = await one.fork()
        await one.exit()
        assert machine.frames.used == 1 + 2 * tables - 150
        for mm, heap in zip((child, two), heaps, strict=True):
            for index in range(tables):
                assert await mm.access(heap + index * PMD) == 1 + index % 255
        await child.exit()
        assert machine.frames.used == 1 + tables
        assert machine.swap.used == 0
        await two.exit()
        assert machine.frames.used == 1
        assert machine.leaves.used == 0
