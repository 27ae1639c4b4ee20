"""The protocol itself, in virtual time, on a network that does what networks do.

One exporter and three attachers with three pages: messages are lost, come twice and in any order,
either side reboots, zombies of a past life go on, and the exporter takes the living for dead. What
runs is the real code of both sides over the in-memory engine; only the shell around it is the
simulator's. What must hold after every step needs no clock: an attacher that is not fenced never
has a page that is older than the exporter's. Where clocks run alike, neither has one whose lease
runs and that was fenced for its silence, or for hearing nothing. And when the network behaves
again, whatever is waited for comes to an end.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from mmunotify_xpmem import Credentials, MemoryHub
from mmunotify_xpmem.engine import address_of
from mmunotify_xpmem.exporter import Exporter, FencedPeer, Recall, Sharer
from mmunotify_xpmem.importer import Faulting, Grant, Importer
from mmunotify_xpmem.pfns import PfnTable, Wait
from mmunotify_xpmem.segments import Segment
from mmunotify_xpmem.wire import Ack, Fault, Page, Request, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mmunotify_xpmem.engine import Sender
    from mmunotify_xpmem.memory_engine import MemoryEngine
    from mmunotify_xpmem.wire import Buffer, Message

PAGES = 3
ATTACHERS = 3
EXPORTER = 9
SEGID = EXPORTER << 32 | 1
STEPS = 400


class Stale(AssertionError):
    """An attacher that is not fenced has an old page."""


class Ids:
    """Ids that are as good as random, and the same in each run of a seed."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def __call__(self) -> bytes:
        return self.dice.randbytes(16)


@attrs.define(eq=False)
class Memory:
    """Pages whose content is their version."""

    versions: list[int]
    table: PfnTable = attrs.field(factory=PfnTable)

    def copy(self, first: int, need: int, count: int) -> tuple[int, bytes] | None:
        return count, b"".join(
            version.to_bytes(4096, "little") for version in self.versions[first : first + count]
        )


class Node:
    """A partition without a loop: an engine's user that has one side of the protocol each."""

    def __init__(self, sim: Simulation, part: int, kinds: Kinds) -> None:
        self.sim = sim
        self.part = part
        self.inc = sim.new_id()
        self.engine: MemoryEngine = sim.hub.engine(Credentials(1, 1))
        self.engine.subscribe(address_of(part))
        self.engine.subscribe(kinds.address(part, self.inc))
        self.importer = kinds.importer(part, self.inc, sim.new_id, patience=20.0)
        self.exporter = kinds.exporter(part, self.inc, kinds.aids(sim), ttl=5.0, heartbeat=1.0)
        self.kinds = kinds
        self._send = self.exporter._send
        self.exporter._send = self.note  # type: ignore[method-assign]

    def note(self, part: int, inc: bytes, message: Message, body: Buffer = b"") -> None:
        """The exporter sends something: whoever gets a page of it now is not fenced."""
        if isinstance(message, Page):
            self.sim.served(message.aid)
        self._send(part, inc, message, body)

    def received(self, sender: Sender, frame: memoryview) -> None:
        message, body = decode(frame)
        if isinstance(message, Request):
            self.exporter.receive(sender, message, body, self.sim.now)
        else:
            self.importer.receive(sender, message, body, self.sim.now)
        self.flush()

    def room(self, size: int) -> memoryview:
        return self.importer.buffers.lend(size)

    def lost(self) -> None: ...

    def gone(self, sender: Sender) -> None: ...

    def tick(self) -> None:
        self.exporter.tick(self.sim.now)
        self.importer.tick(self.sim.now)
        self.flush()

    def flush(self) -> None:
        exporter, importer = self.exporter, self.importer
        exporter.flush(self.sim.now)
        todo, exporter.todo = exporter.todo, []
        for what in todo:
            if isinstance(what, Recall):
                first = what.sharer.segment.first
                pages = sorted(
                    page
                    for page in what.sharer.held
                    if first + what.first <= page < first + what.last
                )
                if pages:
                    what.sharer.segment.memory.table.leave(what.sharer, pages)
                    what.sharer.drop(pages)
            else:
                assert isinstance(what, FencedPeer)
                self.sim.reasons[what.sharer.aid] = what.reason
        exporter.flush(self.sim.now)
        for side in (exporter, importer):
            out, side.outbox = side.outbox, []
            for part, inc, message, body in out:
                self.engine.send(self.kinds.address(part, inc), encode(message), body)
        importer.reattached.clear()


