"""Who is told: the subscriptions of an address space, and the snapshot of them a section uses.

Registration replaces the whole snapshot (the list is read-mostly, as in RCU), so telling somebody
is one walk over a tuple of bound methods. A section keeps the `Audience` that it told its start,
and tells the end to whoever of it is still there: an end is never delivered without its start,
whoever registers meanwhile. Each audience counts its open sections; when an old one has none left,
every section that did not know the newest subscriber is over, which is what `register` waits for
(I-REG).
"""

from __future__ import annotations

import inspect
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar

from .drivers import AnyDriver, DeferredDriver, SleepableDriver, kind_of, tries_plainly
from .errors import ScheduleWhileAtomic

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

    import anyio


D_co = TypeVar("D_co", bound=AnyDriver, covariant=True)


class Subscription(Generic[D_co]):
    """One driver at one address space, from `register` or `get` until `unregister` or `put`."""

    __slots__ = (
        "address_space",
        "driver",
        "failure",
        "hashed",
        "name",
        "over",
        "owner",
        "release_begun",
        "release_done",
        "release_waiter",
        "settled",
        "users",
    )

    def __init__(self, driver: D_co, owner: object, address_space: str) -> None:
        self.driver: Final[D_co] = driver
        self.owner: Final = owner
        """The `Notifiers` that it is a subscription of."""
        self.address_space: Final = address_space
        self.name = type(driver).__qualname__
        self.hashed = False
        """On the list: told of sections that begin now."""
        self.failure: BaseException | None = None
        """What the callback raised for which the driver is quarantined: told nothing any more."""
        self.users = 0
        """References taken by `get`; 0 for a subscription made by `register`."""
        self.settled = False
        """Every section that began without it is over: its driver may translate."""
        self.release_begun = False
        self.release_done = False
        self.release_waiter: anyio.Event | None = None
        self.over = False
        """Unregistered, or put for the last time."""

    def __repr__(self) -> str:
        state = (
            "quarantined" if self.failure is not None else "registered" if self.hashed else "gone"
        )
        return f"<Subscription {self.name} at {self.address_space}: {state}>"


WATCHER: Final = "watcher"


class Call(NamedTuple):
    """One callback of one subscription, as the dispatch walks it."""

    subscription: Subscription[AnyDriver]
    callback: Callable[..., Any]
    suspends: bool
    """Whether it is a coroutine function."""
    name: str
    """The callback's name in the driver, or WATCHER: not a driver's."""
    plain: Callable[..., Any] | None = None
    """What is tried before a coroutine is awaited; it need not be, unless the answer is False."""


class Watcher(Protocol):
    """Who sees the sections of an address space without being one of its drivers."""

    def wrap(self, audience: Audience) -> None:
        """Add to, or replace, the calls of an audience that is being made."""
        ...


class Audience:
    """Everybody who is told of a section that begins now, newest first; never changed."""

    __slots__ = (
        "call_of",
        "clear_flush_young",
        "clear_young",
        "concurrent",
        "distrusted",
        "end_calls",
        "ending",
        "ends",
        "ends_suspend",
        "nonblock_calls",
        "nonblock_ends",
        "open",
        "page_calls",
        "quarantined",
        "start_calls",
        "starting",
        "starts",
        "subscriptions",
        "suspends",
        "sync_calls",
        "test_young",
        "tries",
    )

    def __init__(
        self,
        subscriptions: Iterable[Subscription[AnyDriver]],
        quarantined: Iterable[Subscription[AnyDriver]] = (),
        watchers: Iterable[Watcher] = (),
    ) -> None:
        self.subscriptions = tuple(subscriptions)
        self.quarantined = tuple(quarantined)
        """Who had failed before, and is told nothing, but may still hold translations."""
        self.open = 0
        """Sections (and ageing walks) that have begun with this audience and not ended."""
        self.distrusted: frozenset[Subscription[AnyDriver]] = frozenset()
        """Who goes on although a part of it failed while sections of this audience were open."""
        self.start_calls = self._calls("invalidate_range_start", "invalidate_range")
        self.end_calls = self._calls("invalidate_range_end")
        self.sync_calls = self._calls("invalidate_range_sync")
        self.page_calls = self._page_calls()
        self.nonblock_calls, self.nonblock_ends = self._nonblock_calls()
        self.clear_flush_young = self._calls("clear_flush_young")
        self.clear_young = self._calls("clear_young")
        self.test_young = self._calls("test_young")
        for watcher in watchers:
            watcher.wrap(self)
        self.suspends = any(
            call.suspends for call in self.start_calls + self.end_calls + self.page_calls
        )
        """Whether somebody can only be told by a coroutine."""
        self.ends_suspend = any(call.suspends for call in self.end_calls)
        self.concurrent = sum(sub.driver.concurrent for sub in self.subscriptions) > 1
        # What the fast paths walk, instead of calls; see forget_who_left.
        self.starts = tuple(call.callback for call in self.start_calls)
        self.ends = tuple(call.callback for call in self.end_calls)
        self.starting = list(map(_pair, self.start_calls))
        self.ending = list(map(_pair, self.end_calls))
        self.call_of = {
            callback: call
            for calls, pairs in (
                (self.start_calls, self.starting),
                (self.end_calls, self.ending),
            )
            for call, pair in zip(calls, pairs, strict=True)
            for callback in (call.callback, *pair)
            if callback is not None
        }
        """Which call a callback of those above and below is."""
        plain = [call.plain if call.suspends else call.callback for call in self.start_calls]
        self.tries: tuple[Callable[..., Any], ...] = tuple(filter(None, plain))
        """What a start in one step walks: who has to wait answers False."""
        if self.suspends:
            if None in plain or self.ends_suspend or self.concurrent or self.sync_calls:
                self.tries = (_somebody_waits,)
            self.starts = (self.refuse,)
        if self.ends_suspend:
            self.ends = (self.refuse,)

    @property
    def nowait(self) -> bool:
        """Whether a section may be told in one step, and leaves nothing to finish."""
        return not self.sync_calls and self.tries != (_somebody_waits,)

    def forget_who_left(self) -> None:
        """Tell open sections only to who is still on the list.

        In place: a walk may be suspended in the middle of one of these lists.
        """
        for pairs, calls in ((self.starting, self.start_calls), (self.ending, self.end_calls)):
            for position, call in enumerate(calls):
                if not call.subscription.hashed:
                    pairs[position] = (_nothing, None)
        if not self.ends_suspend:
            self.ends = tuple(end for end in self.ends if self.call_of[end].subscription.hashed)

    @property
    def failed(self) -> tuple[Subscription[AnyDriver], ...]:
        """Who has failed, as a whole or in part: it may hold stale translations."""
        failed = self.quarantined
        for sub in self.subscriptions:
            if sub.failure is not None or sub in self.distrusted:
                failed += (sub,)
        return failed

    def refuse(self, what: object) -> None:
        """Raise ScheduleWhileAtomic: what the atomic forms call when somebody may suspend."""
        names = ", ".join(
            sub.name for sub in self.subscriptions if isinstance(sub.driver, SleepableDriver)
        )
        raise ScheduleWhileAtomic(
            f"atomic section over {what!r}: expected drivers that cannot suspend, found {names}"
        )

    def _calls(self, *names: str) -> tuple[Call, ...]:
        return tuple(
            Call(sub, _own(sub.driver, name), suspends, name, _first(sub.driver, name))
            for sub in self.subscriptions
            for name, suspends in _overridden(sub.driver, names)
        )

    def _page_calls(self) -> tuple[Call, ...]:
        # The default of invalidate_page calls the range form: worth a call if that is overridden.
        return tuple(
            Call(sub, sub.driver.invalidate_page, isinstance(sub.driver, SleepableDriver), name)
            for sub in self.subscriptions
            for name in ("invalidate_page",)
            if any(_overridden(sub.driver, (name, *_SECTION_CALLBACKS)))
        )

    def _nonblock_calls(self) -> tuple[tuple[Call, ...], tuple[Call, ...]]:
        starts: list[Call] = []
        ends: list[Call] = []
        for sub in self.subscriptions:
            if not any(_overridden(sub.driver, _SECTION_CALLBACKS)):
                continue
            suffix = (
                "_nonblock" if isinstance(sub.driver, (SleepableDriver, DeferredDriver)) else ""
            )
            for calls, name in (
                (starts, "invalidate_range_start" + suffix),
                (ends, "invalidate_range_end" + suffix),
            ):
                calls.append(Call(sub, getattr(sub.driver, name), False, name))
        return tuple(starts), tuple(ends)


