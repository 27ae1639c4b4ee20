"""What one driver costs: its callbacks counted and timed, over all address spaces it serves."""

from __future__ import annotations

from collections import Counter
from inspect import iscoroutinefunction
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

from mmunotify import PAGE_SHIFT, AnyDriver, Device
from mmunotify.drivers import CALLBACKS, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

_BITS: Final = 64
_START_NONBLOCK: Final = "invalidate_range_start_nonblock"
_ANNOUNCE: Final = frozenset(
    ("invalidate_range_start", _START_NONBLOCK, "invalidate_range", "invalidate_page")
)
_TIMED: Final = (
    *("invalidate_range_start", "invalidate_range_end", "invalidate_page"),
    *(_START_NONBLOCK, "invalidate_range_end_nonblock"),
    *("invalidate_range", "invalidate_range_sync"),
    *("clear_flush_young", "clear_young", "test_young", "release"),
)


class Meter:
    """The counters of one driver of a replay; `watch` each of its instances before it registers."""

    def __init__(self, name: str, kind: type[AnyDriver]) -> None:
        self.name: Final = name
        self.kind: Final = kind
        self._latencies: Final = {name: [0] * _BITS for name in _TIMED}
        self._sums: Final = [0, 0]
        """Nanoseconds in callbacks, and pages announced."""
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

    @property
    def calls(self) -> Counter[str]:
        """By callback, of those that were called at all."""
        counts = {name: sum(counts) for name, counts in self._latencies.items()}
        return Counter({name: count for name, count in counts.items() if count})

    @property
    def latencies(self) -> list[int]:
        """Callbacks by the number of bits of their nanoseconds: [n] took less than 2**n."""
        return [sum(counts) for counts in zip(*self._latencies.values(), strict=True)]

    @property
    def ns(self) -> int:
        """In callbacks, waits of coroutines included."""
        return self._sums[0]

    @property
    def pages(self) -> int:
        """Announced by invalidations, whether mapped or not."""
        return self._sums[1]

    # Three wrappers instead of one, and closures instead of attributes: they are called for
    # everything that any driver is told.

    def _timed(self, name: str, callback: Callable[..., Any]) -> Callable[..., Any]:
        bits, sums = self._latencies[name], self._sums
        page = name == "invalidate_page"

        def timed(*args: Any) -> Any:
            began = perf_counter_ns()
            try:
                return callback(*args)
            finally:
                took = perf_counter_ns() - began
                bits[took.bit_length()] += 1
                sums[0] += took

        def announced(what: Any) -> Any:
            began = perf_counter_ns()
            answer = True
            try:
                answer = callback(what)
            finally:
                took = perf_counter_ns() - began
                bits[took.bit_length()] += 1
                sums[0] += took
                if answer is not False:  # else it is told again, by a coroutine
                    sums[1] += 1 if page else (what.end - what.start) >> PAGE_SHIFT
            return answer

        return announced if name in _ANNOUNCE else timed

    def _timed_coroutine(self, name: str, callback: Callable[..., Any]) -> Callable[..., Any]:
        bits, sums = self._latencies[name], self._sums
        announces, page = name in _ANNOUNCE, name == "invalidate_page"

        async def timed(*args: Any) -> Any:
            if announces:
                sums[1] += 1 if page else (args[0].end - args[0].start) >> PAGE_SHIFT
            began = perf_counter_ns()
            try:
                return await callback(*args)
            finally:
                took = perf_counter_ns() - began
                bits[took.bit_length()] += 1
                sums[0] += took

        return timed


def _counters(driver: AnyDriver) -> Counter[str]:
    # A driver need not count; if it does, mmunotify.Device says how.
    return Counter(getattr(driver, "counters", {}))
