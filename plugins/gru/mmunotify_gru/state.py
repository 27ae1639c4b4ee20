"""What the driver knows of one chiplet (gru_state)."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from .asids import AsidAllocator
from .hardware.geometry import NUM_CCH, NUM_TGH

if TYPE_CHECKING:
    from collections.abc import Collection

    from .gts import Gts
    from .hardware.chiplet import Chiplet
    from .hardware.tgh import Tgh

FIRST_REMOTE_TGH: Final = NUM_TGH // 2
"""The handles before it belong to the processors of the blade, the others are shared."""

current_blade: ContextVar[int] = ContextVar("gru_blade", default=0)
"""The blade on which the current task runs; contexts are loaded there."""


class GruState:
    """A chiplet, who is loaded on it, and its ASIDs."""

    def __init__(self, chiplet: Chiplet, first_asid: int, last_asid: int) -> None:
        self.chiplet: Final = chiplet
        self.contexts: Final[list[Gts | None]] = [None] * NUM_CCH
        self.asids: Final = AsidAllocator(chiplet, self.asids_in_use, first_asid, last_asid)
        self._remote = FIRST_REMOTE_TGH

    def __repr__(self) -> str:
        return f"<GruState of {self.chiplet}: {self.active} contexts>"

    @property
    def active(self) -> int:
        """How many contexts are loaded."""
        return NUM_CCH - self.contexts.count(None)

    def asids_in_use(self) -> Collection[int]:
        """The ASIDs under which contexts are loaded."""
        return {gts.gms.asids[self].asid for gts in self.contexts if gts is not None}

    def room_for(self, gts: Gts) -> bool:
        """Whether a context, its control blocks and its data segment could be had."""
        chiplet = self.chiplet
        return (
            None in self.contexts
            and chiplet.free_cbr_units.bit_count() >= gts.cbr_units
            and chiplet.free_dsr_units.bit_count() >= gts.dsr_units
        )

    def take_tgh(self) -> Tgh:
        """A gate handle: the processor's own on its blade, else one of those that are shared.

        The shared ones need no lock here: who uses one does not suspend meanwhile.
        """
        if current_blade.get() == self.chiplet.blade:
            return self.chiplet.tghs[0]
        remote = self._remote + 1
        self._remote = remote if remote < NUM_TGH else FIRST_REMOTE_TGH
        return self.chiplet.tghs[self._remote]


def lowest(free: int, count: int) -> int:
    """A bit map of `count` of the bits that are set in `free`, the lowest ones."""
    taken = 0
    for _ in range(count):
        taken |= free & ~taken & -(free & ~taken)
    return taken
