"""The cases of XPMEM's own basic tests, by their names, against this API."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING, Any

import pytest

from mmunotify import BadAddress
from mmunotify.model.flags import MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE
from mmunotify_xpmem import (
    MAXADDR_SIZE,
    RDONLY,
    RDWR,
    XPMEM_ERRNO_NOPROC,
    Credentials,
    Xpmem,
    XpmemError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    World = Callable[[], AbstractAsyncContextManager[Any]]

PAGE = 4096
FIXED = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
COLLEAGUE = Credentials(2000, 100)
STRANGER = Credentials(3000, 300)
ROOT = Credentials(0, 0)


async def test_xpmem_make_success(world: World) -> None:
    """A range of whole pages can be exported, and each segid is new."""
    async with world() as w:
        exported = await w.exporter()
        again = exported.group.make(exported.address, PAGE)
        assert 0 < exported.segid < again
        assert exported.segid >> 32 == exported.group.xpmem.part


async def test_xpmem_make_everything(world: World) -> None:
    """MAXADDR_SIZE exports the whole address space, at the offsets of its addresses."""
    async with world() as w:
        exported = await w.exporter()
        await exported.store(0, b"found")
        importer = await w.open()
        apid = await importer.get(exported.group.make(0, MAXADDR_SIZE))
        attachment = importer.attach(apid, exported.address, PAGE)
        assert await attachment.read(0, 5) == b"found"


@pytest.mark.parametrize(
    ("address", "size", "mode", "permit_type"),
    [
        pytest.param(1, PAGE, 0o600, 1, id="unaligned"),
        pytest.param(PAGE, 100, 0o600, 1, id="unaligned_size"),
        pytest.param(PAGE, 0, 0o600, 1, id="empty"),
        pytest.param(PAGE, PAGE, 0o1777, 1, id="perm"),
        pytest.param(PAGE, PAGE, 0o600, 2, id="perm_type"),
        pytest.param((1 << 64) - PAGE, 2 * PAGE, 0o600, 1, id="overflow"),
    ],
)
async def test_xpmem_make(
    world: World, address: int, size: int, mode: int, permit_type: int
) -> None:
    """What cannot be exported is refused with EINVAL, and nothing is exported."""
    async with world() as w:
        group = await w.open(w.machine.new_mm())
        with pytest.raises(XpmemError) as refused:
            group.make(address, size, mode, permit_type)
        assert refused.value.errno == errno.EINVAL
        assert not group.segments


async def test_xpmem_make_noproc(world: World) -> None:
    """Without an address space there is nothing to export."""
    async with world() as w:
        group = await w.open()
        with pytest.raises(XpmemError) as refused:
            group.make(0, PAGE)
        assert refused.value.errno == XPMEM_ERRNO_NOPROC


@pytest.mark.parametrize(
    ("segid", "number"), [(-1, errno.EINVAL), (0, errno.EINVAL), (1 << 40, errno.ENOENT)]
)
async def test_xpmem_remove_unknown(world: World, segid: int, number: int) -> None:
    """Only what is there can be removed."""
    async with world() as w:
        exported = await w.exporter()
        with pytest.raises(XpmemError) as refused:
            await exported.group.remove(segid)
        assert refused.value.errno == number


async def test_xpmem_remove_error() -> None:
    """Nobody removes what somebody else has made."""
    from mmunotify_xpmem import FileSpace

    device = Xpmem()
    async with FileSpace(size=PAGE) as space, device.opened(space.notifiers) as group:
        segid = group.make(space.base, PAGE)
        other = await device.open()
        with pytest.raises(XpmemError) as refused:
            await other.remove(segid)
        assert refused.value.errno == errno.EACCES
        await group.remove(segid)


async def test_xpmem_remove_twice(world: World) -> None:
    """Once it is removed it is not there."""
    async with world() as w:
        exported = await w.exporter()
        await exported.group.remove(exported.segid)
        with pytest.raises(XpmemError) as refused:
            await exported.group.remove(exported.segid)
        assert refused.value.errno == errno.ENOENT


@pytest.mark.parametrize("segid", [-1, 0])
async def test_xpmem_get_bad_segid(world: World, segid: int) -> None:
    """No segid, no permit."""
    async with world() as w:
        importer = await w.open()
        with pytest.raises(XpmemError) as refused:
            await importer.get(segid)
        assert refused.value.errno == errno.EINVAL


async def test_xpmem_get_bad_segid_positive(world: World) -> None:
    """A segid that nobody has made."""
    async with world() as w:
        exported = await w.exporter()
        importer = await w.open()
        with pytest.raises(XpmemError) as refused:
            await importer.get(exported.segid + 7)
        assert refused.value.errno == errno.ENOENT


async def test_xpmem_get_success(world: World) -> None:
    """The owner gets its own segment, for reading and for writing."""
    async with world() as w:
        exported = await w.exporter()
        importer = await w.open()
        assert await importer.get(exported.segid, RDONLY) > 0
        assert await importer.get(exported.segid, RDWR) > 0


@pytest.mark.parametrize(
    ("flags", "permit_type", "value"), [(0, 1, None), (3, 1, None), (RDWR, 2, None), (RDWR, 1, 7)]
)
async def test_xpmem_get_bad_permit_mode(
    world: World, flags: int, permit_type: int, value: object
) -> None:
    """Exactly RDONLY or RDWR, PERMIT_MODE, and no value."""
    async with world() as w:
        exported = await w.exporter()
        importer = await w.open()
        with pytest.raises(XpmemError) as refused:
            await importer.get(exported.segid, flags, permit_type, value)
        assert refused.value.errno == errno.EINVAL


async def test_xpmem_get_read_attach(world: World) -> None:
    """A store through a read-only attachment is a SIGSEGV at its address, and changes nothing."""
    async with world() as w:
        exported = await w.exporter()
        importer = await w.open()
        attachment = importer.attach(await importer.get(exported.segid, RDONLY))
        assert await attachment.read(0, 4) == bytes(4)
        with pytest.raises(BadAddress) as fault:
            await attachment.write(8, b"no")
        assert (fault.value.signal, fault.value.code) == ("SEGV", 2)
        assert await exported.load(0, 16) == bytes(16)


PERMITS = [
    (COLLEAGUE, 0o640, RDONLY, True),
    (COLLEAGUE, 0o640, RDWR, False),
    (COLLEAGUE, 0o660, RDWR, True),
    (COLLEAGUE, 0o606, RDONLY, False),
    (STRANGER, 0o660, RDONLY, False),
    (STRANGER, 0o664, RDONLY, True),
    (STRANGER, 0o664, RDWR, False),
    (STRANGER, 0o666, RDWR, True),
    (ROOT, 0o000, RDWR, True),
]


@pytest.mark.parametrize(("who", "mode", "flags", "allowed"), PERMITS)
async def test_xpmem_get_allowed_permit_and_not_allowed_permit(
    world: World, who: Credentials, mode: int, flags: int, allowed: bool
) -> None:
    """Owner, group and other, as System V IPC checks them; EACCES else."""
    async with world() as w:
        exported = await w.exporter(mode=mode)
        importer = await w.open(who=who)
        if allowed:
            attachment = importer.attach(await importer.get(exported.segid, flags))
            assert await attachment.read(0, 1) == b"\0"
        else:
            with pytest.raises(XpmemError) as refused:
                await importer.get(exported.segid, flags)
            assert refused.value.errno == errno.EACCES


async def test_small_share(world: World) -> None:
    """What one side stores the other one loads, in both directions."""
    async with world() as w:
        exported = await w.exporter(pages=1)
        importer = await w.open()
        attachment = importer.attach(await importer.get(exported.segid))
        await exported.store(100, b"from the exporter")
        assert await attachment.read(100, 17) == b"from the exporter"
        await attachment.write(200, b"from the importer")
        assert await exported.load(200, 17) == b"from the importer"


async def test_attach_offset(world: World) -> None:
    """An attachment begins where it was told to."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        await exported.store(2 * PAGE, b"second")
        importer = await w.open()
        attachment = importer.attach(await importer.get(exported.segid), 2 * PAGE, PAGE)
        assert await attachment.read(0, 6) == b"second"
        assert attachment.size == PAGE


