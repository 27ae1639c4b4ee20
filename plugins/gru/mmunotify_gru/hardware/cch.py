"""Context configuration handles: what a context of a chiplet is, and the states it goes through.

    inactive --allocate--> mapped --start--> active --interrupt--> mapped --deallocate--> inactive

Control blocks run while the context is active. An interrupt stops all of them where they are.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

from .geometry import CBR_AU, DSR_AU

if TYPE_CHECKING:
    from mmunotify import Primary

    from .cbr import Cbr
    from .chiplet import Chiplet


class CchState(enum.Enum):
    """Where a context is."""

    INACTIVE = enum.auto()
    MAPPED = enum.auto()
    ACTIVE = enum.auto()


class MissMode(enum.Enum):
    """How misses of a context become known."""

    INTERRUPT = "interrupt"
    """The driver is interrupted; the user learns nothing of it (fault map mode)."""
    POLL = "poll"
    """Nobody is: the user finds CALL_OS and calls the driver (user polling mode)."""


class Cch:
    """The handle of one of a chiplet's contexts."""

    __slots__ = (
        *("asid", "cbrs", "chiplet", "dseg", "dsr_units", "huge", "memory", "miss_mode"),
        *("number", "state"),
    )

    def __init__(self, chiplet: Chiplet, number: int) -> None:
        self.chiplet: Final = chiplet
        self.number: Final = number
        self.state = CchState.INACTIVE
        self.asid = 0
        self.huge = False
        """Whether pages of PMD_SIZE are among the sizes that the TLB may hold (sizeavail)."""
        self.miss_mode = MissMode.INTERRUPT
        self.cbrs: list[Cbr] = []
        """In the order of the context's own numbers."""
        self.dsr_units = 0
        """Bit map of the chiplet's units of data segment."""
        self.dseg = bytearray()
        """The data segment, in the order of the context's own offsets."""
        self.memory: Primary | None = None
        """What the frames in translations are frames of."""

    def allocate(
        self,
        asid: int,
        miss_mode: MissMode,
        cbr_units: int,
        dsr_units: int,
        memory: Primary,
    ) -> None:
        """inactive -> mapped, with the units that the bit maps name. Raises ValueError if taken."""
        self._expect(CchState.INACTIVE, "allocate")
        chiplet = self.chiplet
        if cbr_units & ~chiplet.free_cbr_units or dsr_units & ~chiplet.free_dsr_units:
            raise ValueError(
                f"units {cbr_units:#x}, {dsr_units:#x} of {chiplet}: expected free ones"
            )
        chiplet.operations["cch_allocate"] += 1
        chiplet.free_cbr_units &= ~cbr_units
        chiplet.free_dsr_units &= ~dsr_units
        self.asid = asid
        self.miss_mode = miss_mode
        self.memory = memory
        self.dsr_units = dsr_units
        self.dseg = bytearray(dsr_units.bit_count() * DSR_AU)
        self.cbrs = [
            chiplet.cbrs[unit * CBR_AU + offset]
            for unit in range(cbr_units.bit_length())
            if cbr_units >> unit & 1
            for offset in range(CBR_AU)
        ]
        for cbr in self.cbrs:
            cbr.bind(self)
        self.state = CchState.MAPPED

    def start(self) -> None:
        """mapped -> active; control blocks that were busy run on."""
        self._expect(CchState.MAPPED, "start")
        self.chiplet.operations["cch_start"] += 1
        self.state = CchState.ACTIVE
        for cbr in self.cbrs:
            cbr.bind(self)
            cbr.resume()

    def interrupt(self) -> None:
        """active -> mapped: all control blocks stop; those that miss will miss again."""
        self._expect(CchState.ACTIVE, "interrupt")
        self.chiplet.operations["cch_interrupt"] += 1
        self.state = CchState.MAPPED
        for cbr in self.cbrs:
            cbr.interrupt()

    def deallocate(self) -> None:
        """mapped -> inactive; blocks and data segment are lost to the context."""
        self._expect(CchState.MAPPED, "deallocate")
        chiplet = self.chiplet
        chiplet.operations["cch_deallocate"] += 1
        for cbr in self.cbrs:
            cbr.unbind()
            chiplet.free_cbr_units |= 1 << cbr.number // CBR_AU
        chiplet.free_dsr_units |= self.dsr_units
        # Whoever still has the old data segment sees that it is nobody's.
        self.dseg[:] = b"\xa5" * len(self.dseg)
        self.dseg = bytearray()
        self.cbrs = []
        self.dsr_units = self.asid = 0
        self.huge = False
        self.memory = None
        self.state = CchState.INACTIVE

    def _expect(self, state: CchState, operation: str) -> None:
        if self.state is not state:
            raise ValueError(
                f"{operation} of context {self.number} of {self.chiplet}: expected it to be "
                f"{state.name}, it is {self.state.name}"
            )
