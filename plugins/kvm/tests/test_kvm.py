from __future__ import annotations

import structlog
from structlog.testing import LogCapture

import mmunotify as mn
from mmunotify_kvm import DRIVER
from mmunotify_kvm.driver import KvmDriver


def test_spec_fits_the_driver() -> None:
    """The registry holds the class to the callback contract and to the spec's claims."""
    assert mn.Registry.for_testing([DRIVER]).factory("kvm") is KvmDriver


async def test_counts_callbacks_and_pages() -> None:
    """Starts, ends and pages of everything that the address space announces are counted."""
    notifiers = mn.Notifiers()
    driver = KvmDriver()
    async with notifiers.attached(driver):
        await notifiers.invalidate(mn.Range(0x1000, 0x4000))
        await notifiers.invalidate(mn.Range(0x9000, 0xA000, mn.Event.CLEAR))
    assert driver.counters == {
        "invalidate_range_start": 2,
        "invalidate_range_end": 2,
        "pages": 4,
    }


async def test_counts_nothing_once_unregistered() -> None:
    """What is invalidated after the driver has left does not reach it."""
    notifiers = mn.Notifiers()
    driver = KvmDriver()
    async with notifiers.attached(driver):
        pass
    await notifiers.invalidate(mn.Range(0x1000, 0x4000))
    assert not driver.counters


async def test_logs_the_counters_at_release() -> None:
    """The last thing that the driver does is to log what it has counted."""
    captured = LogCapture()
    logger = structlog.wrap_logger(None, processors=[captured])
    notifiers = mn.Notifiers()
    async with notifiers.attached(KvmDriver(logger)):
        await notifiers.invalidate(mn.Range(0x1000, 0x4000))
    (line,) = captured.entries
    assert (line["event"], line["driver"], line["pages"]) == ("kvm_counted", "kvm", 3)


async def test_counts_ageing_and_answers_no() -> None:
    """Without a shadow page table nothing was accessed through it."""
    notifiers = mn.Notifiers()
    driver = KvmDriver()
    async with notifiers.attached(driver):
        assert not notifiers.clear_flush_young(0x1000, 0x2000)
        assert not notifiers.clear_young(0x1000, 0x2000)
        assert not notifiers.test_young(0x1000)
    assert driver.counters == {"clear_flush_young": 1, "clear_young": 1, "test_young": 1}


async def test_serves_spinlocks() -> None:
    """Nothing that the driver does waits, so it can be told under spinlocks."""
    notifiers = mn.Notifiers(mn.SpinLocks)
    driver = KvmDriver()
    async with notifiers.attached(driver):
        with notifiers.invalidating_atomic(mn.Range(0x1000, 0x2000)):
            assert driver.counters["pages"] == 1