@pytest.mark.parametrize(
    ("offset", "size"), [(1, PAGE), (0, 1), (0, 0), (0, 5 * PAGE), (4 * PAGE, PAGE), (-PAGE, PAGE)]
)
async def test_attach_error(world: World, offset: int, size: int) -> None:
    """Whole pages inside of the segment, or EINVAL."""
    async with world() as w:
        exported = await w.exporter(pages=4)
        importer = await w.open()
        apid = await importer.get(exported.segid)
        with pytest.raises(XpmemError) as refused:
            importer.attach(apid, offset, size)
        assert refused.value.errno == errno.EINVAL


async def test_attach_target(world: World) -> None:
    """Not over another attachment, not over what the process exports itself, not unaligned."""
    async with world() as w:
        exported = await w.exporter()
        mm = w.machine.new_mm()
        importer = await w.open(mm)
        address = await mm.mmap(8 * PAGE)
        importer.make(address, PAGE)
        apid = await importer.get(exported.segid)
        importer.attach(apid, 0, PAGE, address + 4 * PAGE)
        for wrong in (address, address + 4 * PAGE, address + 1):
            with pytest.raises(XpmemError) as refused:
                importer.attach(apid, 0, PAGE, wrong)
            assert refused.value.errno == errno.EINVAL
        with pytest.raises(XpmemError, match="cannot be exported again"):
            importer.make(address + 4 * PAGE, PAGE)


