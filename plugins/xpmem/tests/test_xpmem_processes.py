"""Real processes: one that exports, eight that import, and accidents at random points.

Importers and their links are killed, stopped and continued: links over Unix sockets are cut, those
over TCP are processes themselves. No importer reads what is stale, every invalidation comes to an
end, and when they are gone nothing is pinned and no process is left.
"""

from __future__ import annotations

import mmap
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from mmunotify.model import Machine
from mmunotify_xpmem import Partition, StreamEngine
from mmunotify_xpmem.pfns import PfnTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mmunotify.model.mm import AddressSpace
    from mmunotify_xpmem import ThreadGroup

PAGE = 4096
PAGES = 16
IMPORTERS = 8
STALE = 3
HERE = Path(__file__).parent
LEASE = 0.2


class Stale(AssertionError):
    """An importer has read what it must not read any more."""


def started(script: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, words)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read()


def ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(10)
    assert process.stdout is not None
    process.stdout.close()


class Slot:
    """A place for an importing process, and for the process that is its link if there is one."""

    def __init__(self, number: int, target: str, relayed: bool) -> None:
        self.backend = ("asyncio", "trio")[number % 2]
        self.number = number
        self.target = target
        self.port = 0
        self.stopped: set[str] = set()
        """Who of the two is."""
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.relayed = relayed

    def start_link(self) -> None:
        process = started("relaying_process.py", self.port, self.target.rpartition(":")[2])
        self.processes["link"] = process
        assert process.stdout is not None
        self.port = int(process.stdout.readline())

    def start(self, mutant: str, words: tuple[object, ...]) -> None:
        address = f"tcp:127.0.0.1:{self.port}" if self.relayed else self.target
        self.processes["importer"] = started(
            "importing_process.py", self.backend, mutant, address, *words, self.number
        )


class Herd:
    """The importing processes, each in its slot; a dead one is replaced."""

    def __init__(
        self, engine: StreamEngine, words: tuple[object, ...], fence: str, mutant: str
    ) -> None:
        self.engine = engine
        self.words = words
        self.mutant = mutant
        self.fence = fence
        assert engine.listen is not None
        relayed = engine.listen.path is None
        self.slots = [Slot(number, str(engine.listen), relayed) for number in range(IMPORTERS)]
        self.everybody: list[subprocess.Popen[str]] = []
        self.accidents: Counter[str] = Counter()

    def start_all(self) -> None:
        for slot in self.slots:
            if slot.relayed:
                self.start_link(slot)
            self.start(slot)

    def start(self, slot: Slot) -> None:
        slot.stopped.discard("importer")
        slot.start(self.mutant, self.words)
        self.everybody.append(slot.processes["importer"])

    def start_link(self, slot: Slot) -> None:
        slot.stopped.discard("link")
        slot.start_link()
        self.everybody.append(slot.processes["link"])

    def check(self) -> None:
        """Raise if a process has ended that nobody has killed."""
        for slot in self.slots:
            process = slot.processes["importer"]
            match process.poll():
                case None:
                    pass
                case -9 if self.fence == "kill":
                    ended(process)
                    self.start(slot)
                case 3:
                    raise Stale(said(process))
                case status:
                    raise AssertionError(f"an importer has ended: {status}\n{said(process)}")

    def accident(self, dice: random.Random) -> None:
        """One of those that are possible now: each kind is as likely as any other."""
        possible: dict[str, list[tuple[Slot, str]]] = {}
        for slot in self.slots:
            for who in slot.processes:
                kinds = ["kill", "continue" if who in slot.stopped else "stop"]
                if not slot.relayed:
                    kinds.append("cut")
                for kind in kinds:
                    possible.setdefault(f"{kind} {who}", []).append((slot, who))
        kind = dice.choice(sorted(possible))
        slot, who = dice.choice(possible[kind])
        self.accidents[kind] += 1
        what = kind.split()[0]
        process = slot.processes[who]
        if what == "stop":
            process.send_signal(signal.SIGSTOP)
            slot.stopped.add(who)
        elif what == "continue":
            process.send_signal(signal.SIGCONT)
            slot.stopped.discard(who)
        elif what == "cut":
            if self.engine.links:
                dice.choice(self.engine.links).shut()
        elif who == "link":
            ended(process)
            self.start_link(slot)
        else:
            ended(process)
            self.start(slot)

    def end_all(self) -> None:
        for process in self.everybody:
            if process.stdout is not None and not process.stdout.closed:
                ended(process)


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