@attrs.define
class Kinds:
    """Which code is run: that of the package, or with one rule removed."""

    exporter: type[Exporter] = Exporter
    importer: type[Importer] = Importer
    address: Callable[[int, bytes], bytes] = address_of
    aids: Callable[[Simulation], Callable[[], bytes]] = attrs.field(default=lambda sim: sim.new_id)


class Simulation:
    """One run."""

    def __init__(self, seed: int, kinds: Kinds) -> None:
        self.dice = random.Random(seed)
        self.new_id = Ids(self.dice)
        self.kinds = kinds
        self.hub = MemoryHub(manual=True)
        self.now = 0.0
        self.versions = [1] * PAGES
        self.revived: set[bytes] = set()
        self.reasons: dict[bytes, str] = {}
        """Why permits were fenced."""
        self.deaf: set[MemoryEngine] = set()
        """Partitions to which nothing gets through."""
        self.waits: list[tuple[Memory, int, Wait]] = []
        self.finished = self.installed = self.fenced = 0
        self.boot_exporter()
        self.attachers = [self.boot(part + 1) for part in range(ATTACHERS)]
        self.zombies: list[tuple[Node, list[Grant]]] = []

    def boot_exporter(self) -> None:
        self.waits = []
        self.memory = Memory(self.versions)
        self.exporter = Node(self, EXPORTER, self.kinds)
        self.plug(self.exporter)
        segment = Segment(SEGID, self.memory, 0, PAGES, 0o666, Credentials(0, 0))
        self.exporter.exporter.segments[SEGID] = segment

    def boot(self, part: int) -> tuple[Node, list[Grant]]:
        node = Node(self, part, self.kinds)
        self.plug(node)
        return node, [self.attach(node)]

    def attach(self, node: Node) -> Grant:
        grant = node.importer.get(SEGID, write=False, now=self.now)
        node.flush()
        return grant

    def plug(self, node: Node) -> None:
        # What `MemoryEngine.open` does, which needs no loop.
        coroutine = node.engine.open(node)
        with pytest.raises(StopIteration):
            coroutine.send(None)

    def served(self, aid: bytes) -> None:
        """A page was sent to a permit: whoever it belongs to is not fenced, then."""
        if aid not in self.exporter.exporter.sharers:
            self.revived.add(aid)

    # ------------------------------------------------------------------ what can happen

    def step(self, loss: float, duplication: float) -> None:
        dice = self.dice
        draw = dice.random()
        if draw < 0.62 and self.hub.carried:
            carried = self.hub.carried
            index = dice.randrange(len(carried))
            carried[index], carried[-1] = carried[-1], carried[index]
            one = carried[-1]
            if dice.random() >= duplication:
                carried.pop()
            if dice.random() >= loss and one.receiver not in self.deaf:
                self.hub.deliver(one)
        elif draw < 0.80:
            node, grants = dice.choice(self.attachers + self.zombies)
            place = dice.randrange(len(grants))
            if grants[place].dead is not None:
                grants[place] = self.attach(node)
            grant = grants[place]
            first = dice.randrange(PAGES)
            if first not in grant.cache and len(grant.faults) < 4:
                count = dice.randint(1, PAGES - first)
                node.importer.fault(grant, first, 1, count, self.now)
                node.flush()
        elif draw < 0.90:
            self.invalidate(dice.randrange(PAGES), dice.randint(1, 2))
        elif draw < 0.975:
            self.now += dice.choice((0.01, 0.06, 0.3, 1.1))
            self.tick()
        else:
            self.accident()

    def accident(self) -> None:
        dice = self.dice
        what = dice.randrange(12)
        place = dice.randrange(ATTACHERS)
        node, grants = self.attachers[place]
        exporter = self.exporter.exporter
        if what < 3:
            if dice.random() < 0.5 and len(self.zombies) < 3:
                self.zombies.append((node, grants))
            else:
                node.engine.events = None
            self.attachers[place] = self.boot(node.part)
        elif what < 4:
            self.exporter.engine.events = None
            self.versions = [version + 1 for version in self.versions]
            self.boot_exporter()
        elif what < 6:
            exporter.died(node.part, node.inc, "wrongly")
            self.fenced += 1
            self.exporter.flush()
        elif what < 8 and len(grants) < 3:
            grants.append(self.attach(node))
        elif what < 9 and len(grants) > 1:
            node.importer.release(grants.pop(), self.now)
            node.flush()
        elif what < 10:
            node.importer.detach(grants[0], 0, PAGES)
            node.flush()
        else:
            self.deaf ^= {node.engine}

    def invalidate(self, first: int, count: int) -> None:
        last = min(first + count, PAGES)
        memory = self.memory
        memory.table.open.append((first, last))
        wait = memory.table.invalidate(first, last)
        if wait is None:
            self.change(memory, first, last)
        else:
            wait.done = lambda: self.change(memory, first, last)
        self.exporter.flush()

    def change(self, memory: Memory, first: int, last: int) -> None:
        """Everybody has let go: the pages change, and may be faulted again."""
        if memory is self.memory:
            for page in range(first, last):
                self.versions[page] += 1
            self.check()
            memory.table.end(first, last)
            self.finished += 1

    def tick(self) -> None:
        for node, _ in self.attachers + self.zombies:
            node.tick()
        self.exporter.tick()

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        exporter = self.exporter.exporter
        for node, grants in self.attachers + self.zombies:
            for grant in grants:
                void = grant.aid not in exporter.sharers and grant.aid not in self.revived
                timely = self.reasons.get(grant.aid) in ("lease", "deaf")
                if void and not (timely and self.now < grant.lease_until):
                    continue
                for page in grant.cache:
                    data = grant.bytes_of(page, 0, 8)
                    assert data is not None
                    if int.from_bytes(data, "little") < self.versions[page]:
                        raise Stale(f"page {page} in partition {node.part} at {self.now:.2f}")

    def run(self, steps: int = STEPS) -> None:
        for _ in range(steps):
            self.step(0.1, 0.1)
            self.check()

    def settle(self) -> None:
        """The network behaves again: everything that is waited for comes to an end."""
        self.deaf.clear()
        for _ in range(200):
            while self.hub.carried:
                self.hub.deliver(self.hub.carried.popleft())
                self.check()
            self.now += 0.4
            self.tick()
            if not (self.memory.table.open or self.pending()):
                return
        raise AssertionError(f"never ends: {self.memory.table.open}, {self.pending()}")

    def pending(self) -> list[Any]:
        return [
            fault
            for node, grants in self.attachers + self.zombies
            for grant in grants
            for fault in [*grant.faults.values(), *grant.homeless]
            if grant.dead is None
        ]


