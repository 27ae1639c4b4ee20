"""Programs that Hypothesis writes, run by several tasks at once, two of them in one address space.

Each task has pages of its own, so that what they hold is what a plain dict says; everything else is
shared: the VMAs, which split and merge across the border, the page tables, the file, the frames and
the swap, of which there are too few frames. Everywhere the thirteen rules hold, and when all have
exited nothing is left.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import anyio
import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mmunotify as mn
from mmunotify.errors import MmError
from mmunotify.model import AddressSpace, Machine
from mmunotify.model import flags as f
from mmunotify.model.invariants import InvariantChecker

if TYPE_CHECKING:
    from mmunotify.model.batching import Batching
    from mmunotify.model.filemap import File

PAGE: Final = mn.PAGE_SIZE
PAGES: Final = 8
FIXED: Final = f.MAP_PRIVATE | f.MAP_ANONYMOUS | f.MAP_FIXED
MOVE: Final = f.MREMAP_MAYMOVE | f.MREMAP_FIXED

Kind = Literal[
    "write", "read", "pageout", "dontneed", "protect", "remap", "move", "lock", "migrate", "cold",
    "punch", "pin", "fork", "populate", "merge",
]  # fmt: skip
KINDS: Final[tuple[Kind, ...]] = Kind.__args__  # type: ignore[attr-defined]


@attrs.frozen
class Step:
    """What a task does next, to `count` of its pages from `first` on."""

    kind: Kind
    first: int
    count: int
    value: int
    shared: bool


steps: Final = st.builds(
    Step,
    kind=st.sampled_from(("write", "write", "read", *KINDS)),
    first=st.integers(0, PAGES - 1),
    count=st.integers(1, PAGES),
    value=st.integers(1, 255),
    shared=st.booleans(),
)
programs: Final = st.lists(st.lists(steps, max_size=14), min_size=2, max_size=4)


class Sleepy(mn.SleepableDriver):
    """Makes every section suspend, so that tasks meet inside of them."""

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await anyio.lowlevel.checkpoint()

    async def invalidate_range_end(self, rng: mn.Range) -> None:
        await anyio.lowlevel.checkpoint()


class Moody(Sleepy):
    """Has to wait in every third section or so, and says so when it is asked."""

    nonblock_first = True
    invalidate_range_end = mn.SleepableDriver.invalidate_range_end
    asked = 0
    open = 0

    def invalidate_range_start_nonblock(self, rng: mn.Range) -> bool:
        self.asked += 1
        if self.asked % 3 == 0:
            return False
        self.open += 1
        return True

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await super().invalidate_range_start(rng)
        self.open += 1

    def invalidate_range_end_nonblock(self, rng: mn.Range) -> None:
        self.open -= 1
        assert self.open >= 0

    async def release(self) -> None:
        assert self.open == 0


class Program:
    """One task: its pages of an address space's memory and of a file, and what they must hold."""

    def __init__(
        self,
        mm: AddressSpace[mn.RwSems],
        driver: mn.SleepableDriver,
        base: int,
        at: int,
        file: File,
    ) -> None:
        self.mm = mm
        self.driver = driver
        self.private = base + at * PAGES * PAGE
        self.spare = base + (64 + at * PAGES) * PAGE
        self.shared = base + (128 + at * PAGES) * PAGE
        self.file = file
        self.offset = at * PAGES
        self.bytes: dict[tuple[bool, int], int] = {}

    async def run(self, steps: list[Step]) -> None:
        for step in steps:
            first, last = step.first, min(step.first + step.count, PAGES)
            await self._do(step, first, last)
            await anyio.lowlevel.checkpoint()
        await self.compare()

    def _forget(self, shared: bool, first: int, last: int) -> None:
        for page in range(first, last):
            self.bytes.pop((shared, page), None)

    async def _do(self, step: Step, first: int, last: int) -> None:
        mm, machine = self.mm, self.mm.machine
        base = self.shared if step.shared else self.private
        address, size = base + first * PAGE, (last - first) * PAGE
        match step.kind:
            case "write":
                for page in range(first, last):
                    await mm.access(base + page * PAGE, True, step.value)
                    self.bytes[step.shared, page] = step.value
            case "read":
                await self.compare(first, last)
            case "pageout" | "cold":
                await mm.madvise(address, size, step.kind)
            case "populate":
                await mm.madvise(address, size, "populate_write")
            case "dontneed":
                await mm.madvise(address, size, "dontneed")
                if not step.shared:
                    self._forget(False, first, last)
            case "protect":
                await mm.mprotect(address, size, f.PROT_READ)
                await self.compare(first, last)
                await mm.mprotect(address, size, f.PROT_READ | f.PROT_WRITE)
            case "remap" if not step.shared:
                await mm.munmap(address, size)
                await mm.mmap(size, flags=FIXED, addr=address)
                self._forget(False, first, last)
            case "move" if not step.shared:
                there = self.spare + first * PAGE
                await mm.mremap(address, size, size, MOVE, there)
                await mm.mremap(there, size, size, MOVE, address)
            case "lock":
                await mm.mlock(address, size)
                await self.compare(first, last)
                await mm.munlock(address, size)
            case "migrate":
                await mm.access(address, True, step.value)
                self.bytes[step.shared, first] = step.value
                # Unless it has been paged out meanwhile, or is held.
                with contextlib.suppress(MmError):
                    await machine.migrate(mm, address)
            case "punch" if step.shared:
                offset = (self.offset + first) * PAGE
                await machine.fallocate(self.file, "punch", offset, size)
                self._forget(True, first, last)
            case "pin":
                pin = await mm.pin(address, address + size)
                await mm.access(address, True, step.value)
                self.bytes[step.shared, first] = step.value
                mm.unpin(pin)
            case "merge" if not step.shared:
                await mm.madvise(address, size, "mergeable")
                await machine.ksm_scan()
                await mm.madvise(address, size, "unmergeable")
            case "fork":
                child = await mm.fork(name="child")
                driver = type(self.driver)()
                await child.register(driver)
                heir = Program(child, driver, 0, 0, self.file)
                heir.private, heir.shared = self.private, self.shared
                heir.bytes = dict(self.bytes)
                for page in range(first, last):
                    await mm.access(self.private + page * PAGE, True, step.value)
                    self.bytes[False, page] = step.value
                await heir.compare()
                await child.exit()
            case _:
                pass

    async def compare(self, first: int = 0, last: int = PAGES) -> None:
        """What the pages hold is what was stored last, or zero."""
        for shared, base in ((False, self.private), (True, self.shared)):
            for page in range(first, last):
                found = await self.mm.access(base + page * PAGE)
                assert found == self.bytes.get((shared, page), 0), (shared, page)