async def change(
    mm: AddressSpace[Any], group: ThreadGroup, address: int, published: Any, mine: range
) -> None:
    """Change pages for ever; who looks after that must see it."""
    dice = random.Random(mine.start)
    version = 0
    while True:
        page = dice.choice(mine)
        where = address + page * PAGE
        version += 1
        with anyio.fail_after(60):
            async with group.recalling(where, where + PAGE):
                if dice.random() < 0.5:
                    await mm.madvise(where, PAGE, "dontneed")
                await mm.write(where, version.to_bytes(8, "little") * (PAGE // 8))
        published[page] = version
        await anyio.sleep(0.001)


async def herded(
    engine: StreamEngine,
    oracle: tuple[Path, Any],
    *,
    accidents: int,
    seed: int,
    fence: Any = "lease",
    mutant: str = "",
) -> Counter[str]:
    """The accidents that have happened; raises what has gone wrong."""
    path, published = oracle
    dice = random.Random(seed)
    machine = Machine(frames=256, swap=16, contents=True)
    async with machine:
        mm = machine.new_mm()
        async with (
            Partition(engine, lease=LEASE, heartbeat=LEASE / 4) as xpmem,
            xpmem.opened(mm.notifiers, pin=True) as group,
        ):
            address = await mm.mmap((PAGES + IMPORTERS) * PAGE)
            # Of who comes by TCP nothing is known: the bits of others count.
            segid = group.make(address, (PAGES + IMPORTERS) * PAGE, 0o606, fence=fence)
            herd = Herd(engine, (segid, path, PAGES), fence, mutant)
            try:
                herd.start_all()
                async with anyio.create_task_group() as tasks:
                    for part in range(2):
                        mine = range(part * PAGES // 2, (part + 1) * PAGES // 2)
                        tasks.start_soon(change, mm, group, address, published, mine)
                    reads = [0] * IMPORTERS
                    while herd.accidents.total() < accidents:
                        herd.check()
                        await anyio.sleep(0.002)
                        # An accident once everybody who can has read something since the last one.
                        now = published[PAGES:].tolist()
                        if all(
                            slot.stopped or now[slot.number] > reads[slot.number] + 3
                            for slot in herd.slots
                        ):
                            herd.accident(dice)
                            reads = now
                    herd.check()
                    tasks.cancel_scope.cancel()
            finally:
                herd.end_all()
            # Until the kernel has said of each that it is dead, or its lease is over.
            while xpmem.exporter.sharers or group.table.waits:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            assert not group.table.holders
            assert not group.table.pins
            assert not machine.frames.pins
            assert group.table.counters["pinned"] == group.table.counters["unpinned"] > 0
            assert min(published[:PAGES]) > 0
            assert all(process.poll() is not None for process in herd.everybody)
    return herd.accidents


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_ten_accidents(tmp_path: Path, oracle: tuple[Path, Any], anyio_backend: str) -> None:
    """Eight importers, ten accidents."""
    with anyio.fail_after(100):
        await herded(StreamEngine(f"unix:{tmp_path / 's'}"), oracle, accidents=10, seed=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("address", "fence", "seed"),
    [
        ("unix:{}/s", "lease", 2),
        ("unix:{}/s", "kill", 3),
        ("tcp:127.0.0.1:0", "lease", 4),
        ("tcp:127.0.0.1:0", "lease", 5),
    ],
    ids=["unix", "kill", "tcp", "tcp-too"],
)
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_two_hundred_accidents(
    tmp_path: Path,
    oracle: tuple[Path, Any],
    anyio_backend: str,
    address: str,
    fence: str,
    seed: int,
) -> None:
    """The same at length: four times fifty, and all kinds of them."""
    engine = StreamEngine(address.format(tmp_path))
    with anyio.fail_after(110):
        happened = await herded(engine, oracle, accidents=50, seed=seed, fence=fence)
    kinds = {"kill importer", "stop importer"}
    if fence != "kill":  # else there may be nobody left to continue
        kinds.add("continue importer")
    kinds |= {"cut importer"} if seed < 4 else {"kill link", "stop link", "continue link"}
    assert kinds <= set(happened), happened


@pytest.mark.long
@pytest.mark.parametrize("mutant", ["Deaf", "Trusting", "Open"])
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_broken_protocols_are_found_out(
    monkeypatch: pytest.MonkeyPatch, oracle: tuple[Path, Any], anyio_backend: str, mutant: str
) -> None:
    """An importer that acknowledges and keeps the page, one that goes on when its lease is over, an
    exporter that lets faults in while it recalls: an importer reads what is stale."""
    if mutant == "Open":
        monkeypatch.setattr(PfnTable, "closed", lambda *_: False)
    with (
        anyio.fail_after(110),
        pytest.RaisesGroup(Stale, flatten_subgroups=True, allow_unwrapped=True),
    ):
        await herded(StreamEngine("tcp:127.0.0.1:0"), oracle, accidents=100, seed=6, mutant=mutant)
