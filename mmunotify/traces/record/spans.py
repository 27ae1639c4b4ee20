"""A set of addresses as spans that do not touch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final


class Spans:
    """Grows only: what was mapped once counts as mapped."""

    def __init__(self) -> None:
        self._starts: Final[list[int]] = []
        self._ends: Final[list[int]] = []

    def add(self, start: int, end: int) -> None:
        """Have [start, end) in it."""
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def __contains__(self, address: int) -> bool:
        index = bisect_right(self._starts, address) - 1
        return index >= 0 and address < self._ends[index]
