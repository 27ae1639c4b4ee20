"""Cancelled at every suspension point, in every way: the invariants hold, and life goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

import mmunotify as mn
from cancelling import ANYIO, NATIVE, at_each_suspension, cancel_at
from mmunotify.locks import lockdep
from recorders import Atomic, Concurrent, Deferred, Sleepable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any, TypeAlias

    from recorders import Notebook

    Part: TypeAlias = "Callable[[World], Coroutine[Any, Any, object]]"

pytestmark = pytest.mark.usefixtures("lines")


@pytest.fixture(params=[*ANYIO, *NATIVE])
def how(request: pytest.FixtureRequest, anyio_backend: Any) -> Iterator[str]:
    """The way of cancelling; each is tried on one of the two forms of locks and watchers."""
    if request.param in NATIVE and anyio_backend[0] != "asyncio":
        pytest.skip("native cancellation of a task is asyncio's")
    with lockdep.checking(request.param in ("scope", "native")):
        yield request.param


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


class World:
    """An address space whose drivers suspend twice in each callback that may."""

    def __init__(self, slow: type[Sleepable]) -> None:
        self.slow = slow
        self.notifiers = mn.Notifiers()
        self.told: list[str] = []
        self.drivers: dict[str, Notebook] = {}
        self.subs: dict[str, mn.Subscription[mn.AnyDriver]] = {}
        self.where: dict[int, str] = {}
        """In which callback each task is suspended, by the task's id."""
        self.interrupted = ""
        """In which callback the victim was when it was cancelled."""
        self.calm = False

    async def pause(self, where: str) -> None:
        if self.calm:
            return
        task = anyio.get_current_task().id
        self.where[task] = where
        try:
            for _ in range(2):
                await anyio.lowlevel.checkpoint()
        finally:
            del self.where[task]

    def acts(self, name: str, *callbacks: str) -> dict[str, Callable[[], object]]:
        return {
            callback: lambda where=f"{name} {callback}": self.pause(where)  # type: ignore[misc]
            for callback in callbacks
        }

    def make(self, kind: type[Any], name: str) -> Any:
        callbacks = ["release"]
        callbacks += ["sync"] if kind is Deferred else [] if kind is Atomic else ["start", "end"]
        self.drivers[name] = kind(name, self.told, **self.acts(name, *callbacks))
        return self.drivers[name]

    async def register(self, kind: type[Any], name: str) -> None:
        self.subs[name] = await self.notifiers.register(self.make(kind, name))

    async def populate(self) -> None:
        await self.register(self.slow, "old")
        await self.register(Atomic, "a")
        await self.register(Deferred, "d")
        await self.register(Sleepable, "s")
        await self.register(self.slow, "new")

    # What is cancelled.

    async def section(self) -> None:
        async with self.notifiers.invalidating(page()):
            await self.pause("the body")

    async def bare_pair(self) -> None:
        rng = page()
        audience = await self.notifiers.invalidate_range_start(rng)
        try:
            await self.notifiers.invalidate_range_end(rng, audience)
        finally:
            await self.notifiers.invalidate_range_sync(rng, audience)

    async def nested(self) -> None:
        async with self.notifiers.invalidating(page(1)), self.notifiers.invalidating(page(2)):
            await self.pause("the body")

    async def invalidate(self) -> None:
        await self.notifiers.invalidate(page())

    async def invalidate_page(self) -> None:
        await self.notifiers.invalidate_page(0x1000)

    async def attach(self) -> None:
        async with self.notifiers.attached(self.make(self.slow, "late")):
            await self.section()

    async def get(self) -> None:
        sub = await self.notifiers.get(Sleepable, lambda: self.make(Sleepable, "shared"))
        self.notifiers.put(sub)

    async def unregister(self) -> None:
        await self.notifiers.unregister(self.subs.pop("s"))

    async def exit(self) -> None:
        await self.notifiers.release()

    # What happens meanwhile.

    async def hold(self) -> None:
        """A section that is open for a while."""
        async with self.notifiers.invalidating(page(7)):
            await self.pause("another body")

    # What has to be true.

    def note(self) -> None:
        self.interrupted = self.where.get(anyio.get_current_task().id, "")

    def check_now(self, failed: set[str]) -> None:
        """Nothing is left behind; the drivers that are quarantined are these."""
        statistics = self.notifiers.statistics()
        assert (statistics.open_sections, statistics.srcu_readers) == (0, 0)
        assert {name for name, sub in self.subs.items() if sub.failure is not None} == failed
        for name, driver in self.drivers.items():
            assert driver.lone_ends == 0
            left_in_between = name in failed or f"{name} release" in self.told
            assert driver.open == 0 or left_in_between

    def check_lives(self) -> None:
        """Each driver was released and freed at most once, and was told nothing after."""
        for name in self.drivers:
            story = [one.split()[1] for one in self.told if one.split()[0] == name]
            assert story.count("release") <= 1
            assert story.count("free") <= 1
            assert "free" not in story or story[-1] == "free"

    async def check_later(self) -> None:
        """Everybody who is there is told; who comes and goes is not held up."""
        self.calm = True
        self.told.clear()
        await self.notifiers.invalidate(page())
        for name, sub in self.subs.items():
            starts = {f"{name} start", f"{name} mark"} & set(self.told)
            assert len(starts) == sub.hashed
        for sub in self.subs.values():
            await self.notifiers.unregister(sub)
        assert self.notifiers.statistics() == mn.NotifiersStatistics(
            subscriptions=0, quarantined=0, open_sections=0, srcu_readers=0
        )


