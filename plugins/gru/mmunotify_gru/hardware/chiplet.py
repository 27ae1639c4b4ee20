"""One GRU: contexts, control blocks, a data segment, a TLB and the handles to drive them."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, ClassVar, Final

from .cbr import Cbr
from .cch import Cch
from .geometry import CBR_AU, DSR_AU, NUM_CBR, NUM_CCH, NUM_DSR_BYTES, NUM_TGH
from .instructions import Cause, Substatus
from .tfh import Tfh
from .tgh import Tgh
from .tlb import Tlb

if TYPE_CHECKING:
    from collections.abc import Callable


class _Blocks(dict[int, Cbr]):
    """The control blocks of a chiplet, each made when somebody wants it: few are ever used."""

    def __init__(self, chiplet: Chiplet) -> None:
        super().__init__()
        self._chiplet = chiplet

    def __missing__(self, number: int) -> Cbr:
        cbr = self[number] = Cbr(self._chiplet, number)
        return cbr


class Chiplet:
    """The hardware of one GRU. `tlb_entries` is how many translations its TLB has."""

    tfh_type: ClassVar[type[Tfh]] = Tfh
    """The fault handles that it is built with."""

    def __init__(self, number: int, blade: int, tlb_entries: int) -> None:
        self.number: Final = number
        """gid: over all blades."""
        self.blade: Final = blade
        self.tlb: Final = Tlb(tlb_entries)
        self.cchs: Final = tuple(Cch(self, context) for context in range(NUM_CCH))
        self.missing: Final[dict[int, Tfh]] = {}
        """The fault handles with a miss, by control block."""
        self.fault_map = 0
        """Control blocks whose misses the driver was not told of yet (TFM)."""
        self.interrupt: Callable[[Chiplet], None] | None = None
        """The driver's interrupt handler: plain, and not called again while it runs."""
        self.free_cbr_units = (1 << NUM_CBR // CBR_AU) - 1
        self.free_dsr_units = (1 << NUM_DSR_BYTES // DSR_AU) - 1
        self.operations: Final[Counter[str]] = Counter()
        """How often each operation on a handle was done (mcs_statistics)."""
        self.fabric: Final[deque[Cause | Substatus]] = deque()
        """What goes wrong next outside of the chiplet: a Cause stops the next instruction that
        begins or runs on from its first element, a Substatus is the answer to the next MESQ."""
        self.cbrs: Final = _Blocks(self)
        """Control blocks, by number."""
        self.tghs: Final = tuple(Tgh(self, number) for number in range(NUM_TGH))

    def __repr__(self) -> str:
        return f"<chiplet {self.number} of blade {self.blade}>"

    def raise_interrupt(self, cbr: Cbr) -> None:
        """A block misses in interrupt mode."""
        self.fault_map |= 1 << cbr.number
        if self.interrupt is not None:
            self.interrupt(self)

    def take_fault_map(self) -> int:
        """Read and clear the fault map, as the interrupt handler does."""
        taken = self.fault_map
        self.fault_map = 0
        return taken

    def fabric_error(self) -> Cause:
        """The error that the next instruction meets, if it is one."""
        if isinstance(self.fabric[0], Cause):
            error = self.fabric.popleft()
            assert isinstance(error, Cause)
            return error
        return Cause.NONE

    def fabric_answer(self) -> Substatus:
        """The answer that the next MESQ gets."""
        if self.fabric and isinstance(self.fabric[0], Substatus):
            answer = self.fabric.popleft()
            assert isinstance(answer, Substatus)
            return answer
        return Substatus.NO_ERROR
