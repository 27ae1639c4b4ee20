"""Recording with strace alone, where the kernel cannot be asked."""

from __future__ import annotations

import os
import platform
import shutil
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from mmunotify.errors import RecorderError

from .convert import write_conversion
from .launch import Command, find
from .recorder import Outcome, Progress, noting, stopped
from .strace import Strace
from .syscalls import SYSCALLS
from .writer import RecordingWriter, no_room, scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_SHOW_SECONDS: Final = 0.2
PRICE: Final = (
    "recorded with strace: system calls only, no page faults and no announcements, and the program "
    "runs several times as long"
)


def record_with_strace(
    words: Sequence[str], path: Path, show: Callable[[Progress], None]
) -> Outcome:
    """Run a command under strace, and write down what it asked the kernel for.

    Raises RecorderError if there is nothing to run, no strace, or no room for the recording.
    """
    program = find(words[0])
    if shutil.which("strace") is None:
        raise RecorderError("no strace either: there is nothing here to record with")
    # Calls that are newer than strace are passed over.
    calls = ",".join(f"?{call.name}" for call in SYSCALLS)
    signals: list[int] = []
    with no_room(path), ExitStack() as files, noting(signals):
        log = files.enter_context(scratch(path))
        writer = RecordingWriter(path, files.enter_context(scratch(path)))
        # It dies of what is meant for the command, which gets it too.
        options = ("-I", "2", "-f", "-ttt", "-T", "-yy", "-s", "4096", "-e", "signal=none")
        output = f"/proc/{os.getpid()}/fd/{log.fileno()}"
        command = Command(
            ("strace", *options, "-e", f"trace={calls}", "-o", output, "--", program, *words[1:]),
            os.environ,
        )
        began = time.monotonic_ns()
        try:
            command.start()
            due = 0.0
            ended = stopped(command, signals)
            while command.reap() and not ended():
                now = time.monotonic()
                if now >= due:
                    due = now + _SHOW_SECONDS
                    size = os.fstat(log.fileno()).st_size
                    show(Progress((time.monotonic_ns() - began) / 1e9, [], 0, size))
                time.sleep(0.025)
        finally:
            command.abandon()
        wall = (time.monotonic_ns() - began) // 1_000_000
        log.seek(0)
        text = (line.decode(errors="surrogateescape") for line in log)
        conversion = Strace("strace").convert(text)
        status = command.status
        if status is None:
            status = 128 + signals[0] if signals else 0
        minor, major, user, system = command.usage
        header = {
            "cmd": list(words),
            "wall_ms": wall,
            "status": status,
            "minflt": int(minor),
            "majflt": int(major),
            "utime": user,
            "stime": system,
            "kernel": platform.release(),
        }
        write_conversion(conversion, writer, header)
        processes = 1 + sum(
            entry is not None and entry[1].startswith("n ") for entry in conversion.lines
        )
        running = command.pid if command.status is None else None
        return Outcome(status, writer.events, processes, [0], [], 0, running)
