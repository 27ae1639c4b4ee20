"""The two sides of the protocol, message by message, without a loop."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from mmunotify_xpmem import Credentials, FencedError, XpmemError
from mmunotify_xpmem.exporter import DoStore, Exporter, FencedPeer, Kill, Limits
from mmunotify_xpmem.importer import Importer
from mmunotify_xpmem.memory_engine import LocalSender
from mmunotify_xpmem.pfns import PfnTable
from mmunotify_xpmem.segments import Segment
from mmunotify_xpmem.wire import (
    MAX_PAGES,
    Ack,
    BadMessage,
    Broken,
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
    Retry,
    Store,
    Stored,
    decode,
    encode,
)

PAGE = 4096
SEGID = 7 << 32 | 1
ME = b"importer's life."
INC = b"exporter's life."
EMPTY = memoryview(b"")
EXPORTER = LocalSender(Credentials(5, 5))


@attrs.define(eq=False)
class Pages:
    """Memory whose pages are all there, unless they are named absent."""

    absent: set[int] = attrs.field(factory=set)
    table: PfnTable = attrs.field(factory=PfnTable)

    def copy(self, first: int, need: int, count: int) -> tuple[int, bytes] | None:
        if self.absent.intersection(range(first, first + need)):
            return None
        return count, bytes(count * PAGE)


def ids() -> Any:
    numbers = iter(range(1, 1 << 30))
    return lambda: next(numbers).to_bytes(16, "little")


class Exporting:
    """An exporter with one segment of 100 pages, and what it sends."""

    def __init__(self, fence: Any = "lease", mode: int = 0o600, **options: Any) -> None:
        self.memory = Pages()
        self.exporter = Exporter(7, INC, ids(), **options)
        self.segment = Segment(SEGID, self.memory, 1000, 100, mode, Credentials(5, 5), fence)
        self.exporter.segments[SEGID] = self.segment
        self.sender = LocalSender(Credentials(5, 5), killable=True)

    def say(self, message: Any, body: bytes = b"", now: float = 0.0) -> list[Message]:
        self.exporter.receive(self.sender, message, memoryview(body), now)
        return self.sent(now)

    def sent(self, now: float = 0.0) -> list[Message]:
        self.exporter.flush(now)
        out, self.exporter.outbox = self.exporter.outbox, []
        return [message for _, _, message, _ in out]

    def get(self, write: bool = True, rid: int = 1, me: bytes = ME) -> bytes:
        (granted,) = self.say(Get(3, me, rid.to_bytes(16, "little"), SEGID, write))
        assert isinstance(granted, Granted)
        return granted.aid

    def invalidate(self, first: int, last: int) -> Any:
        return self.memory.table.invalidate(1000 + first, 1000 + last)

    def fault(self, aid: bytes, fid: int, first: int, need: int = 1, count: int = 1) -> Any:
        return self.say(Fault(3, ME, aid, INC, fid, first, need, count))


def test_get_is_idempotent() -> None:
    """The same request gets the same permit, another one another."""
    e = Exporting()
    assert e.get(rid=1) == e.get(rid=1) != e.get(rid=2)


def test_fault_and_invalidation() -> None:
    """A page that was sent is recalled; the wait is over with the acknowledgement."""
    e = Exporting()
    aid = e.get()
    assert [type(message) for message in e.fault(aid, 1, 5)] == [Page]
    wait = e.invalidate(5, 6)
    (inv,) = e.sent()
    assert isinstance(inv, Inv)
    assert inv.batch == [(aid, 1, 1, [5, 6])]
    assert wait.waiting_for == ["3"]
    e.say(Ack(3, ME, INC, [(aid, 1)]))
    assert not wait.pending
    assert e.invalidate(5, 6) is None


def test_acknowledgement_of_what_was_not_sent() -> None:
    """It counts for nothing."""
    e = Exporting()
    aid = e.get()
    e.fault(aid, 1, 5)
    wait = e.invalidate(5, 6)
    e.say(Ack(3, ME, INC, [(aid, 99)]))
    assert wait.pending


def test_invalidations_are_coalesced() -> None:
    """While one batch is outstanding the next ones are collected, and merged, into one."""
    e = Exporting()
    aid = e.get()
    e.fault(aid, 1, 0, count=64)
    first = e.invalidate(0, 1)
    e.sent()
    waits = [e.invalidate(page, page + 1) for page in range(1, 51)]
    assert e.sent() == []
    (inv,) = e.say(Ack(3, ME, INC, [(aid, 1)]))
    assert isinstance(inv, Inv)
    assert inv.batch == [(aid, 2, 51, [1, 51])]
    assert not first.pending
    e.say(Ack(3, ME, INC, [(aid, 51)]))
    assert not any(wait.pending for wait in waits)


def test_cancelled_wait_is_still_owed() -> None:
    """Who gives up waiting has not freed the page: the next invalidation waits for the same."""
    e = Exporting()
    aid = e.get()
    e.fault(aid, 1, 5)
    e.invalidate(5, 6)
    e.sent()
    again = e.invalidate(5, 6)
    assert again.pending
    e.say(Ack(3, ME, INC, [(aid, 1)]))
    assert not again.pending


def test_permits_of_all_partitions_are_limited() -> None:
    """However many partitions somebody claims to be."""
    e = Exporting(limits=Limits(permits_of_all=3))
    answers = [
        type(answer)
        for part in range(1, 6)
        for answer in e.say(Get(part, bytes(16), bytes(16), SEGID, False))
    ]
    assert answers == [Granted] * 3 + [Refused] * 2


def test_resent_until_acknowledged() -> None:
    """At growing intervals, and at once when messages may have been lost."""
    e = Exporting(resend=0.1)
    aid = e.get()
    e.fault(aid, 1, 5)
    e.invalidate(5, 6)
    assert len(e.sent(0.0)) == 1
    e.exporter.tick(0.05)
    assert e.sent(0.05) == []
    e.exporter.tick(0.11)
    assert len(e.sent(0.11)) == 1
    e.exporter.tick(0.25)
    assert e.sent(0.25) == []
    e.exporter.messages_lost(0.26)
    assert len(e.sent(0.26)) == 1


def test_parked_fault_is_served_after_the_section() -> None:
    """And only once, however often it is asked for."""
    e = Exporting()
    aid = e.get()
    e.memory.table.open.append((1005, 1006))
    assert e.fault(aid, 1, 5) == []
    assert e.fault(aid, 1, 5) == []
    assert [type(message) for message in e.fault(aid, 2, 4, count=3)] == [Page]
    e.memory.table.end(1005, 1006)
    assert [type(message) for message in e.sent()] == [Page]


def test_too_much_waiting_is_sent_back() -> None:
    """A partition cannot make the exporter remember more than its share."""
    e = Exporting(limits=Limits(permits=2, parked=3, partitions=1))
    aid = e.get()
    e.memory.absent.update(range(1000, 1100))
    answers = [answer for fid in range(10) for answer in e.fault(aid, fid, fid)]
    assert [type(answer) for answer in answers] == [Retry] * 7
    e.get(rid=2)
    (refused,) = e.say(Get(3, ME, bytes(16), SEGID, True))
    assert isinstance(refused, Refused)
    assert refused.code == errno.EMFILE
    (refused,) = e.say(Get(4, bytes(16), bytes(16), SEGID, True))
    assert isinstance(refused, Refused)


@pytest.mark.parametrize(
    "change",
    [{"aid": bytes(16)}, {"inc": bytes(16)}, {"me": bytes(16)}, {"part": 4}],
    ids=lambda change: next(iter(change)),
)
def test_foreign_permits_are_fenced(change: dict[str, Any]) -> None:
    """A permit is good for one life of one partition, from one life of the exporter."""
    e = Exporting()
    aid = e.get()
    words: dict[str, Any] = {"part": 3, "me": ME, "aid": aid, "inc": INC, **change}
    (answer,) = e.say(Fault(**words, fid=1, first=0, need=1, count=1))
    assert isinstance(answer, Fenced)
    assert not e.memory.table.holders


def test_another_process_with_the_same_names() -> None:
    """Whoever speaks for a partition over another process's link is not believed."""
    e = Exporting()
    aid = e.get()
    thief = LocalSender(Credentials(5, 5))
    with pytest.raises(BadMessage, match="speaks as"):
        e.exporter.receive(thief, Fault(3, ME, aid, INC, 1, 0, 1, 1), EMPTY, 0.0)


