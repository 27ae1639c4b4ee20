"""The exporting side of the protocol, without input, output or clock.

What arrives goes into `receive`, time into `tick`; what is to be sent is in `outbox`, what the
caller has to do in `todo`. Nothing here suspends, and nothing depends on the order, the number or
the arrival of messages: safety comes from ids and numbers, clocks decide only when to give up.

The rules of it, of which none can be left out (the numbers are those of the importing side, too):

    2  faults on a range that is being invalidated are parked until it is over
    3  an acknowledgement is for the numbers that it names, and for no later ones
    4  an acknowledgement is matched by permit and incarnation, not by partition
    5  faults carry the exporter's incarnation: what was meant for its past life is not served
    6  a permit enters the PFN table before the page is sent
    8  a permit that is not in the table is fenced: never served, never acknowledged for
"""

from __future__ import annotations

import errno
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import attrs

from mmunotify import PAGE_SIZE

from .pfns import PfnTable, Wait, merged, runs_of
from .segments import Segment, State
from .wire import (
    MAX_PAGES,
    MAX_RANGES,
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
    Request,
    Retry,
    Store,
    Stored,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .engine import Sender
    from .wire import Buffer

INFINITY: Final = float("inf")
_STORE: Final = MAX_PAGES * PAGE_SIZE


@attrs.frozen
class Limits:
    """How much one importing partition may have at a time; more is answered with Retry or EMFILE.

    They bound what a partition can make the exporter remember.
    """

    permits: int = 4096
    parked: int = 256
    """Faults and stores that wait for something here."""
    partitions: int = 1 << 14
    permits_of_all: int = 1 << 17
    storing: int = 64 << 20
    """Bytes of stores that are not done. Of all partitions together, as are the two before."""


@attrs.define(slots=True, eq=False, repr=False)
class Peer:
    """One incarnation of an importing partition."""

    part: int
    inc: bytes
    sender: Sender
    heard: float
    sharers: dict[bytes, Sharer] = attrs.field(factory=dict)
    by_rid: dict[bytes, Sharer] = attrs.field(factory=dict)
    dirty: dict[Sharer, None] = attrs.field(factory=dict)
    """Permits with invalidations that are not sent yet."""
    batch: Inv | None = None
    """The one that is outstanding."""
    outstanding: dict[Sharer, int] = attrs.field(factory=dict)
    """What each permit has to acknowledge of it."""
    deaf_at: float = INFINITY
    """When it has not acknowledged it for too long."""
    void_at: float = INFINITY
    """When the first of its void permits is fenced."""
    resend_at: float = INFINITY
    interval: float = 0.0
    waiting: int = 0
    """Faults and stores that wait for something here."""
    condemned: bool = False

    @property
    def name(self) -> str:
        """For reports."""
        return str(self.part)


@attrs.define(slots=True, eq=False, repr=False)
class Sharer:
    """A permit that was given to another partition (an apid), and what it may have."""

    aid: bytes
    peer: Peer
    segment: Segment
    writable: bool
    dirty: Callable[[Sharer], None]
    held: set[int] = attrs.field(factory=set)
    """Pages of the address space, not of the segment."""
    number: int = 0
    """Of the latest invalidation."""
    sent: int = 0
    acked: int = 0
    fresh: list[tuple[int, int]] = attrs.field(factory=list)
    """Ranges of the segment that are not sent yet."""
    low: int = 0
    high: int = 0
    """All that is not acknowledged lies in [low, high)."""
    waits: deque[tuple[int, Wait]] = attrs.field(factory=deque)
    busy: set[int] = attrs.field(factory=set)
    """Faults and stores that wait for something here, by fid."""
    stored: int = -1
    """The latest store that was done, or refused; `answer` says which."""
    answer: Message | None = None
    void_at: float = INFINITY
    """When it is fenced for being deaf; it is served nothing until then, so that its lease ends."""

    @property
    def remote(self) -> bool:
        """It has to be waited for."""
        return True

    @property
    def name(self) -> str:
        """For reports: the partition."""
        return self.peer.name

    def drop(self, pages: Sequence[int]) -> None:
        """Queue an invalidation: sent with all others that are waiting, once one can be."""
        if len(pages) == len(self.held):  # it holds all that the table has it for
            self.held.clear()
        else:
            self.held.difference_update(pages)
        if self.number == self.acked:
            self.low, self.high = pages[0], pages[-1] + 1
            self.segment.memory.table.remotes.add(self)
        else:
            self.low = min(self.low, pages[0])
            self.high = max(self.high, pages[-1] + 1)
        self.number += 1
        first = self.segment.first
        if pages[-1] - pages[0] == len(pages) - 1:
            self.fresh.append((pages[0] - first, pages[-1] + 1 - first))
        else:
            self.fresh += [(low - first, high - first) for low, high in runs_of(pages)]
        self.dirty(self)

    def unacked(self, first: int, last: int) -> int:
        """What must be acknowledged before nothing of [first, last) is left."""
        return self.number if first < self.high and self.low < last else 0

    def tell(self, number: int, wait: Wait) -> None:
        """Call `wait.acknowledged` once `number` is acknowledged, or this is fenced."""
        self.waits.append((number, wait))

    def acknowledge(self, upto: int) -> None:
        """Whoever waited for this goes on."""
        self.acked = upto
        while self.waits and self.waits[0][0] <= upto:
            self.waits.popleft()[1].acknowledged(self)
        if self.acked == self.number:
            self.segment.memory.table.remotes.discard(self)


@attrs.frozen
class FaultIn:
    """To do: make the pages present, then `Exporter.resume`, or `refuse` if that fails."""

    sharer: Sharer
    fault: Fault


@attrs.frozen
class DoStore:
    """To do: recall the pages, write `data`, then `Exporter.stored`, or `refuse`.

    And take the length of `data` off `Exporter.storing`.
    """

    sharer: Sharer
    store: Store
    data: bytes


@attrs.frozen
class Recall:
    """To do: recall pages of the segment, because nobody wants them any more."""

    sharer: Sharer
    first: int
    last: int


@attrs.frozen
class Kill:
    """To do: kill the process behind the peer, then `Exporter.died`."""

    peer: Peer


@attrs.frozen
class FencedPeer:
    """To know: a permit was fenced."""

    sharer: Sharer
    reason: str


@attrs.frozen
class Reply:
    """To do: answer a question with the state of the partition."""

    ask: Ask
    sender: Sender


Todo: TypeAlias = FaultIn | DoStore | Recall | Kill | FencedPeer | Reply


class Exporter:
    """All that one partition exports, and to whom. `new_id` makes 128 random bits."""

    def __init__(
        self,
        part: int,
        inc: bytes,
        new_id: Callable[[], bytes],
        *,
        ttl: float = 5.0,
        heartbeat: float = 1.0,
        resend: float = 0.05,
        limits: Limits | None = None,
    ) -> None:
        self.part: Final = part
        self.inc: Final = inc
        self.ttl: Final = ttl
        self.heartbeat: Final = heartbeat
        self.resend: Final = resend
        self.limits: Final = limits or Limits()
        self.segments: Final[dict[int, Segment]] = {}
        self.peers: Final[dict[tuple[int, bytes], Peer]] = {}
        self.sharers: Final[dict[bytes, Sharer]] = {}
        self.outbox: list[tuple[int, bytes, Message, Buffer]] = []
        """What to send: partition, incarnation, message, body."""
        self.todo: list[Todo] = []
        self.deadline = INFINITY
        """When `tick` wants to be called, at the latest."""
        self.resent = 0
        """Batches that were sent again."""
        self.storing = 0
        """Bytes of stores that are not done."""
        self.batches = 0
        """Batches of invalidations that were sent."""
        self._new_id = new_id
        self.unsent: dict[Peer, None] = {}
        """Who has invalidations that `flush` can send."""

    # ------------------------------------------------------------------ what arrives

    def receive(self, sender: Sender, message: Request, body: memoryview, now: float) -> None:
        """A message of an importer. Raises BadMessage if it is not from who it says."""
        peer = self.peers.get((message.part, message.me))
        if peer is not None:
            if peer.sender is not sender and not peer.sender.is_same(sender):
                raise BadMessage(f"partition {message.part} speaks as {sender}, was {peer.sender}")
            peer.heard = now
        self._handlers[type(message)](self, sender, peer, message, body, now)

    def _get(
        self, sender: Sender, peer: Peer | None, get: Get, body: memoryview, now: float
    ) -> None:
        found = peer.by_rid.get(get.rid) if peer is not None else None
        if found is None:
            refused = self._refusal(sender, peer, get)
            if refused is not None:
                self._send(get.part, get.me, Refused(get.rid, *refused))
                return
            if peer is None:
                peer = Peer(get.part, get.me, sender, now, interval=self.resend)
                self.peers[get.part, get.me] = peer
                self._due(now + self.ttl)
            segment = self.segments[get.segid]
            aid = self._new_id()
            found = Sharer(aid, peer, segment, get.write, self._mark)
            self.sharers[aid] = peer.sharers[aid] = peer.by_rid[get.rid] = found
        segment = found.segment
        granted = Granted(
            rid=get.rid,
            aid=found.aid,
            part=self.part,
            inc=self.inc,
            pages=segment.pages,
            base=segment.first,
            ttl=self.ttl,
            heartbeat=self.heartbeat,
        )
        self._send(get.part, get.me, granted)

    def _refusal(self, sender: Sender, peer: Peer | None, get: Get) -> tuple[int, str] | None:
        segment = self.segments.get(get.segid)
        if segment is None or segment.state is not State.LIVING:
            return errno.ENOENT, f"no segment {get.segid:#x} in partition {self.part}"
        if not segment.permits(sender.credentials, write=get.write):
            what = "read and write" if get.write else "read"
            return (
                errno.EACCES,
                f"segment {get.segid:#x} has mode {segment.mode:o}: {sender} may not {what}",
            )
        if segment.fence == "kill" and not sender.killable:
            return (
                errno.EPERM,
                f"segment {get.segid:#x} is only for processes of its host: it kills silent ones",
            )
        if len(peer.sharers) >= self.limits.permits if peer is not None else False:
            return errno.EMFILE, f"partition {get.part} has {self.limits.permits} permits already"
        if peer is None and len(self.peers) >= self.limits.partitions:
            return errno.EMFILE, f"{self.limits.partitions} partitions are attached already"
        if len(self.sharers) >= self.limits.permits_of_all:
            return errno.EMFILE, f"{self.limits.permits_of_all} permits are given already"
        return None

    def _fault(
        self, sender: Sender, peer: Peer | None, fault: Fault, body: memoryview, now: float
    ) -> None:
        sharer = self._known(peer, fault.aid, fault.inc)
        if sharer is None:
            self._fenced(fault)
        elif fault.fid not in sharer.busy:
            self._serve(sharer, fault)

    def _serve(self, sharer: Sharer, fault: Fault) -> None:
        """Send the pages; park the fault, or have them faulted in, where that has to be."""
        segment = sharer.segment
        first = segment.first + fault.first
        if segment.state is not State.LIVING or fault.first + fault.need > segment.pages:
            where = f"page {fault.first:#x} of segment {segment.segid:#x}"
            gone = "is beyond its end" if segment.state is State.LIVING else "is removed"
            self.refuse(sharer, fault, "BUS", 2, fault.first, f"{where} {gone}")
            return
        if not segment.permits(sharer.peer.sender.credentials, write=sharer.writable):
            self.refuse(sharer, fault, "SEGV", 2, fault.first, "the permit is withdrawn")
            return
        table = segment.memory.table
        count = max(fault.need, min(fault.count, segment.pages - fault.first))
        if table.open and self._held_off(table, first, first + count):
            count = fault.need
            if self._held_off(table, first, first + count):
                if self._wait(sharer, fault):
                    table.park(first, first + count, partial(self.resume, sharer, fault))
                return
        found = segment.memory.copy(first, fault.need, count)
        if found is None:
            if self._wait(sharer, fault):
                self.todo.append(FaultIn(sharer, fault))
            return
        count, body = found
        table.counters["served"] += count
        self._enter(table, first, first + count, sharer)
        peer = sharer.peer
        self._send(peer.part, peer.inc, Page(sharer.aid, self.inc, fault.fid), body)

    def _held_off(self, table: PfnTable, first: int, last: int) -> bool:
        """Rule 2: whether pages of [first, last) are being invalidated."""
        return table.closed(first, last)

    def _enter(self, table: PfnTable, first: int, last: int, sharer: Sharer) -> None:
        """Rule 6: from now on an invalidation of [first, last) is told to `sharer`."""
        table.enter(first, last, sharer)
        if last - first == 1:
            sharer.held.add(first)
        else:
            sharer.held.update(range(first, last))

    def _wait(self, sharer: Sharer, request: Fault | Store) -> bool:
        """Note that a request waits for something; False, and Retry, if too many do."""
        if sharer.peer.waiting >= self.limits.parked:
            peer = sharer.peer
            self._send(peer.part, peer.inc, Retry(sharer.aid, self.inc, request.fid))
            return False
        sharer.peer.waiting += 1
        sharer.busy.add(request.fid)
        return True

    def _store(
        self, sender: Sender, peer: Peer | None, store: Store, body: memoryview, now: float
    ) -> None:
        sharer = self._known(peer, store.aid, store.inc)
        if sharer is None:
            self._fenced(store)
            return
        if store.fid <= sharer.stored:
            if store.fid == sharer.stored and sharer.answer is not None:
                self._send(sharer.peer.part, sharer.peer.inc, sharer.answer)
            return
        if store.fid in sharer.busy:
            return
        segment = sharer.segment
        if len(body) > _STORE:
            raise BadMessage(f"a store of {len(body)} bytes: expected up to {_STORE}")
        if not body or store.offset + len(body) > segment.size:
            page = store.offset >> 12
            self.refuse(sharer, store, "BUS", 2, page, "a store beyond the segment's end")
        elif not sharer.writable or not segment.permits(sender.credentials, write=True):
            self.refuse(sharer, store, "SEGV", 2, store.offset >> 12, "the permit is read-only")
        elif segment.state is not State.LIVING:
            self.refuse(sharer, store, "BUS", 2, store.offset >> 12, "the segment is removed")
        elif self.storing + len(body) > self.limits.storing:
            self._send(store.part, store.me, Retry(store.aid, self.inc, store.fid))
        elif self._wait(sharer, store):
            self.storing += len(body)
            self.todo.append(DoStore(sharer, store, bytes(body)))

    def _ack(
        self, sender: Sender, peer: Peer | None, ack: Ack, body: memoryview, now: float
    ) -> None:
        for aid, upto in ack.upto:
            for sharer in self._acked_for(peer, ack, aid):
                covered = self._covered(sharer, upto)
                if covered > sharer.acked:
                    self._acknowledge(sharer, covered)
        if peer is not None and peer.batch is not None and not peer.outstanding:
            peer.interval = self.resend
            self._batch_done(peer)

    def _batch_done(self, peer: Peer) -> None:
        peer.batch = None
        peer.resend_at = peer.deaf_at = INFINITY
        if peer.dirty:
            self.unsent[peer] = None

    def _covered(self, sharer: Sharer, upto: int) -> int:
        """Rule 3: an acknowledgement is for what it names; what was not sent cannot be named."""
        return upto if upto <= sharer.sent else sharer.acked

    def _acked_for(self, peer: Peer | None, ack: Ack, aid: bytes) -> Iterator[Sharer]:
        """Rule 4: whose acknowledgement this is."""
        if peer is not None and ack.inc == self.inc and aid in peer.sharers:
            yield peer.sharers[aid]

    def _acknowledge(self, sharer: Sharer, upto: int) -> None:
        sharer.acknowledge(upto)
        peer = sharer.peer
        if sharer.acked >= peer.outstanding.get(sharer, INFINITY):
            del peer.outstanding[sharer]

    def _detach(
        self, sender: Sender, peer: Peer | None, detach: Detach, body: memoryview, now: float
    ) -> None:
        # An ordinary recall, so that one that comes twice or late does no harm.
        sharer = self._known(peer, detach.aid, detach.inc)
        if sharer is not None and detach.first < detach.last <= sharer.segment.pages:
            self.todo.append(Recall(sharer, detach.first, detach.last))

    def _release(
        self, sender: Sender, peer: Peer | None, release: Release, body: memoryview, now: float
    ) -> None:
        if peer is not None and release.inc == self.inc and release.aid in peer.sharers:
            self._remove(peer.sharers[release.aid])
        self._send(release.part, release.me, Fenced(release.aid))

    def _heartbeat(
        self, sender: Sender, peer: Peer | None, beat: Heartbeat, body: memoryview, now: float
    ) -> None:
        fenced = [aid for aid in beat.aids if self._known(peer, aid, beat.inc) is None]
        self._send(beat.part, beat.me, HeartbeatAck(self.part, self.inc, beat.sent, fenced))

    def _ask(
        self, sender: Sender, peer: Peer | None, ask: Ask, body: memoryview, now: float
    ) -> None:
        self.todo.append(Reply(ask, sender))

    def _known(self, peer: Peer | None, aid: bytes, inc: bytes) -> Sharer | None:
        """Rules 5 and 8: the permit, if it was given by this life to that one and is not void."""
        if peer is None or inc != self.inc:
            return None
        sharer = peer.sharers.get(aid)
        return None if sharer is None or sharer.void_at < INFINITY else sharer

    def _fenced(self, request: Fault | Store) -> None:
        """Rule 8: there is no such permit."""
        self._send(request.part, request.me, Fenced(request.aid))

    # ------------------------------------------------------------------ what the caller has done

    def resume(self, sharer: Sharer, fault: Fault) -> None:
        """What the fault waited for has come to pass: serve it."""
        if self._done(sharer, fault):
            self._serve(sharer, fault)

    def refuse(
        self, sharer: Sharer, request: Fault | Store, signal: str, code: int, page: int, text: str
    ) -> None:
        """The pages cannot be had: the exporter's own process would get a signal there."""
        if not self._done(sharer, request):
            return
        answer = Broken(sharer.aid, self.inc, request.fid, signal, code, page, text[:1000])
        if isinstance(request, Store):
            sharer.stored, sharer.answer = request.fid, answer
        self._send(sharer.peer.part, sharer.peer.inc, answer)

    def stored(self, sharer: Sharer, store: Store) -> None:
        """The store is done."""
        if self._done(sharer, store):
            sharer.stored = store.fid
            sharer.answer = Stored(sharer.aid, self.inc, store.fid)
            self._send(sharer.peer.part, sharer.peer.inc, sharer.answer)

    def _done(self, sharer: Sharer, request: Fault | Store) -> bool:
        """The request waits no longer; whether its permit is still one."""
        if request.fid in sharer.busy:
            sharer.busy.discard(request.fid)
            sharer.peer.waiting -= 1
        return sharer.aid in self.sharers and sharer.void_at == INFINITY

    # ------------------------------------------------------------------ invalidations

    def _mark(self, sharer: Sharer) -> None:
        sharer.peer.dirty[sharer] = None
        self.unsent[sharer.peer] = None

    def flush(self, now: float) -> None:
        """Send what is queued: one batch to each partition that has none outstanding."""
        if not self.unsent:
            return
        peers, self.unsent = self.unsent, {}
        for peer in peers:
            if peer.batch is None and peer.dirty:
                self._send_batch(peer, now)

    def _send_batch(self, peer: Peer, now: float) -> None:
        batch: list[tuple[bytes, int, int, list[int]]] = []
        room = MAX_RANGES
        while peer.dirty and room:
            sharer = next(iter(peer.dirty))
            del peer.dirty[sharer]
            ranges = merged(sharer.fresh)
            if len(ranges) > room:
                ranges = [(ranges[0][0], ranges[-1][1])]
            room -= len(ranges)
            sharer.fresh = []
            flat = [bound for both in ranges for bound in both]
            batch.append((sharer.aid, sharer.sent + 1, sharer.number, flat))
            sharer.sent = peer.outstanding[sharer] = sharer.number
        peer.batch = Inv(self.inc, batch)
        peer.deaf_at = now + self.ttl
        self.batches += 1
        self._send_again(peer, now)

    def _send_again(self, peer: Peer, now: float) -> None:
        assert peer.batch is not None
        self._send(peer.part, peer.inc, peer.batch)
        peer.resend_at = now + peer.interval
        peer.interval = min(2 * peer.interval, max(self.heartbeat, self.resend))
        self._due(min(peer.resend_at, peer.deaf_at))

    def messages_lost(self, now: float) -> None:
        """Messages may have been lost: send again at once what is not acknowledged."""
        for peer in self.peers.values():
            if peer.batch is not None:
                peer.interval = self.resend
                self.resent += 1
                self._send_again(peer, now)

    # ------------------------------------------------------------------ death

    def tick(self, now: float) -> None:
        """Time has passed: send again, and give up on who is silent for longer than its lease."""
        self.deadline = INFINITY
        for peer in list(self.peers.values()):
            if now >= peer.heard + self.ttl:
                self._silent(peer, now)
            else:
                self._due(peer.heard + self.ttl)
            if now >= peer.void_at:
                self._fence_void(peer, now)
            if now >= peer.deaf_at:
                self._deaf(peer, now)
            if peer.batch is not None:
                if now >= peer.resend_at:
                    self.resent += 1
                    self._send_again(peer, now)
                else:
                    self._due(peer.resend_at)
            self._due(min(peer.deaf_at, peer.void_at))

    def _silent(self, peer: Peer, now: float) -> None:
        """The lease of a peer is over; what follows, each of its segments says."""
        for sharer in list(peer.sharers.values()):
            if sharer.segment.fence == "lease":
                self.fence(sharer, "lease")
            elif sharer.segment.fence == "kill" and not peer.condemned:
                if sharer.waits:
                    peer.condemned = True
                    self.todo.append(Kill(peer))
                else:
                    self._due(now + self.heartbeat)  # somebody may come to wait for it

    def _deaf(self, peer: Peer, now: float) -> None:
        """It is alive, and has not acknowledged for as long as a lease: it cannot hear, perhaps.

        What it has is good for a lease after the last answer that it may have got. So that is the
        last one, and a lease later it is fenced.
        """
        peer.deaf_at = INFINITY
        for sharer in list(peer.sharers.values()):
            if sharer.segment.fence == "lease" and sharer.void_at == INFINITY:
                sharer.void_at = now + self.ttl
                peer.void_at = min(peer.void_at, sharer.void_at)
                self._send(peer.part, peer.inc, Fenced(sharer.aid))
            elif sharer.segment.fence == "kill" and not peer.condemned:
                if sharer.waits:
                    peer.condemned = True
                    self.todo.append(Kill(peer))
                else:
                    peer.deaf_at = now + self.heartbeat  # somebody may come to wait for it

    def _fence_void(self, peer: Peer, now: float) -> None:
        """What void permits had has run out."""
        peer.void_at = INFINITY
        for sharer in list(peer.sharers.values()):
            if now >= sharer.void_at:
                self.fence(sharer, "deaf")
            else:
                peer.void_at = min(peer.void_at, sharer.void_at)

    def died(self, part: int, inc: bytes, reason: str) -> None:
        """Proof that the incarnation is dead: the kernel says so. It holds nothing any more."""
        peer = self.peers.get((part, inc))
        if peer is not None:
            for sharer in list(peer.sharers.values()):
                self.fence(sharer, reason)

    def fence(self, sharer: Sharer, reason: str) -> None:
        """Make a permit void, for ever: one step, which nothing undoes and nobody has to hear."""
        if sharer.aid in self.sharers:
            self._remove(sharer)
            self.todo.append(FencedPeer(sharer, reason))
            self._send(sharer.peer.part, sharer.peer.inc, Fenced(sharer.aid))

    def _remove(self, sharer: Sharer) -> None:
        peer = sharer.peer
        del self.sharers[sharer.aid], peer.sharers[sharer.aid]
        for rid in [rid for rid, known in peer.by_rid.items() if known is sharer]:
            del peer.by_rid[rid]
        peer.dirty.pop(sharer, None)
        peer.outstanding.pop(sharer, None)
        peer.waiting -= len(sharer.busy)
        sharer.busy.clear()
        table = sharer.segment.memory.table
        table.leave(sharer, list(sharer.held))
        sharer.held.clear()
        sharer.acknowledge(sharer.number)
        if peer.batch is not None and not peer.outstanding:
            self._batch_done(peer)
        if not peer.sharers:
            self.peers.pop((peer.part, peer.inc), None)

    def remove(self, segment: Segment) -> None:
        """The segment is destroyed, and everything of it recalled: its permits are void."""
        segment.state = State.DESTROYED
        self.segments.pop(segment.segid, None)
        for sharer in [known for known in self.sharers.values() if known.segment is segment]:
            self._remove(sharer)
            self._send(sharer.peer.part, sharer.peer.inc, Fenced(sharer.aid))

    def _send(self, part: int, inc: bytes, message: Message, body: Buffer = b"") -> None:
        self.outbox.append((part, inc, message, body))

    def _due(self, at: float) -> None:
        if at < self.deadline:
            self.deadline = at

    _handlers: Final[dict[type[Request], Callable[..., Any]]] = {
        Get: _get,
        Fault: _fault,
        Store: _store,
        Ack: _ack,
        Detach: _detach,
        Release: _release,
        Heartbeat: _heartbeat,
        Ask: _ask,
    }
