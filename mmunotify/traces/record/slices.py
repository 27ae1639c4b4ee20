"""Parts of a recording that are recordings: a slice of its time, or some of its processes.

Memory is what came before has made of it. So what precedes a slice is kept as far as that goes
(calls, faults, forks, execs), at no time and without what the kernel announced; then each address
space that was observed is marked as such anew.
"""

from __future__ import annotations

import json
import lzma
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import attrs

from mmunotify.errors import RecordingError
from mmunotify.traces.decode import check_line
from mmunotify.traces.recording import Recording

from .compose import VCPU
from .tree import CLONE_VM
from .writer import RecordingWriter, no_room, scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_XZ: Final = b"\xfd7zXZ\0"
_LINES: Final = 1 << 12
_ANNOUNCED: Final = frozenset("uatv")
"""Kinds that a replay is compared with, or given."""


@attrs.frozen
class Line:
    """One event."""

    micros: int
    """After the first event."""
    kind: str
    tid: int
    rest: str
    """The fields, with the blank before them."""


class Source:
    """The lines of a recording. Raises RecordingError where it is none."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self.header: Final = Recording(path).header
        with self._open() as file:
            self.fields: Final[dict[str, Any]] = json.loads(file.readline()[1:])

    def lines(self) -> Iterator[Line]:
        """One after the other; half a line at the end of a file is none."""
        now = 0
        with self._open() as file:
            file.readline()
            for number, raw in enumerate(_whole(file), 2):
                words = raw.decode(errors="surrogateescape").rstrip("\n").split(" ", 3)
                if len(words) < 3 or not words[0].isdigit() or not words[2].isdigit():
                    check_line(raw.rstrip(b"\n"), number, self.path)
                # What the first line counts from is not in the recording.
                now += int(words[0]) if number > 2 else 0
                rest = " " + words[3] if len(words) > 3 else ""
                yield Line(now, words[1], int(words[2]), rest)

    def _open(self) -> BinaryIO:
        with self.path.open("rb") as file:
            packed = file.read(len(_XZ)) == _XZ
        return lzma.open(self.path) if packed else self.path.open("rb")  # type: ignore[return-value]


def _whole(file: BinaryIO) -> Iterator[bytes]:
    try:
        for raw in file:
            if raw.endswith(b"\n"):
                yield raw
    except (EOFError, lzma.LZMAError):
        return


class _Marks:
    """Which address spaces were observed, and how to say so again."""

    def __init__(self) -> None:
        self._mark: Final[dict[int, str]] = {}
        self._leader: Final[dict[int, int]] = {}

    def see(self, line: Line) -> None:
        """Follow one event of what is not written as it was."""
        if line.kind == "v":
            tid = self._leader.get(line.tid, line.tid)
            if tid not in self._mark or VCPU in line.rest:
                self._mark[tid] = line.rest
        elif line.kind == "n":
            child, flags = line.rest.split()
            if int(flags, 16) & CLONE_VM:
                self._leader[int(child)] = self._leader.get(line.tid, line.tid)
        elif line.kind == "x":
            self._mark.pop(line.tid, None)
            self._leader.pop(line.tid, None)
        elif line.kind == "e":
            self._mark.pop(line.tid, None)

    def lines(self, micros: int) -> Iterator[Line]:
        """What marks all that live."""
        for tid, rest in self._mark.items():
            yield Line(micros, "v", tid, rest)


def cut(source: Source, output: Path, begin: float, end: float, *, bare: bool) -> int:
    """Keep what happened from one second after the first event to another; returns the events.

    `bare` leaves out what precedes altogether: such a slice is for reading, not for replaying.
    Raises RecordingError where there is no such slice, RecorderError where there is no room.
    """
    if not 0 <= begin < end:
        raise RecordingError(f"expected 0 <= FROM < TO, in seconds, found {begin} and {end}")
    first, last = round(begin * 1e6), round(end * 1e6)

    def kept() -> Iterator[Line]:
        marks: _Marks | None = _Marks() if first else None
        for line in source.lines():
            if line.micros >= last:
                break
            if line.micros < first:
                assert marks is not None
                marks.see(line)
                if not bare and line.kind not in _ANNOUNCED:
                    yield attrs.evolve(line, micros=first)
                continue
            if marks is not None and not bare:
                yield from marks.lines(first)
            marks = None
            yield line

    fields = {"wall_ms": (last - first) // 1000, "slice": [begin, end]}
    return _write(source, output, kept(), {**source.fields, **fields})


def process(source: Source, output: Path, wanted: Callable[[int, str], bool]) -> tuple[int, int]:
    """Keep one process, and what comes of it: the first that is `wanted` by number and program.

    It begins with the execve of its program. One that never had a program of its own has the memory
    that it was forked with: what precedes is kept as it is of a slice. Returns the number of the
    process, and how many events there are.
    Raises RecordingError if nobody is wanted, RecorderError where there is no room.
    """
    found = _find(source, wanted)

    def kept() -> Iterator[Line]:
        live, marks, held = {found.tid}, _Marks(), _Held()
        for index, line in enumerate(source.lines()):
            if index < found.begins:
                if not found.executed:
                    marks.see(line)
                    if line.kind not in _ANNOUNCED:
                        yield line
            elif line.tid in live or (index == found.begins and line.kind == "n"):
                if line.kind == "n":
                    live.add(int(line.rest.split()[0]))
                elif line.kind == "e":
                    live.discard(line.tid)
                held.known(line)
                yield line
            elif line.tid not in found.tree:
                yield from held.foreign(line)

    root = found.tid if found.executed else source.header.root
    return found.tid, _write(source, output, kept(), {**source.fields, "root": root})


@attrs.frozen
class _Found:
    """The process that was wanted."""

    tid: int
    begins: int
    """The index of the line that it begins with."""
    executed: bool
    """That is its execve, and not the fork that made it."""
    tree: set[int]
    """All tasks of the recorded tree."""


def _find(source: Source, wanted: Callable[[int, str], bool]) -> _Found:
    tree = {source.header.root}
    entered: dict[int, int] = {}
    forked: dict[int, int] = {}
    executed: tuple[int, int] | None = None
    for index, line in enumerate(source.lines()):
        if line.kind == ">" and line.rest.startswith(" execve"):
            entered[line.tid] = index
        elif line.kind == "x" and executed is None and wanted(line.tid, line.rest[1:]):
            executed = line.tid, entered.get(line.tid, index)
        elif line.kind == "n":
            child, flags = line.rest.split()
            tree.add(int(child))
            if not int(flags, 16) & CLONE_VM and wanted(int(child), ""):
                forked.setdefault(int(child), index)
    if executed is not None:
        return _Found(*executed, True, tree)
    for tid, begins in forked.items():
        return _Found(tid, begins, False, tree)
    raise RecordingError(f"{source.path}: expected a process like that, found none")


class _Held:
    """What others have announced about memory of the process, which only the next line tells."""

    def __init__(self) -> None:
        self._spaces: Final[set[str]] = set()
        self._waiting: Final[dict[int, Line]] = {}

    def known(self, line: Line) -> None:
        """Take note of an address space that the process counts."""
        if line.kind == "m":
            self._spaces.add(line.rest.split()[0])

    def foreign(self, line: Line) -> Iterator[Line]:
        """Of what a task of nobody's does, what belongs to the process."""
        before = self._waiting.pop(line.tid, None)
        if line.kind == "u":
            self._waiting[line.tid] = line
        elif line.kind == "m" and line.rest.split()[0] in self._spaces:
            if before is not None:
                yield before
            yield line
        elif line.kind in "at":
            yield line


def _write(source: Source, output: Path, lines: Iterator[Line], fields: dict[str, Any]) -> int:
    with no_room(output), ExitStack() as files:
        writer = RecordingWriter(output, files.enter_context(scratch(output)))
        before: int | None = None
        chunk: list[str] = []
        for line in lines:
            passed = 0 if before is None else max(line.micros - before, 0)
            before = line.micros if before is None else before + passed
            chunk.append(f"{passed} {line.kind} {line.tid}{line.rest}")
            if len(chunk) == _LINES:
                writer.write(chunk)
                chunk.clear()
        writer.write(chunk)
        writer.finish({key: fields[key] for key in fields.keys() - {"format", "events"}})
        return writer.events
