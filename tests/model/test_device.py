"""Frames of a device in a process, which only their owner can take back (patch 10 of 2008)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import mmunotify as mn
from mmunotify.errors import BadAddress, MmError
from mmunotify.model import Machine
from mmunotify.model import flags as f

if TYPE_CHECKING:
    from mmunotify.model.machine import Era

PAGE = mn.PAGE_SIZE


class Heard(mn.AtomicDriver):
    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def invalidate_range_start(self, rng: mn.Range) -> None:
        self.ranges.append((rng.start, rng.end))


async def test_importer_sees_the_exporters_page_until_it_is_zapped() -> None:
    """An importer maps the frames that an exporter has pinned, and hears when they go."""
    async with Machine(frames=64, contents=True) as machine:
        exporter, importer = machine.new_mm("exporter"), machine.new_mm("importer")
        source = await exporter.mmap(4 * PAGE)
        await exporter.write(source, b"shared")
        pin = await exporter.pin(source, source + 4 * PAGE)
        device = machine.device(4 * PAGE, lambda index: pin.translations.frames[index])
        target = await importer.mmap(4 * PAGE, flags=f.MAP_SHARED, file=device)
        heard = Heard()
        await importer.register(heard)
        assert await importer.read(target, 6) == b"shared"
        await importer.write(target, b"SHARED")
        assert await exporter.read(source, 6) == b"SHARED"
        assert heard.ranges == []
        assert importer.pagemap(target, target + PAGE) == [(target >> 12, "p", None)]

        await importer.zap_vma_ptes(target, 2 * PAGE)
        assert heard.ranges == [(target, target + 2 * PAGE)]
        assert importer.pagemap(target, target + PAGE) == []
        importer.insert_pfn(target, pin.translations.frames[1])
        with pytest.raises(MmError, match="something is mapped"):
            importer.insert_pfn(target, pin.translations.frames[0])
        exporter.unpin(pin)
    assert machine.frames.used == 1


async def test_what_the_device_does_not_have_is_a_bus_error() -> None:
    async with Machine(frames=64) as machine:
        mm = machine.new_mm("P")
        address = await mm.mmap(PAGE, flags=f.MAP_SHARED, file=machine.device(PAGE))
        with pytest.raises(BadAddress) as caught:
            await mm.access(address)
        assert caught.value.signal == "BUS"
        with pytest.raises(MmError, match="expected MAP_SHARED"):
            await mm.mmap(PAGE, flags=f.MAP_PRIVATE, file=machine.device(PAGE))


@pytest.mark.parametrize("era", ["linux-6", "v16"])
async def test_advice_refuses_what_zap_can_do(era: Era) -> None:
    """MADV_DONTNEED is EINVAL on such memory, which is why drivers need a zap of their own."""
    async with Machine(frames=64, era=era) as machine:
        mm = machine.new_mm("P")
        device = machine.device(PAGE, lambda index: 7)
        address = await mm.mmap(PAGE, flags=f.MAP_SHARED, file=device)
        heard = Heard()
        await mm.register(heard)
        await mm.access(address)
        with pytest.raises(MmError):
            await mm.madvise(address, PAGE, "dontneed")
        assert heard.ranges == []
        await mm.zap_vma_ptes(address, PAGE)
        assert heard.ranges == [(address, address + PAGE)]
        ordinary = await mm.mmap(PAGE)
        with pytest.raises(MmError, match="one device's mapping"):
            await mm.zap_vma_ptes(ordinary, PAGE)