def test_permits_are_checked_on_every_fault() -> None:
    """Also after they were granted."""
    e = Exporting()
    aid = e.get(write=False)
    e.fault(aid, 1, 0)
    e.segment.mode = 0
    (answer,) = e.fault(aid, 2, 0)
    assert isinstance(answer, Broken)
    assert (answer.signal, answer.code) == ("SEGV", 2)


@pytest.mark.parametrize("first", [100, 1 << 60])
def test_fault_beyond_the_segment(first: int) -> None:
    """Whatever is asked for, nothing outside of the segment is sent."""
    e = Exporting()
    (answer,) = e.fault(e.get(), 1, first)
    assert isinstance(answer, Broken)
    assert answer.signal == "BUS"


def test_read_ahead_ends_with_the_segment() -> None:
    """What is only asked for in passing is not sent when it is not there."""
    e = Exporting()
    aid = e.get()
    e.fault(aid, 1, 99, count=64)
    assert set(e.memory.table.holders) == {1099}


def test_stores_happen_once() -> None:
    """A store that comes again is answered again, and not done again."""
    e = Exporting()
    store = Store(3, ME, e.get(), INC, 1, 10)
    e.say(store, b"data")
    (todo,) = e.exporter.todo
    e.exporter.todo.clear()
    assert isinstance(todo, DoStore)
    assert todo.data == b"data"
    e.say(store, b"data")
    assert not e.exporter.todo
    e.exporter.stored(todo.sharer, todo.store)
    assert [type(message) for message in e.sent()] == [Stored]
    assert [type(message) for message in e.say(store, b"data")] == [Stored]
    assert not e.exporter.todo


