"""The plugin as its users get it: its spec, its options, and its driver as a device."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import structlog
from anyio.lowlevel import checkpoint
from structlog.testing import LogCapture

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify.model.check import GuestDriver
from mmunotify_kvm import DRIVER
from mmunotify_kvm.driver import CROWDED, KvmDriver
from mmunotify_kvm.options import KvmOptions

PAGE = mn.PAGE_SIZE


def test_spec_fits_the_driver() -> None:
    """The registry holds the class to the callback contract and to the spec's claims."""
    assert mn.Registry.for_testing([DRIVER]).factory("kvm") is KvmDriver


def test_is_a_device_with_a_guest() -> None:
    """Replays can use memory through it, and recorded guests can run in it."""
    driver = mn.Registry.for_testing([DRIVER]).create("kvm", vcpus=2, memory="64M")
    assert isinstance(driver, mn.Device)
    assert isinstance(driver, GuestDriver)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "64 apples"}, "size '64 apples': expected a number of bytes"),
        ({"memory": "0"}, "memory is '0': expected a size above 0"),
        ({"vcpus": 0}, "vcpus is 0: expected 1 to 4096"),
        ({"mmu": "ept"}, "mmu is 'ept': expected tdp or shadow"),
        ({"dirty": "never"}, "dirty is 'never': expected map or zap"),
        ({"cpus": 2}, "did you mean 'vcpus'"),
    ],
)
def test_bad_options_say_what_was_expected(options: dict[str, Any], message: str) -> None:
    """A wrong option is an error that names it and its value."""
    registry = mn.Registry.for_testing([DRIVER])
    with pytest.raises(mn.DriverConfigError, match=message):
        registry.create("kvm", **options)


@pytest.mark.parametrize("options", [{}, {"mmu": "shadow"}, {"vcpus": 3}, {"dirty": "zap"}])
async def test_host_memory_is_used_through_it(options: dict[str, Any]) -> None:
    """What is accessed misses once, and again when it has been announced."""
    async with Machine(frames=1024, swap=0) as machine:
        mm = machine.new_mm()
        driver = KvmDriver(KvmOptions(**options))
        async with mm.attached(driver):
            start = await mm.mmap(64 * PAGE)
            await mm.touch(start, 64 * PAGE, write=True)
            for page in range(64):
                address = start + page * PAGE
                if not driver.access(address, write=True):
                    await driver.fault(address, write=True)
                    assert driver.access(address, write=True)
            prefetches = options.get("mmu") == "shadow"
            assert driver.counters["faults"] == (8 if prefetches else 64)
            assert driver.counters["installed"] == 64
            await mm.munmap(start + 8 * PAGE, 8 * PAGE)
            assert driver.counters["mapped"] == 8
            assert driver.counters["flushes"] == 1
            assert not driver.access(start + 8 * PAGE)
            assert driver.access(start)


async def test_memory_is_what_the_guest_may_be_given() -> None:
    """Beyond `memory` an access is to a device: it maps nothing and harms nothing."""
    async with Machine(frames=1024, swap=0) as machine:
        mm = machine.new_mm()
        driver = KvmDriver(KvmOptions(memory="16K"))
        async with mm.attached(driver):
            start = await mm.mmap(8 * PAGE)
            await mm.touch(start, 8 * PAGE, write=True)
            for page in range(8):
                await driver.fault(start + page * PAGE)
            assert [driver.access(start + page * PAGE) for page in range(8)] == (
                [True] * 4 + [False] * 4
            )
            assert driver.counters["mmio"] == 4


async def test_an_access_outside_of_any_mapping_is_mmio() -> None:
    """There is no host memory to make guest memory of."""
    async with Machine(frames=64, swap=0) as machine:
        mm = machine.new_mm()
        driver = KvmDriver()
        async with mm.attached(driver):
            await driver.fault(0x1234000)
            assert driver.counters["mmio"] == 1
            assert not driver.access(0x1234000)


async def test_listens_without_a_primary() -> None:
    """An owner of memory that gives no primary MMU can still be listened to."""
    notifiers = mn.Notifiers(mn.SpinLocks)
    driver = KvmDriver()
    async with notifiers.attached(driver):
        with notifiers.invalidating_atomic(mn.Range(0x1000, 0x2000)):
            assert driver.active == 1
        assert driver.active == 0
        await driver.set_user_memory_region(0, 0, PAGE, 0x5000)
        with pytest.raises(mn.BadAddress, match="has no address space"):
            await driver.vcpus[0].load(0)


async def test_logs_what_it_counted_at_release() -> None:
    """The last thing that the driver does is to log its counters."""
    captured = LogCapture()
    logger = structlog.wrap_logger(None, processors=[captured])
    async with Machine(frames=64, swap=0) as machine:
        mm = machine.new_mm()
        driver = KvmDriver(logger=logger)
        async with mm.attached(driver):
            start = await mm.mmap(PAGE)
            await driver.fault(start, write=True)
    created, released = captured.entries
    assert (created["event"], created["change"]) == ("kvm_memslot_changed", "create")
    assert (released["event"], released["driver"]) == ("kvm_released", "kvm")
    assert released["installed"] == released["faults"] == 1


async def test_nothing_is_mapped_after_release() -> None:
    """When the address space exits every entry goes before any page is freed."""
    async with Machine(frames=64, swap=0) as machine:
        mm = machine.new_mm()
        driver = KvmDriver()
        await mm.register(driver)
        start = await mm.mmap(4 * PAGE)
        await driver.fault(start, write=True)
        assert driver.pages_4k == 1
        await mm.exit()
        assert driver.pages_4k == 0
        assert not driver.access(start)


async def test_tasks_that_use_new_memory_at_once() -> None:
    """Each makes a memslot or finds that another one has: all are served, and none overlaps."""
    async with Machine(frames=256, swap=0) as machine:
        mm = machine.new_mm()
        driver = KvmDriver()
        async with mm.attached(driver):
            starts = [await mm.mmap((number + 1) * PAGE) for number in range(6)]
            elsewhere = mm.notifiers.invalidating(mn.Range(1 << 20, (1 << 20) + PAGE))
            async with elsewhere, anyio.create_task_group() as tasks:
                for start in starts * 3:
                    tasks.start_soon(driver.fault, start)
                await checkpoint()
                tasks.cancel_scope.cancel()
            assert len(driver.memslots) == 0
            async with anyio.create_task_group() as tasks:
                for start in starts * 3:
                    tasks.start_soon(driver.fault, start)
            assert all(driver.access(start) for start in starts)
            assert driver.pages_4k == 6


async def test_memslots_of_mappings_that_are_gone_are_taken_back() -> None:
    """A program that maps and unmaps for ever does not fill the machine with memslots."""
    async with Machine(frames=64, swap=0) as machine:
        mm = machine.new_mm()
        driver = KvmDriver(KvmOptions(memory="4M"))
        async with mm.attached(driver):
            kept = await mm.mmap(PAGE)
            await driver.fault(kept, write=True)
            for number in range(3 * CROWDED):
                start = await mm.mmap(4 * PAGE, addr=(1 << 40) + number * 8 * PAGE)
                await driver.fault(start, write=True)
                assert driver.access(start, write=True)
                await mm.munmap(start, 4 * PAGE)
            assert len(driver.memslots) <= CROWDED
            assert driver.access(kept)
            assert driver.counters["mmio"] == 0
