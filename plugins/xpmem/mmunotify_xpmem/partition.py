"""A partition: the device of one process, connected to those of others by an engine.

This is the shell around the two sides of the protocol: it gives them what arrives and the time,
sends what they want sent, and does what has to wait: faulting pages in, storing, killing. It does
not know what its engine runs on.
"""

from __future__ import annotations

import math
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import msgspec

from mmunotify import PAGE_SHIFT, BadAddress, MmuNotifyError

from . import events
from .engine import address_of
from .errors import ExporterGone, FencedError, XpmemError
from .exporter import DoStore, FaultIn, FencedPeer, Kill, Recall, Reply
from .importer import Importer
from .remote import RemotePermit
from .segments import State
from .thread_group import ThreadGroup
from .wire import MAX_MESSAGE, BadMessage, Report, Request, decode, encode
from .xpmem import Xpmem, new_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from .engine import Engine, Sender
    from .exporter import Limits, Peer
    from .importer import Pending
    from .pfns import PfnTable, Wait
    from .wire import Buffer, Message

if sys.platform == "linux":
    boot_time = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    """Seconds, counting on while the machine sleeps."""
else:
    boot_time = time.monotonic


_REPORT: Final = MAX_MESSAGE // 2


class Partition(Xpmem):
    """`async with Partition(engine) as xpmem:` a device that reaches other partitions.

    `lease` is for how many seconds an importer may be silent before it is taken for dead,
    `heartbeat` how often it says that it is not; both are the exporter's to say. `patience` is for
    how long this partition waits, as an importer, for an exporter that is silent. `clock` gives
    seconds and should not stop while the machine sleeps.

    On the way out segments are removed and permits given back, within `grace` seconds; whoever has
    not acknowledged by then is fenced.
    """

    def __init__(
        self,
        engine: Engine,
        part: int | None = None,
        *,
        lease: float = 5.0,
        heartbeat: float = 1.0,
        patience: float | None = None,
        resend: float = 0.05,
        grace: float = 1.0,
        limits: Limits | None = None,
        clock: Callable[[], float] = boot_time,
        logger: object = None,
    ) -> None:
        if not 0 < heartbeat < lease:
            raise ValueError(
                f"heartbeat={heartbeat}, lease={lease}: expected 0 < heartbeat < lease"
            )
        super().__init__(
            part, logger=logger, ttl=lease, heartbeat=heartbeat, resend=resend, limits=limits
        )
        self.engine: Final = engine
        self.clock: Final = clock
        self.grace: Final = grace
        self.importer: Final = Importer(
            self.part,
            self.inc,
            new_id,
            resend=resend,
            patience=2 * lease if patience is None else patience,
        )
        self.refused = 0
        """Frames that were no messages, or not from who they said."""
        self._tasks: anyio.abc.TaskGroup | None = None
        self._open = False
        self._wake: anyio.Event | None = None
        self._sleeps_until = math.inf
        self._watched: list[Sender] = []
        self._warn_after = 2 * heartbeat

    # ------------------------------------------------------------------ coming and going

    async def __aenter__(self) -> Partition:
        engine = self.engine
        engine.subscribe(address_of(self.part))
        engine.subscribe(address_of(self.part, self.inc))
        await engine.open(self)
        try:
            self._tasks = await anyio.create_task_group().__aenter__()
        except BaseException:
            await engine.aclose()
            raise
        self._open = True
        for function, what in ((engine.run, "engine"), (self._keep_time, "clock")):
            self._tasks.start_soon(self._or_close, function, name=f"{what} of {self.part}")
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._tasks is not None
        try:
            with anyio.move_on_after(self.grace, shield=True):
                for group in list(self.groups):
                    await group.close()
        finally:
            self._close()
            self._tasks.cancel_scope.cancel()
            try:
                # What the body has raised is the body's; of ours there is cancellation only.
                raised = (
                    (None, None, None) if isinstance(exc, Exception) else (exc_type, exc, traceback)
                )
                await self._tasks.__aexit__(*raised)
            finally:
                await self.engine.aclose()

    async def _or_close(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Run a part of this; without it nobody can be waited for any longer."""
        try:
            await function(*args)
        except BaseException:
            self._close()
            raise

    def _close(self) -> None:
        """Fence everybody: whoever waits goes on, and what importers have is void."""
        if self._open:
            self._open = False
            for sharer in list(self.exporter.sharers.values()):
                self.exporter.fence(sharer, "closed")
            self.flush()

    # ------------------------------------------------------------------ what the engine says

    def received(self, sender: Sender, frame: memoryview) -> None:
        """A frame has arrived; raises BadMessage if it is not one of the protocol's."""
        try:
            message, body = decode(frame)
            if isinstance(message, Request):
                self.exporter.receive(sender, message, body, self.clock())
            else:
                self.importer.receive(sender, message, body, self.clock())
        except BadMessage as error:
            self.refused += 1
            self.log.emit(events.FRAME_REFUSED, peer=str(sender), reason=str(error))
            raise
        finally:
            if self.importer.buffers.lent:
                self.importer.buffers.handled(frame)
            self.flush()

    def room(self, size: int) -> memoryview:
        """Pages stay where they were received."""
        return self.importer.buffers.lend(size)

    def lost(self) -> None:
        """Messages may have been lost."""
        now = self.clock()
        self.exporter.messages_lost(now)
        self.importer.messages_lost(now)
        self.flush()

    def gone(self, sender: Sender) -> None:
        """A link is down. If its process is dead, the kernel will say so; else it may come back."""
        if self._open and any(peer.sender.is_same(sender) for peer in self.exporter.peers.values()):
            self._start(self._watch, sender)

    async def _watch(self, sender: Sender) -> None:
        if any(watched.is_same(sender) for watched in self._watched):
            return
        self._watched.append(sender)
        try:
            await sender.exited()
            for peer in list(self.exporter.peers.values()):
                if peer.sender.is_same(sender):
                    self.exporter.died(peer.part, peer.inc, "exited")
            self.flush()
        finally:
            self._watched.remove(sender)

    # ------------------------------------------------------------------ what is to be sent and done

    def flush(self) -> None:
        """Send what is to be sent, and do what is to be done."""
        exporter, importer = self.exporter, self.importer
        if exporter.unsent:
            exporter.flush(self.clock())
        # Sending runs nothing of ours, so nothing is added meanwhile.
        if exporter.outbox:
            self._send(exporter.outbox)
        if importer.outbox:
            self._send(importer.outbox)
        if exporter.todo:
            todo, exporter.todo = exporter.todo, []
            for what in todo:
                self._do(what)
        if importer.reattached:
            for grant in importer.reattached:
                self.log.emit(events.REATTACHED, partition=grant.segid >> 32, segid=grant.segid)
            importer.reattached.clear()
        until = self._sleeps_until
        if (importer.deadline < until or exporter.deadline < until) and self._wake is not None:
            self._wake.set()

    def _send(self, outbox: list[tuple[int, bytes, Message, Buffer]]) -> None:
        for part, inc, message, body in outbox:
            self.engine.send(address_of(part, inc), encode(message), body)
        outbox.clear()

    def _do(self, what: Any) -> None:
        match what:
            case FaultIn():
                self._start(self._fault_in, what)
            case DoStore():
                self._start(self._store, what)
            case Recall():
                self._start(self._recall, what)
            case Kill():
                self._start(self._kill, what.peer)
            case Reply():
                self._answer(what)
            case FencedPeer():
                sharer = what.sharer
                self.log.emit(
                    events.FENCED,
                    partition=sharer.peer.part,
                    segid=sharer.segment.segid,
                    reason=what.reason,
                )

    def _start(self, function: Callable[..., Any], *args: object) -> None:
        if self._tasks is not None and self._open:
            self._tasks.start_soon(self._or_close, function, *args)

    async def _fault_in(self, todo: FaultIn) -> None:
        sharer, fault = todo.sharer, todo.fault
        segment = sharer.segment
        group = segment.memory
        assert isinstance(group, ThreadGroup)
        first = segment.first + fault.first
        try:
            async with group.using(segment, first):
                for page in range(first, first + fault.need):
                    await group.look_up(segment, page, write=False)
                self.exporter.resume(sharer, fault)
        except BadAddress as error:
            # As its fault handler: whatever is wrong over here is SIGBUS over there.
            page = max((error.address >> PAGE_SHIFT) - segment.first, 0)
            self.exporter.refuse(sharer, fault, "BUS", 2, page, str(error.strerror))
        except MmuNotifyError as error:
            self.exporter.refuse(sharer, fault, "BUS", 2, fault.first, str(error))
        finally:
            # It may have failed half way, or nobody wants the pages any more.
            group.table.let_go_unheld(first, first + fault.need)
        self.flush()

    async def _store(self, todo: DoStore) -> None:
        sharer, store = todo.sharer, todo.store
        segment = sharer.segment
        group = segment.memory
        assert isinstance(group, ThreadGroup)
        address = segment.start + store.offset
        group.table.counters["stores"] += 1
        try:
            async with group.using(segment, address >> PAGE_SHIFT):
                async with group.recalling(address, address + len(todo.data)):
                    # A permit that was fenced meanwhile stores nothing any more.
                    if sharer.aid in self.exporter.sharers and segment.state is State.LIVING:
                        await group.store(address, todo.data)
                self.exporter.stored(sharer, store)
        except BadAddress as error:
            page = max((error.address >> PAGE_SHIFT) - segment.first, 0)
            self.exporter.refuse(sharer, store, "BUS", 2, page, str(error.strerror))
        except MmuNotifyError as error:
            self.exporter.refuse(sharer, store, "BUS", 2, store.offset >> PAGE_SHIFT, str(error))
        finally:
            self.exporter.storing -= len(todo.data)
        self.flush()

    async def _recall(self, todo: Recall) -> None:
        segment = todo.sharer.segment
        table = segment.memory.table
        first, last = segment.first + todo.first, segment.first + todo.last
        # Only its own pages; whoever else has them keeps them.
        pages = sorted(page for page in todo.sharer.held if first <= page < last)
        if pages:
            table.leave(todo.sharer, pages)
            todo.sharer.drop(pages)
        self.flush()

    async def _kill(self, peer: Peer) -> None:
        pid = await peer.sender.kill()
        self.log.emit(events.KILLED, partition=peer.part, pid=pid)
        self.exporter.died(peer.part, peer.inc, "killed")
        self.flush()

    def _answer(self, todo: Reply) -> None:
        ask = todo.ask
        body = _fitting(self.status(todo.sender))
        self.engine.send(address_of(ask.part, ask.me), encode(Report(ask.rid)), body)

    def status(self, asker: Sender | None = None) -> dict[str, Any]:
        """What is exported, by whom it is attached, and who waits for whom: plain data.

        Of an `asker` only the segments that it may read.
        """
        now = self.clock()
        exporter = self.exporter
        segments = [
            segment
            for segment in exporter.segments.values()
            if asker is None or segment.permits(asker.credentials, write=False)
        ]
        tables = {id(segment.memory.table): segment.memory.table for segment in segments}
        return {
            "partition": self.part,
            "incarnation": self.inc.hex(),
            "pid": os.getpid(),
            "lease": exporter.ttl,
            "heartbeat": exporter.heartbeat,
            "segments": [
                {
                    "segid": segment.segid,
                    "name": segment.name,
                    "start": segment.start,
                    "size": segment.size,
                    "mode": f"{segment.mode:o}",
                    "fence": segment.fence,
                    "state": segment.state.value,
                    "attached": sum(
                        sharer.segment is segment for sharer in exporter.sharers.values()
                    ),
                    "sharers": [
                        {
                            "partition": sharer.peer.part,
                            "peer": str(sharer.peer.sender),
                            "writes": sharer.writable,
                            "pages": len(sharer.held),
                            "unacknowledged": sharer.number - sharer.acked,
                            "requests_waiting": len(sharer.busy),
                            "lease_left": round(sharer.peer.heard + exporter.ttl - now, 3),
                        }
                        for sharer in exporter.sharers.values()
                        if sharer.segment is segment
                    ],
                }
                for segment in segments
            ],
            "waiting_for": sorted(
                {
                    name
                    for table in tables.values()
                    for wait in table.waits
                    for name in wait.waiting_for
                }
            ),
            "pinned": sum(len(table.pins) for table in tables.values()),
            "queues": {
                "batches_outstanding": sum(
                    peer.batch is not None for peer in exporter.peers.values()
                ),
                "batches_sent": exporter.batches,
                "batches_resent": exporter.resent,
            },
            "refused_frames": self.refused,
            "importing": [
                {
                    "segid": grant.segid,
                    "pages": len(grant.cache),
                    "faults_under_way": len(grant.faults),
                    "lease_left": round(grant.lease_until - now, 3),
                }
                for grant in self.importer.grants.values()
            ]
            if asker is None
            else [],
        }

    # ------------------------------------------------------------------ time

    async def _keep_time(self) -> None:
        exporter, importer = self.exporter, self.importer
        while True:
            now = self.clock()
            if now >= exporter.deadline:
                exporter.tick(now)
            if now >= importer.deadline:
                importer.tick(now)
            self.flush()
            due = min(exporter.deadline, importer.deadline)
            self._wake = anyio.Event()
            self._sleeps_until = due
            with anyio.move_on_after(max(0.0, due - self.clock())):
                await self._wake.wait()
            self._wake = None
            self._sleeps_until = -math.inf

    # ------------------------------------------------------------------ waiting

    async def answered(self, pending: Pending) -> None:
        """Return when a request is answered; raise what it was answered with."""
        self.flush()
        if not pending.done:
            await self.engine.pump(address_of(pending.part, pending.inc), pending)
        if not pending.done:
            event = anyio.Event()
            pending.waiters += (event.set,)
            await event.wait()
        if pending.error is not None:
            raise _again(pending.error)

    async def get_remote(self, segid: int, *, write: bool) -> RemotePermit:
        """A permit of another partition. Raises XpmemError, ExporterGone."""
        grant = self.importer.get(segid, write=write, now=self.clock())
        assert grant.getting is not None
        await self.answered(grant.getting)
        return RemotePermit(self, grant)

    async def ask(self, part: int) -> dict[str, Any]:
        """What another partition exports to us, and how it is. Raises ExporterGone."""
        pending = self.importer.ask(part, self.clock())
        await self.answered(pending)
        found: dict[str, Any] = msgspec.json.decode(pending.answer)
        return found

    async def settle(self, table: PfnTable, wait: Wait) -> None:
        """Return when everything is acknowledged, or whoever has not is fenced.

        Cancelled, nothing is freed: what was told is told, and the next invalidation waits for it.
        """
        self.flush()
        self.engine.take()
        if not wait.pending:
            table.waits.discard(wait)
            return
        event = anyio.Event()
        wait.done = event.set
        began = self.clock()
        try:
            with anyio.move_on_after(self._warn_after) as slow:
                await event.wait()
            while slow.cancelled_caught and wait.pending:
                self.log.emit(
                    events.WAITING,
                    partitions=wait.waiting_for,
                    seconds=round(self.clock() - began, 3),
                )
                with anyio.move_on_after(self._warn_after) as slow:
                    await event.wait()
        finally:
            wait.done = None
            table.waits.discard(wait)


def _fitting(report: dict[str, Any]) -> bytes:
    """A report as JSON, with as many importers and segments left out as it takes to send it."""
    shown = 1 << 14
    while len(body := msgspec.json.encode(report)) > _REPORT:
        for segment in report["segments"]:
            del segment["sharers"][shown:]
        if not shown:
            del report["segments"][len(report["segments"]) // 2 :]
        shown //= 2
    return body


def _again(error: BaseException) -> BaseException:
    """An exception of the same kind and content: several may wait for one answer."""
    match error:
        case BadAddress():
            return BadAddress(
                str(error.strerror), signal=error.signal, code=error.code, address=error.address
            )
        case ExporterGone() | FencedError():
            return type(error)(str(error.strerror))
        case XpmemError():
            return XpmemError(error.errno or 0, str(error.strerror))
    return error
