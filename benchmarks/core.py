"""Telling drivers: against bare loops over the same callbacks, and against peers that dispatch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio import CancelScope

import mmunotify as mn

from ._bench import Row, async_minima, at_least, at_most, minima, peer, unmeasured

if TYPE_CHECKING:
    from collections.abc import Callable

RANGE = mn.Range(0x1000, 0x9000)


class Atomic(mn.AtomicDriver):
    def invalidate_range_start(self, rng: mn.Range) -> None:
        pass

    def invalidate_range_end(self, rng: mn.Range) -> None:
        pass


class Sleepable(mn.SleepableDriver):
    async def invalidate_range_start(self, rng: mn.Range) -> None:
        pass

    async def invalidate_range_end(self, rng: mn.Range) -> None:
        pass


def nobody() -> list[Row]:
    class Bare:
        def __init__(self) -> None:
            self.flag = False

    notifiers = mn.Notifiers()
    bare = Bare()

    def ours(number: int) -> None:
        for _ in range(number):
            if notifiers.armed:
                raise AssertionError

    def attribute(number: int) -> None:
        for _ in range(number):
            if bare.flag:
                raise AssertionError

    mine, theirs = minima(ours, attribute, number=5000)
    return [at_most("nobody is registered", mine / theirs, 1.5, "a bare attribute test")]


async def atomic() -> list[Row]:
    rows = []
    for count, limit in ((1, 2.0), (3, 1.7), (10, 1.4)):
        notifiers = mn.Notifiers()
        drivers = [Atomic() for _ in range(count)]
        for driver in drivers:
            await notifiers.register(driver)
        mine, theirs = minima(_sections(notifiers), _loops(drivers))
        name = f"start and end to {count} atomic"
        rows.append(at_most(name, mine / theirs, limit, "bare loops over the bound methods"))
    return rows


def _sections(notifiers: mn.Notifiers[mn.RwSems]) -> Callable[[int], None]:
    start = notifiers.invalidate_range_start_atomic
    end = notifiers.invalidate_range_end_atomic

    def sections(number: int) -> None:
        for _ in range(number):
            end(RANGE, start(RANGE))

    return sections


def _loops(drivers: list[Atomic]) -> Callable[[int], None]:
    starts = tuple(driver.invalidate_range_start for driver in drivers)
    ends = tuple(driver.invalidate_range_end for driver in drivers)

    def loops(number: int) -> None:
        for _ in range(number):
            for start in starts:
                start(RANGE)
            for end in ends:
                end(RANGE)

    return loops


async def sleepable() -> list[Row]:
    notifiers = mn.Notifiers()
    drivers = [Sleepable() for _ in range(3)]
    for driver in drivers:
        await notifiers.register(driver)
    starts = tuple(driver.invalidate_range_start for driver in drivers)
    ends = tuple(driver.invalidate_range_end for driver in drivers)
    told = await notifiers.invalidate_range_start(RANGE)

    async def our_starts(number: int) -> None:
        for _ in range(number):
            audience = await notifiers.invalidate_range_start(RANGE)
            audience.open -= 1

    async def bare_starts(number: int) -> None:
        for _ in range(number):
            for start in starts:
                await start(RANGE)

    async def our_ends(number: int) -> None:
        for _ in range(number):
            told.open += 1
            await notifiers.invalidate_range_end(RANGE, told)

    async def bare_ends(number: int) -> None:
        for _ in range(number):
            with CancelScope(shield=True):
                for end in ends:
                    await end(RANGE)

    mine, theirs, ends_mine, ends_theirs = await async_minima(
        our_starts, bare_starts, our_ends, bare_ends
    )
    await notifiers.invalidate_range_end(RANGE, told)
    return [
        at_most("start to 3 sleepable", mine / theirs, 2.0, "bare await loop"),
        at_most(
            "end to 3 sleepable", ends_mine / ends_theirs, 1.5, "bare await loop in one shield"
        ),
    ]


async def peers() -> list[Row]:
    """One pass over three subscribers; ours is a start, in both colours."""
    notifiers = mn.Notifiers()
    for _ in range(3):
        await notifiers.register(Atomic())
    waiting = mn.Notifiers()
    for _ in range(3):
        await waiting.register(Sleepable())

    def ours(number: int) -> None:
        start = notifiers.invalidate_range_start_atomic
        for _ in range(number):
            start(RANGE).open -= 1

    async def ours_async(number: int) -> None:
        start = waiting.invalidate_range_start
        for _ in range(number):
            (await start(RANGE)).open -= 1

    rows = []
    for library, theirs in (("blinker", _blinker()), ("pluggy", _pluggy())):
        name, limit = f"dispatch to 3, {library} : ours", 3.0
        if isinstance(theirs, str):
            rows.append(unmeasured(name, f">= {limit:g}", library, theirs))
        else:
            mine, other = minima(ours, theirs)
            rows.append(at_least(name, other / mine, limit, library))
    aiosignal = peer("aiosignal")
    name = "async dispatch to 3, aiosignal : ours"
    if isinstance(aiosignal, str):
        return [*rows, unmeasured(name, ">= 1", "aiosignal", aiosignal)]

    async def receive(rng: mn.Range) -> None:
        pass

    signal = aiosignal.Signal(object())
    signal.extend([receive] * 3)
    signal.freeze()

    async def theirs_async(number: int) -> None:
        for _ in range(number):
            await signal.send(RANGE)

    mine, other = await async_minima(ours_async, theirs_async)
    return [*rows, at_least(name, other / mine, 1.0, "aiosignal")]


def _blinker() -> Callable[[int], None] | str:
    blinker = peer("blinker")
    if isinstance(blinker, str):
        return blinker
    signal = blinker.Signal()

    class Receiver:
        def receive(self, sender: object) -> None:
            pass

    receivers = [Receiver() for _ in range(3)]
    for receiver in receivers:
        signal.connect(receiver.receive)

    def send(number: int) -> None:
        assert receivers  # the signal holds them weakly
        for _ in range(number):
            signal.send(RANGE)

    return send


def _pluggy() -> Callable[[int], None] | str:
    pluggy = peer("pluggy")
    if isinstance(pluggy, str):
        return pluggy

    class Spec:
        @pluggy.HookspecMarker("bench")  # type: ignore[untyped-decorator]
        def start(self, rng: mn.Range) -> None:
            pass

    class Plugin:
        @pluggy.HookimplMarker("bench")  # type: ignore[untyped-decorator]
        def start(self, rng: mn.Range) -> None:
            pass

    manager = pluggy.PluginManager("bench")
    manager.add_hookspecs(Spec)
    for _ in range(3):
        manager.register(Plugin())
    hook = manager.hook.start

    def call(number: int) -> None:
        for _ in range(number):
            hook(rng=RANGE)

    return call


async def _in_loop() -> list[Row]:
    return [*await atomic(), *await sleepable(), *await peers()]


def run() -> list[Row]:
    return [*nobody(), *anyio.run(_in_loop)]
