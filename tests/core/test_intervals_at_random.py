"""Devices that translate through interval notifiers, while everything happens to the memory.

They take no page references and frames are reused at once, so one translation that outlives its
page is found out by its next use (I-FREE).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeAlias, cast

import anyio
import anyio.lowlevel
import pytest

import mmunotify as mn
from dict_mm import DictMm
from mmunotify import PAGE_SIZE
from mmunotify.errors import BadAddress, StaleTranslation

if TYPE_CHECKING:
    from collections.abc import Callable

BASE, PAGES = 0x40000, 6


class Table:
    """A device's translations."""

    seq_after_lookup = False
    """The bug of M5: the number is read after the lookup that it is to guard."""

    def __init__(self, mm: DictMm, rng: random.Random) -> None:
        self.mm = mm
        self.rng = rng
        self.entries: dict[int, mn.Translation] = {}
        self.lock = mn.SpinLock("device")

    async def pause(self) -> None:
        for _ in range(self.rng.randrange(3)):
            await anyio.lowlevel.checkpoint()

    def drop(self, start: int, end: int) -> None:
        for address in [each for each in self.entries if start <= each < end]:
            del self.entries[address]

    def use(self) -> None:
        for found in self.entries.values():
            self.mm.read(found, 0, 1)


class Atomic(Table, mn.AtomicInterval):
    def invalidate(self, rng: mn.Range, seq: int) -> bool:
        with self.lock:
            self.set_seq(seq)
            self.drop(rng.start, rng.end)
        return True


class Sleepable(Table, mn.SleepableInterval):
    async def invalidate(self, rng: mn.Range, seq: int) -> bool:
        await self.pause()
        with self.lock:
            self.set_seq(seq)
            self.drop(rng.start, rng.end)
        await self.pause()
        return True


Device: TypeAlias = Atomic | Sleepable


async def fault(device: Device, address: int) -> None:
    while True:
        seq = await device.read_begin()
        found = await device.mm.fault_in(address, write=device.rng.random() < 0.5)
        await device.pause()
        if device.seq_after_lookup:
            seq = await device.read_begin()
        with device.lock:
            if not device.read_retry(seq):
                device.entries[address] = found
                return


async def drive(device: Device, others: list[Device], steps: int) -> int:
    """Fault pages in and use them, and move the interval now and then; how many faults it took."""
    rng, faults = device.rng, 0
    notifiers = cast("mn.Notifiers[mn.RwSems]", device.mm.notifiers)
    for _ in range(steps):
        first = rng.randrange(PAGES)
        last = rng.randrange(first, PAGES)
        await device.insert(notifiers, BASE + first * PAGE_SIZE, (last - first + 1) * PAGE_SIZE)
        for _ in range(rng.randrange(1, 8)):
            try:
                await fault(device, BASE + rng.randint(first, last) * PAGE_SIZE)
                faults += 1
            except BadAddress:
                await anyio.lowlevel.checkpoint()
            for other in others:
                other.use()
        device.entries.clear()  # first: a section that begins while remove waits is not told
        await device.remove()
    return faults


async def disturb(mm: DictMm, rng: random.Random, running: Callable[[], bool]) -> None:
    """What else happens to the memory until the devices are done."""
    while running():
        start = BASE + rng.randrange(PAGES) * PAGE_SIZE
        end = start + rng.randrange(1, 3) * PAGE_SIZE
        match rng.randrange(5):
            case 0 | 1:
                await mm.evict(start)
            case 2:
                await mm.unmap(start, end)
                await anyio.lowlevel.checkpoint()
                for page in range(start, end, PAGE_SIZE):
                    if not any(mm.regions(page, page + 1)):
                        await mm.map(page, page + PAGE_SIZE)
            case 3:
                await mm.protect(start, end, writable=False)
                await mm.protect(start, end, writable=True)
            case 4:
                child = await mm.fork()
                await mm.store(start, b"parent")
                await child.put()
        await anyio.lowlevel.checkpoint()


async def run(seed: int, kinds: tuple[type[Device], ...], steps: int) -> int:
    rng = random.Random(seed)
    mm = DictMm()
    await mm.map(BASE, BASE + (PAGES + 2) * PAGE_SIZE)
    devices: list[Device] = [kind(mm, rng) for kind in kinds]
    working = len(devices)
    faults = 0

    async def work(device: Device) -> None:
        nonlocal working, faults
        faults += await drive(device, devices, steps)
        working -= 1

    async with anyio.create_task_group() as tasks:
        for device in devices:
            tasks.start_soon(work, device)
        tasks.start_soon(disturb, mm, rng, lambda: working > 0)
    assert not mm.notifiers.armed
    return faults


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "kinds", [(Atomic, Atomic), (Sleepable, Sleepable), (Sleepable, Atomic, Sleepable)]
)
async def test_no_translation_outlives_its_page(seed: int, kinds: tuple[type[Device], ...]) -> None:
    assert await run(seed, kinds, steps=12) > 10


async def test_a_number_that_is_read_after_the_lookup_guards_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """M5: one of the seeds finds it."""
    monkeypatch.setattr(Table, "seq_after_lookup", True)
    found = 0
    for seed in range(10):
        try:
            await run(seed, (Sleepable, Atomic), steps=12)
        except* StaleTranslation:
            found += 1
    assert found
