"""Sections: who is told what, in which order, by each of the forms that open one."""

from __future__ import annotations

import anyio
import pytest
from structlog.testing import capture_logs

import mmunotify as mn
from mmunotify.errors import ScheduleWhileAtomic
from recorders import Atomic, Deferred, Sleepable, Stop
from steps import run_now, settle

pytestmark = pytest.mark.usefixtures("both_forms", "lines")


def page(number: int = 1) -> mn.Range:
    return mn.Range(number << 12, number + 1 << 12)


async def with_all_three() -> tuple[mn.Notifiers[mn.RwSems], list[str]]:
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Atomic("a", told))
    await notifiers.register(Sleepable("s", told))
    await notifiers.register(Deferred("d", told))
    return notifiers, told


ALL_STARTS = ["d mark", "s start", "a start"]
ALL_ENDS = ["s end", "a end"]


# ------------------------------------------------------------------ what is called


async def test_only_what_a_driver_overrides_is_called() -> None:
    """The defaults are not merely harmless: they are not on the list."""
    calls: list[str] = []

    class Ends(mn.SleepableDriver):
        async def invalidate_range_end(self, rng: mn.Range) -> None:
            calls.append("end")

    class Nothing(mn.SleepableDriver):
        async def release(self) -> None:
            calls.append("release")

    notifiers = mn.Notifiers()
    ends = await notifiers.register(Ends())
    await notifiers.register(Nothing())
    listed = [call.subscription for call in notifiers._audience.end_calls]
    assert [sub for sub in listed if sub.owner is notifiers] == [ends]
    async with notifiers.invalidating(page()):
        assert calls == []
    assert calls == ["end"]


async def test_who_can_only_be_released_may_be_there_in_an_atomic_section() -> None:
    class Nothing(mn.SleepableDriver):
        async def release(self) -> None:
            pass

    notifiers = mn.Notifiers()
    await notifiers.register(Nothing())
    with notifiers.invalidating_atomic(page()):
        pass
    notifiers.invalidate_page_atomic(0x1000)


async def test_every_driver_gets_the_range_that_the_section_was_opened_with() -> None:
    seen: list[mn.Range] = []

    class Keeper(mn.AtomicDriver):
        def invalidate_range_start(self, rng: mn.Range) -> None:
            seen.append(rng)

        def invalidate_range_end(self, rng: mn.Range) -> None:
            seen.append(rng)

    notifiers = mn.Notifiers()
    await notifiers.register(Keeper())
    everything = mn.Range(0, mn.ULONG_MAX, mn.Event.SOFT_DIRTY)
    async with notifiers.invalidating(everything) as section:
        assert section.rng is everything
        assert everything.blockable
    assert [rng is everything for rng in seen] == [True, True]


# ------------------------------------------------------------------ the forms


async def test_starts_before_the_body_and_ends_after_it_in_the_same_order() -> None:
    """The ends are not reversed, as in Linux; syncs come after all ends."""
    notifiers, told = await with_all_three()
    async with notifiers.invalidating(page()) as section:
        assert told == ALL_STARTS
        told.clear()
    assert told == [*ALL_ENDS, "d sync"]
    assert section.failed == ()


async def test_the_end_is_told_also_when_the_body_raises() -> None:
    notifiers, told = await with_all_three()
    with pytest.raises(KeyError):
        async with notifiers.invalidating(page()):
            raise KeyError("body")
    assert told == [*ALL_STARTS, *ALL_ENDS, "d sync"]
    assert notifiers.statistics().open_sections == 0


async def test_an_atomic_section_ends_also_when_the_body_raises() -> None:
    notifiers = mn.Notifiers(mn.SpinLocks)
    told: list[str] = []
    await notifiers.register(Atomic("a", told))

    def body() -> None:
        with notifiers.invalidating_atomic(page()):
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert told == ["a start", "a end"]
    assert notifiers.statistics().open_sections == 0


async def test_the_bare_pair() -> None:
    notifiers, told = await with_all_three()
    rng = page()
    audience = await notifiers.invalidate_range_start(rng)
    assert told == ALL_STARTS
    assert notifiers.statistics().open_sections == 1
    told.clear()
    assert await notifiers.invalidate_range_end(rng, audience) == ()
    assert told == ALL_ENDS
    assert notifiers.statistics().open_sections == 0
    assert await notifiers.invalidate_range_sync(rng, audience) == ()
    assert told == [*ALL_ENDS, "d sync"]


async def test_invalidate_is_start_end_and_sync_at_once() -> None:
    notifiers, told = await with_all_three()
    assert await notifiers.invalidate(page()) == ()
    assert told == [*ALL_STARTS, *ALL_ENDS, "d sync"]
    assert notifiers.statistics().open_sections == 0


async def test_invalidate_atomic_is_start_and_end_and_says_who_owes_a_sync() -> None:
    notifiers = mn.Notifiers(mn.SpinLocks)
    told: list[str] = []
    await notifiers.register(Atomic("a", told))
    assert not notifiers.invalidate_atomic(page()).sync_calls
    await notifiers.register(Deferred("d", told))
    told.clear()
    audience = notifiers.invalidate_atomic(page())
    assert audience.sync_calls
    assert told == ["d mark", "a start", "a end"]
    await notifiers.invalidate_range_sync(page(), audience)
    assert told[3:] == ["d sync"]


