"""The subscriptions of one address space: who registers, who leaves, and when it is over.

The rules are those of mm/mmu_notifier.c, and what 2008 asked of it:

- A driver becomes visible at once and `register` returns when every section that began without it
  is over (I-REG), so nobody is told an end without a start, and nobody translates under a section
  that will not tell it.
- ->release runs once, while invalidations are still delivered, and the subscription leaves the list
  only after it (the lesson of 3ad3d901bbcf and d34883d4e35c); `unregister` and the exit then wait
  for the callbacks that still run, by an SRCU grace period (I-REL).
"""

from __future__ import annotations

import contextlib
import math
import time
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, overload

import anyio
import attrs
from anyio import CancelScope, get_cancelled_exc_class

from . import log
from .audience import Subscription
from .dispatch import CALLING, Dispatch, Failed
from .drivers import (
    AnyDriver,
    AtomicDriver,
    DeferredDriver,
    Driver,
    SleepableDriver,
    check_driver,
)
from .errors import (
    AddressSpaceExited,
    AlreadyRegistered,
    CallbackHung,
    ForeignThread,
    NotRegistered,
    WrongColour,
)
from .locks import SRCU, LockModel, RwSems
from .sections import AtomicSection, NonblockSection, Section

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from .primary import Primary
    from .ranges import Range

L = TypeVar("L", bound=LockModel)
A = TypeVar("A", bound=AtomicDriver | DeferredDriver)
D = TypeVar("D", bound=AnyDriver)


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


