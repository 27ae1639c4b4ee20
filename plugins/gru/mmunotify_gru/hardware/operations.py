"""What the instructions do, on the bytes of memory and of the data segment.

Each is a function of a control block that is called when its instruction begins, and again when the
block runs on after a miss: `cbr.progress` says how many elements are done. It answers True when the
instruction is complete. Otherwise the block misses, has stopped with an exception, polls, or has
done as much as it may in one step.

Elements are processed in order. One that is repeated after a miss has not been stored before.
"""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING, Final

from mmunotify import PAGE_SIZE

from .atomics import READ_ONLY, RESULTS, advance, head_and_limit
from .geometry import ADDRESS_MASK, CACHE_LINE, PAGE_MASK
from .instructions import EXOPS, SIZES, Cause, Exop, Opcode, Substatus, Xtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cbr import Cbr
    from .instructions import Instruction

STEP: Final = 128
"""Runs of elements that a block does in one step; who waits for it lets others run in between."""
# Members of an enum as globals: looked up in their class they cost more than the rest (3.11).
_FINE: Final = Cause.NONE
_CL: Final = Xtype.CL
_EPOLL: Final = Exop.EPOLL
_NPOLL: Final = Exop.NPOLL
_ATOMIC_SIZES: Final = frozenset((Xtype.W, Xtype.DW))


def nop(cbr: Cbr, ins: Instruction) -> bool:
    """Nothing."""
    return True


def _bad(cbr: Cbr, ins: Instruction, vector: int, indices: int) -> Cause:
    """Why an instruction cannot begin; `vector` and `indices` are bytes of data segment."""
    if ins.nelem < 1 or ins.stride < 0 or not 0 <= ins.address <= ADDRESS_MASK:
        return Cause.INVALID_INSTRUCTION
    limit = len(cbr.dseg)
    if vector and not 0 <= ins.offset <= limit - vector:
        return Cause.DATA_SEGMENT_LIMIT_EXCEPTION
    if indices and not 0 <= ins.index <= limit - indices:
        return Cause.DATA_SEGMENT_LIMIT_EXCEPTION
    if ins.address & (SIZES[ins.xtype] - 1):
        return Cause.IAA_GAA_MISMATCH
    return _FINE