def _own(driver: AnyDriver, name: str) -> Callable[..., Any]:
    """A driver's callback as an object of its own, also when drivers share a function."""
    callback = getattr(driver, name)
    if getattr(callback, "__self__", None) is driver:
        return callback  # type: ignore[no-any-return]
    return partial(callback)


async def _nothing(*args: object) -> None:
    """What is called instead of the callbacks of who has left."""


def _somebody_waits(rng: object) -> bool:
    """What is tried where somebody can only be told by a coroutine."""
    return False


def _first(driver: AnyDriver, name: str) -> Callable[..., Any] | None:
    """What is tried before the callback of that name, if anything is."""
    if name == "invalidate_range_start" and tries_plainly(driver):
        return _own(driver, name + "_nonblock")
    return None


def _pair(call: Call) -> tuple[Callable[..., Awaitable[object]], Callable[..., Any] | None]:
    """A coroutine function, to be awaited unless there is a plain one that does not say False."""
    callback = call.callback
    if call.suspends:
        return callback, call.plain

    @wraps(callback)
    async def done(*args: object) -> None:
        """Nothing is left to do."""

    return done, callback


_SECTION_CALLBACKS: Final = (
    "invalidate_range_start",
    "invalidate_range_end",
    "invalidate_range",
    "invalidate_range_sync",
    "invalidate_range_start_nonblock",
    "invalidate_range_end_nonblock",
)


def _overridden(driver: AnyDriver, names: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Those of the callbacks that the driver has written itself, and whether each suspends."""
    kind = kind_of(type(driver))
    for name in names:
        if name == "invalidate_range_end" and tries_plainly(driver):
            name += "_nonblock"
        default = getattr(kind, name, None)
        if default is None:
            continue
        method = getattr(driver, name)
        if getattr(method, "__func__", None) is not default:
            suspends = name not in _PLAIN and kind is SleepableDriver
            yield name, suspends or name == "invalidate_range_sync"


_PLAIN: Final = frozenset(
    (
        "clear_flush_young",
        "clear_young",
        "invalidate_range_end_nonblock",
        "invalidate_range_start_nonblock",
        "test_young",
    )
)


def name_of(callback: Callable[..., Any]) -> str:
    """A callback as "Driver.callback", whichever base class the driver has it from."""
    callback = inspect.unwrap(callback)
    driver = getattr(callback, "__self__", None)
    if driver is None:
        return getattr(callback, "__qualname__", repr(callback))
    return f"{type(driver).__qualname__}.{callback.__name__}"


def distribution_of(module: str) -> str | None:
    """Which installed distribution a driver's module came with, to name it when it fails."""
    return next(iter(_distributions().get(module.partition(".")[0], ())), None)


@cache
def _distributions() -> Mapping[str, list[str]]:
    # Slow (it reads every distribution's file list), and never needed unless something failed.
    from importlib.metadata import packages_distributions

    return packages_distributions()
