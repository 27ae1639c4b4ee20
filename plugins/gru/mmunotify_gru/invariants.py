"""The rules that the driver must keep, as a checker that can watch any run.

    I-NOEST   no entry of a TLB maps an address that an open section covers
    I-FREE    an entry maps a frame that the primary maps there, in its generation
    I-COW     ... and the same one
    I-PERM    an entry that may be written is of a page that may be
    ASID      a chiplet has given one ASID to one address space at most; none is 0; a context runs
              under that of its address space
    contexts  a bit of a tracker is set if and only if the context is loaded, which is referenced;
              the units of a chiplet are either free or some context's

Entries under an ASID that nobody can use any more are no violation: that is how a flush is put off.

    with GruChecker(gru) as checker:
        checker.watch(mm.notifiers)     # checks whenever a section begins or ends, or a callback
        ...
        checker.check()                 # raises GruInvariantViolated; so does the way out
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mmunotify import PAGE_SHIFT

from .errors import GruInvariantViolated
from .hardware.cch import CchState
from .hardware.geometry import ASID_STEP, CBR_AU, DSR_AU, MIN_ASID, NUM_CBR, NUM_DSR_BYTES

if TYPE_CHECKING:
    from types import TracebackType

    from mmunotify import Notifiers, Record, Translation

    from .driver import GruDriver
    from .gru import Gru
    from .state import GruState


class GruChecker:
    """Watches a GRU. With `exact=False`, entries are not compared with what the primary maps.

    They differ legally where zaps are told after the entries changed (batching by page, by 512 or
    by gather), from then until the driver is told.
    """

    def __init__(self, gru: Gru, *, exact: bool = True) -> None:
        self.gru: Final = gru
        self.exact: Final = exact
        self.checks = 0
        self.broken: GruInvariantViolated | None = None
        """The first violation that was seen while watching."""

    def __enter__(self) -> GruChecker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.check()

    def watch(self, notifiers: Notifiers[Any]) -> None:
        """Check at every record of the trace of an address space, besides who traces it now."""
        others = notifiers.trace

        def seen(record: Record) -> None:
            if others is not None:
                others(record)
            if self.broken is None:
                try:
                    self._check()
                except GruInvariantViolated as error:
                    self.broken = error

        notifiers.trace = seen

    def check(self) -> None:
        """Raise the first violation that was seen, or that is there now."""
        if self.broken is not None:
            raise self.broken
        self._check()

    def _check(self) -> None:
        self.checks += 1
        for state in self.gru.states:
            self._check_contexts(state)
            owners = self._check_asids(state)
            for tag, entry in state.chiplet.tlb:
                if tag < MIN_ASID:
                    raise _broken("ASID", f"{entry} was dropped in under ASID {tag}", state)
                owner = owners.get(tag - tag % ASID_STEP)
                if owner is not None:
                    self._check_entry(state, owner, entry)

    def _check_entry(self, state: GruState, owner: GruDriver, entry: Translation) -> None:
        where = f"{entry.address:#x} of {owner.serves}, {entry.size} bytes, frame {entry.frame},"
        if owner.covered(entry.address, entry.size):
            raise _broken("I-NOEST", f"{where} is in a TLB under an open section", state)
        if not self.exact:
            return
        for offset in range(0, entry.size, 1 << PAGE_SHIFT):
            address, frame = entry.address + offset, entry.frame + (offset >> PAGE_SHIFT)
            now = owner.memory.translate(address)
            if now is None:
                raise _broken("I-FREE", f"{where} maps {address:#x}, which is gone", state)
            if now.frame + (address - now.address >> PAGE_SHIFT) != frame:
                raise _broken("I-COW", f"{where} maps {address:#x}, which is {now}", state)
            if now.address == entry.address and now.generation != entry.generation:
                raise _broken("I-FREE", f"{where} maps a frame that was freed since", state)
            if entry.writable and not now.writable:
                raise _broken("I-PERM", f"{where} may be written, {address:#x} not", state)

    def _check_asids(self, state: GruState) -> dict[int, GruDriver]:
        owners: dict[int, GruDriver] = {}
        for driver in self.gru.drivers:
            tracker = driver.asids.get(state)
            if tracker is None or not tracker.usable(state.asids.generation):
                continue
            other = owners.setdefault(tracker.asid, driver)
            if other is not driver:
                raise _broken(
                    "ASID",
                    f"{tracker.asid:#x} is that of {other.serves} and of {driver.serves}",
                    state,
                )
        return owners

    def _check_contexts(self, state: GruState) -> None:
        chiplet = state.chiplet
        cbrs = chiplet.free_cbr_units.bit_count()
        units = chiplet.free_dsr_units.bit_count()
        for number, gts in enumerate(state.contexts):
            cch = chiplet.cchs[number]
            loaded = [
                driver
                for driver in self.gru.drivers
                if state in driver.asids and driver.asids[state].contexts >> number & 1
            ]
            if gts is None:
                if loaded or cch.state is not CchState.INACTIVE:
                    raise _broken("contexts", f"{number} is not loaded, and {loaded} has it", state)
                continue
            if loaded != [gts.gms] or gts.references < 1 or gts.cch is not cch:
                raise _broken("contexts", f"{number} is {gts}, and {loaded} have it", state)
            if cch.asid != gts.gms.asids[state].asid:
                raise _broken("ASID", f"{gts} runs under {cch.asid:#x}", state)
            cbrs += len(cch.cbrs) // CBR_AU
            units += len(cch.dseg) // DSR_AU
        if cbrs != NUM_CBR // CBR_AU or units != NUM_DSR_BYTES // DSR_AU:
            raise _broken("contexts", f"{cbrs} and {units} units are accounted for", state)


def _broken(rule: str, what: str, state: GruState) -> GruInvariantViolated:
    return GruInvariantViolated(f"{rule}: {what} ({state.chiplet})")
