"""Sections that must not suspend (the OOM reaper): -EAGAIN, and who is ended then (Z4, Z12)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import mmunotify as mn
from mmunotify import log
from recorders import Atomic, Deferred, Sleepable, Stop
from steps import run_now

pytestmark = pytest.mark.usefixtures("both_forms", "lines")


class Able(Sleepable):
    """A sleepable driver that can do without suspending, as long as it is `able`."""

    able = True

    def invalidate_range_start_nonblock(self, rng: mn.Range) -> bool:
        self.tell("start_nonblock")
        return self.able

    def invalidate_range_end_nonblock(self, rng: mn.Range) -> None:
        self.tell("end_nonblock")


class Unable(Able):
    able = False


class AbleDeferred(Deferred):
    def invalidate_range_start_nonblock(self, rng: mn.Range) -> bool:
        self.tell("start_nonblock")
        return True

    def invalidate_range_end_nonblock(self, rng: mn.Range) -> None:
        self.tell("end_nonblock")


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


def enter(notifiers: mn.Notifiers[Any], rng: mn.Range | None = None) -> None:
    notifiers.invalidating_nonblock(rng or page()).__enter__()


async def test_everybody_able_is_told_newest_first_by_plain_callbacks() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Atomic("a", told))
    await notifiers.register(Able("s", told))
    await notifiers.register(AbleDeferred("d", told))
    with notifiers.invalidating_nonblock(page()) as section:
        assert notifiers.statistics().open_sections == 1
    assert told == [
        *("d start_nonblock", "s start_nonblock", "a start"),
        *("d end_nonblock", "s end_nonblock", "a end"),
    ]
    assert section.failed == ()
    assert notifiers.statistics().open_sections == 0


async def test_z4_who_succeeded_gets_an_end_and_who_refused_does_not() -> None:
    notifiers = mn.Notifiers(name="mm[2]")
    told: list[str] = []
    await notifiers.register(Atomic("old", told))
    await notifiers.register(Unable("no", told))
    await notifiers.register(Able("s", told))
    await notifiers.register(Atomic("new", told))
    with pytest.raises(
        mn.WouldBlock, match=r"Unable would have to wait in a non-blockable .*0x1000"
    ) as caught:
        enter(notifiers)
    assert caught.value.errno == errno.EAGAIN
    assert told == [
        *("new start", "s start_nonblock", "no start_nonblock"),
        *("new end", "s end_nonblock"),
    ]
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=4, quarantined=0, open_sections=0, srcu_readers=0
    )


async def test_z12_what_is_refused_is_refused_again_and_holds_nobody_up() -> None:
    """A failed start leaves nothing behind: the next blockable section and register go through."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Unable("no", told))
    for _ in range(2):
        with pytest.raises(mn.WouldBlock):
            enter(notifiers)
    run_now(notifiers.invalidate(page()))
    run_now(notifiers.register(Atomic("a")))
    assert told == ["no start_nonblock", "no start_nonblock", "no start", "no end"]


@pytest.mark.parametrize("driver", [Sleepable("s"), Deferred("d")])
async def test_who_says_nothing_about_it_would_have_to_wait(driver: Sleepable | Deferred) -> None:
    notifiers = mn.Notifiers()
    fresh = type(driver)(driver.name)
    await notifiers.register(fresh)
    with pytest.raises(mn.WouldBlock, match=type(driver).__qualname__):
        enter(notifiers)
    assert fresh.told == []


@pytest.mark.parametrize("callback", ["invalidate_range_start", "invalidate_range_end"])
async def test_half_of_a_section_is_reason_enough_to_wait(callback: str) -> None:
    """Z48: the blockability of the end counts too, since the two pair."""

    async def suspends(self: object, rng: mn.Range) -> None: ...

    notifiers = mn.Notifiers()
    await notifiers.register(type("Half", (mn.SleepableDriver,), {callback: suspends})())
    with pytest.raises(mn.WouldBlock, match="Half"):
        enter(notifiers)


