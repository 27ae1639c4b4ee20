"""Pins for devices that go on reading and writing whatever happens to the mapping."""

from __future__ import annotations

import pytest

import mmunotify as mn
from mmunotify.errors import BadAddress, MmError
from mmunotify.model import AddressSpace, Machine
from mmunotify.model import flags as f

PAGE = mn.PAGE_SIZE


async def pinned(machine: Machine[mn.RwSems]) -> tuple[AddressSpace[mn.RwSems], int, mn.Pin, int]:
    mm = machine.new_mm("P")
    address = await mm.mmap(4 * PAGE)
    await mm.write(address, b"DMA")
    pin = await mm.pin(address, address + PAGE)
    return mm, address, pin, pin.translations.frames[0]


async def test_a_pinned_page_outlives_its_mapping() -> None:
    async with Machine(frames=64, contents=True) as machine:
        mm, address, pin, frame = await pinned(machine)
        label = machine.frames.label(frame)
        await mm.munmap(address, PAGE)
        assert machine.frames.label(frame) == label
        assert machine.contents_of(frame)[:3] == b"DMA"
        mm.primary.unpin(pin)
        assert machine.frames.label(frame) != label


async def test_a_pinned_page_stays_where_it_is() -> None:
    async with Machine(frames=64, swap=64, contents=True) as machine:
        mm, address, pin, frame = await pinned(machine)
        await mm.madvise(address, PAGE, "pageout")
        with pytest.raises(MmError):
            await machine.migrate(mm, address)
        await machine.reclaim()
        found = mm.primary.translate(address)
        assert found is not None
        assert found.frame == frame
        mm.primary.unpin(pin)


async def test_a_fork_copies_what_is_pinned_for_the_child() -> None:
    """The parent's page is the device's, also when the parent writes next."""
    async with Machine(frames=64, contents=True) as machine:
        mm, address, pin, frame = await pinned(machine)
        child = await mm.fork()
        theirs = child.primary.translate(address)
        assert theirs is not None
        assert theirs.frame != frame
        await mm.write(address, b"CPU")
        assert machine.contents_of(frame)[:3] == b"CPU"
        assert await child.read(address, 3) == b"DMA"
        mm.primary.unpin(pin)


async def test_a_pin_breaks_a_copy_on_write_first() -> None:
    async with Machine(frames=64, contents=True) as machine:
        mm = machine.new_mm("P")
        address = await mm.mmap(PAGE)
        await mm.write(address, b"old")
        child = await mm.fork()
        pin = await mm.pin(address, address + PAGE)
        await mm.write(address, b"new")
        assert machine.contents_of(pin.translations.frames[0])[:3] == b"new"
        assert await child.read(address, 3) == b"old"
        mm.unpin(pin)
        with pytest.raises(MmError):
            mm.unpin(pin)


async def test_a_pin_that_cannot_be_had_whole_holds_nothing() -> None:
    async with Machine(frames=64) as machine:
        mm = machine.new_mm("P")
        address = await mm.mmap(4 * PAGE)
        await mm.mprotect(address + PAGE, PAGE, f.PROT_READ)
        with pytest.raises(BadAddress):
            await mm.pin(address, address + 2 * PAGE)
        assert not machine.frames.pins
