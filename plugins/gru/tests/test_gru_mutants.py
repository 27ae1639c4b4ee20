"""Drivers and hardware that break one rule each. What the rule is for must show at once.

Every scenario passes with the driver as it is; the mutant fails in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

import mmunotify as mn
from dict_mm import DictMm
from mmunotify.model import Machine
from mmunotify_gru import Gru, GruChecker, GruDriver
from mmunotify_gru.asids import MmAsid
from mmunotify_gru.errors import GruInvariantViolated, UseAfterFree
from mmunotify_gru.faults import Faults
from mmunotify_gru.hardware.chiplet import Chiplet
from mmunotify_gru.hardware.tfh import Tfh

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mmunotify import Primary, Translation
    from mmunotify_gru.gts import Gts

    Scenario = Callable[[type[Gru]], Awaitable[None]]

PAGE = 4096
REGION = 1 << 61


class Slow:
    """A primary whose answer to `fault_in` is on its way until `arrive` is set (GUP sleeps)."""

    def __init__(self, primary: Primary) -> None:
        self._primary = primary
        self.asked = anyio.Event()
        self.arrive = anyio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._primary, name)

    async def fault_in(self, address: int, *, write: bool = False) -> Translation:
        found = await self._primary.fault_in(address, write=write)
        self.asked.set()
        await self.arrive.wait()
        return found


def gru_with(driver: type[GruDriver]) -> type[Gru]:
    """A GRU whose drivers are of this class."""

    class Made(Gru):
        def make_driver(self) -> GruDriver:
            return driver(gru=self)

    return Made


# ---------------------------------------------------------------------- M8: the hardware's rule


async def answer_overtaken(gru_type: type[Gru]) -> None:
    """A page is unmapped, and its frame reused, while its translation is on the way to the TLB."""
    slow: list[Slow] = []

    class SlowDriver(GruDriver):
        def attach(self, primary: Primary | None) -> None:
            assert primary is not None
            slow.append(Slow(primary))
            super().attach(slow[0])

    class SlowGru(gru_type):  # type: ignore[valid-type, misc]
        def make_driver(self) -> GruDriver:
            return SlowDriver(gru=self)

    gru = SlowGru()
    async with DictMm() as mm:
        await mm.map(0x10000, 0x20000)
        async with gru.open(mm.notifiers) as context:

            async def load() -> None:
                await context.vload(0x10000, elements=1)

            async with anyio.create_task_group() as tg:
                tg.start_soon(load)
                await slow[0].asked.wait()
                await mm.evict(0x10000)
                await mm.store(0x11000, b"reuses the frame")
                slow[0].arrive.set()
            with GruChecker(gru):
                assert await context.get(0, 8) == bytes(8)
            assert gru.drivers[0].retries == 1


class Deaf(Tfh):
    """M8: a restart is accepted whatever has happened since the handle was read."""

    __slots__ = ()

    def accepts(self, seen: int) -> bool:
        return True


class DeafChiplet(Chiplet):
    tfh_type = Deaf


class DeafGru(Gru):
    chiplet_type = DeafChiplet


# ---------------------------------------------------------------------- M26: ASIDs and generations


async def asids_go_round(gru_type: type[Gru]) -> None:
    """An address space comes back when its old ASID has been given to another."""
    gru = gru_type(blades=1, first_asid=8, last_asid=8 + 8 * 18)
    async with DictMm(name="first") as first, DictMm(name="second") as second:
        for mm in (first, second):
            await mm.map(0x10000, 0x20000)
            await mm.store(0x10000, (mm.notifiers.name[0] * 8).encode())
        async with (
            gru.open(first.notifiers, chiplet=0) as one,
            gru.open(second.notifiers, chiplet=0) as two,
        ):
            await one.vload(0x10000, elements=1)
            one.unload()
            state = gru.states[0]
            asid = gru.drivers[0].asids[state].asid
            while gru.drivers[1].asids.get(state, MmAsid()).asid != asid:
                await two.vload(0x10000, elements=1)
                if gru.drivers[1].asids[state].asid == asid:
                    break
                two.unload()
                await second.notifiers.invalidate(mn.Range(0, PAGE))
            assert gru.statistics.asid_wrap == 1
            with GruChecker(gru):
                await one.vload(0x10000, elements=1)
                assert await one.get(0, 8) == b"ffffffff"


class Ageless(MmAsid):
    """M26: an ASID is used again without a look at the generation."""

    __slots__ = ()

    def usable(self, generation: int) -> bool:
        return self.asid != 0


class AgelessDriver(GruDriver):
    asid_type = Ageless


# ---------------------------------------------------------------------- M27: ASID 0


async def no_asid(gru_type: type[Gru]) -> None:
    """A context whose chiplet was not told its ASID is refused, and served when it has been."""
    gru = gru_type()
    async with DictMm() as mm:
        await mm.map(0x10000, 0x20000)
        await mm.store(0x10000, b"contents")
        async with gru.open(mm.notifiers) as context:
            await context.nop()
            cch = context.gts.cch
            assert cch is not None
            cch.interrupt()
            cch.asid = 0
            cch.start()
            with GruChecker(gru):
                await context.vload(0x10000, elements=1)
                assert await context.get(0, 8) == b"contents"
            assert gru.statistics.tlb_dropin_fail_no_asid > 0


class AnyAsidFaults(Faults):
    """M27: misses are served under ASID 0."""

    def no_asid(self, tfh: Tfh) -> bool:
        return False


class AnyAsidDriver(GruDriver):
    faults_type = AnyAsidFaults


# ---------------------------------------------------------------------- Z36: range arithmetic


def original_purges(start: int, end: int, shift: int = 12) -> list[tuple[int, int]]:
    """The arithmetic of the original, in 64 bits: one operation, for base pages."""
    if shift != 12:
        return []
    mask = (1 << 64) - 1
    count = min(((end - start + PAGE - 1) & mask) >> 12, 1024)
    return [(start, (count - 1) & mask)]


class Z36Driver(GruDriver):
    purges = staticmethod(original_purges)


def invalidated(start: int, end: int, addresses: list[int]) -> Scenario:
    """Invalidate a range of 2^64 addresses in which some are translated."""

    async def scenario(gru_type: type[Gru]) -> None:
        gru = gru_type()
        async with DictMm() as mm:
            for address in addresses:
                await mm.map(address, address + PAGE)
            async with gru.open(mm.notifiers) as context:
                with GruChecker(gru) as checker:
                    checker.watch(mm.notifiers)
                    for address in addresses:
                        await context.vload(address, elements=1)
                    driver = gru.drivers[0]
                    async with mm.notifiers.invalidating(mn.Range(start, end)):
                        checker.check()
                    assert driver.mapped == sum(start <= at < end for at in addresses)

    return scenario


async def huge_page_invalidated(gru_type: type[Gru]) -> None:
    """A range of small pages inside a page that was dropped in as a huge one."""
    gru = gru_type()
    async with Machine(frames=1 << 12, thp="always") as machine:
        mm = machine.new_mm()
        heap = (await mm.mmap(1 << 23) + (1 << 21)) & -(1 << 21)
        await mm.access(heap, write=True)
        async with gru.open(mm.notifiers) as context:
            with GruChecker(gru) as checker:
                checker.watch(mm.notifiers)
                await context.vset(heap, 1, elements=1)
                tlb = next(chiplet.tlb for chiplet in gru.chiplets if chiplet.tlb.used)
                assert [entry.size for _, entry in tlb] == [1 << 21]
                await mm.mprotect(heap + 8 * PAGE, PAGE, 1)
                checker.check()


# ---------------------------------------------------------------------- Z37: use after free


async def closed_meanwhile(gru_type: type[Gru]) -> None:
    """A context is closed while a call for it waits, which then finds it on the wrong chiplet."""
    gru = gru_type(blades=2)
    async with DictMm() as mm:
        await mm.map(0x10000, 0x20000)
        async with anyio.create_task_group() as tg:
            async with gru.open(mm.notifiers, miss="poll", blade=0) as context:
                gts = context.gts
                await context.nop()

                async def call() -> None:
                    await gru.call_os(gts, 0)

                await gts.lock.down_write()
                tg.start_soon(call)
                await anyio.wait_all_tasks_blocked()
                context.place(blade=1)
            gts.lock.up_write()
        assert gru.states[0].active == gru.states[1].active == 0
        assert gru.statistics.gts_free == 1


class Z37Gru(Gru):
    """The placement check unloads by itself, and its caller holds no reference."""

    async def call_os(self, gts: Gts, number: int) -> None:
        async with gts.lock.writing():
            if gts.state is not None and not self.well_placed(gts):
                self.unload(gts)
            if gts.state is not None:
                await gts.gms.faults.user_dropin(gts, gts.cbrs[number])


# ---------------------------------------------------------------------- the table


CROSSING = invalidated(REGION - PAGE, REGION + PAGE, [REGION - PAGE, REGION, REGION + PAGE])
EVERYTHING = invalidated(0, mn.ULONG_MAX, [0x10000, REGION + PAGE, 7 * REGION])
TO_THE_END = invalidated(mn.ADDRESS_END - 2 * PAGE, mn.ADDRESS_END, [mn.ADDRESS_END - PAGE])

MUTANTS: list[Any] = [
    pytest.param(answer_overtaken, DeafGru, mn.StaleTranslation, id="M8"),
    pytest.param(asids_go_round, gru_with(AgelessDriver), GruInvariantViolated, id="M26"),
    pytest.param(no_asid, gru_with(AnyAsidDriver), GruInvariantViolated, id="M27"),
    pytest.param(CROSSING, gru_with(Z36Driver), GruInvariantViolated, id="Z36-region"),
    pytest.param(EVERYTHING, gru_with(Z36Driver), GruInvariantViolated, id="Z36-everything"),
    pytest.param(huge_page_invalidated, gru_with(Z36Driver), GruInvariantViolated, id="Z36-huge"),
    pytest.param(closed_meanwhile, Z37Gru, UseAfterFree, id="Z37"),
]


@pytest.mark.parametrize(
    "scenario", [*(case.values[0] for case in MUTANTS), TO_THE_END], ids=lambda case: case.__name__
)
async def test_the_driver_keeps_the_rule(scenario: Scenario) -> None:
    """As it is, nothing goes wrong."""
    await scenario(Gru)


@pytest.mark.parametrize(("scenario", "mutant", "expected"), MUTANTS)
async def test_the_mutant_is_caught(
    scenario: Scenario, mutant: type[Gru], expected: type[Exception]
) -> None:
    """Who breaks the rule is found out."""
    with pytest.raises((expected, ExceptionGroup)) as caught:
        await scenario(mutant)
    found: BaseException = caught.value
    while isinstance(found, ExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, expected)
