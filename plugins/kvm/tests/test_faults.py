"""Page faults one by one: what is mapped, what is told to the host, what is retried and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
import structlog
from anyio.lowlevel import checkpoint
from structlog.testing import LogCapture

import mmunotify as mn
from mmunotify.model.flags import PROT_READ
from mmunotify_kvm.errors import MmioExit
from mmunotify_kvm.faults import FaultResult, page_fault
from mmunotify_kvm.memslots import LOG_DIRTY_PAGES

if TYPE_CHECKING:
    from .conftest import Boot, Guest

PAGE = mn.PAGE_SIZE


def watched(guest: Guest) -> list[tuple[int, str]]:
    """What is mapped from now on: gfn, "r" or "w", "-" if ahead of its use."""
    seen: list[tuple[int, str]] = []
    guest.vm.on_map = lambda gfn, writable, ahead: seen.append(
        (gfn, ("w" if writable else "r") + "-" * ahead)
    )
    return seen


async def test_prefetch_of_aligned_neighbours(boot: Boot) -> None:
    """A fault maps the other pages of its aligned 8 that the host can write, in two runs."""
    async with boot(16, mmu="shadow") as guest:
        await guest.mm.touch(guest.base, 16 * PAGE, write=True)
        seen = watched(guest)
        await guest.vm.vcpus[0].load(3 * PAGE)
        assert seen == [(3, "w"), *((gfn, "w-") for gfn in (0, 1, 2, 4, 5, 6, 7))]


async def test_prefetch_ends_at_what_cannot_be_written(boot: Boot) -> None:
    """A run stops at a page that is absent or read-only; if it is its first, all runs stop."""
    async with boot(16, mmu="shadow") as guest:
        mm, vcpu = guest.mm, guest.vm.vcpus[0]
        await mm.touch(guest.base, 16 * PAGE, write=True)
        await mm.mprotect(guest.host(2), PAGE, PROT_READ)
        seen = watched(guest)
        await vcpu.load(4 * PAGE)
        assert seen == [(4, "w"), (0, "w-"), (1, "w-"), (5, "w-"), (6, "w-"), (7, "w-")]
        seen.clear()
        await mm.madvise(guest.host(8), PAGE, "dontneed")
        await vcpu.load(12 * PAGE)
        assert seen == [(12, "w")]


async def test_prefetch_stays_within_the_slot(boot: Boot) -> None:
    """A run that begins before the slot, or would run past its end, is not begun."""
    async with boot(3, mmu="shadow") as guest:
        vm = guest.vm
        await guest.mm.touch(guest.base, 3 * PAGE, write=True)
        seen = watched(guest)
        await vm.vcpus[0].load(0)
        assert seen == [(0, "w")]  # 1 to 7 would run past its end
        await vm.set_user_memory_region(1, 3 * PAGE, 5 * PAGE, guest.base)
        seen.clear()
        await vm.vcpus[0].load(PAGE)
        assert seen == [(1, "w")]


async def test_prefetch_over_adjacent_slots(boot: Boot) -> None:
    """Each run is mapped by the slot that it begins in."""
    async with boot(8, mmu="shadow") as guest:
        vm = guest.vm
        await guest.mm.touch(guest.base, 8 * PAGE, write=True)
        await vm.set_user_memory_region(0, 0, 0)
        await vm.set_user_memory_region(0, 0, 4 * PAGE, guest.base)
        await vm.set_user_memory_region(1, 4 * PAGE, 4 * PAGE, guest.host(4))
        seen = watched(guest)
        await vm.vcpus[0].load(3 * PAGE)
        assert seen == [(3, "w"), *((gfn, "w-") for gfn in (0, 1, 2, 4, 5, 6, 7))]


async def test_a_write_fault_on_the_zero_page_is_two_faults(boot: Boot) -> None:
    """The host copies, and announces, while the fault looks the page up: it begins again."""
    async with boot(1) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        assert await vcpu.load(0) == b"\0"
        faults = vm.counters["faults"]
        await vcpu.store(0, b"\1")
        assert vm.counters["faults"] == faults + 2
        # In vain, as it turns out: what was found was the copy already.
        assert vm.counters["retries"] == vm.counters["false_retries"] == 1
        assert await guest.mm.read(guest.base, 1) == b"\1"


async def test_never_more_than_the_host_allows(boot: Boot) -> None:
    """I-PERM: what the host has read-only is mapped read-only, and a store is an error."""
    async with boot(4) as guest:
        mm, vm, vcpu = guest.mm, guest.vm, guest.vm.vcpus[0]
        await vcpu.store(0, b"\1")
        await mm.mprotect(guest.base, 4 * PAGE, PROT_READ)
        assert vm.pages_4k == 0
        assert await vcpu.load(0) == b"\1"
        with pytest.raises(mn.BadAddress):
            await vcpu.store(0, b"\2")
        assert vm.counters["efault"] == 1
        assert await vcpu.load(0) == b"\1"


async def test_a_fault_in_an_open_section_waits_for_its_end(boot: Boot) -> None:
    """I-NOEST: nothing is mapped in the range; the vCPU sleeps, and goes on when it is over."""
    async with boot(4) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        done = False

        async def store() -> None:
            nonlocal done
            await vcpu.store(0, b"\1")
            done = True

        async with anyio.create_task_group() as tasks:
            rng = mn.Range(guest.base, guest.base + PAGE, mn.Event.CLEAR)
            async with guest.mm.notifiers.invalidating(rng):
                tasks.start_soon(store)
                for _ in range(50):
                    await checkpoint()
                assert not done
                assert vm.pages_4k == 0
                assert vm.counters["faults"] < 5
        assert done
        assert vm.pages_4k == 1


async def test_no_reference_is_kept(boot: Boot) -> None:
    """I-FREE: a page that the guest maps is freed as soon as the host lets go of it."""
    async with boot(8) as guest:
        free = guest.machine.frames.free
        for gfn in range(8):
            await guest.vm.vcpus[0].store(gfn * PAGE, b"\1")
        assert guest.machine.frames.free == free - 8
        await guest.mm.munmap(guest.base, 8 * PAGE)
        assert guest.machine.frames.free == free


async def test_a_spurious_fault(boot: Boot) -> None:
    """Another vCPU was faster: there is nothing to do."""
    async with boot(4, vcpus=2) as guest:
        vm = guest.vm
        assert await page_fault(vm, vm.vcpus[0], 0, write=True) is FaultResult.FIXED
        assert await page_fault(vm, vm.vcpus[1], 0, write=True) is FaultResult.SPURIOUS
        assert vm.counters["installed"] == vm.counters["spurious"] == 1


async def test_fast_page_fault(boot: Boot) -> None:
    """What only dirty logging has taken is given back without asking the host; nothing else is."""
    async with boot(4, mmu="tdp", flags=LOG_DIRTY_PAGES) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        await vcpu.store(0, b"\1")
        await vm.get_dirty_log(0)
        await vcpu.store(0, b"\2")
        assert vm.counters["fast_faults"] == 1
        assert (await vm.get_dirty_log(0)).tolist() == [0]
        await guest.mm.mprotect(guest.base, PAGE, PROT_READ)
        await vcpu.load(0)
        with pytest.raises(mn.BadAddress):
            await vcpu.store(0, b"\3")
        assert vm.counters["fast_faults"] == 1


async def test_each_vcpu_loses_its_tlb(boot: Boot) -> None:
    """A flush reaches every vCPU, for one page and for many."""
    async with boot(32, vcpus=3) as guest:
        vm = guest.vm
        for count in (1, 32):
            for vcpu in vm.vcpus:
                for gfn in range(32):
                    await vcpu.store(gfn * PAGE, bytes([vcpu.id]))
            await guest.mm.madvise(guest.base, count * PAGE, "dontneed")
            for vcpu in vm.vcpus:
                assert not any(gfn in vcpu.tlb for gfn in range(count))
                assert await vcpu.load(0) == b"\0"


async def test_counters_and_lock_hold(boot: Boot) -> None:
    """How long mmu_lock was held is known, in sum and at most."""
    async with boot(64) as guest:
        for gfn in range(64):
            await guest.vm.vcpus[0].store(gfn * PAGE, b"\1")
        counters = guest.vm.counters
        assert 0 < counters["lock_longest_ns"] <= counters["lock_ns"]
        assert not guest.vm.mmu.lock.locked


async def test_what_is_traced(boot: Boot) -> None:
    """While a machine is traced each fault, zap and question of age is an event of the log."""
    captured = LogCapture()
    logger = structlog.wrap_logger(None, processors=[captured])
    async with boot(4, vm={"logger": logger, "name": "vm7"}) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        await vcpu.load(PAGE)
        assert [line["event"] for line in captured.entries] == ["kvm_memslot_changed"]
        captured.entries.clear()
        vm.trace = True
        await vcpu.load(0)
        await vcpu.store(0, b"\1")
        guest.mm.notifiers.clear_flush_young(guest.base, guest.base + PAGE)
        await guest.mm.munmap(guest.base, PAGE)
        with pytest.raises(mn.BadAddress):
            await vcpu.load(0)
        with pytest.raises(MmioExit):
            await vcpu.load(9 * PAGE)
        vm.trace = False
    kinds = {
        "kvm_page_fault": ("gfn", "write", "result"),
        "kvm_unmapped": ("start", "pages"),
        "kvm_aged": ("start", "young"),
    }
    seen = [
        (line["event"].removeprefix("kvm_"), *(line[key] for key in kinds[line["event"]]))
        for line in captured.entries
        if line["event"] in kinds
    ]
    assert seen == [
        ("page_fault", 0, False, "fixed"),
        ("unmapped", guest.base, 1),
        ("page_fault", 0, True, "retry"),
        ("page_fault", 0, True, "fixed"),
        ("aged", guest.base, True),
        ("unmapped", guest.base, 1),
        ("page_fault", 0, False, "efault"),
        ("page_fault", 9, False, "emulate"),
    ]
    assert all(line["driver"] == "vm7" and line["seq"] for line in captured.entries)
