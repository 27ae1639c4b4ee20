"""The core's locks and notifiers under every schedule, or as many as the printed bound allows."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from mmunotify import (
    SRCU,
    AddressSpaceExited,
    AtomicInterval,
    DeferredDriver,
    IntervalNotifier,
    Notifiers,
    Range,
    RWSemaphore,
    SleepableDriver,
    SleepableInterval,
)
from mmunotify.locks import lockdep
from mmunotify.locks.rwsem import _WAITERS, _Waiter
from mmunotify.testing.explore import DFS, PCT, Exploration, Strategy, always, explore
from silent import SILENT

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    Scenario = Callable[[], Coroutine[Any, Any, Any]]


@pytest.fixture(autouse=True)
def _plain_locks() -> Iterator[None]:
    """Without lockdep, which is an order of magnitude slower; some tests turn it on again."""
    with lockdep.checking(False):
        yield


def explored(scenario: Scenario, **options: Any) -> Exploration:
    """Explore, say how far that went, and fail if a schedule does."""
    found = explore(scenario, **options)
    print(f"\n{scenario.__qualname__}: {found}")
    return found.check()


# The reader/writer semaphore ---------------------------------------------------------------------


def readers_and_writers(readers: int, writers: int, downgrades: bool = False) -> Scenario:
    """Each takes it once; readers share it, a writer is alone, and nobody leaves a trace."""

    async def rwsem() -> None:
        sem = RWSemaphore("sem")
        reading = writing = 0

        def excluded() -> None:
            assert writing == 0 or (writing, reading) == (1, 0)

        async def reader() -> None:
            nonlocal reading
            async with sem.reading():
                reading += 1
                try:
                    await checkpoint()
                finally:
                    reading -= 1

        async def writer() -> None:
            nonlocal reading, writing
            async with sem.writing():
                writing += 1
                try:
                    await checkpoint()
                finally:
                    writing -= 1
                if downgrades:
                    sem.downgrade_write()
                    reading += 1
                    try:
                        await checkpoint()
                    finally:
                        reading -= 1

        always(excluded)
        async with anyio.create_task_group() as tg:
            for number in range(readers):
                tg.start_soon(reader, name=f"reader {number}")
            for number in range(writers):
                tg.start_soon(writer, name=f"writer {number}")
        left = sem.statistics()
        assert not sem.locked
        assert not sem.is_contended
        assert (left.waiting_readers, left.waiting_writers) == (0, 0)

    return rwsem


@pytest.mark.long
def test_rwsem() -> None:
    """Three readers and two writers, to the end."""
    found = explored(readers_and_writers(3, 2))
    assert (found.schedules, found.exhausted) == (61_044, True)


@pytest.mark.parametrize(
    ("readers", "writers", "downgrades", "cancel", "schedules"),
    [
        (2, 1, False, ("*",), 1_620),
        (1, 2, False, ("*",), 1_788),
        pytest.param(2, 2, False, ("writer 0",), 4_734, marks=pytest.mark.long),
        pytest.param(2, 1, True, ("*",), 4_710, marks=pytest.mark.long),
        pytest.param(2, 2, True, (), 6_796, marks=pytest.mark.long),
    ],
)
def test_rwsem_with_cancellation(
    readers: int, writers: int, downgrades: bool, cancel: tuple[str, ...], schedules: int
) -> None:
    """Fewer tasks, any of them cancelled wherever it is suspended, to the end."""
    found = explored(readers_and_writers(readers, writers, downgrades), cancel=cancel)
    assert (found.schedules, found.exhausted) == (schedules, True)


@pytest.mark.parametrize(
    ("strategy", "schedules"),
    [
        pytest.param(DFS(preemptions=0), 500, id="quick"),
        pytest.param(DFS(preemptions=0), None, id="no preemption", marks=pytest.mark.long),
        pytest.param(DFS(preemptions=1), 100_000, id="one preemption", marks=pytest.mark.long),
        pytest.param(PCT(depth=4), 20_000, id="pct", marks=pytest.mark.long),
    ],
)
def test_rwsem_with_everybody_cancelled(strategy: Strategy, schedules: int | None) -> None:
    """Three readers, two writers, and any cancellations, to a bound."""
    found = explored(readers_and_writers(3, 2), strategy=strategy, cancel=True, schedules=schedules)
    assert found.schedules == schedules or (found.schedules, found.exhausted) == (3_840, True)


@pytest.mark.long
@pytest.mark.parametrize(("cancel", "schedules"), [("writer 0", 414_030), ("reader 1", 235_564)])
def test_rwsem_with_one_cancelled(cancel: str, schedules: int) -> None:
    """Three readers, two writers, one of them cancelled, to the end."""
    found = explored(readers_and_writers(3, 2), cancel=cancel)
    assert (found.schedules, found.exhausted) == (schedules, True)


def test_rwsem_that_is_not_handed_over_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """When those who wait are not given the lock, some schedule ends in a deadlock."""
    monkeypatch.setattr(RWSemaphore, "_hand_over", lambda self: None)
    found = explore(readers_and_writers(1, 1))
    assert found.failure is not None
    assert found.failure.kind == "Deadlock"
    assert "waits for <Event" in str(found.failure)


def test_rwsem_that_a_cancelled_waiter_keeps_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiter who is cancelled after it was given the lock has to give it back."""

    async def wait(self: RWSemaphore, *, write: bool) -> None:
        waiter = _Waiter(write)
        self._waiters = self._waiters or deque()
        self._waiters.append(waiter)
        self._count |= _WAITERS
        try:
            await waiter.event.wait()
        except BaseException:
            if not waiter.granted:
                self._waiters.remove(waiter)
                self._hand_over()
            raise

    monkeypatch.setattr(RWSemaphore, "_wait", wait)
    assert explore(readers_and_writers(1, 2)).failure is None
    found = explore(readers_and_writers(1, 2), cancel=True)
    assert found.failure is not None
    assert found.failure.kind in {"Deadlock", "AssertionError"}
    assert "* cancel " in found.failure.picture


