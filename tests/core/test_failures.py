"""A callback that raises: the operation completes, its driver is quarantined, the others go on."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
import structlog
from structlog.testing import capture_logs

import mmunotify as mn
from mmunotify import log
from recorders import Atomic, Concurrent, Deferred, Sleepable, Stop
from steps import run_now, settle

pytestmark = pytest.mark.usefixtures("both_forms", "lines")


class Broken(Exception):
    pass


def explode() -> None:
    raise Broken("no such luck")


async def explode_later() -> None:
    await settle()
    raise Broken("no such luck")


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


def quarantined(lines: list[Any]) -> list[tuple[str, str]]:
    failed = [line for line in lines if line["event"] == log.DRIVER_FAILED]
    return [(line["driver"], line["callback"]) for line in failed]


async def three(bad: mn.AnyDriver, told: list[str]) -> tuple[mn.Notifiers[mn.RwSems], Any]:
    """A notifiers with the bad driver between an older and a newer good one."""
    notifiers = mn.Notifiers(name="mm[9]")
    await notifiers.register(Sleepable("old", told))
    sub = await notifiers.register(bad)
    await notifiers.register(Atomic("new", told))
    return notifiers, sub


# ------------------------------------------------------------------ each callback


@pytest.mark.parametrize("kind", [Atomic, Sleepable])
async def test_a_start_that_raises(kind: type[Any]) -> None:
    """The others are told start and end; the failed one is told no end, and nothing later."""
    told: list[str] = []
    notifiers, sub = await three(kind("bad", told, start=explode), told)
    async with notifiers.invalidating(page()) as section:
        assert told == ["new start", "bad start", "old start"]
    assert told[3:] == ["new end", "old end"]
    assert section.failed == (sub,)
    assert isinstance(sub.failure, Broken)
    told.clear()
    await notifiers.invalidate(page())
    await notifiers.invalidate_page(0x1000)
    assert told == [
        *("new start", "old start", "new end", "old end"),
        *("new start", "new end", "old start", "old end"),
    ]


@pytest.mark.parametrize("kind", [Atomic, Sleepable])
async def test_an_end_that_raises(kind: type[Any]) -> None:
    told: list[str] = []
    notifiers, sub = await three(kind("bad", told, end=explode), told)
    async with notifiers.invalidating(page()) as section:
        pass
    assert told[3:] == ["new end", "bad end", "old end"]
    assert section.failed == (sub,)
    assert isinstance(sub.failure, Broken)
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=2, quarantined=1, open_sections=0, srcu_readers=0
    )


async def test_a_coroutine_that_raises_after_it_has_suspended() -> None:
    for callback in ("start", "end"):
        told: list[str] = []
        notifiers, sub = await three(Sleepable("bad", told, **{callback: explode_later}), told)
        async with notifiers.invalidating(page()) as section:
            pass
        assert section.failed == (sub,)
        assert (
            told[-2:] == ["new end", "old end"] if callback == "start" else ["bad end", "old end"]
        )


async def test_an_atomic_section_in_which_a_driver_fails() -> None:
    for callback in ("start", "end"):
        notifiers = mn.Notifiers(mn.SpinLocks)
        told: list[str] = []
        await notifiers.register(Atomic("old", told))
        sub = await notifiers.register(Atomic("bad", told, **{callback: explode}))
        await notifiers.register(Atomic("new", told))
        with notifiers.invalidating_atomic(page()) as section:
            pass
        assert section.failed == (sub,)
        assert told[:3] == ["new start", "bad start", "old start"]
        assert [one for one in told if one.endswith("end")] == (
            ["new end", "old end"] if callback == "start" else ["new end", "bad end", "old end"]
        )
        told.clear()
        with notifiers.invalidating_atomic(page()) as section:
            pass
        assert told == ["new start", "old start", "new end", "old end"]


@pytest.mark.parametrize("callback", ["mark", "sync"])
async def test_a_deferred_driver_that_fails(callback: str) -> None:
    told: list[str] = []
    notifiers, sub = await three(Deferred("bad", told, **{callback: explode}), told)
    async with notifiers.invalidating(page()) as section:
        pass
    assert section.failed == (sub,)
    assert told.count("bad sync") == (callback == "sync")
    assert "old end" in told
    told.clear()
    await notifiers.invalidate(page())
    assert told == ["new start", "old start", "new end", "old end"]


@pytest.mark.parametrize("form", ["invalidate", "invalidate_page"])
@pytest.mark.parametrize("callback", ["start", "end"])
async def test_the_forms_that_do_all_at_once_name_who_failed(form: str, callback: str) -> None:
    told: list[str] = []
    notifiers, sub = await three(Sleepable("bad", told, **{callback: explode}), told)
    if form == "invalidate":
        assert await notifiers.invalidate(page()) == (sub,)
    else:
        assert await notifiers.invalidate_page(0x1000) == (sub,)
    for name in ("old", "new"):
        assert (f"{name} start" in told, f"{name} end" in told) == (True, True)


async def test_the_atomic_forms_name_who_failed_in_the_audience_that_they_return() -> None:
    for callback in ("start", "end"):
        notifiers = mn.Notifiers(mn.SpinLocks)
        first = await notifiers.register(Atomic("bad", None, **{callback: explode}))
        assert notifiers.invalidate_atomic(page()).failed == (first,)
        await notifiers.unregister(first)
        second = await notifiers.register(Atomic("bad", None, **{callback: explode}))
        assert notifiers.invalidate_page_atomic(0x1000).failed == (second,)


@pytest.mark.parametrize("which", ["clear_flush_young", "clear_young", "test_young"])
async def test_an_ageing_callback_that_raises(which: str) -> None:
    """It counts as "not accessed", and the others are still asked."""
    asked: list[str] = []

    def age(self: Atomic, *args: int) -> bool:
        asked.append(self.name)
        if self.name == "bad":
            raise Broken
        return self.name == "old"

    driver = type("Ages", (Atomic,), {which: age})
    notifiers = mn.Notifiers()
    await notifiers.register(driver("old"))
    sub = await notifiers.register(driver("bad"))
    args = (0x1000,) if which == "test_young" else (0x1000, 0x2000)
    with capture_logs() as lines:
        assert getattr(notifiers, which)(*args)
    assert asked == ["bad", "old"]
    assert isinstance(sub.failure, Broken)
    (line,) = [line for line in lines if line["event"] == log.DRIVER_FAILED]
    assert (line["callback"], line["start"]) == (which, 0x1000)
    assert getattr(notifiers, which)(*args)
    assert asked == ["bad", "old", "old"]
    assert notifiers.statistics().open_sections == 0


@pytest.mark.parametrize("when", ["start", "end"])
async def test_a_nonblock_section_in_which_a_driver_fails(when: str) -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Atomic("old", told))
    sub = await notifiers.register(Atomic("bad", told, **{when: explode}))
    await notifiers.register(Atomic("new", told))
    with notifiers.invalidating_nonblock(page()) as section:
        pass
    assert section.failed == (sub,)
    assert [one for one in told if one.endswith("end")] == (
        ["new end", "old end"] if when == "start" else ["new end", "bad end", "old end"]
    )
    assert notifiers.statistics().open_sections == 0


async def test_release_that_raises_is_logged_and_the_driver_leaves_all_the_same() -> None:
    notifiers = mn.Notifiers()
    driver = Sleepable("bad", release=explode_later)
    sub = await notifiers.register(driver)
    with capture_logs() as lines:
        await notifiers.unregister(sub)
    assert quarantined(lines) == [("Sleepable", "release")]
    assert isinstance(sub.failure, Broken)
    assert driver.told == ["bad release", "bad free"]
    assert notifiers.statistics().subscriptions == 0


async def test_release_that_raises_does_not_keep_the_exit_from_the_others() -> None:
    told: list[str] = []
    notifiers, sub = await three(Sleepable("bad", told, release=explode), told)
    await notifiers.release()
    assert told == ["new release", "bad release", "old release"]
    assert isinstance(sub.failure, Broken)


async def test_free_that_raises_is_logged_and_unregister_returns() -> None:
    notifiers = mn.Notifiers()
    sub = await notifiers.register(Atomic("bad", free=explode))
    with capture_logs() as lines:
        await notifiers.unregister(sub)
    assert quarantined(lines) == [("Atomic", "free")]
    assert isinstance(sub.failure, Broken)


async def test_free_that_is_interrupted_does_not_keep_others_waiting() -> None:
    """Two wait for one section: what one of them raises must not lose the other."""
    notifiers = mn.Notifiers()

    def interrupt() -> None:
        raise Stop

    sub = await notifiers.get(Atomic, lambda: Atomic("bad", free=interrupt))
    registered: list[str] = []

    async def register() -> None:
        await notifiers.register(Atomic("new"))
        registered.append("new")

    async with anyio.create_task_group() as tasks:
        section = notifiers.invalidating(page())
        await section.__aenter__()
        notifiers.put(sub)
        tasks.start_soon(register)
        await settle()
        with pytest.raises(Stop):
            await section.__aexit__(None, None, None)
        await settle()
        waiting = notifiers._draining or notifiers._drained
        tasks.cancel_scope.cancel()
    assert registered == ["new"]
    assert not waiting
    assert notifiers.statistics().open_sections == 0


# ------------------------------------------------------------------ what it means


async def test_the_line_in_the_log_says_who_where_and_what() -> None:
    notifiers = mn.Notifiers(name="mm[9]")
    await notifiers.register(Atomic("bad", start=explode))
    with capture_logs() as lines:
        await notifiers.invalidate(mn.Range(0x1000, 0x3000))
    (line,) = [line for line in lines if line["event"] == log.DRIVER_FAILED]
    assert line["log_level"] == "error"
    assert isinstance(line.pop("exc_info"), Broken)
    assert line.pop("seq") > 0
    assert line.pop("ts_ns") > 0
    assert line == {
        "event": "driver_failed",
        "log_level": "error",
        "mm": "mm[9]",
        "driver": "Atomic",
        "module": "recorders",
        "distribution": None,
        "callback": "invalidate_range_start",
        "error": "Broken('no such luck')",
        "start": 0x1000,
        "end": 0x3000,
    }


async def test_the_distribution_of_a_driver_that_came_with_one_is_named() -> None:
    notifiers = mn.Notifiers()
    mine = type("Mine", (Atomic,), {"__module__": "anyio.drivers"})
    await notifiers.register(mine("bad", start=explode))
    with capture_logs() as lines:
        await notifiers.invalidate(page())
    (line,) = [line for line in lines if line["event"] == log.DRIVER_FAILED]
    assert (line["module"], line["distribution"]) == ("anyio.drivers", "anyio")


async def test_who_failed_stays_to_be_released_and_unregistered() -> None:
    """Never called again but for release."""
    notifiers = mn.Notifiers()
    driver = Sleepable("bad", start=explode)
    async with notifiers.attached(driver) as sub:
        await notifiers.invalidate(page())
        assert "quarantined" in repr(sub)
        await notifiers.invalidate(page())
        assert driver.told == ["bad start"]
    assert driver.told == ["bad start", "bad release", "bad free"]
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=0, quarantined=0, open_sections=0, srcu_readers=0
    )


async def test_the_exit_releases_who_failed_too() -> None:
    told: list[str] = []
    notifiers, _ = await three(Atomic("bad", told, start=explode), told)
    await notifiers.invalidate(page())
    told.clear()
    await notifiers.release()
    assert told == ["new release", "bad release", "old release"]


async def test_the_first_failure_is_the_one_that_stands() -> None:
    """What release raises afterwards is only a consequence."""
    notifiers = mn.Notifiers()

    def again() -> None:
        raise OSError("no wonder")

    sub = await notifiers.register(Atomic("bad", start=explode, release=again))
    await notifiers.invalidate(page())
    await notifiers.unregister(sub)
    assert isinstance(sub.failure, Broken)


async def test_a_failure_counts_for_every_section_that_was_open_then() -> None:
    """Its start succeeded there, but nobody knows what it has done since."""
    told: list[str] = []
    calls = [None, explode]

    def second() -> None:
        act = calls.pop(0)
        if act is not None:
            act()

    notifiers, sub = await three(Atomic("bad", told, start=second), told)
    async with notifiers.invalidating(page(1)) as outer:
        async with notifiers.invalidating(page(2)) as inner:
            pass
        told.clear()
    assert inner.failed == outer.failed == (sub,)
    assert told == ["new end", "old end"]


async def test_a_section_of_before_the_driver_came_does_not_name_it() -> None:
    notifiers = mn.Notifiers()
    async with anyio.create_task_group() as tasks, notifiers.invalidating(page(1)) as outer:
        tasks.start_soon(notifiers.register, Atomic("bad", start=explode))
        await settle()
        await notifiers.invalidate(page(2))
    assert outer.failed == ()


@pytest.mark.parametrize("callback", ["start", "end"])
async def test_a_walk_that_is_suspended_elsewhere_does_not_call_who_failed_meanwhile(
    callback: str,
) -> None:
    """Told nothing any more: also by the sections that were on their way to it."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()

    class Ages(Sleepable):
        def test_young(self, address: int) -> bool:
            raise Broken

    sub = await notifiers.register(Ages("bad", told))
    await notifiers.register(Sleepable("slow", told, **{callback: gate.wait}))
    sections = [notifiers.invalidating(page(1))]

    async def section() -> None:
        async with sections[0]:
            pass

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(section)
        await settle()
        told.clear()
        notifiers.test_young(0x1000)
        gate.set()
    assert [one for one in told if one.startswith("bad")] == []
    assert sections[0].failed == (sub,)


