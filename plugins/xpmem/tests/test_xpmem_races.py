"""The shell around the protocol, its tasks and waits, under schedules that the explorer picks.

Two partitions over the in-memory engine, and importers of the exporter's own process. Lookups take
a step, so that everything can fall in between; frames may be lost, repeated and overtaken. After
each step: a permit that is not fenced has no page that is older than the exporter's.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import mmunotify as mn
from dict_mm import DictMm
from mmunotify.testing.explore import PCT, Exploration, always, choose, explore
from mmunotify_xpmem import Credentials, MemoryHub, Partition, Xpmem
from mmunotify_xpmem.exporter import Exporter
from mmunotify_xpmem.importer import Importer
from mmunotify_xpmem.pfns import PfnTable
from mmunotify_xpmem.thread_group import ThreadGroup
from silent import SILENT
from slow_primary import SlowPrimary

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from mmunotify_xpmem import Attachment

    Scenario = Callable[[], Coroutine[Any, Any, Any]]

PAGE = mn.PAGE_SIZE
BASE = 0x10000
ME = Credentials(1, 1)


@pytest.fixture(autouse=True)
def _plain_locks() -> Iterator[None]:
    """Without lockdep, which is an order of magnitude slower."""
    from mmunotify.locks import lockdep

    with lockdep.checking(False):
        yield


class Lossy(MemoryHub):
    """Loses, repeats and holds back so many frames of a run, as the schedule says."""

    def __init__(self, **budget: int) -> None:
        super().__init__()
        self.left = budget
        self.held: list[Any] = []

    def deliver(self, carried: Any) -> None:
        possible = [fate for fate, left in self.left.items() if left]
        fate = choose("deliver", *possible, what="a frame arrives")
        if fate != "deliver":
            self.left[fate] -= 1
        if fate == "hold":
            self.held.append(carried)
        if fate in ("deliver", "repeat"):
            super().deliver(carried)
            late, self.held = self.held, []
            for one in [carried] * (fate == "repeat") + late:
                super().deliver(one)


class Slow(SlowPrimary):
    """And so are pins."""

    async def pin(self, start: int, end: int, *, write: bool = True) -> mn.Pin:
        pin: mn.Pin = await self._primary.pin(start, end, write=write)
        try:
            await checkpoint()
        except BaseException:
            self._primary.unpin(pin)
            raise
        return pin


class Dawdler(mn.SleepableDriver):
    """Keeps sections open for a step."""

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await checkpoint()


class Pair:
    """Two partitions, of which one exports two pages; when it is over nothing is left."""

    group: ThreadGroup
    segid: int

    def __init__(self, hub: MemoryHub, *, pin: bool = False) -> None:
        options: Any = {"lease": 60.0, "clock": anyio.current_time, "logger": SILENT}
        self.mm = DictMm()
        self.here = Partition(hub.engine(ME), 1, **options)
        self.there = Partition(hub.engine(ME), 2, **options)
        self.pin = pin
        self.written = 0
        self.stack = AsyncExitStack()

    async def __aenter__(self) -> Pair:
        for resource in (self.mm, self.here, self.there):
            await self.stack.enter_async_context(resource)
        always(self.fresh)
        await self.mm.map(BASE, BASE + 2 * PAGE)
        await self.mm.notifiers.register(Dawdler())  # told last
        self.group = await self.here.open(self.mm.notifiers, credentials=ME, pin=self.pin)
        self.group.enter(Slow(self.mm))
        self.segid = self.group.make(BASE, 2 * PAGE)
        return self

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is GeneratorExit:
            return  # an execution that has failed is over wherever it is: nobody can be waited for
        if error is None:
            for group in [*self.there.groups, *self.here.groups]:
                await group.close()
            await self.quiet()
        await self.stack.__aexit__(kind, error, traceback)

    async def attach(self, partition: Partition) -> Attachment:
        group = await partition.open(credentials=ME)
        return group.attach(await group.get(self.segid))

    async def write(self) -> None:
        """The next number, when everybody has let go of the page."""
        async with self.group.recalling(BASE, BASE + PAGE):
            await self.group.store(BASE, (self.written + 1).to_bytes(8, "little"))
            self.written += 1

    async def read(self, attachment: Attachment) -> None:
        """A number that is not older than the latest when this began."""
        least = self.written
        value = int.from_bytes(await attachment.read(0, 8), "little")
        assert least <= value <= self.written, f"read {value}, due was {least}"

    def fresh(self) -> None:
        sharers = self.here.exporter.sharers
        for grant in self.there.importer.grants.values():
            if grant.aid in sharers and 0 in grant.cache:
                data = grant.bytes_of(0, 0, 8)
                assert data is not None
                assert int.from_bytes(data, "little") >= self.written, "a stale page"

    async def quiet(self) -> None:
        """Nobody has anything any more, once lookups that were under way have come to an end."""
        table = self.group.table
        await anyio.sleep(1)
        assert not table.holders
        assert not table.pins
        assert not table.waits
        assert not table.open
        assert not any(self.mm.frames[number].pins for number in range(self.mm.frames.used))


def faults_and_invalidations(pin: bool, **budget: int) -> Scenario:
    """Pages are evicted and written while they are faulted in, here and there."""

    async def scenario() -> None:
        async with Pair(Lossy(**budget), pin=pin) as pair:
            attachments = [await pair.attach(where) for where in (pair.here, pair.there)]

            async def read(attachment: Attachment) -> None:
                await pair.read(attachment)
                await checkpoint()
                await pair.read(attachment)

            async def change() -> None:
                await pair.mm.evict(BASE)
                await checkpoint()
                await pair.write()

            async with anyio.create_task_group() as tasks:
                for name, attachment in zip(("here", "there"), attachments, strict=True):
                    tasks.start_soon(read, attachment, name=name)
                tasks.start_soon(change, name="change")

    return scenario


def within(pin: bool, last: str) -> Scenario:
    """An importer of the same process reads twice; the page is evicted, then `last` happens."""

    async def scenario() -> None:
        mm = DictMm()
        await mm.notifiers.register(Dawdler())
        device = Xpmem(1, logger=SILENT)
        group = await device.open(mm.notifiers, credentials=ME, pin=pin)
        group.enter(Slow(mm))
        await mm.map(BASE, BASE + PAGE)
        importer = await device.open(credentials=ME)
        segid = group.make(BASE, PAGE)
        apid = await importer.get(segid)
        attachment = importer.attach(apid)

        async def read() -> None:
            with suppress(mn.BadAddress):
                for _ in range(2):
                    await attachment.read(0, 8)
                    await checkpoint()

        async def change() -> None:
            await mm.evict(BASE)
            await checkpoint()
            if last == "remove":
                await group.remove(segid)
            elif last == "release":
                await importer.release(apid)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, name="read")
            tasks.start_soon(change, name="change")
        await group.close()
        assert not group.table.holders
        assert not group.table.pins
        await importer.close()
        await mm.put()

    return scenario


def detaching(**budget: int) -> Scenario:
    """The importer detaches, attaches and gives its permit back while pages are written."""

    async def scenario() -> None:
        async with Pair(Lossy(**budget), pin=True) as pair:
            attachments = [await pair.attach(where) for where in (pair.here, pair.there)]

            async def use(attachment: Attachment) -> None:
                group = attachment.group
                await pair.read(attachment)
                await attachment.detach()
                again = group.attach(attachment.apid)
                await pair.read(again)
                await group.release(again.apid)

            async def change() -> None:
                await pair.write()
                await pair.write()

            async with anyio.create_task_group() as tasks:
                for name, attachment in zip(("here", "there"), attachments, strict=True):
                    tasks.start_soon(use, attachment, name=name)
                tasks.start_soon(change, name="change")
            await pair.quiet()

    return scenario


def losing(**budget: int) -> Scenario:
    """Links are lost again and again: a store is done once, and a load after it finds it."""

    async def scenario() -> None:
        async with Pair(Lossy(**budget)) as pair:
            attachment = await pair.attach(pair.there)

            async def store() -> None:
                await pair.read(attachment)
                await attachment.write(PAGE, b"first")
                assert await attachment.read(PAGE, 5) == b"first"
                async with pair.group.recalling(BASE + PAGE, BASE + 2 * PAGE):
                    await pair.group.store(BASE + PAGE, b"second")
                assert await attachment.read(PAGE, 6) == b"second"

            async def lose() -> None:
                for side in (pair.there, pair.here):
                    side.lost()
                    await checkpoint()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store, name="store")
                tasks.start_soon(pair.write, name="write")
                tasks.start_soon(lose, name="lose")
            assert (await pair.mm.load(BASE + PAGE, 6)) == b"second"

    return scenario


def fencing(pin: bool, **budget: int) -> Scenario:
    """The exporter takes the living importer for dead while it reads: it attaches again."""

    async def scenario() -> None:
        async with Pair(Lossy(**budget), pin=pin) as pair:
            attachment = await pair.attach(pair.there)

            async def read() -> None:
                await pair.read(attachment)
                await pair.read(attachment)

            async def fence() -> None:
                await checkpoint()
                pair.here.exporter.died(2, pair.there.inc, "wrongly")
                pair.here.flush()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read, name="read")
                tasks.start_soon(fence, name="fence")
                tasks.start_soon(pair.write, name="write")

    return scenario


def removing(**budget: int) -> Scenario:
    """The segment is removed, or its process leaves, while pages of it are faulted in."""

    async def scenario() -> str:
        async with Pair(Lossy(**budget), pin=True) as pair:
            attachments = [await pair.attach(where) for where in (pair.here, pair.there)]
            outcome = choose("remove", "close", what="the end")

            async def read(attachment: Attachment) -> None:
                with suppress(mn.BadAddress):
                    await pair.read(attachment)
                    await pair.read(attachment)

            async def end() -> None:
                if outcome == "remove":
                    await pair.group.remove(pair.segid)
                else:
                    await pair.group.close()

            async with anyio.create_task_group() as tasks:
                for name, attachment in zip(("here", "there"), attachments, strict=True):
                    tasks.start_soon(read, attachment, name=name)
                tasks.start_soon(end, name="end")
            await pair.quiet()
            return outcome

    return scenario


def explored(scenario: Scenario, **options: Any) -> Exploration:
    """Explore, say how far that went."""
    found = explore(scenario, **{"strategy": PCT(), **options})
    print(f"\n{scenario.__qualname__}: {found}")
    return found


SCENARIOS: dict[str, tuple[Scenario, dict[str, Any]]] = {
    "faults": (faults_and_invalidations(False, hold=1, lose=1, repeat=1), {}),
    "faults of pinned pages": (faults_and_invalidations(True, hold=1, lose=1, repeat=1), {}),
    "cancelled changes": (faults_and_invalidations(False, hold=1, lose=1), {"cancel": "change"}),
    "cancelled readers": (faults_and_invalidations(True, lose=1), {"cancel": ("here", "there")}),
    "detaching": (detaching(hold=1, lose=1, repeat=1), {}),
    "losing": (losing(hold=1, lose=1, repeat=1), {}),
    "fencing": (fencing(True, hold=1, lose=1, repeat=1), {}),
    "within": (within(False, ""), {"strategy": "dfs"}),
    "removing": (removing(hold=1, lose=1, repeat=1), {}),
}


@pytest.mark.parametrize("last", ["", "remove", "release"])
@pytest.mark.parametrize("pin", [False, True], ids=["", "pinned"])
def test_nothing_is_stale_within_a_process(pin: bool, last: str) -> None:
    """Under every schedule."""
    assert explored(within(pin, last), strategy="dfs").check().exhausted


@pytest.mark.parametrize("schedules", [60, pytest.param(3000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "within"])
def test_nothing_is_stale(name: str, schedules: int) -> None:
    """Nor left behind, under any schedule that was tried."""
    scenario, options = SCENARIOS[name]
    found = explored(scenario, schedules=schedules, **options).check()
    assert not found.unmatched


async def impatient(self: Partition, table: PfnTable, wait: Any) -> None:
    """`settle` without waiting."""
    self.flush()
    table.waits.discard(wait)


async def blind(self: ThreadGroup, page: int, *, write: bool) -> Any:
    """A lookup that does not ask whether an invalidation has overtaken it."""
    await self.memory.fault_in(page << 12, write=write)
    return self.memory.translate(page << 12)


MUTANTS: dict[str, tuple[str, Any, str, Any]] = {
    "invalidations do not wait": ("faults", Partition, "settle", impatient),
    "lookups are not looked at again": ("within", ThreadGroup, "_fault_in", blind),
    "overtaken faults are kept": ("faults", Importer, "_overtake", lambda *_: None),
    "faults are served meanwhile": ("faults", Exporter, "_held_off", lambda *_: False),
    "pins for nothing are kept": ("removing", PfnTable, "let_go_unheld", lambda *_: None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each breaks a rule, and some schedule of few shows it."""
    name, owner, method, replacement = MUTANTS[mutant]
    monkeypatch.setattr(owner, method, replacement)
    scenario, options = SCENARIOS[name]
    assert explored(scenario, schedules=1000, **options).failures
