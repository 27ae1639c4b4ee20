"""What is in a recording: its run, its processes, its events by kind, and what was announced."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from mmunotify.ranges import PAGE_SHIFT

if TYPE_CHECKING:
    from .slices import Source

KINDS = {
    ">": "system calls",
    "f": "page faults",
    "F": "page faults of the kernel",
    "u": "announcements",
    "a": "pages aged",
    "t": "pages tested",
    "n": "tasks made",
    "x": "programs started",
    "e": "tasks ended",
    "o": "mappings",
    "v": "lines of maps",
    "m": "counters",
    "g": "guest faults",
    "s": "guest mappings",
}
"""What an event of each kind is; `<` is the other end of `>`."""


def contents(source: Source) -> dict[str, Any]:
    """Everything as one object: what is printed and written is this."""
    kinds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    per_task: Counter[int] = Counter()
    programs: dict[int, list[str]] = {}
    micros = 0
    for line in source.lines():
        kinds[line.kind] += 1
        per_task[line.tid] += 1
        micros = line.micros
        if line.kind == ">":
            calls[line.rest.split(" ", 2)[1]] += 1
        elif line.kind == "u":
            start, end = line.rest.split()
            pages = int(end, 16) - int(start, 16) >> PAGE_SHIFT
            sizes[max(pages - 1, 0).bit_length()] += 1
        elif line.kind == "x":
            programs.setdefault(line.tid, []).append(line.rest[1:])
    read = sum(kinds.values())
    return {
        "recording": str(source.path),
        **source.fields,
        "read": read,
        "truncated": read < source.header.events,
        "seconds": micros / 1e6,
        "kinds": dict(kinds.most_common()),
        "calls": dict(calls.most_common()),
        "pages": {1 << bits: count for bits, count in sorted(sizes.items())},
        "tasks": dict(per_task.most_common()),
        "programs": programs,
    }
