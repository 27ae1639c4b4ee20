"""Who is told: the subscriptions of an address space, and the snapshot of them a section uses.

Registration replaces the whole snapshot (the list is read-mostly, as in RCU), so telling somebody
is one walk over a tuple of bound methods. A section keeps the `Audience` that it told its start,
and tells the end to whoever of it is still there: an end is never delivered without its start,
whoever registers meanwhile. Each audience counts its open sections; when an old one has none left,
every section that did not know the newest subscriber is over, which is what `register` waits for
(I-REG).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

from .drivers import AnyDriver, DeferredDriver, SleepableDriver, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import anyio

    from .notifiers import Notifiers
    from .tracer import Tracer

D_co = TypeVar("D_co", bound=AnyDriver, covariant=True)


class Subscription(Generic[D_co]):
    """One driver at one address space, from `register` or `get` until `unregister` or `put`."""

    __slots__ = (
        "driver",
        "failure",
        "hashed",
        "name",
        "notifiers",
        "over",
        "release_begun",
        "release_done",
        "release_waiter",
        "running",
        "users",
    )

    def __init__(self, driver: D_co, notifiers: Notifiers[Any], users: int = 0) -> None:
        self.driver: Final[D_co] = driver
        self.notifiers: Final = notifiers
        self.name = type(driver).__qualname__
        self.hashed = False
        """On the list: told of sections that begin now."""
        self.failure: BaseException | None = None
        """What the callback raised for which the driver is quarantined: told nothing any more."""
        self.running = 0
        """Coroutine callbacks that have begun and not returned."""
        self.users = users
        """References taken by `get`; 0 for a subscription made by `register`."""
        self.release_begun = False
        self.release_done = False
        self.release_waiter: anyio.Event | None = None
        self.over = False
        """Unregistered, or put for the last time."""

    def __repr__(self) -> str:
        state = (
            "quarantined" if self.failure is not None else "registered" if self.hashed else "gone"
        )
        return f"<Subscription {self.name} at {self.notifiers.name}: {state}>"


TRACE: Final = "trace"


class Call(NamedTuple):
    """One callback of one subscription, as the dispatch walks it."""

    subscription: Subscription[AnyDriver]
    callback: Callable[..., Any]
    suspends: bool
    """Whether it is a coroutine function."""
    name: str
    """The callback's name in the driver, or TRACE: not a driver's, but the trace's listener."""


class Audience:
    """Everybody who is told of a section that begins now, newest first; never changed."""

    __slots__ = (
        "clear_flush_young",
        "clear_young",
        "concurrent",
        "end_calls",
        "ends",
        "nonblock_calls",
        "nonblock_ends",
        "open",
        "page_calls",
        "start_calls",
        "starts",
        "subscriptions",
        "suspends",
        "sync_calls",
        "test_young",
    )

    def __init__(
        self, subscriptions: Iterable[Subscription[AnyDriver]], tracer: Tracer | None = None
    ) -> None:
        self.subscriptions = tuple(subscriptions)
        self.open = 0
        """Sections (and ageing walks) that have begun with this audience and not ended."""
        self.start_calls = self._calls("invalidate_range_start", "invalidate_range")
        self.end_calls = self._calls("invalidate_range_end")
        self.sync_calls = self._calls("invalidate_range_sync")
        self.page_calls = self._page_calls()
        self.nonblock_calls, self.nonblock_ends = self._nonblock_calls()
        self.clear_flush_young = self._calls("clear_flush_young")
        self.clear_young = self._calls("clear_young")
        self.test_young = self._calls("test_young")
        if tracer is not None:
            tracer.wrap(self)
        self.suspends = any(
            call.suspends for call in self.start_calls + self.end_calls + self.page_calls
        )
        """Whether somebody can only be told by a coroutine."""
        self.concurrent = sum(sub.driver.concurrent for sub in self.subscriptions) > 1
        self.starts = tuple(call.callback for call in self.start_calls)
        self.ends = tuple(call.callback for call in self.end_calls)

    @property
    def failed(self) -> tuple[Subscription[AnyDriver], ...]:
        """Who of this audience has been quarantined: it may still hold stale translations."""
        return tuple(sub for sub in self.subscriptions if sub.failure is not None)

    def _calls(self, *names: str) -> tuple[Call, ...]:
        return tuple(
            Call(sub, getattr(sub.driver, name), suspends, name)
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


def distribution_of(module: str) -> str | None:
    """Which installed distribution a driver's module came with, to name it when it fails."""
    # Slow (it reads every distribution's file list), and never needed unless something failed.
    from importlib.metadata import packages_distributions

    return next(iter(packages_distributions().get(module.partition(".")[0], ())), None)
