"""The driver of one address space: what it is told, and its translations (gru_mm_struct).

The GRU has no page table: its TLB is all the translations that there are, and every miss comes to
the operating system. So the driver keeps nothing but which ASID the address space has on which
chiplet, and which sections are open. An invalidation of a range goes to the TLB of every chiplet
where a context of the address space is loaded; where none is any more, the ASID is given up, so
that the next context gets a fresh one.

Attached by `register` it is a device that replay can use. `Gru.open` gets it for a user
(`Notifiers.get`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from mmunotify import PAGE_SHIFT, PAGE_SIZE, PMD_SHIFT, AtomicDriver, BadAddress

from . import events
from .asids import MmAsid
from .context import Context
from .errors import ContextClosed, GruError, InstructionException
from .faults import Faults
from .flush import purges
from .gru import Gru
from .gts import Gts
from .hardware.cch import MissMode
from .hardware.geometry import REGION_SHIFT, REGIONS
from .hardware.instructions import Cause, Exop, Instruction, Opcode, Xtype
from .hardware.tgh import NOTHING
from .options import GruOptions
from .statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mmunotify import Primary, Range, Translation

    from .hardware.tgh import Dropped
    from .state import GruState

_HUGE: Final = 1 << PMD_SHIFT - PAGE_SHIFT
_DEFAULTS: Final = GruOptions()
_CBS: Final = 4
_DSEG: Final = 1024


# Members of an enum as globals: looked up in their class they cost more than the rest (3.11).
_GAMER: Final = Opcode.GAMER
_VFLUSH: Final = Opcode.VFLUSH
_OR: Final = Exop.OR
_W: Final = Xtype.W
_B: Final = Xtype.B


class GruDriver(AtomicDriver):
    """What one address space has on a GRU: on `gru`, or on one of its own that `options` describe.

    The other options are those of the contexts that `access` and `fault` use.
    """

    faults_type: ClassVar[type[Faults]] = Faults
    asid_type: ClassVar[type[MmAsid]] = MmAsid
    purges: ClassVar[Callable[..., list[tuple[int, int]]]] = staticmethod(purges)

    def __init__(self, options: GruOptions = _DEFAULTS, *, gru: Gru | None = None) -> None:
        self.options: Final = options
        self.gru: Final = gru or Gru(
            blades=options.blades,
            tlb=options.tlb,
            assign_delay=options.assign_delay,
            steal_delay=options.steal_delay,
        )
        self.statistics: Final = Statistics()
        self.faults: Final = self.faults_type(self)
        self.contexts: Final[list[Gts]] = []
        """Of all users of this address space, loaded or not."""
        self.asids: Final[dict[GruState, MmAsid]] = {}
        """By chiplet, once it had one there (ms_asids)."""
        self.asidmap: Final[dict[GruState, MmAsid]] = {}
        """Those where it may have translations (ms_asidmap)."""
        self.sections: Final[list[tuple[int, int]]] = []
        """[start, end) of the open sections (the original has their number, ms_range_active)."""
        self.installed = 0
        self.mapped = 0
        self.flushes = 0
        self.refaults = 0
        self.retries = 0
        self._dropped: Final[set[int]] = set()
        """Pages whose translations were dropped and not made again."""
        self._memory: Primary | None = None
        self._used: list[Context] = []
        """The contexts that `access` and `fault` use."""
        self._exited = False

    @property
    def memory(self) -> Primary:
        """The address space. Raises GruError if the owner of its notifiers gave none."""
        if self._memory is None:
            raise GruError(f"{self.serves}: expected Notifiers(primary=...), to translate with")
        return self._memory

    # ------------------------------------------------------------------ what it is told

    def attach(self, primary: Primary | None) -> None:
        """Learn the address space."""
        self._memory = primary
        self.statistics.gms_alloc += 1
        self.gru.drivers.append(self)

    def invalidate_range_start(self, rng: Range) -> None:
        """Drop the range from every TLB; nothing of it gets in before the end."""
        self.statistics.mmu_invalidate_range += 1
        self.sections.append((rng.start, rng.end))
        if self.asidmap:
            self.flush_tlb_range(rng.start, rng.end)

    def invalidate_range_end(self, rng: Range) -> None:
        """Let translations in again, and serve the misses that have waited for it."""
        self.sections.remove((rng.start, rng.end))
        if self.faults.waiters:
            self.faults.section_over()

    async def release(self) -> None:
        """The address space goes: unload its contexts, of which no translation is left behind."""
        self._exited = True
        for gts in self.contexts[:]:
            gts.closing = True
            if gts.state is not None:
                self.gru.unload(gts)
        self.faults.wake_all()
        while self._used:
            context = self._used.pop()
            context.close()
            context.gts.drop()
        for state, tracker in [*self.asidmap.items()]:
            self._give_up(state, tracker, 0, 0)
        self._leave()

    def free(self) -> None:
        """The last user has put it."""
        self._leave()

    def context_freed(self, gts: Gts) -> None:
        """The last reference to one of the contexts has gone."""
        self.statistics.gts_free += 1
        self.contexts.remove(gts)
        if self._exited:
            self._leave()

    def _leave(self) -> None:
        """The GRU forgets the address space when its last context is freed, too."""
        if self in self.gru.drivers and not self.contexts:
            self.statistics.gms_free += 1
            self.gru.retire(self)
            counted = {name: count for name, count in self.statistics.as_dict().items() if count}
            self.gru.log.emit(events.RELEASED, mm=self.serves, statistics=counted)

    # ------------------------------------------------------------------ sections

    def covered(self, address: int, size: int) -> bool:
        """Whether an open section has an address of [address, address + size)."""
        sections = self.sections
        return bool(sections) and any(
            start < address + size and address < end for start, end in sections
        )

    # ------------------------------------------------------------------ flushing

    def flush_tlb_range(self, start: int, end: int) -> None:
        """Drop [start, end), in bytes, from the TLBs that may have it (gru_flush_tlb_range)."""
        statistics = self.statistics
        statistics.flush_tlb += 1
        small = self.purges(start, end)
        before = self.mapped
        # The same page may be in the TLBs of several chiplets.
        seen: set[int] | None = set() if len(self.asidmap) > 1 else None
        for state, tracker in [*self.asidmap.items()]:
            statistics.flush_tlb_gru += 1
            asid, contexts = tracker.asid, tracker.contexts
            if not (contexts and asid):
                self._give_up(state, tracker, start, end)
                continue
            for address, field in small:
                statistics.flush_tlb_gru_tgh += 1
                dropped = state.take_tgh().invalidate(address, asid, PAGE_SHIFT, field, contexts)
                if dropped is not NOTHING:
                    self._count_dropped(dropped, start, end, seen)
            if tracker.huge:
                self._purge_huge(state, tracker, start, end, seen)
        if self.mapped != before:
            self.flushes += 1

    def _purge_huge(
        self, state: GruState, tracker: MmAsid, start: int, end: int, seen: set[int] | None
    ) -> None:
        """What a purge of base pages has left of [start, end)."""
        for address, field in self.purges(start, end, PMD_SHIFT):
            self.statistics.flush_tlb_gru_tgh += 1
            dropped = state.take_tgh().invalidate(
                address, tracker.asid, PMD_SHIFT, field, tracker.contexts
            )
            if dropped is not NOTHING:
                self._count_dropped(dropped, start, end, seen)

    def _give_up(self, state: GruState, tracker: MmAsid, start: int, end: int) -> None:
        """Flush later: nobody is loaded there, and nobody will run under this ASID again."""
        self.statistics.flush_tlb_gru_zero_asid += 1
        for region in range(REGIONS):
            for entry in state.chiplet.tlb.of_tag(tracker.asid + region):
                pages = range(
                    entry.address >> PAGE_SHIFT, (entry.address + entry.size) >> PAGE_SHIFT
                )
                self._dropped.update(pages)
                self.mapped += sum(start <= page << PAGE_SHIFT < end for page in pages)
        tracker.asid = 0
        tracker.huge = False
        del self.asidmap[state]

    def _count_dropped(self, dropped: Dropped, start: int, end: int, seen: set[int] | None) -> None:
        pages: Iterable[int] = dropped.pages
        if dropped.huge:
            pages = {*pages, *(page for huge in dropped.huge for page in _pages_of(huge))}
        self._dropped.update(pages)
        first, last = start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT)
        inside = [page for page in pages if first <= page < last]
        if seen is None:
            self.mapped += len(inside)
        else:
            before = len(seen)
            seen.update(inside)
            self.mapped += len(seen) - before

    def count_installed(self, entry: Translation, huge_on: GruState | None) -> None:
        """A translation gets into the TLB of a chiplet, which is named if it may be a huge one."""
        page = entry.address >> PAGE_SHIFT
        if entry.size == PAGE_SIZE:
            self.installed += 1
            if page in self._dropped:
                self._dropped.discard(page)
                self.refaults += 1
            return
        assert huge_on is not None
        self.asids[huge_on].huge = True
        pages = set(range(page, page + (entry.size >> PAGE_SHIFT)))
        self.installed += len(pages)
        self.refaults += len(self._dropped & pages)
        self._dropped.difference_update(pages)

    # ------------------------------------------------------------------ ASIDs

    def load_tracker(self, state: GruState, context: int) -> int:
        """The ASID for a context that is loaded as number `context` (gru_load_mm_tracker)."""
        tracker = self.asids.get(state)
        if tracker is None:
            tracker = self.asids[state] = self.asid_type()
        if tracker.usable(state.asids.generation):
            self.statistics.asid_reuse += 1
        else:
            generation = state.asids.generation
            tracker.asid = state.asids.assign(self.statistics)
            tracker.generation = state.asids.generation
            tracker.huge = False
            self.statistics.asid_new += 1
            if tracker.generation != generation:
                self.gru.log.emit(
                    events.ASID_WRAP,
                    chiplet=state.chiplet.number,
                    generation=tracker.generation,
                )
        tracker.contexts |= 1 << context
        self.asidmap[state] = tracker
        return tracker.asid

    def unload_tracker(self, state: GruState, context: int) -> None:
        """A context goes; what it has left in the TLB is flushed when somebody asks for it."""
        self.asids[state].contexts &= ~(1 << context)

    # ------------------------------------------------------------------ the device of a replay

    @property
    def counters(self) -> dict[str, int]:
        """See `mmunotify.Device`, and `Statistics` for the others."""
        return {
            "installed": self.installed,
            "mapped": self.mapped,
            "flushes": self.flushes,
            "refaults": self.refaults,
            "retries": self.retries,
            **self.statistics.as_dict(),
        }

    def access(self, address: int, *, write: bool = False) -> bool:
        """Whether the context that has to do with this page has a translation that allows this."""
        used = self._used
        if not used:
            return False
        cch = used[(address >> PAGE_SHIFT) % len(used)].gts.cch
        if cch is None:
            return False
        tag = cch.asid + (address >> REGION_SHIFT & (REGIONS - 1))
        return cch.chiplet.tlb.lookup(tag, address, write) is not None

    async def fault(self, address: int, *, write: bool = False) -> None:
        """Have that context execute something that needs the translation.

        A load is a flush of one byte, and a store an atomic OR of nothing: no byte changes.
        """
        if self._exited:
            raise ContextClosed(f"{self.serves}: the address space has exited")
        if not self._used:
            self._open_contexts()
        if write:
            instruction = Instruction(_GAMER, address & ~3, 0, _W, exop=_OR)
        else:
            instruction = Instruction(_VFLUSH, address, 0, _B)
        try:
            await self._used[(address >> PAGE_SHIFT) % len(self._used)].execute(instruction)
        except InstructionException as stopped:
            if stopped.cause is not Cause.OS_FATAL_TLB_FAULT:
                raise
            raise BadAddress(
                f"fault({address:#x}) in {self.serves}: the process has nothing there that a "
                f"{'store' if write else 'load'} may use",
                address=address,
            ) from stopped

    def _open_contexts(self) -> None:
        for number in range(self.options.contexts):
            gts = Gts(
                self,
                f"{self.serves}/device{number}",
                cbrs=_CBS,
                dseg=_DSEG,
                miss_mode=MissMode(self.options.miss),
                preload=self.options.preload,
            )
            self.gru.try_load(gts)
            self._used.append(Context(self.gru, gts, _CBS, _DSEG))


def _pages_of(huge: int) -> range:
    """The small pages of a huge one, by their numbers."""
    return range(huge * _HUGE, (huge + 1) * _HUGE)
