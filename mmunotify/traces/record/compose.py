"""Events in the order of time into the lines of a recording.

Left out is what comes before the program's own execve, and what others did to memory that is not
the program's. The kernel names the owner of memory only by what follows: a counter of its address
space, whose number is known when it was first counted in a fork or an execve of the tree.
"""

from __future__ import annotations

from bisect import bisect_right
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from .spans import Spans
from .syscalls import BY_NUMBER
from .tree import Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Set

    from .timeline import Events
    from .writer import RecordingWriter

Entry: TypeAlias = list[Any]
"""A line to be: microseconds, and the rest of it; None if there shall be none."""

VCPU: Final = "anon_inode:kvm-vcpu"
"""The path of the mapping that keeps a VM alive begins with this."""
FAILED: Final = "!"
"""The letter of an event that is no line: there can be no VM, and its text says why."""
_HELD_MICROS: Final = 200_000
"""How much later may still be found out what a line is, or that there is none."""
_ERRORS: Final = (1 << 64) - 4095
_SIGN: Final = 1 << 63
_MAKERS: Final = frozenset(("fork", "vfork", "clone", "clone3", "execve", "execveat"))
"""Calls in which an address space is counted for the first time."""
_EXECS: Final = frozenset(("execve", "execveat"))
_PLACERS: Final = {"mmap": 1, "mremap": 2}
"""Calls that return where something is mapped, and which argument says how much."""


