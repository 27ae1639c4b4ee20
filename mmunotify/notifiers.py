"""The subscriptions of one address space: register, unregister, invalidate, age, release.

The rules are those of mm/mmu_notifier.c, and what 2008 asked of it:

- A driver becomes visible at once and `register` returns when every section that began without it
  is over (I-REG), so nobody is told an end without a start, and nobody translates under a section
  that will not tell it.
- Drivers are called newest first. A list of plain callbacks is walked in one step; a list with
  coroutines is walked in an SRCU read section, which `unregister` and `release` wait for (I-REL).
- ->release runs once, while invalidations are still delivered, and the subscription leaves the list
  only after it (the lesson of 3ad3d901bbcf and d34883d4e35c).
- A callback that raises cannot undo the operation: its driver is quarantined, the section names it
  in `failed`, and its owner leaks the pages instead of reusing them. The others go on.

Uncontended calls never suspend: nothing of the event loop is made before there is something to wait
for, except one shielded cancel scope around ends that are coroutines.
"""

from __future__ import annotations

import contextlib
import errno
import math
import sys
import time
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar, overload

import anyio
import anyio.lowlevel
import attrs
from anyio import CancelScope, get_cancelled_exc_class

from . import log
from .audience import WATCHER, Audience, Call, Subscription, Watcher, distribution_of
from .drivers import (
    AnyDriver,
    AtomicDriver,
    DeferredDriver,
    Driver,
    SleepableDriver,
    check_driver_class,
    one_page,
)
from .errors import (
    AddressSpaceExited,
    AlreadyRegistered,
    CallbackHung,
    CalledFromCallback,
    ForeignThread,
    NotRegistered,
    WouldBlock,
    WrongColour,
)
from .locks import SRCU, LockModel, RwSems, lockdep
from .ranges import Range
from .sections import AtomicSection, NonblockSection, Section
from .watchers import Guard, Tracer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager
    from types import FrameType

    from .primary import Primary

L = TypeVar("L", bound=LockModel)
A = TypeVar("A", bound=AtomicDriver | DeferredDriver)
D = TypeVar("D", bound=AnyDriver)
Failed: TypeAlias = tuple[Subscription[AnyDriver], ...]


@attrs.frozen
class NotifiersStatistics:
    """What `Notifiers.statistics` saw."""

    subscriptions: int
    """Drivers that are told of sections."""
    quarantined: int
    """Drivers that failed and have not been unregistered."""
    open_sections: int
    """Sections that have begun and not ended, of every audience."""
    srcu_readers: int
    """Walks over coroutine callbacks that have begun and not ended, in the whole SRCU domain."""


