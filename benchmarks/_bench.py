"""How benchmarks measure and report: ratios of minima, taken in turns in one process.

A minimum over many rounds is what the code costs when nothing disturbs it; taking turns exposes
both sides to the same disturbances. What has no peer is counted in calls: one bare bound-method
call with two arguments, measured in the same run.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from importlib import import_module
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator


@attrs.frozen
class Row:
    """One measurement, as it is printed and stored."""

    name: str
    value: float | None
    """None when it could not be measured; `reason` says why."""
    unit: str
    """ratio, or calls."""
    limit: str
    """What `value` must be, such as "<= 1.5"; empty where it is only printed."""
    against: str
    """What the other side of the ratio is."""
    ok: bool | None
    """Whether it is within the limit; None where there is no limit or no value."""
    reason: str = ""


def at_most(name: str, value: float, limit: float, against: str, unit: str = "ratio") -> Row:
    return Row(name, value, unit, f"<= {limit:g}", against, value <= limit)


def at_least(name: str, value: float, limit: float, against: str, unit: str = "ratio") -> Row:
    return Row(name, value, unit, f">= {limit:g}", against, value >= limit)


def printed(name: str, value: float, against: str, unit: str = "ratio") -> Row:
    return Row(name, value, unit, "", against, None)


def unmeasured(name: str, limit: str, against: str, reason: str) -> Row:
    return Row(name, None, "ratio", limit, against, None, reason)


def peer(module: str) -> Any:
    """A peer to measure against, or the reason why it is not there, as a string."""
    try:
        return import_module(module)
    except ImportError as exc:
        return f"{module.partition('.')[0]} is not installed here: {exc}"


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def minima(
    *snippets: Callable[[int], object], number: int = 300, rounds: int = 300
) -> tuple[float, ...]:
    """Nanoseconds per iteration of each snippet, which is called with how often to iterate."""
    best = [float("inf")] * len(snippets)
    with undisturbed():
        for _ in range(rounds):
            for index, snippet in enumerate(snippets):
                began = perf_counter_ns()
                snippet(number)
                best[index] = min(best[index], perf_counter_ns() - began)
    return tuple(taken / number for taken in best)


async def async_minima(
    *snippets: Callable[[int], Awaitable[object]], number: int = 300, rounds: int = 150
) -> tuple[float, ...]:
    """`minima` of coroutine functions, in the event loop that is running."""
    best = [float("inf")] * len(snippets)
    with undisturbed():
        for _ in range(rounds):
            for index, snippet in enumerate(snippets):
                began = perf_counter_ns()
                await snippet(number)
                best[index] = min(best[index], perf_counter_ns() - began)
    return tuple(taken / number for taken in best)


class _Object:
    def method(self, first: object, second: object) -> None:
        pass


def bare_calls(number: int) -> None:
    """The unit of what has no peer: take turns with it in `minima`."""
    method = _Object().method
    for _ in range(number):
        method(1, 2)