@pytest.mark.parametrize("callback", ["start", "end"])
async def test_a_walk_that_is_suspended_elsewhere_does_not_call_who_was_released(
    callback: str,
) -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    gate = anyio.Event()
    sub = await notifiers.register(Sleepable("gone", told))
    await notifiers.register(Sleepable("slow", told, **{callback: gate.wait}))

    async def section() -> None:
        async with notifiers.invalidating(page(1)):
            pass

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(section)
        await settle()
        told.clear()
        tasks.start_soon(notifiers.unregister, sub)
        await settle()
        gate.set()
    assert [one for one in told if one.startswith("gone")] == ["gone release", "gone free"]


async def test_a_quarantined_driver_does_not_make_sections_atomic_or_suspend() -> None:
    """Once the only sleepable driver has failed, nobody can suspend any more."""
    notifiers = mn.Notifiers()
    await notifiers.register(Sleepable("bad", start=explode))
    await notifiers.invalidate(page())
    with notifiers.invalidating_atomic(page()):
        pass


@pytest.mark.parametrize("form", ["section", "bare pair", "atomic", "nonblock", "invalidate"])
async def test_until_it_leaves_every_section_names_who_failed_before(form: str) -> None:
    """It is told nothing any more, so it may still map the pages of any section (I-FREE)."""
    notifiers = mn.Notifiers()
    sub = await notifiers.register(Atomic("bad", start=explode))
    await notifiers.register(Atomic("good"))
    await notifiers.invalidate(page(1))

    async def failed() -> object:
        rng = page(7)
        match form:
            case "section":
                async with notifiers.invalidating(rng) as section:
                    pass
                return section.failed
            case "bare pair":
                told = await notifiers.invalidate_range_start(rng)
                return await notifiers.invalidate_range_end(rng, told)
            case "atomic":
                with notifiers.invalidating_atomic(rng) as atomic:
                    pass
                return atomic.failed
            case "nonblock":
                with notifiers.invalidating_nonblock(rng) as nonblock:
                    pass
                return nonblock.failed
            case _:
                return await notifiers.invalidate(rng)

    assert await failed() == (sub,)
    await notifiers.unregister(sub)
    assert await failed() == ()