async def test_an_atomic_section_is_refused_while_somebody_may_suspend() -> None:
    """I-CTX: nobody is told anything, and the message names who."""
    notifiers, told = await with_all_three()
    with pytest.raises(ScheduleWhileAtomic, match=r"0x1000, 0x2000.*found Sleepable$"):
        notifiers.invalidating_atomic(page()).__enter__()
    with pytest.raises(ScheduleWhileAtomic):
        notifiers.invalidate_atomic(page())
    with pytest.raises(ScheduleWhileAtomic):
        notifiers.invalidate_page_atomic(0x1000)
    assert told == []
    assert notifiers.statistics().open_sections == 0


async def test_sections_nest_and_overlap_and_each_is_ended_once() -> None:
    notifiers, told = await with_all_three()
    async with notifiers.invalidating(page(1)), notifiers.invalidating(page(1)):
        assert notifiers.statistics().open_sections == 2
    first, second = notifiers.invalidating(page(2)), notifiers.invalidating(page(2))
    await first.__aenter__()
    await second.__aenter__()
    await first.__aexit__(None, None, None)
    await second.__aexit__(None, None, None)
    for callback in (*ALL_STARTS, *ALL_ENDS, "d sync"):
        assert told.count(callback) == 4


async def test_a_section_begun_without_sleepable_drivers_ends_beside_one() -> None:
    """Begun in one step under a spinlock, it ends so, whoever has registered meanwhile."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Atomic("a", told))
    async with anyio.create_task_group() as tasks:
        with notifiers.invalidating_atomic(page()):
            tasks.start_soon(notifiers.register, Sleepable("s", told))
            await settle()
    assert told == ["a start", "a end"]


async def test_no_section_is_needed_while_nobody_is_registered() -> None:
    notifiers = mn.Notifiers()
    seen = [notifiers.armed]
    async with notifiers.attached(Atomic("a")):
        seen.append(notifiers.armed)
    seen.append(notifiers.armed)
    assert seen == [False, True, False]


async def test_what_began_with_coroutines_cannot_end_in_one_step() -> None:
    """The wrong end is refused, and the section can still be ended the right way."""
    notifiers, told = await with_all_three()
    rng = page()
    audience = await notifiers.invalidate_range_start(rng)
    told.clear()
    with pytest.raises(ScheduleWhileAtomic):
        notifiers.invalidate_range_end_atomic(rng, audience)
    assert told == []
    await notifiers.invalidate_range_end(rng, audience)
    assert told == ALL_ENDS
    assert notifiers.statistics().open_sections == 0


# ------------------------------------------------------------------ single pages


async def test_a_single_page_is_told_newest_first_and_synced() -> None:
    told: list[str] = []

    class Pages(Atomic):
        def invalidate_page(self, address: int) -> None:
            told.append(f"{self.name} page {address:#x}")

    notifiers = mn.Notifiers()
    await notifiers.register(Pages("p", told))
    await notifiers.register(Atomic("a", told))
    await notifiers.register(Sleepable("s", told))
    await notifiers.register(Deferred("d", told))
    assert await notifiers.invalidate_page(0x1234) == ()
    assert told == [
        *("d mark", "s start", "s end", "a start", "a end"),
        *("p page 0x1234", "d sync"),
    ]
    assert notifiers.statistics().open_sections == 0


async def test_a_single_page_under_the_page_table_lock() -> None:
    told: list[str] = []
    synced: list[tuple[int, int]] = []

    class Syncs(Deferred):
        async def invalidate_range_sync(self, rng: mn.Range) -> None:
            synced.append((rng.start, rng.end))

    notifiers = mn.Notifiers(mn.SpinLocks)
    await notifiers.register(Atomic("a", told))
    await notifiers.register(Syncs("d", told))
    audience = notifiers.invalidate_page_atomic(0x1234)
    assert told == ["d mark", "a start", "a end"]
    await notifiers.invalidate_range_sync(page(), audience)
    await notifiers.invalidate_page(0x1FFF)
    assert synced == [(0x1000, 0x2000)] * 2


async def test_a_driver_with_nothing_but_the_page_form_hears_of_pages_alone() -> None:
    seen: list[int] = []

    class Pages(mn.SleepableDriver):
        async def invalidate_page(self, address: int) -> None:
            seen.append(address)

    notifiers = mn.Notifiers()
    await notifiers.register(Pages())
    await notifiers.invalidate(page())
    assert seen == []
    await notifiers.invalidate_page(0x1234)
    assert seen == [0x1234]


# ------------------------------------------------------------------ never suspending for nothing


async def test_uncontended_calls_never_suspend() -> None:
    """No checkpoint anywhere, with all three kinds of driver there."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    subs: list[mn.Subscription[mn.AnyDriver]] = [
        run_now(notifiers.register(Atomic("a", told))),
        run_now(notifiers.register(Sleepable("s", told))),
        run_now(notifiers.register(Deferred("d", told))),
    ]
    shared = run_now(notifiers.get(Sleepable, lambda: Sleepable("g", told)))
    told.clear()

    async def section() -> None:
        async with notifiers.invalidating(page()):
            pass

    run_now(section())
    run_now(notifiers.invalidate(page()))
    run_now(notifiers.invalidate_page(0x1000))
    audience = run_now(notifiers.invalidate_range_start(page()))
    run_now(notifiers.invalidate_range_end(page(), audience))
    run_now(notifiers.invalidate_range_sync(page(), audience))
    assert told.count("s start") == told.count("s end") == told.count("d sync") == 4
    notifiers.put(shared)
    for sub in subs:
        run_now(notifiers.unregister(sub))
    run_now(notifiers.release())


