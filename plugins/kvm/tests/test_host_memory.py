"""What the host does to the guest's memory: every era and batching, balloons, files, the exit."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify.model.flags import MAP_SHARED, PROT_READ, PROT_WRITE
from mmunotify.model.invariants import InvariantChecker
from mmunotify_kvm.balloon import Balloon
from mmunotify_kvm.errors import KvmError
from mmunotify_kvm.options import KvmOptions
from mmunotify_kvm.pfn_cache import GfnToPfnCache
from mmunotify_kvm.vm import VirtualMachine

if TYPE_CHECKING:
    from .conftest import Boot

PAGE = mn.PAGE_SIZE
ERAS = [
    *({"era": "linux-6", "batching": batching} for batching in ("range", "gather")),
    *({"era": "linux-6", "batching": batching} for batching in ("pte512", "page")),
    {"era": "v16"},
    {"era": "v16", "batching": "page", "locks": mn.SpinLocks},
    {"locks": mn.SpinLocks},
]


@pytest.mark.parametrize("era", ERAS, ids=lambda era: " ".join(map(str, era.values())))
async def test_no_stale_page_in_any_era(boot: Boot, era: dict[str, Any]) -> None:
    """However changes are told, the guest uses its own pages, and its writes are not lost."""
    async with boot(32, machine=era, vcpus=2) as guest:
        mm, vm = guest.mm, guest.vm
        vcpu, other = vm.vcpus
        for gfn in range(32):
            await vcpu.store(gfn * PAGE, bytes([gfn + 1]))
        await mm.madvise(guest.base, 8 * PAGE, "pageout")
        child = await mm.fork()
        for gfn in range(32):
            assert await other.load(gfn * PAGE) == bytes([gfn + 1])
            await other.store(gfn * PAGE, bytes([gfn + 101]))
        for gfn in range(32):
            assert await child.read(guest.host(gfn), 1) == bytes([gfn + 1])
        await child.exit()
        await mm.madvise(guest.host(16), 8 * PAGE, "dontneed")
        await mm.mremap(guest.host(24), 8 * PAGE, 8 * PAGE, 3, guest.host(16))
        for gfn in range(24):
            expected = gfn + 101 if gfn < 16 else gfn + 109
            assert await vcpu.load(gfn * PAGE) == bytes([expected])
        with pytest.raises(mn.BadAddress):
            await vcpu.load(24 * PAGE)
        assert (vm.active, vm.mmu.invalidate_in_progress) == (0, 0)


async def test_the_contract_is_kept_under_a_guest(boot: Boot) -> None:
    """A checker of the thirteen rules watches what the host announces while a guest runs."""
    async with boot(16, machine={"frames": 256}) as guest:
        with InvariantChecker(guest.machine):
            for turn in range(3):
                for gfn in range(16):
                    await guest.vm.vcpus[0].store(gfn * PAGE, bytes([turn]))
                await guest.mm.madvise(guest.base, 16 * PAGE, "pageout")
                child = await guest.mm.fork()
                await guest.vm.vcpus[0].store(0, b"x")
                await child.exit()


async def test_a_write_is_not_lost_to_lazy_free(boot: Boot) -> None:
    """MADV_FREE, a guest's write, reclaim: the page is written to, so it stays (I-DIRTY)."""
    for dirty in ("map", "zap"):
        async with boot(4, machine={"frames": 128}, dirty=dirty) as guest:
            vcpu = guest.vm.vcpus[0]
            await vcpu.store(0, b"old")
            await guest.mm.madvise(guest.base, 4 * PAGE, "free")
            await vcpu.store(0, b"new")
            await guest.mm.madvise(guest.base, 4 * PAGE, "pageout")
            assert await vcpu.load(0, 3) == b"new"


@pytest.mark.parametrize("dirty", ["map", "zap"])
async def test_a_write_to_a_file_is_written_back(boot: Boot, dirty: str) -> None:
    """What a guest writes to a shared file is in the file, also when its pages are dropped."""
    async with boot(1, dirty=dirty) as guest:
        file = guest.machine.file(pages=4, kind="ext4", fill=True)
        at = await guest.mm.mmap(4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file)
        await guest.vm.set_user_memory_region(1, 1 << 20, 4 * PAGE, at)
        vcpu = guest.vm.vcpus[0]
        assert await vcpu.load(1 << 20) == b"\1"
        await vcpu.store(1 << 20, b"\x63")
        await guest.machine.fsync(file)
        await guest.mm.munmap(at, 4 * PAGE)
        guest.machine.drop_cache(file)
        assert await guest.machine.pread(file, 0, 1) == b"\x63"


