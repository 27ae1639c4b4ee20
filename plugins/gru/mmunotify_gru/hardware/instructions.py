"""The instruction set: what is written into a control block, and what is read back from it.

Source of the names: drivers/misc/sgi-gru/gru_instructions.h. Where that says no more than a name,
the meaning is ours, and is said at the operation (`operations.py`).
"""

from __future__ import annotations

import enum
from typing import Final

import attrs


class Opcode(enum.IntEnum):
    """What a control block is told to do."""

    NOP = 0
    BCOPY = 1
    """Copy memory to memory, through a part of the data segment."""
    VLOAD = 2
    """Load elements that are a stride apart into the data segment."""
    IVLOAD = 3
    """Gather: load elements by an index vector."""
    VSTORE = 4
    IVSTORE = 5
    """Scatter: store elements by an index vector."""
    VSET = 6
    """Store one value into elements that are a stride apart."""
    IVSET = 7
    """Store one value into elements by an index vector."""
    MESQ = 8
    """Send a message: take room at the head of a queue, and store it there."""
    GAMXR = 9
    """Atomic operation on 16 bytes, with operands and result in the data segment."""
    GAMIR = 10
    """Atomic operation with an implicit operand."""
    GAMIRR = 11
    """The same, at a remote memory; DECZ besides."""
    GAMER = 12
    """Atomic operation with explicit operands."""
    GAMERR = 13
    """The same, at a remote memory; polling besides."""
    BSTORE = 14
    """Store a block from the data segment."""
    VFLUSH = 15
    """Flush cache lines: no byte changes."""


class Xtype(enum.IntEnum):
    """How large an element is."""

    B = 0
    S = 1
    W = 2
    DW = 3
    CL = 6

    @property
    def bytes(self) -> int:
        """1, 2, 4, 8, or a cache line."""
        return SIZES[self]


SIZES: Final = {Xtype.B: 1, Xtype.S: 2, Xtype.W: 4, Xtype.DW: 8, Xtype.CL: 64}


class Exop(enum.StrEnum):
    """What an atomic operation does to the old value; all of them answer with it."""

    NONE = "none"
    FETCH = "fetch"
    """Nothing."""
    CLR = "clr"
    INC = "inc"
    DEC = "dec"
    DECZ = "decz"
    """Decrement unless it is 0."""
    QCHK1 = "qchk1"
    """Of a queue head: take one line, if the limit leaves room for it."""
    QCHK2 = "qchk2"
    """Take two."""
    SWAP = "swap"
    OR = "or"
    AND = "and"
    XOR = "xor"
    ADD = "add"
    CSWAP = "cswap"
    """Store operand1 if the old value is operand2."""
    CADD = "cadd"
    """Add operand1 if the old value is operand2."""
    EPOLL = "epoll"
    """Wait until the value is operand1."""
    NPOLL = "npoll"
    """Wait until the value is not operand1."""


EXOPS: Final = {
    Opcode.GAMIR: frozenset((Exop.FETCH, Exop.CLR, Exop.INC, Exop.DEC, Exop.QCHK1, Exop.QCHK2)),
    Opcode.GAMIRR: frozenset((Exop.FETCH, Exop.CLR, Exop.INC, Exop.DEC, Exop.DECZ)),
    Opcode.GAMER: frozenset(
        (Exop.SWAP, Exop.OR, Exop.AND, Exop.XOR, Exop.ADD, Exop.CSWAP, Exop.CADD)
    ),
    Opcode.GAMERR: frozenset(
        (
            *(Exop.SWAP, Exop.OR, Exop.AND, Exop.XOR, Exop.ADD, Exop.CSWAP, Exop.CADD),
            *(Exop.EPOLL, Exop.NPOLL),
        )
    ),
    Opcode.GAMXR: frozenset((Exop.CSWAP,)),
}
"""Which operations each of the atomic instructions has."""


class CbStatus(enum.IntEnum):
    """What a control block says of itself (istatus)."""

    IDLE = 0
    EXCEPTION = 1
    ACTIVE = 2
    CALL_OS = 3
    """It misses, and nobody has been interrupted: the user has to call."""


class Substatus(enum.IntEnum):
    """How a MESQ ended (isubstatus)."""

    NO_ERROR = 0
    LB_OVERFLOWED = 1
    """A buffer on the way was full; nothing has happened."""
    QLIMIT_REACHED = 2
    """The queue has no room before its limit; nothing has happened."""
    PAGE_OVERFLOW = 3
    """Room was taken that lies in two pages, which a put cannot do: store it otherwise."""
    AMO_NACKED = 6
    """The head was not changed."""
    PUT_NACKED = 7
    """Room was taken, and nothing stored there: store it otherwise."""


class Cause(enum.IntFlag):
    """Why a control block is in EXCEPTION (ecause)."""

    NONE = 0
    INVALID_INSTRUCTION = 1 << 1
    PE_CHECK_DATA_ERROR = 1 << 3
    IAA_GAA_MISMATCH = 1 << 4
    """The address is not a multiple of the element's size."""
    DATA_SEGMENT_LIMIT_EXCEPTION = 1 << 5
    OS_FATAL_TLB_FAULT = 1 << 6
    """The operating system has no translation: a process would get a signal."""
    EXECUTION_HW_ERROR = 1 << 7
    TLBHW_ERROR = 1 << 8
    RA_REQUEST_TIMEOUT = 1 << 9
    RA_RESPONSE_DATA_ERROR = 1 << 13
    HA_RESPONSE_DATA_ERROR = 1 << 15


RETRYABLE: Final = (
    Cause.EXECUTION_HW_ERROR | Cause.RA_REQUEST_TIMEOUT | Cause.RA_RESPONSE_DATA_ERROR
)
"""What may go well the next time."""


@attrs.define(slots=True)
class Instruction:
    """One instruction. Addresses and offsets are bytes; a stride is in elements."""

    opcode: Opcode
    address: int = 0
    """Memory: of the source where there is one, else of the destination."""
    offset: int = 0
    """tri0: in the data segment."""
    xtype: Xtype = Xtype.DW
    nelem: int = 1
    stride: int = 1
    index: int = 0
    """tri1: of the index vector, in the data segment: 8 bytes per element, in elements."""
    operand1: int = 0
    """Of an atomic operation; the value of VSET and IVSET; the destination of a BCOPY."""
    operand2: int = 0
    """Of an atomic operation; how many cache lines a BCOPY uses as its buffer."""
    exop: Exop = Exop.NONE