async def test_detach_and_release(world: World) -> None:
    """What is detached cannot be used, nor what is released; both can be done once."""
    async with world() as w:
        exported = await w.exporter()
        importer = await w.open()
        apid = await importer.get(exported.segid)
        first, second = importer.attach(apid), importer.attach(apid)
        await first.detach()
        with pytest.raises(BadAddress):
            await first.read(0, 1)
        with pytest.raises(XpmemError):
            await importer.detach(first)
        assert await second.read(0, 1) == b"\0"
        await importer.release(apid)
        with pytest.raises(BadAddress):
            await second.read(0, 1)
        for wrong, number in ((apid, errno.ENOENT), (0, errno.EINVAL)):
            with pytest.raises(XpmemError) as refused:
                await importer.release(wrong)
            assert refused.value.errno == number
        assert not exported.group.table.holders
        assert not exported.group.table.pins


async def test_remove_is_sigbus(world: World) -> None:
    """After remove every access of an importer is a SIGBUS, also to pages that it had."""
    async with world() as w:
        exported = await w.exporter()
        importer = await w.open()
        attachment = importer.attach(await importer.get(exported.segid))
        await attachment.read()
        await exported.group.remove(exported.segid)
        for page in (0, 3):
            with pytest.raises(BadAddress) as fault:
                await attachment.read(page * PAGE, 1)
            assert fault.value.signal == "BUS"
        assert not exported.group.table.holders


async def test_crash_before_mmap(world: World) -> None:
    """What is exported need not be mapped: SIGBUS until it is."""
    async with world() as w:
        exported = await w.exporter()
        await exported.mm.munmap(exported.address, PAGE)
        importer = await w.open()
        attachment = importer.attach(await importer.get(exported.segid))
        with pytest.raises(BadAddress) as fault:
            await attachment.read(0, 1)
        assert fault.value.signal == "BUS"
        again = await exported.mm.mmap(PAGE, flags=FIXED, addr=exported.address)
        assert again == exported.address
        await exported.mm.write(exported.address, b"here")
        assert await attachment.read(0, 4) == b"here"


async def test_crash_after_munmap(world: World) -> None:
    """What the exporter unmaps is gone from the importer, and new memory there is seen."""
    async with world() as w:
        exported = await w.exporter()
        importer = await w.open()
        attachment = importer.attach(await importer.get(exported.segid))
        await exported.store(0, b"old")
        assert await attachment.read(0, 3) == b"old"
        await exported.mm.munmap(exported.address, 2 * PAGE)
        with pytest.raises(BadAddress) as fault:
            await attachment.read(0, 3)
        assert fault.value.signal == "BUS"
        assert await attachment.read(2 * PAGE, 1) == b"\0"


async def test_same_process_64_pages(world: World) -> None:
    """A process attaches its own memory."""
    async with world() as w:
        exported = await w.exporter(pages=64)
        group = exported.group
        attachment = group.attach(await group.get(exported.segid))
        for page in range(64):
            await exported.mm.write(exported.address + page * PAGE, bytes([page]))
        data = await attachment.read()
        assert [data[page * PAGE] for page in range(64)] == list(range(64))
        await attachment.write(63 * PAGE, b"!")
        assert await exported.load(63 * PAGE, 1) == b"!"


