"""The software model: single pages in calls, ranges against numpy, and a swap storm.

The unit of range work is what numpy needs to find and clear the entries of 1 024 full leaves, one
leaf after another, refilled before each run; that of single pages is a call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import thread_time_ns
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import anyio
import numpy as np

import mmunotify as mn
from mmunotify.dispatch import Dispatch
from mmunotify.model import Machine
from mmunotify.model.flags import PROT_READ

from ._bench import Row, at_most, bare_calls, printed, undisturbed

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from mmunotify.model.mm import AddressSpace

    Model = AddressSpace[Any]

GIB = 1 << 30
PAGE = 4096
SPARSE = 126 << 40
LEAVES = 1024
ROUNDS = 20
CALLS = 5000
"""Of the unit, which takes about as long as a step that is measured with it: what disturbs the one
disturbs the other."""
ROOT = Path(__file__).parent.parent


class Atomic(mn.AtomicDriver):
    """Listens to everything and does nothing."""

    def invalidate_range_start(self, rng: mn.Range) -> None:
        pass

    def invalidate_range_end(self, rng: mn.Range) -> None:
        pass

    def clear_flush_young(self, start: int, end: int) -> bool:
        return False


class Watch:
    """The shortest time that each of some steps took, in ns of the CPU; they take turns.

    Steps are too long to be undisturbed by the clock on the wall, unless the machine is idle.
    """

    def __init__(self) -> None:
        self.best: dict[str, float] = {}

    async def time(self, name: str, step: Awaitable[object]) -> None:
        began = thread_time_ns()
        await step
        taken = thread_time_ns() - began
        self.best[name] = min(self.best.get(name, taken), taken)

    async def unit(self) -> None:
        await self.time("call", _calls())


async def _calls() -> None:
    bare_calls(CALLS)


# ---------------------------------------------------------------------- single pages


async def faults() -> list[Row]:
    """Fresh pages one by one, a mapping after the other, in an address space of 100."""
    watch = Watch()
    async with Machine(frames=1 << 14) as machine:
        mm = machine.new_mm()
        heaps = [await _apart(mm, 64 * PAGE) for _ in range(100)]

        async def fault_each(page: int) -> None:
            for heap in heaps:
                await mm.access(heap + page * PAGE, write=True)

        with undisturbed():
            for _ in range(60):
                for page in range(16):
                    await watch.time("fault", fault_each(page))
                    await watch.unit()
                for heap in heaps:
                    await mm.madvise(heap, 64 * PAGE, "dontneed")
    return [
        at_most("anonymous fault, 100 VMAs", _in_calls(watch, "fault", 100), 100, "a call", "calls")
    ]


async def cow() -> list[Row]:
    """Writes to pages shared by fork, with one atomic driver that hears of each."""
    pages, step = 1024, 64
    watch = Watch()
    async with Machine(frames=1 << 14) as machine:
        mm = machine.new_mm()
        heap = await mm.mmap(pages * PAGE)
        await mm.touch(heap, pages * PAGE, write=True)

        async def break_from(first: int) -> None:
            for page in range(first, first + step):
                await mm.access(heap + page * PAGE, write=True)

        async with mm.attached(Atomic()):
            with undisturbed():
                for _ in range(60):
                    child = await mm.fork()
                    for first in range(0, pages, step):
                        await watch.time("cow", break_from(first))
                        await watch.unit()
                    await child.exit()
    taken = _in_calls(watch, "cow", step)
    return [at_most("COW break, one atomic driver", taken, 150, "a call", "calls")]


def _in_calls(watch: Watch, name: str, pages: int) -> float:
    return watch.best[name] / pages / (watch.best["call"] / CALLS)


async def _apart(mm: Model, size: int) -> int:
    """A mapping that merges with no other: one page below it is left free."""
    address = await mm.mmap(size + PAGE)
    await mm.munmap(address, PAGE)
    return address + PAGE


# ---------------------------------------------------------------------- ranges


class FullLeaves:
    """The unit: 1 024 leaves of 512 entries, found and cleared."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._leaves = list(np.ones((LEAVES, 512), np.uint64))

    async def measure(self) -> None:
        for leaf in self._leaves:
            leaf.fill(1)
        await self._watch.time("unit", self._find_and_clear())

    async def _find_and_clear(self) -> None:
        for leaf in self._leaves:
            leaf.nonzero()
            leaf.fill(0)


async def ranges() -> list[Row]:
    """2 GiB touched and unmapped, its frames in the order of the pages or in none; 1 GiB forked."""
    watch = Watch()
    leaves = FullLeaves(watch)
    async with Machine(frames=(2 * GIB >> 12) + 8192) as machine:
        mm = machine.new_mm()
        with undisturbed():
            for _ in range(ROUNDS):
                await leaves.measure()
                await _heap(watch, mm, 2 * GIB, "ordered")
            frames = machine.frames
            np.random.default_rng(1).shuffle(frames._stack[: frames._top])
            for _ in range(ROUNDS):
                await leaves.measure()
                await _heap(watch, mm, 2 * GIB, "shuffled")
            heap = await mm.mmap(GIB)
            await mm.touch(heap, GIB, write=True)
            for _ in range(ROUNDS):
                await leaves.measure()
                children: list[Model] = []
                await watch.time("fork", _fork_into(mm, children))
                await children[0].exit()
    unit = watch.best["unit"]
    return [
        at_most(name, watch.best[step] / unit, limit, "find-and-clear of 1 024 leaves")
        for name, step, limit in (
            ("touch of 2 GiB", "touch ordered", 12),
            ("munmap of 2 GiB, ordered frames", "munmap ordered", 6),
            ("munmap of 2 GiB, shuffled frames", "munmap shuffled", 12),
            ("fork of 1 GiB", "fork", 10),
        )
    ]


