"""Doing recorded operations to a machine that is set up like the one that was recorded.

The recordings were made on one CPU, with swap on zram, in a fresh process that had nothing in the
area; transparent huge pages were off unless the recording says otherwise.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

import anyio

from mmunotify.errors import BadAddress, DriverConfigError, MmError
from mmunotify.model import frames as fr
from mmunotify.model.flags import (
    FAULT_KERNEL,
    FAULT_PRESENT,
    FAULT_WRITE,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_GROWSDOWN,
    MAP_HUGETLB,
    MAP_LOCKED,
    MAP_NORESERVE,
    MAP_POPULATE,
    MAP_PRIVATE,
    MAP_SHARED,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
)
from mmunotify.model.machine import Machine
from mmunotify.ranges import PAGE_SHIFT, PAGE_SIZE

from .guest import Guest
from .guest_driver import GuestDriver, GuestTrace, touch
from .observe import AREA_PAGES, BASE, Announcement, Outcome, Recorder, group, look

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from mmunotify.drivers import AnyDriver
    from mmunotify.model.filemap import File
    from mmunotify.model.mm import AddressSpace

    from .recordings import Json, Operation, Sequence

FRAMES: Final = 1 << 17
SWAP_SLOTS: Final = 1 << 16
HUGE_PAGES: Final = 16
PATIENCE: Final = 20
"""Seconds that an operation may take; they take milliseconds."""
PROTECTIONS: Final = {"r": PROT_READ, "w": PROT_WRITE, "x": PROT_EXEC}
MAP_FLAGS: Final = {
    "populate": MAP_POPULATE,
    "locked": MAP_LOCKED,
    "noreserve": MAP_NORESERVE,
    "growsdown": MAP_GROWSDOWN,
    "huge": MAP_HUGETLB,
}
# What the recording wrote where it did not say what.
POKED: Final = 7
COPIED: Final = 5
PARENT: Final = "P"
PROGRAM_PAGES: Final = 43
"""How many of its own pages the recording program copied after a fork."""


def _bytes(pages: float) -> int:
    return int(pages * PAGE_SIZE)


def _address(page: int) -> int:
    return BASE + (page << PAGE_SHIFT)


def _protection(text: str) -> int:
    return sum(PROTECTIONS[letter] for letter in text)


class Harness:
    """One machine, one process and its children, to which a sequence is done; a context manager.

    The process has a guest, made by `guest`: a driver that is a `GuestDriver`.
    """

    def __init__(self, sequence: Sequence, guest: Callable[[], AnyDriver] = Guest) -> None:
        self._sequence = sequence
        driver = guest()
        if not isinstance(driver, GuestDriver):
            raise DriverConfigError(
                f"{driver!r} has no guest: expected the methods of {GuestDriver.__qualname__}"
            )
        self._trace = GuestTrace()
        self._guest: GuestDriver = driver
        self._guest_driver = driver
        driver.record(self._trace.fault, self._trace.mapped)
        self._machine = Machine(
            frames=FRAMES,
            swap=SWAP_SLOTS,
            contents=True,
            hugepages=HUGE_PAGES,
            thp="madvise" if sequence.thp else "never",
        )
        self._processes: dict[str, AddressSpace[Any]] = {}
        self._recorders: dict[str, Recorder] = {}
        self._files: dict[str, File] = {}
        self._pins: dict[str, Any] = {}
        self._faults: list[tuple[int, str, str]] = []
        self._uffd: Any = None
        self._program: list[int] = []

    async def __aenter__(self) -> Self:
        await self._machine.__aenter__()
        parent = self._machine.new_mm(PARENT)
        await self._adopt(PARENT, parent)
        await parent.register(self._guest_driver)
        await self._guest.set_memory(BASE, _bytes(AREA_PAGES))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._machine.__aexit__(kind, error, trace)

    async def do(self, operation: Operation) -> Outcome:
        """Do one operation and look at every process afterwards."""
        outcome = Outcome()
        name = operation.arguments.get("in", PARENT)
        actor = self._processes.get(name)
        handler = getattr(self, f"_do_{operation.kind}", None)
        if handler is None or actor is None:
            outcome.problem = f"no operation {operation.kind} by {name}"
            return outcome
        minor, major = actor.min_flt, actor.maj_flt
        try:
            with anyio.fail_after(PATIENCE):
                outcome.result = await handler(actor, operation.arguments)
        except MmError as error:
            outcome.result = -(error.errno or 0)
        except BadAddress:
            outcome.result = -errno.EFAULT
        except Exception as error:
            outcome.problem = _describe(error)
        outcome.minor, outcome.major = actor.min_flt - minor, actor.maj_flt - major
        outcome.faults, self._faults = self._faults, []
        outcome.guest_faults, outcome.guest_mappings = self._trace.take()
        outcome.announcements = self._heard()
        try:
            for name, mm in self._processes.items():
                outcome.states[name] = look(mm, self._sequence.page_limit)
        except Exception as error:
            outcome.problem = outcome.problem or _describe(error)
        return outcome

    async def finish(self) -> Outcome:
        """Let every process exit, the parent by execve if that is how it ended."""
        outcome = Outcome()
        try:
            with anyio.fail_after(PATIENCE):
                if self._sequence.execs:
                    self._processes[PARENT] = await self._processes[PARENT].execve()
                for mm in self._processes.values():
                    await mm.exit()
        except Exception as error:
            outcome.problem = _describe(error)
        outcome.announcements = self._heard()
        self._processes.clear()
        return outcome

    async def _adopt(self, name: str, mm: AddressSpace[Any]) -> None:
        recorder = Recorder()
        await mm.register(recorder)

        def on_fault(address: int, flags: int) -> None:
            access = "w" if flags & FAULT_WRITE else "r"
            if flags & FAULT_KERNEL:
                access = "k" + access
            if flags & FAULT_PRESENT:
                access += "p"
            self._faults.append(((address - BASE) >> PAGE_SHIFT, access, name))

        mm.on_fault = on_fault
        self._processes[name] = mm
        self._recorders[name] = recorder

    def _heard(self) -> dict[str, list[Announcement]]:
        return {name: recorder.take() for name, recorder in self._recorders.items()}

    # ------------------------------------------------------------------ mappings

    async def _do_mmap(self, mm: AddressSpace[Any], a: Json) -> int:
        flags = MAP_FIXED_NOREPLACE if a.get("noreplace") else MAP_FIXED
        flags |= MAP_SHARED if a.get("share") == "shared" else MAP_PRIVATE
        for name, flag in MAP_FLAGS.items():
            if a.get(name):
                flags |= flag
        file = self._files[a["file"]] if "file" in a else None
        if file is None:
            flags |= MAP_ANONYMOUS
        await mm.mmap(
            _bytes(a["n"]),
            _protection(a.get("prot", "rw")),
            flags,
            file,
            _bytes(a.get("off", 0)),
            addr=_address(a["at"]),
        )
        return 0

    async def _do_munmap(self, mm: AddressSpace[Any], a: Json) -> int:
        await mm.munmap(_address(a["at"]), _bytes(a["n"]))
        return 0

    async def _do_mprotect(self, mm: AddressSpace[Any], a: Json) -> int:
        await mm.mprotect(_address(a["at"]), _bytes(a["n"]), _protection(a["prot"]))
        return 0

    async def _do_mremap(self, mm: AddressSpace[Any], a: Json) -> int:
        flags = new = 0
        if "to" in a:
            flags, new = MREMAP_MAYMOVE | MREMAP_FIXED, _address(a["to"])
        if a.get("dontunmap"):
            flags |= MREMAP_DONTUNMAP
        size = _bytes(a["n"])
        moved = await mm.mremap(
            _address(a["at"]), size, _bytes(a["n2"]) if "n2" in a else size, flags, new
        )
        return (moved - BASE) >> PAGE_SHIFT

    async def _do_madvise(self, mm: AddressSpace[Any], a: Json) -> int:
        await mm.madvise(_address(a["at"]), _bytes(a["n"]), a["adv"])
        return 0

    async def _do_pmadvise(self, mm: AddressSpace[Any], a: Json) -> int:
        parent = self._processes[PARENT]
        await parent.process_madvise([(_address(a["at"]), _bytes(a["n"]))], a["adv"])
        return 0

    async def _do_msync(self, mm: AddressSpace[Any], a: Json) -> int:
        await mm.msync(_address(a["at"]), _bytes(a["n"]), a.get("how", "sync"))
        return 0

    async def _do_mlock(self, mm: AddressSpace[Any], a: Json) -> int:
        await mm.mlock(_address(a["at"]), _bytes(a["n"]), onfault=bool(a.get("onfault")))
        return 0

    async def _do_munlock(self, mm: AddressSpace[Any], a: Json) -> int:
        await mm.munlock(_address(a["at"]), _bytes(a["n"]))
        return 0

    async def _do_mseal(self, mm: AddressSpace[Any], a: Json) -> int:
        await mm.mseal(_address(a["at"]), _bytes(a["n"]))
        return 0

    async def _do_clear_refs(self, mm: AddressSpace[Any], a: Json) -> int:
        await mm.clear_refs(a["v"])
        return 0

    # ------------------------------------------------------------------ accesses

    async def _do_touch(self, mm: AddressSpace[Any], a: Json) -> Any:
        values: list[Any] = []
        bad: list[list[Any]] = []
        write = a["rw"] == "w"
        for page in range(a["at"], a["at"] + a["n"], a.get("step", 1)):
            try:
                value: Any = await mm.access(_address(page), write, a["val"] if write else None)
            except BadAddress as error:
                value = f"{error.signal}{error.code}"
                bad.append([page, value])
            values.append(value)
        if write:
            return {"bad": bad} if bad else 0
        return {"v": _run_lengths(values)}

    async def _do_kread(self, mm: AddressSpace[Any], a: Json) -> int:
        done = await mm.copy_from_user(_address(a["at"]), _bytes(a["n"]))
        if done:
            # It went to a file that was closed and dropped its pages.
            self._machine.lru.drain()
        return done or -errno.EFAULT

    async def _do_kwrite(self, mm: AddressSpace[Any], a: Json) -> int:
        return await mm.copy_to_user(_address(a["at"]), _bytes(a["n"]), 0) or -errno.EFAULT

    async def _do_poke(self, mm: AddressSpace[Any], a: Json) -> int:
        try:
            for page in range(a["at"], a["at"] + a["n"]):
                await mm.access_remote(_address(page), bytes([POKED]))
        except (BadAddress, MmError):
            return -errno.EIO
        return 0

    async def _do_pin(self, mm: AddressSpace[Any], a: Json) -> int:
        pin = await mm.pin(_address(a["at"]), _address(a["at"] + a["n"]))
        self._pins[a.get("id", "")] = pin
        return 0

    async def _do_unpin(self, mm: AddressSpace[Any], a: Json) -> int:
        pin = self._pins.pop(a.get("id", ""), None)
        if pin is None:
            return -errno.ENOENT
        mm.unpin(pin)
        return 0

    # ------------------------------------------------------------------ processes

    async def _do_fork(self, mm: AddressSpace[Any], a: Json) -> int:
        child = await mm.fork(name=a.get("id", "child"))
        self._write_program()
        if a.get("stay"):
            await self._adopt(a["id"], child)
            return 0
        if a.get("exec"):
            child = await child.execve()
        await child.exit()
        # It had written to pages of the recording program that were new.
        self._machine.lru.drain()
        return 0

    def _write_program(self) -> None:
        """The recording program writes to its own pages: to those that are new, then to new ones.

        A write to a page that may be shared and is still on its way to a list drains the batches.
        """
        machine = self._machine
        if any(machine.lru.is_new(frame) for frame in self._program):
            machine.lru.drain()
        for frame in self._program:
            machine.frames.put(frame)
        self._program = [machine.frames.alloc() for _ in range(PROGRAM_PAGES)]
        for frame in self._program:
            machine.frames.word[frame] |= fr.REF_ONE | fr.PG_SWAPBACKED | fr.PG_MLOCKED
            machine.lru.add(frame, file=False)

    async def _do_exit(self, mm: AddressSpace[Any], a: Json) -> int:
        del self._processes[a["in"]]
        await mm.exit()
        return 0

    # ------------------------------------------------------------------ files

    async def _do_file(self, mm: AddressSpace[Any], a: Json) -> int:
        file = self._machine.file(pages=a["pages"], kind=a["kind"], fill=bool(a.get("fill")))
        self._files[a["id"]] = file
        if a.get("drop"):
            self._machine.drop_cache(file)
        return 0

    async def _do_closefile(self, mm: AddressSpace[Any], a: Json) -> int:
        self._machine.close(self._files.pop(a["file"]))
        return 0

    async def _do_truncate(self, mm: AddressSpace[Any], a: Json) -> int:
        await self._machine.truncate(self._files[a["file"]], _bytes(a["pages"]))
        return 0

    async def _do_fallocate(self, mm: AddressSpace[Any], a: Json) -> int:
        file = self._files[a["file"]]
        mode = a.get("mode", "punch")
        await self._machine.fallocate(file, mode, _bytes(a["off"]), _bytes(a["n"]))
        return 0

    async def _do_pwrite(self, mm: AddressSpace[Any], a: Json) -> int:
        data = bytes([a["val"]]) * _bytes(a["n"])
        await self._machine.pwrite(self._files[a["file"]], _bytes(a["off"]), data)
        return 0

    async def _do_pread(self, mm: AddressSpace[Any], a: Json) -> Any:
        file = self._files[a["file"]]
        data = await self._machine.pread(file, _bytes(a["off"]), _bytes(a["n"]))
        return {"v": list(data[::PAGE_SIZE])}

    async def _do_fsync(self, mm: AddressSpace[Any], a: Json) -> int:
        await self._machine.fsync(self._files[a["file"]])
        return 0

    async def _do_fadvise(self, mm: AddressSpace[Any], a: Json) -> int:
        self._machine.drop_cache(self._files[a["file"]])
        return 0

    # ------------------------------------------------------------------ the machine's own work

    async def _do_reclaim(self, mm: AddressSpace[Any], a: Json) -> int:
        for _ in range(a.get("times", 1)):
            await self._machine.reclaim()
        return 0

    async def _do_ksm(self, mm: AddressSpace[Any], a: Json) -> int:
        for _ in range(a["scans"]):
            await self._machine.ksm_scan()
        return 0

    # ------------------------------------------------------------------ userfaultfd

    async def _do_uffd(self, mm: AddressSpace[Any], a: Json) -> int:
        how = a["how"]
        if how == "open":
            self._uffd = await mm.userfaultfd(features=a.get("features", 0))
            return 0
        start, size = _address(a["at"]), _bytes(a["n"])
        if how == "register":
            await self._uffd.register(start, size, mode=a["mode"])
        elif how == "unregister":
            await self._uffd.unregister(start, size)
        elif how == "copy":
            await self._uffd.copy(start, bytes([COPIED]) * size)
        elif how == "zeropage":
            await self._uffd.zeropage(start, size)
        elif how == "wp":
            await self._uffd.writeprotect(start, size, bool(a["on"]))
        else:
            await self._uffd.move(_address(a["to"]), start, size)
        return 0

    async def _do_scan_wp(self, mm: AddressSpace[Any], a: Json) -> Any:
        start = _address(a["at"])
        ranges = await mm.pagemap_scan(
            start, start + _bytes(a["n"]), wp_matching=bool(a.get("flags", 1))
        )
        return {"w": [[(s - BASE) >> PAGE_SHIFT, (e - BASE) >> PAGE_SHIFT] for s, e in ranges]}

    # ------------------------------------------------------------------ the guest

    async def _do_gtouch(self, mm: AddressSpace[Any], a: Json) -> Any:
        write = a["rw"] == "w"
        seen = await touch(self._guest, a["at"], a["n"], a["val"] if write else None)
        if not write:
            return {"v": _run_lengths(seen)}
        bad = [[a["at"] + at, why] for at, why in enumerate(seen) if why]
        return {"bad": bad} if bad else 0

    async def _do_gslot(self, mm: AddressSpace[Any], a: Json) -> int:
        at = a.get("at", 0)
        address = _address(at) if a["how"] == "set" else None
        await self._guest.set_memory(address, _bytes(AREA_PAGES - at))
        return 0

    async def _do_gdirty(self, mm: AddressSpace[Any], a: Json) -> Any:
        if a["how"] == "get":
            dirty = await self._guest.dirty_log()
            if dirty is None:
                return -errno.ENOENT
            runs = group(dict.fromkeys(dirty, ""))
            return {"dirty": [[first, count] for first, count, _ in runs]}
        await self._guest.log_dirty(a["how"] == "on")
        return 0


def _run_lengths(values: list[Any]) -> list[list[Any]]:
    found: list[list[Any]] = []
    for value in values:
        if found and found[-1][0] == value:
            found[-1][1] += 1
        else:
            found.append([value, 1])
    return found


def _describe(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno})" if trace else ""
    return f"{type(error).__name__}: {error}{where}"
