"""The callback contract: what a driver is told, by whom, under which locks, and in which colour.

The colour of a callback is the lock that it runs under. A plain function is called with a spinlock
held (page table lock, or a reverse-map lock of 2008) and cannot suspend; a coroutine is called with
at most sleeping locks held and can. A driver chooses by its base class:

    AtomicDriver      drops its translations at once, in plain functions        (KVM, GRU)
    SleepableDriver   has to wait for a network or a device, in coroutines      (XPMEM, RDMA)
    DeferredDriver    marks in a plain function, finishes in a coroutine after the locks are dropped

Every callback has a default; override what you need, and only that is called. One instance serves
one address space. A callback must not raise: the operation cannot be undone, so it completes, the
driver is quarantined: it is never called again but for `release`, and until it is unregistered the
pages of sections are leaked rather than reused, since it may still map them.

Locks are those of Linux: `mmap_lock` of the address space, rmap locks (i_mmap, anon_vma), folio
locks. No callback may take any of them or wait for somebody who does, nor change the address space
that it is called for (I-PROG).
"""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias
from weakref import WeakSet

from .errors import DriverError, UnknownCallback, WrongColour
from .ranges import PAGE_SIZE, Event, Range, page_down

if TYPE_CHECKING:
    from .primary import Primary


class Driver:
    """What the three kinds of driver have in common. Derive from one of those, not from this."""

    serves: str | None = None
    """The name of the address space that the instance is or was registered at."""
    precedes: ClassVar[bool] = False
    """Told before every driver that does not precede, whenever it was registered."""
    passes_on: ClassVar[bool] = False
    """Passes its callbacks on to parts of its own, which its users have got it for (`get`).

    The exit calls its `release` and leaves it on the list until it is put. A cancellation that
    interrupts a part is the part's failure: the driver tells the others before it raises it, and is
    not quarantined for it.
    """
    concurrent: ClassVar[bool] = False
    """Opt in to being awaited at the same time as other drivers that opt in.

    For sleepable drivers that wait long: a task per driver costs some two hundred times a plain
    await.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__ and not issubclass(
            cls, (AtomicDriver, SleepableDriver, DeferredDriver)
        ):
            raise WrongColour(
                f"{cls.__qualname__} derives from Driver: expected AtomicDriver, SleepableDriver "
                "or DeferredDriver as its base, which says whether its callbacks may suspend"
            )

    def attach(self, primary: Primary | None) -> None:
        """Learn the address space, before the driver becomes visible to it.

        Called by register, once, with register's locks held. Must not suspend and must not
        translate yet: sections that began earlier may still be open. `primary` is None where the
        owner of the `Notifiers` gave none. What it raises, register raises, and nothing is
        registered.
        """

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Clear the accessed bits of [start, end), flush, and say whether any was set.

        Called by reclaim after it has cleared the primary's own (I-AGE), under the page table
        lock. [start, end) is one page or one huge page. Every driver is asked, the answers are
        OR-ed. Source: folio_referenced_one.
        """
        return False

    def clear_young(self, start: int, end: int) -> bool:
        """Like `clear_flush_young` without the flush: a later use may go unseen (MGLRU, DAMON)."""
        return False

    def test_young(self, address: int) -> bool:
        """Whether the page at `address` was accessed; changes nothing.

        Under the page table lock. Asking stops at the first driver that says yes.
        """
        return False

    async def release(self) -> None:
        """Drop every translation: the address space exits, or this driver is unregistered.

        Called exactly once, before any page of the address space is freed, in an SRCU read section
        and with no other lock held; may suspend. Other callbacks still arrive while it runs, and
        none after unregister has returned (I-REL). When it returns no translation may be left.
        Source: mmu_notifier_release.
        """

    def free(self) -> None:
        """Give back the instance's own memory: no callback runs or will run.

        Called once, after the SRCU grace period that follows the last `put` or unregister; must
        not suspend. Source: free_notifier.
        """


