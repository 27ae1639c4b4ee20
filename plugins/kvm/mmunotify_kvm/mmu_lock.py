"""mmu_lock: everything that makes, drops or reads shadow page tables happens under it.

Nothing under it suspends, so in one event loop it is never waited for; that nothing does is what
lockdep checks. How long it was held is counted, since everybody else waits that long.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from mmunotify import SpinLock

if TYPE_CHECKING:
    from types import TracebackType


class MmuLock:
    """A spinlock that times itself into `counters`: `with lock:`."""

    __slots__ = ("_checked", "_counters", "_spin", "_taken")

    def __init__(self, counters: dict[str, int]) -> None:
        self._spin: Final = SpinLock("mmu_lock")
        self._checked: Final = type(self._spin) is not SpinLock
        self._counters: Final = counters
        self._taken = 0

    @property
    def locked(self) -> bool:
        """Whether somebody holds it."""
        return self._spin.locked

    def __enter__(self) -> None:
        spin = self._spin
        if spin.locked or self._checked:
            spin.__enter__()
        else:  # what it does without lockdep, and without a call
            spin.locked = True
        self._taken = perf_counter_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        held = perf_counter_ns() - self._taken
        counters = self._counters
        counters["lock_ns"] += held
        if held > counters["lock_longest_ns"]:
            counters["lock_longest_ns"] = held
        if self._checked:
            self._spin.__exit__(kind, error, trace)
        else:
            self._spin.locked = False
