"""dirty_log_test and dirty_log_page_splitting_test of KVM's selftests."""

from __future__ import annotations

import errno
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from anyio.lowlevel import checkpoint

import mmunotify as mn
from mmunotify_kvm.errors import DirtyRingFull, KvmError
from mmunotify_kvm.memslots import LOG_DIRTY_PAGES
from mmunotify_kvm.vm import VirtualMachine

if TYPE_CHECKING:
    from .conftest import Boot, Guest

PAGE = mn.PAGE_SIZE
PAGES = 64
ITERATIONS = 16

MODES: dict[str, dict[str, Any]] = {
    "dirty-log": {},
    "clear-log": {"manual_protect": True},
    "clear-log, initially set": {"manual_protect": True, "initially_set": True},
    "dirty-ring": {"dirty_ring": 128},
}


async def collect(guest: Guest) -> set[int]:
    """The pages reported dirty since the last time, which are write-protected again."""
    vm = guest.vm
    ring = vm.vcpus[0].ring
    if ring is not None:
        found = {entry.page for entry in ring.collect()}
        vm.reset_dirty_rings()
        return found
    pages = await vm.get_dirty_log(0)
    if vm.manual_protect:
        await vm.clear_dirty_log(0, pages)
    return set(pages.tolist())


def contents(guest: Guest) -> list[int]:
    """The first byte of every page, in one step."""
    primary = guest.mm.primary
    found = (primary.translate(guest.host(gfn)) for gfn in range(guest.pages))
    return [primary.read(each, 0, 1)[0] for each in found]


@pytest.mark.parametrize("mmu", ["shadow", "tdp"])
@pytest.mark.parametrize("mode", MODES)
async def test_dirty_log(boot: Boot, mode: str, mmu: str) -> None:
    """A page is reported dirty when it was written since the last report, and only then.

    The guest writes the iteration's number to random pages. What is reported dirty has this
    iteration's number, or was being written while it was collected; what is reported clean has an
    older one.
    """
    async with boot(PAGES, mmu=mmu, vm=MODES[mode]) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        for gfn in range(PAGES):
            await vcpu.store(gfn * PAGE, b"\0")
        await vm.set_user_memory_region(0, 0, PAGES * PAGE, guest.base, LOG_DIRTY_PAGES)
        iteration = 1
        draws = random.Random(2008)
        done = False

        async def write() -> None:
            while not done:
                gfn = draws.randrange(PAGES)
                with suppress(DirtyRingFull):  # the host collects
                    await vcpu.store(gfn * PAGE, bytes([iteration]))
                await checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            for number in range(1, ITERATIONS):
                for _ in range(40):
                    await checkpoint()
                dirty = await collect(guest)
                # Nothing has run since the log was taken, nor does it while memory is looked at.
                for gfn, value in enumerate(contents(guest)):
                    if gfn in dirty:
                        first = number == 1 and vm.initially_set
                        assert value == number or (first and value == 0)
                    else:
                        assert value < number
                iteration = number + 1
            done = True
        assert vm.counters["dirtied"] > PAGES
        assert (vm.counters["fast_faults"] > 0) == (mmu == "tdp")


async def test_a_full_ring_makes_the_vcpu_exit(boot: Boot) -> None:
    """Before its ring runs over the vCPU exits; its last entry tells of a write not yet done."""
    async with boot(128, vm={"dirty_ring": 128}, flags=LOG_DIRTY_PAGES) as guest:
        vcpu = guest.vm.vcpus[0]
        ring = vcpu.ring
        assert ring is not None
        for gfn in range(ring.limit - 1):
            await vcpu.store(gfn * PAGE, b"\1")
        with pytest.raises(DirtyRingFull, match="64 of 128 entries"):
            await vcpu.store(63 * PAGE, b"\1")
        assert await guest.mm.read(guest.host(63), 1) == b"\0"
        assert [entry.page for entry in ring.collect()] == list(range(64))
        with pytest.raises(DirtyRingFull):  # collected, but not reset
            await vcpu.store(63 * PAGE, b"\1")
        assert guest.vm.reset_dirty_rings() == 64
        for gfn in (63, 64, 0):  # noted again, since the reset has protected them
            await vcpu.store(gfn * PAGE, b"\1")
        assert [entry.page for entry in ring.collect()] == [63, 64, 0]


