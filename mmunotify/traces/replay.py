"""A recording, done again to the software model with drivers attached.

What the program did (system calls, faults, forks, execs) is done to the model when the kernel did
it, and the model's announcements are compared with the kernel's. What others did to its memory
(reclaim, ageing) is not the program's doing: it is given to the model as it was recorded.
"""

from __future__ import annotations

import errno
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs
import numpy as np

from mmunotify import PAGE_SHIFT, PAGE_SIZE, PMD_SIZE, Device, LockModel, RwSems, SleepableDriver
from mmunotify.errors import BadAddress, MmError
from mmunotify.model import flags as f
from mmunotify.model.machine import Machine
from mmunotify.model.vma import find_vma

from .calls import ERRORS, EXECS, WRITERS, Calls
from .history import Watcher
from .matching import Matches, Span, Witness
from .meters import Meter
from .rows import COPIED, OPEN, RECLAIM, rows
from .tasks import CLONE_FILES, CLONE_THREAD, CLONE_VM, CODE_WRITE, Fault, Space, Task
from .touching import Draws, Toucher, Touching

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmunotify import AnyDriver, Record
    from mmunotify.model.mm import AddressSpace

    from .decode import Block, Call, Mapping
    from .history import History
    from .recording import Recording

Batching = Literal["page", "pte512", "gather", "range"]
Era = Literal["linux-6", "v16"]

_FRAMES: Final = 1 << 20
_RESCHED_PAGES: Final = 16
"""Faults that take less than the millisecond after which others may run."""
_FEW: Final = 8
"""Up to so many pages are not worth a call for all of them."""
_RECLAIM_PAGES: Final = 128
"""As much of others' reclaim is done at once, without letting others run."""
_SWAP: Final = 1 << 20
_AGES: Final = list(b"at")
_ANON: Final = 1
"""rss_stat's member of anonymous pages."""
_NOTHING: Final[list[Span]] = []
_HOT: Final = Touching("hot", pages=64)


@attrs.frozen
class Choice:
    """A driver to attach to every address space, and how its instances are made."""

    name: str
    kind: type[AnyDriver]
    create: Callable[[], AnyDriver]


@attrs.frozen
class Design:
    """What is being tried: the locking model, the batching, the era, and the load on devices."""

    drivers: tuple[Choice, ...] = ()
    locks: type[LockModel] = RwSems
    batching: Batching = "range"
    era: Era = "linux-6"
    touching: Touching = _HOT

    def impossible(self) -> str | None:
        """Why there can be no such design, or None."""
        for choice in self.drivers:
            if issubclass(choice.kind, SleepableDriver):
                if not self.locks.sleepable:
                    return f"{choice.name} sleeps, which nobody may under spinlocks"
                if self.batching in {"page", "pte512"}:
                    return f"{choice.name} sleeps, and {self.batching} is told under a spinlock"
        return None