async def test_call_sites_that_test_for_somebody_see_who_failed() -> None:
    """A section that is skipped would not be told to leak its pages."""
    notifiers = mn.Notifiers()
    sub = await notifiers.register(Atomic("bad", start=explode))
    await notifiers.invalidate(page())
    seen = [notifiers.armed]
    await notifiers.unregister(sub)
    seen.append(notifiers.armed)
    assert seen == [True, False]


async def test_a_logger_that_raises_does_not_leave_a_section_half_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A serializer that does not know exceptions is a likely one, just when a driver fails."""

    def serialize(logger: object, method: str, line: object) -> str:
        raise TypeError("not serializable")

    told: list[str] = []
    logger = structlog.wrap_logger(None, processors=[serialize])
    notifiers = mn.Notifiers(logger=logger)
    await notifiers.register(Sleepable("old", told))
    sub = await notifiers.register(Atomic("bad", told, end=explode))
    async with notifiers.invalidating(page()) as section:
        pass
    assert section.failed == (sub,)
    assert told == ["bad start", "old start", "bad end", "old end"]
    assert "not serializable" in capsys.readouterr().err


async def test_two_that_fail_in_one_section_are_both_named() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    first = await notifiers.register(Sleepable("a", told, start=explode))
    await notifiers.register(Sleepable("good", told))
    second = await notifiers.register(Atomic("b", told, end=explode))
    async with notifiers.invalidating(page()) as section:
        pass
    assert set(section.failed) == {first, second}
    assert told == ["b start", "good start", "a start", "b end", "good end"]


@pytest.mark.parametrize("callback", ["start", "end"])
async def test_concurrent_drivers_fail_alone_too(callback: str) -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Concurrent("a", told))
    sub = await notifiers.register(Concurrent("bad", told, **{callback: explode_later}))
    await notifiers.register(Sleepable("s", told))
    async with notifiers.invalidating(page()) as section:
        pass
    assert section.failed == (sub,)
    assert told.count("a end") == told.count("s end") == 1
    assert told.count("bad end") == (callback == "end")


# ------------------------------------------------------------------ what is no Exception


@pytest.mark.parametrize("kind", [Atomic, Sleepable])
async def test_an_interrupted_end_quarantines_one_tells_the_rest_and_goes_on(
    kind: type[Any],
) -> None:
    told: list[str] = []

    def interrupt() -> None:
        raise Stop

    notifiers, sub = await three(kind("bad", told, end=interrupt), told)
    section = notifiers.invalidating(page())
    await section.__aenter__()
    with pytest.raises(Stop):
        await section.__aexit__(None, None, None)
    assert told[3:] == ["new end", "bad end", "old end"]
    assert isinstance(sub.failure, Stop)
    assert section.failed == (sub,)
    assert notifiers.statistics().open_sections == 0


async def test_an_interrupted_sync_quarantines_one_and_tells_the_rest() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []

    def interrupt() -> None:
        raise Stop

    await notifiers.register(Deferred("old", told))
    sub = await notifiers.register(Deferred("bad", told, sync=interrupt))
    section = notifiers.invalidating(page())
    await section.__aenter__()
    with pytest.raises(Stop):
        await section.__aexit__(None, None, None)
    assert told[2:] == ["bad sync", "old sync"]
    assert section.failed == (sub,)


async def test_an_interrupted_release_is_raised_when_everything_is_done() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []

    def interrupt() -> None:
        raise Stop

    await notifiers.register(Atomic("old", told))
    sub = await notifiers.register(Sleepable("bad", told, release=interrupt))
    with pytest.raises(Stop):
        await notifiers.unregister(sub)
    assert notifiers.statistics().subscriptions == 1
    sub = await notifiers.register(Sleepable("worse", told, release=interrupt))
    with pytest.raises(Stop):
        await notifiers.release()
    assert told[-2:] == ["worse release", "old release"]
    assert notifiers.statistics().subscriptions == 0


async def test_an_interrupted_ageing_walk_is_over() -> None:
    class Ages(mn.AtomicDriver):
        def test_young(self, address: int) -> bool:
            raise Stop

    notifiers = mn.Notifiers()
    await notifiers.register(Ages())
    with pytest.raises(Stop):
        notifiers.test_young(0x1000)
    assert notifiers.statistics().open_sections == 0
    run_now(notifiers.register(Atomic("a")))


async def test_an_interrupted_concurrent_start_raises_what_interrupted_it() -> None:
    """Not a group of one: `except KeyboardInterrupt` has to see it."""
    notifiers = mn.Notifiers()
    told: list[str] = []

    async def interrupt() -> None:
        await settle()
        raise Stop

    await notifiers.register(Concurrent("a", told))
    await notifiers.register(Concurrent("bad", told, start=interrupt))
    with pytest.raises(Stop):
        await notifiers.invalidating(page()).__aenter__()
    assert "a end" in told
    assert "bad end" not in told
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=2, quarantined=0, open_sections=0, srcu_readers=0
    )