def test_checked_rwsem() -> None:
    """With lockdep on, which sees no fault where there is none."""
    with lockdep.checking():
        found = explored(readers_and_writers(1, 1), cancel=True)
    assert (found.schedules, found.exhausted) == (28, True)


def test_rwsem_deadlock_names_who_holds_what() -> None:
    """Two semaphores in both orders: the report has names, lines, and what each holds."""

    async def crossed() -> None:
        a, b = RWSemaphore("a_lock"), RWSemaphore("b_lock")

        async def both(first: RWSemaphore, second: RWSemaphore) -> None:
            async with first.writing():
                await checkpoint()
                async with second.reading():
                    pass

        async with anyio.create_task_group() as tg:
            tg.start_soon(both, a, b, name="ab")
            tg.start_soon(both, b, a, name="ba")

    found = explore(crossed)
    assert found.failure is not None
    assert found.failure.kind == "Deadlock"
    assert "RWSemaphore 'b_lock' writer contended" in str(found.failure)
    with lockdep.checking():
        found = explore(crossed)
    assert found.failure is not None
    assert found.failure.kind == "LockOrderViolation"


def test_suspending_with_a_spinlock_held_is_a_failure() -> None:
    """Scheduling while atomic, found at the step that did it, with the line."""
    from mmunotify.locks import SpinLock

    async def sleeps() -> None:
        lock = SpinLock("lock")
        with lock:
            await checkpoint()

    with lockdep.checking():
        found = explore(sleeps)
    assert found.failure is not None
    assert found.failure.kind == "ScheduleWhileAtomic"
    assert "test_core.py" in str(found.failure.error)
    assert "in sleeps" in str(found.failure.error)


# SRCU --------------------------------------------------------------------------------------------


