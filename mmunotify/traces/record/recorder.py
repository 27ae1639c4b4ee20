"""Recording one command with the kernel's help, from its execve to its end."""

from __future__ import annotations

import math
import os
import platform
import select
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final

import attrs

from mmunotify.errors import RecorderError

from . import residue, shim, timeline
from .capture import Capture
from .compose import FAILED, Composer
from .launch import Command, find
from .tree import kernel_tasks
from .writer import RecordingWriter, no_room, scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from .means import Means
    from .timeline import Events

_DRAIN_SECONDS: Final = 0.025
_SHOW_SECONDS: Final = 0.2
_GRACE_SECONDS: Final = 10.0
"""How long a command may take to end after a signal that was meant for it."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NICE: Final = -10
_MAPS: Final = "maps"


@attrs.frozen
class Progress:
    """How far a recording is."""

    seconds: float
    events: list[int]
    """By instance: what the program did, what was announced."""
    lost: int
    copied: int
    """Bytes."""
    written: int | None = None
    """Lines, once the command has ended."""


@attrs.define
class Outcome:
    """What came of it."""

    status: int
    """What the command has ended with, as a shell shows it."""
    events: int
    processes: int
    lost: list[int]
    """By instance, and what perf has lost."""
    unobserved: list[tuple[str, str, int]]
    """Programs in which there was no VM, why, and how often."""
    foreign: int
    """Announcements about memory of others, left out."""
    running: int | None
    """The number of the command, if the recording has ended before it.

    Then a directory stays behind that it needs; `residue.remove` removes it.
    """


@attrs.define
class _Run:
    """What is known when the command has ended."""

    command: Command
    began: int
    ended: int
    last: Progress
    lost: list[int]
    copies: bytes
    kernel_tasks: set[int]


class Recorder:
    """Records one command. `show` is called with the progress several times a second."""

    def __init__(
        self, words: Sequence[str], path: Path, means: Means, show: Callable[[Progress], None]
    ) -> None:
        self._words: Final = tuple(words)
        self._path: Final = path
        self._means: Final = means
        self._show: Final = show
        self._signals: Final[list[int]] = []
        self._due = 0.0

    def record(self, *, buffer_mib: int) -> Outcome:
        """Run the command, and write down what it did to its memory.

        Raises RecorderError if there is nothing to run, no room for the recording, or a second
        signal while it is written.
        """
        find(self._words[0])
        with no_room(self._path), ExitStack() as files, noting(self._signals):

            def spool() -> BinaryIO:
                return files.enter_context(scratch(self._path))

            writer = RecordingWriter(self._path, spool())

            with ExitStack() as stack:
                library = self._means.library
                lent = stack.enter_context(ExitStack())
                directory = _public_directory(lent) if library else None
                capture = stack.enter_context(
                    Capture(
                        self._means.tracefs,
                        residue.own_name(),
                        spool,
                        announcements=library is not None,
                        side_band=self._means.side_band,
                        buffer_kib=buffer_mib << 10,
                    )
                )
                run = self._run(capture, directory)
                if run.command.status is None and directory is not None:
                    # What it still starts would complain of a library that is gone.
                    lent.pop_all()
            return self._write(capture, run, writer)

    def _run(self, capture: Capture, directory: Path | None) -> _Run:
        command = Command(self._words, _environment(self._means, directory))
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        try:
            capture.start(command.pid)
            # Whoever drains the rings must not have to wait for those who fill them.
            os.setpriority(os.PRIO_PROCESS, 0, min(nice, _NICE))
            began = time.monotonic_ns()
            command.start()
            self._watch(command, capture, began)
            ended = time.monotonic_ns()
            capture.stop()
        except OSError as error:
            runs = f"; the command (process {command.pid}) still runs, and is not recorded"
            raise RecorderError(
                f"{self._path}: cannot be written: {error.strerror}{runs if command.reap() else ''}"
            ) from error
        finally:
            os.setpriority(os.PRIO_PROCESS, 0, nice)
            command.abandon()
        last = self._progress(capture, began)
        copies = (directory / _MAPS).read_bytes() if directory is not None else b""
        return _Run(command, began, ended, last, capture.lost(), copies, kernel_tasks())

    def _watch(self, command: Command, capture: Capture, began: int) -> None:
        """Until nothing runs any more, or somebody insists that the recording ends."""
        lender = self._means.lender
        ended = stopped(command, self._signals)
        while command.reap() and not ended():
            capture.drain()
            now = time.monotonic()
            if now >= self._due:
                self._due = now + _SHOW_SECONDS
                self._show(self._progress(capture, began))
            listening = [one for one in (lender, command.exits) if one is not None]
            ready, _, _ = select.select(listening, (), (), _DRAIN_SECONDS)
            if lender is not None and lender in ready:
                lender.serve()

    def _progress(self, capture: Capture, began: int) -> Progress:
        seconds = (time.monotonic_ns() - began) / 1e9
        return Progress(seconds, capture.events(), sum(capture.lost()), capture.copied)

    def _write(self, capture: Capture, run: _Run, writer: RecordingWriter) -> Outcome:
        command, observable = run.command, self._means.library is not None
        status = command.status
        if status is None:
            status = 128 + self._signals[0] if self._signals else 0
        seen = len(self._signals)

        def proceed() -> None:
            if len(self._signals) > seen:
                raise RecorderError(f"{self._path}: interrupted: not written")
            now = time.monotonic()
            if now >= self._due:
                self._due = now + _SHOW_SECONDS
                self._show(attrs.evolve(run.last, written=writer.events))

        composer = Composer(writer, command.pid, run.began, kernel_tasks=run.kernel_tasks)
        side_lost: list[int] = []
        streams: list[Iterator[Events]] = [
            *(timeline.ring(ring.spool, capture.page, ring.formats) for ring in capture.rings),
            *(timeline.side_band(spool, side_lost.append) for spool in capture.side),
            iter([timeline.told(_copies(run.copies))]),
        ]
        composer.compose(timeline.merge(streams), proceed)
        unobserved = list(composer.tree.unobserved()) if observable else []
        lost = [*run.lost, sum(side_lost)]
        minor, major, user, system = command.usage
        header = {
            "cmd": list(self._words),
            "vm": observable,
            "t0": run.began,
            "wall_ms": (run.ended - run.began) // 1_000_000,
            "root": command.pid,
            "status": status,
            "lost": lost,
            "minflt": int(minor),
            "majflt": int(major),
            "utime": user,
            "stime": system,
            "kernel": platform.release(),
            "by": "kernel",
            "unobserved": unobserved,
        }
        writer.finish(header, proceed)
        return Outcome(
            status,
            writer.events,
            composer.tree.processes,
            lost,
            unobserved,
            composer.foreign,
            command.pid if command.status is None else None,
        )


@contextmanager
def noting(seen: list[int]) -> Iterator[None]:
    """Signals that are meant to end the recording are noted as they come."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: seen.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _public_directory(stack: ExitStack) -> Path:
    """A directory that programs of any user can load the shim from, and have it write to."""
    directory = residue.directories()[0] / residue.own_name()
    directory.mkdir(mode=0o711)
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    directory.chmod(0o711)
    return directory