async def cancel_everywhere(
    how: str,
    slow: type[Sleepable],
    victim: Part,
    *meanwhile: Part,
    kept: frozenset[str] = frozenset(("end", "sync")),
) -> int:
    """Play the scene once for each suspension point; how many there were.

    A driver whose callback is one of the `kept` ones is quarantined when a native cancellation
    lands in it, since the others still have to be told.
    """

    async def scene(number: int) -> bool:
        world = World(slow)
        await world.populate()
        async with anyio.create_task_group() as tasks:
            for part in meanwhile:
                tasks.start_soon(part, world)
                for _ in range(3):
                    await anyio.lowlevel.checkpoint()
            reached = await cancel_at(number, how, lambda: victim(world), world.note)
        driver, _, callback = world.interrupted.partition(" ")
        native = how in NATIVE and callback in kept
        world.check_now({driver} & world.subs.keys() if native else set())
        world.check_lives()
        await world.check_later()
        return reached

    return await at_each_suspension(scene)


@pytest.mark.parametrize("slow", [Sleepable, Concurrent])
@pytest.mark.parametrize("victim", [World.section, World.bare_pair, World.nested])
async def test_a_section(how: str, slow: type[Sleepable], victim: Part) -> None:
    """Start, body, end and sync."""
    points = await cancel_everywhere(how, slow, victim)
    assert points >= (14 if slow is Sleepable else 8)


@pytest.mark.parametrize("slow", [Sleepable, Concurrent])
@pytest.mark.parametrize("victim", [World.invalidate, World.invalidate_page])
async def test_what_cannot_be_undone(how: str, slow: type[Sleepable], victim: Part) -> None:
    kept = frozenset(("start", "end", "sync"))
    points = await cancel_everywhere(how, slow, victim, kept=kept)
    assert points >= (14 if slow is Sleepable else 5)


@pytest.mark.parametrize("slow", [Sleepable, Concurrent])
async def test_register_section_and_unregister(how: str, slow: type[Sleepable]) -> None:
    """With another section open, so that register has to wait, and callbacks running."""
    points = await cancel_everywhere(how, slow, World.attach, World.hold)
    assert points > 10


@pytest.mark.parametrize("part", [World.hold, World.invalidate])
async def test_get(how: str, part: Part) -> None:
    assert await cancel_everywhere(how, Sleepable, World.get, part) > 0


@pytest.mark.parametrize("part", [World.hold, World.invalidate, World.exit])
async def test_unregister(how: str, part: Part) -> None:
    """While a section is open, while callbacks run, while the exit releases."""
    assert await cancel_everywhere(how, Sleepable, World.unregister, part) > 0


@pytest.mark.parametrize("part", [World.hold, World.invalidate, World.unregister])
@pytest.mark.parametrize("slow", [Sleepable, Concurrent])
async def test_the_exit(how: str, slow: type[Sleepable], part: Part) -> None:
    kept = frozenset(("release",))
    assert await cancel_everywhere(how, slow, World.exit, part, kept=kept) >= 8
