"""The checker says which rule is broken, whatever part of the driver's state is wrong."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

import mmunotify as mn
from dict_mm import DictMm
from mmunotify_gru import Gru, GruChecker
from mmunotify_gru.errors import GruInvariantViolated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mmunotify import Translation
    from mmunotify_gru import Context
    from mmunotify_gru.asids import MmAsid

BASE = 0x10000
Sabotage: TypeAlias = AbstractContextManager[None]


def an_entry(gru: Gru) -> tuple[int, Translation]:
    (found,) = gru.chiplets[0].tlb
    return found


@contextmanager
def changed(part: Any, name: str, value: Any) -> Iterator[None]:
    """Another value while the checker looks."""
    before = getattr(part, name)
    setattr(part, name, value)
    try:
        yield
    finally:
        setattr(part, name, before)


def stale_generation(gru: Gru, context: Context) -> Sabotage:
    entry = an_entry(gru)[1]
    return changed(entry, "generation", entry.generation - 1)


def other_frame(gru: Gru, context: Context) -> Sabotage:
    entry = an_entry(gru)[1]
    return changed(entry, "frame", entry.frame + 1)


def nothing_there(gru: Gru, context: Context) -> Sabotage:
    entry = an_entry(gru)[1]
    return changed(entry, "address", BASE + 0x100000)


def too_much_permission(gru: Gru, context: Context) -> Sabotage:
    return changed(an_entry(gru)[1], "writable", True)


def under_a_section(gru: Gru, context: Context) -> Sabotage:
    return changed(gru.drivers[0], "sections", [(BASE, BASE + 1)])


def asid_zero(gru: Gru, context: Context) -> Sabotage:
    gru.chiplets[0].tlb.insert(3, an_entry(gru)[1])
    return nullcontext()


def tracker(gru: Gru) -> MmAsid:
    return gru.drivers[0].asids[gru.states[0]]


def other_asid(gru: Gru, context: Context) -> Sabotage:
    return changed(tracker(gru), "asid", tracker(gru).asid + 8)


def context_bit_lost(gru: Gru, context: Context) -> Sabotage:
    return changed(tracker(gru), "contexts", 0)


def context_bit_too_many(gru: Gru, context: Context) -> Sabotage:
    return changed(tracker(gru), "contexts", 0b100001)


def reference_lost(gru: Gru, context: Context) -> Sabotage:
    return changed(context.gts, "references", 0)


def units_lost(gru: Gru, context: Context) -> Sabotage:
    return changed(gru.chiplets[0], "free_cbr_units", 0)


def units_given_twice(gru: Gru, context: Context) -> Sabotage:
    return changed(gru.chiplets[0], "free_dsr_units", (1 << 32) - 1)


SABOTAGES: list[tuple[Callable[[Gru, Context], Sabotage], str]] = [
    (stale_generation, "I-FREE"),
    (other_frame, "I-COW"),
    (nothing_there, "I-FREE"),
    (too_much_permission, "I-PERM"),
    (under_a_section, "I-NOEST"),
    (asid_zero, "ASID"),
    (other_asid, "ASID"),
    (context_bit_lost, "contexts"),
    (context_bit_too_many, "contexts"),
    (reference_lost, "contexts"),
    (units_lost, "contexts"),
    (units_given_twice, "contexts"),
]


@pytest.mark.parametrize(("sabotage", "rule"), SABOTAGES)
async def test_a_broken_rule_is_named(
    sabotage: Callable[[Gru, Context], Sabotage], rule: str
) -> None:
    """Nothing is wrong before, and that is after."""
    gru = Gru()
    checker = GruChecker(gru)
    async with DictMm() as mm:
        await mm.map(BASE, BASE + 0x1000, writable=False)
        async with gru.open(mm.notifiers, chiplet=0) as context:
            await context.vload(BASE, elements=1)
            checker.check()
            with sabotage(gru, context), pytest.raises(GruInvariantViolated, match=f"{rule}: "):
                checker.check()


async def test_watching_remembers_the_first_violation() -> None:
    """What was wrong for a moment is raised at the end, and whoever traced goes on tracing."""
    gru = Gru()
    records: list[mn.Record] = []
    async with DictMm() as mm:
        await mm.map(BASE, BASE + 0x1000)
        mm.notifiers.trace = records.append
        checker = GruChecker(gru)
        checker.watch(mm.notifiers)
        async with gru.open(mm.notifiers, chiplet=0) as context:
            await context.vload(BASE, elements=1)
            tag, entry = an_entry(gru)
            async with mm.notifiers.invalidating(mn.Range(BASE, BASE + 0x1000)):
                gru.chiplets[0].tlb.insert(tag, entry)
                await mm.notifiers.invalidate(mn.Range(0, 0x1000))
                gru.chiplets[0].tlb.invalidate_all()
            assert records
            with pytest.raises(GruInvariantViolated, match="I-NOEST: "):
                checker.check()