def test_stores_that_wait_are_limited() -> None:
    """In bytes, whoever sends them; and none is longer than a batch of pages."""
    e = Exporting(limits=Limits(storing=3 * PAGE))
    answers = []
    for rid in range(5):
        aid = e.get(rid=rid)
        answers += e.say(Store(3, ME, aid, INC, 1, 0), bytes(PAGE))
    assert [type(answer) for answer in answers] == [Retry] * 2
    assert sum(isinstance(todo, DoStore) for todo in e.exporter.todo) == 3
    with pytest.raises(BadMessage, match="expected up to 262144"):
        e.say(Store(3, ME, e.get(), INC, 9, 0), bytes(MAX_PAGES * PAGE + 1))


def test_stores_need_a_permit_for_them() -> None:
    """A read-only permit stores nothing, whatever its holder sends."""
    e = Exporting()
    (answer,) = e.say(Store(3, ME, e.get(write=False), INC, 1, 10), b"data")
    assert isinstance(answer, Broken)
    assert not e.exporter.todo


def test_silence_for_the_lease_is_the_end() -> None:
    """Policy lease: fenced, and whoever waits goes on."""
    e = Exporting(ttl=5.0)
    aid = e.get()
    e.fault(aid, 1, 5)
    wait = e.invalidate(5, 6)
    e.exporter.tick(4.9)
    assert wait.pending
    e.exporter.tick(5.0)
    assert not wait.pending
    (fenced,) = e.exporter.todo
    assert isinstance(fenced, FencedPeer)
    assert not e.memory.table.holders
    e.sent()
    assert [type(message) for message in e.fault(aid, 2, 5)] == [Fenced]


def test_heartbeats_keep_a_lease() -> None:
    """And say which permits are void."""
    e = Exporting(ttl=5.0)
    aid = e.get()
    for now in (3.0, 6.0, 9.0):
        (ack,) = e.say(Heartbeat(3, ME, INC, now, [aid, bytes(16)]), now=now)
        assert isinstance(ack, HeartbeatAck)
        assert (ack.sent, ack.fenced) == (now, [bytes(16)])
        e.exporter.tick(now + 4.9)
    assert aid in e.exporter.sharers


def test_deafness_is_the_end_too() -> None:
    """Who is alive and does not acknowledge for a lease gets nothing any more, so that what it has
    runs out; a lease later it is fenced, and whoever waits goes on."""
    e = Exporting(ttl=5.0)
    aid = e.get()
    e.fault(aid, 1, 5)
    wait = e.invalidate(5, 6)
    e.sent()
    void = []
    for now in range(1, 11):
        (ack,) = e.say(Heartbeat(3, ME, INC, float(now), [aid]), now=float(now))
        assert isinstance(ack, HeartbeatAck)
        void.append(bool(ack.fenced))
        e.exporter.tick(float(now))
        assert bool(wait.pending) == (now < 10)
        e.sent(float(now))
    assert void == [False] * 5 + [True] * 5
    assert [type(message) for message in e.fault(aid, 2, 6)] == [Fenced]


