"""A checker of the contract that can watch any run of a machine.

It plays the greediest device that the contract allows: of every watched address space it holds
every translation that there is, drops what is announced and nothing else, and looks up again what
no section covers. Whatever the primary does behind its back shows. And it sees what the drivers do
with the translations that they are given, from lookup to use, in steps: one per record of the trace
and per lookup.

    I-FREE      a frame is freed while it is still held; a device uses one that was freed
    I-NOEST     a device uses what was looked up in a section that covers it and is still open
    I-INFLIGHT  a device uses what was looked up before a section of which all have been told
    I-SEQ       the same, of an address that an interval notifier is for: it did not retry
    I-PAIR      a section or callback ends that did not begin, or begins and does not end
    I-REG       a driver is told the end of a section whose start it was not told
    I-REL       a callback runs when its driver has been released and taken off the list
    I-PERM      a held translation may be written and the entry may not; a device writes so
    I-DIRTY     a clean page is dropped, and what is on disk or in swap is not what it held
    I-COW       a held address maps another page now
    I-AGE       a device has used a page since it was aged last, and no driver says so
    I-CTX       a callback suspended, or took a lock, where it must not
    I-PROG      a section is still open when the run is over

I-NOEST, I-INFLIGHT and I-SEQ are for who tells sections as ranges (batching="range"). I-CTX is what
lockdep finds, so lockdep has to be on; I-DIRTY needs a machine that keeps contents.

    with InvariantChecker(machine) as checker:
        ...
        checker.check()         # raises the first InvariantViolated; so does the way out
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from mmunotify import log
from mmunotify.drivers import (
    AtomicDriver,
    DeferredDriver,
    Driver,
    SleepableDriver,
    tries_plainly,
)
from mmunotify.errors import CalledFromCallback, InvariantViolated, LockError
from mmunotify.intervals import AtomicIntervals, SleepableIntervals
from mmunotify.ranges import PAGE_SHIFT

from . import flags as f
from . import frames as fr
from .filemap import File
from .memory import iter_present

if TYPE_CHECKING:
    from mmunotify.audience import Subscription
    from mmunotify.drivers import AnyDriver
    from mmunotify.primary import Translation

    from .machine import Machine
    from .mm import AddressSpace

_COUNTED = f.PTE_PRESENT | f.PTE_USER
_BASES = (Driver, AtomicDriver, SleepableDriver, DeferredDriver)
_WRONG_CONTEXT = (LockError, CalledFromCallback)
_ENDS = {"invalidate_range_end", "invalidate_range_end_nonblock"}
_LATEST = 256


@attrs.define
class _Told:
    """A section, in steps: when it began, when all had been told, and when it was over."""

    start: int
    end: int
    began: int
    awaited: int
    """Start callbacks that have not returned yet."""
    told: int | None = None
    over: int | None = None


class _Watched:
    """What the checker holds of one address space."""

    def __init__(self, checker: InvariantChecker, mm: AddressSpace[Any]) -> None:
        self.checker: Final = checker
        self.mm: Final = mm
        self.held: dict[int, tuple[int, bool, int]] = {}
        """Page to (frame, writable, step at which it was looked up)."""
        self.open: dict[int, _Told] = {}
        """By span: the sections that are open."""
        self.sections: list[_Told] = []
        """The latest sections, oldest first."""
        self.told: dict[int, set[str]] = {}
        """Span to the drivers that have been told its start and not its end."""
        self.given: dict[tuple[int, int, int], int] = {}
        """(address, frame, generation) to the step at which a driver was last given it."""
        self.aged: dict[int, int] = {}
        """Page to the step at which the drivers were last asked whether it was used."""
        self.touched: dict[int, int] = {}
        """Page to the step at which a device last used it, if it did not say so itself."""
        self.known: dict[str, Subscription[AnyDriver]] = {}
        self.failed: set[str] = set()
        ask = mm.notifiers.clear_flush_young

        def clear_flush_young(start: int, end: int) -> bool:
            young = ask(start, end)
            self.guarded(self._aged, start, end, young)
            return young

        # The answer is in no record.
        mm.notifiers.clear_flush_young = clear_flush_young  # type: ignore[method-assign]

    def forget(self) -> None:
        """Watch no longer."""
        self.mm.notifiers.trace = None
        self.mm.primary.watcher = None
        del self.mm.notifiers.clear_flush_young

    def __call__(self, record: log.Record) -> None:
        """One record of the address space's trace, whose faults nobody else must suffer from."""
        self.guarded(self._see, record)

    def guarded(self, what: Any, *args: Any) -> None:
        """Note a violation instead of raising it in whoever happens to be running."""
        try:
            what(*args)
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

    # ------------------------------------------------------------------ sections and callbacks

    def _begin(self, span: int, start: int, end: int) -> None:
        if self.mm.machine.batching == "range":
            # Elsewhere a zap is told when its entries are gone, and its pages are not freed yet.
            self.look_up()
        subscriptions = self.mm.notifiers._subscriptions
        self.known |= {sub.name: sub for sub in subscriptions}
        awaited = sum(
            sub.hashed and _has(sub.driver, "invalidate_range_start") for sub in subscriptions
        )
        told = self.open[span] = _Told(start, end, self.checker.step, awaited)
        if not awaited:
            told.told = self.checker.step
        self.sections.append(told)
        del self.sections[:-_LATEST]
        first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
        if last - first < len(self.held):
            for page in range(first, last):
                self.held.pop(page, None)
        else:
            for page in [page for page in self.held if first <= page < last]:
                del self.held[page]
        self.checker.index()

    def _end(self, span: int) -> None:
        told = self.open.pop(span, None)
        if told is None:
            raise self._broken("I-PAIR", f"section {span} ends, but it is not open")
        told.over = self.checker.step
        told.told = told.told or told.over
        left = {name for name in self.told.pop(span, set()) if self._awaits_end(name)}
        if left:
            raise self._broken("I-PAIR", f"section {span} is over, but {sorted(left)} never ended")
        self._context()
        self.look_up()

    def _awaits_end(self, name: str) -> bool:
        sub = self.known.get(name)
        return (
            sub is not None
            and sub.hashed
            and (_has(sub.driver, "invalidate_range_end") or tries_plainly(sub.driver))
        )

    def _callback(self, record: log.Record, span: int) -> None:
        driver = str(record.driver)
        sub = self.known.get(driver)
        if record.phase == "start" and sub is not None and sub.release_done and not sub.hashed:
            raise self._broken("I-REL", f"{driver}.{record.callback} ran after its release")
        told = self.told.setdefault(span, set())
        if record.callback == "invalidate_range_start" and record.phase == "end":
            told.add(driver)
            section = self.open.get(span)
            if section is not None:
                section.awaited -= 1
                if section.awaited <= 0 and section.told is None:
                    section.told = self.checker.step
        elif record.callback in _ENDS and record.phase == "start":
            if span not in self.open:
                raise self._broken("I-PAIR", f"{driver} is told an end outside of any section")
            starts = sub is not None and _has(sub.driver, "invalidate_range_start")
            if starts and driver not in told and driver not in self.failed:
                raise self._broken("I-REG", f"{driver} is told an end whose start it was not told")
            told.discard(driver)
        if record.phase == "end":
            self._context()

    def _context(self) -> None:
        for sub in self.mm.notifiers._subscriptions:
            if sub.failure is not None and sub.name not in self.failed:
                self.failed.add(sub.name)
                if isinstance(sub.failure, _WRONG_CONTEXT):
                    raise self._broken(
                        "I-CTX", f"{sub.name} is quarantined for {sub.failure!r}"
                    ) from sub.failure

    def _broken(self, rule: str, what: str) -> InvariantViolated:
        return InvariantViolated(f"{rule}: {self.mm.name}: {what}")

    # ------------------------------------------------------------------ what drivers do

    def looked_up(self, translation: Translation) -> None:
        """A driver has been given a translation."""
        self.checker.step += 1
        self.given[_key(translation)] = self.checker.step

    def used(self, translation: Translation) -> None:
        """A device uses a translation."""
        self.guarded(self._used, translation)

    def marked_young(self, start: int, end: int) -> None:
        """A driver says itself what its device uses."""
        for page in range(start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)):
            self.touched.pop(page, None)

    def _used(self, translation: Translation) -> None:
        start, end = translation.address, translation.address + translation.size
        given = self.given.get(_key(translation))
        frame, generation = self.mm.machine.frames.label(translation.frame)
        if generation != translation.generation:
            raise self._broken(
                "I-FREE", f"a device uses {translation!r}, but frame {frame} was freed since"
            )
        page = start >> PAGE_SHIFT
        if given is None:
            return
        if self.mm.machine.batching == "range":
            self._timely(translation, start, end, given)
        if given < self.aged.get(page, -1):
            self.touched[page] = self.checker.step

    def _timely(self, translation: Translation, start: int, end: int, given: int) -> None:
        for section in reversed(self.sections):
            if section.over is not None and section.over < given:
                continue
            if not (section.start < end and start < section.end):
                continue
            if section.began < given and section.over is None:
                raise self._broken(
                    "I-NOEST",
                    f"a device uses {translation!r}, looked up in a section over "
                    f"[{section.start:#x}, {section.end:#x}) that is still open",
                )
            if section.told is not None and given < section.told:
                rule = "I-SEQ" if self._interval_at(start) else "I-INFLIGHT"
                raise self._broken(
                    rule,
                    f"a device uses {translation!r}, looked up at step {given}, though at step "
                    f"{section.told} all had been told to drop "
                    f"[{section.start:#x}, {section.end:#x})",
                )

    def _interval_at(self, address: int) -> bool:
        trees = (
            sub.driver.tree
            for sub in self.mm.notifiers._subscriptions
            if isinstance(sub.driver, AtomicIntervals | SleepableIntervals)
        )
        return any(True for tree in trees for _ in tree.overlapping(address, address + 1))

    def _aged(self, start: int, end: int, young: bool) -> None:
        self.checker.step += 1
        for page in range(start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)):
            before = self.aged.get(page, -1)
            self.aged[page] = self.checker.step
            used = self.touched.pop(page, -1)
            if not young and used >= 0:
                raise self._broken(
                    "I-AGE",
                    f"a device used {page << PAGE_SHIFT:#x} at step {used}, after it was aged at "
                    f"step {before}, and no driver says so",
                )

    # ------------------------------------------------------------------ the greediest device

    def look_up(self) -> None:
        """Check all that is held, then hold all that no open section covers."""
        mm, step = self.mm, self.checker.step
        if not mm.users:
            # It exits: release drops everything, and what goes after it goes unannounced.
            self.held.clear()
            return
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
        ranges = [
            (told.start >> PAGE_SHIFT, -(-told.end >> PAGE_SHIFT)) for told in self.open.values()
        ]
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
        """How many records and lookups have been seen."""
        self.broken: InvariantViolated | None = None
        """The first violation; `check` raises it."""
        self._watched: Final[list[_Watched]] = []
        self._holders: dict[int, tuple[_Watched, int]] = {}

    def __enter__(self) -> InvariantChecker:
        self.machine.on_new_mm = self.watch
        self.machine.frames.on_free = self._freed
        self.machine.frames.on_drop = self._dropped
        for mm in self.machine.mms:
            self.watch(mm)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self.machine.on_new_mm = None
        self.machine.frames.on_free = None
        self.machine.frames.on_drop = None
        for watched in self._watched:
            watched.forget()
        if kind is None:
            self.check()
            self._all_closed()

    def watch(self, mm: AddressSpace[Any]) -> None:
        """Watch one more address space."""
        watched = _Watched(self, mm)
        self._watched.append(watched)
        mm.notifiers.trace = watched
        mm.primary.watcher = watched
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

    def _dropped(self, frame: int) -> None:
        machine = self.machine
        if machine.frames.data is None:
            return
        where = machine.frames.rmap[frame]
        owner, index = machine.owners[where >> fr.OWNER_SHIFT], where & fr.INDEX_MASK
        if frame in machine.swap.slot_of:
            kept = machine.swap.data.get(machine.swap.slot_of[frame])
        elif isinstance(owner, File) and owner.kind == "ext4":
            kept = owner.disk.get(index)
        else:
            return
        if bytes(kept or b"").rstrip(b"\0") != machine.contents_of(frame).rstrip(b"\0"):
            self.broken = self.broken or InvariantViolated(
                f"I-DIRTY: frame {frame}, page {index} of {owner!r}, is dropped as clean, and "
                "holds what was never written back: a device wrote it and did not say so"
            )

    def _all_closed(self) -> None:
        for watched in self._watched:
            if watched.open:
                spans = sorted(watched.open)
                raise InvariantViolated(
                    f"I-PROG: {watched.mm.name}: sections {spans} are still open"
                )


def _key(translation: Translation) -> tuple[int, int, int]:
    return translation.address, translation.frame, translation.generation


def _has(driver: AnyDriver, callback: str) -> bool:
    """Whether a driver has a callback of its own."""
    return any(callback in vars(cls) for cls in type(driver).__mro__ if cls not in _BASES)
