"""Interval notifiers: who is told, sequence numbers, deferred inserts and removes, and the exit."""

from __future__ import annotations

import asyncio
import inspect
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio
import attrs
import pytest
import structlog

import mmunotify as mn
from mmunotify import ADDRESS_END, ULONG_MAX, Event
from mmunotify.errors import (
    AddressSpaceExited,
    AlreadyRegistered,
    BrokenInvalidate,
    CalledFromCallback,
    LockNotHeld,
    LockRecursion,
    NotRegistered,
    RangeError,
    ScheduleWhileAtomic,
    WouldBlock,
    WrongColour,
)
from mmunotify.locks import lockdep
from recorders import Atomic as AtomicDriver
from recorders import Sleepable as SleepableDriver
from recorders import Stop
from steps import run_now, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping

pytestmark = pytest.mark.usefixtures("both_forms")


class Recorder:
    """An interval that writes down what it is told; `act` is what else its callback does."""

    def __init__(
        self,
        name: str = "i",
        told: list[str] | None = None,
        act: Callable[[], object] | None = None,
    ) -> None:
        self.name = name
        self.told: list[str] = [] if told is None else told
        self.act = act
        self.ranges: list[mn.Range] = []
        self.running = 0
        self.lock = mn.SpinLock(f"user lock[{name}]")

    def tell(self, rng: mn.Range) -> Any:
        self.told.append(self.name)
        self.ranges.append(rng)
        return self.act() if self.act is not None else None


class Atomic(Recorder, mn.AtomicInterval):
    def invalidate(self, rng: mn.Range, seq: int) -> bool:
        answer = self.tell(rng)
        with self.lock:
            self.set_seq(seq)
        return answer is not False


class Sleepable(Recorder, mn.SleepableInterval):
    async def invalidate(self, rng: mn.Range, seq: int) -> bool:
        self.running += 1
        try:
            answer = self.tell(rng)
            if inspect.isawaitable(answer):
                answer = await answer
        finally:
            self.running -= 1
        with self.lock:
            self.set_seq(seq)
        return answer is not False


class SleepableNonblock(Sleepable):
    def invalidate_nonblock(self, rng: mn.Range, seq: int) -> bool:
        answer = self.tell(rng)
        if answer is False:
            return False
        with self.lock:
            self.set_seq(seq)
        return True


Recording: TypeAlias = Atomic | Sleepable


@pytest.fixture(params=[Atomic, Sleepable], ids=["atomic", "sleepable"])
def colour(request: pytest.FixtureRequest) -> type[Recording]:
    found: type[Recording] = request.param
    return found


def page(number: int, count: int = 1, event: Event = Event.UNMAP) -> mn.Range:
    return mn.Range(number << 12, number + count << 12, event)


async def insert(
    notifiers: mn.Notifiers[mn.RwSems], interval: Recording, number: int, count: int = 1
) -> None:
    await interval.insert(notifiers, number << 12, count << 12)


async def inserted(
    notifiers: mn.Notifiers[mn.RwSems], colour: type[Recording], number: int = 1, count: int = 1
) -> Recording:
    interval = colour()
    await insert(notifiers, interval, number, count)
    return interval


async def begin(
    notifiers: mn.Notifiers[Any], rng: mn.Range
) -> Callable[[], Awaitable[tuple[object, ...]]]:
    """Open a section in another task; what ends it, and gives who failed."""
    opened: list[mn.Audience] = []

    async def start() -> None:
        opened.append(await notifiers.invalidate_range_start(rng))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(start)
    return lambda: notifiers.invalidate_range_end(rng, opened[0])


def retry(interval: Recording, seq: int) -> bool:
    with interval.lock:
        return interval.read_retry(seq)


@asynccontextmanager
async def waiting(call: Callable[[], Coroutine[Any, Any, object]]) -> AsyncIterator[list[object]]:
    """The call is made by another task and does not return while the body begins.

    It must have returned, within the body's own steps, when the body is left.
    """
    results: list[object] = []

    async def run() -> None:
        results.append(await call())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await settle()
        assert results == []
        yield results
        await settle()
        assert len(results) == 1
        tasks.cancel_scope.cancel()


# ------------------------------------------------------------------ who is told


async def test_only_those_that_overlap_are_told(colour: type[Recording]) -> None:
    """Half-open on both sides, in bytes: an interval need not begin at a page."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    a, b = colour("a", told), colour("b", told)
    await a.insert(notifiers, 0x1800, 0x800)
    await b.insert(notifiers, 0x2000, 1)
    assert (a.start, a.end, b.start, b.end) == (0x1800, 0x2000, 0x2000, 0x2001)
    for start, end, expected in (
        (0x1000, 0x1800, []),
        (0x1000, 0x1801, ["a"]),
        (0x1FFF, 0x2000, ["a"]),
        (0x1FFF, 0x2001, ["a", "b"]),
        (0x2000, 0x3000, ["b"]),
        (0x2001, 0x3000, []),
        (0, ADDRESS_END, ["a", "b"]),
    ):
        told.clear()
        rng = mn.Range(start, end, Event.CLEAR)
        await notifiers.invalidate(rng)
        assert told == expected
        assert all(interval.ranges[-1] is rng for interval in (a, b) if interval.name in told)


async def test_intervals_are_told_before_every_driver_whoever_came_first(
    colour: type[Recording],
) -> None:
    """Linux calls the interval tree first, for starts and for ends."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    await notifiers.register(AtomicDriver("before", told))
    await insert(notifiers, colour("i", told), 1)
    await notifiers.register(SleepableDriver("after", told))
    await notifiers.invalidate(page(1))
    assert told[:3] == ["i", "after start", "before start"]


