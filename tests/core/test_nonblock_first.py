"""Sleepable drivers that are asked whether they have to wait, and awaited only if they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

import mmunotify as mn
from mmunotify import log
from mmunotify.errors import DriverError, UnknownCallback
from recorders import Atomic, Deferred, Notebook, Sleepable, Stop
from steps import run_now, settle

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("both_forms", "lines")


class Ready(Notebook, mn.SleepableDriver):
    """Has to wait only while it is `busy`."""

    nonblock_first = True
    busy = False

    def invalidate_range_start_nonblock(self, rng: mn.Range) -> bool:
        self.tell("busy" if self.busy else "start")
        if not self.busy:
            self.began()
        return not self.busy

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await self.tell_async("waited")
        self.began()

    def invalidate_range_end_nonblock(self, rng: mn.Range) -> None:
        self.ended()
        self.tell("end")


class Busy(Ready):
    busy = True


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


async def section(notifiers: mn.Notifiers[Any]) -> mn.Notifiers[Any]:
    async with notifiers.invalidating(page()):
        pass
    return notifiers


async def with_drivers(*drivers: mn.AnyDriver) -> mn.Notifiers[mn.RwSems]:
    """The first is the oldest, and told last."""
    notifiers = mn.Notifiers()
    for driver in drivers:
        await notifiers.register(driver)
    return notifiers


def quiet(notifiers: mn.Notifiers[Any]) -> bool:
    found = notifiers.statistics()
    return (found.open_sections, found.srcu_readers, found.quarantined) == (0, 0, 0)


async def test_who_has_nothing_to_wait_for_is_not_awaited() -> None:
    told: list[str] = []
    notifiers = await with_drivers(Atomic("old", told), Ready("r", told), Atomic("new", told))
    run_now(section(notifiers))
    assert told == ["new start", "r start", "old start", "new end", "r end", "old end"]
    assert notifiers.nowait
    assert not notifiers.plain
    assert quiet(notifiers)


async def test_who_has_to_wait_is_awaited_and_the_others_are_told_once() -> None:
    told: list[str] = []
    gate = anyio.Event()
    busy = Busy("b", told, waited=gate.wait)
    notifiers = await with_drivers(Atomic("old", told), busy, Atomic("new", told))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(section, notifiers)
        await settle()
        assert told == ["new start", "b busy", "b waited"]
        gate.set()
    assert told[3:] == ["old start", "new end", "b end", "old end"]
    assert quiet(notifiers)


async def test_a_driver_of_coroutines_beside_it_is_awaited_as_ever() -> None:
    told: list[str] = []
    notifiers = await with_drivers(Sleepable("s", told), Ready("r", told))
    await section(notifiers)
    assert told == ["r start", "s start", "r end", "s end"]
    assert not notifiers.nowait
    assert notifiers.invalidate_range_start_nowait(page()) is None
    assert len(told) == 4
    assert quiet(notifiers)


@pytest.mark.parametrize("kind", [Ready, Busy])
async def test_a_start_in_one_step_or_none_at_all(kind: type[Ready]) -> None:
    told: list[str] = []
    notifiers = await with_drivers(Atomic("old", told), kind("r", told), Atomic("new", told))
    rng = page()
    audience = notifiers.invalidate_range_start_nowait(rng)
    if kind is Busy:
        assert audience is None
        assert told == ["new start", "r busy", "new end"]
    else:
        assert audience is not None
        assert notifiers.statistics().open_sections == 1
        assert notifiers.invalidate_range_end_atomic(rng, audience) == ()
        assert told == ["new start", "r start", "old start", "new end", "r end", "old end"]
    assert quiet(notifiers)


async def test_a_mark_that_is_to_be_finished_is_never_taken_back() -> None:
    told: list[str] = []
    notifiers = await with_drivers(Busy("b", told), Deferred("d", told))
    assert not notifiers.nowait
    assert notifiers.invalidate_range_start_nowait(page()) is None
    assert told == []
    await section(notifiers)
    assert told == ["d mark", "b busy", "b waited", "b end", "d sync"]


async def test_atomic_sections_refuse_it_all_the_same() -> None:
    notifiers = await with_drivers(Ready("r"))
    with pytest.raises(mn.ScheduleWhileAtomic, match="found Ready"):
        notifiers.invalidating_atomic(page()).__enter__()
    assert quiet(notifiers)


async def test_at_once_and_for_a_single_page() -> None:
    for kind, first in ((Ready, ["r start"]), (Busy, ["r busy", "r waited"])):
        driver = kind("r")
        notifiers = await with_drivers(driver)
        run_now(notifiers.invalidate(page()))
        run_now(notifiers.invalidate_page(0x1000))
        assert driver.told == 2 * [*first, "r end"]


async def test_together_with_others_that_wait_at_the_same_time() -> None:
    class Both(Busy):
        concurrent = True

    told: list[str] = []
    gate = anyio.Event()
    notifiers = await with_drivers(*(Both(name, told, waited=gate.wait) for name in "ab"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(section, notifiers)
        await settle()
        assert sorted(told) == ["a busy", "a waited", "b busy", "b waited"]
        gate.set()
    assert quiet(notifiers)


@pytest.mark.parametrize("nowait", [False, True])
async def test_who_fails_when_it_is_asked_is_quarantined(nowait: bool) -> None:
    def explode() -> None:
        raise ZeroDivisionError

    told: list[str] = []
    bad = Ready("bad", told, start=explode)
    notifiers = await with_drivers(Atomic("old", told), bad)
    rng = page()
    if nowait:
        audience = notifiers.invalidate_range_start_nowait(rng)
        assert audience is not None
        failed = notifiers.invalidate_range_end_atomic(rng, audience)
    else:
        audience = await notifiers.invalidate_range_start(rng)
        failed = await notifiers.invalidate_range_end(rng, audience)
    assert [type(sub.failure) for sub in failed] == [ZeroDivisionError]
    assert told == ["bad start", "old start", "old end"]


@pytest.mark.parametrize("nowait", [False, True])
async def test_an_interruption_ends_who_had_been_told(nowait: bool) -> None:
    def interrupt() -> None:
        raise Stop

    told: list[str] = []
    stopped = Ready("r", told, start=interrupt)
    notifiers = await with_drivers(stopped, Ready("new", told))

    async def start() -> None:
        if nowait:
            notifiers.invalidate_range_start_nowait(page())
        else:
            await notifiers.invalidate_range_start(page())

    with pytest.raises(Stop):
        await start()
    assert told == ["new start", "r start", "new end"]
    assert quiet(notifiers)


async def test_a_cancelled_wait_ends_who_had_been_told() -> None:
    told: list[str] = []
    never = anyio.Event()
    notifiers = await with_drivers(Busy("b", told, waited=never.wait), Ready("new", told))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(section, notifiers)
        await settle()
        tasks.cancel_scope.cancel()
    assert told == ["new start", "b busy", "b waited", "new end"]
    assert quiet(notifiers)


@pytest.mark.parametrize("kind", [Ready, Busy])
async def test_the_trace_has_one_callback_for_it(kind: type[Ready]) -> None:
    seen: list[log.Record] = []
    notifiers = await with_drivers(kind("r"))
    notifiers.trace = seen.append
    run_now(section(notifiers))
    assert [(record.callback, record.phase) for record in seen if record.driver] == [
        *(("invalidate_range_start", phase) for phase in ("start", "end")),
        *(("invalidate_range_end_nonblock", phase) for phase in ("start", "end")),
    ]


async def test_a_section_that_is_not_blockable_does_not_wait() -> None:
    told: list[str] = []
    notifiers = await with_drivers(Busy("b", told))
    with pytest.raises(mn.WouldBlock, match="Busy"):
        notifiers.invalidating_nonblock(page()).__enter__()
    assert told == ["b busy"]


async def test_who_leaves_while_a_section_waits_is_not_told_the_end() -> None:
    told: list[str] = []
    gate = anyio.Event()
    notifiers = await with_drivers(Busy("b", told, waited=gate.wait))
    leaving = await notifiers.register(Ready("new", told))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(section, notifiers)
        await settle()
        tasks.start_soon(notifiers.unregister, leaving)
        await settle()
        gate.set()
    assert told == ["new start", "b busy", "b waited", "b end"]


def no_start(name: str) -> type[mn.SleepableDriver]:
    return type(name, (mn.SleepableDriver,), {"nonblock_first": True})


def an_end(name: str) -> type[mn.SleepableDriver]:
    async def invalidate_range_end(self: object, rng: mn.Range) -> None:
        pass

    return type(name, (Ready,), {"invalidate_range_end": invalidate_range_end})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (no_start, DriverError, "Odd is nonblock_first: expected it to define .*_start_nonblock"),
        (an_end, UnknownCallback, r"Odd.invalidate_range_end: expected .*_end_nonblock, because"),
    ],
)
async def test_what_nobody_would_call_is_refused(
    make: Callable[[str], type[Any]], error: type[DriverError], says: str
) -> None:
    kind = make("Odd")
    driver = kind() if make is no_start else kind("o")
    notifiers = mn.Notifiers()
    with pytest.raises(error, match=says):
        await notifiers.register(driver)
    assert not notifiers.armed