async def run_together(
    written: list[list[Step]], batching: Batching, kind: type[mn.SleepableDriver]
) -> None:
    async with Machine(frames=96, swap=1024, contents=True, batching=batching) as machine:
        # Who is traced is not told in one step.
        with InvariantChecker(machine) if kind is Sleepy else contextlib.nullcontext():
            file = machine.file(4 * PAGES)
            spaces: list[tuple[AddressSpace[mn.RwSems], mn.SleepableDriver, int]] = []
            for name in ("P", "Q"):
                mm = machine.new_mm(name)
                driver = kind()
                await mm.register(driver)
                base = await mm.mmap(256 * PAGE)
                await mm.munmap(base, 256 * PAGE)
                await mm.mmap(2 * PAGES * PAGE, flags=FIXED, addr=base)
                flags = f.MAP_SHARED | f.MAP_FIXED
                await mm.mmap(4 * PAGES * PAGE, flags=flags, file=file, addr=base + 128 * PAGE)
                spaces.append((mm, driver, base))
            # The third and fourth task live in Q, on other pages of the file.
            tasks = [
                Program(*spaces[number // 2], number % 2, file) for number in range(len(written))
            ]
            for number, task in enumerate(tasks):
                task.offset = number * PAGES
                task.shared = spaces[number // 2][2] + (128 + number * PAGES) * PAGE
            async with anyio.create_task_group() as group:
                for task, program in zip(tasks, written, strict=True):
                    group.start_soon(task.run, program)
            for task in tasks:
                await task.compare()
        machine.close(file)
    assert machine.frames.used == 1
    assert machine.swap.used == 0
    assert machine.leaves.used == 0
    assert machine.anon_vmas.count == 0


def check(
    written: list[list[Step]],
    backend: str,
    batching: Batching,
    kind: type[mn.SleepableDriver] = Sleepy,
) -> None:
    anyio.run(partial(run_together, written, batching, kind), backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=40, deadline=None)
@given(written=programs)
def test_programs_run_together(backend: str, written: list[list[Step]]) -> None:
    check(written, backend, "range")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=40, deadline=None)
@given(written=programs)
def test_programs_run_with_drivers_that_sometimes_wait(
    backend: str, written: list[list[Step]]
) -> None:
    check(written, backend, "range", Moody)


@pytest.mark.long
@pytest.mark.parametrize("kind", [Sleepy, Moody])
@pytest.mark.parametrize("batching", ["range", "gather"])
@settings(max_examples=1000, deadline=None)
@given(written=programs)
def test_many_programs_run_together(
    kind: type[mn.SleepableDriver], batching: Batching, written: list[list[Step]]
) -> None:
    check(written, "asyncio", batching, kind)