class Composer:
    """One recording being put together.

    `began` is the time that the first line counts from; `kernel_tasks` have no memory of their own;
    `started`: the root's execve is past, and everything counts.
    """

    def __init__(
        self,
        writer: RecordingWriter,
        root: int,
        began: int,
        *,
        kernel_tasks: Set[int] = frozenset(),
        started: bool = False,
    ) -> None:
        self._writer = writer
        self.micros = began // 1000
        """When the last line was."""
        self._root = root
        self.tree: Final = Tree(root)
        self.foreign = 0
        """Announcements in the kernel's trace that were about somebody else's memory."""
        self._started = started
        self._entries: list[Entry] = []
        self._exits: Final[dict[int, Entry]] = {}
        self._calls: Final[dict[int, tuple[str, list[int]]]] = {}
        self._programs: Final[dict[int, str]] = {}
        self._last: Final[dict[int, tuple[Entry, str] | None]] = {}
        self._reclaimers: Final[set[int]] = set()
        self._kernel_tasks: Final = kernel_tasks
        self._spaces: Final[set[int]] = set()
        self._mapped: Final = Spans()
        self._do: Final[dict[str, Callable[[int, Entry, list[int], str | None], str | None]]] = {
            ">": self._enter,
            "<": self._leave,
            "F": self._pair,
            "n": self._clone,
            "x": self._exec,
            "e": self._exit,
            "o": self._map,
            "v": self._copied,
            FAILED: self._failed,
            "u": self._announce,
            "a": self._age,
            "t": self._test,
            "m": self._count,
            "g": self._pair,
            "s": self._pair,
        }

    def compose(self, batches: Iterable[Events], proceed: Callable[[], None]) -> None:
        """Write everything down; `proceed` is called now and then, and may raise to end it.

        Raises RecorderError where there is no room.
        """
        for events in batches:
            proceed()
            for time, kind, tid, values, text in events.rows():
                if not self._started:
                    self._started = self._starts(kind, tid, values)
                    if not self._started:
                        continue
                if kind == "f":
                    # Most events are of this kind.
                    address, ip, code = values[:3]
                    fault = f"f {tid} {address:x} {ip:x} {code:x}"
                    self._entries.append([time // 1000, fault])
                    continue
                do = self._do.get(kind)
                entry: Entry = [time // 1000, None]
                line = do(tid, entry, values, text) if do is not None else None
                if line is not None:
                    entry[1] = f"{kind} {tid}{line}"
                    self._entries.append(entry)
            self._flush(_HELD_MICROS)
        self._flush(0)

    def _starts(self, kind: str, tid: int, values: list[int]) -> bool:
        if kind != ">" or tid != self._root:
            return False
        call = BY_NUMBER.get(values[0])
        return call is not None and call.name in _EXECS

    def _flush(self, held: int) -> None:
        """Write what can no longer change: all but the last `held` microseconds."""
        lines: list[str] = []
        entries, micros = self._entries, self.micros
        limit = (entries[-1][0] if entries else 0) - held
        end = bisect_right(entries, limit, key=itemgetter(0))
        for time, line in entries[:end]:
            if line is not None:
                now = max(time, micros)
                lines.append(f"{now - micros} {line}")
                micros = now
        self.micros = micros
        self._entries = entries[end:]
        self._writer.write(lines)

    # ------------------------------------------------------------------ one event each

    def _enter(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        call = BY_NUMBER.get(values[0])
        if call is None or self.tree.narrow(tid):
            return None
        arguments = values[1 : 1 + call.arguments]
        self._calls[tid] = call.name, arguments
        return f" {call.name} {' '.join([f'{value:x}' for value in arguments])}"

    def _leave(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        call = BY_NUMBER.get(values[0])
        if call is None or self.tree.narrow(tid):
            return None
        _, arguments = self._calls.pop(tid, ("", []))
        result = values[1]
        if call.name in _PLACERS and result < _ERRORS and arguments:
            self._mapped.add(result, result + arguments[_PLACERS[call.name]])
        return f" {call.name} {result:x}"

    def _pair(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        return f" {values[0]:x} {values[1]:x}"

    def _clone(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        self._exits.pop(values[0], None)
        self.tree.cloned(tid, values[0], values[1])
        return f" {values[0]} {values[1]:x}"

    def _exec(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        self.tree.executed(tid, self._programs.pop(tid, text or ""))
        return f" {text}"

    def _exit(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        self._calls.pop(tid, None)
        for heir in self.tree.threads(tid):
            if self._calls.get(heir, ("",))[0] in _EXECS:
                # A thread executes: it takes the number of the first, which ends for it.
                call = self._calls[tid] = self._calls.pop(heir)
                self.tree.exited(heir)
                self._entries.append([entry[0], f"e {heir}"])
                self._entries.append([entry[0], f"> {tid} {call[0]} "])
                return None
        self.tree.exited(tid)
        self._exits[tid] = entry
        return ""

    def _map(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        if tid not in self.tree or text is None:
            return None
        start, end, _, _, _, path = text.split(" ", 5)
        self._mapped.add(int(start, 16), int(end, 16))
        if path.startswith(VCPU):
            self.tree.observed(tid)
        elif path.startswith("/") and self._calls.get(tid, ("",))[0] in _EXECS:
            self._programs.setdefault(tid, path)
        return f" {text}"

    def _copied(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        if tid not in self.tree or text is None:
            return None
        _, start, end, _ = text.split(" ", 3)
        self._mapped.add(int(start, 16), int(end, 16))
        return f" {text}"

    def _failed(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        self.tree.observed(tid, f"no VM: {text}")
        return None

    def _announce(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        line = f" {values[0]:x} {values[1]:x}"
        if tid in self.tree:
            self._last[tid] = None
            return line
        if values[0] not in self._mapped:
            self._last.pop(tid, None)
            self.foreign += 1
            return None
        self._last[tid] = entry, f"u {tid}{line}"
        if tid in self._kernel_tasks:
            return line
        # Most likely its own memory, at the same address: what it counts next would say otherwise.
        self.foreign += 1
        self._entries.append(entry)
        return None

    def _age(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        if not self._concerned(tid, values[0]):
            return None
        self._last[tid] = None
        return f" {values[0]:x} {values[1]:x}"

    def _test(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        return f" {values[0]:x}" if self._concerned(tid, values[0]) else None

    def _concerned(self, tid: int, address: int) -> bool:
        """Whether somebody who asks how old a page is can mean one of ours."""
        return tid in self.tree or (
            address in self._mapped and (tid in self._kernel_tasks or tid in self._reclaimers)
        )

    def _count(self, tid: int, entry: Entry, values: list[int], text: str | None) -> str | None:
        identity, member, size = values[:3]
        left = self._exits.get(tid)
        if left is not None:
            # The kernel says that a task ends before it takes its memory down, which these are of.
            left[1] = None
            last = self._exits[tid] = [entry[0], f"e {tid}"]
            self._entries.append(last)
            return None
        known = identity in self._spaces
        if not known and tid in self.tree and self._calls.get(tid, ("",))[0] in _MAKERS:
            self._spaces.add(identity)
        elif tid in self._last:
            announced = self._last.pop(tid)
            if announced is not None:
                entry_of_it, line = announced
                self.foreign += (entry_of_it[1] is not None) - known
                entry_of_it[1] = line if known else None
                if not known:
                    return None
                self._reclaimers.add(tid)
        else:
            return None
        self._last.pop(tid, None)
        return f" {identity:x} {member} {size - 2 * (size & _SIGN)}"