class AtomicDriver(Driver):
    """A driver whose invalidations are plain functions: legal under spinlocks."""

    def invalidate_range_start(self, rng: Range) -> bool | None:
        """Drop every translation inside `rng` and make no new one there until the end.

        Called before the first pte changes; all pages are still mapped and referenced. The caller
        holds mmap_lock and/or rmap locks, never the page table lock except when zaps are batched by
        page or by 512 ptes. A driver that takes no page reference must be clean when this returns
        (I-FREE): pages may be freed before the end is called. Ranges of one address space overlap
        and nest: count them. `rng.blockable` may be False, and an atomic driver need not care; only
        then may it answer False, which is -EAGAIN: nothing has changed, and no end will come.
        """

    def invalidate_range_end(self, rng: Range) -> None:
        """Translations inside `rng` may be looked up again.

        Called once for every start that succeeded, under the same locks, with an equal range
        (I-PAIR), also when the operation failed or was cancelled. Pages of the range may have been
        freed already, or not yet: nothing may be inferred.
        """

    def invalidate_page(self, address: int) -> None:
        """2008's single-page form: the pte is cleared and flushed, the page still referenced.

        Called under the page table lock. By default the start and end of one page.
        """
        rng = one_page(address)
        self.invalidate_range_start(rng)
        self.invalidate_range_end(rng)


class SleepableDriver(Driver):
    """A driver whose invalidations are coroutines: they may wait, so no spinlock may be held.

    Registers only where the locking model is RwSems. When non-blockable sections come (the OOM
    reaper), the plain `_nonblock` forms are called instead.
    """

    nonblock_first: ClassVar[bool] = False
    """Opt in to being told every start by `invalidate_range_start_nonblock`, and awaited only where
    it answers False; the end is then always `invalidate_range_end_nonblock`.

    For drivers that mostly have nothing to wait for: where all drivers are so, or atomic, a section
    takes one step.
    """

    async def invalidate_range_start(self, rng: Range) -> None:
        """Drop every translation inside `rng` and make no new one there until the end.

        As for AtomicDriver, but may suspend: the caller holds sleeping locks only, inside an SRCU
        read section. May be cancelled: it is then not told the end, so it must leave nothing
        counted and no lock held, and the operation does not happen.
        """

    async def invalidate_range_end(self, rng: Range) -> None:
        """Translations inside `rng` may be looked up again.

        As for AtomicDriver, but may suspend. Runs shielded from cancellation.
        """

    async def invalidate_page(self, address: int) -> None:
        """2008's single-page form, after the page table lock was dropped (patch 03)."""
        rng = one_page(address)
        if self.nonblock_first:
            if not self.invalidate_range_start_nonblock(rng):
                await self.invalidate_range_start(rng)
            self.invalidate_range_end_nonblock(rng)
        else:
            await self.invalidate_range_start(rng)
            await self.invalidate_range_end(rng)

    def invalidate_range_start_nonblock(self, rng: Range) -> bool:
        """The start of a section that must not suspend. False is -EAGAIN: "I would have to wait".

        On False nothing may have changed: no lock held, nothing counted, and no end will come.
        """
        return False

    def invalidate_range_end_nonblock(self, rng: Range) -> None:
        """The end of a non-blockable start that was answered with True; must not suspend."""


class DeferredDriver(Driver):
    """A driver that marks under the locks and finishes its work after they are dropped.

    The third way of the 2008 thread (invalidate_range and invalidate_range_sync). The pages of the
    section are held until the sync returns, so I-FREE is kept; between mark and sync the device may
    still use its translations, so I-NOEST, I-COW and I-PERM are not.
    """

    def invalidate_range(self, rng: Range) -> None:
        """Mark everything inside `rng` as to be dropped. Under spinlocks; must not suspend.

        Called after the ptes changed when zaps are batched, at the start of a section otherwise.
        Marks may overlap and repeat.
        """

    async def invalidate_range_sync(self, rng: Range) -> None:
        """Finish all marks inside `rng`: when this returns no translation there is left.

        Called once after each mark, when the locks are dropped; may suspend; shielded from
        cancellation. The pages are released only after it returns.
        """

    def invalidate_page(self, address: int) -> None:
        """2008's single-page form: by default a mark of one page."""
        self.invalidate_range(one_page(address))

    def invalidate_range_start_nonblock(self, rng: Range) -> bool:
        """Mark and finish at once, or answer False (-EAGAIN): there is no sync to finish in."""
        return False

    def invalidate_range_end_nonblock(self, rng: Range) -> None:
        """The end of a non-blockable start that was answered with True; must not suspend."""


AnyDriver: TypeAlias = AtomicDriver | SleepableDriver | DeferredDriver


