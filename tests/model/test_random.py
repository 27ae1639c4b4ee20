"""Random operations of several tasks at once: contents, invariants, and accounts that balance."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import anyio
import pytest

import mmunotify as mn
from mmunotify.errors import BadAddress
from mmunotify.model import AddressSpace, Machine
from mmunotify.model import flags as f
from mmunotify.model.invariants import InvariantChecker

if TYPE_CHECKING:
    from mmunotify.model.batching import Batching

PAGE = mn.PAGE_SIZE
PAGES = 24
FIXED = f.MAP_PRIVATE | f.MAP_ANONYMOUS | f.MAP_FIXED


class Sleepy(mn.SleepableDriver):
    """Makes every section suspend, so that tasks meet inside of them."""

    async def invalidate_range_start(self, rng: mn.Range) -> None:
        await anyio.lowlevel.checkpoint()

    async def invalidate_range_end(self, rng: mn.Range) -> None:
        await anyio.lowlevel.checkpoint()


class Process:
    """An address space with `PAGES` pages of memory, and what each has to hold."""

    def __init__(self, mm: AddressSpace[mn.RwSems], base: int, seed: int) -> None:
        self.mm = mm
        self.base = base
        self.random = random.Random(seed)
        self.bytes: dict[int, int] = {}

    def range(self) -> tuple[int, int]:
        first = self.random.randrange(PAGES)
        return first, self.random.randint(1, PAGES - first)

    async def step(self) -> None:
        first, count = self.range()
        address, size = self.base + first * PAGE, count * PAGE
        match self.random.randrange(8):
            case 0 | 1 | 2:
                value = self.random.randrange(1, 256)
                for page in range(first, first + count):
                    await self.mm.access(self.base + page * PAGE, True, value)
                    self.bytes[page] = value
            case 3:
                for page in range(first, first + count):
                    found = await self.mm.access(self.base + page * PAGE)
                    assert found == self.bytes.get(page, 0)
            case 4:
                await self.mm.madvise(address, size, "pageout")
            case 5:
                await self.mm.madvise(address, size, "dontneed")
                for page in range(first, first + count):
                    self.bytes.pop(page, None)
            case 6:
                await self.mm.mprotect(address, size, f.PROT_READ)
                await self.mm.mprotect(address, size, f.PROT_READ | f.PROT_WRITE)
            case 7:
                await self.mm.mmap(size, flags=FIXED, addr=address)
                for page in range(first, first + count):
                    self.bytes.pop(page, None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("batching", ["range", "gather"])
async def test_contents_survive_what_others_do(seed: int, batching: Batching) -> None:
    """Processes that share pages by fork, a reclaimer, and drivers that suspend."""
    async with Machine(frames=160, swap=1024, contents=True, batching=batching) as machine:
        with InvariantChecker(machine):
            mm = machine.new_mm("P")
            await mm.register(Sleepy())
            base = await mm.mmap(PAGES * PAGE)
            parent = Process(mm, base, seed)
            for _ in range(10):
                await parent.step()
            family = [parent]
            for number in (1, 2):
                child = Process(await mm.fork(name=f"c{number}"), base, seed + number * 100)
                child.bytes = dict(parent.bytes)
                await child.mm.register(Sleepy())
                family.append(child)

            async def live(process: Process) -> None:
                for _ in range(25):
                    await process.step()

            async def reclaim() -> None:
                for _ in range(4):
                    await machine.vmscan.reclaim(16)
                    await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as tasks:
                for process in family:
                    tasks.start_soon(live, process)
                tasks.start_soon(reclaim)
            for process in family:
                for page in range(PAGES):
                    found = await process.mm.access(base + page * PAGE)
                    assert found == process.bytes.get(page, 0)
    assert machine.frames.used == 1
    assert machine.swap.used == 0
    assert machine.leaves.used == 0
    assert machine.anon_vmas.count == 0


async def test_two_tasks_operate_on_one_address_space() -> None:
    """Faults and unmaps meet; whoever loses gets a signal, nobody a foreign page."""
    async with Machine(frames=256, swap=256, contents=True) as machine:
        with InvariantChecker(machine):
            mm = machine.new_mm("P")
            await mm.register(Sleepy())
            base = await mm.mmap(8 * PAGE)
            signals: set[tuple[str, int]] = set()

            async def unmap() -> None:
                for _ in range(20):
                    await mm.munmap(base, 4 * PAGE)
                    await mm.mmap(4 * PAGE, flags=FIXED, addr=base)

            async def touch() -> None:
                for turn in range(60):
                    try:
                        await mm.access(base + turn % 8 * PAGE, True, 7)
                    except BadAddress as error:
                        signals.add((error.signal, error.code))
                    await anyio.lowlevel.checkpoint()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(unmap)
                tasks.start_soon(touch)
                tasks.start_soon(touch)
    assert signals <= {("SEGV", 1)}
    assert machine.frames.used == 1
