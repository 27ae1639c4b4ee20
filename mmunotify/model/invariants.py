"""A checker of the contract that can watch any run of a machine.

It plays the greediest device that the contract allows: of every watched address space it holds
every translation that there is, drops what is announced and nothing else, and looks up again what
no section covers. Whatever the primary does behind its back shows:

    I-FREE    a frame is freed while it is still held
    I-COW     a held address maps another page now
    I-PERM    a held translation may be written and the entry may not
    I-NOEST   what a section covers is held again only when it is over, and checked from then on
    I-PAIR    a section or callback ends that did not begin, or begins and does not end
    I-REG     a driver is told the end of a section whose start it was not told
    I-REL     a callback runs after its driver's release
    I-PROG    a section is still open when the run is over

What needs other eyes has them: I-CTX is lockdep's, I-INFLIGHT and I-SEQ are broken by drivers,
whose translations the generation stamps catch in use (StaleTranslation), I-DIRTY shows in
contents, and I-AGE in what reclaim takes.

    with InvariantChecker(machine) as checker:
        ...
        checker.check()         # raises the first InvariantViolated; so does the way out
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mmunotify import log
from mmunotify.errors import InvariantViolated
from mmunotify.ranges import PAGE_SHIFT

from . import flags as f
from . import frames as fr
from .memory import iter_present

if TYPE_CHECKING:
    from .machine import Machine
    from .mm import AddressSpace

_COUNTED = f.PTE_PRESENT | f.PTE_USER


class _Watched:
    """What the checker holds of one address space."""

    def __init__(self, checker: InvariantChecker, mm: AddressSpace[Any]) -> None:
        self.checker: Final = checker
        self.mm: Final = mm
        self.held: dict[int, tuple[int, bool, int]] = {}
        """Page to (frame, writable, step at which it was looked up)."""
        self.open: dict[int, tuple[int, int]] = {}
        """Span to [start, end) in bytes of the sections that are open."""
        self.told: dict[int, set[str]] = {}
        """Span to the drivers that have been told its start and not its end."""
        self.released: set[str] = set()

    def __call__(self, record: log.Record) -> None:
        """One record of the address space's trace, whose faults nobody else must suffer from."""
        try:
            self._see(record)
        except InvariantViolated as error:
            self.checker.broken = self.checker.broken or error

    def _see(self, record: log.Record) -> None:
        self.checker.step += 1
        span = record.span_id or 0
        if record.event == log.INVALIDATE_RANGE:
            if record.phase == "start":
                self._begin(span, record.start or 0, record.end or 0)
            elif record.phase == "end":
                self._end(span)
        elif record.driver is not None and record.callback is not None:
            self._callback(record, record.parent_id or 0)

    def _begin(self, span: int, start: int, end: int) -> None:
        if self.mm.machine.batching == "range":
            # Elsewhere a zap is told when its entries are gone, and its pages are not freed yet.
            self.look_up()
        self.open[span] = (start, end)
        first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
        if last - first < len(self.held):
            for page in range(first, last):
                self.held.pop(page, None)
        else:
            for page in [page for page in self.held if first <= page < last]:
                del self.held[page]
        self.checker.index()

    def _end(self, span: int) -> None:
        if self.open.pop(span, None) is None:
            raise self._broken("I-PAIR", f"section {span} ends, but it is not open")
        left = self.told.pop(span, set())
        if left:
            raise self._broken("I-PAIR", f"section {span} is over, but {sorted(left)} never ended")
        self.look_up()

    def _callback(self, record: log.Record, span: int) -> None:
        driver = str(record.driver)
        if driver in self.released:
            raise self._broken("I-REL", f"{driver}.{record.callback} ran after its release")
        told = self.told.setdefault(span, set())
        if record.callback == "invalidate_range_start" and record.phase == "end":
            told.add(driver)
        elif record.callback == "invalidate_range_end" and record.phase == "start":
            if span not in self.open:
                raise self._broken("I-PAIR", f"{driver} is told an end outside of any section")
            told.discard(driver)

    def _broken(self, rule: str, what: str) -> InvariantViolated:
        return InvariantViolated(f"{rule}: {self.mm.name}: {what}")

    def look_up(self) -> None:
        """Check all that is held, then hold all that no open section covers."""
        mm, step = self.mm, self.checker.step
        now: dict[int, tuple[int, bool]] = {}
        for page, entry in iter_present(mm, 0, 1 << 52):
            if entry & _COUNTED == _COUNTED and not entry & f.PTE_SPECIAL:
                now[page] = ((entry & f.PFN_MASK) >> PAGE_SHIFT, bool(entry & f.PTE_RW))
        for page, (frame, writable, since) in self.held.items():
            address = f"{page << PAGE_SHIFT:#x}"
            found = now.get(page)
            if found is None:
                raise self._broken(
                    "I-FREE",
                    f"{address} mapped frame {frame} at step {since} and is gone, unannounced",
                )
            if found[0] != frame:
                raise self._broken(
                    "I-COW",
                    f"{address} mapped frame {frame} at step {since} and maps {found[0]} now, "
                    "unannounced",
                )
            if writable and not found[1]:
                raise self._broken(
                    "I-PERM",
                    f"{address} could be written at step {since} and cannot now, unannounced",
                )
        ranges = [(low >> PAGE_SHIFT, -(-high >> PAGE_SHIFT)) for low, high in self.open.values()]
        for page, (frame, writable) in now.items():
            if not any(low <= page < high for low, high in ranges):
                since = self.held[page][2] if page in self.held else step
                self.held[page] = (frame, writable, since)
        self.checker.index()


