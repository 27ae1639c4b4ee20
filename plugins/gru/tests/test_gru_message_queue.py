"""Message queues: any order of sends and receives, two lines at a time, and what goes wrong."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmunotify.model import Machine
from mmunotify_gru import Gru, MessageQueue, Sender
from mmunotify_gru.errors import Congestion, QueueFull
from mmunotify_gru.hardware.instructions import Substatus
from mmunotify_gru.message_queue import FIRST_BYTES, MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable


class Queue:
    """A queue in a page of the model, with a sender and a receiver in two contexts."""

    def __init__(self, gru: Gru, mm: Any, queue: MessageQueue, sender: Sender) -> None:
        self.gru = gru
        self.mm = mm
        self.queue = queue
        self.sender = sender


async def made(lines: int, run: Callable[[Queue], Any], offset: int = 0) -> None:
    async with Machine(frames=1 << 10, swap=1 << 10, contents=True) as machine:
        mm = machine.new_mm()
        memory = await mm.mmap(1 << 14) + offset
        gru = Gru()
        async with gru.open(mm.notifiers) as one, gru.open(mm.notifiers) as two:
            queue = await MessageQueue.create(one, memory, lines)
            await run(Queue(gru, mm, queue, Sender(two, memory)))


OPERATIONS = st.lists(
    st.one_of(
        st.integers(0, MAX_BYTES).map(lambda size: ("send", size)),
        st.just(("receive", 0)),
        st.just(("receive", 0)),
        st.just(("swap", 0)),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(lines=st.sampled_from([8, 10, 14, 128]), operations=OPERATIONS)
def test_any_order_of_sends_and_receives(lines: int, operations: list[tuple[str, int]]) -> None:
    """Messages arrive whole, once, in order; a queue that has room for one takes it."""

    async def run(given: Queue) -> None:
        expected: deque[bytes] = deque()
        half = (lines - 4) // 2
        sent = 0
        for operation, size in operations:
            if operation == "send":
                message = bytes((sent + at) & 255 for at in range(size))
                try:
                    await given.sender.send(message)
                    expected.append(message)
                    sent += 1
                except QueueFull:
                    # Each half has at least one message of which the other can be in the way.
                    needed = sum(1 + (len(other) > FIRST_BYTES) for other in expected)
                    assert needed + 1 + (size > FIRST_BYTES) > half
            elif operation == "receive":
                received = await given.queue.receive_nowait()
                assert received == (expected.popleft() if expected else None)
            else:
                await given.mm.madvise(given.queue.address & -4096, 1 << 13, "pageout")

    anyio.run(made, lines, run, 4096 - 3 * 64)


async def test_receive_waits_and_senders_take_turns() -> None:
    """Many senders at once against a small queue: every message arrives, each sender's in order."""

    async def run(given: Queue) -> None:
        async def sends(name: int, context: Any) -> None:
            sender = Sender(context, given.queue.address)
            for number in range(12):
                while True:
                    try:
                        await sender.send(bytes((name, number)) * (8 if number % 3 else 50))
                        break
                    except QueueFull:
                        await anyio.lowlevel.checkpoint()

        received: list[tuple[int, int]] = []

        async def receives() -> None:
            async for message in given.queue:
                received.append((message[0], message[1]))
                if len(received) == 36:
                    return

        async with (
            given.gru.open(given.mm.notifiers) as one,
            given.gru.open(given.mm.notifiers) as two,
            given.gru.open(given.mm.notifiers) as three,
            anyio.create_task_group() as tg,
        ):
            tg.start_soon(receives)
            for name, context in enumerate((one, two, three)):
                tg.start_soon(sends, name, context)
        for name in range(3):
            assert [number for who, number in received if who == name] == list(range(12))

    await made(14, run)


@pytest.mark.parametrize(
    ("answer", "counter"),
    [
        (Substatus.LB_OVERFLOWED, "mesq_send_lb_overflow"),
        (Substatus.AMO_NACKED, "mesq_send_amo_nacked"),
    ],
)
async def test_congestion_sends_nothing(answer: Substatus, counter: str) -> None:
    """A sender that was not heard is told so, and may try again."""

    async def run(given: Queue) -> None:
        await given.sender.send(b"first")
        for chiplet in given.gru.chiplets:
            chiplet.fabric.append(answer)
        with pytest.raises(Congestion) as caught:
            await given.sender.send(b"second")
        assert caught.value.substatus is answer
        await given.sender.send(b"third")
        received = [await given.queue.receive_nowait() for _ in range(3)]
        assert received == [b"first", b"third", None]
        assert getattr(given.gru.statistics, counter) == 1

    await made(8, run)


@pytest.mark.parametrize("size", [10, 100])
async def test_a_put_that_is_refused_is_stored_otherwise(size: int) -> None:
    """The room was taken: the message is stored there by VSTORE, and arrives in its turn."""

    async def run(given: Queue) -> None:
        await given.sender.send(b"before")
        for chiplet in given.gru.chiplets:
            chiplet.fabric.append(Substatus.PUT_NACKED)
        await given.sender.send(bytes(size))
        await given.sender.send(b"after")
        received = [await given.queue.receive_nowait() for _ in range(3)]
        assert received == [b"before", bytes(size), b"after"]
        assert given.gru.statistics.mesq_send_put_nacked == 1

    await made(16, run)


async def test_a_message_in_two_pages_is_stored_otherwise() -> None:
    """MESQ cannot put across a page boundary, the sender can."""

    async def run(given: Queue) -> None:
        await given.sender.send(b"x" * 100)
        assert await given.queue.receive_nowait() == b"x" * 100
        assert given.gru.statistics.mesq_page_overflow == 1

    await made(16, run, 4096 - 3 * 64)


async def test_bad_queues_and_messages_are_refused() -> None:
    """What does not fit is said with its numbers."""

    async def run(given: Queue) -> None:
        with pytest.raises(ValueError, match=f"of 200 bytes: expected at most {MAX_BYTES}"):
            await given.sender.send(bytes(200))
        for lines, address in ((7, 0), (9, 0), (8, 32)):
            with pytest.raises(ValueError, match="expected an even number, at least 8"):
                MessageQueue(given.queue.context, given.queue.address + address, lines)

    await made(8, run)


async def test_cancelled_sends_leave_the_queue_whole() -> None:
    """Whenever a sender is cancelled, the messages of the others arrive."""

    async def run(given: Queue) -> None:
        async def stream(scope: anyio.CancelScope) -> None:
            with scope:
                while True:
                    try:
                        await given.sender.send(b"\1" * 100)
                    except QueueFull:
                        await anyio.lowlevel.checkpoint()

        for _ in range(10):
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as tg:
                tg.start_soon(stream, scope)
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
                    await given.mm.madvise(given.queue.address & -4096, 1 << 13, "pageout")
                scope.cancel()
            while await given.queue.receive_nowait() is not None:
                pass
            await given.sender.send(b"last")
            assert await given.queue.receive() == b"last"

    await made(8, run)
