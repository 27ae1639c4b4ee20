"""The parts of a replay: matching, touching, meters, the three translation caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from dict_mm import DictMm
from mmunotify import PAGE_SIZE, AtomicDriver, Device, Range, Translation
from mmunotify.traces.devices import TLBS, AtomicTlb
from mmunotify.traces.matching import Matches
from mmunotify.traces.meters import Meter
from mmunotify.traces.touching import Draws, Toucher, Touching

if TYPE_CHECKING:
    from mmunotify import AnyDriver


@pytest.mark.parametrize(
    ("kernel", "model", "matched", "extra"),
    [
        ([], [], 0, 0),
        ([1, 2, 3], [1, 2, 3], 3, 0),
        ([1, 2, 3], [1, 3], 2, 0),
        ([1, 3], [1, 2, 3], 2, 1),
        ([1, 2], [2, 1], 1, 1),
        ([1, 1], [1], 1, 0),
        ([1, 2, 3, 4, 5], [9, 2, 4, 9, 5], 3, 2),
        ([1], [], 0, 0),
        ([], [1], 0, 1),
    ],
)
def test_announcements_match_in_order(
    kernel: list[int], model: list[int], matched: int, extra: int
) -> None:
    found = Matches()
    found.compare("op", [(n, n + 1) for n in kernel], [(n, n + 1) for n in model])
    assert (found.kernel, found.matched, found.extra) == (len(kernel), matched, extra)
    assert found.missing["op"] == len(kernel) - matched
    assert found.surplus["op"] == extra


@pytest.mark.parametrize("text", ["same", "hot:64", "random:0.25"])
def test_touching_is_read_as_it_is_written(text: str) -> None:
    assert str(Touching.parse(text)) == text


@pytest.mark.parametrize("text", ["", "hot", "hot:0", "hot:x", "random:2", "same:1", "cold:3"])
def test_touching_that_cannot_be_says_what_can(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected same, hot:N .* or random:P"):
        Touching.parse(text)


class FakeDevice:
    """Remembers what it was asked, and has what it has faulted on."""

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}
        self.has: dict[int, bool] = {}
        self.accesses: list[int] = []

    def access(self, address: int, *, write: bool = False) -> bool:
        self.accesses.append(address)
        return address in self.has and (self.has[address] or not write)

    async def fault(self, address: int, *, write: bool = False) -> None:
        self.has[address] = write


class FakePrimary:
    """Maps some pages, some of them writable."""

    def __init__(self, pages: dict[int, bool]) -> None:
        self.pages = pages

    def translate(self, address: int) -> Translation | None:
        writable = self.pages.get(address)
        if writable is None:
            return None
        return Translation(address, address >> 12, writable, PAGE_SIZE, 0)


def toucher(text: str, pages: dict[int, bool]) -> tuple[Toucher, FakeDevice]:
    device = FakeDevice()
    draws = Draws(Touching.parse(text))
    return Toucher(draws, FakePrimary(pages), [device]), device  # type: ignore[arg-type]


async def test_same_touches_every_page_of_a_run() -> None:
    pages = {page * PAGE_SIZE: True for page in range(8)}
    touching, device = toucher("same", pages)
    await touching.faulted(0, 8, write=True)
    assert device.accesses == list(pages)
    await touching.called()
    assert len(device.accesses) == 8


async def test_hot_has_one_access_per_fault_and_call_in_a_bounded_set() -> None:
    pages = {page * PAGE_SIZE: True for page in range(100)}
    touching, device = toucher("hot:4", pages)
    await touching.faulted(0, 4, write=False)
    device.accesses.clear()
    for _ in range(200):
        await touching.called()
    assert len(device.accesses) == 200
    assert set(device.accesses) <= {page * PAGE_SIZE for page in range(4)}
    first, *rest = (device.accesses.count(page * PAGE_SIZE) for page in range(4))
    assert first > max(rest) > min(rest) > 0


async def test_random_touches_about_that_share() -> None:
    pages = {page * PAGE_SIZE: True for page in range(1000)}
    touching, device = toucher("random:0.25", pages)
    await touching.faulted(0, 1000, write=False)
    assert 200 < len(device.accesses) < 300


async def test_device_leaves_alone_what_is_gone_and_writes_where_it_may() -> None:
    touching, device = toucher("same", {0: True, PAGE_SIZE: False})
    await touching.faulted(0, 3, write=True)
    assert device.has == {0: True, PAGE_SIZE: False}


@pytest.mark.parametrize("name", TLBS)
async def test_translation_caches_are_devices_that_lose_what_is_invalidated(name: str) -> None:
    tlb = TLBS[name]()
    assert isinstance(tlb, Device)
    at = 16 * PAGE_SIZE
    async with DictMm() as mm, mm.notifiers.attached(tlb):
        await mm.map(at, at + 4 * PAGE_SIZE)
        await tlb.fault(at, write=True)
        await tlb.fault(at + PAGE_SIZE)
        assert tlb.access(at, write=True)
        assert not tlb.access(at + 2 * PAGE_SIZE)
        await mm.unmap(at, at + PAGE_SIZE)
        assert not tlb.access(at)
        assert tlb.access(at + PAGE_SIZE)
        assert (tlb.counters["installed"], tlb.counters["mapped"]) == (2, 1)
    assert not tlb.access(at + PAGE_SIZE)


async def test_lookup_that_an_invalidation_overtakes_begins_again() -> None:
    """The page that it found is gone by the time that it would install it."""
    tlb = AtomicTlb()
    looked = anyio.Event()
    go_on = anyio.Event()
    lookups = 0

    class Slow(FakePrimary):
        async def fault_in(self, address: int, *, write: bool = False) -> Translation:
            nonlocal lookups
            lookups += 1
            found = self.translate(address)
            assert found is not None
            if lookups == 1:
                looked.set()
                await go_on.wait()
            return found

    tlb.attach(Slow({0: True}))  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tlb.fault, 0)
        await looked.wait()
        rng = Range(0, PAGE_SIZE)
        tlb.invalidate_range_start(rng)
        go_on.set()
        await anyio.lowlevel.checkpoint()
        assert not tlb.access(0)
        tlb.invalidate_range_end(rng)
    assert tlb.access(0)
    assert lookups > 1
    assert tlb.counters["retries"] >= 1


async def test_meter_counts_what_the_class_overrides_and_sums_instances() -> None:
    class Counting(AtomicDriver):
        def __init__(self) -> None:
            self.counters = {"installed": 2}

        def invalidate_range_start(self, rng: Range) -> None:
            pass

    meter = Meter("counting", AtomicDriver)
    drivers: list[AnyDriver] = [Counting(), Counting()]
    for driver in drivers:
        meter.watch(driver)
        driver.invalidate_range_start(Range(0, 3 * PAGE_SIZE))  # type: ignore[union-attr]
        driver.invalidate_range_end(Range(0, PAGE_SIZE))  # type: ignore[union-attr]
    meter.retire(drivers[0])
    assert meter.calls == {"invalidate_range_start": 2}
    assert meter.pages == 6
    assert meter.counters == {"installed": 4}
    assert sum(meter.latencies) == 2
    assert not meter.is_device