def _environment(means: Means, directory: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    if means.library is None or means.lender is None or directory is None:
        return environment
    library = directory / "shim.so"
    shutil.copyfile(means.library, library)
    library.chmod(0o755)
    maps = directory / _MAPS
    maps.touch()
    maps.chmod(0o622)
    preload = environment.get("LD_PRELOAD")
    environment["LD_PRELOAD"] = f"{library}:{preload}" if preload else str(library)
    environment[shim.MAPS] = str(maps)
    environment[shim.KVM] = means.lender.name
    return environment


def stopped(command: Command, seen: list[int]) -> Callable[[], bool]:
    """Whether a recording has to end before its command: ask again and again.

    The first signal is the command's, who has some time to end. The second one is for us.
    """
    deadline = math.inf

    def ask() -> bool:
        nonlocal deadline
        now = time.monotonic()
        if seen and deadline == math.inf:
            deadline = now + _GRACE_SECONDS
            if not _from_terminal(seen[0]):
                command.signal(seen[0])
        return len(seen) > 1 or now >= deadline

    return ask


def _from_terminal(number: int) -> bool:
    """Whether a terminal has sent a signal, and so to the command as well."""
    try:
        return number == signal.SIGINT and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def _copies(text: bytes) -> Iterator[tuple[int, str, int, str]]:
    for time_ns, tid, kind, error, lines in shim.copies(text):
        if error:
            yield time_ns, FAILED, tid, os.strerror(error)
            continue
        for line in lines:
            addresses, perms, offset, _, inode, *path = line.split(" ", 5)
            start, _, end = addresses.partition("-")
            words = (kind, start, end, perms, offset, inode, *(path or [""]))
            yield time_ns, "v", tid, " ".join(words)
