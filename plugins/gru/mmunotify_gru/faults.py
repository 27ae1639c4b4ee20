"""Misses: how a translation gets into the TLB, and when it must not.

A miss is tried at once by the interrupt handler, which may not suspend: it translates what the
primary has. What it cannot help (the page is not there, or a section covers it) its user has to
call for, who may wait and fault the page in. Either way the order is:

    read the fault handle, look whether a section covers the page, translate, restart the handle

A section that begins after the look disarms the handle before the restart (`hardware/tfh.py`), so
that the translation is dropped, also if the section is over by then.

The original waits until no section of the address space is open. A program that always has one open
somewhere would wait for ever. Here a fault waits for sections that cover its page and for no other,
and when the last of them ends it is tried again before the end returns:

    Bound: a fault is delayed only by sections that cover its page, and by each at most once. If the
    page is present at a moment when none does, the element that missed is done at that moment.
    If the page is not, its user faults it in; it is served then unless another section that covers
    it has begun since.

No driver can do better: what a section covers must not be translated (I-NOEST), and only a
coroutine can fault a page in.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

import anyio

from mmunotify import PAGE_SHIFT, PAGE_SIZE, BadAddress, Translation

from .hardware.geometry import ADDRESS_MASK, PAGE_MASK
from .hardware.instructions import SIZES, Opcode
from .hardware.tfh import TfhState, TfhStatus

if TYPE_CHECKING:
    from mmunotify import Primary

    from .driver import GruDriver
    from .gts import Gts
    from .hardware.cbr import Cbr
    from .hardware.tfh import Tfh


class Outcome(enum.Enum):
    """What came of an attempt to serve a miss."""

    OVER = enum.auto()
    """The block runs on, or was not in need of help."""
    RETRY = enum.auto()
    """Not now: its user has to call, or to call again."""
    NO_ASID = enum.auto()
    """Its context has no ASID to drop in under."""
    FATAL = enum.auto()
    """There is no translation, and will be none."""


# Members of an enum as globals: looked up in their class they cost more than the rest (3.11).
_OVER: Final = Outcome.OVER
_RETRY: Final = Outcome.RETRY
_NO_ASID: Final = Outcome.NO_ASID
_FATAL: Final = Outcome.FATAL
_TFH_IDLE: Final = TfhState.IDLE
_MISS_FMM: Final = TfhState.MISS_FMM
_EXCEPTION: Final = TfhStatus.EXCEPTION
_BCOPY: Final = Opcode.BCOPY


class Waiter:
    """A user who waits for sections that cover the page of his miss."""

    __slots__ = ("cbr", "gts", "loads", "over")

    def __init__(self, gts: Gts, cbr: Cbr) -> None:
        self.gts: Final = gts
        self.cbr: Final = cbr
        self.loads: Final = gts.loads
        self.over: Final = anyio.Event()

    @property
    def missing(self) -> bool:
        """Whether the block still is the context's, and misses."""
        gts = self.gts
        return gts.state is not None and gts.loads == self.loads and self.cbr.tfh.missing


