"""set_memory_region_test of KVM's selftests: memslots come, go, move and change under a guest.

mmio_during_vectoring and the tests of private memory have no counterpart: there are no exceptions
to deliver here, and no guest_memfd.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint

import mmunotify as mn
from mmunotify_kvm.errors import KvmError, MmioExit
from mmunotify_kvm.memslots import LOG_DIRTY_PAGES, MAX_SLOTS, READONLY
from mmunotify_kvm.vm import VirtualMachine

if TYPE_CHECKING:
    from mmunotify_kvm.vcpu import VCpu

    from .conftest import Boot

PAGE = mn.PAGE_SIZE
MMIO = -1


async def look(vcpu: VCpu, address: int) -> int:
    """A 64-bit load; MMIO where there is no memory."""
    try:
        return int.from_bytes(await vcpu.load(address, 8), "little")
    except MmioExit:
        return MMIO


async def test_move_memory_region(boot: Boot) -> None:
    """A slot moved down by a page, and back: a guest that watches never reads by the old pfn.

    Before the move its address has the first page, with 1; after it the second, with 0, or during
    it MMIO. While it is moved the host writes 2 to the first page, which the guest cannot see.
    """
    async with boot(4) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        gpa, size = 64 * PAGE, 2 * PAGE
        await vm.set_user_memory_region(0, 0, 0)
        await guest.mm.write(guest.base, b"\1")
        await vm.set_user_memory_region(10, gpa, size, guest.base)
        may_see = {1}
        seen: set[int] = set()
        done = False

        async def watch() -> None:
            while not done:
                found = await look(vcpu, gpa)
                assert found in may_see
                seen.add(found)
                await checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            for _ in range(10):
                await checkpoint()
                may_see = {1, MMIO, 0}
                await vm.set_user_memory_region(10, gpa - PAGE, size, guest.base)
                may_see = {0}
                await guest.mm.write(guest.base, b"\2")
                assert await look(vcpu, gpa - PAGE) == 2
                await checkpoint()
                await guest.mm.write(guest.base, b"\1")
                may_see = {0, MMIO, 1}
                await vm.set_user_memory_region(10, gpa, size, guest.base)
                may_see = {1}
                assert await look(vcpu, gpa - PAGE) == MMIO
            done = True
        assert {0, 1} <= seen


async def test_delete_memory_region(boot: Boot) -> None:
    """What is deleted is MMIO for the guest; made again it has its contents, elsewhere others."""
    async with boot(4) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        await vcpu.store(0, b"\x07")
        await vm.set_user_memory_region(0, 0, 0)
        assert await look(vcpu, 0) == MMIO
        assert await look(vcpu, 0) == MMIO
        assert vm.counters["faults"] == 2  # that it is MMIO is remembered, and asked once
        with pytest.raises(MmioExit, match=r"MMIO store of 1 bytes at guest physical 0x1000"):
            await vcpu.store(PAGE, b"\x01")
        await vm.set_user_memory_region(0, 0, 4 * PAGE, guest.base)
        assert await look(vcpu, 0) == 7
        assert vm.pages_4k == 1


async def test_zero_memory_regions() -> None:
    """A machine without any memory runs, and every access of it is MMIO."""
    vm = VirtualMachine()
    assert await look(vm.vcpus[0], 0) == MMIO


async def test_invalid_memory_region_flags(boot: Boot) -> None:
    """Flags that do not exist, or that a slot cannot change, are EINVAL and change nothing."""
    async with boot(4) as guest:
        vm, base = guest.vm, guest.base
        for bit in range(2, 32):
            with pytest.raises(KvmError, match="expected LOG_DIRTY_PAGES and READONLY") as caught:
                await vm.set_user_memory_region(1, 1 << 30, PAGE, base, 1 << bit)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(KvmError, match="READONLY stay as they are"):
            await vm.set_user_memory_region(0, 0, 4 * PAGE, base, READONLY)
        await vm.set_user_memory_region(0, 0, 4 * PAGE, base, LOG_DIRTY_PAGES)
        assert list(vm.memslots.by_id) == [0]


@pytest.mark.parametrize(
    ("slot", "gpa", "size", "hva"),
    [
        (-1, 0, PAGE, 0),
        (MAX_SLOTS, 0, PAGE, 0),
        (1, 1, PAGE, 0),
        (1, PAGE, PAGE + 1, 0),
        (1, PAGE, PAGE, 5),
        (1, -PAGE, PAGE, 0),
        (1, 1 << 64, PAGE, 0),
        (1, PAGE, PAGE << 31, 0),
        (1, PAGE, 0, 0),  # deletes what is not there
        (0, 0, PAGE, 1 << 30),  # another size
    ],
)
async def test_values_that_no_slot_can_have(
    boot: Boot, slot: int, gpa: int, size: int, hva: int
) -> None:
    """They are EINVAL, and the slots are as they were."""
    async with boot(4) as guest:
        with pytest.raises(KvmError) as caught:
            await guest.vm.set_user_memory_region(slot, gpa, size, hva)
        assert caught.value.errno == errno.EINVAL
        assert [each.id for each in guest.vm.memslots] == [0]


async def test_overlapping_memory_regions(boot: Boot) -> None:
    """Two slots may have the same host memory, but not the same gfn."""
    async with boot(8) as guest:
        vm, base = guest.vm, guest.base
        for gpa, size in ((0, PAGE), (7 * PAGE, 2 * PAGE), (3 * PAGE, PAGE), (0, 64 * PAGE)):
            with pytest.raises(KvmError, match="meet those of slot 0") as caught:
                await vm.set_user_memory_region(1, gpa, size, base)
            assert caught.value.errno == errno.EEXIST
        await vm.set_user_memory_region(1, 8 * PAGE, 8 * PAGE, base)
        with pytest.raises(KvmError, match="meet those of slot 0"):
            await vm.set_user_memory_region(1, 4 * PAGE, 8 * PAGE, base)
        await vm.vcpus[0].store(3 * PAGE, b"x")
        assert await vm.vcpus[0].load(11 * PAGE) == b"x"
        await guest.mm.madvise(base + 3 * PAGE, PAGE, "dontneed")
        assert vm.counters["mapped"] == 2  # both mappings of the page
        assert await vm.vcpus[0].load(11 * PAGE) == b"\0"


async def test_add_max_memory_regions() -> None:
    """All numbers can be used, one more cannot; and all of them are found."""
    vm = VirtualMachine()
    for number in range(MAX_SLOTS):
        await vm.set_user_memory_region(number, number * PAGE, PAGE, (1 << 30) + number * PAGE)
    with pytest.raises(KvmError, match=f"expected 0 to {MAX_SLOTS - 1}"):
        await vm.set_user_memory_region(MAX_SLOTS, MAX_SLOTS * PAGE, PAGE, 1 << 40)
    for number in range(MAX_SLOTS):
        slot = vm.memslots.find(number)
        assert slot is not None
        assert slot.id == number
        assert list(vm.memslots.overlapping(slot.hva, slot.hva + 1)) == [slot]


async def test_read_only_memory_is_mmio_for_stores(boot: Boot) -> None:
    """A guest reads a READONLY slot like memory; its stores exit, and change nothing."""
    async with boot(4, flags=READONLY, mmu="shadow") as guest:
        vcpu = guest.vm.vcpus[0]
        await guest.mm.write(guest.base, b"rom")
        assert await vcpu.load(0, 3) == b"rom"
        with pytest.raises(MmioExit) as caught:
            await vcpu.store(0, b"ram")
        assert (caught.value.address, caught.value.data) == (0, b"ram")
        assert await guest.mm.read(guest.base, 3) == b"rom"
        assert guest.vm.counters["prefetched"] == 0


async def test_cancelled_update_has_not_happened(boot: Boot) -> None:
    """A task that is cancelled while its update waits for a section leaves the slots alone."""
    async with boot(4) as guest:
        vm = guest.vm
        rng = mn.Range(1 << 40, (1 << 40) + PAGE)
        async with guest.mm.notifiers.invalidating(rng):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(vm.set_user_memory_region, 0, 0, 0)
                for _ in range(3):
                    await checkpoint()
                tasks.cancel_scope.cancel()
            assert 0 in vm.memslots.by_id
        assert await vm.vcpus[0].load(0) == b"\0"
        await vm.set_user_memory_region(0, 0, 0)
        await vm.set_user_memory_region(0, 0, PAGE, guest.base)
        assert await vm.vcpus[0].load(0) == b"\0"
