"""The self tests that the GRU's kernel services have (quicktest0 to 3), written anew."""

from __future__ import annotations

import pytest

from mmunotify.model import Machine
from mmunotify_gru import Gru, MessageQueue, Sender
from mmunotify_gru.errors import QueueFull
from mmunotify_gru.hardware.instructions import CbStatus, Instruction, Opcode, Xtype

MAGIC = 0x1234567887654321


async def test_quicktest0_loads_and_stores_a_magic_value() -> None:
    """VLOAD brings a word into the data segment, VSTORE takes it elsewhere; nothing else moves."""
    async with Machine(frames=1 << 10, contents=True) as machine:
        mm = machine.new_mm()
        word0 = await mm.mmap(4096)
        word1 = word0 + 8
        await mm.write(word0, MAGIC.to_bytes(8, "little"))
        async with Gru().open(mm.notifiers, cbs=1, dseg=1024) as context:
            await context.vload(word0, elements=1)
            assert await context.get(0, 8) == MAGIC.to_bytes(8, "little")
            await context.vstore(word1, elements=1)
            assert await context.get(8, 1016) == bytes(1016)
        assert await mm.read(word0, 24) == MAGIC.to_bytes(8, "little") * 2 + bytes(8)


async def test_quicktest1_fills_and_empties_a_message_queue() -> None:
    """A queue of 8 lines takes four messages, refuses the fifth, and gives the four in order."""
    async with Machine(frames=1 << 10, contents=True) as machine:
        mm = machine.new_mm()
        memory = await mm.mmap(4096)
        async with Gru().open(mm.notifiers) as context:
            queue = await MessageQueue.create(context, memory, 8)
            sender = Sender(context, memory, scratch=1024)
            for number in range(4):
                await sender.send(bytes((number,)) * 56)
            with pytest.raises(QueueFull):
                await sender.send(b"one too many")
            for number in range(4):
                assert await queue.receive_nowait() == bytes((number,)) * 56
            assert await queue.receive_nowait() is None
            statistics = context.gts.gms.statistics
            assert (statistics.mesq_send, statistics.mesq_send_failed) == (5, 1)
            assert (statistics.mesq_receive, statistics.mesq_receive_none) == (4, 1)


@pytest.mark.parametrize("miss", ["interrupt", "poll"])
async def test_quicktest2_completes_four_operations(miss: str) -> None:
    """Four control blocks store at once; each completes once, whichever is waited for first."""
    async with Machine(frames=1 << 10, contents=True) as machine:
        mm = machine.new_mm()
        memory = await mm.mmap(4 * 4096)
        async with Gru().open(mm.notifiers, cbs=4, miss=miss) as context:
            operations = [
                await context.start(
                    Instruction(Opcode.VSET, memory + 4096 * number, operand1=MAGIC + number)
                )
                for number in range(4)
            ]
            for operation in reversed(operations):
                await operation.wait()
                assert operation.status is CbStatus.IDLE
                with pytest.raises(ValueError, match="not waited for"):
                    await operation.wait()
        for number in range(4):
            stored = await mm.read(memory + 4096 * number, 16)
            assert stored == (MAGIC + number).to_bytes(8, "little") + bytes(8)


async def test_quicktest3_copies_200_bytes() -> None:
    """BCOPY copies what it is told to and not a byte more."""
    async with Machine(frames=1 << 10, contents=True) as machine:
        mm = machine.new_mm()
        source, target = await mm.mmap(4096), await mm.mmap(4096)
        await mm.write(source, bytes(range(1, 251)))
        await mm.write(target, b"\xee" * 250)
        async with Gru().open(mm.notifiers) as context:
            await context.bcopy(source, target, 200, xtype=Xtype.B)
        assert await mm.read(target, 250) == bytes(range(1, 201)) + b"\xee" * 50