async def holes(w: Any) -> tuple[Any, Any]:
    """Eight pages, every other one unmapped, and an attachment of them all."""
    exported = await w.exporter(pages=8)
    for page in range(8):
        await exported.mm.write(exported.address + page * PAGE, bytes([page + 1]))
    for page in range(1, 8, 2):
        await exported.mm.munmap(exported.address + page * PAGE, PAGE)
    importer = await w.open()
    return exported, importer.attach(await importer.get(exported.segid))


async def test_mmap_holes(world: World) -> None:
    """Between holes there is memory."""
    async with world() as w:
        _, attachment = await holes(w)
        for page in range(0, 8, 2):
            assert await attachment.read(page * PAGE, 1) == bytes([page + 1])


async def test_mmap_holes_populate(world: World) -> None:
    """Holes that are mapped are holes no longer."""
    async with world() as w:
        exported, attachment = await holes(w)
        for page in range(1, 8, 2):
            await exported.mm.mmap(PAGE, flags=FIXED, addr=exported.address + page * PAGE)
            await exported.mm.write(exported.address + page * PAGE, bytes([page + 1]))
        data = await attachment.read()
        assert [data[page * PAGE] for page in range(8)] == list(range(1, 9))


@pytest.mark.parametrize("touched", [False, True], ids=["death_before", "death_after"])
async def test_mmap_holes_death(world: World, touched: bool) -> None:
    """A hole is a SIGBUS, whether its neighbours were touched before or not."""
    async with world() as w:
        _, attachment = await holes(w)
        if touched:
            await attachment.read(0, 1)
            await attachment.read(2 * PAGE, 1)
        with pytest.raises(BadAddress) as fault:
            await attachment.read(PAGE, 1)
        assert (fault.value.signal, fault.value.code) == ("BUS", 2)
        with pytest.raises(BadAddress):
            await attachment.read(0, 3 * PAGE)
        with pytest.raises(BadAddress):
            await attachment.write(PAGE, b"x")


async def test_mmap_holes_sum(world: World) -> None:
    """The sum over all pages that are there."""
    async with world() as w:
        _, attachment = await holes(w)
        total = 0
        for page in range(0, 8, 2):
            total += sum(await attachment.read(page * PAGE, PAGE))
        assert total == 1 + 3 + 5 + 7


@pytest.mark.parametrize("seed", range(4))
async def test_randomized_sequence(world: World, seed: int) -> None:
    """Stores, loads, unmapping, remapping, discarding and detaching, against a model of bytes."""
    dice = random.Random(seed)
    async with world() as w:
        exported = await w.exporter(pages=8)
        mm, base = exported.mm, exported.address
        importers = [await w.open() for _ in range(2)]
        attachments = [
            importer.attach(await importer.get(exported.segid)) for importer in importers
        ]
        truth: list[int | None] = [0] * 8
        for _ in range(120):
            page = dice.randrange(8)
            address = base + page * PAGE
            who = dice.randrange(2)
            match dice.randrange(8):
                case 0:
                    await mm.munmap(address, PAGE)
                    truth[page] = None
                case 1 if truth[page] is None:
                    await mm.mmap(PAGE, flags=FIXED, addr=address)
                    truth[page] = 0
                case 2 if truth[page] is not None:
                    await mm.madvise(address, PAGE, "dontneed")
                    truth[page] = 0
                case 3 if truth[page] is not None:
                    value = dice.randrange(256)
                    await exported.store(page * PAGE, bytes([value]))
                    truth[page] = value
                case 4 if truth[page] is not None:
                    value = dice.randrange(256)
                    await attachments[who].write(page * PAGE, bytes([value]))
                    truth[page] = value
                case 5 if dice.random() < 0.3:
                    await attachments[who].detach()
                    apid = attachments[who].apid
                    attachments[who] = importers[who].attach(apid)
                case _:
                    expected = truth[page]
                    if expected is None:
                        with pytest.raises(BadAddress):
                            await attachments[who].read(page * PAGE, 1)
                    else:
                        assert await attachments[who].read(page * PAGE, 1) == bytes([expected])
        for importer in importers:
            await importer.close()
        assert not exported.group.table.holders
        assert exported.pinned == 0
