"""Two partitions over the in-memory engine: what goes between them, what is logged, and time."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import structlog
from structlog.testing import LogCapture

from mmunotify_xpmem import Credentials, FileSpace, MemoryHub, Partition
from mmunotify_xpmem.exporter import Limits
from mmunotify_xpmem.partition import boot_time
from mmunotify_xpmem.wire import Ack, Fault, Heartbeat, Inv, Page, Retry, decode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PAGE = 4096


class Tapped(MemoryHub):
    """Keeps what arrives, and loses what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Any] = []
        self.loses: Callable[[Any], object] = lambda message: False

    def deliver(self, carried: Any) -> None:
        message, _ = decode(memoryview(carried.frame))
        self.messages.append(message)
        if not self.loses(message):
            super().deliver(carried)

    def of(self, kind: type) -> list[Any]:
        """The messages of one kind, which are then forgotten."""
        found = [message for message in self.messages if isinstance(message, kind)]
        self.messages.clear()
        return found


class Clock:
    """Time that jumps for one partition, as it does for a process that was stopped."""

    ahead = 0.0

    def __call__(self) -> float:
        return boot_time() + self.ahead


class Pair:
    """A file that is exported, and its attachment elsewhere."""

    hub: Tapped
    here: Partition
    there: Partition
    space: FileSpace
    group: Any
    attachment: Any
    log: LogCapture
    clock: Clock


@asynccontextmanager
async def paired(pages: int = 1, fence: Any = "lease", **options: Any) -> AsyncIterator[Pair]:
    p = Pair()
    p.hub, p.log, p.clock = Tapped(), LogCapture(), Clock()
    logger = structlog.wrap_logger(None, processors=[p.log])
    who = Credentials.mine()
    async with (
        Partition(p.hub.engine(who), 1, logger=logger, **options) as p.here,
        Partition(p.hub.engine(who), 2, logger=logger, clock=p.clock) as p.there,
        FileSpace(size=pages * PAGE) as p.space,
        p.here.opened(p.space.notifiers) as p.group,
        p.there.opened() as importer,
    ):
        segid = p.group.make(p.space.base, p.space.size, fence=fence)
        p.attachment = importer.attach(await importer.get(segid))
        p.hub.messages.clear()
        yield p
        p.hub.loses = lambda message: False


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.001)


async def test_scattered_reads_fault_single_pages() -> None:
    """Nothing is sent that nobody has asked for."""
    async with paired(pages=200) as p:
        for page in (7, 150, 3, 90):
            await p.attachment.read(page * PAGE, 8)
        assert [(fault.first, fault.count) for fault in p.hub.of(Fault)] == [
            (7, 1), (150, 1), (3, 1), (90, 1),
        ]  # fmt: skip


async def test_reads_that_go_forward_fault_batches() -> None:
    """Of 16 pages, then 32, then 64; what is there already is not faulted again."""
    async with paired(pages=400) as p:
        for page in range(300):
            await p.attachment.read(page * PAGE, 8)
        faults = [(fault.first, fault.count) for fault in p.hub.of(Fault)]
        assert faults[:5] == [(0, 1), (1, 16), (17, 32), (49, 64), (113, 64)]
        assert len(faults) == 7


async def test_long_reads_have_batches_under_way() -> None:
    """Of 64 pages; some are asked for before the first has come."""
    async with paired(pages=400) as p:
        assert await p.attachment.read() == bytes(400 * PAGE)
        kinds = [type(message) for message in p.hub.messages if type(message) in (Fault, Page)]
        faults = p.hub.of(Fault)
        assert {fault.count for fault in faults} == {64, 400 % 64}
        assert len(faults) == 7
        assert kinds.index(Page) >= 4


async def test_one_heartbeat_for_a_pair_of_partitions() -> None:
    """However many permits one has of the other."""
    async with paired(lease=0.4, heartbeat=0.05) as p:
        group = await p.there.open()
        apids = [await group.get(next(iter(p.group.segments))) for _ in range(3)]
        p.hub.messages.clear()
        await until(lambda: len([m for m in p.hub.messages if isinstance(m, Heartbeat)]) >= 3)
        beats = p.hub.of(Heartbeat)
        assert all(len(beat.aids) == 4 for beat in beats)
        assert len({beat.sent for beat in beats}) == len(beats)
        for apid in apids:
            await group.release(apid)
        await group.close()


