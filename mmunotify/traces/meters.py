"""What one driver costs: its callbacks counted and timed, over all address spaces it serves."""

from __future__ import annotations

from collections import Counter
from inspect import iscoroutinefunction
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from mmunotify import AnyDriver, Device, Range
from mmunotify.drivers import CALLBACKS, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

_ANNOUNCE: Final = frozenset(("invalidate_range_start", "invalidate_range", "invalidate_page"))
_TIMED: Final = (
    *("invalidate_range_start", "invalidate_range_end", "invalidate_page"),
    *("invalidate_range", "invalidate_range_sync"),
    *("clear_flush_young", "clear_young", "test_young", "release"),
)


class Meter:
    """The counters of one driver of a replay; `watch` each of its instances before it registers."""

    def __init__(self, name: str, kind: type[AnyDriver]) -> None:
        self.name: Final = name
        self.kind: Final = kind
        self.calls: Final[Counter[str]] = Counter()
        """By callback."""
        self.pages = 0
        """Announced by invalidations, whether mapped or not."""
        self.ns = 0
        """In callbacks, waits of coroutines included."""
        self.latencies: Final = [0] * 64
        """Callbacks by the number of bits of their nanoseconds: [n] took less than 2**n."""
        self.is_device = False
        """Its instances are devices (`mmunotify.Device`), which count what they do."""
        self._gone: Final[Counter[str]] = Counter()
        self._living: Final[list[AnyDriver]] = []

    def watch(self, driver: AnyDriver) -> None:
        """Count what this instance is told from now on; only what its class overrides."""
        kind = kind_of(type(driver))
        for name in _TIMED:
            if name in CALLBACKS[kind] and getattr(type(driver), name) is not getattr(kind, name):
                callback = getattr(driver, name)
                suspends = iscoroutinefunction(callback)
                wrap = self._timed_coroutine if suspends else self._timed
                setattr(driver, name, wrap(name, callback))
        self.is_device = isinstance(driver, Device)
        self._living.append(driver)

    def retire(self, driver: AnyDriver) -> None:
        """The instance serves nobody any more: keep its counters, not it."""
        self._gone.update(_counters(driver))
        self._living.remove(driver)

    @property
    def counters(self) -> Counter[str]:
        """What the devices counted, of all instances."""
        total = self._gone.copy()
        for driver in self._living:
            total.update(_counters(driver))
        return total

    def _timed(self, name: str, callback: Callable[..., Any]) -> Callable[..., Any]:
        calls, latencies = self.calls, self.latencies
        announces = name in _ANNOUNCE

        def timed(*args: Any) -> Any:
            calls[name] += 1
            if announces:
                self._announced(args[0])
            began = perf_counter_ns()
            try:
                return callback(*args)
            finally:
                took = perf_counter_ns() - began
                self.ns += took
                latencies[took.bit_length()] += 1

        return timed

    def _timed_coroutine(self, name: str, callback: Callable[..., Any]) -> Callable[..., Any]:
        calls, latencies = self.calls, self.latencies
        announces = name in _ANNOUNCE

        async def timed(*args: Any) -> Any:
            calls[name] += 1
            if announces:
                self._announced(args[0])
            began = perf_counter_ns()
            try:
                return await callback(*args)
            finally:
                took = perf_counter_ns() - began
                self.ns += took
                latencies[took.bit_length()] += 1

        return timed

    def _announced(self, what: Range | int) -> None:
        self.pages += what.pages if isinstance(what, Range) else 1


def _counters(driver: AnyDriver) -> Counter[str]:
    # A driver need not count; if it does, mmunotify.Device says how.
    return Counter(getattr(driver, "counters", {}))