def _run(address: int, size: int, step: int, left: int) -> int:
    """How many of the elements from `address` on lie in its page."""
    if step == 0:
        return left
    return min(left, (PAGE_MASK - (address & PAGE_MASK) + 1 - size) // step + 1)


def vload(cbr: Cbr, ins: Instruction) -> bool:
    """Elements of memory, `stride` apart, side by side into the data segment."""
    size, count, done = SIZES[ins.xtype], ins.nelem, cbr.progress
    if done == 0:
        bad = _bad(cbr, ins, count * size, 0)
        if bad:
            return cbr.stop(bad)
    step = ins.stride * size
    dseg, offset, memory = cbr.dseg, ins.offset, cbr.memory
    for _ in range(STEP):
        address = ins.address + done * step & ADDRESS_MASK
        entry = cbr.translate(address, False)
        if entry is None:
            cbr.progress = done
            return False
        run = _run(address, size, step, count - done)
        data = memory.read(entry, address - entry.address, (run - 1) * step + size)
        if step != size:
            data = b"".join([data[at * step : at * step + size] for at in range(run)])
        dseg[offset + done * size : offset + (done + run) * size] = data
        done += run
        if done == count:
            return True
    cbr.progress = done
    return False


def vstore(cbr: Cbr, ins: Instruction) -> bool:
    """The reverse of `vload`."""
    size, count, done = SIZES[ins.xtype], ins.nelem, cbr.progress
    if done == 0:
        bad = _bad(cbr, ins, count * size, 0)
        if bad:
            return cbr.stop(bad)
    step = ins.stride * size
    dseg, offset, memory = cbr.dseg, ins.offset, cbr.memory
    for _ in range(STEP):
        address = ins.address + done * step & ADDRESS_MASK
        entry = cbr.translate(address, True)
        if entry is None:
            cbr.progress = done
            return False
        run = _run(address, size, step, count - done)
        data = bytes(dseg[offset + done * size : offset + (done + run) * size])
        at = address - entry.address
        if step == size:
            memory.write(entry, at, data)
        else:
            for element in range(run):
                part = data[element * size : (element + 1) * size]
                memory.write(entry, at + element * step, part)
        done += run
        if done == count:
            return True
    cbr.progress = done
    return False


def _address(cbr: Cbr, ins: Instruction, element: int, size: int) -> int:
    """Where the index vector says that an element is."""
    at = ins.index + 8 * element
    index = int.from_bytes(cbr.dseg[at : at + 8], "little")
    return ins.address + index * size & ADDRESS_MASK


def ivload(cbr: Cbr, ins: Instruction) -> bool:
    """Gather: element i is `index[i]` elements after the address.

    The vector must not be where the elements go.
    """
    size, count, done = SIZES[ins.xtype], ins.nelem, cbr.progress
    if done == 0:
        bad = _bad(cbr, ins, count * size, count * 8)
        if bad:
            return cbr.stop(bad)
    dseg, memory = cbr.dseg, cbr.memory
    part = min(count - done, STEP)
    page, data, at = -1, b"", ins.offset + done * size
    for index in unpack_from(f"<{part}Q", dseg, ins.index + 8 * done):
        address = ins.address + index * size & ADDRESS_MASK
        offset = address & PAGE_MASK
        if address - offset != page:
            entry = cbr.translate(address, False)
            if entry is None:
                cbr.progress = done
                return False
            # Neighbours in the vector are often neighbours in memory: the page is read once.
            page = address - offset
            data = memory.read(entry, page - entry.address, PAGE_SIZE)
        dseg[at : at + size] = data[offset : offset + size]
        at += size
        done += 1
    cbr.progress = done
    return done == count


def ivstore(cbr: Cbr, ins: Instruction) -> bool:
    """Scatter: the reverse of `ivload`; of equal indices the last one stays."""
    size, count, done = SIZES[ins.xtype], ins.nelem, cbr.progress
    if done == 0:
        bad = _bad(cbr, ins, count * size, count * 8)
        if bad:
            return cbr.stop(bad)
    dseg, memory = cbr.dseg, cbr.memory
    for _ in range(STEP):
        address = _address(cbr, ins, done, size)
        entry = cbr.translate(address, True)
        if entry is None:
            cbr.progress = done
            return False
        at = ins.offset + done * size
        memory.write(entry, address - entry.address, bytes(dseg[at : at + size]))
        done += 1
        if done == count:
            return True
    cbr.progress = done
    return False


def element_of(value: int, xtype: Xtype) -> bytes:
    """The bytes that VSET stores: the value cut to size, or eight times 8 bytes of it."""
    if xtype is _CL:
        return (value & ADDRESS_MASK).to_bytes(8, "little") * 8
    size = SIZES[xtype]
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def vset(cbr: Cbr, ins: Instruction) -> bool:
    """One value into elements that are `stride` apart."""
    size, count, done = SIZES[ins.xtype], ins.nelem, cbr.progress
    if done == 0:
        bad = _bad(cbr, ins, 0, 0)
        if bad:
            return cbr.stop(bad)
    step, memory = ins.stride * size, cbr.memory
    element = element_of(ins.operand1, ins.xtype)
    for _ in range(STEP):
        address = ins.address + done * step & ADDRESS_MASK
        entry = cbr.translate(address, True)
        if entry is None:
            cbr.progress = done
            return False
        run = _run(address, size, step, count - done)
        at = address - entry.address
        if step == size:
            memory.write(entry, at, element * run)
        else:
            for number in range(run if step else 1):
                memory.write(entry, at + number * step, element)
        done += run
        if done == count:
            return True
    cbr.progress = done
    return False


def ivset(cbr: Cbr, ins: Instruction) -> bool:
    """One value into elements by an index vector."""
    size, count, done = SIZES[ins.xtype], ins.nelem, cbr.progress
    if done == 0:
        bad = _bad(cbr, ins, 0, count * 8)
        if bad:
            return cbr.stop(bad)
    element = element_of(ins.operand1, ins.xtype)
    for _ in range(STEP):
        address = _address(cbr, ins, done, size)
        entry = cbr.translate(address, True)
        if entry is None:
            cbr.progress = done
            return False
        cbr.memory.write(entry, address - entry.address, element)
        done += 1
        if done == count:
            return True
    cbr.progress = done
    return False


def vflush(cbr: Cbr, ins: Instruction) -> bool:
    """Translates every element, as a flush must, and leaves the bytes alone."""
    size, count, done = SIZES[ins.xtype], ins.nelem, cbr.progress
    if done == 0:
        bad = _bad(cbr, ins, 0, 0)
        if bad:
            return cbr.stop(bad)
    step = ins.stride * size
    for _ in range(STEP):
        address = ins.address + done * step & ADDRESS_MASK
        if cbr.translate(address, False) is None:
            cbr.progress = done
            return False
        done += _run(address, size, step, count - done)
        if done == count:
            return True
    cbr.progress = done
    return False


def bcopy(cbr: Cbr, ins: Instruction) -> bool:
    """Memory to memory, as much at a time as fits into the buffer and into both pages.

    The buffer is `operand2` cache lines of data segment at `offset`. Where source and destination
    overlap, the result is as if each buffer was loaded before it is stored, in order.
    """
    size = SIZES[ins.xtype]
    total, done = ins.nelem * size, cbr.progress * size
    lines = ins.operand2 * CACHE_LINE
    if done == 0:
        bad = _bad(cbr, ins, lines, 0)
        if not bad and (ins.operand1 & (size - 1) or not 0 <= ins.operand1 <= ADDRESS_MASK):
            bad = Cause.IAA_GAA_MISMATCH
        if lines < CACHE_LINE:
            bad = Cause.DATA_SEGMENT_LIMIT_EXCEPTION
        if bad:
            return cbr.stop(bad)
    dseg, at, memory = cbr.dseg, ins.offset, cbr.memory
    for _ in range(STEP):
        source = ins.address + done & ADDRESS_MASK
        target = ins.operand1 + done & ADDRESS_MASK
        part = min(
            total - done,
            lines,
            PAGE_SIZE - (source & PAGE_MASK),
            PAGE_SIZE - (target & PAGE_MASK),
        )
        entry = cbr.translate(source, False)
        if entry is None:
            cbr.progress = done // size
            return False
        data = memory.read(entry, source - entry.address, part)
        entry = cbr.translate(target, True)
        if entry is None:
            cbr.progress = done // size
            return False
        dseg[at : at + part] = data
        memory.write(entry, target - entry.address, data)
        done += part
        if done == total:
            return True
    cbr.progress = done // size
    return False


def bstore(cbr: Cbr, ins: Instruction) -> bool:
    """A block of the data segment into memory: a `vstore` of stride 1 that may be as long as it."""
    if ins.stride != 1:
        return cbr.stop(Cause.INVALID_INSTRUCTION)
    return vstore(cbr, ins)


def atomic(cbr: Cbr, ins: Instruction) -> bool:
    """GAMIR, GAMIRR, GAMER, GAMERR: change 4 or 8 bytes in one step; the old value is the result.

    A remote memory is any other: the model has one.
    """
    exop, xtype, address = ins.exop, ins.xtype, ins.address
    if exop not in EXOPS[ins.opcode] or xtype not in _ATOMIC_SIZES:
        return cbr.stop(Cause.INVALID_INSTRUCTION)
    bad = _bad(cbr, ins, 0, 0)
    if bad is not _FINE:
        return cbr.stop(bad)
    entry = cbr.translate(address, exop not in READ_ONLY)
    if entry is None:
        return False
    size = SIZES[xtype]
    memory, at, mask = cbr.memory, address - entry.address, (1 << 8 * size) - 1
    old = int.from_bytes(memory.read(entry, at, size), "little")
    one, two = ins.operand1 & mask, ins.operand2 & mask
    cbr.value = old
    if (exop is _EPOLL and old != one) or (exop is _NPOLL and old == one):
        return False
    new = RESULTS[exop](old, one, two)
    if new is not None:
        memory.write(entry, at, (new & mask).to_bytes(size, "little"))
    return True


def gamxr(cbr: Cbr, ins: Instruction) -> bool:
    """16 bytes at once. The data segment has the expected value, then the new one.

    The old value takes the place of the expected one.
    """
    if ins.exop not in EXOPS[ins.opcode]:
        return cbr.stop(Cause.INVALID_INSTRUCTION)
    bad = _bad(cbr, ins, 32, 0)
    if not bad and ins.address & 15:
        bad = Cause.IAA_GAA_MISMATCH
    if bad:
        return cbr.stop(bad)
    entry = cbr.translate(ins.address, True)
    if entry is None:
        return False
    memory, at, offset = cbr.memory, ins.address - entry.address, ins.offset
    old = memory.read(entry, at, 16)
    if old == cbr.dseg[offset : offset + 16]:
        memory.write(entry, at, bytes(cbr.dseg[offset + 16 : offset + 32]))
    cbr.dseg[offset : offset + 16] = old
    return True


def mesq(cbr: Cbr, ins: Instruction) -> bool:
    """Take `nelem` cache lines at the head of a queue, and store a message there.

    The queue's first word is its head (`atomics.queue_head`), which counts cache lines from there.
    `cbr.value` is the word as it was, and `cbr.substatus` says what was done.
    """
    length = ins.nelem * CACHE_LINE
    bad = _bad(cbr, ins, length, 0)
    if not bad and ins.address & (CACHE_LINE - 1):
        bad = Cause.IAA_GAA_MISMATCH
    if bad:
        return cbr.stop(bad)
    nack = cbr.chiplet.fabric_answer()
    if nack is Substatus.LB_OVERFLOWED or nack is Substatus.AMO_NACKED:
        cbr.substatus = nack
        return True
    head = cbr.translate(ins.address, True)
    if head is None:
        return False
    memory, at = cbr.memory, ins.address - head.address
    word = int.from_bytes(memory.read(head, at, 8), "little")
    taken = advance(word, ins.nelem)
    if taken is None:
        cbr.value = word
        cbr.substatus = Substatus.QLIMIT_REACHED
        return True
    slot = ins.address + head_and_limit(word)[0] * CACHE_LINE & ADDRESS_MASK
    if (slot & PAGE_MASK) + length > PAGE_SIZE:
        cbr.substatus = Substatus.PAGE_OVERFLOW
    elif nack is Substatus.PUT_NACKED:
        cbr.substatus = nack
    else:
        entry = cbr.translate(slot, True)
        if entry is None:
            return False  # nothing has happened; all of it is done again
        message = bytes(cbr.dseg[ins.offset : ins.offset + length])
        memory.write(entry, slot - entry.address, message)
        cbr.substatus = Substatus.NO_ERROR
    memory.write(head, at, taken.to_bytes(8, "little"))
    cbr.value = word
    return True


OPERATIONS: Final[dict[Opcode, Callable[[Cbr, Instruction], bool]]] = {
    Opcode.NOP: nop,
    Opcode.BCOPY: bcopy,
    Opcode.VLOAD: vload,
    Opcode.IVLOAD: ivload,
    Opcode.VSTORE: vstore,
    Opcode.IVSTORE: ivstore,
    Opcode.VSET: vset,
    Opcode.IVSET: ivset,
    Opcode.MESQ: mesq,
    Opcode.GAMXR: gamxr,
    Opcode.GAMIR: atomic,
    Opcode.GAMIRR: atomic,
    Opcode.GAMER: atomic,
    Opcode.GAMERR: atomic,
    Opcode.BSTORE: bstore,
    Opcode.VFLUSH: vflush,
}