async def test_many_intervals_are_told_in_the_order_of_their_addresses(
    colour: type[Recording],
) -> None:
    """Also when there are too many of them for a scan."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    intervals = [colour(str(number), told) for number in range(300)]
    for number, interval in reversed(list(enumerate(intervals))):
        await insert(notifiers, interval, number)
    await notifiers.invalidate(page(98, 6))
    assert told == ["98", "99", "100", "101", "102", "103"]
    for interval in intervals[::2]:
        await interval.remove()
    told.clear()
    await notifiers.invalidate(page(98, 6))
    assert told == ["99", "101", "103"]


async def test_nothing_is_told_before_the_insert_or_after_the_remove(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour)
    await interval.remove()
    await notifiers.invalidate(page(1))
    assert interval.told == []


async def test_a_single_page_is_told_too(colour: type[Recording]) -> None:
    """2008's form; no page table lock is held for the sleepable colour."""
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour)
    await notifiers.invalidate_page(0x1234)
    await notifiers.invalidate_page(0x2234)
    assert [(rng.start, rng.end) for rng in interval.ranges] == [(0x1000, 0x2000)]
    assert interval.statistics().active_invalidate_ranges == 0


async def test_atomic_intervals_are_told_in_atomic_sections() -> None:
    notifiers = mn.Notifiers(mn.SpinLocks)
    interval = Atomic()
    await interval.insert(notifiers, 0x1000, 0x1000)
    with notifiers.invalidating_atomic(page(1)):
        assert interval.told == ["i"]


async def test_atomic_sections_refuse_sleepable_intervals() -> None:
    notifiers = mn.Notifiers()
    await inserted(notifiers, Sleepable)
    with pytest.raises(ScheduleWhileAtomic, match="SleepableIntervals"):
        notifiers.invalidate_range_start_atomic(page(1))


# ------------------------------------------------------------------ coming and going


@pytest.mark.parametrize(
    ("start", "length"),
    [(0x1000, 0), (0x1000, -1), (-1, 2), (ULONG_MAX, 2), (ADDRESS_END, 1), (1, ADDRESS_END)],
)
async def test_insert_rejects_what_is_no_range(
    colour: type[Recording], start: int, length: int
) -> None:
    """-EOVERFLOW."""
    notifiers = mn.Notifiers()
    interval = colour()
    with pytest.raises(RangeError, match=f"{length:#x} bytes at {start:#x}"):
        await interval.insert(notifiers, start, length)
    assert notifiers.statistics().subscriptions == 0


