"""Real processes: one that exports, eight that import, and accidents at random points.

Importers and their links are killed, stopped and continued. No importer reads what is stale, every
invalidation comes to an end, and when they are gone nothing is pinned and no process is left.
"""

from __future__ import annotations

import mmap
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mmunotify.model import Machine
from mmunotify_xpmem import Partition, StreamEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
PAGES = 16
IMPORTERS = 8
STALE = 3
IMPORTER = Path(__file__).with_name("importing_process.py")
LEASE = 0.2


class Herd:
    """The importing processes, each in its slot; a dead one is replaced."""

    def __init__(self, address: str, segid: int, oracle: Path, count: int) -> None:
        self.arguments = (address, str(segid), str(oracle), str(PAGES))
        self.processes = [self.start(slot) for slot in range(count)]
        self.stopped: set[int] = set()

    def start(self, slot: int) -> subprocess.Popen[str]:
        backend = ("asyncio", "trio")[slot % 2]
        return subprocess.Popen(
            [sys.executable, str(IMPORTER), backend, *self.arguments, str(slot)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def check(self) -> None:
        """Raise if a process has ended that nobody has killed."""
        for process in self.processes:
            if process.poll() not in (None, -signal.SIGKILL):
                assert process.stdout is not None
                said = process.stdout.read()
                raise AssertionError(f"an importer has ended: {process.returncode}\n{said}")

    def accident(self, dice: random.Random, engine: StreamEngine) -> str:
        slot = dice.randrange(len(self.processes))
        process = self.processes[slot]
        what = dice.choice(("kill", "stop", "continue", "link"))
        if what == "kill":
            self.end(process)
            self.stopped.discard(slot)
            self.processes[slot] = self.start(slot)
        elif what == "link" and engine.links:
            dice.choice(engine.links).shut()
        elif what == "stop":
            process.send_signal(signal.SIGSTOP)
            self.stopped.add(slot)
        elif self.stopped:
            slot = dice.choice(sorted(self.stopped))
            self.stopped.discard(slot)
            self.processes[slot].send_signal(signal.SIGCONT)
        return what

    def end(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()

    def end_all(self) -> None:
        for process in self.processes:
            if process.stdout is not None and not process.stdout.closed:
                self.end(process)


@pytest.fixture
def oracle(tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A file of versions that importers must see, and how often each has read."""
    path = tmp_path / "versions"
    path.write_bytes(bytes(8 * (PAGES + IMPORTERS)))
    with (
        path.open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as shared,
        memoryview(shared) as view,
        view.cast("Q") as numbers,
    ):
        yield path, numbers


async def herded(
    tmp_path: Path, oracle: tuple[Path, Any], accidents: int, importers: int, seed: int
) -> None:
    path, published = oracle
    dice = random.Random(seed)
    engine = StreamEngine(f"unix:{tmp_path / 'socket'}")
    machine = Machine(frames=256, swap=16, contents=True)
    async with machine:
        mm = machine.new_mm()
        async with (
            Partition(engine, lease=LEASE, heartbeat=LEASE / 4) as xpmem,
            xpmem.opened(mm.notifiers, pin=True) as group,
        ):
            address = await mm.mmap(PAGES * PAGE)
            segid = group.make(address, PAGES * PAGE)
            herd = Herd(str(engine.listen), segid, path, importers)
            try:
                versions = [0] * PAGES
                reads = [0] * importers
                done = changes = 0
                while done < accidents:
                    herd.check()
                    page = dice.randrange(PAGES)
                    where = address + page * PAGE
                    version = versions[page] + 1
                    async with group.recalling(where, where + PAGE):
                        if dice.random() < 0.5:
                            await mm.madvise(where, PAGE, "dontneed")
                        await mm.write(where, version.to_bytes(8, "little"))
                    versions[page] = published[page] = version
                    changes += 1
                    await anyio.sleep(0.001)
                    # An accident once everybody who can has read something since the last one.
                    living = [slot for slot in range(importers) if slot not in herd.stopped]
                    now = [published[PAGES + slot] for slot in range(importers)]
                    if all(now[slot] > reads[slot] + 3 for slot in living):
                        herd.accident(dice, engine)
                        reads = now
                        done += 1
                assert changes >= accidents
                herd.check()
            finally:
                herd.end_all()
            # Until the kernel has said of each that it is dead.
            while xpmem.exporter.sharers:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            assert not group.table.holders
            assert not group.table.pins
            assert not group.table.waits
            assert not machine.frames.pins
            assert group.table.counters["pinned"] == group.table.counters["unpinned"] > 0
            assert all(process.poll() is not None for process in herd.processes)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_ten_accidents(tmp_path: Path, oracle: tuple[Path, Any], anyio_backend: str) -> None:
    """Eight importers, ten accidents."""
    with anyio.fail_after(240):
        await herded(tmp_path, oracle, 10, IMPORTERS, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 6))
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_two_hundred_accidents(
    tmp_path: Path, oracle: tuple[Path, Any], anyio_backend: str, seed: int
) -> None:
    """The same at length: four times fifty."""
    with anyio.fail_after(900):
        await herded(tmp_path, oracle, 50, IMPORTERS, seed)
