"""How an address space tells its drivers: sections, single pages, ageing, and who fails.

Drivers are called newest first. A list of plain callbacks is walked in one step; a list with
coroutines is walked in an SRCU read section. A callback that raises cannot undo the operation: its
driver is quarantined, the section names it in `failed`, and the owner of the pages leaks them
instead of reusing them. The others go on.

Uncontended calls never suspend: nothing of the event loop is made before there is something to wait
for, except one shielded cancel scope around ends that are coroutines.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from itertools import groupby
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import anyio
import anyio.lowlevel
from anyio import CancelScope, get_cancelled_exc_class

from . import log
from .audience import WATCHER, Audience, Call, Subscription, Watcher, distribution_of, name_of
from .drivers import AnyDriver, one_page
from .errors import CalledFromCallback, ForeignThread, WouldBlock
from .locks import SRCU, lockdep
from .ranges import Range
from .watchers import Guard, Tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
    from types import FrameType

Failed: TypeAlias = tuple[Subscription[AnyDriver], ...]
"""Who failed before the section was over: leak its pages instead of reusing them."""


class Dispatch:
    """The telling half of `Notifiers`: an audience, and what walks it."""

    def __init__(self, name: str, srcu: SRCU | None, logger: object) -> None:
        self.name: Final = name
        self.srcu: Final = srcu if srcu is not None else SRCU(f"srcu of {name}")
        """The domain of the read sections in which coroutine callbacks run."""
        self.armed = False
        """Whether anybody has to be told; a plain attribute, for call sites to test."""
        self.plain = True
        """Whether all who are told can be told in one step: no coroutine, nothing to finish."""
        self.nowait = True
        """Whether they can unless one of them finds that it has to wait; see `nonblock_first`."""
        self._log = log.Log(logger, mm=name)
        self._thread = 0
        self._token: Any = None
        self._subscriptions: list[Subscription[AnyDriver]] = []
        self._tracer: Tracer | None = None
        self._guard: Final = Guard(name, self._enter)
        self._audience = self._listed()
        self._draining: list[Audience] = []
        self._drained: list[tuple[set[Audience], Callable[[], object]]] = []

    # ------------------------------------------------------------------ sections

    async def invalidate(self, rng: Range) -> Failed:
        """Start, end and sync at once, for ptes that are gone already (a gather that flushes).

        Shielded: the change cannot be undone. Release the pages after it returns, but for what
        failed.
        """
        interrupted: BaseException | None = None
        self._enter()
        told = self._audience
        rng.cancellable = False
        told.open += 1
        for calls in (told.start_calls, told.end_calls, told.sync_calls):
            if calls:
                raised = await self._tell(calls, rng, concurrent=told.concurrent)
                interrupted = interrupted or raised
        self._close(told)
        rng.cancellable = True
        if interrupted is not None:
            raise interrupted
        return told.failed

    def invalidate_atomic(self, rng: Range) -> Audience:
        """Start and end at once under the page table lock, for ptes that are gone already.

        Hand what it returns to `invalidate_range_sync` if it has `sync_calls`. Whatever interrupts
        one driver, the others are told: the change cannot be undone. Raises ScheduleWhileAtomic if
        a driver is there that can only be told by a coroutine.
        """
        self._enter()
        told = self._audience
        if told.suspends:
            told.refuse(rng)
        rng.cancellable = False
        told.open += 1
        interrupted = self._tell_plain(told.start_calls, rng)
        interrupted = self._tell_plain(told.end_calls, rng) or interrupted
        self._close(told)
        rng.cancellable = True
        if interrupted is not None:
            raise interrupted
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
            for start, plainly in told.starting:
                try:
                    if plainly is None or plainly(rng) is False:
                        await start(rng)
                except BaseException as exc:
                    call = told.call_of[start]
                    if not self._survives(call, exc, rng):
                        await self._undo_start(told, _before(call, told.start_calls), rng)
                        raise
        finally:
            srcu.read_unlock(index)
        return told

    async def invalidate_range_end(self, rng: Range, told: Audience) -> Failed:
        """Tell whoever was told the start, and is still there, that `rng` may be looked up again.

        Not cancelled half-way: a native asyncio cancellation interrupts the one callback that it
        lands in, whose driver is quarantined, and is raised when the others have been told. Returns
        who is quarantined by then: leak the pages of the section instead of reusing them.
        """
        if not told.ends_suspend:
            return self.invalidate_range_end_atomic(rng, told)
        interrupted: BaseException | None = None
        if not told.concurrent:
            srcu = self.srcu
            index = srcu.read_lock()
            try:
                with CancelScope(shield=True):
                    for end, plainly in told.ending:
                        try:
                            if plainly is None or plainly(rng) is False:
                                await end(rng)
                        except BaseException as exc:
                            interrupted = self._raised(told.call_of[end], exc, rng) or interrupted
            finally:
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
        interrupted = await self._tell(told.sync_calls, rng, concurrent=told.concurrent)
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
                call = told.call_of[start]
                if not self._survives(call, exc, rng):
                    done = _before(call, told.start_calls)
                    self._undo_plain(told, done, told.end_calls, rng)
                    raise
        return told

    def invalidate_range_start_nowait(self, rng: Range) -> Audience | None:
        """`invalidate_range_start` in one step, or None: a driver has to be awaited.

        For callers that can do either, so not under spinlocks. With None nothing has begun: who had
        been told the start has been told the end.
        """
        told = self._audience
        told.open += 1
        for start in told.tries:
            try:
                answer = start(rng)
            except BaseException as exc:
                call = told.call_of[start]
                if not self._survives(call, exc, rng):
                    done = _before(call, told.start_calls)
                    self._undo_plain(told, done, told.end_calls, rng)
                    raise
            else:
                if answer is False:
                    done = told.start_calls[: told.tries.index(start)]
                    self._undo_plain(told, done, told.end_calls, rng)
                    return None
        return told

    def invalidate_range_end_atomic(self, rng: Range, told: Audience) -> Failed:
        """`invalidate_range_end` in one step, legal under spinlocks.

        Raises ScheduleWhileAtomic if somebody was told the start who can only be told the end by a
        coroutine; it is not told then.
        """
        for end in told.ends:
            try:
                end(rng)
            except BaseException as exc:
                if told.ends_suspend:
                    raise
                return self._end_raised(told, told.call_of[end], rng, exc)
        told.open -= 1
        if told is self._audience:
            return told.quarantined
        self._drain(told)
        return told.failed

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
        for call in told.nonblock_calls:
            try:
                refused = call.callback(rng) is False
            except BaseException as exc:
                if self._survives(call, exc, rng):
                    continue
                self._undo_nonblock(told, call, rng)
                raise
            if refused:
                self._undo_nonblock(told, call, rng)
                name = call.subscription.name
                self._log.emit(
                    log.SECTION_REFUSED,
                    driver=name,
                    start=rng.start,
                    end=rng.end,
                    reason=rng.event.name,
                )
                raise WouldBlock(
                    errno.EAGAIN,
                    f"{name} would have to wait in a non-blockable section over {rng!r}",
                )
        return told

    def invalidate_range_end_nonblock(self, rng: Range, told: Audience) -> Failed:
        """The end of a non-blockable section."""
        interrupted = self._tell_plain(told.nonblock_ends, rng)
        rng.blockable = True
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
            told.refuse(one_page(address))
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
        interrupted: BaseException | None = None
        for calls, what in ((told.page_calls, address), (told.sync_calls, one_page(address))):
            if calls:
                raised = await self._tell(calls, what, concurrent=told.concurrent)
                interrupted = interrupted or raised
        self._close(told)
        if interrupted is not None:
            raise interrupted
        return told.failed

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Clear and flush the drivers' accessed bits of [start, end); whether any was set.

        Every driver is asked (I-AGE). Under the page table lock; never suspends.
        """
        if get_ident() != self._thread or self._token is None:
            self._enter()
        told = self._audience
        if not told.clear_flush_young:
            return False
        told.open += 1  # a put inside a callback must not free what is being walked
        young = False
        try:
            for call in told.clear_flush_young:
                try:
                    if call.callback(start, end):
                        young = True
                except BaseException as exc:
                    if not self._survives(call, exc, start):
                        raise
        finally:
            told.open -= 1
            if told is not self._audience:
                self._drain(told)
        return young

    def clear_young(self, start: int, end: int) -> bool:
        """Like `clear_flush_young`, without the flush."""
        return self._ask(self._audience.clear_young, start, end, all_of_them=True)

    def test_young(self, address: int) -> bool:
        """Whether any driver has used the page at `address`; stops at the first that says yes."""
        return self._ask(self._audience.test_young, address, all_of_them=False)

    @property
    def trace(self) -> Callable[[log.Record], object] | None:
        """Where hot events go, or None (the default: nothing is recorded, and it costs nothing).

        Assign any callable that takes a `log.Record`, such as a `Ring`'s append. If it raises, the
        error is logged and the trace is off: listening must not change what is listened to.
        """
        return self._tracer.emit if self._tracer is not None else None

    @trace.setter
    def trace(self, emit: Callable[[log.Record], object] | None) -> None:
        self._tracer = None if emit is None else Tracer(self.name, emit, self._trace_failed)
        self._replace()

    def _trace_failed(self, error: Exception) -> None:
        self.trace = None
        self._log.emit(log.TRACE_FAILED, error=repr(error), exc_info=error)

    # ------------------------------------------------------------------ drivers that pass it on

    def refuse_in_callback(self, what: str) -> None:
        """Raise CalledFromCallback if this task is inside a callback of our SRCU domain.

        For whoever is about to wait for callbacks, and would wait for itself; `what` names it.
        """
        for found in self._callbacks_of(_calling_frames()):
            raise CalledFromCallback(
                f"{what} at {self.name} inside {found}: it would wait for the callback to return; "
                "put is allowed there, or use a task of your own"
            )

    def might_wait_for_sections(self, what: str) -> None:
        """Have lockdep check that the caller may wait until open sections are over.

        `what` names the call. Inside a section of the caller's own it would wait for itself
        (LockRecursion); with a lock held that is taken inside sections, two tasks could wait for
        each other (LockOrderViolation); with a spinlock held nobody waits (ScheduleWhileAtomic).
        """
        if lockdep.enabled:
            self._guard.wait(f"{what} at {self.name}")

    def distrust(self, subscription: Subscription[AnyDriver]) -> None:
        """Have every section that is open now name `subscription` in its `failed`.

        For a driver that passes callbacks on, when a part of it may hold stale translations: it
        goes on for the others, but pages must be leaked.
        """
        for told in (self._audience, *self._draining):
            told.distrusted |= {subscription}
        self._replace()

    def part_failed(
        self,
        subscription: Subscription[AnyDriver],
        part: object,
        callback: str,
        error: BaseException,
        rng: Range,
    ) -> None:
        """`distrust`, and say in the log which part's callback raised what, over which range."""
        self.distrust(subscription)
        self._log_failure(type(part), callback, error, rng)

    # ------------------------------------------------------------------ inside: who is told

    def _enter(self) -> None:
        """Bind to the first thread that comes, and to its event loop; refuse all others."""
        thread = get_ident()
        if thread == self._thread and self._token is not None:
            return
        if self._thread not in (0, thread):
            raise ForeignThread(
                f"{self.name} belongs to the event loop of another thread: expected a call from "
                "that thread, or post()"
            )
        self._thread = thread
        with contextlib.suppress(anyio.NoEventLoopError):  # plain calls need no loop
            self._token = anyio.lowlevel.current_token()

    def _listed(self) -> Audience:
        watchers: list[Watcher] = [] if self._tracer is None else [self._tracer]
        if lockdep.enabled:
            watchers.append(self._guard)
        return Audience(
            (sub for sub in self._subscriptions if sub.hashed),
            (sub for sub in self._subscriptions if not sub.hashed),
            watchers,
        )

    def _replace(self) -> None:
        """Publish the list as it is now; sections already open keep theirs, less who has left."""
        old = self._audience
        self._audience = self._listed()
        self.armed = bool(self._subscriptions) or self._tracer is not None
        self.plain = not (self._audience.suspends or self._audience.sync_calls)
        self.nowait = self._audience.nowait
        if old.open:
            self._draining.append(old)
        for told in self._draining:
            told.forget_who_left()

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
        with contextlib.ExitStack() as all_of_them:  # whatever one of them raises
            for done in reversed(over):
                all_of_them.callback(done)

    def _after_sections(self, done: Callable[[], object]) -> None:
        """Call `done` when every section of an older audience is over."""
        if self._draining:
            self._drained.append((set(self._draining), done))
        else:
            done()

    def _unhash(self, sub: Subscription[AnyDriver]) -> None:
        if sub in self._subscriptions:
            self._subscriptions.remove(sub)
            sub.hashed = False
            self._replace()

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
            variable = CALLING.get(frame.f_code)
            if variable is not None and frame.f_locals["self"].srcu is self.srcu:
                found = frame.f_locals.get(variable)
                if found is not None:  # else it waits for tasks that it has begun
                    yield name_of(found.callback if isinstance(found, Call) else found)

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
                    await self._together(calls, self._finish_shielded, what, interruptions)
                else:
                    for call in calls:
                        await self._finish(call, what, interruptions)
        except get_cancelled_exc_class() as exc:  # a native one, while others were waited for
            interruptions.append(exc)
        finally:
            self.srcu.read_unlock(index)
        return interruptions[0] if interruptions else None

    async def _finish(
        self, call: Call, what: Range | int, interruptions: list[BaseException]
    ) -> None:
        """One call of `_tell`: whatever it raises, the others are still told."""
        sub, callback, suspends, _, plain = call
        if not sub.hashed:
            return
        try:
            if not suspends:
                callback(what)
            elif plain is None or plain(what) is False:
                await callback(what)
        except BaseException as exc:
            interrupted = self._raised(call, exc, what)
            if interrupted is not None:
                interruptions.append(interrupted)

    async def _finish_shielded(
        self, call: Call, what: Range | int, interruptions: list[BaseException]
    ) -> None:
        """`_finish` in a task group, which cancels its tasks when whoever waits is cancelled."""
        with CancelScope(shield=True):
            await self._finish(call, what, interruptions)

    async def _begin(self, call: Call, rng: Range, done: list[Call]) -> None:
        """One start among concurrent ones: `done` gets it when it has succeeded."""
        sub, start, suspends, _, plain = call
        if not sub.hashed:
            return
        try:
            if not suspends:
                start(rng)
            elif plain is None or plain(rng) is False:
                await start(rng)
        except BaseException as exc:
            if not self._survives(call, exc, rng):
                raise
        else:
            done.append(call)

    async def _together(
        self, calls: Iterable[Call], tell: Callable[..., Coroutine[Any, Any, None]], *args: object
    ) -> None:
        """`tell` each call: those that opt in at the same time, the others in order meanwhile.

        Watchers see the section begin before and end after all of them.
        """
        for watching, some in groupby(calls, lambda call: call.name == WATCHER):
            if watching:
                for call in some:
                    await tell(call, *args)
                continue
            in_order = []
            async with anyio.create_task_group() as tasks:
                for call in some:
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
        except BaseException as exc:
            await self._undo_start(told, done, rng)
            while isinstance(exc, BaseExceptionGroup):  # the task group's
                exc = exc.exceptions[0]
            raise exc
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

    async def _undo_start(self, told: Audience, done: Sequence[Call], rng: Range) -> None:
        """The section will not be: end it for those whose start has succeeded, marks included."""
        for calls in (told.end_calls, told.sync_calls):
            await self._tell(_calls_of(done, calls), rng, concurrent=told.concurrent)
        self._close(told)

    def _undo_plain(
        self, told: Audience, done: Iterable[Call], ends: tuple[Call, ...], rng: Range
    ) -> None:
        self._tell_plain(_calls_of(done, ends), rng)
        self._close(told)

    def _undo_nonblock(self, told: Audience, failed: Call, rng: Range) -> None:
        self._undo_plain(told, _before(failed, told.nonblock_calls), told.nonblock_ends, rng)
        rng.blockable = True

    def _end_raised(self, told: Audience, call: Call, rng: Range, exc: BaseException) -> Failed:
        """One plain end has raised: the rest are still told."""
        interrupted = self._raised(call, exc, rng)
        rest = told.end_calls[told.end_calls.index(call) + 1 :]
        interrupted = self._tell_plain(rest, rng) or interrupted
        self._close(told)
        if interrupted is not None:
            raise interrupted
        return told.failed

    def _ask(self, calls: tuple[Call, ...], *args: int, all_of_them: bool) -> bool:
        self._enter()
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

        A cancellation or KeyboardInterrupt does not, nor does what lockdep raised.
        """
        if isinstance(exc, Exception) and call.name != WATCHER:
            self._quarantine(call, exc, what)
            return True
        return False

    def _raised(self, call: Call, exc: BaseException, what: Range | int) -> BaseException | None:
        """A callback raised in what must go on: quarantine it; what is to be raised afterwards."""
        if call.name == WATCHER:
            return exc
        interruption = None if isinstance(exc, Exception) else exc
        if interruption is None or not call.subscription.driver.passes_on:
            self._quarantine(call, exc, what)
        return interruption

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
        sub.failure = sub.failure or exc
        self._log_failure(type(sub.driver), callback, exc, what)

    def _log_failure(
        self, failed: type, callback: str, exc: BaseException, what: Range | int | None
    ) -> None:
        where = (
            {"start": what.start, "end": what.end}
            if isinstance(what, Range)
            else {}
            if what is None
            else {"start": what}
        )
        self._log.emit(
            log.DRIVER_FAILED,
            driver=failed.__qualname__,
            module=failed.__module__,
            distribution=distribution_of(failed.__module__),
            callback=callback,
            error=repr(exc),
            exc_info=exc,
            **where,
        )


def _before(call: Call, calls: tuple[Call, ...]) -> tuple[Call, ...]:
    return calls[: calls.index(call)]


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
CALLING: Final = {
    method.__code__: variable
    for method, variable in (
        (Dispatch.invalidate_range_start, "start"),
        (Dispatch.invalidate_range_end, "end"),
        (Dispatch.invalidate_range_start_atomic, "start"),
        (Dispatch.invalidate_range_start_nowait, "start"),
        (Dispatch.invalidate_range_end_atomic, "end"),
        (Dispatch.invalidate_range_start_nonblock, "call"),
        (Dispatch._begin, "start"),
        (Dispatch._finish, "callback"),
        (Dispatch._tell_plain, "call"),
        (Dispatch.clear_flush_young, "call"),
        (Dispatch._ask, "call"),
    )
}
