"""The GRUs of a machine and their driver: which context is loaded where.

A context is loaded when it is used. If no chiplet has room it tries again, and after a while takes
a place from somebody else; whose context was unloaded loads it again when it is used.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final

import anyio
from anyio.lowlevel import checkpoint

from mmunotify import Log

from . import events
from .errors import ContextClosed, GruError, InstructionException, NoResources
from .gts import Gts
from .hardware.cch import MissMode
from .hardware.chiplet import Chiplet
from .hardware.geometry import (
    CHIPLETS_PER_BLADE,
    MAX_ASID,
    MIN_ASID,
    NUM_CBR,
    NUM_CCH,
    NUM_DSR_BYTES,
)
from .hardware.instructions import RETRYABLE, CbStatus
from .state import GruState, current_blade, lowest
from .statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mmunotify import Notifiers

    from .context import Context
    from .driver import GruDriver
    from .faults import Waiter

TURNS: Final = 64
"""Misses that a waiting user serves before he lets others run."""
RETRY_LIMIT: Final = 3
"""How often an instruction that stopped with a retryable cause is started again."""


class Gru:
    """`blades` of two chiplets each, whose TLBs have `tlb` entries. Delays are milliseconds.

    `first_asid` and `last_asid` bound the identifiers that a chiplet gives out. `logger` is a
    structlog logger. Belongs to one event loop.
    """

    chiplet_type: ClassVar[type[Chiplet]] = Chiplet
    """What it is built of."""

    def __init__(
        self,
        *,
        blades: int = 1,
        tlb: int = 512,
        assign_delay: int = 20,
        steal_delay: int = 200,
        first_asid: int = MIN_ASID,
        last_asid: int = MAX_ASID,
        logger: object = None,
    ) -> None:
        if blades < 1 or tlb < 1:
            raise ValueError(f"a Gru of {blades} blades and {tlb} TLB entries: expected some")
        self.blades: Final = blades
        chiplets = (
            self.chiplet_type(number, number // CHIPLETS_PER_BLADE, tlb)
            for number in range(blades * CHIPLETS_PER_BLADE)
        )
        self.states: Final = tuple(GruState(chiplet, first_asid, last_asid) for chiplet in chiplets)
        for state in self.states:
            state.chiplet.interrupt = self._interrupt
        self.assign_delay: Final = assign_delay
        self.steal_delay: Final = steal_delay
        self.log: Final = Log(logger, driver="gru")
        self.logger: Final = logger
        self.drivers: Final[list[GruDriver]] = []
        """Of the address spaces that use it now."""
        self._retired = Statistics()
        self._thief = 0

    def __repr__(self) -> str:
        loaded = sum(state.active for state in self.states)
        return f"<Gru of {self.blades} blades: {loaded} contexts loaded>"

    @property
    def chiplets(self) -> tuple[Chiplet, ...]:
        """The hardware, in the order of their numbers."""
        return tuple(state.chiplet for state in self.states)

    @property
    def statistics(self) -> Statistics:
        """The counters of all address spaces that have used it."""
        total = Statistics()
        total.add(self._retired)
        for driver in self.drivers:
            total.add(driver.statistics)
        return total

    def retire(self, driver: GruDriver) -> None:
        """An address space has gone: keep its counters."""
        self.drivers.remove(driver)
        self._retired.add(driver.statistics)

    # ------------------------------------------------------------------ the user's way in

    @asynccontextmanager
    async def open(
        self,
        notifiers: Notifiers[Any],
        *,
        cbs: int = 2,
        dseg: int = 4096,
        miss: str = "interrupt",
        preload: int = 0,
        blade: int | None = None,
        chiplet: int | None = None,
    ) -> AsyncIterator[Context]:
        """`async with`: a context with `cbs` control blocks and `dseg` bytes of data segment.

        The first of an address space has the GRU told of it (Notifiers.get), the last one ends that
        (put). `miss` is interrupt or poll; `preload` is how many further pages a miss of a BCOPY
        drops in; `blade` and `chiplet` (0 or 1) say where to load it, by default where its task
        runs. Raises NoResources for what no chiplet has, GruError where `notifiers` know no address
        space, and what `Notifiers.get` raises.
        """
        from .context import Context
        from .driver import GruDriver

        if not (0 < cbs <= NUM_CBR and 0 < dseg <= NUM_DSR_BYTES):
            raise NoResources(
                f"a context of {cbs} control blocks and {dseg} bytes: expected at most {NUM_CBR} "
                f"and {NUM_DSR_BYTES}, and some of each"
            )
        mode = MissMode(miss)
        self.check_place(blade, chiplet)
        subscription = await notifiers.get(GruDriver, self.make_driver)
        gms = subscription.driver
        if gms.gru is not self:
            notifiers.put(subscription)
            raise GruError(f"{notifiers!r} has {gms.gru!r} already: expected to use that one")
        gts = Gts(
            gms,
            f"{notifiers.name}/{gms.statistics.gts_alloc}",
            cbrs=cbs,
            dseg=dseg,
            miss_mode=mode,
            preload=preload,
            blade=blade,
            chiplet=chiplet,
            freed=lambda: notifiers.put(subscription),
        )
        context = Context(self, gts, cbs, dseg)
        try:
            yield context
        finally:
            context.close()
            self.close(gts)

    def make_driver(self) -> GruDriver:
        """The driver of one more address space."""
        from .driver import GruDriver

        return GruDriver(gru=self)

    def check_place(self, blade: int | None, chiplet: int | None) -> None:
        """Raise NoResources for a blade, or a chiplet of a blade, that there is not."""
        if blade is not None and not 0 <= blade < self.blades:
            raise NoResources(f"blade {blade}: expected one of 0 to {self.blades - 1}")
        if chiplet is not None and not 0 <= chiplet < CHIPLETS_PER_BLADE:
            raise NoResources(f"chiplet {chiplet}: expected 0 or 1, counted on its blade")

    def close(self, gts: Gts) -> None:
        """The user of a context goes: unload it, now or when whoever works on it is done."""
        gts.closing = True
        self.evict(gts)
        gts.drop()

    def evict(self, gts: Gts) -> bool:
        """Unload a context unless somebody is at work on it; whether it was. Never suspends."""
        if gts.state is None or not gts.lock.down_write_trylock():
            return False
        gts.get()
        try:
            self.unload(gts)
        finally:
            gts.lock.up_write()
            gts.drop()
        return True

    def abort(self, gts: Gts, number: int) -> None:
        """Stop whatever a control block does; a context that is not loaded forgets it."""
        if gts.state is None:
            gts.saved_cbrs[number].status = CbStatus.IDLE
        else:
            gts.cbrs[number].abort()

    # ------------------------------------------------------------------ loading and unloading

    def places(self, gts: Gts) -> tuple[GruState, ...]:
        """Where a context may be loaded: on the blade that it asks for, or that its task is on."""
        blade = current_blade.get() % self.blades if gts.blade is None else gts.blade
        first = blade * CHIPLETS_PER_BLADE
        if gts.chiplet is not None:
            return (self.states[first + gts.chiplet],)
        return self.states[first : first + CHIPLETS_PER_BLADE]

    def well_placed(self, gts: Gts) -> bool:
        """Whether a loaded context is where it may be (gru_check_context_placement)."""
        return gts.state in self.places(gts)

    def try_load(self, gts: Gts) -> bool:
        """Load a context if a chiplet has room, on the one with the fewest; whether it did."""
        state = min(
            (place for place in self.places(gts) if place.room_for(gts)),
            key=lambda place: place.active,
            default=None,
        )
        if state is None:
            gts.gms.statistics.assign_context_failed += 1
            return False
        self._load(gts, state)
        return True

    def _load(self, gts: Gts, state: GruState) -> None:
        gms, chiplet = gts.gms, state.chiplet
        number = state.contexts.index(None)
        gms.statistics.assign_context += 1
        gms.statistics.load_user_context += 1
        asid = gms.load_tracker(state, number)
        state.contexts[number] = gts
        gts.get()
        cch = chiplet.cchs[number]
        cch.allocate(
            asid,
            gts.miss_mode,
            lowest(chiplet.free_cbr_units, gts.cbr_units),
            lowest(chiplet.free_dsr_units, gts.dsr_units),
            gms.memory,
        )
        cch.huge = gts.huge
        gts.force_reload = False
        cch.dseg[:] = gts.saved_dseg
        for cbr, saved in zip(cch.cbrs, gts.saved_cbrs, strict=True):
            cbr.restore(saved)
        gts.state, gts.cch, gts.cbrs = state, cch, cch.cbrs
        gts.loads += 1
        self.log.emit(
            events.CONTEXT_LOADED,
            mm=gms.serves,
            context=gts.name,
            chiplet=chiplet.number,
            asid=asid,
        )
        cch.start()

    def unload(self, gts: Gts) -> None:
        """Take a loaded context off its chiplet and keep what it had. The lock is held, or useless.

        May free the context: only who has a reference may use it afterwards.
        """
        state, cch, gms = gts.state, gts.cch, gts.gms
        assert state is not None
        assert cch is not None
        cch.interrupt()
        gts.saved_cbrs = [cbr.save() for cbr in cch.cbrs]
        gts.saved_dseg = bytes(cch.dseg)
        asid = cch.asid
        gms.unload_tracker(state, cch.number)
        cch.deallocate()
        state.contexts[cch.number] = None
        gts.state, gts.cch, gts.cbrs = None, None, []
        gms.statistics.free_context += 1
        self.log.emit(
            events.CONTEXT_UNLOADED,
            mm=gms.serves,
            context=gts.name,
            chiplet=state.chiplet.number,
            asid=asid,
        )
        gts.drop()

    def update(self, gts: Gts) -> None:
        """Tell the chiplet what has changed of a loaded context; its blocks miss again."""
        cch = gts.cch
        assert cch is not None
        gts.force_reload = False
        cch.interrupt()
        cch.huge = gts.huge
        cch.start()

    def steal(self, gts: Gts) -> bool:
        """Unload a context of somebody who is not at work on it; whether there was one.

        They are asked in turns, beginning behind the last that was taken.
        """
        slots = [(place, number) for place in self.places(gts) for number in range(NUM_CCH)]
        for step in range(len(slots)):
            turn = self._thief + step
            place, number = slots[turn % len(slots)]
            victim = place.contexts[number]
            if victim is None or not self.evict(victim):
                continue
            self._thief = turn + 1
            victim.user.context_stolen += 1
            gts.gms.statistics.steal_user_context += 1
            self.log.emit(
                events.CONTEXT_STOLEN,
                mm=gts.gms.serves,
                context=gts.name,
                chiplet=place.chiplet.number,
                victim=victim.gms.serves,
            )
            return True
        gts.gms.statistics.steal_context_failed += 1
        return False

    async def touch(self, gts: Gts) -> None:
        """A context is used that is not loaded: load it (gru_fault). May suspend for long.

        Raises ContextClosed when its user or its address space has gone.
        """
        gts.gms.statistics.nopfn += 1
        began = anyio.current_time()
        gts.get()
        try:
            while True:
                async with gts.lock.writing():
                    if gts.closing:
                        raise ContextClosed(f"{gts.name}: closed")
                    if gts.state is not None or self.try_load(gts):
                        return
                waited = 1000 * (anyio.current_time() - began)
                if waited < self.steal_delay or not self.steal(gts):
                    await anyio.sleep(self.assign_delay / 1000)
        finally:
            gts.drop()

    # ------------------------------------------------------------------ misses

    def _interrupt(self, chiplet: Chiplet) -> None:
        """Blocks of a chiplet miss (gru_intr). Plain: whom it cannot help has to call."""
        state = self.states[chiplet.number]
        missing = chiplet.take_fault_map()
        while missing:
            cbr = chiplet.cbrs[(missing & -missing).bit_length() - 1]
            missing &= missing - 1
            gts = state.contexts[cbr.context]
            if gts is None:
                continue
            statistics = gts.gms.statistics
            statistics.intr += 1
            statistics.intr_tfh += 1
            gts.gms.faults.try_dropin(gts, cbr.tfh)

    async def call_os(self, gts: Gts, number: int) -> None:
        """The user of control block `number` finds CALL_OS (gru_handle_user_call_os).

        Returns when something has changed: it may run on, may have stopped, or is not loaded.
        """
        gms = gts.gms
        gms.statistics.call_os += 1
        waiter: Waiter | None = None
        gts.get()
        try:
            if gts.state is not None and (gts.force_reload or not self.well_placed(gts)):
                async with gts.lock.writing():
                    self._settle(gts)
            async with gts.lock.reading():
                if gts.state is not None:
                    waiter = await gms.faults.user_dropin(gts, gts.cbrs[number])
            if waiter is not None:
                await waiter.over.wait()
            if gts.closing:
                self.evict(gts)
        finally:
            if waiter is not None:
                gms.faults.forget(waiter)
            gts.drop()

    def _settle(self, gts: Gts) -> None:
        """Unload a context that is in the wrong place; tell the chiplet what it does not know."""
        if gts.state is not None and not self.well_placed(gts):
            gts.gms.statistics.check_context_unload += 1
            self.unload(gts)
        elif gts.state is not None and gts.force_reload:
            self.update(gts)

    # ------------------------------------------------------------------ waiting for an instruction

    async def wait(self, gts: Gts, number: int) -> None:
        """Until control block `number` of a context is idle (gru_wait). Does what its user has to.

        Raises InstructionException where it stops, after `RETRY_LIMIT` retries where a retry can
        help, and ContextClosed.
        """
        retries = turns = 0
        while True:
            if not gts.cbrs:
                await self.touch(gts)
            cbr = gts.cbrs[number]
            if cbr.status is CbStatus.IDLE:
                return
            if cbr.status is CbStatus.CALL_OS:
                turns += 1
                if turns % TURNS == 0:
                    await checkpoint()
                await self.call_os(gts, number)
            elif cbr.status is CbStatus.ACTIVE:
                # It polls, or has much to do: let others run, and have it run on.
                await checkpoint()
                if gts.cbrs:
                    gts.cbrs[number].resume()
            elif cbr.cause & RETRYABLE and retries < RETRY_LIMIT:
                retries += 1
                cbr.status = CbStatus.IDLE
                cbr.start(cbr.instruction)
            else:
                gts.gms.statistics.user_exception += 1
                stopped = InstructionException(
                    cbr.instruction, cbr.cause, cbr.fault_address, cbr.progress
                )
                cbr.status = CbStatus.IDLE
                raise stopped
