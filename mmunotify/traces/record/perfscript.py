"""The output of `perf script` as events, of a session that has recorded what a recorder would have.

    perf record -e exceptions:*,raw_syscalls:*,kvm:kvm_unmap_hva_range,kmem:rss_stat \\
        -e task:task_newtask,sched:sched_process_exec,sched:sched_process_exit \\
        -k CLOCK_MONOTONIC -d -c 1 -- COMMAND
    perf script --ns --show-mmap-events --show-task-events

What it has not recorded is missing; each line is understood, or counted as not understood.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from mmunotify.errors import RecordingError

from .sideband import Mapped
from .syscalls import BY_NUMBER
from .timeline import COLUMNS, Events, mapped_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .timeline import Row

_LINE: Final = re.compile(
    r"\s*(?P<comm>.+?)\s+(?:\d+/)?(?P<tid>-?\d+)\s+(?:\[(?P<cpu>\d+)\]\s+)?"
    r"(?P<seconds>\d+)\.(?P<part>\d{6,9}):\s+(?:\d+\s+)?"
    r"(?P<event>PERF_RECORD_[A-Z0-9]+|\w+:\w+):?\s?(?P<rest>.*)"
)
_MMAP: Final = re.compile(
    r"(?P<pid>-?\d+)/(?P<tid>-?\d+): \[(?P<start>0x[0-9a-f]+)\((?P<length>0x[0-9a-f]+)\) @ "
    r"(?P<offset>0x[0-9a-f]+|0) (?:\w+:\w+ (?P<inode>\d+) \d+|<[0-9a-f]+>)\]: "
    r"(?P<prot>[-rwx]{3}[ps]) (?P<path>.*)"
)
_TASK: Final = re.compile(r"\((\d+):(\d+)\):\((\d+):(\d+)\)")
_MEMBERS: Final = ("MM_FILEPAGES", "MM_ANONPAGES", "MM_SWAPENTS", "MM_SHMEMPAGES")
_PAIR: Final = re.compile(r"(\w+)=(\S+)")
_CALL: Final = re.compile(r"NR (-?\d+) (?:\((.*)\)|= (-?\w+))")
_SPAN: Final = re.compile(r"(0x[0-9a-f]+)(?: -- (0x[0-9a-f]+))?")
_BATCH: Final = 4096
_WORD: Final = (1 << 64) - 1
_VM, _THREAD, _VFORK, _CHILD = 0x100, 0x10000, 0x4000, 17


class PerfScript:
    """The parser. Raises RecordingError, which names the line, where the text is something else."""

    LINE: Final = _LINE
    """What a line looks like."""

    def __init__(self, name: object) -> None:
        self._name = name
        self.notes: Final[Counter[str]] = Counter()
        """Events that were not understood or have no place in a recording, and how often."""
        self.root = 0
        self.command = ""
        self.began = 0
        self.announced = False
        self._known: Final[set[int]] = set()
        self._flags: Final[dict[int, int]] = {}
        self._made: Final[dict[int, Row]] = {}
        """New tasks of which only perf itself has spoken, until they are heard of."""
        self._read: Final[dict[str, Callable[[int, str], Row | None]]] = {
            "raw_syscalls:sys_enter": self._syscall,
            "raw_syscalls:sys_exit": self._syscall,
            "exceptions:page_fault_user": self._fault,
            "exceptions:page_fault_kernel": self._kernel_fault,
            "task:task_newtask": self._new_task,
            "sched:sched_process_exec": self._exec,
            "sched:sched_process_exit": lambda tid, rest: (0, "e", tid, [], None),
            "kvm:kvm_unmap_hva_range": lambda tid, rest: self._announced(tid, "u", rest),
            "kvm:kvm_age_hva": lambda tid, rest: self._announced(tid, "a", rest),
            "kvm:kvm_test_age_hva": lambda tid, rest: self._announced(tid, "t", rest),
            "kmem:rss_stat": self._count,
            "PERF_RECORD_MMAP2": self._mmap,
            "PERF_RECORD_MMAP": self._mmap,
            "PERF_RECORD_FORK": self._fork,
        }

    def events(self, text: Iterable[str]) -> Iterator[Events]:
        """Everything that has a place in a recording, some lines at a time."""
        rows: list[Row] = []
        for number, line in enumerate(text, 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _LINE.match(line.rstrip("\n"))
            if match is None:
                raise RecordingError(
                    f"{self._name}:{number}: expected a line of `perf script`: command, task, "
                    f"time, event, found {line.strip()[:40]!r}"
                )
            row = self._row(match)
            if row is not None:
                rows += self._new(row)
                rows.append(row)
            if len(rows) == _BATCH:
                yield _events(rows)
                rows.clear()
        if rows:
            yield _events(rows)

    def _row(self, match: re.Match[str]) -> Row | None:
        event, tid = match["event"], int(match["tid"])
        time = int(match["seconds"]) * 10**9 + int(match["part"].ljust(9, "0"))
        read = self._read.get(event)
        if read is None:
            if not event.startswith(("PERF_RECORD_COMM", "PERF_RECORD_EXIT")):
                self.notes[event] += 1
            return None
        try:
            row = read(tid, match["rest"])
        except (KeyError, ValueError, TypeError):
            self.notes[f"{event} in another form"] += 1
            return None
        if row is None:
            return None
        if not self.root:
            self.root, self.began, self.command = row[2], time, match["comm"]
        return (time, *row[1:])

    def _new(self, row: Row) -> list[Row]:
        """The tasks that are there when a task is heard of: itself, and those that it has made."""
        new = [child for child, made in self._made.items() if row[2] in {child, made[2]}]
        return [(row[0], *self._made.pop(child)[1:]) for child in new]

    # ------------------------------------------------------------------ one event each

    def _syscall(self, tid: int, rest: str) -> Row | None:
        match = _CALL.match(rest)
        if match is None:
            raise ValueError(rest)
        number = int(match[1])
        call = BY_NUMBER.get(number)
        if call is None:
            return None
        if match[2] is None:
            return 0, "<", tid, [number, int(match[3], 0) & _WORD], None
        values = [int(word, 16) for word in match[2].split(",")]
        if call.name in {"clone", "vfork", "fork"}:
            flags = {"clone": values[0], "vfork": _VFORK | _VM, "fork": 0}
            self._flags[tid] = flags[call.name]
        return 0, ">", tid, [number, *values], None

    def _fault(self, tid: int, rest: str) -> Row:
        fields = _pairs(rest)
        return 0, "f", tid, [_address(fields[key]) for key in ("address", "ip", "error_code")], None

    def _kernel_fault(self, tid: int, rest: str) -> Row | None:
        fields = _pairs(rest)
        address = _address(fields["address"])
        if address >> 47:
            return None
        return 0, "F", tid, [address, _address(fields["error_code"])], None

    def _new_task(self, tid: int, rest: str) -> Row:
        fields = _pairs(rest)
        self._made.pop(int(fields["pid"]), None)
        self._known.add(int(fields["pid"]))
        return 0, "n", tid, [int(fields["pid"]), int(fields["clone_flags"], 16)], None

    def _fork(self, tid: int, rest: str) -> None:
        """What perf itself says of a new task, where no event has."""
        match = _TASK.match(rest)
        if match is None:
            raise ValueError(rest)
        process, child, parent, maker = map(int, match.groups())
        if child in self._known:
            return
        flags = self._flags.pop(maker, _CHILD)
        if process == parent:
            flags |= _VM | _THREAD
        self._made[child] = 0, "n", maker, [child, flags], None

    def _exec(self, tid: int, rest: str) -> Row:
        return 0, "x", tid, [], rest.partition("filename=")[2].rpartition(" pid=")[0]

    def _announced(self, tid: int, kind: str, rest: str) -> Row:
        match = _SPAN.search(rest)
        if match is None:
            raise ValueError(rest)
        self.announced = True
        return 0, kind, tid, [int(word, 16) for word in match.groups() if word], None

    def _count(self, tid: int, rest: str) -> Row | None:
        fields = _pairs(rest)
        if fields["curr"] != "0":
            return None
        size = int(fields["size"].removesuffix("B")) & _WORD
        return 0, "m", tid, [int(fields["mm_id"]), _MEMBERS.index(fields["type"]), size], None

    def _mmap(self, tid: int, rest: str) -> Row | None:
        match = _MMAP.match(rest)
        if match is None:
            raise ValueError(rest)
        if match["pid"] == "-1":
            return None
        start, inode = int(match["start"], 16), int(match["inode"] or 0)
        mapped = Mapped(
            0,
            int(match["tid"]),
            start,
            start + int(match["length"], 16),
            match["prot"],
            int(match["offset"], 0) if inode else 0,
            inode,
            match["path"],
        )
        return 0, "o", mapped.tid, [], mapped_text(mapped)


def _pairs(rest: str) -> dict[str, str]:
    return dict(_PAIR.findall(rest))


def _address(word: str) -> int:
    """A number that perf may show with a symbol: `0x7f12` or `7f12`; a bare symbol is refused."""
    return int(word, 16)


def _events(rows: list[Row]) -> Events:
    rows.sort(key=lambda row: row[0])
    values = np.zeros((len(rows), COLUMNS), np.uint64)
    for index, row in enumerate(rows):
        values[index, : len(row[3])] = row[3]
    return Events(
        np.array([row[0] for row in rows], np.uint64),
        np.frombuffer("".join(row[1] for row in rows).encode(), np.uint8),
        np.array([row[2] for row in rows], np.int64),
        values,
        {index: row[4] for index, row in enumerate(rows) if row[4] is not None},
    )
