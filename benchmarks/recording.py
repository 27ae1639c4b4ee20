"""What recording costs the program that is recorded, and whether the rings keep up.

The ratio is of the time from a program's start to its end: recorded, to bare. Starting the recorder
and writing the file take their time before and after, and slow nobody down.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mmunotify.errors import RecorderError
from mmunotify.traces.record.means import kernel_route
from mmunotify.traces.record.recorder import Recorder

from ._bench import Row, at_least, at_most, printed, unmeasured

if TYPE_CHECKING:
    from mmunotify.traces.record.means import Means
    from mmunotify.traces.record.recorder import Outcome

ROUNDS = 3
FAULTS = """
import mmap
page = bytes(1 << 25)
for _ in range(12):
    area = mmap.mmap(-1, len(page))
    area.write(page)
    area.close()
"""
CALLS = """
import os, sqlite3, sys
base = sqlite3.connect(sys.argv[1], isolation_level=None)
base.execute("pragma mmap_size = 100000000")
base.execute("create table t (id integer primary key, word text)")
for number in range(int(sys.argv[2])):
    base.execute("insert into t values (?, ?)", (number, "x" * 100))
os.unlink(sys.argv[1])
"""
FORKS = "for number in $(seq 150); do /bin/true; done"
MEMORY = Path("/dev/shm")
SECONDS = 3
RATE = 400_000
PACE = RATE * 11 // 10  # starting and ending take time, too
STORM = f"""
import ctypes, time
close = ctypes.CDLL(None).close
batch, began = 1000, time.perf_counter()
for number in range({SECONDS * PACE // 2} // batch):
    for _ in range(batch):
        close(-1)
    while (time.perf_counter() - began) * {PACE / 2} < number * batch:
        pass
"""
"""Each call is two events, as many a second as PACE says."""


def bare(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(words, check=True)
    return time.perf_counter() - began


def recorded(words: list[str], means: Means, path: Path) -> tuple[float, Outcome]:
    outcome = Recorder(words, path, means, lambda progress: None).record(buffer_mib=32)
    with path.open() as file:
        header = json.loads(file.readline()[1:])
    return header["wall_ms"] / 1000, outcome


def overhead(words: list[str], means: Means, path: Path) -> tuple[float, int]:
    """Recorded to bare, the best of each; and how many events were lost in all."""
    without = within = float("inf")
    lost = 0
    for _ in range(ROUNDS):
        without = min(without, bare(words))
        seconds, outcome = recorded(words, means, path)
        within = min(within, seconds)
        lost += sum(outcome.lost)
    return within / without, lost


def run() -> list[Row]:
    rows: list[Row] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = directory / "bench.mmt"
        try:
            means = kernel_route(stack, lambda line: None)
        except RecorderError as error:
            return [unmeasured("recording", "<= 1.25", "the bare program", str(error))]
        blind = kernel_route(stack, lambda line: None)
        blind.library = None
        calls = [sys.executable, "-c", CALLS]
        programs = (
            ("page faults", [sys.executable, "-c", FAULTS], 1.25, 1.25),
            ("system calls", [*calls, str(directory / "base"), "1500"], 1.25, 1.25),
            ("forks", ["bash", "-c", FORKS], 5.0, 1.5),
        )
        for name, words, limit, blind_limit in programs:
            for how, what, most in (
                ("", means, limit),
                (", no announcements", blind, blind_limit),
            ):
                if not how and means.library is None:
                    rows.append(
                        unmeasured(name, f"<= {most:g}", "the bare program", "no VM can be made")
                    )
                    continue
                ratio, lost = overhead(words, what, path)
                rows.append(at_most(f"{name}{how}", ratio, most, "the bare program"))
                rows.append(at_most(f"{name}{how}: events lost", lost, 0, "events", "events"))
        if MEMORY.is_dir():
            # No disk to wait for: nearly a million calls a second, most of which are not recorded.
            base = str(MEMORY / f"{directory.name}.base")
            ratio, _ = overhead([*calls, base, "12000"], means, path)
            rows.append(printed("system calls without a disk", ratio, "the bare program"))
        seconds, outcome = recorded([sys.executable, "-c", STORM], means, path)
        rate = outcome.events / seconds
        rows.append(at_least("events a second", rate, RATE, "the goal", "events"))
        rows.append(at_most("events lost at that rate", sum(outcome.lost), 0, "events", "events"))
        rows.append(printed("bytes a line", path.stat().st_size / outcome.events, "plain", "bytes"))
    return rows
