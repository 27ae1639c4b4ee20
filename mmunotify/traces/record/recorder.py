"""Recording one command with the kernel's help, from its execve to its end."""

from __future__ import annotations

import os
import platform
import select
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import attrs

from . import residue, shim, timeline
from .capture import Capture
from .compose import FAILED, Composer
from .launch import Command, find
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
    running: bool
    """The recording has ended before the command."""


@attrs.define
class _Run:
    """What is known when the command has ended."""

    command: Command
    began: int
    ended: int
    lost: list[int]
    copies: bytes
    signal: int | None


def record(
    words: Sequence[str],
    path: Path,
    means: Means,
    *,
    buffer_mib: int,
    show: Callable[[Progress], None],
) -> Outcome:
    """Run a command and write down what it did to its memory.

    Raises RecorderError if there is nothing to run, or no room for the recording.
    """
    find(words[0])
    with ExitStack() as files, no_room(path):
        writer = RecordingWriter(path)

        def spool() -> BinaryIO:
            return files.enter_context(scratch(path))

        with _Signals() as signals, ExitStack() as stack:
            directory = stack.enter_context(_public_directory()) if means.library else None
            capture = stack.enter_context(
                Capture(
                    means.tracefs,
                    residue.own_name(),
                    spool,
                    announcements=means.library is not None,
                    side_band=means.side_band,
                    buffer_kib=buffer_mib << 10,
                )
            )
            run = _run(words, means, directory, capture, signals, show)
        return _write(words, means, capture, run, writer)


class _Signals:
    """A context manager: signals that are meant to end the recording, as they come."""

    def __init__(self) -> None:
        self.seen: Final[list[int]] = []

    def __enter__(self) -> _Signals:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: self.seen.append(number))
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def _public_directory() -> Iterator[Path]:
    """A directory that programs of any user can load the shim from, and have it write to."""
    directory = residue.directories()[0] / residue.own_name()
    directory.mkdir(mode=0o711)
    try:
        directory.chmod(0o711)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


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


def _run(
    words: Sequence[str],
    means: Means,
    directory: Path | None,
    capture: Capture,
    signals: _Signals,
    show: Callable[[Progress], None],
) -> _Run:
    command = Command(words, _environment(means, directory))
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        capture.start(command.pid)
        # Whoever drains the rings must not have to wait for those who fill them.
        os.setpriority(os.PRIO_PROCESS, 0, min(nice, _NICE))
        began = time.monotonic_ns()
        command.start()
        _watch(command, means, capture, signals, show, began)
        ended = time.monotonic_ns()
        capture.stop()
    except BaseException:
        command.abandon()
        raise
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    copies = (directory / _MAPS).read_bytes() if directory is not None else b""
    seen = signals.seen[0] if signals.seen else None
    return _Run(command, began, ended, capture.lost(), copies, seen)


def _watch(
    command: Command,
    means: Means,
    capture: Capture,
    signals: _Signals,
    show: Callable[[Progress], None],
    began: int,
) -> None:
    """Until nothing runs any more, or somebody insists that the recording ends."""
    lender = means.lender
    listening = [lender] if lender is not None else []
    heard, deadline, due = 0, float("inf"), 0.0
    while command.reap():
        capture.drain()
        now = time.monotonic()
        if len(signals.seen) > heard:
            if heard:
                return
            heard, deadline = 1, now + _GRACE_SECONDS
            if not _from_terminal(signals.seen[0]):
                command.signal(signals.seen[0])
        if now >= deadline:
            return
        if now >= due:
            due = now + _SHOW_SECONDS
            seconds = now - began / 1e9
            show(Progress(seconds, capture.events(), sum(capture.lost()), capture.copied))
        if lender is not None and select.select(listening, (), (), _DRAIN_SECONDS)[0]:
            lender.serve()
        elif lender is None:
            time.sleep(_DRAIN_SECONDS)


def _from_terminal(number: int) -> bool:
    """Whether a terminal has sent a signal, and so to the command as well."""
    try:
        return number == signal.SIGINT and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def _write(
    words: Sequence[str], means: Means, capture: Capture, run: _Run, writer: RecordingWriter
) -> Outcome:
    command = run.command
    composer = Composer(writer, command.pid, run.began)
    side_lost: list[int] = []
    streams: list[Iterator[Events]] = [
        *(timeline.ring(ring.spool, capture.page, ring.formats) for ring in capture.rings),
        *(timeline.side_band(spool, side_lost.append) for spool in capture.side),
        iter([timeline.told(_copies(run.copies))]),
    ]
    composer.compose(timeline.merge(streams))
    unobserved = list(composer.tree.unobserved()) if means.library is not None else []
    lost = [*run.lost, sum(side_lost)]
    status = command.status if command.status is not None else 128 + (run.signal or 0)
    minor, major, user, system = command.usage
    header: dict[str, Any] = {
        "cmd": list(words),
        "vm": means.library is not None,
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
    writer.finish(header)
    return Outcome(
        status,
        writer.events,
        composer.tree.processes,
        lost,
        unobserved,
        composer.foreign,
        command.status is None,
    )


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