async def test_each_log_is_asked_in_its_way(boot: Boot) -> None:
    """A log that is not kept is ENOENT; a ring of a wrong size is an error."""
    async with boot(4) as guest:
        for slot in (0, 7):
            with pytest.raises(KvmError, match="it keeps no bitmap") as caught:
                await guest.vm.get_dirty_log(slot)
            assert caught.value.errno == errno.ENOENT
        with pytest.raises(KvmError, match="not in rings"):
            guest.vm.reset_dirty_rings()
        await guest.vm.set_user_memory_region(0, 0, 4 * PAGE, guest.base, LOG_DIRTY_PAGES)
        with pytest.raises(KvmError, match="not pages of it"):
            await guest.vm.clear_dirty_log(0, np.array([4]))
    for size in (100, 64):
        with pytest.raises(ValueError, match="expected a power of two above 64"):
            VirtualMachine(dirty_ring=size)


async def test_the_log_outlives_invalidations(boot: Boot) -> None:
    """What was written before its page went away is still reported; a reclaimed page comes back."""
    async with boot(8, flags=LOG_DIRTY_PAGES) as guest:
        vcpu = guest.vm.vcpus[0]
        await vcpu.store(3 * PAGE, b"\1")
        await guest.mm.madvise(guest.base, 8 * PAGE, "pageout")
        assert guest.vm.pages_4k == 0
        assert (await guest.vm.get_dirty_log(0)).tolist() == [3]
        assert await vcpu.load(3 * PAGE) == b"\1"
        # A page that its host lets be written is mapped so, and counted as written.
        assert (await guest.vm.get_dirty_log(0)).tolist() == [3]


async def test_what_the_hypervisor_writes_is_logged(boot: Boot) -> None:
    """A page that is written through a gfn-to-pfn cache is reported like the guest's own."""
    from mmunotify_kvm.pfn_cache import GfnToPfnCache

    async with boot(8, flags=LOG_DIRTY_PAGES) as guest:
        with GfnToPfnCache(guest.vm, 5 * PAGE) as cache:
            await cache.refresh()
            cache.write(0, b"clock")
        assert (await guest.vm.get_dirty_log(0)).tolist() == [5]


@pytest.mark.parametrize("mode", MODES)
async def test_page_splitting(boot: Boot, mode: str) -> None:
    """Logging splits 2 MiB mappings, all of them; when it is over they come back."""
    pages, blocks = 2048, 4
    machine = {"frames": 1 << 13}
    async with boot(
        pages, align=mn.PMD_SIZE, advice="hugepage", machine=machine, vm=MODES[mode]
    ) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]

        async def populate(value: bytes) -> None:
            for gfn in range(pages):
                while True:
                    try:
                        await vcpu.store(gfn * PAGE, value)
                        break
                    except DirtyRingFull:
                        await collect(guest)

        await populate(b"\1")
        assert (vm.pages_2m, vm.pages_4k) == (blocks, 0)
        await vm.set_user_memory_region(0, 0, pages * PAGE, guest.base, LOG_DIRTY_PAGES)
        assert (vm.pages_2m, vm.pages_4k) == (0, pages)
        assert vm.counters["splits"] == blocks
        await populate(b"\2")
        assert (vm.pages_2m, vm.pages_4k) == (0, pages)
        await vm.set_user_memory_region(0, 0, pages * PAGE, guest.base, 0)
        await populate(b"\3")
        assert (vm.pages_2m, vm.pages_4k) == (blocks, 0)
        assert await guest.mm.read(guest.host(777), 1) == b"\3"