def test_deaf_importer_is_served_nothing_and_may_still_acknowledge() -> None:
    """Between the two leases a fault is answered as if there were no permit; an acknowledgement
    counts, and its permit is void all the same."""
    e = Exporting(ttl=5.0)
    aid = e.get()
    e.fault(aid, 1, 5)
    wait = e.invalidate(5, 6)
    e.sent()
    e.say(Heartbeat(3, ME, INC, 4.0, [aid]), now=4.0)
    e.exporter.tick(5.0)
    e.sent(5.0)
    assert [type(message) for message in e.fault(aid, 2, 6)] == [Fenced]
    assert wait.pending
    e.say(Ack(3, ME, INC, [(aid, 1)]), now=6.0)
    assert not wait.pending
    assert [type(message) for message in e.fault(aid, 3, 6)] == [Fenced]
    e.exporter.tick(e.exporter.deadline)
    assert not e.exporter.sharers


@pytest.mark.parametrize("fence", ["kill", "never"])
def test_deafness_under_other_policies(fence: Any) -> None:
    """It is killed, or waited for."""
    e = Exporting(fence=fence, ttl=5.0)
    aid = e.get()
    e.fault(aid, 1, 5)
    wait = e.invalidate(5, 6)
    e.sent()
    for now in range(1, 20):
        e.say(Heartbeat(3, ME, INC, float(now), [aid]), now=float(now))
        e.exporter.tick(float(now))
    assert wait.pending
    assert [type(todo) for todo in e.exporter.todo] == ([Kill] if fence == "kill" else [])


def test_silence_under_kill() -> None:
    """Policy kill: as soon as something waits for it, and not before; then only proof counts."""
    e = Exporting(fence="kill", ttl=5.0)
    aid = e.get()
    e.fault(aid, 1, 5)
    e.exporter.tick(6.0)
    assert not e.exporter.todo
    wait = e.invalidate(5, 6)
    assert e.exporter.deadline <= 7.0
    e.exporter.tick(7.0)
    e.exporter.tick(8.0)
    (kill,) = e.exporter.todo
    assert isinstance(kill, Kill)
    assert wait.pending
    e.exporter.died(3, ME, "killed")
    assert not wait.pending


def test_silence_under_never() -> None:
    """Policy never: it is waited for, and said whom for."""
    e = Exporting(fence="never", ttl=5.0)
    aid = e.get()
    e.fault(aid, 1, 5)
    wait = e.invalidate(5, 6)
    e.exporter.tick(1e6)
    assert wait.waiting_for == ["3"]
    e.say(Release(3, ME, aid, INC))
    assert not wait.pending


def test_kill_is_only_for_who_can_be_killed() -> None:
    """A partition of another host gets no permit for such a segment."""
    e = Exporting(fence="kill")
    e.sender.killable = False
    (refused,) = e.say(Get(3, ME, bytes(16), SEGID, False))
    assert isinstance(refused, Refused)
    assert refused.code == errno.EPERM


# ------------------------------------------------------------------ the importing side


class Importing:
    """An importer that has a permit of 100 pages, and what it sends."""

    def __init__(self) -> None:
        self.importer = Importer(3, ME, ids(), resend=0.1, patience=20.0)
        self.grant = self.importer.get(SEGID, write=True, now=0.0)
        (get,) = self.sent()
        assert isinstance(get, Get)
        self.aid = b"permit number 1."
        self.hear(Granted(get.rid, self.aid, 7, INC, 100, 1000, 5.0, 1.0))

    def hear(
        self, message: Message, body: bytes = b"", now: float = 0.0, sender: Any = None
    ) -> list[Any]:
        self.importer.receive(sender or EXPORTER, message, memoryview(body), now)
        return self.sent()

    def sent(self) -> list[Any]:
        out, self.importer.outbox = self.importer.outbox, []
        return [message for _, _, message, _ in out]


