"""Other programs' output into a recording: that of `strace -f -ttt`, and that of `perf script`."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs
import numpy as np

from mmunotify.errors import RecordingError

from .compose import Composer
from .perfscript import PerfScript
from .strace import Conversion, Strace, recording_lines
from .syscalls import BY_NAME
from .timeline import COLUMNS, Events
from .writer import RecordingWriter, no_room, scratch

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Source = Literal["strace", "perf"]
_LOOK: Final = 1 << 12
_LINES: Final = 1 << 12


@attrs.frozen
class Converted:
    """What came of a conversion."""

    source: Source
    events: int
    notes: Counter[str]
    """What was left out, and how often."""


def convert(path: Path, output: Path, source: Source | None = None) -> Converted:
    """Write a recording of what a file of strace's or perf's output says.

    Raises RecordingError where it says something else, RecorderError where there is no room.
    """
    try:
        with path.open(errors="surrogateescape") as text, ExitStack() as files:
            found = source or _source(path, text.read(_LOOK))
            text.seek(0)
            with no_room(output):
                writer = RecordingWriter(output, files.enter_context(scratch(output)))
            notes = (_strace if found == "strace" else _perf)(path, text, writer)
    except OSError as error:
        raise RecordingError(f"{path}: expected strace's or perf's output: {error}") from error
    return Converted(found, writer.events, notes)


def write_conversion(
    conversion: Conversion, writer: RecordingWriter, header: dict[str, Any]
) -> None:
    """Write what strace has said, with what else is known of the run."""
    lines = recording_lines(conversion)
    while chunk := list(islice(lines, _LINES)):
        writer.write(chunk)
    writer.finish({"vm": False, "root": conversion.root, "lost": [0], "by": "strace"} | header)


def _source(path: Path, text: str) -> Source:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for name, parser in (("strace", Strace), ("perf", PerfScript)):
        if lines and parser.LINE.match(lines[0]):
            return name  # type: ignore[return-value]
    raise RecordingError(
        f"{path}:1: expected a line of `strace -f -ttt` or `perf script`, found "
        f"{(lines or [''])[0][:40]!r}"
    )


def _strace(path: Path, text: Iterable[str], writer: RecordingWriter) -> Counter[str]:
    conversion = Strace(path).convert(text)
    times = [entry[0] for entry in conversion.lines if entry is not None]
    wall = (max(times) - min(times)) // 1000 if times else 0
    command = conversion.command or ["?"]
    write_conversion(conversion, writer, {"cmd": command, "wall_ms": wall})
    return conversion.notes


def _perf(path: Path, text: Iterable[str], writer: RecordingWriter) -> Counter[str]:
    parser = PerfScript(path)
    batches = parser.events(text)
    first = next(batches, None)
    if first is None:
        raise RecordingError(f"{path}: expected an event that a recording has, found none")
    composer = Composer(writer, parser.root, parser.began, started=True)
    composer.compose(chain(_execve(parser, first), (first,), batches), lambda: None)
    header = {
        "cmd": [parser.command],
        "vm": parser.announced,
        "wall_ms": composer.micros // 1000 - parser.began // 1_000_000,
        "root": parser.root,
        "lost": [0],
        "by": "perf",
    }
    writer.finish(header)
    return parser.notes


def _execve(parser: PerfScript, first: Events) -> Iterator[Events]:
    """The beginning of the execve that perf has waited for: it hears only the rest of it."""
    number = BY_NAME["execve"].number
    for kind, values in zip(bytes(first.kinds).decode(), first.values.tolist(), strict=True):
        if kind == ">":
            return
        if kind == "<" and values[0] == number:
            values = np.zeros((1, COLUMNS), np.uint64)
            values[0, 0] = number
            yield Events(
                first.times[:1],
                np.frombuffer(b">", np.uint8),
                np.array([parser.root], np.int64),
                values,
                {},
            )
            return
