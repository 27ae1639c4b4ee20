"""Every instruction and element size against plain Python, while the pages go elsewhere.

The memory is that of the model, with contents. Before each instruction, or in another task while it
runs, the primary takes pages away: swapped out, write-protected and back, copied after a fork,
moved, migrated, unmapped and mapped again. What the oracle says must be there afterwards.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmunotify as mn
from mmunotify.errors import MmError
from mmunotify.model import Machine
from mmunotify_gru import Gru, GruChecker, GruDriver
from mmunotify_gru.errors import GruInvariantViolated, InstructionException
from mmunotify_gru.hardware.chiplet import Chiplet
from mmunotify_gru.hardware.instructions import EXOPS, Cause, Exop, Instruction, Opcode, Xtype
from mmunotify_gru.hardware.tfh import Tfh
from slow_primary import SlowPrimary

if TYPE_CHECKING:
    from mmunotify import Primary
    from mmunotify.model.mm import AddressSpace
    from mmunotify_gru import Context

PAGE = 4096
PAGES = 6
DSEG = 4096
SIZES = {Xtype.B: 1, Xtype.S: 2, Xtype.W: 4, Xtype.DW: 8, Xtype.CL: 64}
MASK = (1 << 64) - 1


class Oracle:
    """Memory and data segment as two strings of bytes, and what instructions do to them."""

    def __init__(self) -> None:
        self.memory = bytearray((7 * at + (at >> 8)) & 255 for at in range(PAGES * PAGE))
        self.dseg = bytearray(DSEG)
        self.value = 0

    def run(self, op: Opcode, at: int, ins: Instruction) -> None:
        """Execute; `at` is the instruction's address in this memory."""
        size = SIZES[ins.xtype]
        if op in {Opcode.VLOAD, Opcode.IVLOAD, Opcode.VSTORE, Opcode.IVSTORE, Opcode.BSTORE}:
            self._move(op, at, ins, size)
        elif op in {Opcode.VSET, Opcode.IVSET}:
            value = (ins.operand1 & MASK).to_bytes(8, "little")
            element = value * 8 if ins.xtype is Xtype.CL else value[:size]
            for number in range(ins.nelem):
                where = self._where(op, at, ins, size, number)
                self.memory[where : where + size] = element
        elif op is Opcode.BCOPY:
            raise AssertionError("copied by `copy`")
        elif op in EXOPS and op is not Opcode.GAMXR:
            self._atomic(at, ins, size)
        elif op is Opcode.GAMXR:
            old = bytes(self.memory[at : at + 16])
            if old == self.dseg[ins.offset : ins.offset + 16]:
                self.memory[at : at + 16] = self.dseg[ins.offset + 16 : ins.offset + 32]
            self.dseg[ins.offset : ins.offset + 16] = old

    def copy(self, source: int, target: int, size: int, lines: int, buffer: int) -> None:
        """BCOPY: a buffer's worth within both pages at a time; the last of it stays in there."""
        done = 0
        while done < size:
            left_source = PAGE - (source + done) % PAGE
            left_target = PAGE - (target + done) % PAGE
            part = min(size - done, 64 * lines, left_source, left_target)
            data = bytes(self.memory[source + done : source + done + part])
            self.dseg[buffer : buffer + part] = data
            self.memory[target + done : target + done + part] = data
            done += part

    def _where(self, op: Opcode, at: int, ins: Instruction, size: int, number: int) -> int:
        if op in {Opcode.IVLOAD, Opcode.IVSTORE, Opcode.IVSET}:
            index = ins.index + 8 * number
            return at + size * int.from_bytes(self.dseg[index : index + 8], "little")
        return at + size * ins.stride * number

    def _move(self, op: Opcode, at: int, ins: Instruction, size: int) -> None:
        for number in range(ins.nelem):
            where = self._where(op, at, ins, size, number)
            inside = ins.offset + size * number
            if op in {Opcode.VLOAD, Opcode.IVLOAD}:
                self.dseg[inside : inside + size] = self.memory[where : where + size]
            else:
                self.memory[where : where + size] = self.dseg[inside : inside + size]

    def _atomic(self, at: int, ins: Instruction, size: int) -> None:
        mask = (1 << 8 * size) - 1
        old = int.from_bytes(self.memory[at : at + size], "little")
        one, two = ins.operand1 & mask, ins.operand2 & mask
        head, limit = old & 0xFFFFFFFF, old >> 32
        new = old
        match ins.exop:
            case Exop.CLR:
                new = 0
            case Exop.INC:
                new = old + 1
            case Exop.DEC:
                new = old - 1
            case Exop.DECZ:
                new = old - 1 if old else old
            case Exop.QCHK1:
                new = old + 1 if head + 1 <= limit else old
            case Exop.QCHK2:
                new = old + 2 if head + 2 <= limit else old
            case Exop.SWAP:
                new = one
            case Exop.OR:
                new = old | one
            case Exop.AND:
                new = old & one
            case Exop.XOR:
                new = old ^ one
            case Exop.ADD:
                new = old + one
            case Exop.CSWAP:
                new = one if old == two else old
            case Exop.CADD:
                new = old + one if old == two else old
        self.value = old
        self.memory[at : at + size] = (new & mask).to_bytes(size, "little")