def srcu_readers(readers: int, synchronizers: int) -> Scenario:
    """Whoever was reading when a grace period began has left when it is over."""

    async def srcu() -> None:
        domain = SRCU("srcu")
        inside: set[str] = set()
        called: list[str] = []

        async def reader(name: str) -> None:
            with domain.reading():
                inside.add(name)
                try:
                    await checkpoint()
                finally:
                    inside.discard(name)

        async def synchronizer(name: str) -> None:
            await checkpoint()
            before = set(inside)
            domain.call(lambda: called.append(name))
            await domain.synchronize()
            assert not before & inside, "a reader outlived the grace period"
            assert name in called, "the callback is queued behind the same readers"

        async with anyio.create_task_group() as tg:
            for number in range(readers):
                name = f"reader {number}"
                tg.start_soon(reader, name, name=name)
            for number in range(synchronizers):
                name = f"synchronizer {number}"
                tg.start_soon(synchronizer, name, name=name)
        left = domain.statistics()
        assert (left.readers, left.grace_periods, left.callbacks) == (0, 0, 0)

    return srcu


def test_a_grace_period_for_the_oldest_readers_alone_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader who came after another synchronizer outlives the second one's grace period."""
    flip = SRCU._flip

    def oldest(self: SRCU) -> Any:
        return self._draining[0] if flip(self) else None

    monkeypatch.setattr(SRCU, "_flip", oldest)
    found = explore(srcu_readers(2, 2))
    assert found.failure is not None
    assert "a reader outlived the grace period" in str(found.failure.error)
    assert explore(srcu_readers(2, 2), replay=found.failure.schedule).failure is not None


def test_srcu() -> None:
    """Two readers and two synchronizers, to the end."""
    found = explored(srcu_readers(2, 2))
    assert (found.schedules, found.exhausted) == (5_280, True)


@pytest.mark.long
def test_srcu_with_cancellation() -> None:
    """A reader and two synchronizers, all cancelled anywhere, to the end."""
    found = explored(srcu_readers(1, 2), cancel=True)
    assert (found.schedules, found.exhausted) == (3_600, True)


@pytest.mark.parametrize(
    ("preemptions", "schedules"), [(0, 384), pytest.param(1, 25_320, marks=pytest.mark.long)]
)
def test_srcu_with_everybody_cancelled(preemptions: int, schedules: int) -> None:
    """Two readers and two synchronizers, all cancelled anywhere, within few preemptions."""
    found = explored(srcu_readers(2, 2), strategy=DFS(preemptions), cancel=True)
    assert (found.schedules, found.exhausted) == (schedules, True)


@pytest.mark.long
def test_srcu_with_synchronizers_cancelled() -> None:
    """Two readers and two synchronizers, the synchronizers cancelled anywhere, to the end."""
    found = explored(srcu_readers(2, 2), cancel="synchronizer*")
    assert (found.schedules, found.exhausted) == (146_168, True)


# Notifiers ---------------------------------------------------------------------------------------


class Watched:
    """What any driver can be held to: pairs, one release, nothing afterwards."""

    def __init__(self) -> None:
        self.open = 0
        """Sections that it was told the start of and not the end."""
        self.releases = 0
        self.over = False

    def called(self) -> None:
        assert not self.over, "I-REL: a callback after unregister has returned"

    def told_start(self) -> None:
        self.open += 1

    def told_end(self) -> None:
        self.called()
        self.open -= 1
        assert self.open >= 0, "I-PAIR: an end without a start"


class Sleepable(Watched, SleepableDriver):
    """Suspends in each of its callbacks."""

    async def invalidate_range_start(self, rng: Range) -> None:
        self.called()
        await checkpoint()
        self.told_start()

    async def invalidate_range_end(self, rng: Range) -> None:
        await checkpoint()
        self.told_end()

    async def release(self) -> None:
        self.called()
        self.releases += 1
        await checkpoint()
        self.called()


class Deferred(Watched, DeferredDriver):
    """Marks, and finishes later."""

    def invalidate_range(self, rng: Range) -> None:
        self.called()
        self.told_start()

    async def invalidate_range_sync(self, rng: Range) -> None:
        self.called()
        await checkpoint()
        self.told_end()

    async def release(self) -> None:
        self.called()
        self.releases += 1
        await checkpoint()