def kind_of(driver_class: type[Driver]) -> type[AnyDriver]:
    """Which of the three base classes says the colour of this driver's callbacks."""
    kinds = [kind for kind in KINDS if issubclass(driver_class, kind)]
    if len(kinds) != 1:
        found = " and ".join(kind.__name__ for kind in kinds) or "none of them"
        raise WrongColour(
            f"{driver_class.__qualname__} derives from {found}: expected exactly one of "
            "AtomicDriver, SleepableDriver and DeferredDriver"
        )
    return kinds[0]


def tries_plainly(driver: AnyDriver) -> bool:
    """Whether a driver's plain `_nonblock` forms come before its coroutines."""
    return isinstance(driver, SleepableDriver) and driver.nonblock_first


def check_driver(driver: AnyDriver) -> None:
    """Raise DriverError like `check_driver_class`, also for callbacks set on the instance."""
    if not isinstance(driver, KINDS):
        raise WrongColour(
            f"{driver!r} is no driver: expected an instance of a class that derives from "
            "AtomicDriver, SleepableDriver or DeferredDriver"
        )
    check_driver_class(type(driver))
    kind = kind_of(type(driver))
    for name in CALLBACKS[kind] & vars(driver).keys():
        _check_colour(kind, type(driver), name, vars(driver)[name])


def check_driver_class(driver_class: type[Driver]) -> None:
    """Raise DriverError if a callback has the wrong colour or a name that nobody calls.

    Registration does this once per class; a type checker says most of it earlier.
    """
    if driver_class in _checked:
        return
    kind = kind_of(driver_class)
    for name in CALLBACKS[kind]:
        _check_colour(kind, driver_class, name, getattr(driver_class, name))
    if issubclass(driver_class, SleepableDriver) and driver_class.nonblock_first:
        _check_nonblock_first(driver_class)
    for name in dir(driver_class):
        if name.startswith("_") or name in CALLBACKS[kind]:
            continue
        if not inspect.isroutine(getattr(driver_class, name)):
            continue
        for other in KINDS:
            if name in CALLBACKS[other]:
                raise UnknownCallback(
                    f"{driver_class.__qualname__}.{name} is a callback of {other.__name__}, but "
                    f"{driver_class.__qualname__} is a {kind.__name__}: nobody would call it"
                )
        close = difflib.get_close_matches(name, CALLBACKS[kind], n=1, cutoff=0.85)
        # "released" or "clear_young_bits" extend a callback's name, they do not misspell it.
        if close and not name.startswith(close[0]):
            raise UnknownCallback(
                f"{driver_class.__qualname__}.{name} is no callback of {kind.__name__}: "
                f"did you mean {close[0]}?"
            )
    _checked.add(driver_class)


def _check_nonblock_first(driver_class: type[SleepableDriver]) -> None:
    name = driver_class.__qualname__
    start = "invalidate_range_start_nonblock"
    if getattr(driver_class, start) is getattr(SleepableDriver, start):
        raise DriverError(f"{name} is nonblock_first: expected it to define {start}")
    if driver_class.invalidate_range_end is not SleepableDriver.invalidate_range_end:
        raise UnknownCallback(
            f"{name}.invalidate_range_end: expected invalidate_range_end_nonblock, because {name} "
            "is nonblock_first; nobody would call it"
        )


def _check_colour(
    kind: type[AnyDriver], driver_class: type[Driver], name: str, callback: object
) -> None:
    due = inspect.iscoroutinefunction(getattr(kind, name))
    if inspect.iscoroutinefunction(callback) != due:
        raise WrongColour(
            f"{driver_class.__qualname__}.{name}: expected "
            f"{'a coroutine function (async def)' if due else 'a plain function (def)'}, "
            f"because {driver_class.__qualname__} derives from {kind.__name__}"
        )


_checked: Final[WeakSet[type[Driver]]] = WeakSet()
KINDS: Final[tuple[type[AnyDriver], ...]] = (AtomicDriver, SleepableDriver, DeferredDriver)
CALLBACKS: Final[dict[type[AnyDriver], frozenset[str]]] = {
    kind: frozenset(
        name
        for base in (Driver, kind)
        for name, value in vars(base).items()
        if inspect.isfunction(value) and not name.startswith("_")
    )
    for kind in KINDS
}


def one_page(address: int) -> Range:
    """The range of the page that holds `address`: what a single-page callback speaks of."""
    start = page_down(address)
    return Range(start, start + PAGE_SIZE, Event.CLEAR)