def test_page_is_installed_once() -> None:
    """The second time it is nobody's answer."""
    i = Importing()
    fault = i.importer.fault(i.grant, 5, 1, 1, 0.0)
    (message,) = i.sent()
    i.hear(Page(i.aid, INC, message.fid), b"a" * PAGE)
    assert fault.done
    i.hear(Page(i.aid, INC, message.fid), b"b" * PAGE)
    assert set(i.grant.cache) == {5}
    assert i.grant.bytes_of(5, 0, PAGE) == b"a" * PAGE
    assert i.importer.ignored == 1


def test_overtaken_fault_is_made_again() -> None:
    """What it brings is thrown away; the new one brings what counts."""
    i = Importing()
    fault = i.importer.fault(i.grant, 5, 1, 1, 0.0)
    (first,) = i.sent()
    (ack,) = i.hear(Inv(INC, [(i.aid, 1, 1, [0, 10])]))
    assert ack.upto == [(i.aid, 1)]
    (second,) = i.hear(Page(i.aid, INC, first.fid), b"old!" * 1024)
    assert not fault.done
    assert second.fid != first.fid
    i.hear(Page(i.aid, INC, second.fid), b"new!" * 1024)
    assert i.grant.bytes_of(5, 0, 4) == b"new!"


def test_gap_is_not_acknowledged() -> None:
    """A batch that comes before an earlier one is obeyed, and acknowledged when that is there."""
    i = Importing()
    i.grant.install(1, bytes(PAGE))
    (ack,) = i.hear(Inv(INC, [(i.aid, 2, 3, [1, 2])]))
    assert ack.upto == [(i.aid, 0)]
    assert not i.grant.cache
    (ack,) = i.hear(Inv(INC, [(i.aid, 1, 1, [5, 6])]))
    assert ack.upto == [(i.aid, 1)]
    (ack,) = i.hear(Inv(INC, [(i.aid, 2, 3, [1, 2])]))
    assert ack.upto == [(i.aid, 3)]


def test_unknown_permits_are_not_acknowledged_for() -> None:
    """Another life of this partition may still have pages."""
    i = Importing()
    assert i.hear(Inv(INC, [(bytes(16), 1, 1, [0, 1])])) == []
    assert i.hear(Inv(bytes(16), [(i.aid, 1, 1, [0, 1])])) == []


def test_fenced_importer_attaches_again() -> None:
    """It drops everything, gets a new permit, and its faults go on; a store does not."""
    i = Importing()
    i.grant.install(1, bytes(PAGE))
    fault = i.importer.fault(i.grant, 5, 1, 1, 0.0)
    store = i.importer.store(i.grant, 0, b"x", 0.0)
    i.sent()
    (get,) = i.hear(Fenced(i.aid))
    assert isinstance(get, Get)
    assert not i.grant.cache
    assert isinstance(store.error, FencedError)
    (again,) = i.hear(Granted(get.rid, b"permit number 2.", 7, INC, 100, 1000, 5.0, 1.0))
    assert again.aid == b"permit number 2."
    i.hear(Page(again.aid, INC, again.fid), bytes(PAGE))
    assert fault.done


def test_exporter_has_rebooted() -> None:
    """The segment of its next life is another one, though the segid is the same."""
    i = Importing()
    fault = i.importer.fault(i.grant, 5, 1, 1, 0.0)
    i.sent()
    (get,) = i.hear(Fenced(i.aid))
    i.hear(Granted(get.rid, b"permit number 2.", 7, bytes(16), 100, 1000, 5.0, 1.0))
    assert isinstance(fault.error, OSError)
    assert "rebooted" in str(fault.error)


def test_lease_is_as_old_as_what_was_answered() -> None:
    """Counted from when the question was sent, not from when the answer came."""
    i = Importing()
    assert 4.9 < i.grant.lease_until <= 5.0
    i.hear(HeartbeatAck(7, INC, 3.0, []), now=4.9)
    assert 7.9 < i.grant.lease_until <= 8.0
    i.hear(HeartbeatAck(7, INC, 1.0, []), now=7.0)
    assert 7.9 < i.grant.lease_until <= 8.0
    i.grant.install(1, bytes(PAGE))
    i.importer.tick(8.0)
    assert not i.grant.cache