def coming_and_going(
    make: Callable[[], Any], *, invalidations: int = 1, exits: bool = True
) -> Scenario:
    """A driver comes and goes, ranges are invalidated, and the address space exits."""

    async def notifiers() -> str:
        subscriptions: Notifiers[Any] = Notifiers(logger=SILENT)
        driver = make()
        in_sections = 0
        seen = []

        async def attaches() -> None:
            try:
                async with subscriptions.attached(driver):
                    seen.append("attached")
                    told = driver.releases or driver.open >= in_sections
                    assert told, "I-REG: a section does not tell it"
                    await checkpoint()
            except AddressSpaceExited:
                seen.append("refused")
            finally:
                driver.over = True
                if "attached" in seen:
                    assert driver.releases == 1, "I-REL: not released once"

        async def invalidates() -> None:
            nonlocal in_sections
            async with subscriptions.invalidating(Range(0, 4096)) as section:
                in_sections += 1
                try:
                    await checkpoint()
                finally:
                    in_sections -= 1
            assert not section.failed

        async def releases() -> None:
            await subscriptions.release()
            seen.append("exited")
            assert driver.releases <= 1
            assert driver.releases or "attached" not in seen, "I-REL: not released at exit"

        async with anyio.create_task_group() as tg:
            tg.start_soon(attaches, name="attaches")
            for number in range(invalidations):
                tg.start_soon(invalidates, name=f"invalidates {number}")
            if exits:
                tg.start_soon(releases, name="releases")
        left = subscriptions.statistics()
        assert (left.subscriptions, left.quarantined) == (0, 0)
        assert (left.open_sections, left.srcu_readers) == (0, 0)
        assert driver.open == 0 or driver.over, "I-PAIR: a start without an end"
        return " ".join(seen)

    return notifiers


@pytest.mark.parametrize(
    ("make", "exits", "cancel", "schedules"),
    [
        (Sleepable, True, (), 341),
        (Sleepable, True, ("*",), 1_544),
        (Sleepable, False, ("*",), 94),
        (Deferred, True, (), 153),
        (Deferred, True, ("*",), 676),
    ],
)
def test_notifiers(
    make: Callable[[], Any], exits: bool, cancel: tuple[str, ...], schedules: int
) -> None:
    """Register, unregister, invalidate and release, cancelled anywhere, to the end."""
    found = explored(coming_and_going(make, exits=exits), cancel=cancel)
    assert (found.schedules, found.exhausted) == (schedules, True)


