"""demand_paging_test of KVM's selftests: somebody else supplies each page when it is missed."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import anyio
import pytest

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify.model.flags import MAP_SHARED, PROT_READ, PROT_WRITE
from mmunotify_kvm.options import KvmOptions
from mmunotify_kvm.vm import VirtualMachine

if TYPE_CHECKING:
    from mmunotify_kvm.vcpu import VCpu

    from .conftest import Boot

PAGE = mn.PAGE_SIZE
PAGES, VCPUS = 64, 4


@pytest.mark.parametrize("overlapping", [True, False])
async def test_demand_paging(boot: Boot, overlapping: bool) -> None:
    """Each page is supplied once, and every vCPU finishes: with memory of its own, or shared."""
    async with boot(PAGES, vcpus=VCPUS) as guest:
        mm, vm = guest.mm, guest.vm
        uffd = await mm.userfaultfd()
        await uffd.register(guest.base, PAGES * PAGE, mode="missing")
        send, receive = anyio.create_memory_object_stream[int](PAGES * VCPUS)
        asked: Counter[int] = Counter()
        uffd.on_event = lambda address, flags: send.send_nowait(address)
        finished = 0

        async def supply() -> None:
            async for address in receive:
                page = (address - guest.base) // PAGE
                if not asked[page]:
                    await uffd.copy(guest.host(page), bytes([page + 1]) * PAGE)
                asked[page] += 1

        async def work(vcpu: VCpu) -> None:
            nonlocal finished
            own = range(PAGES) if overlapping else range(vcpu.id, PAGES, VCPUS)
            for gfn in own:
                assert await vcpu.load(gfn * PAGE) == bytes([gfn + 1])
                await vcpu.store(gfn * PAGE + 8, bytes([vcpu.id]))
            finished += 1
            if finished == VCPUS:
                send.close()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supply)
            for vcpu in vm.vcpus:
                tasks.start_soon(work, vcpu)
        receive.close()
        assert asked.keys() == set(range(PAGES))
        # Each vCPU that misses a page before it is there asks for it, and nobody a second time.
        assert max(asked.values()) <= (VCPUS if overlapping else 1)
        assert vm.pages_4k == PAGES


async def test_demand_paging_of_what_a_file_has_already() -> None:
    """The same with minor faults: the supplier fills the file, then lets the page be mapped."""
    async with Machine(frames=1 << 10, swap=1 << 10, contents=True) as machine:
        mm = machine.new_mm("qemu")
        file = machine.file(PAGES, fill=True)
        size, protection = PAGES * PAGE, PROT_READ | PROT_WRITE
        filler = await mm.mmap(size, protection, MAP_SHARED, file)
        base = await mm.mmap(size, protection, MAP_SHARED, file)
        uffd = await mm.userfaultfd()
        await uffd.register(base, size, mode="minor")
        send, receive = anyio.create_memory_object_stream[int](PAGES * VCPUS)
        asked: Counter[int] = Counter()
        uffd.on_event = lambda address, flags: send.send_nowait(address)
        vm = VirtualMachine(KvmOptions(vcpus=VCPUS))
        finished = 0

        async def supply() -> None:
            async for address in receive:
                page = (address - base) // PAGE
                await mm.write(filler + page * PAGE, bytes([100 + page]))
                await uffd.continue_(address, PAGE)
                asked[page] += 1

        async def work(vcpu: VCpu) -> None:
            nonlocal finished
            for gfn in range(vcpu.id, PAGES, VCPUS):
                assert await vcpu.load(gfn * PAGE) == bytes([100 + gfn])
                await vcpu.store(gfn * PAGE + 8, bytes([vcpu.id]))
            finished += 1
            if finished == VCPUS:
                send.close()

        async with mm.attached(vm):
            await vm.set_user_memory_region(0, 0, size, base, 0)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(supply)
                for vcpu in vm.vcpus:
                    tasks.start_soon(work, vcpu)
            receive.close()
            assert asked == dict.fromkeys(range(PAGES), 1)
            assert vm.pages_4k == PAGES


async def test_a_write_protected_page_is_written_when_it_is_let(boot: Boot) -> None:
    """A guest's store to what the host has write-protected waits for the host, without spinning."""
    async with boot(8) as guest:
        mm, vcpu = guest.mm, guest.vm.vcpus[0]
        await vcpu.store(0, b"\1")
        uffd = await mm.userfaultfd()
        await uffd.register(guest.base, 8 * PAGE, mode="wp")
        await uffd.writeprotect(guest.base, 8 * PAGE, True)
        asked = anyio.Event()
        uffd.on_event = lambda address, flags: asked.set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vcpu.store, 0, b"\2")
            await asked.wait()
            assert await guest.mm.read(guest.base, 1) == b"\1"
            faults = guest.vm.counters["faults"]
            await uffd.writeprotect(guest.base, 8 * PAGE, False)
        assert await guest.mm.read(guest.base, 1) == b"\2"
        assert guest.vm.counters["faults"] <= faults + 1
