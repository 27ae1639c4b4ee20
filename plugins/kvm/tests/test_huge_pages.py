"""2 MiB mappings: made where the host has them, split and put together as the host does."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

import mmunotify as mn
from mmunotify_kvm.memslots import LOG_DIRTY_PAGES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .conftest import Boot, Guest

PAGE = mn.PAGE_SIZE
NR = mn.PMD_SIZE // PAGE


@asynccontextmanager
async def huge(boot: Boot, pages: int = 2 * NR, **options: object) -> AsyncIterator[Guest]:
    """A guest on huge pages, all of them there."""
    machine = {"frames": 1 << 13}
    async with boot(
        pages,
        align=mn.PMD_SIZE,
        advice="hugepage",
        machine=machine,
        **options,  # type: ignore[arg-type]
    ) as guest:
        await guest.mm.touch(guest.base, pages * PAGE, write=True)
        yield guest


async def test_one_fault_maps_2_mib(boot: Boot) -> None:
    """The whole block is used after one fault, by any vCPU."""
    async with huge(boot, vcpus=2) as guest:
        vm = guest.vm
        for gfn in range(0, 2 * NR, 7):
            await vm.vcpus[gfn % 2].store(gfn * PAGE + 3, bytes([gfn % 251]))
        for gfn in range(0, 2 * NR, 7):
            assert await guest.mm.read(guest.host(gfn) + 3, 1) == bytes([gfn % 251])
        assert (vm.pages_2m, vm.pages_4k) == (2, 0)
        assert vm.counters["faults"] == vm.counters["huge"] == 2


@pytest.mark.parametrize("huge_option", [True, False])
async def test_only_where_it_is_asked_for(boot: Boot, huge_option: bool) -> None:
    """Without the option the host's 2 MiB are mapped page by page, and mean the same."""
    async with huge(boot, huge=huge_option) as guest:
        await guest.vm.vcpus[0].store(300 * PAGE, b"x")
        assert await guest.vm.vcpus[0].load(300 * PAGE) == b"x"
        assert (guest.vm.pages_2m > 0) == huge_option


async def test_not_where_slot_and_host_are_aligned_differently(boot: Boot) -> None:
    """Guest and host would need different offsets within the block."""
    async with huge(boot) as guest:
        vm = guest.vm
        await vm.set_user_memory_region(1, (1 << 30) + PAGE, NR * PAGE, guest.base)
        await vm.vcpus[0].store((1 << 30) + 5 * PAGE, b"y")
        assert vm.pages_2m == 0
        assert await guest.mm.read(guest.host(4), 1) == b"y"
        # Nor where the slot has only a part of the block.
        await vm.set_user_memory_region(2, 2 << 30, 100 * PAGE, guest.base + NR * PAGE)
        await vm.vcpus[0].load(2 << 30)
        assert vm.pages_2m == 0


async def test_a_split_of_the_host_drops_it(boot: Boot) -> None:
    """The host takes 4 pages out of the block: all of it goes, and comes back as small pages."""
    async with huge(boot) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        await vcpu.store(8 * PAGE, b"a")
        await vcpu.store(100 * PAGE, b"b")
        assert vm.pages_2m == 1
        await guest.mm.madvise(guest.host(8), 4 * PAGE, "dontneed")
        assert vm.pages_2m == 0
        assert await vcpu.load(8 * PAGE) == b"\0"
        assert await vcpu.load(100 * PAGE) == b"b"
        assert vm.pages_2m == 0
        assert vm.pages_4k > 1


async def test_a_collapse_of_the_host_is_followed(boot: Boot) -> None:
    """Small pages that the host puts together are dropped, and mapped at once by the next fault."""
    async with boot(NR, align=mn.PMD_SIZE, machine={"frames": 1 << 13}) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        for gfn in range(0, NR, 3):
            await vcpu.store(gfn * PAGE, b"c")
        assert vm.pages_2m == 0
        await guest.mm.madvise(guest.base, NR * PAGE, "collapse")
        assert vm.pages_4k == 0
        assert await vcpu.load(9 * PAGE) == b"c"
        assert (vm.pages_2m, vm.pages_4k) == (1, 0)


async def test_small_mappings_give_way_to_a_huge_one(boot: Boot) -> None:
    """What was mapped small for logging is replaced when a block can be mapped whole again."""
    async with huge(boot, flags=LOG_DIRTY_PAGES) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        for gfn in range(NR):
            await vcpu.store(gfn * PAGE, bytes([gfn & 255]))
        assert (vm.pages_2m, vm.pages_4k) == (0, NR)
        await vm.set_user_memory_region(0, 0, 2 * NR * PAGE, guest.base)
        assert await vcpu.load(77 * PAGE) == bytes([77])
        assert (vm.pages_2m, vm.pages_4k) == (1, 0)


async def test_fork_and_copy(boot: Boot) -> None:
    """The host forks: nobody writes the shared block, the guest's write copies one page of it."""
    async with huge(boot, pages=NR) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        await vcpu.store(5 * PAGE, b"old")
        child = await guest.mm.fork()
        assert vm.pages_2m == 0
        assert await vcpu.load(5 * PAGE, 3) == b"old"
        await vcpu.store(5 * PAGE, b"new")
        assert await child.read(guest.host(5), 3) == b"old"
        assert await guest.mm.read(guest.host(5), 3) == b"new"
        await child.exit()


async def test_swapped_out_and_in(boot: Boot) -> None:
    """A block that is reclaimed as a whole is dropped as a whole; its contents come back."""
    async with huge(boot, pages=NR) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        await vcpu.store(511 * PAGE, b"z")
        await guest.mm.madvise(guest.base, NR * PAGE, "pageout")
        assert (vm.pages_2m, vm.counters["mapped"]) == (0, NR)
        assert await vcpu.load(511 * PAGE) == b"z"