async def test_uncontended_calls_make_nothing_of_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not an event, nor a task group; a cancel scope only around ends that are coroutines."""
    made: list[str] = []

    def forbid(name: str) -> None:
        original = getattr(anyio, name)

        def noting(*args: object, **kwargs: object) -> object:
            made.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(anyio, name, noting)

    for name in ("Event", "create_task_group"):
        forbid(name)
    notifiers = mn.Notifiers()
    async with notifiers.attached(Atomic("a")), notifiers.attached(Sleepable("s")):
        await notifiers.invalidate(page())
        async with notifiers.invalidating(page()):
            pass
    await notifiers.release()
    assert made == []


# ------------------------------------------------------------------ interrupted starts


@pytest.mark.parametrize("interrupted", ["a", "b"])
async def test_an_interrupted_start_ends_who_had_been_told(interrupted: str) -> None:
    """What is no Exception goes on; the section never was, and its pages stay."""
    notifiers = mn.Notifiers()
    told: list[str] = []

    def interrupt() -> None:
        raise Stop

    for name in ("a", "b"):
        acts = {"start": interrupt} if name == interrupted else {}
        await notifiers.register(Atomic(name, told, **acts))
    with pytest.raises(Stop):
        await notifiers.invalidating(page()).__aenter__()
    assert told == {"a": ["b start", "a start", "b end"], "b": ["b start"]}[interrupted]
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=2, quarantined=0, open_sections=0, srcu_readers=0
    )


async def test_an_interrupted_start_ends_sleepable_drivers_too_and_syncs_marks() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []

    async def interrupt() -> None:
        raise Stop

    await notifiers.register(Sleepable("old", told))
    await notifiers.register(Sleepable("bad", told, start=interrupt))
    await notifiers.register(Atomic("a", told))
    await notifiers.register(Sleepable("s", told))
    await notifiers.register(Deferred("d", told))
    with pytest.raises(Stop):
        await notifiers.invalidating(page()).__aenter__()
    assert told == ["d mark", "s start", "a start", "bad start", "s end", "a end", "d sync"]
    assert notifiers.statistics() == mn.NotifiersStatistics(
        subscriptions=5, quarantined=0, open_sections=0, srcu_readers=0
    )


@pytest.mark.parametrize("bad", ["start", "end"])
@pytest.mark.parametrize("form", ["invalidate", "invalidate_atomic"])
async def test_what_cannot_be_undone_is_told_to_all_whatever_interrupts(
    form: str, bad: str
) -> None:
    """The ptes are gone already: one driver's interruption must not keep the news from others."""

    def interrupt() -> None:
        raise Stop

    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(Atomic("a", told))
    failed = await notifiers.register(Atomic("b", told, **{bad: interrupt}))
    with pytest.raises(Stop):  # noqa: PT012
        if form == "invalidate":
            await notifiers.invalidate(page())
        else:
            notifiers.invalidate_atomic(page())
    assert [one for one in told if one.startswith("a")] == ["a start", "a end"]
    assert isinstance(failed.failure, Stop)
    assert notifiers.statistics().open_sections == 0


async def test_an_interval_that_is_interrupted_there_is_counted_off_once() -> None:
    """What cannot be undone goes on to the end: the tree may not count the section off before."""

    class Interrupted(mn.AtomicInterval):
        def invalidate(self, rng: mn.Range, seq: int) -> bool:
            raise Stop

    notifiers = mn.Notifiers()
    interval = Interrupted()
    await interval.insert(notifiers, 0x1000, 0x1000)
    rng = page()
    with pytest.raises(Stop):
        notifiers.invalidate_atomic(rng)
    assert interval.statistics().active_invalidate_ranges == 0
    assert rng.cancellable


async def test_a_section_says_where_it_is_and_who_failed() -> None:
    def explode() -> None:
        raise OSError

    notifiers = mn.Notifiers(name="mm[3]")
    await notifiers.register(Atomic("a", start=explode))
    section = notifiers.invalidating(page())
    where = f"Section at mm[3] over {page()!r}"
    assert repr(section) == f"<{where}>"
    with capture_logs():
        async with section:
            pass
    assert repr(section) == f"<{where}: failed Atomic>"
    assert repr(notifiers.invalidating_atomic(page())) == f"<Atomic{where}>"