def runs(kinds: Kinds, seeds: range) -> Iterator[Simulation]:
    for seed in seeds:
        try:
            sim = Simulation(seed, kinds)
            sim.run()
            sim.settle()
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        yield sim


def violated(kinds: Kinds, seeds: range) -> int:
    """In how many runs something goes wrong."""
    wrong = 0
    for seed in seeds:
        sim = Simulation(seed, kinds)
        try:
            sim.run()
        except Stale:
            wrong += 1
    return wrong


def test_no_violation() -> None:
    """Nobody ever has what is stale, and nobody waits for ever; in runs where a lot happens."""
    done = list(runs(Kinds(), range(150)))
    assert sum(sim.finished for sim in done) > 30 * len(done)
    assert sum(sim.fenced for sim in done) > len(done)


@pytest.mark.long
def test_no_violation_in_5000_runs() -> None:
    """The same, longer."""
    for _ in runs(Kinds(), range(1000, 6000)):
        pass


# ------------------------------------------------------------------ one rule removed


class KeepsOvertakenFaults(Importer):
    """Without rule 1."""

    def _overtake(self, grant: Grant, first: int, last: int) -> None:
        pass


class ServesWhileInvalidating(Exporter):
    """Without rule 2."""

    def _held_off(self, table: PfnTable, first: int, last: int) -> bool:
        return False


