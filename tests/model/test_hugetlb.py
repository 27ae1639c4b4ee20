"""Huge pages that were set aside: promised by mmap, and given back to the pool alone."""

from __future__ import annotations

import errno

import pytest

import mmunotify as mn
from mmunotify.errors import BadAddress, MmError
from mmunotify.model import AddressSpace, Machine
from mmunotify.model import flags as f

PAGE = mn.PAGE_SIZE
HUGE = mn.PMD_SIZE
PRIVATE = f.MAP_PRIVATE | f.MAP_ANONYMOUS | f.MAP_HUGETLB
SHARED = f.MAP_SHARED | f.MAP_ANONYMOUS | f.MAP_HUGETLB


class Heard(mn.AtomicDriver):
    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def invalidate_range_start(self, rng: mn.Range) -> None:
        self.ranges.append((rng.start, rng.end))


async def a_process(machine: Machine[mn.RwSems]) -> tuple[AddressSpace[mn.RwSems], Heard]:
    mm = machine.new_mm("P")
    heard = Heard()
    await mm.register(heard)
    return mm, heard


async def test_mmap_promises_what_faults_then_take() -> None:
    async with Machine(frames=4096, hugepages=3, contents=True) as machine:
        mm, _ = await a_process(machine)
        address = await mm.mmap(2 * HUGE, flags=PRIVATE)
        assert address % HUGE == 0
        assert machine.hugetlb.available == 1
        with pytest.raises(MmError) as caught:
            await mm.mmap(2 * HUGE, flags=PRIVATE)
        assert caught.value.errno == errno.ENOMEM
        await mm.write(address, b"huge")
        assert (machine.hugetlb.used, machine.hugetlb.available) == (1, 1)
        await mm.munmap(address, HUGE)
        assert (machine.hugetlb.used, machine.hugetlb.available) == (0, 2)
        await mm.munmap(address + HUGE, HUGE)
        assert machine.hugetlb.available == 3


async def test_a_copy_is_announced_once_for_all_of_it() -> None:
    async with Machine(frames=4096, hugepages=2, contents=True) as machine:
        mm, heard = await a_process(machine)
        address = await mm.mmap(HUGE, flags=PRIVATE)
        await mm.write(address + PAGE, b"both")
        child = await mm.fork()
        heard.ranges.clear()
        await mm.write(address, b"mine")
        assert heard.ranges == [(address, address + HUGE)]
        assert await child.read(address, 4) == bytes(4)
        assert await child.read(address + PAGE, 4) == b"both"
        await child.exit()
        await mm.write(address, b"more")
        assert len(heard.ranges) == 1


async def test_the_promise_is_kept_at_the_expense_of_the_child() -> None:
    """The pool is empty: the process that mmapped gets its page, the child's access is a signal."""
    async with Machine(frames=4096, hugepages=1, contents=True) as machine:
        mm, _ = await a_process(machine)
        address = await mm.mmap(HUGE, flags=PRIVATE)
        await mm.write(address, b"one")
        child = await mm.fork()
        await mm.write(address, b"two")
        assert await mm.read(address, 3) == b"two"
        with pytest.raises(BadAddress) as caught:
            await child.access(address)
        assert caught.value.signal == "BUS"


async def test_shared_pages_are_the_files_until_a_hole_is_made() -> None:
    async with Machine(frames=4096, hugepages=2, contents=True) as machine:
        mm, heard = await a_process(machine)
        address = await mm.mmap(2 * HUGE, flags=SHARED)
        await mm.write(address, b"shared")
        child = await mm.fork()
        assert heard.ranges == []
        assert await child.read(address, 6) == b"shared"
        await mm.madvise(address, HUGE, "remove")
        assert heard.ranges == [(address, address + HUGE)]
        assert machine.hugetlb.used == 0
        assert await child.read(address, 6) == bytes(6)


async def test_only_whole_huge_pages_can_be_cut_off() -> None:
    async with Machine(frames=4096, hugepages=2) as machine:
        mm, heard = await a_process(machine)
        address = await mm.mmap(2 * HUGE, flags=PRIVATE)
        for refused in (
            mm.munmap(address, PAGE),
            mm.mprotect(address + PAGE, PAGE, f.PROT_READ),
            mm.madvise(address + PAGE, HUGE, "dontneed"),
            mm.madvise(address, HUGE, "free"),
            mm.mremap(address, HUGE, 2 * HUGE),
        ):
            with pytest.raises(MmError) as caught:
                await refused
            assert caught.value.errno == errno.EINVAL
        assert heard.ranges == []
        moved = await mm.mremap(address, HUGE, HUGE, 3, address - 4 * HUGE)
        assert heard.ranges == [(address, address + HUGE)] * 2
        assert moved == address - 4 * HUGE
