"""The chiplet without a driver: TLB, handles, contexts, control blocks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmunotify import PAGE_SHIFT, PAGE_SIZE, PMD_SHIFT, PMD_SIZE, Translation
from mmunotify_gru.hardware.cch import CchState, MissMode
from mmunotify_gru.hardware.chiplet import Chiplet
from mmunotify_gru.hardware.geometry import PURGE_ALL, REGION_SHIFT, tag_of
from mmunotify_gru.hardware.instructions import Cause, CbStatus, Instruction, Opcode, Xtype
from mmunotify_gru.hardware.tfh import TfhState
from mmunotify_gru.hardware.tlb import Tlb


def entry(page: int, *, writable: bool = True, size: int = PAGE_SIZE) -> Translation:
    return Translation(page * size, page, writable, size, 0)


class Memory:
    """Frames of zeroes; writes are forgotten."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the hardware asked for {name}")

    def read(self, translation: Translation, offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= translation.size
        return bytes(size)

    def write(self, translation: Translation, offset: int, data: bytes) -> None:
        assert translation.writable
        assert 0 <= offset <= offset + len(data) <= translation.size


def loaded(miss_mode: MissMode = MissMode.POLL, asid: int = 8) -> Chiplet:
    """A chiplet with one context of two control blocks and one unit of data segment."""
    chiplet = Chiplet(0, 0, 64)
    chiplet.cchs[0].allocate(asid, miss_mode, 1, 1, Memory())
    chiplet.cchs[0].start()
    return chiplet


# ---------------------------------------------------------------------- TLB

TLB_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.integers(0, 2), st.integers(0, 20), st.booleans()),
        st.tuples(st.just("huge"), st.integers(0, 2), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("invalidate"), st.integers(0, 2), st.integers(0, 20), st.integers(1, 30)),
        st.tuples(st.just("tag"), st.integers(0, 2), st.just(0), st.just(0)),
        st.tuples(st.just("all"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(entries=st.integers(1, 6), steps=TLB_STEPS)
def test_tlb_is_a_finite_map(entries: int, steps: list[tuple[str, int, int, Any]]) -> None:
    """As an ordered dict of (tag, size, page), from which the oldest goes when it is full."""
    tlb = Tlb(entries)
    model: dict[tuple[int, int, int], Translation] = {}
    for step, tag, page, what in steps:
        if step in {"insert", "huge"}:
            size = PAGE_SIZE if step == "insert" else PMD_SIZE
            new = entry(page, writable=what, size=size)
            key = (tag, size, page)
            if key not in model and len(model) == entries:
                del model[next(iter(model))]
            model.pop(key, None)
            model[key] = new
            tlb.insert(tag, new)
        elif step == "invalidate":
            gone = [key for key in model if key[:2] == (tag, PAGE_SIZE)]
            gone = [key for key in gone if page <= key[2] < page + what]
            found = tlb.invalidate(tag, page, what, PAGE_SHIFT)
            assert sorted(found) == sorted(key[2] for key in gone)
            for key in gone:
                del model[key]
        elif step == "tag":
            pages, huge = tlb.invalidate_tag(tag)
            for size, found in ((PAGE_SIZE, pages), (PMD_SIZE, huge)):
                assert sorted(found) == sorted(k[2] for k in model if k[:2] == (tag, size))
            model = {key: value for key, value in model.items() if key[0] != tag}
        else:
            tlb.invalidate_all()
            model.clear()
        assert tlb.used == len(model)
        assert sorted(map(repr, tlb)) == sorted(repr((key[0], e)) for key, e in model.items())
        for (of, size, number), value in model.items():
            assert tlb.lookup(of, number * size, False) is not None
            hit = tlb.lookup(of, number * size, True)
            if value.writable:
                assert hit is not None
            elif hit is not None:
                assert hit.size != size


def test_a_lookup_is_of_its_tag_alone() -> None:
    """ASID and region separate; the same address elsewhere is no hit."""
    tlb = Tlb(8)
    tlb.insert(tag_of(8, 0), entry(1))
    assert tlb.lookup(tag_of(8, PAGE_SIZE), PAGE_SIZE, True) is not None
    assert tlb.lookup(tag_of(16, PAGE_SIZE), PAGE_SIZE, True) is None
    other = (1 << REGION_SHIFT) + PAGE_SIZE
    assert tlb.lookup(tag_of(8, other), other, True) is None


# ---------------------------------------------------------------------- fault handles


def missing(chiplet: Chiplet, address: int = 5 * PAGE_SIZE) -> Any:
    cbr = chiplet.cchs[0].cbrs[0]
    cbr.start(Instruction(Opcode.VLOAD, address))
    assert cbr.status is CbStatus.CALL_OS
    return cbr.tfh


def test_a_restart_drops_in_and_runs_on() -> None:
    """The block that missed completes within the restart."""
    chiplet = loaded()
    tfh = missing(chiplet)
    assert (tfh.address, tfh.tag, tfh.write) == (5 * PAGE_SIZE, 8, False)
    assert tfh.write_restart(tfh.read(), entry(5))
    assert tfh.cbr.status is CbStatus.IDLE
    assert tfh.state is TfhState.INACTIVE


@pytest.mark.parametrize(
    ("address", "asid", "shift", "field", "contexts", "disarms"),
    [
        (5 * PAGE_SIZE, 8, PAGE_SHIFT, 0, 1, True),
        (0, 8, PAGE_SHIFT, 5, 1, True),
        (0, 8, PAGE_SHIFT, PURGE_ALL - 1, 1, True),
        (0, 8, PAGE_SHIFT, -1, 1, True),
        (0, 8, PMD_SHIFT, 0, 1, True),
        (0, 8, PAGE_SHIFT, 4, 1, False),
        (6 * PAGE_SIZE, 8, PAGE_SHIFT, 3, 1, False),
        (5 * PAGE_SIZE, 16, PAGE_SHIFT, 0, 1, False),
        (5 * PAGE_SIZE, 8, PAGE_SHIFT, 0, 2, False),
        ((1 << REGION_SHIFT) + 5 * PAGE_SIZE, 8, PAGE_SHIFT, 0, 1, False),
    ],
)
def test_an_invalidate_disarms_the_misses_that_it_covers(
    address: int, asid: int, shift: int, field: int, contexts: int, disarms: bool
) -> None:
    """Between read and restart: then the translation is dropped, and the block misses again."""
    chiplet = loaded()
    tfh = missing(chiplet)
    seen = tfh.read()
    chiplet.tghs[0].invalidate(address, asid, shift, field, contexts)
    assert tfh.write_restart(seen, entry(5)) is not disarms
    assert (tfh.cbr.status is CbStatus.CALL_OS) is disarms
    if disarms:
        # Read again, it is served.
        assert tfh.write_restart(tfh.read(), entry(5))
        assert tfh.cbr.status is CbStatus.IDLE


def test_an_invalidate_before_the_read_does_not_matter() -> None:
    """What was read after it may be dropped in."""
    chiplet = loaded()
    tfh = missing(chiplet)
    chiplet.tghs[0].invalidate(5 * PAGE_SIZE, 8, PAGE_SHIFT, 0, 1)
    assert tfh.write_restart(tfh.read(), entry(5))


def test_a_block_that_was_taken_away_is_not_restarted() -> None:
    """Unloading a context disarms its misses, also those that somebody has read."""
    chiplet = loaded()
    tfh = missing(chiplet)
    seen = tfh.read()
    cch = chiplet.cchs[0]
    cch.interrupt()
    cch.deallocate()
    assert not tfh.write_restart(seen, entry(5))
    assert chiplet.tlb.used == 0
    cch.allocate(16, MissMode.POLL, 1, 1, Memory())
    cch.start()
    again = missing(chiplet)
    assert again is tfh
    assert not tfh.write_restart(seen, entry(5))
    assert tfh.missing, "the block of the next owner has missed again, and waits"


# ---------------------------------------------------------------------- contexts


def test_context_states_go_round() -> None:
    """Operations that are not due raise, and say what the context is."""
    chiplet = Chiplet(0, 0, 64)
    cch = chiplet.cchs[3]
    with pytest.raises(ValueError, match="to be MAPPED, it is INACTIVE"):
        cch.start()
    cch.allocate(8, MissMode.POLL, 0b101, 0b11, Memory())
    assert [cbr.number for cbr in cch.cbrs] == [0, 1, 4, 5]
    assert len(cch.dseg) == 2048
    with pytest.raises(ValueError, match="expected free ones"):
        chiplet.cchs[4].allocate(8, MissMode.POLL, 0b100, 0b100, Memory())
    cch.start()
    with pytest.raises(ValueError, match="to be MAPPED, it is ACTIVE"):
        cch.deallocate()
    cch.interrupt()
    cch.deallocate()
    assert cch.state is CchState.INACTIVE
    assert chiplet.free_cbr_units.bit_count() == 64
    assert chiplet.free_dsr_units.bit_count() == 32


def test_a_busy_block_takes_no_second_instruction() -> None:
    """It has to be waited for."""
    chiplet = loaded()
    tfh = missing(chiplet)
    with pytest.raises(ValueError, match="expected an idle control block"):
        tfh.cbr.start(Instruction(Opcode.NOP))


@pytest.mark.parametrize(
    ("instruction", "cause"),
    [
        (Instruction(Opcode.VLOAD, 4), Cause.IAA_GAA_MISMATCH),
        (Instruction(Opcode.VLOAD, 0, 1020), Cause.DATA_SEGMENT_LIMIT_EXCEPTION),
        (Instruction(Opcode.VLOAD, 0, -8), Cause.DATA_SEGMENT_LIMIT_EXCEPTION),
        (Instruction(Opcode.VSTORE, 0, 0, Xtype.CL, 17), Cause.DATA_SEGMENT_LIMIT_EXCEPTION),
        (Instruction(Opcode.IVLOAD, 0, 0, index=1024), Cause.DATA_SEGMENT_LIMIT_EXCEPTION),
        (Instruction(Opcode.VSET, 0, nelem=0), Cause.INVALID_INSTRUCTION),
        (Instruction(Opcode.VSET, 0, stride=-1), Cause.INVALID_INSTRUCTION),
        (Instruction(Opcode.VSET, 1 << 64), Cause.INVALID_INSTRUCTION),
        (Instruction(Opcode.BSTORE, 0, stride=2), Cause.INVALID_INSTRUCTION),
        (Instruction(Opcode.BCOPY, 0), Cause.DATA_SEGMENT_LIMIT_EXCEPTION),
        (Instruction(Opcode.BCOPY, 0, operand1=4, operand2=1), Cause.IAA_GAA_MISMATCH),
        (Instruction(Opcode.GAMER, 0), Cause.INVALID_INSTRUCTION),
        (Instruction(Opcode.GAMXR, 8), Cause.INVALID_INSTRUCTION),
        (Instruction(Opcode.MESQ, 8, xtype=Xtype.CL), Cause.IAA_GAA_MISMATCH),
    ],
    ids=lambda case: getattr(case, "name", None) or f"{case.opcode.name}",
)
def test_what_cannot_be_executed_stops_before_it_begins(
    instruction: Instruction, cause: Cause
) -> None:
    """With the cause, and without a translation."""
    cbr = loaded().cchs[0].cbrs[0]
    cbr.start(instruction)
    assert (cbr.status, cbr.cause) == (CbStatus.EXCEPTION, cause)
    assert not cbr.tfh.missing