class TakesAnyAck(Exporter):
    """Without rule 3: whatever is acknowledged, all that was sent is."""

    def _covered(self, sharer: Sharer, upto: int) -> int:
        return sharer.sent


class AcksByPartition(Exporter):
    """Without rule 4."""

    def _acked_for(self, peer: Any, ack: Ack, aid: bytes) -> Iterator[Sharer]:
        for known in list(self.peers.values()):
            if known.part == ack.part:
                yield from list(known.sharers.values())


class IgnoresMyLife(Exporter):
    """Without rule 5, at the exporter: whatever it was meant for."""

    def _known(self, peer: Any, aid: bytes, inc: bytes) -> Sharer | None:
        return None if peer is None else peer.sharers.get(aid)


class IgnoresItsLife(Importer):
    """Without rule 5, at the importer: whichever life it comes from."""

    def _of(self, aid: bytes, inc: bytes, now: float) -> Grant | None:
        return self.grants.get(aid)


class EntersLate(Exporter):
    """Without rule 6: a sharer is entered when it is heard of next."""

    late: list[tuple[PfnTable, int, int, Sharer]]

    def _enter(self, table: PfnTable, first: int, last: int, sharer: Sharer) -> None:
        self.__dict__.setdefault("late", []).append((table, first, last, sharer))

    def receive(self, sender: Sender, message: Request, body: memoryview, now: float) -> None:
        late = self.__dict__.get("late", [])
        for entry in [entry for entry in late if entry[3].peer.part == message.part]:
            late.remove(entry)
            if entry[3].aid in self.sharers:
                super()._enter(*entry)
        super().receive(sender, message, body, now)


class AnswersAgain(Importer):
    """Without rule 7: a page is installed as often as it comes."""

    def _answered(
        self, aid: bytes, inc: bytes, fid: int, now: float
    ) -> tuple[Grant, Faulting] | None:
        known = self.__dict__.setdefault("known", {})
        found = super()._answered(aid, inc, fid, now)
        if found is not None:
            known[aid, fid] = found
            return found
        grant = self.grants.get(aid)
        return None if grant is None else known.get((aid, fid))


class ServesAnybody(Exporter):
    """Without rule 8: a permit that is void is served all the same."""

    def _fenced(self, request: Any) -> None:
        if isinstance(request, Fault):
            memory = next(iter(self.segments.values())).memory
            found = memory.copy(request.first, request.need, request.count)
            assert found is not None
            page = Page(request.aid, self.inc, request.fid)
            self._send(request.part, request.me, page, found[1])


class FencesTheDeafAtOnce(Exporter):
    """Without the lease for which the permit of who hears nothing is void before it is fenced."""

    def _deaf(self, peer: Any, now: float) -> None:
        peer.deaf_at = float("inf")
        for sharer in list(peer.sharers.values()):
            self.fence(sharer, "deaf")


def counted(sim: Simulation) -> Callable[[], bytes]:
    """Ids of permits that are not random: each life of the exporter begins at one."""
    numbers = iter(range(1, 1 << 30))
    return lambda: next(numbers).to_bytes(16, "little")


WITHOUT: dict[object, Kinds] = {
    1: Kinds(importer=KeepsOvertakenFaults),
    2: Kinds(exporter=ServesWhileInvalidating),
    3: Kinds(exporter=TakesAnyAck),
    4: Kinds(exporter=AcksByPartition),
    # The exporter's incarnation is in its messages, its subjects and, by chance, its permits' ids.
    5: Kinds(IgnoresMyLife, IgnoresItsLife, lambda part, inc: address_of(part), counted),
    6: Kinds(exporter=EntersLate),
    7: Kinds(importer=AnswersAgain),
    8: Kinds(exporter=ServesAnybody),
    "the lease of the deaf": Kinds(exporter=FencesTheDeafAtOnce),
}


@pytest.mark.parametrize("rule", WITHOUT)
def test_each_rule_is_needed(rule: object) -> None:
    """Remove one, and some run finds a stale page."""
    for block in range(20):
        if violated(WITHOUT[rule], range(100 * block, 100 * block + 100)):
            return
    raise AssertionError(f"2000 runs without rule {rule}, and nothing was stale")