async def test_the_last_byte_and_the_whole_address_space_are_legal(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    last, everything = colour(), colour()
    await last.insert(notifiers, ULONG_MAX, 1)
    await everything.insert(notifiers, 0, ADDRESS_END)
    await notifiers.invalidate(mn.Range(ULONG_MAX, ADDRESS_END))
    assert (len(last.told), len(everything.told)) == (1, 1)


async def test_an_interval_is_inserted_once_and_removed_once(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    interval = colour()
    for call in (interval.remove, interval.read_begin):
        with pytest.raises(NotRegistered):
            await call()
    with pytest.raises(NotRegistered):
        interval.statistics()
    await insert(notifiers, interval, 1)
    with pytest.raises(AlreadyRegistered):
        await insert(mn.Notifiers(), interval, 2)
    await interval.remove()
    with pytest.raises(NotRegistered):
        await interval.remove()
    await insert(notifiers, interval, 3)
    await notifiers.invalidate(page(1, 3))
    assert interval.ranges[0].overlaps(interval.start, interval.end)


async def test_intervals_may_be_equal_to_each_other() -> None:
    """A value class is as good as any: which one it is goes by identity."""

    @attrs.define
    class Value(mn.AtomicInterval):
        name: str
        calls: int = 0

        def invalidate(self, rng: mn.Range, seq: int) -> bool:
            self.set_seq(seq)
            self.calls += 1
            return True

    notifiers = mn.Notifiers()
    one, other = Value("a"), Value("a")
    assert one == other
    for interval in (one, other):
        await interval.insert(notifiers, 0x1000, 0x1000)
    end = await begin(notifiers, page(1))
    async with waiting(one.remove):
        await end()
    await notifiers.invalidate(page(1))
    assert (one.calls, other.calls) == (1, 2)


async def test_an_insert_or_remove_that_waits_is_not_met_by_another(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    interval = colour()
    end = await begin(notifiers, page(1))
    async with waiting(lambda: insert(notifiers, interval, 1)):
        with pytest.raises(AlreadyRegistered):
            await insert(notifiers, interval, 1)
        with pytest.raises(NotRegistered):
            await interval.remove()
        await end()
    end = await begin(notifiers, page(1))
    async with waiting(interval.remove):
        with pytest.raises(AlreadyRegistered):
            await insert(notifiers, interval, 1)
        with pytest.raises(NotRegistered):
            await interval.remove()
        await end()


async def test_the_tree_is_got_by_the_first_interval_and_put_by_the_last(
    colour: type[Recording],
) -> None:
    """Nothing of it is left: the address space is as if there never had been an interval."""
    notifiers = mn.Notifiers()
    for _ in range(2):
        first, second = [await inserted(notifiers, colour) for _ in range(2)]
        assert (notifiers.armed, notifiers.statistics().subscriptions) == (True, 1)
        await first.remove()
        assert notifiers.armed
        await second.remove()
        assert (notifiers.armed, notifiers.statistics().subscriptions) == (False, 0)


async def test_only_the_first_insert_quiesces(colour: type[Recording]) -> None:
    """mm_take_all_locks is for the tree; `insert_locked` is for who holds the locks already."""
    quiesced = 0

    @asynccontextmanager
    async def quiesce() -> AsyncIterator[None]:
        nonlocal quiesced
        quiesced += 1
        yield

    notifiers = mn.Notifiers(quiesce=quiesce)
    first = await inserted(notifiers, colour)
    second = await inserted(notifiers, colour)
    assert quiesced == 1
    await first.remove()
    await second.remove()
    async with quiesce():
        await first.insert_locked(notifiers, 0x1000, 0x1000)
    assert quiesced == 2
    await notifiers.invalidate(page(1))
    assert first.told == ["i"]


async def test_the_first_insert_waits_for_open_sections_and_later_ones_do_not(
    colour: type[Recording],
) -> None:
    """I-REG: the tree counts sections, so it may know none by its end alone."""
    notifiers = mn.Notifiers()
    end = await begin(notifiers, page(1))
    interval = colour()
    async with waiting(lambda: insert(notifiers, interval, 1)):
        await end()
    assert interval.statistics().active_invalidate_ranges == 0
    end = await begin(notifiers, page(7))
    later = colour()
    run_now(insert(notifiers, later, 1))
    await end()
    assert interval.told == later.told == []


async def test_an_insert_that_meets_the_first_one_waits_with_it(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    end = await begin(notifiers, page(1))
    first, second = colour(), colour()
    async with (
        waiting(lambda: insert(notifiers, first, 1)),
        waiting(lambda: insert(notifiers, second, 1)),
    ):
        await end()
    await first.remove()
    await notifiers.invalidate(page(1))
    assert second.told == ["i"]


async def test_a_cancelled_insert_leaves_nothing(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    interval = colour()
    end = await begin(notifiers, page(1))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(insert, notifiers, interval, 1)
        await settle()
        tasks.cancel_scope.cancel()
    assert notifiers.statistics().subscriptions == 0
    await end()
    await notifiers.invalidate(page(1))
    assert interval.told == []
    await insert(notifiers, interval, 1)


async def test_atomic_intervals_are_for_both_locking_models_sleepable_ones_for_rwsems() -> None:
    await Atomic().insert(mn.Notifiers(mn.SpinLocks), 0, 1)
    await Atomic().insert(mn.Notifiers(mn.RwSems), 0, 1)
    with pytest.raises(WrongColour, match="SpinLocks"):
        await Sleepable().insert(mn.Notifiers(mn.SpinLocks), 0, 1)  # type: ignore[arg-type]


def test_a_callback_of_the_wrong_colour_is_refused_where_it_is_written() -> None:
    with pytest.raises(WrongColour, match=r"Waits\.invalidate: expected a plain function"):

        class Waits(mn.AtomicInterval):
            async def invalidate(  # type: ignore[override]
                self, rng: mn.Range, seq: int
            ) -> bool:
                return True

    with pytest.raises(WrongColour, match=r"Plain\.invalidate: expected a coroutine function"):

        class Plain(mn.SleepableInterval):
            def invalidate(  # type: ignore[override]
                self, rng: mn.Range, seq: int
            ) -> bool:
                return True

    with pytest.raises(WrongColour, match="invalidate_nonblock: expected a plain function"):

        class WaitsAnyway(Sleepable):
            async def invalidate_nonblock(  # type: ignore[override]
                self, rng: mn.Range, seq: int
            ) -> bool:
                return True


# ------------------------------------------------------------------ sequence numbers


async def test_what_was_looked_up_before_a_section_must_be_looked_up_again(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour)
    before = await interval.read_begin()
    assert not retry(interval, before)
    assert not interval.check_retry(before)
    end = await begin(notifiers, page(1))
    assert retry(interval, before)
    assert interval.check_retry(before)
    await end()
    assert retry(interval, before)
    after = await interval.read_begin()
    assert not retry(interval, after)


async def test_sections_elsewhere_make_nobody_wait_or_retry(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour, 1)
    other = await inserted(notifiers, colour, 5)
    before = run_now(interval.read_begin())
    end = await begin(notifiers, page(2))
    end_other = await begin(notifiers, page(5))
    assert run_now(interval.read_begin()) == before
    await end_other()
    await end()
    assert not retry(interval, before)
    assert other.told == ["i"]


async def test_read_begin_waits_until_no_section_is_open(colour: type[Recording]) -> None:
    """The number is one for all: also for a section elsewhere that began meanwhile."""
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour)
    for _ in range(2):
        end = await begin(notifiers, page(1))
        end_elsewhere = await begin(notifiers, page(9))
        async with waiting(interval.read_begin) as results:
            await end()
            await settle()
            assert results == []
            await end_elsewhere()
        assert not retry(interval, run_now(interval.read_begin()))


async def test_read_begin_waits_once(colour: type[Recording]) -> None:
    """Then it returns although the next section is open already: read_retry will say so."""
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour)
    end = await begin(notifiers, page(1))
    async with waiting(interval.read_begin) as results:
        await end()
        end = await begin(notifiers, page(1))
    (seq,) = results
    assert isinstance(seq, int)
    assert retry(interval, seq)
    await end()


async def test_all_who_wait_are_woken_together(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour)
    end = await begin(notifiers, page(1))
    async with waiting(interval.read_begin), waiting(interval.read_begin):
        await end()


async def test_a_cancelled_read_begin_leaves_no_trace(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour)
    end = await begin(notifiers, page(1))
    async with waiting(interval.read_begin):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(interval.read_begin)
            await settle()
            tasks.cancel_scope.cancel()
        await end()
    run_now(interval.remove())


async def test_the_two_colours_have_numbers_of_their_own() -> None:
    notifiers = mn.Notifiers()
    atomic = await inserted(notifiers, Atomic, 1)
    sleepable = await inserted(notifiers, Sleepable, 2)
    end = await begin(notifiers, page(1))
    run_now(sleepable.remove())
    async with waiting(atomic.remove):
        await end()


async def test_lockdep_sees_who_compares_or_sets_without_the_lock(
    colour: type[Recording],
) -> None:
    """The sequence test outside the lock (Z44), and set_seq outside it."""
    with lockdep.checking():
        notifiers = mn.Notifiers()
        interval = await inserted(notifiers, colour)
        seq = await interval.read_begin()
        with pytest.raises(LockNotHeld, match="user lock"):
            interval.read_retry(seq)
        with pytest.raises(LockNotHeld, match="user lock"):
            interval.set_seq(seq)
        assert not interval.check_retry(seq)
        # A lock that is not ours is the owner's affair, and it may be wrong about that.
        interval.lock = threading.Lock()  # type: ignore[assignment]
        assert not interval.read_retry(seq)


async def test_lockdep_sees_who_waits_with_a_spinlock_held(colour: type[Recording]) -> None:
    with lockdep.checking():
        notifiers = mn.Notifiers()
        interval = await inserted(notifiers, colour)
        end = await begin(notifiers, page(1))
        for call in (interval.read_begin, interval.remove):
            with interval.lock, pytest.raises(ScheduleWhileAtomic, match="user lock"):
                await call()
        await end()


async def test_lockdep_sees_who_would_wait_for_a_section_of_its_own(
    colour: type[Recording],
) -> None:
    with lockdep.checking():
        notifiers = mn.Notifiers()
        interval = await inserted(notifiers, colour)
        async with notifiers.invalidating(page(1)):
            for call in (interval.read_begin, interval.remove):
                with pytest.raises(LockRecursion):
                    await call()
        await interval.remove()


# ------------------------------------------------------------------ deferred inserts and removes


async def test_an_insert_during_an_invalidation_is_deferred(colour: type[Recording]) -> None:
    """Told of no section before the last one that is open has ended (M17), and of all after."""
    notifiers = mn.Notifiers()
    await inserted(notifiers, colour, 1)
    end = await begin(notifiers, page(1))
    late = colour()
    run_now(insert(notifiers, late, 1))
    assert late.statistics().deferred
    end_second = await begin(notifiers, page(1))
    assert late.told == []
    await end()
    await notifiers.invalidate(page(1))
    assert late.told == []
    async with waiting(late.read_begin):
        await end_second()
    assert not late.statistics().deferred
    await notifiers.invalidate(page(1))
    assert late.told == ["i"]


async def test_an_insert_during_a_section_elsewhere_is_told_of_the_next_at_once(
    colour: type[Recording],
) -> None:
    """Nobody knows where the open section is, so the new interval counts as inside it."""
    notifiers = mn.Notifiers()
    other = await inserted(notifiers, colour, 1)
    end = await begin(notifiers, page(7))
    late = colour()
    run_now(insert(notifiers, late, 3))
    assert not late.statistics().deferred
    assert late.statistics().invalidate_seq % 2 == 1
    await notifiers.invalidate(page(3))
    assert late.told == ["i"]
    run_now(other.read_begin())
    async with waiting(late.read_begin):
        await end()
    assert late.statistics().invalidate_seq % 2 == 0


async def test_the_first_translation_of_a_late_insert_is_not_retried(
    colour: type[Recording],
) -> None:
    """Its number is that of the open section, which it waits for once; then it is good."""
    notifiers = mn.Notifiers()
    await inserted(notifiers, colour, 1)
    end = await begin(notifiers, page(1))
    late = await inserted(notifiers, colour, 1)
    async with waiting(late.read_begin) as results:
        await end()
    assert isinstance(results[0], int)
    assert not retry(late, results[0])


async def test_a_deferred_insert_can_be_removed_at_once(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    other = await inserted(notifiers, colour, 1)
    end = await begin(notifiers, page(1))
    late = await inserted(notifiers, colour, 1)
    run_now(late.remove())
    await end()
    assert other.statistics().intervals == 1
    await notifiers.invalidate(page(1))
    assert late.told == []


async def test_remove_does_not_wait_for_sections_that_overlap_nobody(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour, 1)
    end = await begin(notifiers, page(9))
    run_now(interval.remove())
    await end()


async def test_remove_returns_when_nothing_uses_the_interval_any_more(
    colour: type[Recording],
) -> None:
    """Z5: not when the number has changed but the end has still to take it out of the tree."""
    notifiers = mn.Notifiers()
    interval, other = [await inserted(notifiers, colour, 1) for _ in range(2)]
    end = await begin(notifiers, page(1))
    async with waiting(interval.remove) as results:
        await notifiers.invalidate(page(1))
        assert interval.told == ["i", "i"]
        assert interval.statistics().deferred
        assert results == []
        await end()
        assert other.statistics().intervals == 1
    await notifiers.invalidate(page(1))
    assert interval.told == ["i", "i"]
    assert other.told == ["i", "i", "i"]


async def test_remove_waits_for_a_callback_that_is_suspended() -> None:
    """I-REL, also for another interval than the one whose callback hangs."""
    notifiers = mn.Notifiers()
    gate = anyio.Event()
    slow = Sleepable(act=gate.wait)
    await insert(notifiers, slow, 1)
    quick = await inserted(notifiers, Sleepable, 5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page(1))
        await settle()
        assert slow.running
        async with waiting(slow.remove), waiting(quick.remove):
            gate.set()
            await settle()
            assert not slow.running
    assert not notifiers.armed


async def test_remove_is_not_cancelled_half_way(
    colour: type[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it spin: it goes on with the one wait that it has begun."""
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour, 1)
    waits = 0

    async def counted(self: Any) -> None:
        nonlocal waits
        waits += 1
        await wait(self)

    assert interval._subscription is not None
    tree = type(interval._subscription.driver)
    wait = tree.seq_changes
    monkeypatch.setattr(tree, "seq_changes", counted)
    end = await begin(notifiers, page(1))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(interval.remove)
        await settle()
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await settle()
            assert interval.statistics().deferred
            await end()
    assert waits == 1
    assert not notifiers.armed
    with pytest.raises(NotRegistered):
        interval.statistics()


@pytest.fixture
def asyncio_only(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("native cancellation of a task is asyncio's")


@pytest.mark.usefixtures("asyncio_only")
async def test_a_native_cancel_of_remove_is_raised_when_it_is_done(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour, 1)
    end = await begin(notifiers, page(1))
    task = asyncio.ensure_future(interval.remove())
    await settle()
    task.cancel()
    await settle()
    assert not task.done()
    assert interval.statistics().deferred
    await end()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not notifiers.armed


async def test_remove_inside_a_callback_is_an_error() -> None:
    """It would wait for the section that it is called in; so would read_begin."""
    notifiers = mn.Notifiers()
    raised: list[BaseException] = []

    async def misuse() -> None:
        for call in (interval.remove, interval.read_begin):
            try:
                await call()
            except CalledFromCallback as exc:
                raised.append(exc)

    interval = Sleepable(act=misuse)
    await insert(notifiers, interval, 1)
    await notifiers.invalidate(page(1))
    assert len(raised) == 1, "read_begin need not wait: the interval has not been invalidated yet"
    await interval.read_begin()
    await notifiers.release()
    assert len(raised) == 2


async def test_read_begin_inside_a_callback_that_would_wait_for_itself_is_an_error() -> None:
    notifiers = mn.Notifiers()
    raised: list[BaseException] = []

    async def misuse() -> None:
        try:
            await first.read_begin()
        except CalledFromCallback as exc:
            raised.append(exc)

    first = await inserted(notifiers, Sleepable, 1)
    second = Sleepable(act=misuse)
    await insert(notifiers, second, 1)
    await notifiers.invalidate(page(1))
    assert len(raised) == 1


# ------------------------------------------------------------------ sections that must not suspend


async def test_atomic_intervals_are_told_in_sections_that_must_not_suspend() -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, Atomic)
    with notifiers.invalidating_nonblock(page(1)):
        assert not interval.ranges[0].blockable
        assert interval.statistics().active_invalidate_ranges == 1
    assert interval.statistics().active_invalidate_ranges == 0


def refuse() -> bool:
    return False


async def test_an_interval_may_refuse_a_section_that_must_not_suspend() -> None:
    """-EAGAIN, and nothing is left of it: no section, no odd number, nobody waits (I-PAIR)."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    for kind in (Atomic, SleepableNonblock):
        willing, refusing, later = kind("w", told), kind("r", told, refuse), kind("l", told)
        for number, interval in enumerate((willing, refusing, later)):
            await insert(notifiers, interval, number)
        with pytest.raises(WouldBlock, match="Intervals would have to wait"):
            notifiers.invalidate_range_start_nonblock(page(0, 3))
        assert told == ["w", "r"]
        for interval in (willing, refusing, later):
            assert interval.statistics().active_invalidate_ranges == 0
            run_now(interval.read_begin())
            run_now(interval.remove())
        told.clear()


async def test_sleepable_intervals_refuse_by_default_where_a_section_overlaps_them() -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, Sleepable, 1)
    with notifiers.invalidating_nonblock(page(2)):
        pass
    with pytest.raises(WouldBlock):
        notifiers.invalidate_range_start_nonblock(page(1))
    run_now(interval.read_begin())


async def test_sleepable_intervals_with_a_plain_form_are_told_by_it() -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, SleepableNonblock, 1)
    before = await interval.read_begin()
    rng = page(1)
    told = notifiers.invalidate_range_start_nonblock(rng)
    assert retry(interval, before)
    async with waiting(interval.read_begin):
        notifiers.invalidate_range_end_nonblock(rng, told)


@pytest.mark.parametrize("kind", [Atomic, SleepableNonblock])
async def test_a_driver_that_refuses_after_the_intervals_ends_the_section_for_them(
    kind: type[Recording],
) -> None:
    """Z34: Linux leaves the interval tree armed here, and remove and read_begin wait for ever."""
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, kind)

    class Refuses(mn.SleepableDriver):
        async def invalidate_range_start(self, rng: mn.Range) -> None:
            raise AssertionError

    await notifiers.register(Refuses())
    with pytest.raises(WouldBlock, match="Refuses"):
        notifiers.invalidate_range_start_nonblock(page(1))
    assert interval.told == ["i"]
    assert interval.statistics().active_invalidate_ranges == 0
    assert interval.statistics().invalidate_seq % 2 == 0
    run_now(interval.read_begin())
    run_now(interval.remove())


async def test_a_refusal_in_one_colour_ends_the_section_for_the_other() -> None:
    notifiers = mn.Notifiers()
    sleepable = await inserted(notifiers, Sleepable)
    atomic = await inserted(notifiers, Atomic)
    with pytest.raises(WouldBlock):
        notifiers.invalidate_range_start_nonblock(page(1))
    assert atomic.told == ["i"]
    for interval in (atomic, sleepable):
        assert interval.statistics().active_invalidate_ranges == 0
        run_now(interval.remove())


# ------------------------------------------------------------------ cancellation


async def test_a_cancelled_start_is_undone_for_the_intervals() -> None:
    """The section never was: nothing is open, and nobody waits for its end."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    hangs = Sleepable("h", told, anyio.sleep_forever)
    before, after = Sleepable("b", told), Sleepable("a", told)
    for number, sleepable in enumerate((before, hangs, after)):
        await insert(notifiers, sleepable, number)
    atomic = await inserted(notifiers, Atomic, 0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate_range_start, page(0, 3))
        await settle()
        assert hangs.running
        tasks.cancel_scope.cancel()
    assert told == ["b", "h"]
    everyone: tuple[Recording, ...] = (before, hangs, after, atomic)
    for interval in everyone:
        assert interval.failure is None
        assert interval.statistics().active_invalidate_ranges == 0
        run_now(interval.read_begin())
        run_now(interval.remove())
    assert notifiers.statistics().open_sections == 0


async def test_a_start_that_is_cancelled_in_a_later_driver_is_undone_for_the_intervals(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour)
    await notifiers.register(SleepableDriver("s", start=anyio.sleep_forever))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate_range_start, page(1))
        await settle()
        tasks.cancel_scope.cancel()
    assert interval.told == ["i"]
    assert interval.statistics().active_invalidate_ranges == 0
    run_now(interval.read_begin())


async def test_an_interrupted_atomic_start_is_undone_for_the_intervals() -> None:
    notifiers = mn.Notifiers()

    def interrupt() -> None:
        raise Stop

    interval = Atomic(act=interrupt)
    await insert(notifiers, interval, 1)
    with pytest.raises(Stop):
        await notifiers.invalidate_range_start(page(1))
    assert interval.failure is None
    assert interval.statistics().active_invalidate_ranges == 0
    run_now(interval.remove())


@pytest.mark.usefixtures("asyncio_only")
@pytest.mark.parametrize("form", ["invalidate", "invalidate_page", "release"])
async def test_a_native_cancel_of_what_cannot_be_undone_is_the_failure_of_one_interval(
    form: str,
) -> None:
    """The others are told and go on; the cancellation is raised when they have been."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    hangs = Sleepable("h", told, anyio.sleep_forever)
    other = Sleepable("o", told)
    await insert(notifiers, hangs, 1)
    await insert(notifiers, other, 1)
    what: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "invalidate": lambda: notifiers.invalidate(page(1)),
        "invalidate_page": lambda: notifiers.invalidate_page(0x1000),
        "release": notifiers.release,
    }
    task = asyncio.ensure_future(what[form]())
    await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == ["h", "o"]
    assert isinstance(hangs.failure, asyncio.CancelledError)
    assert other.failure is None
    assert other.statistics().active_invalidate_ranges == 0
    assert notifiers.statistics().quarantined == 0
    await notifiers.invalidate(page(1))
    assert told == ["h", "o", "o"]
    run_now(hangs.remove())


# ------------------------------------------------------------------ intervals that fail


@pytest.fixture
def logged() -> list[MutableMapping[str, Any]]:
    capture = structlog.testing.LogCapture()
    structlog.configure(processors=[capture])
    return capture.entries


def explode() -> None:
    raise ValueError("broken device")


async def test_an_interval_that_raises_is_quarantined_alone(
    colour: type[Recording], logged: list[MutableMapping[str, Any]]
) -> None:
    """The section completes and has failed: its pages are to be leaked. The others go on."""
    notifiers = mn.Notifiers()
    told: list[str] = []
    before, broken, after = colour("b", told), colour("x", told, explode), colour("a", told)
    for interval in (before, broken, after):
        await insert(notifiers, interval, 1)
    seq = await broken.read_begin()
    async with notifiers.invalidating(page(1)) as section:
        assert told == ["b", "x", "a"]
    assert [sub.name for sub in section.failed] == [f"{colour.__name__}Intervals"]
    assert isinstance(broken.failure, ValueError)
    assert "quarantined" in repr(broken)
    assert retry(broken, seq)
    with pytest.raises(NotRegistered) as caught:
        await broken.read_begin()
    assert caught.value.__cause__ is broken.failure
    (event,) = [entry for entry in logged if entry["event"] == mn.log.DRIVER_FAILED]
    assert event["driver"] == colour.__qualname__
    assert (event["callback"], event["start"], event["end"]) == ("invalidate", 0x1000, 0x2000)
    assert notifiers.statistics().quarantined == 0
    run_now(before.read_begin())


async def test_sections_over_a_quarantined_interval_fail_until_it_is_removed(
    colour: type[Recording],
) -> None:
    """It may have translations there still. Elsewhere pages are not leaked."""
    notifiers = mn.Notifiers()
    broken = colour("x", act=explode)
    await insert(notifiers, broken, 1, 2)
    await notifiers.invalidate(page(1))
    assert len(await notifiers.invalidate(page(2))) == 1
    assert len(await notifiers.invalidate(page(3))) == 0
    assert broken.told == ["x"]
    await broken.remove()
    assert len(await notifiers.invalidate(page(2))) == 0


async def test_sections_that_are_open_meanwhile_are_not_spared(colour: type[Recording]) -> None:
    """Nobody knows what the interval still maps, so every section that is open fails."""
    notifiers = mn.Notifiers()
    await insert(notifiers, colour("x", act=explode), 1)
    end_older = await begin(notifiers, page(7))
    async with waiting(lambda: notifiers.register(AtomicDriver("newer"))):
        end_newer = await begin(notifiers, page(7))
        await notifiers.invalidate(page(1))
        assert len(await end_older()) == 1
        assert len(await end_newer()) == 1


async def test_an_interval_that_failed_works_when_it_is_inserted_again(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    interval = colour("x", act=explode)
    await insert(notifiers, interval, 1)
    await notifiers.invalidate(page(1))
    await interval.remove()
    interval.act = None
    await insert(notifiers, interval, 1)
    assert interval.failure is None
    assert not retry(interval, await interval.read_begin())


async def test_the_first_failure_is_the_one_that_is_kept(
    logged: list[MutableMapping[str, Any]],
) -> None:
    """Another section may be in the middle of the same callback, and has called set_seq."""

    class Slow(mn.SleepableInterval):
        calls = 0

        async def invalidate(self, rng: mn.Range, seq: int) -> bool:
            self.calls += 1
            if self.calls == 2:
                explode()
            self.set_seq(seq)
            await gate.wait()
            return True

    notifiers = mn.Notifiers()
    gate = anyio.Event()
    interval = Slow()
    await interval.insert(notifiers, 0x1000, 0x1000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(notifiers.invalidate, page(1))
        await settle()
        await notifiers.invalidate(page(1))
        gate.set()
    assert isinstance(interval.failure, ValueError)
    assert [entry["event"] for entry in logged].count(mn.log.DRIVER_FAILED) == 1


async def test_a_refusal_where_the_section_may_suspend_is_a_failure(
    colour: type[Recording],
) -> None:
    async def refuse_later() -> bool:
        return False

    notifiers = mn.Notifiers()
    interval = colour(act=refuse)
    if colour is Sleepable:
        interval.act = refuse_later
    await insert(notifiers, interval, 1)
    assert len(await notifiers.invalidate(page(1))) == 1
    assert isinstance(interval.failure, BrokenInvalidate)
    assert "returned False: expected True" in str(interval.failure)


async def test_an_interval_that_ignores_its_own_event_without_set_seq_fails() -> None:
    """Z45: a fault that is under way would install what it looked up before the event."""

    class Ignores(mn.AtomicInterval):
        def invalidate(self, rng: mn.Range, seq: int) -> bool:
            if rng.event is not Event.MIGRATE or rng.owner is not self:
                self.set_seq(seq)
            return True

    notifiers = mn.Notifiers()
    interval = Ignores()
    await interval.insert(notifiers, 0x1000, 0x1000)
    seq = await interval.read_begin()
    assert not await notifiers.invalidate(mn.Range(0x1000, 0x2000, Event.MIGRATE))
    seq = await interval.read_begin()
    await notifiers.invalidate(mn.Range(0x1000, 0x2000, Event.MIGRATE, owner=interval))
    assert isinstance(interval.failure, BrokenInvalidate)
    assert "expected set_seq" in str(interval.failure)
    assert interval.read_retry(seq)


async def test_an_interval_that_raises_where_nobody_may_suspend_is_quarantined_too() -> None:
    notifiers = mn.Notifiers()
    told: list[str] = []
    for kind in (Atomic, SleepableNonblock):
        broken, after = kind("x", told, explode), kind("a", told)
        for interval in (broken, after):
            await insert(notifiers, interval, 1)
        with notifiers.invalidating_nonblock(page(1)) as section:
            assert told == ["x", "a"]
        assert len(section.failed) == 1
        for interval in (broken, after):
            await interval.remove()
        told.clear()


# ------------------------------------------------------------------ exit


async def test_the_exit_is_told_to_all_as_one_event(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    intervals = [await inserted(notifiers, colour, number) for number in (1, 5)]
    last = colour()
    await last.insert(notifiers, ULONG_MAX, 1)
    await notifiers.release()
    await notifiers.release()
    for interval in (*intervals, last):
        (rng,) = interval.ranges
        assert (rng.start, rng.end, rng.event) == (0, ULONG_MAX, Event.RELEASE)
        assert rng.blockable


async def test_intervals_stay_after_the_exit_until_they_are_removed(
    colour: type[Recording],
) -> None:
    """Sections of the reverse map still come, in pairs, and remove works as ever."""
    notifiers = mn.Notifiers()
    interval, waits = [await inserted(notifiers, colour, 1) for _ in range(2)]
    await notifiers.release()
    end = await begin(notifiers, page(1))
    assert interval.ranges[-1].event is Event.UNMAP
    async with waiting(interval.remove), waiting(waits.remove):
        await end()
    assert not notifiers.armed


async def test_a_section_that_is_open_over_the_exit_ends_for_the_intervals(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour, 1)
    end = await begin(notifiers, page(1))
    await notifiers.release()
    async with waiting(interval.remove):
        await end()


async def test_no_translation_is_made_after_the_exit(colour: type[Recording]) -> None:
    """What was looked up before must not be used, and a loop that retries comes to its end."""
    notifiers = mn.Notifiers()
    interval = await inserted(notifiers, colour)
    seq = await interval.read_begin()
    await notifiers.release()
    assert retry(interval, seq)
    with pytest.raises(AddressSpaceExited):
        await interval.read_begin()
    for other in (colour(), Atomic(), Sleepable()):
        with pytest.raises(AddressSpaceExited):
            await insert(notifiers, other, 1)


async def test_a_first_insert_that_the_exit_overtakes_leaves_nothing(
    colour: type[Recording],
) -> None:
    notifiers = mn.Notifiers()
    end = await begin(notifiers, page(1))

    async def insert_too_late() -> str:
        with pytest.raises(AddressSpaceExited):
            await insert(notifiers, colour(), 1)
        return "exited"

    async with waiting(insert_too_late):
        await notifiers.release()
        await end()
    assert notifiers.statistics().subscriptions == 0


async def test_who_waits_in_read_begin_over_the_exit_learns_of_it(
    colour: type[Recording],
) -> None:
    """A deferred interval is told no RELEASE: it has had no chance to make a translation."""
    notifiers = mn.Notifiers()
    await inserted(notifiers, colour)
    end = await begin(notifiers, page(1))
    late = await inserted(notifiers, colour)

    async def read() -> str:
        with pytest.raises(AddressSpaceExited):
            await late.read_begin()
        return "exited"

    async with waiting(read):
        await notifiers.release()
        await end()
    assert late.told == []


async def test_a_quarantined_interval_is_told_of_the_exit(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    broken = colour("x", act=explode)
    await insert(notifiers, broken, 1)
    await notifiers.invalidate(page(1))
    broken.act = None
    await notifiers.release()
    assert [rng.event for rng in broken.ranges] == [Event.UNMAP, Event.RELEASE]


# ------------------------------------------------------------------ what is recorded


async def test_a_trace_shows_the_tree_as_the_driver(colour: type[Recording]) -> None:
    notifiers = mn.Notifiers()
    await inserted(notifiers, colour)
    ring = mn.Ring()
    notifiers.trace = ring.append
    await notifiers.invalidate(page(1))
    drivers = {line["driver"] for line in ring.drain() if line["event"] == mn.log.CALLBACK}
    assert drivers == {f"{colour.__name__}Intervals"}