async def test_a_balloon(boot: Boot) -> None:
    """What the guest gives back is the host's at once; taken back, it is zeros."""
    async with boot(64) as guest:
        vm, vcpu = guest.vm, guest.vm.vcpus[0]
        for gfn in range(64):
            await vcpu.store(gfn * PAGE, b"\1")
        free = guest.machine.frames.free
        balloon = Balloon(vm, lambda at, size: guest.mm.madvise(at, size, "dontneed"))
        await balloon.inflate([*range(8, 24), 40])
        assert guest.machine.frames.free == free + 17
        assert vm.counters["flushes"] == 2  # as few ranges as there are
        assert vm.pages_4k == 64 - 17
        with pytest.raises(KvmError, match="not the guest's to give") as caught:
            await balloon.inflate([1, 8, 2])
        assert caught.value.errno == errno.EINVAL
        assert balloon.deflate(16) == [1, 2, *range(8, 22)]
        assert balloon.pages == {22, 23, 40}
        assert await vcpu.load(8 * PAGE) == b"\0"
        assert await vcpu.load(30 * PAGE) == b"\1"


async def test_a_pfn_cache(boot: Boot) -> None:
    """A page of the hypervisor's own use is good until it is announced, and can be had again."""
    async with boot(4) as guest:
        vm = guest.vm
        with GfnToPfnCache(vm, PAGE) as cache:
            assert not cache.check()
            with pytest.raises(KvmError, match="check it before use"):
                cache.read(0, 1)
            await cache.refresh()
            cache.write(8, b"now")
            assert await vm.vcpus[0].load(PAGE + 8, 3) == b"now"
            await guest.mm.madvise(guest.base, PAGE, "dontneed")
            assert cache.check()
            await guest.mm.madvise(guest.base, 4 * PAGE, "pageout")
            assert not cache.check()
            await cache.refresh()
            assert cache.read(8, 3) == b"now"
            # Memslots have changed: it might be another page now.
            await vm.set_user_memory_region(7, 1 << 30, PAGE, guest.base)
            assert not cache.check()
            await cache.refresh()
            assert vm.counters["pfn_refreshes"] == 3
            assert vm.counters["pfn_invalidations"] == 1
            await vm.set_user_memory_region(0, 0, 0)
            with pytest.raises(KvmError, match="no memslot there"):
                await cache.refresh()
        assert vm.pfn_caches == []
    with pytest.raises(KvmError, match="not the start of a page"):
        GfnToPfnCache(vm, 5)


async def test_unregistered_inside_a_section(boot: Boot) -> None:
    """No end will come any more: nobody waits for it, and nothing stays counted."""
    async with Machine(frames=64, swap=0) as machine:
        mm = machine.new_mm()
        vm = VirtualMachine(KvmOptions())
        sub = await mm.register(vm)
        base = await mm.mmap(PAGE)
        await vm.set_user_memory_region(0, 0, PAGE, base)
        section = mm.notifiers.invalidating(mn.Range(base, base + PAGE))
        async with section:
            assert vm.active == 1
            await mm.unregister(sub)
        assert (vm.active, vm.mmu.invalidate_in_progress) == (0, 0)
        await vm.set_user_memory_region(0, 0, 0)


async def test_exit_under_a_guest() -> None:
    """The process exits: its pages are freed with nothing mapped, and accesses fail cleanly."""
    async with Machine(frames=64, swap=0) as machine:
        mm = machine.new_mm()
        vm = VirtualMachine()
        await mm.register(vm)
        base = await mm.mmap(8 * PAGE)
        await vm.set_user_memory_region(0, 0, 8 * PAGE, base)
        for gfn in range(8):
            await vm.vcpus[0].store(gfn * PAGE, b"")
        free = machine.frames.free
        await mm.exit()
        assert machine.frames.free == free + 8
        assert vm.pages_4k == 0
        with pytest.raises(mn.BadAddress):
            await vm.vcpus[0].load(0)
