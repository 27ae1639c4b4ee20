"""`mmunotify record`, run as a command on this machine, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio

from machine import needs_announcements
from mmunotify.traces.figures import figures
from mmunotify.traces.recording import Recording
from mmunotify.traces.replay import Design, Replay

if TYPE_CHECKING:
    from pathlib import Path

MMUNOTIFY = (sys.executable, "-m", "mmunotify")


def record(path: Path, *command: str, status: int = 0) -> str:
    """Record a command; what was said on standard error."""
    done = subprocess.run(
        [*MMUNOTIFY, "record", "-o", str(path), "--", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def replayed(path: Path) -> dict[str, Any]:
    """The figures of a replay without a driver."""
    replay = Replay(Recording(path), Design())
    anyio.run(replay.run)
    return figures(replay)


@needs_announcements
def test_a_recorded_python_replays_as_the_kernel_announced_it(tmp_path: Path) -> None:
    path = tmp_path / "py.mmt.xz"
    program = (
        "import mmap, os\n"
        "heap = bytearray(b'x') * (4 << 20)\n"
        "told, tell = os.pipe()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os.read(told, 1)\n"
        "else:\n"
        "    heap[::4096] = b'y' * (len(heap) // 4096)\n"
        "    os.write(tell, b'.')\n"
        "    os.waitpid(child, 0)\n"
        "    area = mmap.mmap(-1, 1 << 20)\n"
        "    area.write(bytes(1 << 20))\n"
        "    area.madvise(mmap.MADV_DONTNEED)\n"
    )
    record(path, sys.executable, "-c", program)
    found = replayed(path)
    # Each page of the heap was copied once at least, since the child has it too.
    assert found["kernel_announcements"] > 1024
    assert found["matched"] >= 0.99 * found["kernel_announcements"]
    assert found["extra"] <= 0.01 * found["kernel_announcements"]
    assert not found["truncated"]


@needs_announcements
def test_the_exit_status_is_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "sh.mmt"
    record(path, "sh", "-c", "exit 7", status=7)
    header = json.loads(path.read_text().partition("\n")[0][1:])
    assert (header["status"], header["cmd"]) == (7, ["sh", "-c", "exit 7"])
    assert (header["format"], header["vm"], sum(header["lost"])) == (1, True, 0)
