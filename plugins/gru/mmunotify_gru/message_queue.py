"""Message queues in memory: senders take room with MESQ, one receiver reads in order.

The queue is cache lines at an address. The first holds the head (`hardware.atomics.queue_head`),
how many lines there are, and a word per half; messages begin at the third. The lines of messages
are two halves. The head's limit ends one of them; a sender who reaches it takes the word of the
other half, which the receiver has set when it was done with it, and turns the head there.

A message is one line or two. A line begins with a byte that says whether it is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from anyio import CancelScope

from mmunotify import RWSemaphore

from .errors import Congestion, MessageQueueError, QueueFull
from .hardware.atomics import head_and_limit, queue_head
from .hardware.geometry import CACHE_LINE
from .hardware.instructions import Exop, Substatus, Xtype

if TYPE_CHECKING:
    from .context import Context
    from .statistics import Statistics

HEADER_LINES: Final = 2
SPARE_LINES: Final = 2
"""At the end: a queue of 8 lines holds 4 messages."""
MIN_LINES: Final = HEADER_LINES + SPARE_LINES + 4
FIRST_BYTES: Final = CACHE_LINE - 4
"""Of a message in its first line, behind presence, number of lines, and length in two bytes."""
SECOND_BYTES: Final = CACHE_LINE - 1
"""In its second, behind presence."""
MAX_BYTES: Final = FIRST_BYTES + SECOND_BYTES
SCRATCH: Final = 2 * CACHE_LINE
"""Bytes of data segment that a sender or receiver needs for itself."""

EMPTY, FULL, NOOP = 0, 1, 2
_LINES: Final = 8
_FREE: Final = (16, 24)
"""Offsets of the words in the first line: number of lines, and who may turn to each half."""


def half_lines(lines: int) -> int:
    """How many lines each half has, of a queue of `lines`."""
    return (lines - HEADER_LINES - SPARE_LINES) // 2


def pack(message: bytes) -> bytes:
    """A message as it lies in the queue. Raises ValueError for one that is too long."""
    if len(message) > MAX_BYTES:
        raise ValueError(f"a message of {len(message)} bytes: expected at most {MAX_BYTES}")
    lines = 1 if len(message) <= FIRST_BYTES else 2
    first = bytes((FULL, lines)) + len(message).to_bytes(2, "little") + message[:FIRST_BYTES]
    if lines == 1:
        return first.ljust(CACHE_LINE, b"\0")
    return first + (bytes((FULL,)) + message[FIRST_BYTES:]).ljust(CACHE_LINE, b"\0")


class Sender:
    """Sends to the queue at `address` from a context that maps it.

    Uses `SCRATCH` bytes of the context's data segment at `scratch`, which must be its own.
    """

    def __init__(self, context: Context, address: int, *, scratch: int = 0) -> None:
        self._context: Final = context
        self._address: Final = address
        self._scratch: Final = scratch
        self._lock: Final = RWSemaphore("gru_message_sender")

    @property
    def _statistics(self) -> Statistics:
        return self._context.gts.gms.statistics

    async def send(self, message: bytes) -> None:
        """Put a message of at most `MAX_BYTES` at the end of the queue.

        Raises QueueFull when the receiver has to free some first, and Congestion when it may go
        well the next time. Nothing was sent then.
        """
        packed = pack(message)
        async with self._lock.writing():
            self._statistics.mesq_send += 1
            try:
                while not await self._send(packed):
                    pass
            except MessageQueueError:
                self._statistics.mesq_send_failed += 1
                raise

    async def _send(self, packed: bytes) -> bool:
        """One attempt; False: the head was turned, try again."""
        context, statistics = self._context, self._statistics
        lines = len(packed) // CACHE_LINE
        await context.put(self._scratch, packed)
        head, substatus = await context.mesq(self._address, self._scratch, lines=lines)
        if substatus is Substatus.NO_ERROR:
            return True
        if substatus is Substatus.QLIMIT_REACHED:
            statistics.mesq_send_qlimit_reached += 1
            # Whoever has the word of a half must turn the head or give it back.
            with CancelScope(shield=True):
                return await self._turn(head)
        if substatus is Substatus.LB_OVERFLOWED:
            statistics.mesq_send_lb_overflow += 1
            raise Congestion(f"queue {self._address:#x}: a buffer was full", substatus)
        if substatus is Substatus.AMO_NACKED:
            statistics.mesq_send_amo_nacked += 1
            raise Congestion(f"queue {self._address:#x}: its head did not answer", substatus)
        if substatus is Substatus.PAGE_OVERFLOW:
            statistics.mesq_page_overflow += 1
        else:
            statistics.mesq_send_put_nacked += 1
        await self._store(head, lines)
        return True

    async def _store(self, head: int, lines: int) -> None:
        """Room was taken and nothing stored there: store the message, its first line last.

        Not cancelled: the receiver waits for what is in this place before it looks any further.
        """
        slot = self._address + head_and_limit(head)[0] * CACHE_LINE
        with CancelScope(shield=True):
            for at in reversed(range(0, lines * CACHE_LINE, CACHE_LINE)):
                await self._context.vstore(
                    slot + at, self._scratch + at, elements=1, xtype=Xtype.CL
                )

    async def _turn(self, word: int) -> bool:
        """A half is full: turn the head to the other one. Always False: try again."""
        context, address, statistics = self._context, self._address, self._statistics
        head, limit = head_and_limit(word)
        half = half_lines(await context.gamir(Exop.FETCH, address + _LINES))
        other = 1 if limit == HEADER_LINES + half else 0
        lock = address + _FREE[other]
        if not await context.gamir(Exop.CLR, lock):
            statistics.mesq_qf_locked += 1
            now = await context.gamir(Exop.FETCH, address)
            if now != word:
                return False  # somebody has turned it meanwhile
            raise QueueFull(
                f"queue {address:#x} is full: expected its receiver to free messages",
                Substatus.QLIMIT_REACHED,
            )
        if head != limit and not await self._fill(word):
            await context.gamir(Exop.INC, lock)
            return False
        start = HEADER_LINES + other * half
        turned = queue_head(start, start + half)
        # What the filling line has made of the head, or the head itself if there was no need.
        expected = queue_head(limit, limit)
        if await context.gamer(Exop.CSWAP, address, turned, expected) != expected:
            statistics.mesq_qf_switch_head_failed += 1
            await context.gamir(Exop.INC, lock)
        return False

    async def _fill(self, word: int) -> bool:
        """Take the one line that is left of a half, for nothing; False: it is taken already."""
        context = self._context
        self._statistics.mesq_noop += 1
        await context.put(self._scratch, bytes((NOOP, 1)).ljust(CACHE_LINE, b"\0"))
        head, substatus = await context.mesq(self._address, self._scratch, lines=1)
        if substatus in {Substatus.PUT_NACKED, Substatus.PAGE_OVERFLOW}:
            await self._store(head, 1)
            return True
        return substatus is Substatus.NO_ERROR


class MessageQueue:
    """The receiver's side of a queue of `lines` cache lines at `address`, which it owns.

    `await MessageQueue.create(context, address, lines)` makes one. Uses `SCRATCH` bytes of the
    context's data segment at `scratch`. One receiver per queue.
    """

    def __init__(self, context: Context, address: int, lines: int, *, scratch: int = 0) -> None:
        if address % CACHE_LINE or lines < MIN_LINES or lines % 2:
            raise ValueError(
                f"a queue of {lines} lines at {address:#x}: expected an even number, at least "
                f"{MIN_LINES}, at a multiple of {CACHE_LINE}"
            )
        self.context: Final = context
        self.address: Final = address
        self.lines: Final = lines
        self._scratch: Final = scratch
        self._half: Final = half_lines(lines)
        self._next = HEADER_LINES
        self._lock: Final = RWSemaphore("gru_message_receiver")

    @classmethod
    async def create(
        cls, context: Context, address: int, lines: int, *, scratch: int = 0
    ) -> MessageQueue:
        """Make an empty queue (gru_create_message_queue). Raises ValueError for a bad place."""
        queue = cls(context, address, lines, scratch=scratch)
        await context.vset(address, 0, elements=lines, xtype=Xtype.CL)
        head = queue_head(HEADER_LINES, HEADER_LINES + queue._half)
        words = (head, lines, 0, 1)
        first = b"".join(word.to_bytes(8, "little") for word in words)
        await context.put(scratch, first)
        await context.vstore(address, scratch, elements=len(words))
        return queue

    async def receive_nowait(self) -> bytes | None:
        """The next message, which is taken out of the queue; None: there is none yet."""
        async with self._lock.writing():
            message = await self._take()
            statistics = self.context.gts.gms.statistics
            if message is None:
                statistics.mesq_receive_none += 1
            else:
                statistics.mesq_receive += 1
            return message

    async def receive(self) -> bytes:
        """The next message; waits for one, with a control block that polls memory."""
        while True:
            message = await self.receive_nowait()
            if message is not None:
                return message
            slot = self.address + self._next * CACHE_LINE
            await self.context.gamerr(Exop.NPOLL, slot, 0, xtype=Xtype.W)

    def __aiter__(self) -> MessageQueue:
        """Every message, as they come, without end."""
        return self

    async def __anext__(self) -> bytes:
        return await self.receive()

    async def _take(self) -> bytes | None:
        while True:
            line = await self._line(self._next)
            if line[0] == EMPTY:
                return None
            if line[0] == NOOP:
                await self._free(1)
                continue
            lines, length = line[1], int.from_bytes(line[2:4], "little")
            message = line[4:]
            if lines == 2:
                second = await self._line(self._next + 1)
                if second[0] == EMPTY:
                    return None
                message += second[1:]
            await self._free(lines)
            return message[:length]

    async def _line(self, number: int) -> bytes:
        address = self.address + number * CACHE_LINE
        await self.context.vload(address, self._scratch, elements=1, xtype=Xtype.CL)
        return await self.context.get(self._scratch, CACHE_LINE)

    async def _free(self, lines: int) -> None:
        """Empty the lines of a message, and give the half back of which it was the last."""
        address = self.address + self._next * CACHE_LINE
        with CancelScope(shield=True):
            await self.context.vset(address, 0, elements=lines, xtype=Xtype.CL)
            self._next += lines
            for half in (0, 1):
                if self._next == HEADER_LINES + (half + 1) * self._half:
                    self._next = HEADER_LINES + (1 - half) * self._half
                    await self.context.vset(self.address + _FREE[half], 1, elements=1)
                    return