class Faults:
    """The misses of the contexts of one address space."""

    def __init__(self, gms: GruDriver) -> None:
        self.gms: Final = gms
        self.waiters: Final[list[Waiter]] = []

    # ------------------------------------------------------------------ one attempt

    def try_dropin(self, gts: Gts, tfh: Tfh) -> Outcome:
        """One attempt that does not suspend (gru_try_dropin from interrupt level)."""
        seen = tfh.read()
        refused = self._refuse(gts, tfh, by_user=False)
        if refused is not None:
            return refused
        entry = self._translate(gts, tfh)
        if entry is None:
            tfh.user_polling_mode()
            gts.user.user_polling_mode += 1
            self.gms.statistics.tlb_dropin_fail_upm += 1
            return _RETRY
        return self._drop_in(gts, tfh, seen, entry)

    async def try_user_dropin(self, gts: Gts, tfh: Tfh) -> Outcome:
        """One attempt by a user who can wait for the page (gru_try_dropin from user level)."""
        seen = tfh.read()
        refused = self._refuse(gts, tfh, by_user=True)
        if refused is not None:
            return refused
        entry = self._translate(gts, tfh)
        if entry is None:
            if gts.force_reload:
                self.gms.gru.update(gts)
                return _RETRY
            loads, address, write = gts.loads, tfh.address, tfh.write
            try:
                found = await self.gms.memory.fault_in(address, write=write)
            except BadAddress:
                if gts.state is not None and gts.loads == loads and tfh.missing:
                    tfh.exception()
                self.gms.statistics.tlb_dropin_fail_invalid += 1
                return _FATAL
            if gts.state is None or gts.loads != loads:
                return _OVER  # the handle is somebody else's now
            entry = self._entry(self.gms.memory, small_page(found, address), write)
        return self._drop_in(gts, tfh, seen, entry)

    def _refuse(self, gts: Gts, tfh: Tfh, *, by_user: bool) -> Outcome | None:
        """Why a miss must not be served, or not now; None if it may."""
        statistics = self.gms.statistics
        if tfh.state is _TFH_IDLE:
            statistics.tlb_dropin_fail_idle += 1
            return _OVER
        if tfh.status is not _EXCEPTION:
            statistics.tlb_dropin_fail_no_exception += 1
            return _OVER
        if by_user and tfh.state is _MISS_FMM:
            statistics.tlb_dropin_fail_fmm += 1
            return _OVER
        if self.no_asid(tfh):
            statistics.tlb_dropin_fail_no_asid += 1
            if not by_user:
                tfh.user_polling_mode()
            return _NO_ASID
        if self.gms.sections and self.gms.covered(tfh.address, PAGE_SIZE):
            statistics.tlb_dropin_fail_range_active += 1
            self.gms.retries += 1
            if not by_user:
                tfh.user_polling_mode()
            return _RETRY
        return None

    def no_asid(self, tfh: Tfh) -> bool:
        """Whether a miss came from a context without ASID: its tag is everybody's."""
        return tfh.tag == 0

    def _translate(self, gts: Gts, tfh: Tfh) -> Translation | None:
        """What the primary maps now, as an entry; None: somebody has to fault it in.

        Of a huge page that must not be had as a whole, the small one (gru_vtop).
        """
        address, write = tfh.address, tfh.write
        memory = self.gms.memory
        found = memory.translate(address)
        if found is None or (write and not found.writable):
            return None
        if found.size != PAGE_SIZE:
            if self.gms.covered(found.address, found.size):
                found = small_page(found, address)
            elif not gts.huge:
                # The chiplet has to be told first, which stops the block: its user's business.
                gts.huge = gts.force_reload = True
                return None
        return self._entry(memory, found, write)

    def _entry(self, memory: Primary, found: Translation, write: bool) -> Translation:
        """What is dropped in: no more than what was missed.

        A store needs the page to be dirty before it can be made through the entry (I-DIRTY): no
        dirty bit comes back from the TLB.
        """
        if write:
            memory.set_dirty(found.address, found.address + found.size)
        elif found.writable:
            return Translation(found.address, found.frame, False, found.size, found.generation)
        return found

    def _drop_in(self, gts: Gts, tfh: Tfh, seen: int, entry: Translation) -> Outcome:
        gms = self.gms
        gms.statistics.tlb_dropin += 1
        if gts.preload and entry.size == PAGE_SIZE:
            self._preload(gts, tfh, seen)
        gts.user.tlb_dropin += 1
        # Counted before the restart: the block runs on within it.
        if tfh.accepts(seen):
            gms.count_installed(entry, huge_on=gts.state)
        else:
            gms.retries += 1
        tfh.write_restart(seen, entry)
        return _OVER

    def _preload(self, gts: Gts, tfh: Tfh, seen: int) -> None:
        """Drop in the pages that a BCOPY comes to next, as long as that needs no waiting."""
        ins = tfh.cbr.instruction
        if ins.opcode is not _BCOPY:
            return
        length = ins.nelem * SIZES[ins.xtype]
        base = ins.operand1 if tfh.write else ins.address
        end = min(base + length, tfh.address + (gts.preload + 1) * PAGE_SIZE)
        address = (tfh.address & ~PAGE_MASK) + PAGE_SIZE
        while address < end and address <= ADDRESS_MASK:
            if self.gms.covered(address, PAGE_SIZE):
                return
            memory = self.gms.memory
            found = memory.translate(address)
            if found is None or (tfh.write and not found.writable):
                return
            entry = self._entry(memory, small_page(found, address), tfh.write)
            if tfh.write_only(seen, entry):
                self.gms.statistics.tlb_preload_page += 1
                self.gms.count_installed(entry, huge_on=None)
            address += PAGE_SIZE

    # ------------------------------------------------------------------ waiting

    async def user_dropin(self, gts: Gts, cbr: Cbr) -> Waiter | None:
        """Serve the miss of a block whose user calls (gru_user_dropin); the context's lock is held.

        Returns when the block no longer misses or is not loaded any more, or when a section covers
        its page: then, who waits for that section, which its user has to do without the lock. May
        suspend, and may make the primary announce.
        """
        tfh, loads = cbr.tfh, gts.loads
        while gts.state is not None and gts.loads == loads and tfh.missing:
            outcome = await self.try_user_dropin(gts, tfh)
            if outcome is _NO_ASID:
                self.gms.gru.unload(gts)
            if outcome is not _RETRY:
                break
            if self.gms.covered(tfh.address, PAGE_SIZE):
                self.gms.statistics.call_os_wait_queue += 1
                waiter = Waiter(gts, cbr)
                self.waiters.append(waiter)
                return waiter
        return None

    def forget(self, waiter: Waiter) -> None:
        """Nobody waits with this any more."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)

    def section_over(self) -> None:
        """A section has ended: serve and wake those whose page no section covers any more.

        The others wait on (the original wakes everybody).
        """
        for waiter in self.waiters[:]:
            address = waiter.cbr.tfh.address
            if waiter.missing and self.gms.covered(address, PAGE_SIZE):
                continue
            self.waiters.remove(waiter)
            waiter.over.set()
            if waiter.missing:
                self.try_dropin(waiter.gts, waiter.cbr.tfh)

    def wake_all(self) -> None:
        """The address space goes: nobody has anything to wait for."""
        for waiter in self.waiters:
            waiter.over.set()
        self.waiters.clear()


def small_page(found: Translation, address: int) -> Translation:
    """The page of `address` out of a translation that may map more."""
    if found.size == PAGE_SIZE:
        return found
    page = address & ~PAGE_MASK
    return Translation(
        page,
        found.frame + (page - found.address >> PAGE_SHIFT),
        found.writable,
        PAGE_SIZE,
        found.generation,
    )