async def test_an_atomic_driver_may_refuse_too() -> None:
    class Busy(Atomic):
        def invalidate_range_start(self, rng: mn.Range) -> bool:
            super().invalidate_range_start(rng)
            return rng.blockable

    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Busy("busy", told))
    await notifiers.register(Atomic("new", told))
    with pytest.raises(mn.WouldBlock, match="Busy"):
        enter(notifiers)
    assert told == ["new start", "busy start", "new end"]


async def test_what_a_blockable_start_answers_does_not_matter() -> None:
    class Chatty(Atomic):
        def invalidate_range_start(self, rng: mn.Range) -> bool:
            super().invalidate_range_start(rng)
            return False

    notifiers = mn.Notifiers()
    driver = Chatty("c")
    await notifiers.register(driver)
    async with notifiers.invalidating(page()):
        pass
    assert driver.told == ["c start", "c end"]


async def test_callbacks_see_that_the_section_is_not_blockable() -> None:
    seen: list[bool] = []

    class Looks(mn.AtomicDriver):
        def invalidate_range_start(self, rng: mn.Range) -> None:
            seen.append(rng.blockable)

        def invalidate_range_end(self, rng: mn.Range) -> None:
            seen.append(rng.blockable)

    notifiers = mn.Notifiers()
    await notifiers.register(Looks())
    with notifiers.invalidating_nonblock(page()):
        pass
    assert seen == [False, False]


async def test_the_range_of_a_section_that_was_refused_can_be_used_for_one_that_may_wait() -> None:
    """Try without suspending first, and wait if that fails: what a caller naturally does."""
    seen: list[bool] = []

    class Looks(mn.AtomicDriver):
        def invalidate_range_start(self, rng: mn.Range) -> None:
            seen.append(rng.blockable)

    notifiers = mn.Notifiers()
    await notifiers.register(Sleepable("s"))
    await notifiers.register(Looks())
    rng = page()
    with pytest.raises(mn.WouldBlock):
        enter(notifiers, rng)
    async with notifiers.invalidating(rng):
        pass
    assert seen == [False, True]


async def test_the_range_of_a_nonblock_section_can_be_used_again() -> None:
    notifiers = mn.Notifiers()
    await notifiers.register(Atomic("a"))
    rng = page()
    with notifiers.invalidating_nonblock(rng):
        assert not rng.blockable
    assert rng.blockable


async def test_a_refusal_is_logged(lines: list[Any]) -> None:
    notifiers = mn.Notifiers(name="mm[2]")
    await notifiers.register(Unable("no"))
    with pytest.raises(mn.WouldBlock):
        enter(notifiers, mn.Range(0x1000, 0x3000, mn.Event.CLEAR))
    (line,) = [line for line in lines if line["event"] == log.SECTION_REFUSED]
    found = {key: line[key] for key in ("mm", "driver", "start", "end", "reason", "log_level")}
    assert found == {
        "mm": "mm[2]",
        "driver": "Unable",
        "start": 0x1000,
        "end": 0x3000,
        "reason": "CLEAR",
        "log_level": "warning",
    }


async def test_an_interrupted_nonblock_start_ends_who_had_been_told() -> None:
    def interrupt() -> None:
        raise Stop

    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Atomic("old", told))
    await notifiers.register(Able("bad", told, start_nonblock=interrupt))
    await notifiers.register(Atomic("new", told))
    with pytest.raises(Stop):
        enter(notifiers)
    assert told == ["new start", "bad start_nonblock", "new end"]
    assert notifiers.statistics().open_sections == 0


async def test_z34_who_precedes_is_ended_when_a_driver_on_the_list_refuses() -> None:
    """Linux ends the list, but forgets the interval tree that it told before the list."""

    class Tree(Atomic):
        precedes = True

    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Tree("tree", told))
    await notifiers.register(Unable("no", told))
    with pytest.raises(mn.WouldBlock):
        enter(notifiers)
    assert told == ["tree start", "no start_nonblock", "tree end"]


async def test_the_end_is_told_also_when_the_body_raises() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Able("s", told))

    def body() -> None:
        with notifiers.invalidating_nonblock(page()):
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert told == ["s start_nonblock", "s end_nonblock"]