def test_leases_are_extended_by_who_has_granted_them() -> None:
    """A third party that says so is refused, and so is an answer to what was never sent."""
    i = Importing()
    until = i.grant.lease_until
    with pytest.raises(BadMessage, match="speaks for partition 7"):
        i.hear(HeartbeatAck(7, INC, 3.0, []), now=4.0, sender=LocalSender(Credentials(6, 6)))
    with pytest.raises(BadMessage, match="has heard at 4 what is sent at 100"):
        i.hear(HeartbeatAck(7, INC, 100.0, []), now=4.0)
    assert i.grant.lease_until == until


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan"), 1e-9])
def test_leases_are_of_some_length(seconds: float) -> None:
    """What would have the importer beat without a pause, or never, is no message."""
    for ttl, heartbeat in ((5.0, seconds), (seconds, 1.0)):
        frame = encode(Granted(bytes(16), bytes(16), 7, INC, 1, 0, ttl, heartbeat))
        with pytest.raises(BadMessage, match="float"):
            decode(memoryview(frame))


def test_silent_exporter_is_given_up() -> None:
    """After `patience` a request fails, and says whom it asked."""
    i = Importing()
    for tenths in range(1, 11):
        i.importer.tick(tenths / 10)
    fault = i.importer.fault(i.grant, 5, 1, 1, 1.0)
    for tenths in range(11, 210):
        i.importer.tick(tenths / 10)
    assert not fault.done
    i.importer.tick(21.1)
    assert isinstance(fault.error, XpmemError)
    assert fault.error.errno == errno.EHOSTDOWN
    assert "partition 7" in str(fault.error)


def test_time_in_which_it_was_stopped_does_not_count() -> None:
    """A process that goes on after an hour has not waited for an hour."""
    i = Importing()
    fault = i.importer.fault(i.grant, 5, 1, 1, 1.0)
    i.sent()
    i.importer.tick(1.1)
    i.importer.tick(3600.0)
    assert not fault.done
    assert any(message is fault.message for message in i.sent())
    for tenths in range(36000, 36400):
        i.importer.tick(tenths / 10)
    assert isinstance(fault.error, XpmemError)


def test_unwanted_permit_is_given_back() -> None:
    """An answer to a request that was given up leaves nothing at the exporter."""
    i = Importing()
    (release,) = i.hear(Granted(bytes(16), b"permit number 9.", 7, INC, 1, 0, 5.0, 1.0))
    assert isinstance(release, Release)


# ------------------------------------------------------------------ fuzzing

whole = st.integers(0, (1 << 63) - 1)
few = st.integers(0, 130)
aids = st.sampled_from([b"permit number 1.", bytes(16), b"\1" + bytes(15), b"\2" + bytes(15)])
incs = st.sampled_from([INC, ME, bytes(16)])
parts = st.sampled_from([3, 4, 7])
seconds = st.one_of(st.floats(0.1, 9), st.floats())
runs = st.lists(few, min_size=2, max_size=7)
requests = st.one_of(
    st.builds(Get, parts, incs, aids, st.sampled_from([SEGID, 1]), st.booleans()),
    st.builds(Fault, parts, incs, aids, incs, few, few, st.integers(1, 64), st.integers(1, 64)),
    st.builds(Ack, parts, incs, incs, st.lists(st.tuples(aids, few), max_size=4)),
    st.builds(Release, parts, incs, aids, incs),
    st.builds(Heartbeat, parts, incs, incs, st.floats(), st.lists(aids, max_size=4)),
    st.builds(Store, parts, incs, aids, incs, few, whole),
)
answers = st.one_of(
    st.builds(Granted, aids, aids, parts, incs, few, few, seconds, seconds),
    st.builds(Refused, aids, st.integers(0, 200), st.text(max_size=9)),
    st.builds(Page, aids, incs, few),
    st.builds(Broken, aids, incs, few, st.text(max_size=4), st.integers(0, 9), few, st.just("x")),
    st.builds(Retry, aids, incs, few),
    st.builds(Fenced, aids),
    st.builds(Inv, incs, st.lists(st.tuples(aids, few, few, runs), max_size=4)),
    st.builds(HeartbeatAck, parts, incs, st.floats(), st.lists(aids, max_size=4)),
    st.builds(Stored, aids, incs, few),
)
bodies = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.integers(1, MAX_PAGES + 1).map(lambda count: bytes(count * PAGE)),
)


@given(st.binary(max_size=300))
def test_parser_survives_any_bytes(frame: bytes) -> None:
    """Whatever arrives is a message or BadMessage."""
    try:
        message, body = decode(memoryview(frame))
    except BadMessage:
        return
    assert len(encode(message)) + len(body) <= 2 * len(frame) + 64


