"""Subscriptions to a part of an address space, with a sequence number for each.

An interval notifier is told of the sections that overlap it, and of no end. Instead of counting
sections, its owner compares sequence numbers: `read_begin` before it looks translations up, and
`read_retry` under its own lock before it uses them (I-SEQ).

    while True:
        seq = await interval.read_begin()
        found = await primary.fault_in_range(interval.start, interval.end)
        with interval.lock:
            if not interval.read_retry(seq):
                interval.use(found)
                break

The algorithm is that of mm/mmu_notifier.c. All intervals of one colour at one address space share a
sequence number, which is odd while a section is open that overlaps one of them, and a tree, which
does not change while the number is odd: inserts and removes are deferred until it is even. The tree
is a driver itself, told before every other one, got from the address space by the first interval
and put by the last. What Linux guards with a spinlock is done here in one step.

So intervals can be made to wait for sections elsewhere in the address space, and a stream of
overlapping sections can keep a reader waiting for ever: give it a deadline.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, final

import anyio
import attrs

from .drivers import AtomicDriver, SleepableDriver, one_page
from .errors import (
    AddressSpaceExited,
    AlreadyRegistered,
    BrokenInvalidate,
    NotRegistered,
    RangeError,
    WrongColour,
)
from .interval_tree import IntervalTree, Node
from .locks import lockdep
from .locks.base import Lock
from .ranges import ADDRESS_END, ULONG_MAX, Event, Range

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

    from .audience import Subscription
    from .locks import RwSems
    from .notifiers import Notifiers


@attrs.frozen
class IntervalStatistics:
    """What `IntervalNotifier.statistics` saw: of the interval, and of its colour there."""

    seq: int
    """Of the last section that the interval was told of, or that its insert met."""
    deferred: bool
    """Whether its insert or its remove waits until `invalidate_seq` is even."""
    intervals: int
    """How many are told of the sections that overlap them."""
    invalidate_seq: int
    """Odd while a section is open that overlaps an interval, or that the insert of one has met."""
    active_invalidate_ranges: int
    """Sections that have begun and not ended."""


class IntervalNotifier:
    """What the two colours have in common. Derive from AtomicInterval or SleepableInterval.

    A subclass needs no `super().__init__()`. An instance serves one address space at a time and can
    be inserted again after it was removed.
    """

    start: int = 0
    """First byte; `insert` sets it."""
    end: int = 0
    """One past the last byte; `insert` sets it."""
    lock: Any = None
    """The owner's lock, which `invalidate` takes. Of any kind, and only for whoever reads the
    program; but lockdep checks that one of `mmunotify`'s is held where it must be."""
    failure: BaseException | None = None
    """What `invalidate` raised, if it did: the interval is quarantined. It is told nothing any more
    but the RELEASE at exit, and until it is removed sections over it name its colour's tree in
    their `failed`."""

    _seq = 0
    _node: Node[IntervalNotifier] | None = None
    """Where it is in the tree; None also while its insert is deferred."""
    _subscription: Subscription[AnyIntervals] | None = None
    """Its reference to the tree, while it is inserted."""
    _busy = False
    """While `insert` or `remove` runs."""
    _suspends: ClassVar[dict[str, bool]] = {}
    """Which callbacks there are, and whether each is a coroutine."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for name, due in cls._suspends.items():
            if inspect.iscoroutinefunction(getattr(cls, name)) != due:
                raise WrongColour(
                    f"{cls.__qualname__}.{name}: expected a "
                    f"{'coroutine function (async def)' if due else 'plain function (def)'}"
                )

    def __repr__(self) -> str:
        subscription = self._subscription
        where = f"at {subscription.address_space}" if subscription else "not inserted"
        quarantined = " quarantined" if self.failure is not None else ""
        return f"<{type(self).__qualname__} [{self.start:#x}, {self.end:#x}) {where}{quarantined}>"

    @final
    async def remove(self) -> None:
        """End the subscription: when this returns no callback runs or will run (I-REL).

        Drop the translations before, and make none meanwhile: what is not told in time is stale.
        Waits for all open sections if one of them overlaps an interval of this colour, so the
        caller may hold no lock that a callback takes and have no section open. Is not cancelled
        half-way: a cancellation is raised when it is done. Raises NotRegistered, and
        CalledFromCallback inside any callback. Source: mmu_interval_notifier_remove.
        """
        subscription = self._subscription
        if subscription is None or self._busy:
            raise NotRegistered(f"remove of {self!r}: expected one that is inserted")
        tree = subscription.driver
        tree.notifiers.refuse_in_callback(f"remove of {self!r}")
        tree.notifiers.might_wait_for_sections(f"remove of {self!r}")
        self._busy = True
        try:
            await tree.remove(self)
        finally:
            self._busy = False
            self._subscription = None
            tree.notifiers.put(subscription)

    @final
    async def read_begin(self) -> int:
        """The sequence number to look translations up under, for `read_retry`.

        Waits for all open sections if one of them has invalidated this interval, once; else it
        never suspends. Raises AddressSpaceExited when no translation may be made any more,
        NotRegistered if the interval is not inserted or is quarantined, and CalledFromCallback
        where it would wait for itself. Source: mmu_interval_read_begin.
        """
        if self._subscription is None:
            raise NotRegistered(f"read_begin of {self!r}: expected one that is inserted")
        tree = self._subscription.driver
        seq = self._seq
        if seq == tree.seq:
            tree.notifiers.refuse_in_callback(f"read_begin of {self!r}")
            tree.notifiers.might_wait_for_sections(f"read_begin of {self!r}")
            await tree.seq_changes()
        if self.failure is not None:
            raise NotRegistered(f"read_begin of {self!r}: expected one that works") from (
                self.failure
            )
        if tree.exiting:
            raise AddressSpaceExited(f"read_begin of {self!r}: expected mm_users > 0")
        return seq

    @final
    def read_retry(self, seq: int) -> bool:
        """Whether what was looked up since the `read_begin` that gave `seq` must not be used.

        Under the lock that `invalidate` takes; use it before the lock is released. Source:
        mmu_interval_read_retry.
        """
        self._check_lock()
        return self._seq != seq

    @final
    def check_retry(self, seq: int) -> bool:
        """A look without the lock: when it is True, `read_retry` will be.

        Source: mmu_interval_check_retry.
        """
        return self._seq != seq

    @final
    def set_seq(self, seq: int) -> None:
        """What `invalidate` does with its `seq` under the owner's lock, whatever else it does.

        Source: mmu_interval_set_seq.
        """
        self._check_lock()
        self._seq = seq

    @final
    def statistics(self) -> IntervalStatistics:
        """A snapshot for debugging. Raises NotRegistered if it is not inserted."""
        if self._subscription is None:
            raise NotRegistered(f"statistics of {self!r}: expected one that is inserted")
        tree = self._subscription.driver
        return IntervalStatistics(
            seq=self._seq,
            deferred=id(self) in tree.deferred,
            intervals=len(tree.tree),
            invalidate_seq=tree.seq,
            active_invalidate_ranges=tree.active,
        )

    def _check_lock(self) -> None:
        if lockdep.enabled and isinstance(self.lock, Lock):
            lockdep.assert_held(self.lock)

    def _check_insert(self, start: int, length: int) -> None:
        if self._busy or self._subscription is not None:
            raise AlreadyRegistered(f"insert of {self!r}: expected one that is not inserted")
        if start < 0 or length <= 0 or start + length > ADDRESS_END:
            raise RangeError(
                f"insert of {length:#x} bytes at {start:#x}: expected start >= 0, length > 0 and "
                "start + length <= 2**64"
            )

    async def _insert(
        self, start: int, length: int, getting: Awaitable[Subscription[AnyIntervals]]
    ) -> None:
        self._busy = True
        try:
            subscription = await getting
        finally:
            self._busy = False
        tree = subscription.driver
        if tree.exiting:
            tree.notifiers.put(subscription)
            raise AddressSpaceExited(f"insert of {self!r}: expected mm_users > 0")
        self.start, self.end = start, start + length
        self.failure = None
        self._subscription = subscription
        tree.insert(self)


class AtomicInterval(IntervalNotifier, ABC):
    """An interval notifier whose `invalidate` is a plain function: legal under spinlocks."""

    _suspends = {"invalidate": False}

    @abstractmethod
    def invalidate(self, rng: Range, seq: int) -> bool:
        """Drop every translation inside `rng`; a section is being opened over it.

        Take the lock that `read_retry` is called under, `self.set_seq(seq)` whatever `rng` is for,
        drop the translations, return True. Called as `AtomicDriver.invalidate_range_start` is;
        what is said there of locks and pages holds. May return False only when `rng.blockable` is
        False, with nothing changed: -EAGAIN, the section will not be. The event RELEASE, over all
        addresses, is the exit: it comes once. Source: mmu_interval_notifier_ops.
        """

    @final
    async def insert(self, notifiers: Notifiers[Any], start: int, length: int) -> None:
        """Be told of every section that begins from now on and overlaps [start, start + length).

        In bytes. The first interval of an address space registers their tree: this may suspend and
        raises as `Notifiers.register` does, and so it is for whoever inserts meanwhile; else it
        never suspends. Sections that are open already are not told; the first `read_begin` waits
        for them. Cancelled, it leaves nothing inserted. Raises AlreadyRegistered, RangeError (no
        bytes, or beyond 2**64), AddressSpaceExited. Source: mmu_interval_notifier_insert.
        """
        self._check_insert(start, length)
        await self._insert(
            start, length, notifiers.get(AtomicIntervals, lambda: AtomicIntervals(notifiers))
        )

    @final
    async def insert_locked(self, notifiers: Notifiers[Any], start: int, length: int) -> None:
        """`insert` for a caller that is inside `quiesce` already, as a driver's mmap is.

        Source: mmu_interval_notifier_insert_locked.
        """
        self._check_insert(start, length)
        await self._insert(
            start, length, notifiers.get_locked(AtomicIntervals, lambda: AtomicIntervals(notifiers))
        )


class SleepableInterval(IntervalNotifier, ABC):
    """An interval notifier whose `invalidate` is a coroutine: only where rmap locks are RwSems."""

    _suspends = {"invalidate": True, "invalidate_nonblock": False}

    @abstractmethod
    async def invalidate(self, rng: Range, seq: int) -> bool:
        """Drop every translation inside `rng`; a section is being opened over it.

        As for AtomicInterval, but may suspend and always returns True. May be cancelled: the
        section will not be then, and no lock may be left held.
        """

    def invalidate_nonblock(self, rng: Range, seq: int) -> bool:
        """`invalidate` in a section that must not suspend. False is -EAGAIN, with nothing changed.

        The RELEASE at exit is never told this way.
        """
        return False

    @final
    async def insert(self, notifiers: Notifiers[RwSems], start: int, length: int) -> None:
        """As `AtomicInterval.insert`; raises WrongColour where rmap locks are SpinLocks."""
        self._check_insert(start, length)
        await self._insert(
            start, length, notifiers.get(SleepableIntervals, lambda: SleepableIntervals(notifiers))
        )

    @final
    async def insert_locked(self, notifiers: Notifiers[RwSems], start: int, length: int) -> None:
        """`insert` for a caller that is inside `quiesce` already."""
        self._check_insert(start, length)
        await self._insert(
            start,
            length,
            notifiers.get_locked(SleepableIntervals, lambda: SleepableIntervals(notifiers)),
        )


class _Intervals:
    """The intervals of one colour at one address space (struct mmu_notifier_subscriptions)."""

    precedes: ClassVar[bool] = True
    passes_on: ClassVar[bool] = True

    def __init__(self, notifiers: Notifiers[Any]) -> None:
        self.notifiers: Final = notifiers
        self.tree: Final[IntervalTree[IntervalNotifier]] = IntervalTree()
        self.seq = 2
        self.active = 0
        self.deferred: Final[dict[int, IntervalNotifier]] = {}
        """Inserts and removes to be done when `seq` is even again, by the id of the interval."""
        self.exiting = False
        self._seq_changed: anyio.Event | None = None

    def begin(self, start: int, end: int) -> list[IntervalNotifier]:
        """A section has begun; the intervals that are to be told (mn_itree_inv_start_range)."""
        self.active += 1
        hits = self.tree.overlapping(start, end)
        if hits:
            self.seq |= 1
        return hits

    def end(self) -> None:
        """A section has ended; the last one does what was deferred (mn_itree_inv_end)."""
        self.active -= 1
        if self.active or not self.seq & 1:
            return
        self.seq += 1
        for interval in self.deferred.values():
            self._put_in(interval) if interval._node is None else self._take_out(interval)
        self.deferred.clear()
        if self._seq_changed is not None:
            self._seq_changed.set()
            self._seq_changed = None

    def begin_release(self) -> tuple[Range, list[IntervalNotifier]]:
        """The section of the exit: no translation is made any more, and everybody is told."""
        self.exiting = True
        rng = Range(0, ULONG_MAX, Event.RELEASE)
        rng.cancellable = False
        return rng, self.begin(0, ADDRESS_END)

    def insert(self, interval: IntervalNotifier) -> None:
        """Told from now on, or deferred; `read_begin` waits for the sections that are open."""
        interval._seq = self.seq - 1
        if self.active and self.seq & 1:
            self.deferred[id(interval)] = interval
        else:
            self._put_in(interval)
        if self.active:
            self.seq |= 1
            interval._seq = self.seq

    async def remove(self, interval: IntervalNotifier) -> None:
        """Told nothing any more when this returns; to the end."""
        if not self.seq & 1:
            self._take_out(interval)
        elif interval._node is None:
            del self.deferred[id(interval)]
        else:
            self.deferred[id(interval)] = interval
            interrupted: BaseException | None = None
            with anyio.CancelScope(shield=True):
                while id(interval) in self.deferred:
                    try:
                        await self.seq_changes()
                    except anyio.get_cancelled_exc_class() as exc:
                        interrupted = exc
            if interrupted is not None:
                raise interrupted

    async def seq_changes(self) -> None:
        """Wait until `seq`, which is odd, is even."""
        if self._seq_changed is None:
            self._seq_changed = anyio.Event()
        await self._seq_changed.wait()

    def tell(self, hits: Iterable[IntervalNotifier], rng: Range, callback: str) -> bool:
        """Call all of them in one step. False if one refuses: the section has ended then."""
        interrupted: BaseException | None = None
        for interval in hits:
            if self.skips(interval, rng):
                continue
            try:
                done: bool = getattr(interval, callback)(rng, self.seq)
            except BaseException as exc:
                interrupted = self.raised(interval, callback, exc, rng) or interrupted
            else:
                if not done and not rng.blockable:
                    self.end()
                    return False
                self.judge(interval, callback, done, rng)
        if interrupted is not None:
            raise interrupted
        return True

    def skips(self, interval: IntervalNotifier, rng: Range) -> bool:
        """Whether an interval is quarantined: it is not told, and the section has failed."""
        if interval.failure is None or rng.event is Event.RELEASE:
            return False
        assert interval._subscription is not None
        self.notifiers.distrust(interval._subscription)
        return True

    def raised(
        self, interval: IntervalNotifier, callback: str, exc: BaseException, rng: Range
    ) -> BaseException | None:
        """Quarantine an interval that raised; what is to be raised when all have been told.

        An interruption that can still undo the section does so instead: no end will be told.
        """
        interruption = None if isinstance(exc, Exception) else exc
        if interruption is not None and rng.cancellable:
            self.end()
            raise interruption
        self.fail(interval, callback, exc, rng)
        return interruption

    def judge(self, interval: IntervalNotifier, callback: str, done: bool, rng: Range) -> None:
        """Quarantine an interval that returned and has not done what it must."""
        if interval.failure is not None or (done and interval._seq == self.seq):
            return
        wrong = (
            f"left seq {interval._seq}: expected set_seq({self.seq})"
            if done
            else f"returned {done!r}: expected True"
        )
        name = f"{type(interval).__qualname__}.{callback}"
        self.fail(interval, callback, BrokenInvalidate(f"{name} over {rng!r} {wrong}"), rng)

    def fail(
        self, interval: IntervalNotifier, callback: str, error: BaseException, rng: Range
    ) -> None:
        """Quarantine one interval: nothing that it looks up may be used any more."""
        assert interval._subscription is not None
        interval.failure = error
        interval._seq = 0
        self.notifiers.part_failed(interval._subscription, interval, callback, error, rng)

    def _put_in(self, interval: IntervalNotifier) -> None:
        interval._node = self.tree.insert(interval.start, interval.end, interval)

    def _take_out(self, interval: IntervalNotifier) -> None:
        assert interval._node is not None
        self.tree.remove(interval._node)
        interval._node = None


class AtomicIntervals(_Intervals, AtomicDriver):
    """The driver that tells the atomic intervals of an address space."""

    def invalidate_range_start(self, rng: Range) -> bool:
        """Tell those that overlap; -EAGAIN if one of them refuses."""
        hits = self.begin(rng.start, rng.end)
        return not hits or self.tell(hits, rng, "invalidate")

    def invalidate_range_end(self, rng: Range) -> None:
        """Count the section off."""
        self.end()

    def invalidate_page(self, address: int) -> None:
        """A section of one page, whose pte is gone already."""
        rng = one_page(address)
        rng.cancellable = False
        try:
            self.invalidate_range_start(rng)
        finally:
            self.end()

    async def release(self) -> None:
        """Tell all of them the event RELEASE; they stay until they are removed."""
        rng, everyone = self.begin_release()
        try:
            self.tell(everyone, rng, "invalidate")
        finally:
            self.end()


class SleepableIntervals(_Intervals, SleepableDriver):
    """The driver that tells the sleepable intervals of an address space."""

    async def invalidate_range_start(self, rng: Range) -> None:
        """Tell those that overlap."""
        hits = self.begin(rng.start, rng.end)
        if hits:
            await self.tell_each(hits, rng)

    async def invalidate_range_end(self, rng: Range) -> None:
        """Count the section off; does not suspend."""
        self.end()

    async def invalidate_page(self, address: int) -> None:
        """A section of one page, whose pte is gone already."""
        rng = one_page(address)
        rng.cancellable = False
        try:
            await self.invalidate_range_start(rng)
        finally:
            self.end()

    def invalidate_range_start_nonblock(self, rng: Range) -> bool:
        """Tell those that overlap; -EAGAIN if one of them refuses."""
        hits = self.begin(rng.start, rng.end)
        return not hits or self.tell(hits, rng, "invalidate_nonblock")

    def invalidate_range_end_nonblock(self, rng: Range) -> None:
        """Count the section off."""
        self.end()

    async def release(self) -> None:
        """Tell all of them the event RELEASE; they stay until they are removed."""
        rng, everyone = self.begin_release()
        try:
            await self.tell_each(everyone, rng)
        finally:
            self.end()

    async def tell_each(self, hits: Iterable[IntervalNotifier], rng: Range) -> None:
        """Call all of them, one after the other."""
        interrupted: BaseException | None = None
        for interval in hits:
            assert isinstance(interval, SleepableInterval)
            if self.skips(interval, rng):
                continue
            try:
                done = await interval.invalidate(rng, self.seq)
            except BaseException as exc:
                interrupted = self.raised(interval, "invalidate", exc, rng) or interrupted
            else:
                self.judge(interval, "invalidate", done, rng)
        if interrupted is not None:
            raise interrupted


AnyIntervals: TypeAlias = AtomicIntervals | SleepableIntervals
