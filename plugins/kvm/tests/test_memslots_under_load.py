"""memslot_modification_stress_test and memslot_perf_test of KVM's selftests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint

import mmunotify as mn
from mmunotify_kvm.errors import MmioExit

if TYPE_CHECKING:
    from mmunotify_kvm.vcpu import VCpu

    from .conftest import Boot

PAGE = mn.PAGE_SIZE
DUMMY = 1


async def test_memslot_modification_stress(boot: Boot) -> None:
    """A dummy slot comes and goes in a loop while vCPUs touch memory: no fault is lost."""
    async with boot(64, vcpus=4) as guest:
        vm = guest.vm
        done = False
        touched = 0

        async def touch(vcpu: VCpu) -> None:
            nonlocal touched
            while not done:
                for gfn in range(vcpu.id, 64, 4):
                    await vcpu.store(gfn * PAGE, bytes([vcpu.id]))
                    touched += 1
                    if gfn % 16 == 0:
                        await guest.mm.madvise(guest.host(gfn), PAGE, "dontneed")
                    await checkpoint()

        async with anyio.create_task_group() as tasks:
            for vcpu in vm.vcpus:
                tasks.start_soon(touch, vcpu)
            for _ in range(25):
                await vm.set_user_memory_region(DUMMY, 1 << 30, PAGE, guest.base)
                await checkpoint()
                await vm.set_user_memory_region(DUMMY, 0, 0)
                await checkpoint()
            done = True
        assert touched >= 64
        assert vm.counters["efault"] == vm.counters["mmio"] == 0
        assert vm.counters["slot_updates"] == 1 + 25 * 3
        assert len(vm.memslots) == 1
        assert vm.srcu.readers == 0


MAGIC_GUEST, MAGIC_HOST = b"\xca\xfe", b"\xbe\xef"


async def test_map_and_unmap(boot: Boot) -> None:
    """Slots over fresh host memory: the guest sees what the host wrote, the host what it wrote."""
    async with boot(1) as guest:
        vm, mm, vcpu = guest.vm, guest.mm, guest.vm.vcpus[0]
        base = await mm.mmap(32 * PAGE)
        for _ in range(3):
            await mm.write(base, MAGIC_HOST * 16)
            await vm.set_user_memory_region(DUMMY, 1 << 20, 32 * PAGE, base)
            assert await vcpu.load(1 << 20, 2) == MAGIC_HOST
            await vcpu.store((1 << 20) + 31 * PAGE, MAGIC_GUEST)
            assert await mm.read(base + 31 * PAGE, 2) == MAGIC_GUEST
            await vm.set_user_memory_region(DUMMY, 0, 0)
            with pytest.raises(MmioExit):
                await vcpu.load(1 << 20, 2)
            assert await mm.read(base + 31 * PAGE, 2) == MAGIC_GUEST


@pytest.mark.parametrize("chunk", [64, 8, 1])
async def test_unmap(boot: Boot, chunk: int) -> None:
    """Host memory is dropped in chunks: the guest sees zeros there, and its own elsewhere."""
    async with boot(64) as guest:
        vcpu = guest.vm.vcpus[0]
        for gfn in range(64):
            await vcpu.store(gfn * PAGE, MAGIC_GUEST)
        for start in range(0, 64, chunk):
            await guest.mm.madvise(guest.host(start), chunk * PAGE, "dontneed")
            for gfn in range(start, start + chunk):
                assert await vcpu.load(gfn * PAGE, 2) == b"\0\0"
                await vcpu.store(gfn * PAGE, MAGIC_HOST)
            if start + chunk < 64:
                assert await vcpu.load((start + chunk) * PAGE, 2) == MAGIC_GUEST
        assert guest.vm.counters["flushes"] >= 64 // chunk
        assert guest.vm.counters["mapped"] >= 64


@pytest.mark.parametrize("active", [True, False])
async def test_move(boot: Boot, active: bool) -> None:
    """A slot moves and moves back while the guest works: in it, or elsewhere."""
    async with boot(16, vcpus=2) as guest:
        vm, worker = guest.vm, guest.vm.vcpus[1]
        here, there = 64 * PAGE, 256 * PAGE
        other = await guest.mm.mmap(16 * PAGE)
        await vm.set_user_memory_region(DUMMY, here, 16 * PAGE, other)
        await guest.mm.write(other, MAGIC_HOST)
        start = here if active else 0
        done = False
        rounds = 0

        async def work() -> None:
            nonlocal rounds
            while not done:
                for page in range(16):
                    try:
                        await worker.store(start + page * PAGE + 8, MAGIC_GUEST)
                        assert await worker.load(start + page * PAGE + 8, 2) == MAGIC_GUEST
                    except MmioExit:
                        assert active, "memory that does not move was missing"
                    await checkpoint()
                rounds += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            for _ in range(10):
                for gpa in (there, here):
                    await vm.set_user_memory_region(DUMMY, gpa, 16 * PAGE, other)
                    assert await vm.vcpus[0].load(gpa, 2) == MAGIC_HOST
                    for _ in range(5):
                        await checkpoint()
            done = True
        assert rounds >= 2


async def test_rw(boot: Boot) -> None:
    """Guest and host write halves of the same pages in turns, and read the other's."""
    async with boot(16) as guest:
        vcpu = guest.vm.vcpus[0]
        for turn in range(4):
            for gfn in range(16):
                await vcpu.store(gfn * PAGE, bytes([turn, gfn]))
                await guest.mm.write(guest.host(gfn) + 2048, bytes([gfn, turn]))
            for gfn in range(16):
                assert await vcpu.load(gfn * PAGE + 2048, 2) == bytes([gfn, turn])
                assert await guest.mm.read(guest.host(gfn), 2) == bytes([turn, gfn])
        assert guest.vm.counters["faults"] == 16


async def test_accesses_across_pages_and_slots(boot: Boot) -> None:
    """One load or store may span pages, and slots whose host memory is far apart."""
    async with boot(2) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        other = await guest.mm.mmap(8 * PAGE)
        await vm.set_user_memory_region(DUMMY, 2 * PAGE, PAGE, other + 4 * PAGE)
        data = bytes(range(1, 201)) * 50
        await vcpu.store(PAGE - 500, data[: 2 * PAGE + 400])
        assert await vcpu.load(PAGE - 500, 2 * PAGE + 400) == data[: 2 * PAGE + 400]
        assert await guest.mm.read(other + 4 * PAGE, 4) == data[PAGE + 500 : PAGE + 504]
