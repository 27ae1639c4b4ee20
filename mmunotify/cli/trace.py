"""`mmunotify trace`: what is in a recording, a slice of it, and recordings of other origin."""

from __future__ import annotations

import json as jsonlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmunotify.errors import RecordingError
from mmunotify.traces.record import slices
from mmunotify.traces.record.contents import KINDS, contents
from mmunotify.traces.record.convert import Source as Origin
from mmunotify.traces.record.convert import convert

if TYPE_CHECKING:
    from collections.abc import Iterable

app = App(name="trace")

Output = Annotated[Path, Parameter(name=("--output", "-o"))]
_SHOWN = 12
"""How many rows of a table that has no end."""


@app.command
def info(file: Path, /, *, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Show what is in a recording.

    Parameters
    ----------
    file
        A recording (.mmt), plain or compressed with xz.
    json
        Print one JSON object instead of tables.
    """
    found = contents(slices.Source(file))
    if json:
        print(jsonlib.dumps(found))
    else:
        _show(Console(), found)


@app.command
def cut(
    file: Path,
    /,
    *,
    output: Output,
    begin: Annotated[float, Parameter(name="--from")] = 0.0,
    end: Annotated[float, Parameter(name="--to")] = math.inf,
    bare: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Keep a slice of the time of a recording.

    What precedes it is kept as far as memory depends on it (calls, faults, forks, execs), at no
    time and without what was announced, so that the slice can be replayed.

    Parameters
    ----------
    file
        A recording (.mmt), plain or compressed with xz.
    output
        The recording to write; compressed if its name ends in .xz.
    begin
        Where the slice begins, in seconds after the first event.
    end
        Where it ends.
    bare
        Leave out what precedes, too: for reading, not for replaying.
    """
    source = slices.Source(file)
    if end == math.inf:
        end = max(source.header.wall_ms / 1000, _last(source)) + 1e-6
    events = slices.cut(source, output, begin, end, bare=bare)
    print(f"{output}: {events:,} events", file=sys.stderr)


@app.command(name="filter")
def keep(
    file: Path, /, *, output: Output, process: int | None = None, program: str | None = None
) -> None:
    """Keep one process of a recording, and all that it made.

    A process begins with the execve of its program. One that never had a program of its own is kept
    with the past of those that it was forked from.

    Parameters
    ----------
    file
        A recording (.mmt), plain or compressed with xz.
    output
        The recording to write; compressed if its name ends in .xz.
    process
        Its number, as `mmunotify trace info` shows it.
    program
        The name of its program: the first process that runs it is kept.
    """
    if process is None and program is None:
        raise RecordingError("expected --process NUMBER or --program NAME")

    def wanted(tid: int, path: str) -> bool:
        return (process is None or tid == process) and (
            program is None or program in {path, Path(path).name}
        )

    tid, events = slices.process(slices.Source(file), output, wanted)
    print(f"{output}: {events:,} events of process {tid} and what came of it", file=sys.stderr)


@app.command(name="convert")
def convert_output(file: Path, /, *, output: Output, source: Origin | None = None) -> None:
    """Make a recording of the output of `strace -f -ttt` or of `perf script`.

    What these do not say is missing: with strace, page faults, announcements, and what execve maps.

    Parameters
    ----------
    file
        The text: with strace best of `-f -ttt -T -yy`, with perf of
        `perf script --ns --show-mmap-events --show-task-events`.
    output
        The recording to write; compressed if its name ends in .xz.
    source
        What has written the text; by default found out from its first line.
    """
    done = convert(file, output, source)
    print(f"{output}: {done.events:,} events of {done.source}", file=sys.stderr)
    for what, count in done.notes.most_common():
        print(f"  left out: {count} x {what}", file=sys.stderr)


def _last(source: slices.Source) -> float:
    """When the last event was, in seconds."""
    micros = 0
    for line in source.lines():
        micros = line.micros
    return micros / 1e6


# ---------------------------------------------------------------------- tables


def _show(console: Console, found: dict[str, Any]) -> None:
    console.print(Text(f"{found['recording']}: {' '.join(map(str, found['cmd']))}", style="bold"))
    by = found.get("by", "kernel")
    by += " with announcements" if found["vm"] else " without announcements"
    console.print(f"  {found['read']:,} events of {found['seconds']:.3f} s, recorded by {by}")
    if found["truncated"]:
        console.print(f"  of {found['events']:,} events that were recorded: the file ends there")
    if sum(found["lost"]):
        console.print(f"  events lost while recording: {sum(found['lost']):,}")
    for path, reason, count in found.get("unobserved", ()):
        console.print(Text(f"  {count} x {path}: announcements are missing ({reason})"))
    kinds = ((KINDS[kind], count) for kind, count in found["kinds"].items() if kind in KINDS)
    console.print(_table(("events", ""), kinds))
    console.print(_table(("system call", ""), found["calls"].items()))
    if found["pages"]:
        sizes = ((f"up to {pages:,}", count) for pages, count in found["pages"].items())
        console.print(_table(("pages announced", ""), sizes))
    rows = (
        (f"{tid} {' → '.join(found['programs'].get(tid, ['']))}", count)
        for tid, count in found["tasks"].items()
    )
    console.print(_table(("task", "events"), rows))


def _table(heads: tuple[str, str], rows: Iterable[tuple[str, int]]) -> Table:
    table = Table(heads[0], box=None, padding=(0, 2, 0, 2))
    table.add_column(heads[1], justify="right")
    every = list(rows)
    for name, count in every[:_SHOWN]:
        table.add_row(Text(name), f"{count:,}")
    if len(every) > _SHOWN:
        rest = sum(count for _, count in every[_SHOWN:])
        table.add_row(f"and {len(every) - _SHOWN} more", f"{rest:,}")
    return table