class Notifiers(Generic[L]):
    """The MMU notifiers of one address space.

    `locks` is the locking model of whoever owns the address spaces (`SpinLocks` or `RwSems`).
    `primary` is what drivers learn in `attach`. `quiesce`, if given, makes an async context manager
    that excludes open sections (mmap_lock for writing, take_all_locks); registration happens inside
    it, and only then may a call site skip its section while `armed` is False. `srcu` is the domain
    of the read sections, one of its own by default. `logger` is a structlog logger.

    Belongs to the event loop that uses it first; other threads have `post`.
    """

    @overload
    def __init__(
        self: Notifiers[RwSems],
        locks: type[RwSems] = ...,
        *,
        name: str = ...,
        primary: Primary | None = ...,
        quiesce: Callable[[], AbstractAsyncContextManager[object]] | None = ...,
        srcu: SRCU | None = ...,
        logger: object = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        locks: type[L],
        *,
        name: str = ...,
        primary: Primary | None = ...,
        quiesce: Callable[[], AbstractAsyncContextManager[object]] | None = ...,
        srcu: SRCU | None = ...,
        logger: object = ...,
    ) -> None: ...
    def __init__(
        self,
        locks: type[LockModel] = RwSems,
        *,
        name: str = "mm",
        primary: Primary | None = None,
        quiesce: Callable[[], AbstractAsyncContextManager[object]] | None = None,
        srcu: SRCU | None = None,
        logger: object = None,
    ) -> None:
        self.locks: Final = locks
        self.name: Final = name
        self.primary: Final = primary
        self.srcu: Final = srcu if srcu is not None else SRCU(f"srcu of {name}")
        self.armed = False
        """Whether anybody has to be told; a plain attribute, for call sites to test."""
        self._quiesce = quiesce
        self._log = log.Log(logger, mm=name)
        self._thread = 0
        self._token: Any = None
        self._subscriptions: list[Subscription[AnyDriver]] = []
        self._shared: dict[type[Driver], Subscription[AnyDriver]] = {}
        self._tracer: Tracer | None = None
        self._audience = self._listed()
        self._draining: list[Audience] = []
        self._drained: list[tuple[set[Audience], Callable[[], object]]] = []
        self._exiting = False

    def __repr__(self) -> str:
        drivers = ", ".join(sub.name for sub in self._audience.subscriptions) or "nobody"
        return f"<Notifiers {self.name} ({self.locks.__name__}): {drivers}>"

    # ------------------------------------------------------------------ registration

    @overload
    async def register(self, driver: A) -> Subscription[A]: ...
    @overload
    async def register(self: Notifiers[RwSems], driver: D) -> Subscription[D]: ...
    async def register(self, driver: AnyDriver) -> Subscription[AnyDriver]:
        """Subscribe a driver; it is told of every section that begins from now on.

        Returns when every section that began without it is over (I-REG); only then may the driver
        translate. Takes the owner's `quiesce`; may suspend; not to be called inside a section or a
        callback of this address space. Cancelled, it leaves nothing registered.

        Raises AlreadyRegistered (an instance serves one address space, once), WrongColour (also a
        SleepableDriver on SpinLocks), UnknownCallback, AddressSpaceExited, CalledFromCallback, and
        what `attach` raises. Source: mmu_notifier_register.
        """
        return await self._register(driver, self._quiesce)

    @overload
    async def register_locked(self, driver: A) -> Subscription[A]: ...
    @overload
    async def register_locked(self: Notifiers[RwSems], driver: D) -> Subscription[D]: ...
    async def register_locked(self, driver: AnyDriver) -> Subscription[AnyDriver]:
        """`register` for a caller that is inside `quiesce` already, as a driver's mmap is.

        Source: __mmu_notifier_register, which the GRU needed.
        """
        return await self._register(driver, None)

    async def unregister(
        self, subscription: Subscription[AnyDriver], *, grace: float = math.inf
    ) -> None:
        """End a subscription: when this returns no callback of the driver runs or will run.

        `release` has then run exactly once, here or in the exit of the address space. May suspend;
        is not cancelled half-way: a cancellation is raised when it is done. `grace` is how many
        seconds a callback may take before CallbackHung is raised instead (the driver is off the
        list even so). Raises NotRegistered for a subscription of `get`, of another address space,
        or already unregistered, and CalledFromCallback inside any callback. Source:
        mmu_notifier_unregister.
        """
        self._enter()
        if subscription.notifiers is not self or subscription.users or subscription.over:
            raise NotRegistered(
                f"{subscription!r}: expected a subscription made by register of {self.name}, "
                "not yet unregistered"
            )
        self._refuse_in_callback("unregister")
        subscription.over = True
        await self._retire(subscription, grace)
        self._free(subscription)
        self._log.emit(log.DRIVER_UNREGISTERED, driver=subscription.name)

    @overload
    def attached(
        self, driver: A, *, grace: float = ...
    ) -> AbstractAsyncContextManager[Subscription[A]]: ...
    @overload
    def attached(
        self: Notifiers[RwSems], driver: D, *, grace: float = ...
    ) -> AbstractAsyncContextManager[Subscription[D]]: ...
    def attached(
        self, driver: AnyDriver, *, grace: float = math.inf
    ) -> AbstractAsyncContextManager[Subscription[AnyDriver]]:
        """`register` on entry, `unregister` on exit, with its `grace` in seconds."""
        return self._attached(driver, grace)

    @overload
    async def get(
        self, driver_type: type[A], factory: Callable[[], A] | None = ...
    ) -> Subscription[A]: ...
    @overload
    async def get(
        self: Notifiers[RwSems], driver_type: type[D], factory: Callable[[], D] | None = ...
    ) -> Subscription[D]: ...
    async def get(
        self, driver_type: type[Any], factory: Callable[[], Any] | None = None
    ) -> Subscription[Any]:
        """The address space's one shared instance of `driver_type`, made and registered if need be.

        Each `get` is given back by one `put`. `factory` makes the instance (by default
        `driver_type()`). May suspend like `register` and raises what it raises. Source:
        mmu_notifier_get.
        """
        return await self._get(driver_type, factory, self._quiesce)

    @overload
    async def get_locked(
        self, driver_type: type[A], factory: Callable[[], A] | None = ...
    ) -> Subscription[A]: ...
    @overload
    async def get_locked(
        self: Notifiers[RwSems], driver_type: type[D], factory: Callable[[], D] | None = ...
    ) -> Subscription[D]: ...
    async def get_locked(
        self, driver_type: type[Any], factory: Callable[[], Any] | None = None
    ) -> Subscription[Any]:
        """`get` for a caller that is inside `quiesce` already. Source: mmu_notifier_get_locked."""
        return await self._get(driver_type, factory, None)

    def put(self, subscription: Subscription[AnyDriver]) -> None:
        """Give a reference of `get` back; allowed inside callbacks, never suspends.

        The last one takes the driver off the list and queues its `free` behind every section and
        callback that may still see it. `release` is not called: the driver must have dropped its
        translations itself. Raises NotRegistered if there is no reference to give back. Source:
        mmu_notifier_put.
        """
        self._enter()
        if subscription.notifiers is not self or subscription.users == 0:
            raise NotRegistered(
                f"{subscription!r}: expected a subscription made by get of {self.name}, with a "
                "reference left"
            )
        subscription.users -= 1
        if subscription.users == 0:
            subscription.over = True
            del self._shared[type(subscription.driver)]
            self._unhash(subscription)
            self._after_sections(lambda: self.srcu.call(lambda: self._free(subscription)))

    async def release(self) -> None:
        """The address space exits: every driver's `release`, newest first, then off the list.

        Call it before any page of the address space is freed. Invalidations that come from the
        reverse map go on being delivered until each driver's release has returned. Nobody can
        register afterwards. May suspend; a cancellation is raised when it is done. A second call
        returns at once. Source: __mmu_notifier_release.
        """
        self._enter()
        if self._exiting:
            return
        self._exiting = True
        began = time.monotonic_ns()
        leaving = tuple(self._subscriptions)
        interrupted: BaseException | None = None
        with CancelScope(shield=True) as scope:
            for sub in leaving:
                interrupted = await self._release_one(sub, scope) or interrupted
            for sub in leaving:
                self._unhash(sub)
            interrupted = await self._grace_period("exit", scope) or interrupted
        self._log.emit(
            log.ADDRESS_SPACE_RELEASED,
            drivers=[sub.name for sub in leaving],
            duration_ns=time.monotonic_ns() - began,
        )
        if interrupted is not None:
            raise interrupted

    # ------------------------------------------------------------------ sections

    def invalidating(self, rng: Range, *, sync: bool = True) -> Section:
        """`async with`: drivers drop `rng` on entry and may look it up again on exit.

        Change the page tables inside, release the pages after: none of those of a section whose
        `failed` is not empty. With sync=False (locks are held that a sync must not run under) the
        deferred drivers finish in `await section.sync()`, which the caller owes.
        """
        return Section(self, rng, sync)

    def invalidating_atomic(self, rng: Range) -> AtomicSection:
        """`with`: the same under a spinlock; ScheduleWhileAtomic if a sleepable driver is there.

        The caller owes `await section.sync()`: after the locks are dropped, before pages are freed.
        """
        return AtomicSection(self, rng)

    def invalidating_nonblock(self, rng: Range) -> NonblockSection:
        """`with`: a section that must not suspend; raises WouldBlock (-EAGAIN) on entry."""
        return NonblockSection(self, rng)

    async def invalidate(self, rng: Range) -> Failed:
        """Start, end and sync at once, for ptes that are gone already (a gather that flushes).

        Shielded: the change cannot be undone. Release the pages after it returns, but for what
        failed.
        """
        interrupted: BaseException | None = None
        told = self._audience
        if not (told.suspends or told.sync_calls):
            return self.invalidate_range_end_atomic(rng, self.invalidate_range_start_atomic(rng))
        self._enter()
        told.open += 1
        for calls in (told.start_calls, told.end_calls, told.sync_calls):
            if calls:
                raised = await self._tell(calls, rng, concurrent=told.concurrent)
                interrupted = interrupted or raised
        self._close(told)
        if interrupted is not None:
            raise interrupted
        return told.failed

    def invalidate_atomic(self, rng: Range) -> Audience:
        """Start and end at once under the page table lock, for ptes that are gone already.

        Hand what it returns to `invalidate_range_sync` if it has `sync_calls`.
        """
        told = self.invalidate_range_start_atomic(rng)
        self.invalidate_range_end_atomic(rng, told)
        return told

    async def invalidate_range_start(self, rng: Range) -> Audience:
        """Tell every driver to drop `rng` and make no translation there until the end.

        Before the first pte changes. Give what it returns to `invalidate_range_end`, whatever
        happens in between. May suspend only in sleepable drivers. Cancelled (or interrupted by
        what is no Exception), it ends those that had been told, and the section never was.
        """
        told = self._audience
        if not told.suspends:
            return self.invalidate_range_start_atomic(rng)
        told.open += 1
        if told.concurrent:
            await self._start_concurrently(told, rng)
            return told
        srcu = self.srcu
        index = srcu.read_lock()
        try:
            for start in told.suspending_starts:
                try:
                    await start(rng)
                except BaseException as exc:
                    position = told.suspending_starts.index(start)
                    if not self._survives(told.start_calls[position], exc, rng):
                        await self._undo_start(told, told.start_calls[:position], rng)
                        raise
        finally:
            srcu.read_unlock(index)
        return told

    async def invalidate_range_end(self, rng: Range, told: Audience) -> Failed:
        """Tell whoever was told the start, and is still there, that `rng` may be looked up again.

        Not cancelled half-way: a native asyncio cancellation interrupts the one callback that it
        lands in, whose driver is quarantined, and is raised when the others have been told. Returns
        who failed since the start: leak the pages of the section instead of reusing them.
        """
        if not told.suspends:
            return self.invalidate_range_end_atomic(rng, told)
        interrupted: BaseException | None = None
        if told is self._audience and told.ends_suspend and not told.concurrent:
            srcu = self.srcu
            index = srcu.read_lock()
            with CancelScope(shield=True):
                for end in told.suspending_ends:
                    try:
                        await end(rng)
                    except BaseException as exc:
                        call = told.end_calls[told.suspending_ends.index(end)]
                        interrupted = self._raised(call, exc, rng) or interrupted
            srcu.read_unlock(index)
        else:
            interrupted = await self._tell(told.end_calls, rng, concurrent=told.concurrent)
        self._close(told)
        if interrupted is not None:
            raise interrupted
        return told.failed

    async def invalidate_range_sync(self, rng: Range, told: Audience) -> Failed:
        """Let the deferred drivers finish; after the locks are dropped, before pages are freed."""
        if not told.sync_calls:
            return told.failed
        interrupted = await self._tell(told.sync_calls, rng)
        if interrupted is not None:
            raise interrupted
        return told.failed

    def invalidate_range_start_atomic(self, rng: Range) -> Audience:
        """`invalidate_range_start` in one step, legal under spinlocks.

        Raises ScheduleWhileAtomic if a driver is there that can only be told by a coroutine.
        """
        told = self._audience
        told.open += 1
        for start in told.starts:
            try:
                start(rng)
            except BaseException as exc:
                if told.suspends:
                    self._close(told)
                    raise
                position = told.starts.index(start)
                if not self._survives(told.start_calls[position], exc, rng):
                    self._undo_plain(told, told.start_calls[:position], told.end_calls, rng)
                    raise
        return told

    def invalidate_range_end_atomic(self, rng: Range, told: Audience) -> Failed:
        """`invalidate_range_end` in one step, legal under spinlocks."""
        if told is not self._audience:
            return self._end_from(told, 0, rng)
        for end in told.ends:
            try:
                end(rng)
            except BaseException as exc:
                position = told.ends.index(end)
                interrupted = self._raised(told.end_calls[position], exc, rng)
                return self._end_from(told, position + 1, rng, interrupted)
        told.open -= 1
        if told is not self._audience:  # a callback has put its subscription
            self._drain(told)
        return ()

    def invalidate_range_start_nonblock(self, rng: Range) -> Audience:
        """`invalidate_range_start` of a section that must not suspend (the OOM reaper).

        Raises WouldBlock, naming the driver, when one would have to wait: those told before it have
        then been told the end, the one that refused has not. Source:
        mmu_notifier_invalidate_range_start_nonblock.
        """
        self._enter()
        rng.blockable = False
        told = self._audience
        told.open += 1
        for position, call in enumerate(told.nonblock_calls):
            try:
                refused = call.callback(rng) is False
            except BaseException as exc:
                if self._survives(call, exc, rng):
                    continue
                self._undo_plain(told, told.nonblock_calls[:position], told.nonblock_ends, rng)
                raise
            if refused:
                self._undo_plain(told, told.nonblock_calls[:position], told.nonblock_ends, rng)
                name = call.subscription.name
                self._log.emit(
                    log.SECTION_REFUSED,
                    driver=name,
                    start=rng.start,
                    end=rng.end,
                    reason=rng.event.name,
                )
                raise WouldBlock(
                    errno.EAGAIN, f"{name} would have to wait in {rng!r}: non-blockable section"
                )
        return told

    def invalidate_range_end_nonblock(self, rng: Range, told: Audience) -> Failed:
        """The end of a non-blockable section."""
        interrupted = self._tell_plain(told.nonblock_ends, rng)
        self._close(told)
        if interrupted is not None:
            raise interrupted
        return told.failed

    # ------------------------------------------------------------------ single pages, ageing

    def invalidate_page_atomic(self, address: int) -> Audience:
        """2008's single-page notification, under the page table lock, the pte already cleared.

        Hand what it returns to `invalidate_range_sync` if it has `sync_calls`. Raises
        ScheduleWhileAtomic if a driver is there that can only be told by a coroutine.
        """
        self._enter()
        told = self._audience
        if told.suspends:
            told.starts[0](one_page(address))  # refuses
        told.open += 1
        interrupted = self._tell_plain(told.page_calls, address)
        self._close(told)
        if interrupted is not None:
            raise interrupted
        return told

    async def invalidate_page(self, address: int) -> Failed:
        """2008's single-page notification after the page table lock was dropped, sync included.

        Shielded, like `invalidate`.
        """
        self._enter()
        told = self._audience
        told.open += 1
        interrupted = await self._tell(told.page_calls, address)
        if told.sync_calls:
            interrupted = await self._tell(told.sync_calls, one_page(address)) or interrupted
        self._close(told)
        if interrupted is not None:
            raise interrupted
        return told.failed

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Clear and flush the drivers' accessed bits of [start, end); whether any was set.

        Every driver is asked (I-AGE). Under the page table lock; never suspends.
        """
        return self._ask(self._audience.clear_flush_young, start, end, all_of_them=True)

    def clear_young(self, start: int, end: int) -> bool:
        """Like `clear_flush_young`, without the flush."""
        return self._ask(self._audience.clear_young, start, end, all_of_them=True)

    def test_young(self, address: int) -> bool:
        """Whether any driver has used the page at `address`; stops at the first that says yes."""
        return self._ask(self._audience.test_young, address, all_of_them=False)

    # ------------------------------------------------------------------ threads, traces, numbers

    def post(self, rng: Range) -> Failed:
        """From another thread: `invalidate(rng)` on the event loop, and wait until it is done.

        The one entry for other threads. Raises ForeignThread on the loop's own thread, which would
        wait for itself, and before the loop has used these notifiers at all.
        """
        if self._token is None or get_ident() == self._thread:
            raise ForeignThread(
                f"post to {self.name}: expected a thread other than the event loop's, after the "
                "loop has used these notifiers; on the loop, await invalidate"
            )
        from anyio import from_thread

        return from_thread.run(self.invalidate, rng, token=self._token)

    @property
    def trace(self) -> Callable[[log.Record], object] | None:
        """Where hot events go, or None (the default: nothing is recorded, and it costs nothing).

        Assign any callable that takes a `log.Record`, such as a `Ring`'s append; what it raises,
        the operation raises.
        """
        return self._tracer.emit if self._tracer is not None else None

    @trace.setter
    def trace(self, emit: Callable[[log.Record], object] | None) -> None:
        self._tracer = None if emit is None else Tracer(self, emit)
        self._replace()

    def statistics(self) -> NotifiersStatistics:
        """What a debugger would ask; nothing is counted for it on the way."""
        subscriptions = self._subscriptions
        return NotifiersStatistics(
            subscriptions=sum(sub.hashed for sub in subscriptions),
            quarantined=sum(sub.failure is not None for sub in subscriptions),
            open_sections=self._audience.open + sum(told.open for told in self._draining),
            srcu_readers=self.srcu.readers,
        )

    # ------------------------------------------------------------------ inside: who is told

    def _enter(self) -> None:
        """Bind to the first thread that comes; refuse all others."""
        if get_ident() == self._thread:
            return
        if self._thread:
            raise ForeignThread(
                f"{self.name} belongs to the event loop of another thread: expected a call from "
                "that thread, or post()"
            )
        self._thread = get_ident()
        with contextlib.suppress(anyio.NoEventLoopError):  # plain calls need no loop
            self._token = anyio.lowlevel.current_token()

    def _listed(self) -> Audience:
        watchers: list[Watcher] = [] if self._tracer is None else [self._tracer]
        if lockdep.enabled:
            watchers.append(Guard(self, self._enter))
        return Audience((sub for sub in self._subscriptions if sub.hashed), watchers)

    def _replace(self) -> None:
        """Publish the list as it is now; sections already open keep theirs."""
        old = self._audience
        self._audience = self._listed()
        self.armed = bool(self._audience.subscriptions) or self._tracer is not None
        if old.open:
            self._draining.append(old)

    def _close(self, told: Audience) -> None:
        told.open -= 1
        if told is not self._audience:
            self._drain(told)

    def _drain(self, told: Audience) -> None:
        """An old audience has lost a section: if it was the last, somebody waits for that."""
        if told.open:
            return
        self._draining.remove(told)
        for awaited, _ in self._drained:
            awaited.discard(told)
        over = [done for awaited, done in self._drained if not awaited]
        self._drained = [entry for entry in self._drained if entry[0]]
        for done in over:
            done()

    def _after_sections(self, done: Callable[[], object]) -> None:
        """Call `done` when every section of an older audience is over."""
        if self._draining:
            self._drained.append((set(self._draining), done))
        else:
            done()

    def _unhash(self, sub: Subscription[AnyDriver]) -> None:
        if sub in self._subscriptions:
            self._subscriptions.remove(sub)
        if sub.hashed:
            sub.hashed = False
            self._replace()

    # ------------------------------------------------------------------ inside: coming and going

    async def _register(
        self,
        driver: AnyDriver,
        quiesce: Callable[[], AbstractAsyncContextManager[object]] | None,
    ) -> Subscription[AnyDriver]:
        self._enter()
        self._refuse_in_callback("register")
        async with quiesce() if quiesce is not None else contextlib.nullcontext():
            sub = self._publish(driver)
            try:
                await self._sections_over()
            except BaseException:
                # Sections that it was told of may be open: it leaves as any registered driver.
                await self._retire(sub, math.inf)
                raise
        self._log.emit(log.DRIVER_REGISTERED, driver=sub.name)
        return sub

    async def _get(
        self,
        driver_type: type[AnyDriver],
        factory: Callable[[], AnyDriver] | None,
        quiesce: Callable[[], AbstractAsyncContextManager[object]] | None,
    ) -> Subscription[AnyDriver]:
        self._enter()
        self._refuse_in_callback("get")
        async with quiesce() if quiesce is not None else contextlib.nullcontext():
            sub = self._shared.get(driver_type)
            if sub is None:
                sub = self._shared[driver_type] = self._publish((factory or driver_type)())
                self._log.emit(log.DRIVER_REGISTERED, driver=sub.name)
            sub.users += 1
            try:
                await self._sections_over()
            except BaseException:
                self.put(sub)
                raise
        return sub

    def _publish(self, driver: AnyDriver) -> Subscription[AnyDriver]:
        """Check a driver, attach it and put it on the list; in one step, or not at all."""
        check_driver_class(type(driver))
        if isinstance(driver, SleepableDriver) and not self.locks.sleepable:
            raise WrongColour(
                f"{type(driver).__qualname__} is a SleepableDriver: expected an AtomicDriver or a "
                f"DeferredDriver, because {self.name} has {self.locks.__name__}"
            )
        if driver.serves is not None:
            raise AlreadyRegistered(
                f"this {type(driver).__qualname__} serves {driver.serves}: expected an instance "
                "that was never registered, because one instance serves one address space"
            )
        if self._exiting:
            raise AddressSpaceExited(
                f"{self.name} has exited: expected to register {type(driver).__qualname__} while "
                "mm_users > 0"
            )
        driver.attach(self.primary)
        driver.serves = self.name
        sub = Subscription(driver, self)
        sub.hashed = True
        first = 0 if driver.precedes else sum(s.driver.precedes for s in self._subscriptions)
        self._subscriptions.insert(first, sub)
        self._replace()
        return sub

    async def _sections_over(self) -> None:
        """Wait until every section that began before this call with an older list is over."""
        if self._draining:
            over = anyio.Event()
            self._after_sections(over.set)
            await over.wait()

    @contextlib.asynccontextmanager
    async def _attached(
        self, driver: AnyDriver, grace: float
    ) -> AsyncIterator[Subscription[AnyDriver]]:
        sub = await self._register(driver, self._quiesce)
        try:
            yield sub
        finally:
            await self.unregister(sub, grace=grace)

    async def _retire(self, sub: Subscription[AnyDriver], grace: float) -> None:
        """Release, take off the list, and wait for callbacks that still run; to the end."""
        sub.over = True
        deadline = math.inf if grace == math.inf else anyio.current_time() + grace
        interrupted: BaseException | None = None
        with CancelScope(shield=True, deadline=deadline) as scope:
            try:
                interrupted = await self._release_one(sub, scope)
            finally:
                self._unhash(sub)
            interrupted = await self._grace_period(f"unregister {sub.name}", scope) or interrupted
        if scope.cancelled_caught:
            raise CallbackHung(
                f"unregister {sub.name} from {self.name}: expected its callbacks to return within "
                f"{grace} s; still running: {', '.join(self._running()) or 'release'}"
            )
        if interrupted is not None:
            raise interrupted

    async def _release_one(
        self, sub: Subscription[AnyDriver], scope: CancelScope
    ) -> BaseException | None:
        """Have `release` run once, by us or by whoever was first; how it was interrupted."""
        if sub.release_begun:
            if sub.release_done:
                return None
            sub.release_waiter = sub.release_waiter or anyio.Event()
            return await self._persist(sub.release_waiter.wait, scope)
        sub.release_begun = True
        index = self.srcu.read_lock()
        release = sub.driver.release
        try:
            await release()
        except BaseException as exc:
            self._failed(sub, "release", exc, None)
            if scope.cancel_called:
                raise
            return None if isinstance(exc, Exception) else exc
        finally:
            self.srcu.read_unlock(index)
            sub.release_done = True
            if sub.release_waiter is not None:
                sub.release_waiter.set()
        return None

    async def _grace_period(self, reason: str, scope: CancelScope) -> BaseException | None:
        if self.srcu.readers:
            self._log.emit(log.WAITING_FOR_CALLBACKS, drivers=self._running(), reason=reason)
        return await self._persist(self.srcu.synchronize, scope)

    async def _persist(
        self, wait: Callable[[], Awaitable[object]], scope: CancelScope
    ) -> BaseException | None:
        """Wait to the end within `scope`; the native cancellation that came meanwhile, if any."""
        interrupted: BaseException | None = None
        while True:
            try:
                await wait()
            except get_cancelled_exc_class() as exc:
                if scope.cancel_called:
                    raise
                interrupted = exc
            else:
                return interrupted

    def _running(self) -> list[str]:
        """In which drivers' callbacks tasks are suspended now, as "driver.callback in task".

        Read off the frames of the tasks, so that dispatch has nothing to write down.
        """
        return [
            f"{found} in task {task.name}"
            for task in anyio.get_running_tasks()
            for found in self._callbacks_of(lockdep.await_frames(task.coro))
        ]

    def _callbacks_of(self, frames: Iterable[FrameType]) -> Iterator[str]:
        for frame in frames:
            variable = _CALLING.get(frame.f_code)
            if variable is not None and frame.f_locals["self"].srcu is self.srcu:
                yield getattr(frame.f_locals.get(variable), "__qualname__", frame.f_code.co_name)

    def _free(self, sub: Subscription[AnyDriver]) -> None:
        try:
            sub.driver.free()
        except Exception as exc:
            self._failed(sub, "free", exc, None)

    def _refuse_in_callback(self, what: str) -> None:
        """Raise if this task is inside a callback of our SRCU domain: it would wait for itself."""
        for found in self._callbacks_of(_calling_frames()):
            raise CalledFromCallback(
                f"{what} at {self.name} inside {found}: it would wait for the callback to return; "
                "put is allowed there, or use a task of your own"
            )

    # ------------------------------------------------------------------ inside: telling

    async def _tell(
        self, calls: tuple[Call, ...], what: Range | int, *, concurrent: bool = False
    ) -> BaseException | None:
        """Make every call, to the end; what interrupted one of them, to be raised afterwards."""
        if not any(call.suspends for call in calls):
            return self._tell_plain(calls, what)
        interruptions: list[BaseException] = []
        index = self.srcu.read_lock()
        try:
            with CancelScope(shield=True):
                if concurrent:
                    await self._together(calls, self._finish, what, interruptions)
                else:
                    for call in calls:
                        await self._finish(call, what, interruptions)
        finally:
            self.srcu.read_unlock(index)
        return interruptions[0] if interruptions else None

    async def _finish(
        self, call: Call, what: Range | int, interruptions: list[BaseException]
    ) -> None:
        """One call of `_tell`: whatever it raises, the others are still told."""
        sub, callback, suspends, _ = call
        if not sub.hashed:
            return
        try:
            if suspends:
                await callback(what)
            else:
                callback(what)
        except BaseException as exc:
            interrupted = self._raised(call, exc, what)
            if interrupted is not None:
                interruptions.append(interrupted)

    async def _begin(self, call: Call, rng: Range, done: list[Call]) -> None:
        """One start among concurrent ones: `done` gets it when it has succeeded."""
        sub, start, suspends, _ = call
        if not sub.hashed:
            return
        try:
            if suspends:
                await start(rng)
            else:
                start(rng)
        except BaseException as exc:
            if not self._survives(call, exc, rng):
                raise
        else:
            done.append(call)

    async def _together(
        self, calls: Iterable[Call], tell: Callable[..., Coroutine[Any, Any, None]], *args: object
    ) -> None:
        """`tell` each call: those that opt in at the same time, the others in order meanwhile."""
        in_order = []
        async with anyio.create_task_group() as tasks:
            for call in calls:
                if call.suspends and call.subscription.driver.concurrent:
                    tasks.start_soon(tell, call, *args)
                else:
                    in_order.append(call)
            for call in in_order:
                await tell(call, *args)

    async def _start_concurrently(self, told: Audience, rng: Range) -> None:
        done: list[Call] = []
        index = self.srcu.read_lock()
        try:
            await self._together(told.start_calls, self._begin, rng, done)
        except BaseException:
            await self._undo_start(told, done, rng)
            raise
        finally:
            self.srcu.read_unlock(index)

    def _tell_plain(self, calls: Iterable[Call], what: Range | int) -> BaseException | None:
        """`_tell` in one step."""
        interrupted: BaseException | None = None
        for call in calls:
            if call.subscription.hashed:
                try:
                    call.callback(what)
                except BaseException as exc:
                    interrupted = self._raised(call, exc, what) or interrupted
        return interrupted

    async def _undo_start(self, told: Audience, done: Iterable[Call], rng: Range) -> None:
        """The section will not be: end it for those whose start has succeeded."""
        await self._tell(_calls_of(done, told.end_calls), rng, concurrent=told.concurrent)
        self._close(told)

    def _undo_plain(
        self, told: Audience, done: Iterable[Call], ends: tuple[Call, ...], rng: Range
    ) -> None:
        self._tell_plain(_calls_of(done, ends), rng)
        self._close(told)

    def _end_from(
        self, told: Audience, position: int, rng: Range, interrupted: BaseException | None = None
    ) -> Failed:
        interrupted = self._tell_plain(told.end_calls[position:], rng) or interrupted
        self._close(told)
        if interrupted is not None:
            raise interrupted
        return told.failed

    def _ask(self, calls: tuple[Call, ...], *args: int, all_of_them: bool) -> bool:
        if not calls:
            return False
        told = self._audience
        told.open += 1  # a put inside a callback must not free what is being walked
        young = False
        try:
            for call in calls:
                if young and not all_of_them:
                    break
                try:
                    young |= bool(call.callback(*args))
                except BaseException as exc:
                    if not self._survives(call, exc, args[0]):
                        raise
        finally:
            self._close(told)
        return young

    def _survives(self, call: Call, exc: BaseException, what: Range | int) -> bool:
        """Whether a start that raised lets the section go on, without the driver that failed.

        A cancellation or KeyboardInterrupt does not, nor does what the listener of `trace` raised.
        """
        if isinstance(exc, Exception) and call.name != WATCHER:
            self._quarantine(call, exc, what)
            return True
        return False

    def _raised(self, call: Call, exc: BaseException, what: Range | int) -> BaseException | None:
        """A callback raised in what must go on: quarantine it; what is to be raised afterwards."""
        if call.name == WATCHER:
            return exc
        self._quarantine(call, exc, what)
        return None if isinstance(exc, Exception) else exc

    def _quarantine(self, call: Call, exc: BaseException, what: Range | int) -> None:
        sub = call.subscription
        if sub.hashed:
            sub.hashed = False
            self._replace()
        self._failed(sub, call.name, exc, what)

    def _failed(
        self,
        sub: Subscription[AnyDriver],
        callback: str,
        exc: BaseException,
        what: Range | int | None,
    ) -> None:
        sub.failure = exc
        module = type(sub.driver).__module__
        where = (
            {"start": what.start, "end": what.end}
            if isinstance(what, Range)
            else {}
            if what is None
            else {"start": what}
        )
        self._log.emit(
            log.DRIVER_FAILED,
            driver=sub.name,
            module=module,
            distribution=distribution_of(module),
            callback=callback,
            error=repr(exc),
            exc_info=exc,
            **where,
        )


def _calls_of(done: Iterable[Call], calls: tuple[Call, ...]) -> tuple[Call, ...]:
    """Those of `calls` whose subscription is among those of `done`."""
    told = {call.subscription for call in done}
    return tuple(call for call in calls if call.subscription in told)


def _calling_frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


# The frames that are on the stack while a callback runs, and which variable holds it there.
_CALLING: Final = {
    method.__code__: variable
    for method, variable in (
        (Notifiers.invalidate_range_start, "start"),
        (Notifiers.invalidate_range_end, "end"),
        (Notifiers.invalidate_range_start_atomic, "start"),
        (Notifiers.invalidate_range_end_atomic, "end"),
        (Notifiers.invalidate_range_start_nonblock, "call"),
        (Notifiers._begin, "start"),
        (Notifiers._finish, "callback"),
        (Notifiers._tell_plain, "call"),
        (Notifiers._ask, "call"),
        (Notifiers._release_one, "release"),
    )
}