@pytest.mark.parametrize(
    "frame",
    [
        b"\x04\0\x92\x08\xc4\x10",
        b"\x26\0\x94\x03\xc4\x10" + bytes(16) + b"\x02\xae" + b"\xff" * 14 + bytes(9),
        b"\0\0" + (100_001).to_bytes(4, "little") + b"\x91" * 100_000 + b"\xc0",
        b"\0\0" + (100_021).to_bytes(4, "little") + b"\x93\x08\xc4\x10" + bytes(16)
        + b"\x91" * 100_000 + b"\xc0",
    ],
    ids=["truncated", "no UTF-8", "nested", "nested behind"],
)  # fmt: skip
def test_parser_refuses_what_its_library_trips_over(frame: bytes) -> None:
    """Text that is none, and lists in lists in lists."""
    with pytest.raises(BadMessage):
        decode(memoryview(frame))


@settings(max_examples=50)
@given(st.one_of(requests, answers), st.binary(max_size=64), st.data())
def test_parser_survives_damage(message: Message, body: bytes, data: st.DataObject) -> None:
    """A message that is whole is read as it was; one that is damaged is one, or BadMessage."""
    try:
        frame = bytearray(encode(message) + body)
        decoded, rest = decode(memoryview(frame))
    except BadMessage:  # Hypothesis makes values that the types of fields exclude
        return
    assert (encode(decoded), bytes(rest)) == (encode(message), body)
    at = data.draw(st.integers(0, len(frame) - 1))
    frame[at] ^= data.draw(st.integers(1, 255))
    with suppress(BadMessage):
        decode(memoryview(frame[: data.draw(st.integers(0, len(frame)))]))


class Fuzzed(RuleBasedStateMachine):
    """Both sides are told whatever messages there are, in any order, by anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.e = Exporting(limits=Limits(permits=5, parked=5, partitions=4))
        self.i = Importing()
        self.now = 0.0

    @rule(message=requests, body=bodies, same=st.booleans())
    def request(self, message: Any, body: bytes, same: bool) -> None:
        if same and hasattr(message, "aid"):
            message.aid = next(iter(self.e.exporter.sharers), bytes(16))
        with suppress(BadMessage):
            decode(memoryview(encode(message) + body))
            self.e.exporter.receive(self.e.sender, message, memoryview(body), self.now)

    @rule(message=answers, body=bodies)
    def answer(self, message: Any, body: bytes) -> None:
        with suppress(BadMessage):
            decode(memoryview(encode(message) + body))
            self.i.importer.receive(EXPORTER, message, memoryview(body), self.now)

    @rule(first=few, count=st.integers(1, 64))
    def fault(self, first: int, count: int) -> None:
        if first + count <= 100 and len(self.i.grant.faults) < 20:
            self.i.importer.fault(self.i.grant, first, 1, count, self.now)

    @rule(first=few, count=st.integers(1, 64))
    def invalidate(self, first: int, count: int) -> None:
        self.e.invalidate(first, first + count)

    @rule(step=st.floats(0.01, 3.0))
    def tick(self, step: float) -> None:
        self.now += step
        self.e.exporter.tick(self.now)
        self.i.importer.tick(self.now)

    @invariant()
    def bounded(self) -> None:
        """What others say makes nobody remember more than the limits allow."""
        exporter = self.e.exporter
        assert len(exporter.peers) <= 4
        for peer in exporter.peers.values():
            assert len(peer.sharers) <= 5
            assert 0 <= peer.waiting <= 5
            assert sum(len(sharer.busy) for sharer in peer.sharers.values()) == peer.waiting
        assert len(self.e.memory.table.holders) <= 100
        assert all(0 <= page < 200 for page in self.i.grant.cache)
        assert len(self.i.importer.grants) <= 8
        exporter.outbox.clear()
        exporter.todo.clear()
        self.i.importer.outbox.clear()


@pytest.mark.parametrize(
    "examples",
    [40, *[pytest.param(750, marks=pytest.mark.long, id=f"many-{turn}") for turn in range(4)]],
)
def test_state_machines_survive_any_messages(examples: int) -> None:
    """No crash but BadMessage, and nothing grows without bound."""
    run_state_machine_as_test(
        Fuzzed,
        settings=settings(
            max_examples=examples, stateful_step_count=60, deadline=None, derandomize=False
        ),
    )