def test_a_registration_that_does_not_wait_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its wait for open sections, `register` breaks I-REG in some schedule."""

    async def no_wait(self: object) -> None:
        pass

    monkeypatch.setattr(Notifiers, "_sections_over", no_wait)
    found = explore(coming_and_going(Sleepable, exits=False))
    assert "I-REG" in str(found.failure)


# Interval notifiers ------------------------------------------------------------------------------


class SleepableCache(SleepableInterval):
    """What a page held when it was looked up, under a lock that suspends."""

    def __init__(self) -> None:
        self.lock = RWSemaphore("cache_lock")
        self.cached: int | None = None
        self.over = False

    async def invalidate(self, rng: Range, seq: int) -> bool:
        assert not self.over, "I-REL: told after remove has returned"
        async with self.lock.writing():
            self.set_seq(seq)
            await checkpoint()
            self.cached = None
        return True

    async def fill(self, seq: int, found: int) -> bool:
        async with self.lock.writing():
            if self.read_retry(seq):
                return False
            self.cached = found
            return True


class AtomicCache(AtomicInterval):
    """The same in one step."""

    def __init__(self) -> None:
        self.cached: int | None = None
        self.over = False

    def invalidate(self, rng: Range, seq: int) -> bool:
        assert not self.over, "I-REL: told after remove has returned"
        self.set_seq(seq)
        self.cached = None
        return True

    async def fill(self, seq: int, found: int) -> bool:
        if self.read_retry(seq):
            return False
        self.cached = found
        return True


def looked_up(
    make: Callable[[], Any], *, changes: int = 1, tries: int = 2, exits: bool = False
) -> Scenario:
    """An interval comes, looks a page up, and goes, while the page changes and the owner exits."""

    async def intervals() -> str:
        notifiers: Notifiers[Any] = Notifiers(logger=SILENT)
        cache = make()
        page = 0
        changing = 0
        outcome = "cancelled"

        def not_stale() -> None:
            if changing:
                assert cache.cached is None, "I-NOEST: filled inside a section"
            assert cache.cached in (None, page), "I-SEQ: stale"

        async def owner() -> None:
            nonlocal outcome
            await cache.insert(notifiers, 0, 4096)
            try:
                outcome = "retries"
                for _ in range(tries):
                    seq = await cache.read_begin()
                    found = page
                    await checkpoint()
                    if await cache.fill(seq, found):
                        outcome = "filled"
                        break
            finally:
                await cache.remove()
                cache.over = True
                cache.cached = None

        async def owner_until_exit() -> None:
            nonlocal outcome
            try:
                await owner()
            except AddressSpaceExited:
                outcome = "exited"

        async def change() -> None:
            nonlocal changing, page
            async with notifiers.invalidating(Range(0, 4096)) as section:
                changing += 1
                page += 1
                try:
                    await checkpoint()
                finally:
                    changing -= 1
            assert not section.failed

        async def leave() -> None:
            nonlocal page
            await notifiers.release()
            assert cache.cached is None
            page += 1

        always(not_stale)
        async with anyio.create_task_group() as tg:
            tg.start_soon(owner_until_exit, name="owner")
            for number in range(changes):
                tg.start_soon(change, name=f"change {number}")
            if exits:
                tg.start_soon(leave, name="leave")
        left = notifiers.statistics()
        assert (left.quarantined, left.open_sections, left.srcu_readers) == (0, 0, 0)
        return outcome

    return intervals


@pytest.mark.parametrize(
    ("make", "exits", "cancel", "schedules"),
    [
        (SleepableCache, False, ("*",), 73),
        (SleepableCache, True, (), 111),
        (SleepableCache, True, ("*",), 2_073),
        (AtomicCache, False, ("*",), 36),
        (AtomicCache, True, ("*",), 158),
    ],
)
def test_intervals(
    make: Callable[[], Any], exits: bool, cancel: tuple[str, ...], schedules: int
) -> None:
    """Insert, look up, remove, invalidate and exit, cancelled anywhere, to the end."""
    found = explored(looked_up(make, exits=exits), cancel=cancel)
    assert (found.schedules, found.exhausted) == (schedules, True)
    assert "filled" in found.outcomes


def test_a_reader_that_does_not_retry_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `read_retry` a stale page is cached in some schedule."""
    monkeypatch.setattr(IntervalNotifier, "read_retry", lambda self, seq: False)
    found = explore(looked_up(AtomicCache))
    assert "I-NOEST" in str(found.failure)


def test_core_with_lockdep() -> None:
    """Registration and intervals once more, to a bound, with every lock checked."""
    with lockdep.checking():
        explored(coming_and_going(Sleepable), cancel=True, strategy=PCT(), schedules=100)
        explored(looked_up(SleepableCache, exits=True), cancel=True, strategy=PCT(), schedules=100)


TWO_SECTIONS = [
    pytest.param({"strategy": DFS(preemptions=0), "cancel": True, "schedules": 300}, id="quick"),
    pytest.param({"schedules": 20_000}, id="nobody cancelled", marks=pytest.mark.long),
    pytest.param(
        {"strategy": DFS(preemptions=1), "cancel": True, "schedules": 20_000},
        id="one preemption",
        marks=pytest.mark.long,
    ),
]


@pytest.mark.parametrize("options", TWO_SECTIONS)
@pytest.mark.parametrize("make", [Sleepable, Deferred])
def test_notifiers_with_two_sections(make: Callable[[], Any], options: dict[str, Any]) -> None:
    """Two sections that overlap in time, to a bound."""
    explored(coming_and_going(make, invalidations=2), **options)


@pytest.mark.parametrize("options", TWO_SECTIONS)
@pytest.mark.parametrize("make", [SleepableCache, AtomicCache])
def test_intervals_with_two_changes(make: Callable[[], Any], options: dict[str, Any]) -> None:
    """Two sections that overlap in time, to a bound."""
    explored(looked_up(make, changes=2, exits=True), **options)
