"""What the plugin is to mmunotify: two drivers, their claims, and a device to run work on."""

from __future__ import annotations

from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify_xpmem import (
    DEFERRED,
    DRIVER,
    DeferredXpmemDriver,
    FileSpace,
    XpmemDriver,
    XpmemOptions,
)

PAGE = mn.PAGE_SIZE


def test_specs_fit_the_drivers() -> None:
    """The registry holds both classes to the callback contract and to their specs' claims."""
    registry = mn.Registry.for_testing([DRIVER, DEFERRED])
    assert registry.factory("xpmem") is XpmemDriver
    assert registry.factory("xpmem-deferred") is DeferredXpmemDriver


def test_options() -> None:
    """Options are checked before anything is made of them."""
    registry = mn.Registry.for_testing([DRIVER])
    with pytest.raises(mn.DriverConfigError, match="importers=-1"):
        registry.create("xpmem", importers=-1)
    with pytest.raises(mn.DriverConfigError, match="importers"):
        registry.create("xpmem", importer=1)


async def test_needs_sleeping_locks_or_the_other_one() -> None:
    """Where address spaces are kept by spinlocks the deferred driver serves, the other cannot."""
    with pytest.raises(mn.WrongColour):
        await mn.Notifiers(mn.SpinLocks).register(XpmemDriver())  # type: ignore[type-var]
    notifiers = mn.Notifiers(mn.SpinLocks)
    async with notifiers.attached(DeferredXpmemDriver()):
        pass


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("locks", [mn.RwSems, mn.SpinLocks])
async def test_importers_are_a_device(locks: type[mn.LockModel], pin: bool) -> None:
    """Each importer faults for itself; an invalidation takes the page away from all of them."""
    async with Machine(frames=4096, swap=64, locks=locks, contents=True) as machine:
        mm = machine.new_mm()
        kind: Any = XpmemDriver if locks is mn.RwSems else DeferredXpmemDriver
        driver = kind(XpmemOptions(importers=2, pin=pin))
        assert isinstance(XpmemDriver(), mn.Device)
        await mm.register(driver)
        address = await mm.mmap(8 * PAGE)
        await mm.write(address, b"x")
        for _ in range(2):
            assert not driver.access(address)
            await driver.fault(address)
        assert driver.access(address)
        assert driver.access(address, write=True)
        assert driver.counters["installed"] == 2
        await mm.madvise(address, PAGE, "dontneed")
        assert not driver.access(address)
        assert (driver.counters["mapped"], driver.counters["flushes"]) == (1, 1)
        await driver.fault(address)
        assert driver.counters["refaults"] == 1
        with pytest.raises(mn.BadAddress):
            await driver.fault(address + 64 * PAGE)
        await mm.munmap(address, 8 * PAGE)
        assert not machine.frames.pins


async def test_nobody_attached() -> None:
    """Without importers nothing is exported, and the device has nothing to do."""
    notifiers = mn.Notifiers()
    driver = XpmemDriver(XpmemOptions(importers=0))
    async with notifiers.attached(driver):
        await notifiers.invalidate(mn.Range(PAGE, 4 * PAGE))
        assert driver.access(PAGE)
    assert not driver.counters


async def test_nonblockable_sections() -> None:
    """The OOM reaper need not wait for importers of the process itself."""
    async with Machine(frames=4096, swap=64) as machine:
        mm = machine.new_mm()
        driver = XpmemDriver()
        await mm.register(driver)
        address = await mm.mmap(PAGE)
        await mm.write(address, b"x")
        await driver.fault(address)
        with mm.notifiers.invalidating_nonblock(mn.Range(address, address + PAGE)):
            assert not driver.access(address)


async def test_logs_the_counters_at_release() -> None:
    """The last thing that the driver does is to log what it has counted."""
    captured = LogCapture()
    logger = structlog.wrap_logger(None, processors=[captured])
    async with FileSpace(size=PAGE) as space:
        driver = XpmemDriver(logger=logger)
        await space.notifiers.register(driver)
        await driver.fault(space.base)
        await space.changed()
    (line,) = [entry for entry in captured.entries if entry["event"] == "xpmem_counted"]
    assert (line["installed"], line["mapped"], line["flushes"]) == (1, 1, 1)
