"""madvise for oneself and for others: what is refused, and what was done before it was."""

from __future__ import annotations

import errno

import pytest

import mmunotify as mn
from mmunotify.errors import MmError
from mmunotify.model import Machine

PAGE = mn.PAGE_SIZE


async def test_others_are_told_how_much_was_advised() -> None:
    async with Machine(frames=64, swap=64) as machine:
        mm = machine.new_mm("P")
        base = await mm.mmap(4 * PAGE)
        await mm.touch(base, 4 * PAGE, write=True)
        nowhere = base + 64 * PAGE
        ranges = [(base, PAGE), (base + PAGE, PAGE), (nowhere, PAGE), (base + 2 * PAGE, PAGE)]
        assert await mm.process_madvise(ranges, "pageout") == 2 * PAGE
        assert mm.smaps(mm.vmas[0])["sw"] == 2
        with pytest.raises(MmError) as caught:
            await mm.process_madvise([(nowhere, PAGE)], "pageout")
        assert caught.value.errno == errno.ENOMEM
        with pytest.raises(MmError) as caught:
            await mm.process_madvise([(base, PAGE)], "dontneed")
        assert caught.value.errno == errno.EINVAL


async def test_collapse_needs_memory_that_was_written() -> None:
    async with Machine(frames=4096) as machine:
        mm = machine.new_mm("P")
        base = await mm.mmap(mn.PMD_SIZE * 2)
        start = -(-base // mn.PMD_SIZE) * mn.PMD_SIZE
        with pytest.raises(MmError) as caught:
            await mm.madvise(start, mn.PMD_SIZE, "collapse")
        assert caught.value.errno == errno.EINVAL
        await mm.access(start, True)
        await mm.madvise(start, mn.PMD_SIZE, "collapse")
        assert mm.smaps(mm.vmas[0])["ah"] == 512
        # A range without a whole 2 MiB of its own is no error, but one that goes backwards is.
        await mm.madvise(start + PAGE, mn.PMD_SIZE - PAGE, "collapse")
        with pytest.raises(MmError):
            await mm.madvise(start + PAGE, PAGE, "collapse")


async def test_reading_a_hole_of_a_memfd_leaves_it_one() -> None:
    async with Machine(frames=64, contents=True) as machine:
        file = machine.file(4)
        used = machine.frames.used
        assert await machine.pread(file, 100, 3 * PAGE) == bytes(3 * PAGE)
        assert machine.frames.used == used
        await machine.pwrite(file, PAGE, b"x")
        assert await machine.pread(file, PAGE - 1, 3) == b"\0x\0"
        machine.close(file)
