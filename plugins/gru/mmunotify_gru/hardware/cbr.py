"""Control blocks: where an instruction is, and the engine that executes it.

The engine runs when an instruction is started, and goes on until it is complete or misses. A miss
goes to the fault handle of the block. In interrupt mode the driver is interrupted at once, and may
have dropped a translation in when that returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from .cch import CchState, MissMode
from .geometry import REGION_SHIFT, REGIONS
from .instructions import Cause, CbStatus, Instruction, Opcode, Substatus
from .operations import OPERATIONS
from .tfh import TfhState

if TYPE_CHECKING:
    from mmunotify import Primary, Translation

    from .cch import Cch
    from .chiplet import Chiplet

_NOP: Final = Instruction(Opcode.NOP)
_NO_DSEG: Final = bytearray()
# Members of an enum as globals: looked up in their class they cost more than the rest (3.11).
_IDLE: Final = CbStatus.IDLE
_EXCEPTION: Final = CbStatus.EXCEPTION
_ACTIVE: Final = CbStatus.ACTIVE
_CALL_OS: Final = CbStatus.CALL_OS
_CCH_ACTIVE: Final = CchState.ACTIVE
_POLL: Final = MissMode.POLL
_MISS_UPM: Final = TfhState.MISS_UPM
_MISS_FMM: Final = TfhState.MISS_FMM
_NO_CAUSE: Final = Cause.NONE
_NO_ERROR: Final = Substatus.NO_ERROR


@attrs.define(slots=True)
class SavedCbr:
    """What of a control block is kept while its context is not loaded."""

    instruction: Instruction = _NOP
    progress: int = 0
    status: CbStatus = _IDLE
    substatus: Substatus = _NO_ERROR
    cause: Cause = _NO_CAUSE
    fault_address: int | None = None
    value: int = 0


_FRESH: Final = SavedCbr()


class Cbr:
    """One control block of a chiplet (with what only its driver sees of it, the CBE)."""

    __slots__ = (
        *("asid", "cause", "cch", "chiplet", "context", "dseg", "fault_address", "instruction"),
        *("memory", "number", "progress", "running", "status", "substatus", "tfh", "value"),
    )

    def __init__(self, chiplet: Chiplet, number: int) -> None:
        self.chiplet: Final = chiplet
        self.number: Final = number
        self.tfh: Final = chiplet.tfh_type(self)
        self.running = False
        self.cch: Cch | None = None
        self.unbind()

    def __repr__(self) -> str:
        return f"<Cbr {self.number} of {self.chiplet}: {self.status.name} {self.instruction}>"

    def bind(self, cch: Cch) -> None:
        """Become a block of this context; also when its ASID has changed."""
        assert cch.memory is not None
        self.cch = cch
        self.context = cch.number
        self.asid = cch.asid
        self.dseg = cch.dseg
        self.memory: Primary = cch.memory

    def unbind(self) -> None:
        """Become nobody's."""
        self.cch = None
        self.context = 0
        self.asid = 0
        self.dseg = _NO_DSEG
        self.restore(_FRESH)

    def save(self) -> SavedCbr:
        """What `restore` needs; the block must have been interrupted."""
        return SavedCbr(
            self.instruction,
            self.progress,
            self.status,
            self.substatus,
            self.cause,
            self.fault_address,
            self.value,
        )

    def restore(self, saved: SavedCbr) -> None:
        """Become what was saved; runs on when the context starts."""
        self.instruction = saved.instruction
        self.progress = saved.progress
        self.status = saved.status
        self.substatus = saved.substatus
        self.cause = saved.cause
        self.fault_address = saved.fault_address
        self.value = saved.value

    # ------------------------------------------------------------------ the user's side

    def start(self, instruction: Instruction) -> None:
        """Begin an instruction, and execute as much of it as can be. Raises ValueError if busy."""
        if self.status is _ACTIVE or self.status is _CALL_OS:
            raise ValueError(f"{self!r}: expected an idle control block")
        self.instruction = instruction
        self.progress = 0
        self.cause = _NO_CAUSE
        self.substatus = _NO_ERROR
        self.status = _ACTIVE
        self.resume()

    def abort(self) -> None:
        """Stop what it does, wherever it is; its handle is idle then."""
        self.tfh.idle()
        self.status = _IDLE

    # ------------------------------------------------------------------ the hardware's side

    def resume(self) -> None:
        """Run on, if there is something to do and nothing in the way."""
        if (
            self.running
            or self.status is _IDLE
            or self.status is _EXCEPTION
            or self.tfh.missing
            or self.cch is None
            or self.cch.state is not _CCH_ACTIVE
        ):
            return
        self.status = _ACTIVE
        if self.chiplet.fabric and self.progress == 0:
            error = self.chiplet.fabric_error()
            if error:
                self.stop(error)
                return
        self.running = True
        try:
            if OPERATIONS[self.instruction.opcode](self, self.instruction):
                self.status = _IDLE
        finally:
            self.running = False

    def translate(self, address: int, write: bool) -> Translation | None:
        """The entry for `address`; None: the block stands still, or has stopped."""
        tag = self.asid + (address >> REGION_SHIFT & (REGIONS - 1))
        entry = self.chiplet.tlb.lookup(tag, address, write)
        return entry if entry is not None else self._miss(tag, address, write)

    def _miss(self, tag: int, address: int, write: bool) -> Translation | None:
        chiplet, tfh, cch = self.chiplet, self.tfh, self.cch
        assert cch is not None
        if not self.asid:
            tag = 0
        if cch.miss_mode is _POLL:
            tfh.raise_miss(tag, address, write, _MISS_UPM)
            self.call_os()
            return None
        while True:
            tfh.raise_miss(tag, address, write, _MISS_FMM)
            chiplet.raise_interrupt(self)
            if tfh.missing or self.status is not _ACTIVE:
                return None
            entry = chiplet.tlb.lookup(tag, address, write)
            if entry is not None:
                return entry

    def call_os(self) -> None:
        """Show the user that only the operating system can help."""
        self.status = _CALL_OS

    def stop(self, cause: Cause) -> bool:
        """End the instruction with an exception; False, as an operation answers."""
        self.cause = cause
        self.fault_address = None
        self.status = _EXCEPTION
        return False

    def fatal(self, address: int) -> None:
        """End the instruction: the operating system has no translation for `address`."""
        self.stop(Cause.OS_FATAL_TLB_FAULT)
        self.fault_address = address

    def interrupt(self) -> None:
        """The context stops: a miss is forgotten, and will be had again."""
        self.tfh.idle()
        if self.status is _CALL_OS:
            self.status = _ACTIVE