class Notifiers(Dispatch, Generic[L]):
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
        super().__init__(name, srcu, logger)
        self.locks: Final = locks
        self.primary: Final = primary
        self._quiesce = quiesce
        self._shared: dict[type[Driver], Subscription[AnyDriver]] = {}
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
        if subscription.owner is not self or subscription.users or subscription.over:
            raise NotRegistered(
                f"{subscription!r}: expected a subscription made by register of {self.name}, "
                "not yet unregistered"
            )
        self.refuse_in_callback("unregister")
        subscription.over = True
        await self._retire(subscription, grace)
        self._bury(subscription)

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
        `driver_type()`). The first may suspend like `register`, and raises what it raises; when
        that has returned, the others take no lock and do not suspend. Source: mmu_notifier_get.
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
        if subscription.owner is not self or subscription.users == 0:
            raise NotRegistered(
                f"{subscription!r}: expected a subscription made by get of {self.name}, with a "
                "reference left"
            )
        subscription.users -= 1
        if subscription.users == 0:
            subscription.over = True
            self._shared = {
                asked: sub for asked, sub in self._shared.items() if sub is not subscription
            }
            self._unhash(subscription)
            self._after_sections(lambda: self.srcu.call(lambda: self._bury(subscription)))

    async def barrier(self) -> None:
        """Wait until every driver that has been put for the last time is freed.

        For whoever unloads a driver's code. Raises CalledFromCallback inside any callback. Source:
        mmu_notifier_synchronize, which today no longer waits for the queued callbacks.
        """
        self._enter()
        self.refuse_in_callback("barrier")
        self.might_wait_for_sections("barrier")
        await self._sections_over()
        await self.srcu.barrier()

    async def release(self) -> None:
        """The address space exits: every driver's `release`, newest first, then off the list.

        Call it before any page of the address space is freed. Invalidations that come from the
        reverse map go on being delivered until each driver's release has returned. Nobody can
        register afterwards. May suspend; a cancellation is raised when it is done. A second call
        returns at once. Raises CalledFromCallback inside any callback, as the last put of an
        address space would be there. Source: __mmu_notifier_release.
        """
        self._enter()
        if self._exiting:
            return
        self.refuse_in_callback("release")
        self._exiting = True
        began = time.monotonic_ns()
        leaving = tuple(self._subscriptions)
        interrupted: BaseException | None = None
        with CancelScope(shield=True) as scope:
            for sub in leaving:
                if sub.release_begun or not sub.over:  # else it was put meanwhile
                    interrupted = await self._release_one(sub, scope) or interrupted
            for sub in leaving:
                if not sub.driver.passes_on:
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

    # ------------------------------------------------------------------ threads, numbers

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

    def statistics(self) -> NotifiersStatistics:
        """What a debugger would ask; nothing is counted for it on the way."""
        subscriptions = self._subscriptions
        return NotifiersStatistics(
            subscriptions=sum(sub.hashed for sub in subscriptions),
            quarantined=sum(sub.failure is not None for sub in subscriptions),
            open_sections=self._audience.open + sum(told.open for told in self._draining),
            srcu_readers=self.srcu.readers,
        )

    # ------------------------------------------------------------------ inside: coming and going

    async def _register(
        self,
        driver: AnyDriver,
        quiesce: Callable[[], AbstractAsyncContextManager[object]] | None,
    ) -> Subscription[AnyDriver]:
        self._enter()
        self.refuse_in_callback("register")
        self.might_wait_for_sections("register")
        sub: Subscription[AnyDriver] | None = None
        try:
            async with quiesce() if quiesce is not None else contextlib.nullcontext():
                sub = self._publish(driver)
                await self._sections_over()
        except BaseException:
            if sub is not None:
                # Sections that it was told of may be open: it leaves as any registered driver.
                await self._retire(sub, math.inf)
                self._free(sub)
            raise
        sub.settled = True
        self._log.emit(log.DRIVER_REGISTERED, driver=sub.name)
        return sub

    async def _get(
        self,
        driver_type: type[AnyDriver],
        factory: Callable[[], AnyDriver] | None,
        quiesce: Callable[[], AbstractAsyncContextManager[object]] | None,
    ) -> Subscription[AnyDriver]:
        self._enter()
        self.refuse_in_callback("get")
        self._refuse_after_exit(driver_type)
        sub = self._shared.get(driver_type)
        if sub is not None and sub.settled:
            sub.users += 1
            return sub
        self.might_wait_for_sections("get")
        taken: Subscription[AnyDriver] | None = None
        try:
            async with quiesce() if quiesce is not None else contextlib.nullcontext():
                self._refuse_after_exit(driver_type)
                sub = self._shared.get(driver_type)
                if sub is None:
                    sub = self._shared[driver_type] = self._publish((factory or driver_type)())
                    self._log.emit(log.DRIVER_REGISTERED, driver=sub.name)
                sub.users += 1
                taken = sub
                await self._sections_over()
        except BaseException:
            if taken is not None:
                self.put(taken)
            raise
        taken.settled = True
        return taken

    def _publish(self, driver: AnyDriver) -> Subscription[AnyDriver]:
        """Check a driver, attach it and put it on the list; in one step, or not at all."""
        check_driver(driver)
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
        self._refuse_after_exit(type(driver))
        driver.attach(self.primary)
        driver.serves = self.name
        sub = Subscription(driver, self, self.name)
        sub.hashed = True
        first = 0 if driver.precedes else sum(s.driver.precedes for s in self._subscriptions)
        self._subscriptions.insert(first, sub)
        self._replace()
        return sub

    def _refuse_after_exit(self, driver_type: type[AnyDriver]) -> None:
        if self._exiting:
            raise AddressSpaceExited(
                f"{self.name} has exited: expected to register {driver_type.__qualname__} while "
                "mm_users > 0"
            )

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
            if isinstance(exc, Exception) or not sub.driver.passes_on:
                self._failed(sub, "release", exc, None)
            if isinstance(exc, Exception):
                return None
            if scope.cancel_called:
                raise
            return exc
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

    def _bury(self, sub: Subscription[AnyDriver]) -> None:
        self._free(sub)
        self._log.emit(log.DRIVER_UNREGISTERED, driver=sub.name)

    def _free(self, sub: Subscription[AnyDriver]) -> None:
        try:
            sub.driver.free()
        except Exception as exc:
            self._failed(sub, "free", exc, None)


CALLING[Notifiers._release_one.__code__] = "release"
