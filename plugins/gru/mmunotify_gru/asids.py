"""Address space identifiers: who has which on a chiplet, and when one may be given out again.

Each chiplet gives them out in ascending order and never takes one back. It does so within a run of
numbers that nobody loaded has; when the run is used up, the TLB is flushed and the next run is
looked for. At the end of all numbers it begins again, in a new generation. An address space that
was unloaded may go on with the number that it had only within the generation that gave it out:
since then somebody else may have got it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .hardware.geometry import ASID_STEP, NUM_CCH

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .hardware.chiplet import Chiplet
    from .statistics import Statistics


class MmAsid:
    """What one address space has on one chiplet (gru_mm_tracker)."""

    __slots__ = ("asid", "contexts", "generation", "huge")

    def __init__(self) -> None:
        self.asid = 0
        """0: none that may be used."""
        self.generation = 0
        """The chiplet's when `asid` was given out."""
        self.contexts = 0
        """Bit map of its contexts that are loaded there."""
        self.huge = False
        """Whether a huge page was dropped in under `asid`."""

    def usable(self, generation: int) -> bool:
        """Whether a context that is loaded now may run under `asid`."""
        return self.asid != 0 and (self.contexts != 0 or self.generation == generation)


class AsidAllocator:
    """The numbers of one chiplet, from `first` up to `last`, which is not used."""

    def __init__(
        self,
        chiplet: Chiplet,
        in_use: Callable[[], Collection[int]],
        first: int,
        last: int,
    ) -> None:
        if first < ASID_STEP or first % ASID_STEP or (last - first) // ASID_STEP <= NUM_CCH:
            raise ValueError(
                f"ASIDs from {first:#x} to {last:#x}: expected multiples of {ASID_STEP} from "
                f"{ASID_STEP} on, more than the {NUM_CCH} contexts that may need one"
            )
        self.chiplet: Final = chiplet
        self.first: Final = first
        self.last: Final = last
        self.generation = 1
        self.limit = last
        """The end of the run at hand."""
        self.asid = first - ASID_STEP
        """Given out last."""
        self._in_use = in_use

    def assign(self, statistics: Statistics) -> int:
        """The next number. Flushes the TLB when a new run begins."""
        self.asid += ASID_STEP
        if self.asid >= self.limit:
            self._next_run(statistics)
        return self.asid

    def _next_run(self, statistics: Statistics) -> None:
        statistics.asid_next += 1
        self.chiplet.tghs[0].invalidate_all()
        used = self._in_use()
        asid = self.asid
        while asid >= self.last or asid in used:
            if asid >= self.last:
                statistics.asid_wrap += 1
                self.generation += 1
                asid = self.first
            else:
                asid += ASID_STEP
        self.asid = asid
        self.limit = min((other for other in used if other > asid), default=self.last)
