"""Depth first: every schedule once, or every one with few preemptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmunotify.errors import BadExploration

from .base import Strategy

if TYPE_CHECKING:
    from mmunotify.testing.explore.settings import Path


class DFS(Strategy):
    """Every schedule, those that differ in their last choices first.

    With `preemptions=n`, only those in which at most `n` times a task could have gone on and
    another ran instead: most bugs need two. To cancel a task, to let the clock move, and to choose
    a value are no preemptions. Source: Musuvathi and Qadeer, Iterative context bounding, 2007.
    """

    def __init__(self, preemptions: int | None = None) -> None:
        if preemptions is not None and preemptions < 0:
            raise BadExploration(f"preemptions={preemptions}, expected a number from 0 on, or None")
        self.preemptions = preemptions
        self.start()

    def __repr__(self) -> str:
        return f"DFS(preemptions={self.preemptions})" if self.preemptions is not None else "DFS()"

    @property
    def bounds(self) -> tuple[str, ...]:
        """Preemptions, if there were schedules with more of them."""
        return (f"preemptions <= {self.preemptions}",) if self._cut else ()

    def start(self) -> None:
        """At the first schedule again."""
        self._begun = False
        self._cut = False

    def begin(self, path: Path) -> bool:
        """Take the next option of the last choice that has one."""
        if not self._begun:
            self._begun = True
            path.repeat(0)
            return True
        taken, widths = path.taken, path.widths
        last = len(taken) - 1
        if self.preemptions is None:
            while last >= 0 and taken[last] + 1 == widths[last]:
                last -= 1
        else:
            last = self._affordable(path)
        if last < 0:
            return False
        taken[last] += 1
        path.repeat(last + 1)
        return True

    def _affordable(self, path: Path) -> int:
        """The last choice that has an option within the bound; those before it are skipped."""
        assert self.preemptions is not None
        taken, widths, costly = path.taken, path.widths, path.costly
        left = self.preemptions - sum(
            0 < choice < end for choice, end in zip(taken, costly, strict=True)
        )
        for place in range(len(taken) - 1, -1, -1):
            left += 0 < taken[place] < costly[place]
            following = taken[place] + 1
            if left == 0 and following < costly[place]:
                self._cut = True
                following = max(following, costly[place])
            if following < widths[place]:
                taken[place] = following - 1
                return place
        return -1