class Replay:
    """One recording in one design; `run` it once. The counters can be read at any time."""

    def __init__(
        self,
        recording: Recording,
        design: Design,
        *,
        trace: Callable[[Record], object] | None = None,
        history: History | None = None,
    ) -> None:
        self.recording: Final = recording
        self.design: Final = design
        self.trace: Final = trace
        """Called with every section and callback of every address space."""
        self.history: Final = history
        """Watches over time, for a report."""
        self.now = 0
        """The recorded time of the event at hand, in microseconds after the first."""
        self.matches: Final = Matches()
        self.meters: Final = [Meter(choice.name, choice.kind) for choice in design.drivers]
        self.events = 0
        """Replayed so far."""
        self.recorded_seconds = 0.0
        """From the first event to the last one replayed, as it was."""
        self.replay_seconds = 0.0
        """And as the replay took it, reading included."""
        self.given = 0
        """Announcements of others' reclaim, which were done because the recording has them."""
        self.aged = 0
        """Questions whether a page was used, asked by others likewise."""
        self.signals = 0
        """Accesses that the model answers with a signal, as a program may provoke on purpose."""
        self.unexplained: Final[Counter[str]] = Counter()
        """What the recording has and the model could not do, by what it was."""
        self.stopped = False
        """Ends the replay after the events at hand when set."""
        self._draws = Draws(design.touching)
        self._heard: list[Span] = []
        self._tasks: Final[dict[int, Task]] = {}
        self._spaces: Final[list[Space]] = []
        self._by_id: Final[dict[int, Space]] = {}
        self._introduced: Final[dict[int, int]] = {}
        self._executing: Final[dict[int, Task]] = {}
        """Threads inside execve that are not their group's leader, by the leader's number."""
        self._going: Final[dict[int, None]] = {}
        """Frames that others' reclaim takes, until something else happens than that."""
        self._names = 0

    @property
    def inferred(self) -> int:
        """Pages whose being dirty is known only from the announcements of their writeback."""
        return self._calls.inferred

    async def run(self, progress: Callable[[Replay], None] | None = None) -> None:
        """Replay everything; `progress` is called now and then.

        Raises RecordingError where the recording is wrong, having replayed what comes before.
        """
        began = time.perf_counter()
        design = self.design
        machine: Machine[Any] = Machine(
            frames=_FRAMES,
            swap=_SWAP,
            locks=design.locks,
            batching=design.batching,
            era=design.era,
        )
        async with machine:
            self._machine = machine
            self._calls = Calls(machine, self._spaces)
            root = self.recording.header.root
            space = await self._adopt(machine.new_mm(self._name(root)))
            self._tasks[root] = Task(root, space, {})
            try:
                for block in self.recording.blocks():
                    if not self.events:
                        block.micros[0] = 0
                    await self._block(block)
                    self.events += len(block)
                    self.recorded_seconds = self.now / 1e6
                    self.replay_seconds = time.perf_counter() - began
                    if progress is not None:
                        progress(self)
                    if self.stopped:
                        break
                    await machine.cond_resched()
                for task in list(self._tasks.values()):
                    await self._goes_on(task, whole=not self.stopped)
            finally:
                self.replay_seconds = time.perf_counter() - began

    # ------------------------------------------------------------------ events

    async def _block(self, block: Block) -> None:
        tasks, texts, history, heard = self._tasks, block.texts, self.history, self._heard
        cond_resched = self._machine.cond_resched
        times = block.micros.cumsum() + self.now
        self.aged += int(np.isin(block.kinds, _AGES).sum())
        work = 0
        going = self._going
        steps = rows(block, times, ageing=bool(self.meters))
        for event, self.now, pages, kind, tid, a, b, told in steps:
            if history is not None and self.now >= history.due:
                history.look(self.now, self._spaces)
            if going and (kind != RECLAIM or len(going) >= _RECLAIM_PAGES):
                await self._take_all()
            task = tasks.get(tid)
            if task is None:
                task = tasks[tid] = Task(tid, None, {})
            space = task.space
            if told != OPEN and space is not None and not space.waits(task, b):
                # A fault of which everything is known. The rest of this loop is rare.
                if task.reclaimed is not None:
                    await self._reclaim(task, None)
                if task.fault is not None:
                    await self._end_fault(task, task.fault)
                write = b & CODE_WRITE != 0
                if pages != 1 or not space.mm.access_nowait(a, write):
                    await self._access(space, a, pages, write, step=told == COPIED)
                if told == COPIED:
                    space.recorded = True
                    self.matches.copied(a & -PAGE_SIZE, pages, heard)
                    heard.clear()
                elif heard:
                    if space.recorded:
                        self.matches.compare("fault", _NOTHING, heard)
                    heard.clear()
                if space.toucher is not None:
                    await space.toucher.faulted(a, pages, write)
                    heard.clear()
                work += pages
                if work >= _RESCHED_PAGES:
                    await cond_resched(work)
                    work = 0
                continue
            if kind == "m":
                await self._counted(task, a, b)
                continue
            if task.reclaimed is not None:
                await self._reclaim(task, None)
            if kind == "u":
                self._announced(task, (a, b))
                for start in range(b, a + pages * PAGE_SIZE, PAGE_SIZE) if pages > 1 else ():
                    if task.reclaimed is not None:
                        await self._reclaim(task, None)
                    self._announced(task, (start, start + PAGE_SIZE))
                continue
            if kind == "a":
                self._age(task, a, pages, b - a)
                continue
            if kind == RECLAIM:
                self._isolate(self._by_id.get(b) or self._owner(task, a), a, a + PAGE_SIZE)
                continue
            if task.fault is not None:
                await self._end_fault(task, task.fault)
            if kind in "fF":
                await self._fault(task, a, pages, b, told)
            elif kind == "v":
                # Between program start and exit: its VM exists, announcements are recorded.
                if space is not None:
                    space.recorded = True
            elif kind == ">":
                self._enter(task, texts[event])  # type: ignore[arg-type]
            elif kind == "<":
                await self._leave(task, a)
            elif kind == "o":
                await self._mapped(task, texts[event])  # type: ignore[arg-type]
            elif kind == "x":
                await self._executed(task)
            elif kind == "g":
                await self._guest_fault(task, a, b)
            elif kind == "n":
                await self._clone(task, a, b)
            elif kind == "e":
                await self._exit(task)
            elif kind == "t":
                self._test_young(task, a)
        await self._take_all()
        self.now = int(times[-1])

    async def _goes_on(self, task: Task, *, whole: bool) -> None:
        """The recording is over: what its last event has left open ends here.

        What the rest of a recording would have told of it, nobody knows: it is not compared.
        """
        if task.reclaimed is not None:
            await self._reclaim(task, None)
        if task.fault is not None and whole and not self.recording.truncated:
            await self._end_fault(task, task.fault)

    # ------------------------------------------------------------------ faults

    async def _fault(self, task: Task, address: int, pages: int, code: int, told: int) -> None:
        """A fault that may have to wait, or of which is not known yet what it announced."""
        space = task.space
        if space is None:
            self.unexplained["fault of a task that nobody cloned"] += pages
            return
        if not space.tasks:
            # Its last task has exited, and clears its thread's number on the way.
            return
        fault = task.fault = Fault(task, address, pages, bool(code & CODE_WRITE))
        if told == COPIED:
            space.recorded = True
            start = address & -PAGE_SIZE
            end = start + pages * PAGE_SIZE
            fault.kernel += [(at, at + PAGE_SIZE) for at in range(start, end, PAGE_SIZE)]
        if space.waits(task, code):
            space.held.append(fault)
        else:
            await self._do_fault(space, fault)

    async def _do_fault(self, space: Space, fault: Fault) -> None:
        await self._access(space, fault.address, fault.pages, fault.write, step=True)
        fault.model = self._told()
        if space.toucher is not None:
            await space.toucher.faulted(fault.address, fault.pages, fault.write)
            self._heard.clear()

    async def _access(
        self, space: Space, address: int, pages: int, write: bool, *, step: bool
    ) -> None:
        """The program accesses some pages in a row; with `step` each for itself."""
        mm = space.mm
        try:
            if pages > _FEW and not step:
                await mm.touch(address & -PAGE_SIZE, pages * PAGE_SIZE, write)
                return
            for at in range(address, address + pages * PAGE_SIZE, PAGE_SIZE):
                if not mm.access_nowait(at, write):
                    await mm.access(at, write)
        except BadAddress:
            self.signals += 1

    async def _end_fault(self, task: Task, fault: Fault) -> None:
        space = task.space
        assert space is not None
        task.fault = None
        if fault.model is None:
            space.held.remove(fault)
            await self._do_fault(space, fault)
        if space.recorded and (fault.kernel or fault.model):
            self.matches.compare("fault", fault.kernel, fault.model or _NOTHING)

    def _told(self) -> list[Span]:
        """What the drivers were told since this was last asked."""
        heard = self._heard
        if not heard:
            return _NOTHING
        taken = heard.copy()
        heard.clear()
        return taken

    def _announced(self, task: Task, span: Span) -> None:
        """The kernel announced a range in the context of a task."""
        start, end = span
        fault, space = task.fault, task.space
        if task.aged == span or space is None:
            task.reclaimed = span
        elif fault is not None and _at(fault, start, end):
            fault.kernel.append(span)
            space.recorded = True
        elif task.call is not None:
            task.kernel.append(span)
            space.recorded = True
        else:
            task.reclaimed = span

    # ------------------------------------------------------------------ what others do

    async def _counted(self, task: Task, identity: int, member: int) -> None:
        """The kernel counted pages of an address space that is not the task's own."""
        if task.reclaimed is not None:
            await self._reclaim(task, self._by_id.get(identity))
        elif task.call is not None and not (task.call.name in EXECS and member != _ANON):
            # The child's of a fork; of an execve the new one, which is counted first.
            if task.call.name in EXECS:
                self._introduced.setdefault(task.tid, identity)
            else:
                self._introduced[task.tid] = identity

    async def _reclaim(self, task: Task, owner: Space | None) -> None:
        """Unmap what others have unmapped: it is swapped or written out, and announced."""
        assert task.reclaimed is not None
        start, end = task.reclaimed
        task.reclaimed = task.aged = None
        await self._take(owner or self._owner(task, start), start, end)

    async def _take(self, space: Space | None, start: int, end: int) -> None:
        self._isolate(space, start, end)
        await self._take_all()

    def _isolate(self, space: Space | None, start: int, end: int) -> None:
        self.given += 1
        if space is None:
            return
        for address in range(start, end, PAGE_SIZE):
            entry = space.mm.pt.get(address >> PAGE_SHIFT)
            if entry & f.PTE_PRESENT and not entry & f.PTE_SPECIAL:
                self._going[(entry & f.PFN_MASK) >> PAGE_SHIFT] = None

    async def _take_all(self) -> None:
        if self._going:
            await self._machine.reclaim_pages(list(self._going))
            self._going.clear()
            self._heard.clear()

    def _age(self, task: Task, start: int, pages: int, size: int) -> None:
        last = start + (pages - 1) * PAGE_SIZE
        task.aged = (last, last + size)
        space = self._owner(task, start) if self.meters else None
        if space is not None:
            clear_flush_young = space.mm.notifiers.clear_flush_young
            for address in range(start, start + pages * PAGE_SIZE, PAGE_SIZE):
                clear_flush_young(address, address + size)

    def _test_young(self, task: Task, address: int) -> None:
        space = self._owner(task, address)
        if space is not None:
            space.mm.notifiers.test_young(address)

    def _owner(self, task: Task, address: int) -> Space | None:
        """Whose memory others speak of: the task's own if it has that address, or anybody's."""
        page = address >> PAGE_SHIFT
        own = task.space
        if own is not None and find_vma(own.mm, page) is not None:
            return own
        return next((space for space in self._spaces if find_vma(space.mm, page) is not None), None)

    async def _guest_fault(self, task: Task, address: int, code: int) -> None:
        """A recorded guest needs a page of its host, whose memory is its largest anonymous VMA."""
        space = task.space
        if space is None:
            return
        if space.guest is None:
            anonymous = [vma for vma in space.mm.vmas if vma.anonymous]
            space.guest = max(anonymous, key=lambda vma: vma.pages).start
        host = space.guest + (address & -PAGE_SIZE)
        write = bool(code & CODE_WRITE)
        try:
            await space.mm.primary.fault_in(host, write=write)
            if space.toucher is not None:
                await space.toucher.guest_faulted(host, write)
        except BadAddress as error:
            self.unexplained[f"guest fault: {error}"] += 1
        self._heard.clear()

    # ------------------------------------------------------------------ system calls

    def _enter(self, task: Task, call: Call) -> None:
        task.call = call
        if call.name in EXECS and task.leader != task.tid:
            self._executing[task.leader] = task
        task.mapping = None
        task.kernel, task.model = [], []
        if task.space is not None and call.name in WRITERS:
            task.space.writers += 1

    async def _leave(self, task: Task, result: int) -> None:
        call, space = task.call, task.space
        task.call = None
        self._executing.pop(task.leader, None)
        if call is None:
            # The clone that made the task returns in it, too.
            return
        if space is None:
            self.unexplained[f"{call.name} by a task that nobody cloned"] += 1
            return
        refused = None
        try:
            done = await self._calls.do(task, call.name, call.args, result)
        except MmError as error:
            done, refused = True, error
        if done and (refused is not None) != (result >= ERRORS):
            self._differs(call, result, refused)
        task.model += self._told()
        if call.name in WRITERS:
            space.writers -= 1
            await self._let_go(space)
        if task.replacing:
            task.replacing = False
        if space.recorded and (task.kernel or task.model):
            self.matches.compare(call.name, task.kernel, task.model)
        if space.toucher is not None:
            await space.toucher.called()
            self._heard.clear()

    async def _let_go(self, space: Space) -> None:
        """mmap_lock is free: the faults that waited for it go on."""
        held = space.held.copy()
        space.held.clear()
        for fault in held:
            await self._do_fault(space, fault)

    def _differs(self, call: Call, result: int, refused: MmError | None) -> None:
        words = ", ".join(f"{argument:#x}" for argument in call.args)
        if refused is None:
            name = errno.errorcode.get((1 << 64) - result, "?")
            self.unexplained[f"{call.name}({words}) failed with {name} when it was recorded"] += 1
        else:
            self.unexplained[f"{call.name}({words}): {refused}"] += 1

    async def _mapped(self, task: Task, mapping: Mapping) -> None:
        task = self._leading(task)
        task.mapping = mapping
        if task.call is None or task.call.name not in EXECS or task.space is None:
            return
        if not task.replacing:
            await self._replace(task)
        try:
            await self._calls.place(task.space, mapping)
        except MmError as error:
            self.unexplained[f"execve: {error}"] += 1
        self._heard.clear()

    # ------------------------------------------------------------------ processes

    async def _executed(self, task: Task) -> None:
        task = self._leading(task)
        if task.call is not None and task.space is not None and not task.replacing:
            await self._replace(task)

    def _leading(self, task: Task) -> Task:
        """The task itself, or the thread that execve has made the leader, number and all."""
        if task.call is not None or task.tid not in self._executing:
            return task
        heir = self._executing.pop(task.tid)
        del self._tasks[heir.tid]
        heir.tid = task.tid
        self._tasks[task.tid] = heir
        return heir

    async def _replace(self, task: Task) -> None:
        """execve is past the point of no return: the first mapping of the new program appears."""
        old = task.space
        assert old is not None
        fresh = await old.mm.execve()
        await self._leave_space(old)
        space = task.space = await self._adopt(fresh)
        identity = self._introduced.pop(task.tid, None)
        if identity is not None:
            self._by_id[identity] = space
        task.files = {fd: file for fd, file in task.files.items() if not file.close_on_exec}
        task.replacing = True

    async def _clone(self, task: Task, child: int, flags: int) -> None:
        space = task.space
        if space is None:
            self.unexplained["clone by a task that nobody cloned"] += 1
            return
        files = task.files if flags & CLONE_FILES else task.files.copy()
        if flags & CLONE_VM:
            space.mm.tryget()
            space.tasks += 1
            born = space
        else:
            self._heard.clear()
            born = await self._adopt(await space.mm.fork(self._name(child)))
            born.brk_known = space.brk_known
            born.guest = space.guest
            task.model += self._told()
            identity = self._introduced.pop(task.tid, None)
            if identity is not None:
                self._by_id[identity] = born
            await self._let_go(space)
        leader = task.leader if flags & CLONE_THREAD else child
        self._tasks[child] = Task(child, born, files, leader)

    async def _exit(self, task: Task) -> None:
        space = task.space
        if space is None:
            return
        if task.call is not None and task.call.name in WRITERS:
            space.writers -= 1
        await space.mm.put()
        await self._leave_space(space)

    async def _adopt(self, mm: AddressSpace[Any]) -> Space:
        """Attach everybody to a new address space."""
        mm.notifiers.trace = self.trace
        if self.history is None:
            await mm.register(Witness(self._heard))
        else:
            await mm.register(Watcher(self._heard, self.history, mm.name, lambda: self.now))
        drivers = []
        for choice, meter in zip(self.design.drivers, self.meters, strict=True):
            driver = choice.create()
            meter.watch(driver)
            await mm.register(driver)
            drivers.append(driver)
        devices: list[Device] = [driver for driver in drivers if isinstance(driver, Device)]
        toucher = Toucher(self._draws, mm.primary, devices) if devices else None
        space = Space(mm, drivers, toucher)
        self._spaces.append(space)
        return space

    async def _leave_space(self, space: Space) -> None:
        space.tasks -= 1
        if space.tasks:
            return
        self._spaces.remove(space)
        for identity in [key for key, value in self._by_id.items() if value is space]:
            del self._by_id[identity]
        for driver, meter in zip(space.drivers, self.meters, strict=True):
            meter.retire(driver)

    def _name(self, tid: int) -> str:
        self._names += 1
        return f"{self.recording.name}.{tid}"


def _at(fault: Fault, start: int, end: int) -> bool:
    """Whether a fault announces this: its page, or the huge page around it."""
    last = fault.address + (fault.pages - 1) * PAGE_SIZE
    return start <= last < end and end - start in {PAGE_SIZE, PMD_SIZE}
