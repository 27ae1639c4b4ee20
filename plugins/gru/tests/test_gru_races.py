"""Misses, invalidations, unloading, stealing and exit under every schedule.

Translations take a while to come, and sections stay open for a while, so that everything can fall
in between. After each step the checker looks at all TLBs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import mmunotify as mn
from dict_mm import DictMm
from mmunotify.testing.explore import PCT, Exploration, always, explore
from mmunotify_gru import Exop, Gru, GruChecker, GruDriver, MessageQueue, Sender
from mmunotify_gru.errors import ContextClosed
from mmunotify_gru.hardware.chiplet import Chiplet
from mmunotify_gru.hardware.tfh import Tfh
from silent import SILENT
from slow_primary import SlowPrimary

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from mmunotify import Primary

    Scenario = Callable[[], Coroutine[Any, Any, Any]]

BASE = 0x10000


@pytest.fixture(autouse=True)
def _plain_locks() -> Iterator[None]:
    """Without lockdep, which is an order of magnitude slower."""
    from mmunotify.locks import lockdep

    with lockdep.checking(False):
        yield


class SlowDriver(GruDriver):
    """A driver over such a primary."""

    def attach(self, primary: Primary | None) -> None:
        assert primary is not None
        super().attach(SlowPrimary(primary))


class SlowGru(Gru):
    def make_driver(self) -> GruDriver:
        return SlowDriver(gru=self)


class Deaf(Tfh):
    """M8: no rule of the hardware closes the race."""

    __slots__ = ()

    def accepts(self, seen: int) -> bool:
        return True


class DeafChiplet(Chiplet):
    tfh_type = Deaf


class DeafGru(SlowGru):
    chiplet_type = DeafChiplet


class Dawdler(mn.SleepableDriver):
    """Keeps sections open for a step."""

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await checkpoint()


def loads_and_evictions(gru_type: type[Gru], miss: str, loads: int = 1) -> Scenario:
    """A page is evicted and written again while a context loads from it: no load is older."""

    async def scenario() -> None:
        gru = gru_type(logger=SILENT)
        checker = GruChecker(gru)
        always(checker.check)
        written = 0
        async with DictMm() as mm, mm.notifiers.attached(Dawdler()):
            await mm.map(BASE, BASE + 0x2000)
            async with gru.open(mm.notifiers, miss=miss) as context:

                async def load() -> None:
                    for _ in range(loads):
                        least = written
                        await context.vload(BASE, elements=1)
                        value = int.from_bytes(await context.get(0, 8), "little")
                        assert least <= value <= written

                async def write() -> None:
                    nonlocal written
                    await mm.evict(BASE)
                    written = 1
                    await mm.store(BASE, written.to_bytes(8, "little"))
                    await mm.evict(BASE)

                async def elsewhere() -> None:
                    await mm.notifiers.invalidate(mn.Range(BASE + 0x1000, BASE + 0x2000))

                async with anyio.create_task_group() as tg:
                    tg.start_soon(load, name="load")
                    tg.start_soon(write, name="write")
                    tg.start_soon(elsewhere, name="elsewhere")

    return scenario


def adds_and_protections(miss: str) -> Scenario:
    """Stores while the page is protected, evicted and unloaded from under them: none is lost."""

    async def scenario() -> None:
        gru = SlowGru(logger=SILENT)
        checker = GruChecker(gru)
        always(checker.check)
        async with DictMm() as mm, mm.notifiers.attached(Dawdler()):
            await mm.map(BASE, BASE + 0x1000)
            async with gru.open(mm.notifiers, miss=miss) as context:

                async def add() -> None:
                    for _ in range(2):
                        await context.gamer(Exop.ADD, BASE, 1)

                async def disturb() -> None:
                    await mm.evict(BASE)
                    context.unload()
                    await checkpoint()
                    await mm.protect(BASE, BASE + 0x1000, writable=True)

                async with anyio.create_task_group() as tg:
                    tg.start_soon(add, name="add 1")
                    tg.start_soon(add, name="add 2")
                    tg.start_soon(disturb, name="disturb")
                assert await context.gamir(Exop.FETCH, BASE) == 4

    return scenario


def exit_meanwhile(miss: str) -> Scenario:
    """The address space exits while a context misses, and its user closes it."""

    async def scenario() -> str:
        gru = SlowGru(logger=SILENT)
        checker = GruChecker(gru)
        always(checker.check)
        mm = DictMm()
        await mm.map(BASE, BASE + 0x1000)
        outcome = "done"
        async with anyio.create_task_group() as tg:  # noqa: SIM117 - the context goes first
            async with gru.open(mm.notifiers, miss=miss) as context:

                async def use() -> None:
                    nonlocal outcome
                    try:
                        await context.vset(BASE, 1, elements=1)
                    except ContextClosed:
                        outcome = "closed"

                async def leave() -> None:
                    await mm.put()

                mm.tryget()
                tg.start_soon(use, name="use")
                tg.start_soon(leave, name="leave")
                await checkpoint()
                await mm.put()
        await mm.notifiers.barrier()
        assert [state.active for state in gru.states] == [0, 0]
        assert gru.drivers == []
        assert gru.statistics.gts_alloc == gru.statistics.gts_free == 1
        return outcome

    return scenario


def stealing(contexts: int) -> Scenario:
    """Contexts that fill a chiplet take it from each other while they use it."""

    async def scenario() -> None:
        gru = SlowGru(assign_delay=1, steal_delay=0, logger=SILENT)
        checker = GruChecker(gru)
        always(checker.check)
        async with DictMm() as mm:
            await mm.map(BASE, BASE + 0x1000)
            async with anyio.create_task_group() as tg:

                async def use(number: int) -> None:
                    async with gru.open(mm.notifiers, dseg=20480, chiplet=0) as context:
                        await context.put(8, bytes((number,)))
                        await context.gamer(Exop.ADD, BASE, 1)
                        assert await context.get(8, 1) == bytes((number,))

                for number in range(contexts):
                    tg.start_soon(use, number, name=f"use {number}")
            assert await mm.load(BASE, 1) == bytes((contexts,))

    return scenario


def messages(senders: int) -> Scenario:
    """Senders fill a queue whose page is evicted under them; its receiver gets all, in order."""

    async def scenario() -> None:
        gru = SlowGru(logger=SILENT)
        checker = GruChecker(gru)
        always(checker.check)
        async with DictMm() as mm:
            await mm.map(BASE, BASE + 0x1000)
            async with gru.open(mm.notifiers, dseg=2048) as context:
                queue = await MessageQueue.create(context, BASE, 8)
                received: list[bytes] = []

                async def send(number: int) -> None:
                    sender = Sender(context, BASE, scratch=256 * (number + 1))
                    for turn in range(2):
                        await sender.send(bytes((number, turn)))

                async def evict() -> None:
                    await mm.evict(BASE)
                    await checkpoint()
                    await mm.evict(BASE)

                async with anyio.create_task_group() as tg:
                    for number in range(senders):
                        tg.start_soon(send, number, name=f"send {number}")
                    tg.start_soon(evict, name="evict")
                while (message := await queue.receive_nowait()) is not None:
                    received.append(message)
            for number in range(senders):
                assert [turn for who, turn in received if who == number] == [0, 1]
            assert len(received) == 2 * senders

    return scenario


def explored(scenario: Scenario, **options: Any) -> Exploration:
    """Explore, say how far that went, and fail if a schedule does."""
    found = explore(scenario, **options)
    print(f"\n{scenario.__qualname__}: {found}")
    return found.check()


CASES = [
    pytest.param(loads_and_evictions(SlowGru, "interrupt"), id="loads-interrupt"),
    pytest.param(loads_and_evictions(SlowGru, "poll", 2), id="loads-poll"),
    pytest.param(adds_and_protections("interrupt"), id="adds-interrupt"),
    pytest.param(adds_and_protections("poll"), id="adds-poll"),
    pytest.param(exit_meanwhile("interrupt"), id="exit-interrupt"),
    pytest.param(exit_meanwhile("poll"), id="exit-poll"),
    pytest.param(stealing(3), id="stealing"),
    pytest.param(messages(2), id="messages"),
]


@pytest.mark.parametrize("scenario", CASES)
def test_every_schedule(scenario: Scenario) -> None:
    """To the end."""
    assert explored(scenario).exhausted


@pytest.mark.long
@pytest.mark.parametrize("scenario", [*CASES[:2], *CASES[4:6]])
def test_schedules_with_cancellation(scenario: Scenario) -> None:
    """Any task that uses a context, cancelled anywhere, at random."""
    explored(scenario, strategy=PCT(depth=3), schedules=3_000, cancel=("load", "use*"))


def test_the_mutant_is_found() -> None:
    """M8: some schedule drops in what an invalidation has overtaken."""
    found = explore(loads_and_evictions(DeafGru, "poll"))
    assert found.failure is not None
    print(found)