async def _heap(watch: Watch, mm: Model, size: int, name: str) -> None:
    heap = await mm.mmap(size)
    await watch.time(f"touch {name}", mm.touch(heap, size, write=True))
    await watch.time(f"munmap {name}", mm.munmap(heap, size))


async def _fork_into(mm: Model, children: list[Model]) -> None:
    children.append(await mm.fork())


async def scaling() -> list[Row]:
    """The cost of a page, whatever else is touched or mapped."""
    watch = Watch()
    small = 64 << 20
    async with Machine(frames=(2 * GIB >> 12) + 8192) as machine:
        mm = machine.new_mm()
        with undisturbed():
            for _ in range(ROUNDS):
                await watch.time("2 GiB", _life(mm, 2 * GIB, 2 * GIB))
                await watch.time("1 GiB", _life(mm, GIB, GIB))
                for _ in range(4):
                    await watch.time("small", _life(mm, small, small))
                    await watch.time("sparse", _life(mm, SPARSE, small))
    best = watch.best
    doubled = best["2 GiB"] / best["1 GiB"] / 2
    cached = best["2 GiB"] / best["small"] / (2 * GIB // small)
    sparse = best["sparse"] / best["small"]
    return [
        at_most("map, touch, fork, unmap 2 GiB, per page", doubled, 1.25, "1 GiB"),
        printed(
            "map, touch, fork, unmap 2 GiB, per page", cached, "64 MiB, whose frames stay cached"
        ),
        at_most("the same with 64 MiB in the middle of 126 TiB", sparse, 1.25, "64 MiB alone"),
    ]


async def _life(mm: Model, mapped: int, touched: int) -> None:
    heap = await mm.mmap(mapped)
    await mm.touch(heap + mapped // 2 - touched // 2, touched, write=True)
    child = await mm.fork()
    await child.exit()
    await mm.munmap(heap, mapped)


# ---------------------------------------------------------------------- notification, locks


class _Counting:
    """`armed` or `plain` as an attribute that counts how often it is asked for."""

    def __init__(self, value: bool) -> None:
        self.value = value
        self.asked = 0

    def __get__(self, notifiers: object, owner: object) -> bool:
        self.asked += 1
        return self.value

    def __set__(self, notifiers: object, value: bool) -> None:
        pass


async def overhead() -> list[Row]:
    """What a program pays for notifiers that nobody uses: the checks, of all that it costs."""

    async def program(machine: Machine[Any]) -> None:
        mm = machine.new_mm()
        for _ in range(20):
            heap = await mm.mmap(256 * PAGE)
            for page in range(256):
                await mm.access(heap + page * PAGE, write=True)
            child = await mm.fork()
            for page in range(0, 256, 4):
                await child.access(heap + page * PAGE, write=True)
            await child.exit()
            await mm.mprotect(heap, 128 * PAGE, PROT_READ)
            await mm.madvise(heap, 256 * PAGE, "pageout")
            await mm.munmap(heap, 256 * PAGE)
        await mm.exit()

    watch = Watch()
    armed, plain = _Counting(False), _Counting(True)
    with (
        patch.object(Dispatch, "armed", armed, create=True),
        patch.object(Dispatch, "plain", plain, create=True),
    ):
        async with Machine() as machine:
            await program(machine)
    notifiers = mn.Notifiers()

    async def checks() -> None:
        for _ in range(CALLS):
            if notifiers.armed:
                raise AssertionError

    async def nothing() -> None:
        for _ in range(CALLS):
            pass

    with undisturbed():
        for _ in range(20):
            async with Machine() as machine:
                await watch.time("program", program(machine))
            await watch.time("checks", checks())
            await watch.time("nothing", nothing())
    check = (watch.best["checks"] - watch.best["nothing"]) / CALLS
    share = (armed.asked + plain.asked) * check / watch.best["program"]
    return [at_most("checks for drivers, nobody registered", share, 0.02, "the whole program")]


async def brk_test() -> list[Row]:
    """AIM9's brk_test, which 2008 said lost 10 to 20 % to reverse maps with sleeping locks."""
    watch = Watch()
    async with (
        Machine(locks=mn.SpinLocks, name="spin") as spin,
        Machine(locks=mn.RwSems, name="rwsem") as rwsem,
    ):
        machines: tuple[Machine[Any], ...] = (spin, rwsem)
        with undisturbed():
            for _ in range(400):
                for machine in machines:
                    await watch.time(machine.name, _brk_loop(machine))
    ratio = watch.best["spin"] / watch.best["rwsem"]
    return [printed("AIM9 brk test, SpinLocks : RwSems", ratio, "the same machine with RwSems")]


async def _brk_loop(machine: Machine[Any]) -> None:
    mm = machine.new_mm()
    heap = mm.brk_start
    for _ in range(3):
        await mm.brk(heap + 16 * PAGE)
        for page in range(16):
            await mm.access(heap + page * PAGE, write=True)
        child = await mm.fork()
        await child.exit()
        await mm.brk(heap)
    await mm.exit()


# ---------------------------------------------------------------------- the storm


def storm() -> list[Row]:
    """A guest of 2 GiB in swap beside a process that allocates 2 GiB, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._storm"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples")},
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(done.stdout)
    return [
        at_most("swap storm, per page touched", found["calls_per_page"], 200, "a call", "calls"),
        at_most("swap storm, peak memory", found["peak_rss"] / (1 << 20), 150, "150 MiB", "MiB"),
    ]


async def _in_loop() -> list[Row]:
    parts = (faults, cow, ranges, scaling, overhead, brk_test)
    return [row for part in parts for row in await part()]


def run() -> list[Row]:
    return [*anyio.run(_in_loop), *storm()]
