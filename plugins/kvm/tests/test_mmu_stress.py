"""mmu_stress_test of KVM's selftests: all vCPUs hit all memory while the host changes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint

import mmunotify as mn
from mmunotify.model.flags import PROT_READ, PROT_WRITE
from mmunotify_kvm.errors import MmioExit

if TYPE_CHECKING:
    from mmunotify_kvm.vcpu import VCpu

    from .conftest import Boot

PAGE = mn.PAGE_SIZE
VCPUS = 4
SLOTS = 8
SLOT_PAGES = 16
PAGES = SLOTS * SLOT_PAGES


async def test_mmu_stress(boot: Boot) -> None:
    """Stages 0 to 4: write, write after a reset, read, write while read-only, lose memory."""
    async with boot(1, vcpus=VCPUS) as guest:
        vm, mm = guest.vm, guest.mm
        base = await mm.mmap(PAGES * PAGE)
        await vm.set_user_memory_region(0, 0, 0)
        for slot in range(SLOTS):
            start = slot * SLOT_PAGES * PAGE
            await vm.set_user_memory_region(slot, start, SLOT_PAGES * PAGE, base + start)

        async def write_all(vcpu: VCpu) -> None:
            for gfn in range(vcpu.id, PAGES, VCPUS):
                await vcpu.store(gfn * PAGE, bytes([vcpu.id + 1]))
                await checkpoint()

        async def read_all(vcpu: VCpu) -> None:
            for gfn in range(PAGES):
                assert await vcpu.load(gfn * PAGE) == bytes([gfn % VCPUS + 1])

        async def all_vcpus(work: object) -> None:
            async with anyio.create_task_group() as tasks:
                for vcpu in vm.vcpus:
                    tasks.start_soon(work, vcpu)  # type: ignore[arg-type]

        await all_vcpus(write_all)  # stage 0
        assert vm.pages_4k == PAGES
        assert vm.zap_all() == PAGES
        await all_vcpus(write_all)  # stage 1, after the MMU was reset
        assert vm.counters["refaults"] == PAGES
        await all_vcpus(read_all)  # stage 2

        # Stage 3: each vCPU writes in a loop until it cannot any more, and once again when it can.
        refused: set[int] = set()
        protecting = protected = writable_again = False

        async def write_until_refused(vcpu: VCpu) -> None:
            while vcpu.id not in refused:
                for gfn in range(vcpu.id, PAGES, VCPUS):
                    await checkpoint()
                    try:
                        await vcpu.store(gfn * PAGE + 8, b"\xee")
                    except mn.BadAddress:
                        assert protecting
                        refused.add(vcpu.id)
                        break
                    assert not protected or writable_again, "a write landed in read-only memory"
            while not writable_again:
                await checkpoint()
            await write_all(vcpu)

        async with anyio.create_task_group() as tasks:
            for vcpu in vm.vcpus:
                tasks.start_soon(write_until_refused, vcpu)
            for _ in range(5):
                await checkpoint()
            protecting = True
            await mm.mprotect(base, PAGES * PAGE, PROT_READ)
            protected = True
            while len(refused) < VCPUS:
                await checkpoint()
            await mm.mprotect(base, PAGES * PAGE, PROT_READ | PROT_WRITE)
            writable_again = True
        await all_vcpus(read_all)

        # Stage 4: every other memslot goes, and half of what is left of the memory.
        for slot in range(0, SLOTS, 2):
            await vm.set_user_memory_region(slot, 0, 0)
        for slot in range(1, SLOTS, 2):
            await mm.munmap(base + slot * SLOT_PAGES * PAGE, SLOT_PAGES // 2 * PAGE)
        for gfn in range(PAGES):
            slot, page = divmod(gfn, SLOT_PAGES)
            try:
                found = await vm.vcpus[0].load(gfn * PAGE)
            except MmioExit:
                assert slot % 2 == 0
            except mn.BadAddress:
                assert slot % 2 == 1
                assert page < SLOT_PAGES // 2
            else:
                assert slot % 2 == 1
                assert page >= SLOT_PAGES // 2
                assert found == bytes([gfn % VCPUS + 1])
        assert vm.pages_4k == SLOTS // 2 * SLOT_PAGES // 2
        assert (vm.active, vm.mmu.invalidate_in_progress) == (0, 0)
