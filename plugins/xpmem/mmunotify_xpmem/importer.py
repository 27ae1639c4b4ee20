"""The importing side of the protocol, without input, output or clock.

A `Grant` is a permit of another partition: pages that were got with it are in its `cache`, and may
be used while its lease runs. What arrives goes into `receive`, time into `tick`; what is to be sent
is in `outbox`, and requests call their waiters when they are done.

The rules of it, of which none can be left out (the numbers are those of the exporting side, too):

    1  an invalidation marks the faults under way that it meets: what they bring is thrown away
    3  only what is contiguous is acknowledged: a batch that is missing is not by the next one
    5  pages carry the exporter's incarnation: one that has rebooted cannot answer old faults
    7  a fault is answered once: a page that comes twice, or late, is thrown away
"""

from __future__ import annotations

import errno
from itertools import groupby, repeat
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs

from mmunotify import PAGE_SHIFT, PAGE_SIZE, BadAddress

from .errors import ExporterGone, FencedError, XpmemError, bus_error
from .wire import (
    MAX_PAGES,
    Ack,
    Ask,
    BadMessage,
    Broken,
    Detach,
    Fault,
    Fenced,
    Get,
    Granted,
    Heartbeat,
    HeartbeatAck,
    Inv,
    Message,
    Page,
    Refused,
    Release,
    Report,
    Request,
    Retry,
    Store,
    Stored,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .engine import Sender
    from .wire import Buffer

INFINITY: Final = float("inf")
_BATCH: Final = MAX_PAGES * PAGE_SIZE
_ROOM: Final = _BATCH + 256
"""Bytes of a frame with that many pages, and more."""
_FREE: Final = 64
RATE_ERROR: Final = 0.01
"""By how much two clocks may differ in rate: a lease ends that much earlier here."""


@attrs.define(slots=True, eq=False, repr=False)
class Pending:
    """A request that is under way: sent again until it is answered or given up."""

    part: int
    inc: bytes
    message: Request
    body: Buffer
    sent: float
    """When it was sent first: what an answer proves is as old as that."""
    interval: float
    resend_at: float
    give_up_at: float
    grant: Grant | None = None
    asked: float = 0.0
    """From when on the exporter has had time to answer."""
    waiters: tuple[Callable[[], object], ...] = ()
    done: bool = False
    error: BaseException | None = None

    def finish(self, error: BaseException | None = None) -> None:
        """It is answered, or never will be."""
        if not self.done:
            self.done = True
            self.error = error
            for wake in self.waiters:
                wake()


@attrs.define(slots=True, eq=False, repr=False)
class Faulting(Pending):
    """A fault under way."""

    fid: int = 0
    first: int = 0
    need: int = 1
    count: int = 1
    stale: bool = False


@attrs.define(slots=True, eq=False, repr=False)
class Asking(Pending):
    """A question under way."""

    answer: bytes = b""


@attrs.define(slots=True, eq=False, repr=False)
class Source:
    """One incarnation of an exporting partition that permits are held of."""

    part: int
    inc: bytes
    ttl: float
    heartbeat: float
    heard: float
    beat_at: float
    sender: Sender
    """Who speaks for it."""
    grants: dict[bytes, Grant] = attrs.field(factory=dict)


class Batch:
    """Pages that came together. Its data is used again when none of them is here any more."""

    __slots__ = ("count", "data", "first", "live")

    def __init__(self, first: int, count: int, data: Buffer) -> None:
        self.first = first
        self.count = count
        self.data = data
        self.live = count
        """How many of them are still here."""


class Buffers:
    """Memory that batches of pages are received into, and stay in while they are here.

    It is used again: fresh memory costs more than copying into it.
    """

    def __init__(self) -> None:
        self._free: Final[list[bytearray]] = []
        self.lent: Final[dict[int, bytearray]] = {}
        """By identity: what messages are received into that have not been handled yet."""

    def lend(self, size: int) -> memoryview:
        """Memory for a frame of `size` bytes."""
        if _BATCH < size <= _ROOM:
            buffer = self._free.pop() if self._free else bytearray(_ROOM)
        else:
            buffer = bytearray(size)
        self.lent[id(buffer)] = buffer
        return memoryview(buffer)[:size]

    def keep(self, body: Buffer) -> Buffer:
        """What has the bytes of `body` from now on: what it was received into, or a copy."""
        if self.lent and isinstance(body, memoryview) and id(body.obj) in self.lent:
            del self.lent[id(body.obj)]
            return body
        return bytes(body)

    def handled(self, frame: memoryview) -> None:
        """A frame was handled: where it is is free again, unless it was kept."""
        self._take(self.lent.pop(id(frame.obj), None))

    def take_back(self, data: Buffer) -> None:
        """Nobody looks at it any more."""
        if isinstance(data, memoryview):
            self._take(data.obj)

    def _take(self, buffer: object) -> None:
        if isinstance(buffer, bytearray) and len(buffer) == _ROOM and len(self._free) < _FREE:
            self._free.append(buffer)


@attrs.define(slots=True, eq=False, repr=False)
class Grant:
    """A permit for a segment of another partition. Pages are counted from the segment's first."""

    segid: int
    write: bool
    source: Source | None = None
    """None while there is no permit: it is being got, again perhaps."""
    home: bytes = b""
    """The incarnation of the exporter that it was got from first: of no other is it good."""
    aid: bytes = b""
    pages: int = 0
    base: int = 0
    next: int = 1
    """The number of the next invalidation."""
    buffers: Buffers = attrs.field(factory=lambda: Buffers())
    cache: dict[int, Batch] = attrs.field(factory=dict)
    """The pages that are here, and what they came in."""
    batches: set[Batch] = attrs.field(factory=set)
    """Of them, what has more than one page."""
    epoch: int = 0
    """Counts what was dropped: whoever copies pages compares it before and after."""
    lease_until: float = 0.0
    since: float = 0.0
    getting: Pending | None = None
    faults: dict[int, Faulting] = attrs.field(factory=dict)
    stores: dict[int, Pending] = attrs.field(factory=dict)
    homeless: list[Faulting] = attrs.field(factory=list)
    """Faults that go on when there is a permit again."""
    releasing: Pending | None = None
    dead: BaseException | None = None
    """Why there will be no permit any more."""

    def install(self, first: int, body: Buffer) -> None:
        """Have pages from `first` on, as many as `body` holds."""
        count = len(body) >> PAGE_SHIFT
        batch = Batch(first, count, self.buffers.keep(body))
        cache = self.cache
        if count == 1:
            if first in cache:
                self._forget((first,))
            cache[first] = batch
            return
        pages = range(first, first + count)
        if not cache.keys().isdisjoint(pages):
            self._forget(pages)
        cache.update(dict.fromkeys(pages, batch))
        self.batches.add(batch)

    def drop(self, first: int, last: int) -> None:
        """Have nothing of pages [first, last)."""
        if first <= 0 and self.pages <= last:
            self.drop_all()
            return
        self.epoch += 1
        cache = self.cache
        if last - first <= len(cache):
            self._forget(range(first, last))
        else:
            self._forget([page for page in cache if first <= page < last])

    def _forget(self, pages: Iterable[int]) -> None:
        for batch, same in groupby(map(self.cache.pop, pages, repeat(None))):
            if batch is not None:
                batch.live -= len(list(same))
                if not batch.live:
                    self.batches.discard(batch)
                    self.buffers.take_back(batch.data)

    def drop_all(self) -> None:
        """Have nothing."""
        self.epoch += 1
        for batch in self.batches:
            self.buffers.take_back(batch.data)
        self.batches.clear()
        self.cache.clear()

    def bytes_of(self, page: int, low: int, size: int) -> bytes | None:
        """A part of one page, if it is here."""
        batch = self.cache.get(page)
        if batch is None:
            return None
        at = (page - batch.first << PAGE_SHIFT) + low
        data = batch.data[at : at + size]
        return data if isinstance(data, bytes) else bytes(data)

    def whole(self, first: int, last: int) -> Buffer | None:
        """Pages [first, last), if they are all here. To be used before anything else runs."""
        cache = self.cache
        batch = cache.get(first)
        if batch is not None and batch.first == first and batch.live == last - first == batch.count:
            return batch.data
        parts: list[Buffer] = []
        for page in range(first, last):
            batch = cache.get(page)
            if batch is None:
                return None
            at = page - batch.first << PAGE_SHIFT
            parts.append(memoryview(batch.data)[at : at + PAGE_SIZE])
        return b"".join(parts)


P = TypeVar("P", bound=Pending)


class Importer:
    """All permits that one partition has of others. `new_id` makes 128 random bits.

    `patience` is for how many seconds an exporter may be silent before its requests fail.
    """

    def __init__(
        self,
        part: int,
        inc: bytes,
        new_id: Callable[[], bytes],
        *,
        resend: float = 0.05,
        patience: float = 10.0,
    ) -> None:
        self.part: Final = part
        self.inc: Final = inc
        self.resend: Final = resend
        self.patience: Final = patience
        self.grants: Final[dict[bytes, Grant]] = {}
        self.sources: Final[dict[tuple[int, bytes], Source]] = {}
        self.outbox: list[tuple[int, bytes, Message, Buffer]] = []
        """What to send: partition, incarnation (empty: whichever there is), message, body."""
        self.reattached: list[Grant] = []
        """Permits that were fenced and got anew, for the caller to log."""
        self.deadline = INFINITY
        """When `tick` wants to be called, at the latest."""
        self.ignored = 0
        """Answers to what was not asked, or not by this life."""
        self._new_id = new_id
        self._fid = 0
        self.buffers: Final = Buffers()
        self._stopped_after = 4 * resend
        self._pending: Final[dict[Pending, None]] = {}
        self._by_rid: Final[dict[bytes, Pending]] = {}

    # ------------------------------------------------------------------ requests

    def get(self, segid: int, *, write: bool, now: float) -> Grant:
        """Ask for a permit; `Grant.getting` is the request."""
        grant = Grant(segid, write, buffers=self.buffers)
        self._get(grant, now)
        return grant

    def _get(self, grant: Grant, now: float) -> None:
        rid = self._new_id()
        message = Get(self.part, self.inc, rid, grant.segid, grant.write)
        pending = self._request(Pending, grant.segid >> 32, b"", message, now, grant=grant)
        self._by_rid[rid] = grant.getting = pending

    def fault(self, grant: Grant, first: int, need: int, count: int, now: float) -> Faulting:
        """Ask for pages [first, first + need), and up to `count` if they are at hand."""
        fault = Faulting(
            0, b"", _NOTHING, b"", now, self.resend, INFINITY, INFINITY, grant,
            0.0, (), False, None, 0, first, need, count,
        )  # fmt: skip
        if grant.dead is not None:
            fault.finish(grant.dead)
        elif grant.source is None:
            grant.homeless.append(fault)
        else:
            self._send_fault(grant, grant.source, fault, now)
        return fault

    def _send_fault(self, grant: Grant, source: Source, fault: Faulting, now: float) -> None:
        self._fid = fid = self._fid + 1
        fault.fid = fid
        fault.stale = False
        fault.sent = now
        fault.part, fault.inc = source.part, source.inc
        fault.message = Fault(
            self.part, self.inc, grant.aid, source.inc, fid, fault.first, fault.need, fault.count
        )
        grant.faults[fid] = fault
        self._send_pending(fault, now)

    def store(self, grant: Grant, offset: int, data: bytes, now: float) -> Pending:
        """Ask the exporter to write `data` at a byte of the segment. One at a time for a permit."""
        self._fid = fid = self._fid + 1
        source = grant.source
        if grant.dead is not None or source is None:
            lost = Pending(0, b"", _NOTHING, b"", now, 0.0, 0.0, 0.0, grant)
            lost.finish(grant.dead or FencedError("no permit now: nothing was stored"))
            return lost
        message = Store(self.part, self.inc, grant.aid, source.inc, fid, offset)
        pending = self._request(
            Pending, source.part, source.inc, message, now, data, grant, INFINITY
        )
        grant.stores[fid] = pending
        return pending

    def detach(self, grant: Grant, first: int, last: int) -> None:
        """Drop pages that nobody wants any longer, and let the exporter know."""
        grant.drop(first, last)
        source = grant.source
        if source is not None:
            self._send(
                source.part,
                source.inc,
                Detach(self.part, self.inc, grant.aid, source.inc, first, last),
            )

    def release(self, grant: Grant, now: float) -> Pending | None:
        """Give a permit back; the request, or None if there is none to give back."""
        grant.drop_all()
        grant.dead = BadAddress(
            f"segment {grant.segid:#x}: the permit is released", address=grant.base << PAGE_SHIFT
        )
        self._fail_faults(grant, grant.dead)
        source = grant.source
        if source is None:
            return None
        message = Release(self.part, self.inc, grant.aid, source.inc)
        grant.releasing = self._request(Pending, source.part, source.inc, message, now, grant=grant)
        return grant.releasing

    def ask(self, part: int, now: float) -> Asking:
        """Ask a partition what it exports and how it is."""
        rid = self._new_id()
        pending = self._request(Asking, part, b"", Ask(self.part, self.inc, rid), now)
        self._by_rid[rid] = pending
        return pending

    def _request(
        self,
        kind: type[P],
        part: int,
        inc: bytes,
        message: Request,
        now: float,
        body: Buffer = b"",
        grant: Grant | None = None,
        give_up_at: float = 0.0,
    ) -> P:
        give_up = give_up_at or now + self.patience
        pending = kind(part, inc, message, body, now, self.resend, INFINITY, give_up, grant)
        self._send_pending(pending, now)
        return pending

    def _send_pending(self, pending: Pending, now: float) -> None:
        self._pending[pending] = None
        pending.asked = now
        pending.interval = self.resend
        pending.resend_at = at = now + self.resend
        if at < self.deadline:
            self.deadline = at
        self.outbox.append((pending.part, pending.inc, pending.message, pending.body))

    # ------------------------------------------------------------------ what arrives

    def receive(self, sender: Sender, message: Message, body: memoryview, now: float) -> None:
        """A message of an exporter. Raises BadMessage if it cannot be right, or not from there.

        What names a request or permit is from who was told its random id. What extends leases
        does not, and has to come from who has granted them.
        """
        if isinstance(message, HeartbeatAck):
            self._heard(sender, message, now)
        elif isinstance(message, Granted):
            self._granted(sender, message, now)
        else:
            self._handlers[type(message)](self, message, body, now)

    def _granted(self, sender: Sender, granted: Granted, now: float) -> None:
        pending = self._by_rid.pop(granted.rid, None)
        grant = None if pending is None else pending.grant
        if pending is None or grant is None or grant.dead is not None:
            if granted.aid not in self.grants:  # nobody wants it any more, and it is no repetition
                self._send(
                    granted.part,
                    granted.inc,
                    Release(self.part, self.inc, granted.aid, granted.inc),
                )
            return
        if grant.home:
            self.reattached.append(grant)
        grant.home = grant.home or granted.inc
        if granted.inc != grant.home:
            self._lost(grant, XpmemError(errno.ENOENT, f"partition {granted.part} has rebooted"))
            self._finish(pending, grant.dead)
            return
        key = granted.part, granted.inc
        source = self.sources.get(key)
        if source is None:
            beat_at = pending.sent + granted.heartbeat
            source = Source(*key, granted.ttl, granted.heartbeat, now, beat_at, sender)
            self.sources[key] = source
        source.heard = now
        grant.source, grant.aid = source, granted.aid
        grant.pages, grant.base = granted.pages, granted.base
        grant.next = 1
        grant.since = now
        grant.getting = None
        self.grants[granted.aid] = source.grants[granted.aid] = grant
        self._extend(grant, pending.sent)
        if source.beat_at < self.deadline:
            self.deadline = source.beat_at
        homeless, grant.homeless = grant.homeless, []
        for fault in homeless:
            self._send_fault(grant, source, fault, now)
        self._finish(pending)

    def _refused(self, refused: Refused, body: memoryview, now: float) -> None:
        pending = self._by_rid.pop(refused.rid, None)
        if pending is not None:
            error = XpmemError(refused.code, refused.text)
            self._lost(pending.grant, error)
            self._finish(pending, error)

    def _lost(self, grant: Grant | None, error: BaseException) -> None:
        """There will be no permit: who had one before gets SIGBUS."""
        if grant is None:
            return
        gone = (
            error
            if isinstance(error, ExporterGone) or not grant.home
            else bus_error(f"segment {grant.segid:#x}: {error}", grant.base << PAGE_SHIFT)
        )
        grant.dead = gone
        grant.getting = None
        self._fail_faults(grant, gone)

    def _page(self, page: Page, body: memoryview, now: float) -> None:
        found = self._answered(page.aid, page.inc, page.fid, now)
        if found is None:
            return
        grant, fault = found
        if fault.stale:  # rule 1
            assert grant.source is not None
            self._send_fault(grant, grant.source, fault, now)
            return
        count, rest = divmod(len(body), PAGE_SIZE)
        if rest or not fault.need <= count <= min(fault.count, grant.pages - fault.first):
            raise BadMessage(f"{len(body)} bytes in answer to {fault.message}")
        self._extend(grant, fault.sent)
        grant.install(fault.first, body)
        fault.finish()

    def _answered(
        self, aid: bytes, inc: bytes, fid: int, now: float
    ) -> tuple[Grant, Faulting] | None:
        """Rules 5 and 7: the fault that this answers, which is then no longer under way."""
        grant = self._of(aid, inc, now)
        if grant is not None:
            fault = grant.faults.pop(fid, None)
            if fault is not None:
                self._pending.pop(fault, None)
                return grant, fault
        self.ignored += 1
        return None

    def _of(self, aid: bytes, inc: bytes, now: float) -> Grant | None:
        """Rule 5: the permit, if it is of this life of its exporter."""
        grant = self.grants.get(aid)
        if grant is None or grant.source is None or grant.source.inc != inc:
            return None
        grant.source.heard = now
        return grant

    def _broken(self, broken: Broken, body: memoryview, now: float) -> None:
        grant = self._of(broken.aid, broken.inc, now)
        if grant is None:
            return
        pending: Pending | None = grant.faults.pop(broken.fid, None)
        if pending is None:
            pending = grant.stores.pop(broken.fid, None)
        if pending is not None:
            address = grant.base + broken.page << PAGE_SHIFT
            signal = "BUS" if broken.signal == "BUS" else "SEGV"
            text = f"segment {grant.segid:#x}: {broken.text}"
            self._finish(
                pending, BadAddress(text, signal=signal, code=broken.code, address=address)
            )

    def _stored(self, stored: Stored, body: memoryview, now: float) -> None:
        grant = self._of(stored.aid, stored.inc, now)
        pending = None if grant is None else grant.stores.pop(stored.fid, None)
        if grant is not None and pending is not None:
            self._extend(grant, pending.sent)
            self._finish(pending)

    def _retry(self, retry: Retry, body: memoryview, now: float) -> None:
        self._of(retry.aid, retry.inc, now)  # it is sent again when its time comes

    def _inv(self, inv: Inv, body: memoryview, now: float) -> None:
        acks: list[tuple[bytes, int]] = []
        source = None
        for aid, start, upto, flat in inv.batch:
            grant = self._of(aid, inv.inc, now)
            if grant is None or grant.source is None:
                continue
            source = grant.source
            for at in range(0, len(flat) - 1, 2):
                self._invalidate(grant, flat[at], flat[at + 1])
            if self._contiguous(grant, start):
                grant.next = max(grant.next, upto + 1)
            acks.append((aid, grant.next - 1))
        if source is not None:
            self._send(source.part, source.inc, Ack(self.part, self.inc, inv.inc, acks))

    def _contiguous(self, grant: Grant, start: int) -> bool:
        """Rule 3: whether nothing is missing before `start`."""
        return start <= grant.next

    def _invalidate(self, grant: Grant, first: int, last: int) -> None:
        grant.drop(first, last)
        if grant.faults:
            self._overtake(grant, first, last)

    def _overtake(self, grant: Grant, first: int, last: int) -> None:
        """Rule 1: what the faults that are under way bring is from before."""
        for fault in grant.faults.values():
            if fault.first < last and first < fault.first + fault.count:
                fault.stale = True

    def _void(self, fenced: Fenced, body: memoryview, now: float) -> None:
        grant = self.grants.get(fenced.aid)
        if grant is not None:
            self._fenced(grant, now)

    def _fenced(self, grant: Grant, now: float) -> None:
        """The exporter has no such permit: drop everything, and get a new one."""
        self._forget(grant)
        for store in list(grant.stores.values()):
            self._finish(store, FencedError(f"fenced by partition {grant.segid >> 32}"))
        grant.stores.clear()
        if grant.releasing is not None:
            self._finish(grant.releasing)
            return
        if grant.dead is not None:
            return
        for fault in grant.faults.values():
            self._pending.pop(fault, None)
            grant.homeless.append(fault)
        grant.faults.clear()
        self._get(grant, now)

    def _forget(self, grant: Grant) -> None:
        grant.drop_all()
        self.grants.pop(grant.aid, None)
        source, grant.source = grant.source, None
        if source is not None:
            source.grants.pop(grant.aid, None)
            if not source.grants:
                self.sources.pop((source.part, source.inc), None)

    def _heard(self, sender: Sender, ack: HeartbeatAck, now: float) -> None:
        source = self.sources.get((ack.part, ack.inc))
        if source is None:
            return
        if source.sender is not sender and not source.sender.is_same(sender):
            raise BadMessage(f"{sender} speaks for partition {ack.part}, was {source.sender}")
        if ack.sent > now:
            raise BadMessage(
                f"partition {ack.part} has heard at {now:g} what is sent at {ack.sent:g}"
            )
        source.heard = now
        fenced = set(ack.fenced)
        for grant in list(source.grants.values()):
            if grant.since < ack.sent and grant.aid not in fenced:
                self._extend(grant, ack.sent)
        for aid in fenced:
            known = source.grants.get(aid)
            if known is not None:
                self._fenced(known, now)

    def _report(self, report: Report, body: memoryview, now: float) -> None:
        pending = self._by_rid.pop(report.rid, None)
        if isinstance(pending, Asking):
            pending.answer = bytes(body)
            self._finish(pending)

    def _extend(self, grant: Grant, sent: float) -> None:
        """The exporter has heard what was sent then: it holds still for a lease from there."""
        assert grant.source is not None
        until = sent + grant.source.ttl * (1 - RATE_ERROR)
        if until > grant.lease_until:
            grant.lease_until = until

    # ------------------------------------------------------------------ time

    def tick(self, now: float) -> None:
        """Time has passed: send again, give up, beat, and let go of what the lease is over for."""
        if now - self.deadline > self._stopped_after:
            self._was_stopped(now - self.deadline)
        deadline = INFINITY
        for source in list(self.sources.values()):
            if now >= source.beat_at:
                source.beat_at = now + source.heartbeat
                aids = list(source.grants)
                self._send(
                    source.part,
                    source.inc,
                    Heartbeat(self.part, self.inc, source.inc, now, aids),
                )
            deadline = min(deadline, source.beat_at)
            for grant in source.grants.values():
                if now < grant.lease_until:
                    deadline = min(deadline, grant.lease_until)
                elif grant.cache:
                    grant.drop_all()
        for pending in list(self._pending):
            if now >= self._give_up_at(pending):
                self._give_up(pending)
            elif now >= pending.resend_at:
                pending.interval = min(2 * pending.interval, 20 * self.resend)
                pending.resend_at = now + pending.interval
                self._send(pending.part, pending.inc, pending.message, pending.body)
                deadline = min(deadline, pending.resend_at)
            else:
                deadline = min(deadline, pending.resend_at)
        self.deadline = deadline

    def _was_stopped(self, seconds: float) -> None:
        """This process has not run meanwhile: that nobody was heard of is nobody's fault."""
        for source in self.sources.values():
            source.heard += seconds
        for pending in self._pending:
            pending.asked += seconds
            pending.give_up_at += seconds

    def _give_up_at(self, pending: Pending) -> float:
        if pending.give_up_at != INFINITY:
            return pending.give_up_at
        # A fault or store: as long as the exporter is heard of, it may wait for something there.
        grant = pending.grant
        assert grant is not None
        heard = grant.source.heard if grant.source is not None else pending.asked
        return max(heard, pending.asked) + self.patience

    def _give_up(self, pending: Pending) -> None:
        what = f"partition {pending.part} has been silent for {self.patience:g} s"
        error = ExporterGone(f"{what}: no answer to {type(pending.message).__name__}")
        grant = pending.grant
        if grant is not None and pending is grant.getting:
            self._lost(grant, error)
        elif grant is not None and pending is grant.releasing:
            self._forget(grant)
            self._finish(pending)
            return
        elif isinstance(pending, Faulting) and grant is not None:
            grant.faults.pop(pending.fid, None)
        elif grant is not None:
            grant.stores = {fid: known for fid, known in grant.stores.items() if known != pending}
        self._finish(pending, error)

    def messages_lost(self, now: float) -> None:
        """Messages may have been lost: send again at once what is not answered, and beat."""
        for pending in self._pending:
            pending.interval = self.resend
            pending.resend_at = now
        for source in self.sources.values():
            source.beat_at = now
        self.deadline = now

    # ------------------------------------------------------------------ inside

    def _fail_faults(self, grant: Grant, error: BaseException) -> None:
        for fault in [*grant.faults.values(), *grant.homeless]:
            self._finish(fault, error)
        grant.faults.clear()
        grant.homeless.clear()

    def _finish(self, pending: Pending, error: BaseException | None = None) -> None:
        self._pending.pop(pending, None)
        pending.finish(error)

    def _send(self, part: int, inc: bytes, message: Message, body: Buffer = b"") -> None:
        self.outbox.append((part, inc, message, body))

    _handlers: Final[dict[type[Message], Callable[..., Any]]] = {
        Refused: _refused,
        Page: _page,
        Broken: _broken,
        Retry: _retry,
        Fenced: _void,
        Inv: _inv,
        Stored: _stored,
        Report: _report,
    }


_NOTHING: Final = Request(1, bytes(16))
