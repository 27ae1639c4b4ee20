"""access_tracking_perf_test of KVM's selftests: what was used since it was marked idle is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import mmunotify as mn
from mmunotify_kvm.vcpu import TLB_ENTRIES

if TYPE_CHECKING:
    from .conftest import Boot, Guest

PAGE = mn.PAGE_SIZE
PAGES = 2 * TLB_ENTRIES


def mark_idle(guest: Guest, *, flush: bool) -> int:
    """Clear every accessed bit, as page_idle does; how many pages were young."""
    notifiers = guest.mm.notifiers
    clear = notifiers.clear_flush_young if flush else notifiers.clear_young
    return sum(clear(guest.host(gfn), guest.host(gfn) + PAGE) for gfn in range(guest.pages))


def idle(guest: Guest) -> int:
    """How many pages were not used since."""
    test = guest.mm.notifiers.test_young
    return sum(not test(guest.host(gfn)) for gfn in range(guest.pages))


@pytest.mark.parametrize("write", [False, True])
async def test_access_tracking(boot: Boot, write: bool) -> None:
    """Populated pages are young, marked ones idle, and after an access less than a tenth is idle.

    page_idle does not flush TLBs, so a use through one goes unseen: exact it cannot be, and as soon
    as memory is larger than the TLB it is nearly so.
    """
    async with boot(PAGES, huge=False, machine={"frames": PAGES + 256}) as guest:
        vcpu = guest.vm.vcpus[0]

        async def access() -> None:
            for gfn in range(PAGES):
                if write:
                    await vcpu.store(gfn * PAGE, b"\1")
                else:
                    await vcpu.load(gfn * PAGE)

        await access()
        assert idle(guest) == 0
        assert mark_idle(guest, flush=False) == PAGES
        assert idle(guest) == PAGES
        await access()
        assert idle(guest) < PAGES // 10


@pytest.mark.parametrize(("flush", "unseen"), [(False, 8), (True, 0)])
async def test_without_a_flush_a_use_through_the_tlb_goes_unseen(
    boot: Boot, flush: bool, unseen: int
) -> None:
    """clear_young leaves TLBs alone, clear_flush_young does not: then every use is seen."""
    async with boot(8, huge=False) as guest:
        vcpu = guest.vm.vcpus[0]
        for gfn in range(8):
            await vcpu.load(gfn * PAGE)
        assert mark_idle(guest, flush=flush) == 8
        for gfn in range(8):
            await vcpu.load(gfn * PAGE)
        assert idle(guest) == unseen


async def test_what_is_prefetched_is_idle(boot: Boot) -> None:
    """A neighbour that was mapped with a page has not been used."""
    async with boot(8, mmu="shadow") as guest:
        await guest.mm.touch(guest.base, 8 * PAGE, write=True)
        await guest.vm.vcpus[0].load(3 * PAGE)
        assert guest.vm.pages_4k == 8
        assert [guest.mm.notifiers.test_young(guest.host(gfn)) for gfn in range(8)] == [
            gfn == 3 for gfn in range(8)
        ]


async def test_reclaim_spares_what_the_guest_uses(boot: Boot) -> None:
    """I-AGE: of pages that only the guest uses, the ones in use stay while others are taken."""
    pages = 96
    async with boot(pages, machine={"frames": 128, "swap": 512}, huge=False) as guest:
        vcpu = guest.vm.vcpus[0]
        for gfn in range(pages):
            await vcpu.store(gfn * PAGE, b"\1")
        other = guest.machine.new_mm("hog")
        at = await other.mmap(64 * PAGE)
        for page in range(64):
            for gfn in range(8):  # the working set
                await vcpu.load(gfn * PAGE)
            await other.touch(at + page * PAGE, PAGE, write=True)
        faults = guest.vm.counters["faults"]
        for gfn in range(8):
            await vcpu.load(gfn * PAGE)
        assert guest.vm.counters["faults"] == faults
        assert guest.vm.counters["mapped"] > 24


async def test_ageing_a_range_at_once(boot: Boot) -> None:
    """A range is asked about like its pages, small and huge ones, and holes say no."""
    async with boot(1024, align=mn.PMD_SIZE, advice="hugepage") as guest:
        vm, notifiers = guest.vm, guest.mm.notifiers
        start, end = guest.base, guest.base + 1024 * PAGE
        assert not notifiers.clear_young(start, end)
        await vm.vcpus[0].store(0, b"\1")
        assert vm.pages_2m == 1
        assert notifiers.test_young(guest.host(511))
        assert not notifiers.test_young(guest.host(512))
        assert notifiers.clear_flush_young(start, end)
        assert not notifiers.clear_flush_young(start, end)
        await vm.vcpus[0].store(5 * PAGE, b"\1")
        assert notifiers.clear_young(start, end)
