"""The driver as the registry, the notifiers and a replay see it."""

from __future__ import annotations

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

import mmunotify as mn
from mmunotify.model import Machine
from mmunotify_gru import DRIVER, Gru, GruDriver, GruOptions
from mmunotify_gru.errors import ContextClosed


def test_spec_fits_the_driver() -> None:
    """The registry holds the class to the callback contract and to the spec's claims."""
    assert mn.Registry.for_testing([DRIVER]).factory("gru") is GruDriver


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"contexts": 0}, "contexts is 0: expected at least 1"),
        ({"tlb": -1}, "tlb is -1: expected at least 1"),
        ({"miss": "never"}, "miss is 'never': expected interrupt or poll"),
        ({"context": 2}, "no option 'context': did you mean 'contexts'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], expected: str) -> None:
    """What is wrong with an option is said with its name."""
    with pytest.raises(mn.DriverConfigError, match=expected):
        mn.Registry.for_testing([DRIVER]).create("gru", **options)


async def test_is_a_device() -> None:
    """Accesses miss until the page is served, and again when it was invalidated."""
    async with Machine(frames=1 << 10) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(1 << 16)
        await mm.touch(heap, 1 << 16, write=True)
        driver = GruDriver(GruOptions(contexts=1))
        assert isinstance(driver, mn.Device)
        async with mm.attached(driver):
            assert not driver.access(heap)
            await driver.fault(heap)
            assert driver.access(heap)
            assert not driver.access(heap, write=True)
            await driver.fault(heap, write=True)
            assert driver.access(heap, write=True)
            await mm.madvise(heap, 4096, "dontneed")
            assert not driver.access(heap)
            await driver.fault(heap)
            with pytest.raises(mn.BadAddress):
                await driver.fault(1 << 12)
            counters = driver.counters
        names = ("installed", "mapped", "flushes", "refaults", "retries")
        assert [counters[name] for name in names] == [3, 1, 1, 1, 0]


async def test_every_context_has_its_pages() -> None:
    """Contexts on two chiplets have two TLBs, and pages are dealt out among them."""
    async with Machine(frames=1 << 10) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(1 << 16)
        driver = GruDriver(GruOptions(contexts=2))
        async with mm.attached(driver):
            for page in range(8):
                await driver.fault(heap + 4096 * page)
                assert driver.access(heap + 4096 * page)
            assert [chiplet.tlb.used for chiplet in driver.gru.chiplets] == [4, 4]


@pytest.mark.parametrize("miss", ["interrupt", "poll"])
async def test_faults_may_come_at_once(miss: str) -> None:
    """More tasks than a context has control blocks; a cancelled one is in nobody's way."""
    async with Machine(frames=1 << 10) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(1 << 16)
        driver = GruDriver(GruOptions(contexts=1, miss=miss))
        section = mn.Range(heap, heap + (1 << 16))
        async with mm.attached(driver):
            async with anyio.create_task_group() as tg, mm.notifiers.invalidating(section):
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as cancelled:
                        cancelled.start_soon(driver.fault, heap)
                        await anyio.wait_all_tasks_blocked()
                        scope.cancel()
                for page in range(16):
                    tg.start_soon(driver.fault, heap + 4096 * page)
                await anyio.wait_all_tasks_blocked()
                assert driver.gru.chiplets[0].tlb.used == 0
            assert all(driver.access(heap + 4096 * page) for page in range(16))


async def test_a_fault_that_waits_is_told_that_the_driver_leaves() -> None:
    """Unregistered under a section that covers its page, which it would wait for."""
    async with Machine(frames=1 << 10) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(1 << 16)
        driver = GruDriver(GruOptions(contexts=1))
        subscription = await mm.register(driver)

        async def fault() -> None:
            with pytest.raises(ContextClosed):
                await driver.fault(heap)

        section = mn.Range(heap, heap + 4096)
        async with mm.notifiers.invalidating(section), anyio.create_task_group() as tg:
            tg.start_soon(fault)
            await anyio.wait_all_tasks_blocked()
            await mm.notifiers.unregister(subscription)
        with pytest.raises(ContextClosed):
            await driver.fault(heap)


async def test_leaves_nothing_behind() -> None:
    """After release no context is loaded and nothing of the address space can be looked up."""
    async with Machine(frames=1 << 10) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(1 << 16)
        gru = Gru()
        driver = GruDriver(gru=gru)
        async with mm.attached(driver):
            await driver.fault(heap)
            assert [state.active for state in gru.states] == [1, 1]
        assert [state.active for state in gru.states] == [0, 0]
        assert not driver.access(heap)
        assert gru.drivers == []
        assert gru.statistics.gts_alloc == gru.statistics.gts_free == 2


async def test_logs_its_counters_at_release() -> None:
    """The last thing that the driver does is to log what it has counted."""
    captured = LogCapture()
    logger = structlog.wrap_logger(None, processors=[captured])
    notifiers = mn.Notifiers(name="pool")
    async with notifiers.attached(GruDriver(gru=Gru(logger=logger))):
        await notifiers.invalidate(mn.Range(0x1000, 0x4000))
    (line,) = captured.entries
    assert (line["event"], line["driver"], line["mm"]) == ("gru_released", "gru", "pool")
    assert line["statistics"] == {"gms_alloc": 1, "gms_free": 1, "mmu_invalidate_range": 1}


async def test_serves_spinlocks() -> None:
    """Nothing that the callbacks do waits, so they can be told under spinlocks."""
    notifiers = mn.Notifiers(mn.SpinLocks)
    driver = GruDriver()
    async with notifiers.attached(driver):
        with notifiers.invalidating_atomic(mn.Range(0x1000, 0x2000)):
            assert driver.covered(0x1000, 1)
        assert not driver.covered(0x1000, 1)
