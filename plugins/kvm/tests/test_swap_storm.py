"""The stress of 2008: a guest that lives in swap, beside a process that allocates in a loop."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify_kvm.options import KvmOptions
from mmunotify_kvm.vm import VirtualMachine

PAGE = mn.PAGE_SIZE


@pytest.mark.parametrize("locks", [mn.RwSems, mn.SpinLocks], ids=["rwsem", "spin"])
@pytest.mark.parametrize("options", [{"mmu": "shadow"}, {"vcpus": 2}], ids=["shadow", "tdp"])
@pytest.mark.parametrize("pages", [256, pytest.param(1 << 14, marks=pytest.mark.long)])
async def test_no_stale_page_is_ever_read(
    pages: int, options: dict[str, Any], locks: type[mn.LockModel]
) -> None:
    """Each page has what the guest wrote to it a loop ago, however often it was swapped out.

    A page of somebody else's would raise StaleTranslation, or have other contents.
    """
    loops = 3
    frames = pages // 4 * 3
    async with Machine(frames=frames, swap=2 * pages, contents=True, locks=locks) as machine:
        mm = machine.new_mm("guest")
        vm = VirtualMachine(KvmOptions(**options))
        async with mm.attached(vm):
            base = await mm.mmap(pages * PAGE)
            await vm.set_user_memory_region(0, 0, pages * PAGE, base)
            turns = 0

            async def guest() -> None:
                nonlocal turns
                for loop in range(loops):
                    for gfn in range(pages):
                        vcpu = vm.vcpus[gfn % len(vm.vcpus)]
                        stamp = (gfn * 8 + loop).to_bytes(4, "little")
                        if loop:
                            old = (gfn * 8 + loop - 1).to_bytes(4, "little")
                            assert await vcpu.load(gfn * PAGE + 100, 4) == old
                        await vcpu.store(gfn * PAGE + 100, stamp)
                        await machine.cond_resched(64)
                        turns += 1

            async def hog() -> None:
                other = machine.new_mm("hog")
                for loop in range(loops):
                    at = await other.mmap(pages * PAGE)
                    await other.touch(at, pages * PAGE, write=True, value=loop + 1)
                    await other.munmap(at, pages * PAGE)
                    await machine.cond_resched(64)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(guest)
                tasks.start_soon(hog)
            assert turns == loops * pages
            assert vm.counters["mapped"] > 0
            assert vm.counters["refaults"] > 0
            # Memory accounting balances: a page is in a frame, in swap, or both for a while.
            assert vm.pages_4k <= frames - machine.frames.free
            for gfn in range(pages):
                expected = (gfn * 8 + loops - 1).to_bytes(4, "little")
                assert await mm.read(base + gfn * PAGE + 100, 4) == expected
        await mm.exit()
        assert machine.swap.used == 0
    assert (vm.active, vm.mmu.invalidate_in_progress, vm.pages_4k) == (0, 0, 0)
