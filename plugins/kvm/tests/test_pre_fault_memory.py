"""pre_fault_memory_test of KVM's selftests: memory mapped ahead is used without a fault."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

import mmunotify as mn
from mmunotify_kvm.errors import KvmError

if TYPE_CHECKING:
    from .conftest import Boot

PAGE = mn.PAGE_SIZE
PAGES = 513


@pytest.mark.parametrize("populated", [True, False])
async def test_no_fault_after_it(boot: Boot, populated: bool) -> None:
    """Every page is mapped, whether the host had it or not, and the guest never exits for it."""
    async with boot(PAGES) as guest:
        vm = guest.vm
        if populated:
            await guest.mm.touch(guest.base, PAGES * PAGE, write=True, value=7)
        assert await vm.pre_fault_memory(0, PAGES * PAGE) == 0
        before = dict(vm.counters)
        for gfn in range(PAGES):
            assert await vm.vcpus[0].load(gfn * PAGE) == (b"\7" if populated else b"\0")
        assert vm.counters["faults"] == before["faults"]
        assert vm.counters["installed"] == PAGES
        assert await vm.pre_fault_memory(0, PAGES * PAGE) == 0
        assert vm.counters["installed"] == PAGES


async def test_what_is_left(boot: Boot) -> None:
    """Where memory ends within the range the rest is left; where it begins outside it is ENOENT."""
    async with boot(PAGES) as guest:
        vm = guest.vm
        assert await vm.pre_fault_memory(512 * PAGE, 2 * PAGE) == PAGE
        with pytest.raises(KvmError) as caught:
            await vm.pre_fault_memory(PAGES * PAGE, PAGE)
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(("gpa", "size"), [(1, PAGE), (0, 5), (0, 0), (-PAGE, PAGE)])
async def test_bad_ranges(boot: Boot, gpa: int, size: int) -> None:
    """What is no range of whole pages is EINVAL."""
    async with boot(4) as guest:
        with pytest.raises(KvmError) as caught:
            await guest.vm.pre_fault_memory(gpa, size)
        assert caught.value.errno == errno.EINVAL


async def test_the_host_has_no_page(boot: Boot) -> None:
    """Pages before a hole of the host are mapped, the rest is left; at the hole it is an error."""
    async with boot(8) as guest:
        await guest.mm.munmap(guest.host(4), PAGE)
        assert await guest.vm.pre_fault_memory(0, 8 * PAGE) == 4 * PAGE
        with pytest.raises(mn.BadAddress):
            await guest.vm.pre_fault_memory(4 * PAGE, PAGE)


async def test_huge_memory_is_mapped_huge(boot: Boot) -> None:
    """Two pages of 2 MiB are two mappings."""
    async with boot(1024, align=mn.PMD_SIZE, advice="hugepage") as guest:
        await guest.mm.touch(guest.base, 1024 * PAGE, write=True)
        assert await guest.vm.pre_fault_memory(0, 1024 * PAGE) == 0
        assert (guest.vm.pages_2m, guest.vm.pages_4k) == (2, 0)


async def test_is_announced_like_any_mapping(boot: Boot) -> None:
    """What was mapped ahead is dropped when the host says so, dirty state included."""
    async with boot(64) as guest:
        await guest.mm.touch(guest.base, 64 * PAGE, write=True, value=1)
        await guest.vm.pre_fault_memory(0, 64 * PAGE)
        await guest.mm.madvise(guest.base, 64 * PAGE, "dontneed")
        assert guest.vm.counters["mapped"] == 64
        assert guest.vm.pages_4k == 0
        assert await guest.vm.pre_fault_memory(0, 64 * PAGE) == 0
        assert guest.vm.counters["refaults"] == 64
