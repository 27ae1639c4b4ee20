"""A user's context: the awaitable instructions of a GRU.

    async with gru.open(mm.notifiers, cbs=4, dseg=8192) as context:
        await context.put(0, b"message")
        await context.vstore(address, elements=7, xtype=Xtype.B)
        old = await context.gamer(Exop.ADD, counter, 1)

Addresses are those of the address space, in bytes; offsets are bytes of the context's data segment;
`elements` are counted in elements of `xtype`, by default 8 bytes. An instruction takes one of the
context's control blocks, and waits for one if all are busy. It raises `InstructionException` where
the block stops, and `ContextClosed` when the address space has gone. An instruction that is
cancelled stops after some of its elements.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import anyio

from .errors import ContextClosed
from .hardware.geometry import CACHE_LINE
from .hardware.instructions import (
    CbStatus,
    Exop,
    Instruction,
    Opcode,
    Substatus,
    Xtype,
)

if TYPE_CHECKING:
    from .gru import Gru
    from .gts import Gts


# Members of an enum as globals: looked up in their class they cost more than the rest (3.11).
_NOP: Final = Opcode.NOP
_VLOAD: Final = Opcode.VLOAD
_VSTORE: Final = Opcode.VSTORE
_IVLOAD: Final = Opcode.IVLOAD
_IVSTORE: Final = Opcode.IVSTORE
_VSET: Final = Opcode.VSET
_IVSET: Final = Opcode.IVSET
_BCOPY: Final = Opcode.BCOPY
_BSTORE: Final = Opcode.BSTORE
_VFLUSH: Final = Opcode.VFLUSH
_GAMIR: Final = Opcode.GAMIR
_GAMIRR: Final = Opcode.GAMIRR
_GAMER: Final = Opcode.GAMER
_GAMERR: Final = Opcode.GAMERR
_GAMXR: Final = Opcode.GAMXR
_MESQ: Final = Opcode.MESQ
_IDLE: Final = CbStatus.IDLE
_CSWAP: Final = Exop.CSWAP
_CL: Final = Xtype.CL
_DW: Final = Xtype.DW


class Context:
    """What `Gru.open` gives."""

    def __init__(self, gru: Gru, gts: Gts, cbs: int, dseg: int) -> None:
        self.gru: Final = gru
        self.gts: Final = gts
        self.dseg_bytes: Final = dseg
        self._free: Final = list(range(cbs))
        """Control blocks that nobody uses; empty while somebody waits for one."""
        self._queue: Final[deque[_Waiter]] = deque()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Context {'closed' if self._closed else self.gts.name}>"

    def close(self) -> None:
        """Refuse further instructions; `Gru.open` does it on the way out."""
        self._closed = True

    # ------------------------------------------------------------------ the data segment

    async def put(self, offset: int, data: bytes) -> None:
        """Store into the data segment. Suspends only if the context has to be loaded."""
        self._check(offset, len(data))
        if self.gts.cch is None:
            await self.gru.touch(self.gts)
        cch = self.gts.cch
        assert cch is not None
        cch.dseg[offset : offset + len(data)] = data

    async def get(self, offset: int, size: int) -> bytes:
        """Bytes of the data segment. Suspends only if the context has to be loaded."""
        self._check(offset, size)
        if self.gts.cch is None:
            await self.gru.touch(self.gts)
        cch = self.gts.cch
        assert cch is not None
        return bytes(cch.dseg[offset : offset + size])

    def _check(self, offset: int, size: int) -> None:
        self._expect_open()
        if not 0 <= offset <= offset + size <= self.dseg_bytes:
            raise ValueError(
                f"[{offset}, +{size}): expected a part of a data segment of {self.dseg_bytes} bytes"
            )

    # ------------------------------------------------------------------ any instruction

    async def execute(self, instruction: Instruction) -> tuple[int, Substatus]:
        """Have a control block execute it, and wait for its end.

        Returns the block's value, which is the old one of an atomic operation, and its substatus.
        """
        number = self._free.pop() if self._free else await self._wait_for_block()
        try:
            if self._closed:
                self._expect_open()
            gts = self.gts
            if not gts.cbrs:
                await self.gru.touch(gts)
            cbr = gts.cbrs[number]
            try:
                cbr.start(instruction)
            except BaseException:
                cbr.abort()
                raise
            if cbr.status is _IDLE:
                return cbr.value, cbr.substatus
            return await self._finish(number)
        finally:
            if self._queue:
                self._give_back(number)
            else:
                self._free.append(number)

    async def start(self, instruction: Instruction) -> Operation:
        """Have a control block begin, and go on without it; the block is taken until `wait`."""
        number = self._free.pop() if self._free else await self._wait_for_block()
        try:
            self._expect_open()
            if not self.gts.cbrs:
                await self.gru.touch(self.gts)
            cbr = self.gts.cbrs[number]
            try:
                cbr.start(instruction)
            except BaseException:
                cbr.abort()
                raise
        except BaseException:
            self._give_back(number)
            raise
        return Operation(self, number)

    async def _finish(self, number: int) -> tuple[int, Substatus]:
        """Wait for a block that has begun; stop it if that is cancelled."""
        self._expect_open()
        gts = self.gts
        gts.get()
        try:
            try:
                await self.gru.wait(gts, number)
            except BaseException:
                self.gru.abort(gts, number)
                raise
            cbr = gts.cbrs[number]
            return cbr.value, cbr.substatus
        finally:
            gts.drop()

    async def _wait_for_block(self) -> int:
        """The block that somebody hands over; first come, first served."""
        waiter = _Waiter()
        self._queue.append(waiter)
        try:
            await waiter.event.wait()
        except BaseException:
            if waiter.number is None:
                self._queue.remove(waiter)
            else:
                self._give_back(waiter.number)
            raise
        assert waiter.number is not None
        return waiter.number

    def _give_back(self, number: int) -> None:
        if self._queue:
            waiter = self._queue.popleft()
            waiter.number = number
            waiter.event.set()
        else:
            self._free.append(number)

    def _expect_open(self) -> None:
        if self._closed:
            raise ContextClosed(f"{self!r}: expected an open context")

    # ------------------------------------------------------------------ memory and data segment

    async def nop(self) -> None:
        """Nothing."""
        await self.execute(Instruction(_NOP))

    async def vload(
        self,
        address: int,
        offset: int = 0,
        *,
        elements: int,
        xtype: Xtype = Xtype.DW,
        stride: int = 1,
    ) -> None:
        """Load elements that are `stride` elements apart, side by side to `offset`."""
        await self.execute(Instruction(_VLOAD, address, offset, xtype, elements, stride))

    async def vstore(
        self,
        address: int,
        offset: int = 0,
        *,
        elements: int,
        xtype: Xtype = Xtype.DW,
        stride: int = 1,
    ) -> None:
        """Store elements from `offset` on, `stride` elements apart."""
        await self.execute(Instruction(_VSTORE, address, offset, xtype, elements, stride))

    async def ivload(
        self, address: int, offset: int, index: int, *, elements: int, xtype: Xtype = Xtype.DW
    ) -> None:
        """Gather to `offset`: element i is vector[i] elements after `address`.

        The vector is at `index` of the data segment, 8 bytes per element, little-endian.
        """
        await self.execute(Instruction(_IVLOAD, address, offset, xtype, elements, 1, index))

    async def ivstore(
        self, address: int, offset: int, index: int, *, elements: int, xtype: Xtype = Xtype.DW
    ) -> None:
        """Scatter from `offset`: element i goes vector[i] elements after `address`."""
        await self.execute(Instruction(_IVSTORE, address, offset, xtype, elements, 1, index))

    async def vset(
        self,
        address: int,
        value: int,
        *,
        elements: int,
        xtype: Xtype = Xtype.DW,
        stride: int = 1,
    ) -> None:
        """Store one value into elements that are `stride` elements apart.

        It is cut to the size of an element; a cache line is eight times 8 bytes.
        """
        await self.execute(Instruction(_VSET, address, 0, xtype, elements, stride, operand1=value))

    async def ivset(
        self, address: int, value: int, index: int, *, elements: int, xtype: Xtype = Xtype.DW
    ) -> None:
        """Store one value into the elements that a vector names."""
        await self.execute(
            Instruction(_IVSET, address, 0, xtype, elements, 1, index, operand1=value)
        )

    async def bcopy(
        self,
        source: int,
        destination: int,
        elements: int,
        *,
        xtype: Xtype = Xtype.B,
        buffer: int = 0,
        lines: int | None = None,
    ) -> None:
        """Copy memory; elements are bytes here unless `xtype` says otherwise.

        It goes through `lines` cache lines of the data segment at `buffer`, which are lost: by
        default all that there are from there on.
        """
        if lines is None:
            lines = max(0, self.dseg_bytes - buffer) // CACHE_LINE
        await self.execute(
            Instruction(
                _BCOPY,
                source,
                buffer,
                xtype,
                elements,
                operand1=destination,
                operand2=lines,
            )
        )

    async def bstore(
        self, address: int, offset: int = 0, *, elements: int, xtype: Xtype = Xtype.CL
    ) -> None:
        """Store a block from `offset` on."""
        await self.execute(Instruction(_BSTORE, address, offset, xtype, elements))

    async def vflush(
        self, address: int, *, elements: int, xtype: Xtype = Xtype.CL, stride: int = 1
    ) -> None:
        """Flush what is cached of these elements."""
        await self.execute(Instruction(_VFLUSH, address, 0, xtype, elements, stride))

    # ------------------------------------------------------------------ atomic operations

    async def gamir(self, exop: Exop, address: int, *, xtype: Xtype = Xtype.DW) -> int:
        """Fetch, clr, inc, dec, qchk1 or qchk2 at `address`; the old value."""
        return (await self.execute(_atomic(_GAMIR, exop, address, xtype)))[0]

    async def gamirr(self, exop: Exop, address: int, *, xtype: Xtype = Xtype.DW) -> int:
        """Fetch, clr, inc, dec or decz, at a remote memory; the old value."""
        return (await self.execute(_atomic(_GAMIRR, exop, address, xtype)))[0]

    async def gamer(
        self,
        exop: Exop,
        address: int,
        operand1: int,
        operand2: int = 0,
        *,
        xtype: Xtype = Xtype.DW,
    ) -> int:
        """Swap, or, and, xor, add, cswap or cadd at `address`; the old value.

        The last two do something only where the old value is `operand2`.
        """
        instruction = _atomic(_GAMER, exop, address, xtype, operand1, operand2)
        return (await self.execute(instruction))[0]

    async def gamerr(
        self,
        exop: Exop,
        address: int,
        operand1: int,
        operand2: int = 0,
        *,
        xtype: Xtype = Xtype.DW,
    ) -> int:
        """As `gamer`, at a remote memory; epoll and npoll besides, which wait for a value."""
        instruction = _atomic(_GAMERR, exop, address, xtype, operand1, operand2)
        return (await self.execute(instruction))[0]

    async def gamxr(self, address: int, offset: int = 0) -> None:
        """Compare and swap 16 bytes at `address`, a multiple of 16.

        The data segment has at `offset` the 16 bytes that are expected, which become the old ones,
        and behind them the new ones.
        """
        await self.execute(Instruction(_GAMXR, address, offset, _DW, exop=_CSWAP))

    async def mesq(self, queue: int, offset: int = 0, *, lines: int = 1) -> tuple[int, Substatus]:
        """Send `lines` cache lines from `offset` to the queue at address `queue`.

        Returns the queue's head as it was, and what was done (`operations.mesq`). What is built on
        it is in `message_queue.py`.
        """
        return await self.execute(Instruction(_MESQ, queue, offset, _CL, lines))

    # ------------------------------------------------------------------ the context itself

    def unload(self) -> bool:
        """Have the context taken off its chiplet; the next use loads it again.

        Whether it was loaded and nobody at work on it (GRU_USER_UNLOAD_CONTEXT).
        """
        self._expect_open()
        gts = self.gts
        gts.gms.statistics.user_unload_context += 1
        return self.gru.evict(gts)

    def flush_tlb(self, start: int, end: int) -> None:
        """Drop translations of [start, end), in bytes, without cause (GRU_USER_FLUSH_TLB)."""
        self._expect_open()
        gms = self.gts.gms
        gms.statistics.user_flush_tlb += 1
        gms.flush_tlb_range(start, end)

    def place(self, *, blade: int | None = None, chiplet: int | None = None) -> None:
        """Say where to load it from now on; None: where its task runs (GRU_SET_CONTEXT_OPTION).

        A context that is elsewhere is unloaded, now or by whoever is at work on it. Raises
        NoResources for a place that there is not.
        """
        self._expect_open()
        gts = self.gts
        self.gru.check_place(blade, chiplet)
        gts.gms.statistics.set_context_option += 1
        gts.blade, gts.chiplet = blade, chiplet
        if gts.state is not None and not self.gru.well_placed(gts):
            self.gru.evict(gts)


class _Waiter:
    """Who waits for a control block."""

    __slots__ = ("event", "number")

    def __init__(self) -> None:
        self.event: Final = anyio.Event()
        self.number: int | None = None
        """Once it is handed over."""


class Operation:
    """An instruction that has begun. `wait` for it: until then its block is taken."""

    def __init__(self, context: Context, number: int) -> None:
        self._context: Final = context
        self._number: Final = number
        self._over = False

    @property
    def status(self) -> CbStatus:
        """What the block says; ACTIVE while its context is not loaded."""
        self._context._expect_open()
        cbrs = self._context.gts.cbrs
        return cbrs[self._number].status if cbrs else CbStatus.ACTIVE

    async def wait(self) -> tuple[int, Substatus]:
        """Until it is over; once. Returns and raises like `Context.execute`."""
        if self._over:
            raise ValueError("wait: expected an operation that was not waited for")
        self._over = True
        try:
            return await self._context._finish(self._number)
        finally:
            self._context._give_back(self._number)


def _atomic(
    opcode: Opcode,
    exop: Exop,
    address: int,
    xtype: Xtype,
    operand1: int = 0,
    operand2: int = 0,
) -> Instruction:
    return Instruction(opcode, address, 0, xtype, operand1=operand1, operand2=operand2, exop=exop)