DISTURBANCES = ("swap", "protect", "fork", "move", "remap", "unload", "collapse", "nothing")
VECTORS = (Opcode.VLOAD, Opcode.VSTORE, Opcode.IVLOAD, Opcode.IVSTORE)


@st.composite
def steps(draw: Any) -> tuple[str, Opcode, int, dict[str, Any]]:
    """A disturbance, and an instruction that stays within memory and data segment."""
    disturbance = draw(st.sampled_from(DISTURBANCES))
    op = draw(st.sampled_from([op for op in Opcode if op is not Opcode.MESQ]))
    xtype = draw(st.sampled_from(list(Xtype)))
    fields: dict[str, Any] = {"xtype": xtype}
    size = SIZES[xtype]
    if op in EXOPS:
        fields["xtype"] = xtype = draw(st.sampled_from([Xtype.W, Xtype.DW]))
        size = 16 if op is Opcode.GAMXR else SIZES[xtype]
        polls = {Exop.EPOLL, Exop.NPOLL}
        fields["exop"] = draw(st.sampled_from(sorted(EXOPS[op] - polls)))
        fields["operand1"] = draw(st.integers(0, MASK))
        fields["operand2"] = draw(st.sampled_from([0, fields["operand1"], 0x0700000007]))
        fields["offset"] = 8 * draw(st.integers(0, 64))
        return disturbance, op, size * draw(st.integers(0, PAGES * PAGE // size - 1)), fields
    if op in {Opcode.IVLOAD, Opcode.IVSTORE, Opcode.IVSET}:
        count = draw(st.integers(1, 16))
        elements = PAGES * PAGE // size
        fields |= {"nelem": count, "offset": 0, "index": 2048}
        fields["vector"] = draw(
            st.lists(st.integers(0, elements - 1), min_size=count, max_size=count)
        )
        fields["operand1"] = draw(st.integers(0, MASK))
        return disturbance, op, 0, fields
    if op is Opcode.BCOPY:
        fields["operand1"] = size * draw(st.integers(0, PAGES * PAGE // size - 1))
        at = size * draw(st.integers(0, PAGES * PAGE // size - 1))
        room = (PAGES * PAGE - max(at, fields["operand1"])) // size
        fields["nelem"] = draw(st.integers(1, room))
        fields["operand2"] = draw(st.integers(1, 16))
        fields["offset"] = 64
        return disturbance, op, at, fields
    stride = 1 if op is Opcode.BSTORE else draw(st.sampled_from([0, 1, 1, 2, 3, 65]))
    at = size * draw(st.integers(0, PAGES * PAGE // size - 1))
    room = min(
        2048 // size, 64 if stride == 0 else (PAGES * PAGE - at - size) // size // stride + 1
    )
    if op in {Opcode.VSET, Opcode.VFLUSH} and stride:
        room = (PAGES * PAGE - at - size) // size // stride + 1
    fields |= {"nelem": draw(st.integers(1, room)), "stride": stride}
    fields["offset"] = draw(st.integers(0, DSEG - 2048))
    fields["operand1"] = draw(st.integers(0, MASK))
    return disturbance, op, at, fields


class Run:
    """One address space, one context on it, and the oracle of both."""

    def __init__(self, machine: Machine[Any], mm: AddressSpace[Any], context: Context) -> None:
        self.machine = machine
        self.mm = mm
        self.context = context
        self.oracle = Oracle()
        self.base = 0
        self.children: list[AddressSpace[Any]] = []

    async def begin(self) -> None:
        self.base = await self.mm.mmap(PAGES * PAGE)
        await self.mm.write(self.base, bytes(self.oracle.memory))

    async def disturb(self, how: str) -> None:
        mm, base, size = self.mm, self.base, PAGES * PAGE
        if how == "swap":
            await mm.madvise(base, size, "pageout")
        elif how == "protect":
            await mm.mprotect(base, size, 1)
            await mm.mprotect(base, size, 3)
        elif how == "fork":
            self.children.append(await mm.fork())
        elif how == "move":
            await mm.mmap(PAGE)
            self.base = await mm.mremap(base, size, size + PAGE, 1)
            await mm.munmap(self.base + size, PAGE)
        elif how == "remap":
            await mm.munmap(base, size)
            self.base = await mm.mmap(size)
            await mm.write(self.base, bytes(self.oracle.memory))
        elif how == "collapse":
            await mm.madvise(base, 2 * PAGE, "dontneed")
            await mm.write(base, bytes(self.oracle.memory[: 2 * PAGE]))
        elif how == "unload":
            self.context.unload()

    async def step(self, op: Opcode, at: int, fields: dict[str, Any]) -> None:
        fields = dict(fields)
        vector = fields.pop("vector", None)
        if vector is not None:
            words = b"".join(word.to_bytes(8, "little") for word in vector)
            await self.context.put(2048, words)
            self.oracle.dseg[2048 : 2048 + len(words)] = words
        ins = Instruction(op, self.base + at, **fields)
        if op is Opcode.BCOPY:
            target = ins.operand1
            ins.operand1 += self.base
            size = ins.nelem * SIZES[ins.xtype]
            self.oracle.copy(at, target, size, ins.operand2, ins.offset)
        else:
            self.oracle.run(op, at, ins)
        value, _ = await self.context.execute(ins)
        if op in EXOPS and op is not Opcode.GAMXR:
            assert value == self.oracle.value, ins
        assert await self.context.get(0, DSEG) == self.oracle.dseg, ins
        assert await self.mm.read(self.base, PAGES * PAGE) == self.oracle.memory, ins

    async def step_in_a_storm(self, op: Opcode, at: int, fields: dict[str, Any]) -> None:
        """An instruction that may meet what the process must not touch just now: again, then."""
        fields = dict(fields)
        vector = fields.pop("vector", None)
        if vector is not None:
            words = b"".join(word.to_bytes(8, "little") for word in vector)
            await self.context.put(2048, words)
            self.oracle.dseg[2048 : 2048 + len(words)] = words
        ins = Instruction(op, self.base + at, **fields)
        if op is Opcode.BCOPY:
            # What is done twice must not overlap.
            size = SIZES[ins.xtype]
            half = PAGES * PAGE // 2
            ins.address = self.base + at % half
            ins.nelem = min(ins.nelem, (half - at % half) // size)
            ins.operand1 = self.base + half
            self.oracle.copy(at % half, half, ins.nelem * size, ins.operand2, ins.offset)
            inside = slice(ins.offset, ins.offset + 64 * ins.operand2)
        else:
            self.oracle.run(op, at, ins)
            inside = slice(0, 0)
        while True:
            try:
                value, _ = await self.context.execute(ins)
                break
            except InstructionException as stopped:
                if stopped.cause is not Cause.OS_FATAL_TLB_FAULT:
                    raise
                await checkpoint()
        if op in EXOPS and op is not Opcode.GAMXR:
            assert value == self.oracle.value, ins
        dseg = bytearray(await self.context.get(0, DSEG))
        # Where a copy begins again the buffer holds other parts of it.
        self.oracle.dseg[inside] = dseg[inside]
        assert dseg == self.oracle.dseg, ins


async def check(
    program: list[tuple[str, Opcode, int, dict[str, Any]]], miss: str, preload: int
) -> None:
    gru = Gru(tlb=5)
    async with Machine(frames=1 << 10, swap=1 << 10, contents=True) as machine:
        mm = machine.new_mm("P")
        with GruChecker(gru) as checker:
            checker.watch(mm.notifiers)
            async with gru.open(mm.notifiers, dseg=DSEG, miss=miss, preload=preload) as context:
                run = Run(machine, mm, context)
                await run.begin()
                for how, op, at, fields in program:
                    await run.disturb(how)
                    await run.step(op, at, fields)
                checker.check()


class SlowGru(Gru):
    """Its drivers get translations after others have run."""

    def make_driver(self) -> GruDriver:
        class SlowDriver(GruDriver):
            def attach(self, primary: Primary | None) -> None:
                assert primary is not None
                super().attach(SlowPrimary(primary))

        return SlowDriver(gru=self)


class Dawdler(mn.SleepableDriver):
    """Keeps sections open for a while, so that instructions meet them."""

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await checkpoint()

    async def invalidate_range_end(self, rng: mn.Range) -> None:
        await checkpoint()


async def storm(run: Run, elsewhere: int, over: anyio.Event) -> None:
    """What keeps the contents, again and again, until the instructions are over."""
    mm, base, size = run.mm, run.base, PAGES * PAGE
    while not over.is_set():
        await mm.madvise(base, size, "pageout")
        await checkpoint()
        await mm.mprotect(base, 2 * PAGE, 1)
        await checkpoint()
        await mm.mprotect(base, 2 * PAGE, 3)
        child = await mm.fork()
        await checkpoint()
        await mm.access(base + PAGE, write=True)
        await child.exit()
        await mm.mremap(base, size, size, 3, elsewhere)
        await checkpoint()
        await mm.mremap(elsewhere, size, size, 3, base)
        with suppress(MmError):  # it is not there, or somebody else has it just now
            await run.machine.migrate(mm, base)
        await checkpoint()
        run.context.unload()


async def check_in_a_storm(
    program: list[tuple[str, Opcode, int, dict[str, Any]]],
    miss: str,
    preload: int,
    gru_type: type[Gru] = SlowGru,
    batching: Any = "range",
) -> None:
    gru = gru_type(tlb=5)
    sleeps = batching in {"range", "gather"}
    async with Machine(frames=1 << 10, swap=1 << 10, contents=True, batching=batching) as machine:
        mm = machine.new_mm("P")
        elsewhere = await mm.mmap(PAGES * PAGE)
        await mm.munmap(elsewhere, PAGES * PAGE)
        with GruChecker(gru, exact=batching == "range") as checker:
            checker.watch(mm.notifiers)
            async with (
                mm.attached(Dawdler()) if sleeps else nullcontext(),
                gru.open(mm.notifiers, dseg=DSEG, miss=miss, preload=preload) as context,
                anyio.create_task_group() as tg,
            ):
                run = Run(machine, mm, context)
                await run.begin()
                over = anyio.Event()
                tg.start_soon(storm, run, elsewhere - 64 * PAGE, over)
                for _, op, at, fields in program:
                    await checkpoint()
                    await run.step_in_a_storm(op, at, fields)
                over.set()
            assert await mm.read(run.base, PAGES * PAGE) == run.oracle.memory
            checker.check()


class Deaf(Tfh):
    """M8: a restart is accepted whatever has happened since the handle was read."""

    __slots__ = ()

    def accepts(self, seen: int) -> bool:
        return True


class DeafChiplet(Chiplet):
    tfh_type = Deaf


class DeafGru(SlowGru):
    chiplet_type = DeafChiplet


STORES: list[tuple[str, Opcode, int, dict[str, Any]]] = [
    ("nothing", Opcode.VSET, 8 * number, {"nelem": 6, "stride": 512, "operand1": number})
    for number in range(50)
]


@pytest.mark.parametrize("batching", ["page", "pte512", "gather", "range"])
async def test_stores_in_a_storm(batching: str) -> None:
    """A store into every page, fifty times, in whatever way the driver is told."""
    await check_in_a_storm(STORES, "poll", 0, batching=batching)


async def test_the_storm_finds_the_mutant() -> None:
    """Which would not pass that."""
    with pytest.raises((GruInvariantViolated, ExceptionGroup)):
        await check_in_a_storm(STORES, "poll", 0, DeafGru)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    program=st.lists(steps(), min_size=1, max_size=8),
    miss=st.sampled_from(["interrupt", "poll"]),
    preload=st.sampled_from([0, 3]),
)
def test_instructions_in_a_storm(
    program: list[tuple[str, Opcode, int, dict[str, Any]]], miss: str, preload: int
) -> None:
    """While pages are swapped, protected, copied, moved and migrated by another task."""
    anyio.run(check_in_a_storm, program, miss, preload)


@pytest.mark.long
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    program=st.lists(steps(), min_size=1, max_size=12),
    miss=st.sampled_from(["interrupt", "poll"]),
    preload=st.sampled_from([0, 3]),
)
def test_instructions_in_a_storm_at_length(
    program: list[tuple[str, Opcode, int, dict[str, Any]]], miss: str, preload: int
) -> None:
    """The same, more of it."""
    anyio.run(check_in_a_storm, program, miss, preload)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    program=st.lists(steps(), min_size=1, max_size=8),
    miss=st.sampled_from(["interrupt", "poll"]),
    preload=st.sampled_from([0, 3]),
)
def test_instructions_do_what_they_say(
    program: list[tuple[str, Opcode, int, dict[str, Any]]], miss: str, preload: int
) -> None:
    """Any sequence of instructions and disturbances, each instruction against the oracle."""
    anyio.run(check, program, miss, preload)


@pytest.mark.long
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    program=st.lists(steps(), min_size=1, max_size=12),
    miss=st.sampled_from(["interrupt", "poll"]),
    preload=st.sampled_from([0, 3]),
)
def test_instructions_do_what_they_say_at_length(
    program: list[tuple[str, Opcode, int, dict[str, Any]]], miss: str, preload: int
) -> None:
    """The same, more of it."""
    anyio.run(check, program, miss, preload)