async def test_faults_that_are_sent_back_come_again() -> None:
    """Where too many wait already: an exporter remembers so many, and all are served in the end."""
    limits = Limits(parked=2)
    async with paired(pages=8, limits=limits) as p:
        read = []

        async def look(page: int) -> None:
            read.append(await p.attachment.read(page * PAGE, 3))

        recall = p.group.recalling(p.space.base, p.space.base + 8 * PAGE)
        async with anyio.create_task_group() as tasks, recall:
            for page in range(8):
                tasks.start_soon(look, page)
            await until(lambda: any(isinstance(m, Retry) for m in p.hub.messages))
            (peer,) = p.here.exporter.peers.values()
            assert peer.waiting == 2
            assert not read
        assert read == [bytes(3)] * 8


async def test_stores_that_are_sent_back_come_again() -> None:
    """And are done once; afterwards nothing is counted as waiting."""
    async with paired(pages=8, limits=Limits(storing=PAGE)) as p:
        group = await p.there.open()
        apids = [await group.get(next(iter(p.group.segments))) for _ in range(4)]
        async with anyio.create_task_group() as tasks:
            for page, apid in enumerate(apids):
                tasks.start_soon(group.attach(apid).write, page * PAGE, b"%d" % page * PAGE)
        assert any(isinstance(message, Retry) for message in p.hub.messages)
        for page in range(4):
            assert await p.attachment.read(page * PAGE, PAGE) == b"%d" % page * PAGE
        assert p.here.exporter.storing == 0
        await group.close()


@pytest.mark.parametrize("kind", [Fault, Page, Inv, Ack])
async def test_lost_messages_are_sent_again(kind: type) -> None:
    """Each kind once."""
    async with paired() as p:
        left = [kind]
        p.hub.loses = lambda message: type(message) in left and not left.clear()  # type: ignore[func-returns-value]
        assert await p.attachment.read(0, 3) == bytes(3)
        await p.space.update(0, b"new")
        assert await p.attachment.read(0, 3) == b"new"
        assert not left


async def test_who_waits_for_whom_is_logged() -> None:
    """An invalidation that takes longer than two heartbeats says so; and who is fenced."""
    async with paired(lease=0.3, heartbeat=0.05) as p:
        await p.attachment.read(0, 1)
        p.hub.loses = lambda message: True
        await p.space.update(0, b"new")
        p.hub.loses = lambda message: False
        waiting, *_ = [entry for entry in p.log.entries if entry["event"] == "xpmem_waiting"]
        assert waiting["partitions"] == ["2"]
        assert waiting["seconds"] > 0
        (fenced,) = [entry for entry in p.log.entries if entry["event"] == "xpmem_fenced"]
        assert (fenced["partition"], fenced["reason"]) == (2, "lease")
        assert await p.attachment.read(0, 3) == b"new"
        (again,) = [entry for entry in p.log.entries if entry["event"] == "xpmem_reattached"]
        assert again["partition"] == 1


async def test_importer_that_was_stopped_returns_nothing_stale() -> None:
    """It was fenced, and nothing has told it yet; the lease is over when it has copied."""
    async with paired() as p:
        assert await p.attachment.read(0, 3) == bytes(3)
        p.hub.loses = lambda message: True
        p.here.exporter.died(2, p.there.inc, "wrongly")
        await p.space.update(0, b"new")
        p.hub.loses = lambda message: False
        assert p.attachment.permit.grant.cache, "or else this shows nothing"
        p.clock.ahead = 3600.0
        assert await p.attachment.read(0, 3) == b"new"


async def test_deaf_importer_is_fenced() -> None:
    """One that lives, and to which nothing gets through, holds an invalidation up for two leases;
    then it attaches again."""
    async with paired(lease=0.2, heartbeat=0.05) as p:
        await p.attachment.read(0, 1)
        p.hub.loses = lambda message: type(message).__name__ in ("Inv", "HeartbeatAck", "Fenced")
        with anyio.fail_after(30):
            await p.space.update(0, b"new")
        (fenced,) = [entry for entry in p.log.entries if entry["event"] == "xpmem_fenced"]
        assert fenced["reason"] == "deaf"
        assert not p.attachment.permit.grant.cache, "its own lease is over, too"
        p.hub.loses = lambda message: False
        assert await p.attachment.read(0, 3) == b"new"