class InvariantChecker:
    """Watches every address space of a machine, also those that come later.

    A context manager; tests every page at every section, so it is for runs of moderate size. It
    takes the `trace` of each address space for itself.
    """

    def __init__(self, machine: Machine[Any]) -> None:
        self.machine: Final = machine
        self.step = 0
        """How many records have been seen."""
        self.broken: InvariantViolated | None = None
        """The first violation; `check` raises it."""
        self._watched: Final[list[_Watched]] = []
        self._holders: dict[int, tuple[_Watched, int]] = {}

    def __enter__(self) -> InvariantChecker:
        self.machine.on_new_mm = self.watch
        self.machine.frames.on_free = self._freed
        for mm in self.machine.mms:
            self.watch(mm)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.machine.on_new_mm = None
        self.machine.frames.on_free = None
        for watched in self._watched:
            watched.mm.notifiers.trace = None
        if kind is None:
            self.check()
            self._all_closed()

    def watch(self, mm: AddressSpace[Any]) -> None:
        """Watch one more address space."""
        watched = _Watched(self, mm)
        self._watched.append(watched)
        mm.notifiers.trace = watched
        watched.look_up()

    def check(self) -> None:
        """Raise the first violation so far; compare what is held with what is mapped."""
        if self.broken is not None:
            raise self.broken
        for watched in self._watched:
            if watched.mm.users:
                watched.look_up()

    def index(self) -> None:
        """Note which frames are held, for `_freed`."""
        self._holders = {
            frame: (watched, page)
            for watched in self._watched
            for page, (frame, _, _) in watched.held.items()
        }

    def _freed(self, frame: int) -> None:
        held = self._holders.get(frame)
        if held is None:
            return
        watched, page = held
        if not watched.mm.users:
            # It exits: release has dropped everything.
            return
        self.broken = self.broken or InvariantViolated(
            f"I-FREE: frame {frame} (generation {self.machine.frames.word[frame] >> fr.GEN_SHIFT}) "
            f"is freed, and {page << PAGE_SHIFT:#x} of {watched.mm.name} has been mapped to it "
            f"since step {watched.held[page][2]}, unannounced"
        )

    def _all_closed(self) -> None:
        for watched in self._watched:
            if watched.open:
                spans = sorted(watched.open)
                raise InvariantViolated(
                    f"I-PROG: {watched.mm.name}: sections {spans} are still open"
                )
