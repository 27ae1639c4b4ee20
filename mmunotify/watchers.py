"""Who watches the sections of an address space: the trace, and the checks of checking mode.

A watcher replaces the calls of the audience when the audience is made, so that a dispatch that
nobody watches pays nothing.
"""

from __future__ import annotations

import time
from functools import wraps
from typing import TYPE_CHECKING, Any, cast

from . import log
from .audience import WATCHER, Audience, Call, Subscription
from .drivers import AnyDriver
from .locks import lockdep
from .ranges import PAGE_SIZE, page_down

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ranges import Range


def _place(name: str) -> Subscription[AnyDriver]:
    """A place in the list that is not a driver's."""
    place = Subscription(cast(AnyDriver, None), None, "")
    place.name = name
    place.hashed = True
    return place


class Guard:
    """Checks that sections begin, and are waited for, where they may; only while lockdep is on.

    To lockdep the sections of an address space are one lock: held from start to end, taken for
    writing by whoever waits until all of them are over. Beginning one never waits, so a section is
    the beginning of an edge of lockdep's graph and never its end. Its class is that of the address
    space's name: `sections of mm` for `mm[7]`. Source: __mmu_notifier_invalidate_range_start_map,
    which Linux holds during the starts alone.
    """

    __slots__ = ("_enter", "_place", "lock_class", "name", "order")

    def __init__(self, mm: str, enter: Callable[[], None]) -> None:
        self.name = f"a section of {mm}"
        self.lock_class = f"sections of {lockdep.class_of(mm)}"
        self.order = None
        self._enter = enter
        self._place = _place("guard")

    def wrap(self, audience: Audience) -> None:
        """Have each start check its thread, and that it may suspend if somebody will."""
        suspends = any(call.suspends for call in audience.start_calls + audience.end_calls)

        def begin(rng: Range) -> None:
            self._enter()
            if suspends and rng.blockable:
                lockdep.might_sleep(f"a section over {rng!r} with sleepable drivers")
            lockdep.acquired(self, "open")

        def end(rng: Range) -> None:
            lockdep.released(self)

        first = Call(self._place, begin, False, WATCHER)
        last = Call(self._place, end, False, WATCHER)
        audience.start_calls = (first, *audience.start_calls)
        audience.nonblock_calls = (first, *audience.nonblock_calls)
        audience.end_calls = (*audience.end_calls, last)
        audience.nonblock_ends = (*audience.nonblock_ends, last)

    def wait(self, what: str) -> None:
        """The current task is about to wait for all open sections; raises LockdepViolation."""
        # A section of another address space of the class may be open: only one's own never ends.
        with lockdep.nest():
            lockdep.acquire(self, what, sleeps=True)


def _nobody(record: log.Record) -> None:
    """Listens instead of a listener that raised."""


class Tracer:
    """Wraps the calls of an audience so that each leaves a `log.Record`; only while traced."""

    __slots__ = ("_began", "_failed", "_mm", "_place", "emit")

    def __init__(
        self,
        mm: str,
        emit: Callable[[log.Record], object],
        failed: Callable[[Exception], None],
    ) -> None:
        self._mm = mm
        self._place = _place("trace")
        self.emit = emit
        self._failed = failed
        self._began: dict[int, int] = {}

    def wrap(self, audience: Audience) -> None:
        """Replace the audience's calls by traced ones, and watch its sections begin and end."""
        for slot in (
            *("start_calls", "end_calls", "sync_calls", "page_calls"),
            *("nonblock_calls", "nonblock_ends"),
            *("clear_flush_young", "clear_young", "test_young"),
        ):
            setattr(audience, slot, tuple(map(self._wrapped, getattr(audience, slot))))
        begin = Call(self._place, self._begin, False, WATCHER)
        end = Call(self._place, self._end, False, WATCHER)
        audience.start_calls = (begin, *audience.start_calls)
        audience.nonblock_calls = (begin, *audience.nonblock_calls)
        audience.end_calls = (*audience.end_calls, end)
        audience.nonblock_ends = (*audience.nonblock_ends, end)

    def _begin(self, rng: Range) -> None:
        rng.span = log.spans()
        self._began[rng.span] = time.monotonic_ns()
        self._record(log.INVALIDATE_RANGE, rng.span, log.current_span.get(), "start", rng)

    def _end(self, rng: Range) -> None:
        elapsed = time.monotonic_ns() - self._began.pop(rng.span, time.monotonic_ns())
        self._record(log.INVALIDATE_RANGE, rng.span, log.current_span.get(), "end", rng, elapsed)

    def _record(
        self,
        event: str,
        span: int,
        parent: int | None,
        phase: str,
        what: Range | tuple[int, int],
        duration: int | None = None,
        call: Call | None = None,
    ) -> None:
        """Hand a record to the listener; one that raises has no part in what it listens to."""
        start, end, reason = (
            (*what, None) if isinstance(what, tuple) else (what.start, what.end, what.event.name)
        )
        record = log.Record(
            log.sequence(),
            time.monotonic_ns(),
            event,
            self._mm,
            call.subscription.name if call else None,
            call.name if call else None,
            span,
            parent,
            phase,
            start,
            end,
            reason,
            duration,
        )
        try:
            self.emit(record)
        except Exception as exc:
            self.emit = _nobody
            self._failed(exc)

    def _wrapped(self, call: Call) -> Call:
        callback, first = call.callback, call.plain

        def began(args: tuple[Any, ...]) -> tuple[int, int | None, Range | tuple[int, int], int]:
            what = args[0]
            if isinstance(what, int):  # ageing or a single page: plain addresses
                page = page_down(what)
                what = (what, args[1]) if len(args) > 1 else (page, page + PAGE_SIZE)
                parent = log.current_span.get()
            else:
                parent = what.span or log.current_span.get()
            span = log.spans()
            self._record(log.CALLBACK, span, parent, "start", what, None, call)
            return span, parent, what, time.monotonic_ns()

        if call.suspends:

            @wraps(callback)
            async def suspending(*args: Any) -> Any:
                span, parent, what, at = began(args)
                try:
                    if first is None or first(*args) is False:
                        return await callback(*args)
                finally:
                    took = time.monotonic_ns() - at
                    self._record(log.CALLBACK, span, parent, "end", what, took, call)

            return call._replace(callback=suspending, plain=None)

        @wraps(callback)
        def plain(*args: Any) -> Any:
            span, parent, what, at = began(args)
            try:
                return callback(*args)
            finally:
                took = time.monotonic_ns() - at
                self._record(log.CALLBACK, span, parent, "end", what, took, call)

        return call._replace(callback=plain)
