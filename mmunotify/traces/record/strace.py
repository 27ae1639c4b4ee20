"""The output of `strace -f -ttt` as a recording: system calls, and what they say of mappings.

It has no page faults, no announcements, and nothing of what execve maps.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final

import attrs

from mmunotify.errors import RecordingError
from mmunotify.ranges import PAGE_SIZE

from .constants import CONSTANTS
from .syscalls import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LINE: Final = re.compile(r"(?:\[pid\s+(\d+)\] |(\d+)\s+)?(\d+)\.(\d{6}) (.*)")
_CALL: Final = re.compile(r"(\w+)\((.*)", re.DOTALL)
_RESUMED: Final = re.compile(r"<\.\.\. (\w+) resumed>(.*)", re.DOTALL)
_RESULT: Final = re.compile(r"(.*)\)\s+= (\?|0x[0-9a-f]+|-?\d+)(.*)", re.DOTALL)
_TOOK: Final = re.compile(r"<(\d+)\.(\d{6})>$")
_COMMENT: Final = re.compile(r"/\*.*?\*/")
_PATH: Final = re.compile(r"<(.*)>$", re.DOTALL)
_STRING: Final = re.compile(r'"((?:[^"\\]|\\.)*)"')
_NUMBER: Final = re.compile(r"-?\d+|0x[0-9a-f]+")
_FLAGS: Final = re.compile(r"\bflags=([\w|]+)")
_UNFINISHED: Final = "<unfinished ...>"
_ERRNO: Final = re.compile(r"\b(E[A-Z0-9]+)\b")
_MAKERS: Final = frozenset(("clone", "clone3", "fork", "vfork"))
_EXECS: Final = frozenset(("execve", "execveat"))
_OPENERS: Final = {"open": 0, "openat": 1, "openat2": 1, "creat": 0, "memfd_create": 0}
"""Calls that return a descriptor, and which argument is the path."""
_WORD: Final = (1 << 64) - 1
_INT: Final = (1 << 32) - 1
_VFORK: Final = CONSTANTS["CLONE_VM"] | CONSTANTS["CLONE_VFORK"]
_KEEP: Final = CONSTANTS["CLONE_FILES"]


@attrs.define
class _Open:
    """A call that has not returned."""

    name: str
    text: str
    at: int
    """Where its line is."""


@attrs.define
class Conversion:
    """What came of some other program's output."""

    lines: list[tuple[int, str] | None] = attrs.field(factory=list)
    """Microseconds, and the line without them."""
    root: int = 0
    command: list[str] = attrs.field(factory=list)
    announced: bool = False
    """There are announcements among the lines."""
    notes: Counter[str] = attrs.field(factory=Counter)
    """What could not be converted, and how often."""


class Strace:
    """The parser. Raises RecordingError, which names the line, where the text is something else."""

    LINE: Final = _LINE
    """What a line looks like."""

    def __init__(self, name: object) -> None:
        self._name = name
        self._open: Final[dict[int, _Open]] = {}
        self._files: Final[dict[int, dict[int, str]]] = {}
        self._segments: Final[dict[int, int]] = {}
        self._children: Final[set[int]] = set()
        self._tasks: Final[dict[int, None]] = {}
        self._nameless = False
        self.result: Final = Conversion()

    def convert(self, text: Iterable[str]) -> Conversion:
        """Everything, or what can be."""
        for number, line in enumerate(text, 1):
            stripped = line.rstrip("\n")
            match = _LINE.match(stripped)
            if match is None:
                if stripped.strip() and not stripped.startswith(("strace: ", "[")):
                    raise RecordingError(
                        f"{self._name}:{number}: expected a line of `strace -f -ttt`, with seconds "
                        f"and microseconds, found {stripped[:40]!r}"
                    )
                continue
            tid = int(match[1] or match[2] or 0)
            self._nameless |= not tid
            self._tasks[tid] = None
            self._event(tid, int(match[3]) * 1_000_000 + int(match[4]), match[5])
        self._find_root()
        return self.result

    def _find_root(self) -> None:
        """The one task that nobody made; without a number, where only one was alive."""
        made = [tid for tid in self._tasks if tid and tid not in self._children]
        root = self.result.root = made[0] if made else 1
        if self._nameless:
            for index, entry in enumerate(self.result.lines):
                if entry is not None:
                    kind, tid, *rest = entry[1].split(" ", 2)
                    if tid == "0":
                        self.result.lines[index] = entry[0], " ".join((kind, str(root), *rest))

    def _event(self, tid: int, now: int, text: str) -> None:
        if text.startswith("+++"):
            self._open.pop(tid, None)
            self._files.pop(tid, None)
            self._line(now, "e", tid)
            return
        if text.startswith("---"):
            return
        resumed = _RESUMED.match(text)
        if resumed is not None:
            call = self._open.pop(tid, None)
            if call is not None:
                self._returned(tid, now, call, call.text + resumed[2], 0)
            return
        match = _CALL.match(text)
        if match is None:
            self.result.notes[f"not understood: {text[:40]}"] += 1
            return
        name, rest = match[1], match[2]
        if name not in BY_NAME:
            return
        call = _Open(name, rest.removesuffix(_UNFINISHED), len(self.result.lines))
        self.result.lines.append(None)
        arguments = _split(call.text)
        self._entered(tid, now, call, arguments)
        if rest.endswith(_UNFINISHED):
            self._open[tid] = call
        else:
            took = _TOOK.search(rest)
            micros = int(took[1]) * 1_000_000 + int(took[2]) if took else 0
            self._returned(tid, now, call, rest, micros)

    def _line(self, now: int, kind: str, tid: int, *fields: object) -> None:
        self.result.lines.append((now, " ".join((kind, str(tid), *map(str, fields)))))

    # ------------------------------------------------------------------ calls

    def _entered(self, tid: int, now: int, call: _Open, arguments: list[str]) -> None:
        """Write down the entry; the arguments that come with the return are not there yet."""
        known = BY_NAME[call.name]
        values = [self._number(word) for word in arguments[: known.arguments]]
        if call.name == "clone":
            # strace names the arguments, and leaves out those that flags make meaningless.
            flags = _FLAGS.search(call.text)
            values = [self._number(flags[1]) if flags else 0, 0, 0, 0, 0]
        values += [0] * (known.arguments - len(values))
        words = " ".join(f"{value:x}" for value in values)
        self.result.lines[call.at] = now, f"> {tid} {call.name} {words}"

    def _returned(self, tid: int, now: int, call: _Open, text: str, micros: int) -> None:
        match = _RESULT.match(text)
        if match is None:
            if not text.rstrip().endswith("?"):
                self.result.notes[f"{call.name} without a result"] += 1
            return
        arguments = _split(match[1])
        if match[2] == "?":
            return
        result = int(match[2], 0)
        entry = self.result.lines[call.at]
        assert entry is not None
        if result < 0:
            code = _ERRNO.search(match[3])
            number = CONSTANTS.get(code[1]) if code else None
            result = -number if number is not None else result
        done = now + micros
        if call.name in _EXECS and result == 0:
            self._executed(tid, done, arguments)
        elif call.name in _MAKERS and result > 0:
            self._cloned(tid, call, entry[0], result, match[1])
        elif result >= 0:
            self._mapped(tid, done, call.name, arguments, result, match[3])
        self._line(done, "<", tid, call.name, f"{result & _WORD:x}")

    def _executed(self, tid: int, done: int, arguments: list[str]) -> None:
        path = _STRING.search(" ".join(arguments[:2]))
        name = path[1] if path else "?"
        if not self.result.command:
            self.result.command = [name]
            words = _STRING.findall(arguments[1]) if len(arguments) > 1 else []
            self.result.command += words[1:]
        self._line(done, "x", tid, name)

    def _cloned(self, tid: int, call: _Open, began: int, child: int, text: str) -> None:
        """A child may be seen before its maker returns: it is there from when that was called."""
        named = _FLAGS.search(text)
        flags = self._number(named[1]) if named else 0
        if call.name == "vfork":
            flags = _VFORK
        self._children.add(child)
        own = self._files.setdefault(tid, {})
        self._files[child] = own if flags & _KEEP else own.copy()
        line = began, f"n {tid} {child} {flags & _INT:x}"
        self.result.lines.insert(call.at + 1, line)
        for other in self._open.values():
            if other.at > call.at:
                other.at += 1

    def _mapped(
        self, tid: int, done: int, name: str, arguments: list[str], result: int, rest: str
    ) -> None:
        """Remember what a descriptor refers to, or write down what was mapped."""
        files = self._files.setdefault(tid, {})
        if name in _OPENERS:
            shown = _PATH.search(_TOOK.sub("", rest).strip())
            given = _STRING.search(arguments[_OPENERS[name]]) if arguments else None
            files[result] = shown[1] if shown else given[1] if given else "?"
        elif name in {"dup", "dup2", "dup3"} and arguments:
            files[result] = files.get(self._number(arguments[0]), "?")
        elif name == "shmget" and len(arguments) > 1:
            self._segments[result] = self._number(arguments[1])
        elif name == "shmat" and arguments:
            size = self._segments.get(self._number(arguments[0]), 0)
            if size:
                self._mapping(tid, done, result, size, "rw-s", 0, "/SYSV00000000 (deleted)")
        elif name == "mmap" and len(arguments) == 6:
            length, prot, flags, offset = (self._number(arguments[index]) for index in (1, 2, 3, 5))
            letters = "".join(
                letter if prot & 1 << bit else "-" for bit, letter in enumerate("rwx")
            )
            letters += "s" if flags & CONSTANTS["MAP_SHARED"] else "p"
            path = "//anon"
            if not flags & CONSTANTS["MAP_ANONYMOUS"]:
                shown = _PATH.search(arguments[4])
                descriptor = self._number(arguments[4])
                path = shown[1] if shown else files.get(descriptor, f"/descriptor:{descriptor}")
            self._mapping(tid, done, result, length, letters, offset, path)

    def _mapping(
        self, tid: int, done: int, start: int, size: int, prot: str, offset: int, path: str
    ) -> None:
        end = start + size + -size % PAGE_SIZE
        self._line(done, "o", tid, f"{start:x}", f"{end:x}", prot, f"{offset:x}", 0, path)

    def _number(self, word: str) -> int:
        """An argument as a register holds it; what is shown as a string or a struct is 0."""
        value = 0
        for part in _PATH.sub("", _COMMENT.sub("", word)).strip().split("|"):
            text = part.strip()
            if text in CONSTANTS:
                value |= CONSTANTS[text]
            elif _NUMBER.fullmatch(text):
                number = int(text, 8 if re.fullmatch(r"0\d+", text) else 0)
                value |= number & _INT if number < 0 else number
            elif re.fullmatch(r"[A-Z]\w+", text):
                self.result.notes[f"unknown constant {text}"] += 1
        return value


def _split(text: str) -> list[str]:
    """Arguments of a call, up to its closing bracket."""
    found: list[str] = []
    depth, begin, at = 0, 0, 0
    while at < len(text):
        letter = text[at]
        if letter == '"':
            string = _STRING.match(text, at)
            at = string.end() if string else len(text)
            continue
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            if not depth:
                break
            depth -= 1
        elif letter == "," and not depth:
            found.append(text[begin:at].strip())
            begin = at + 1
        at += 1
    last = text[begin:at].strip()
    return [*found, last] if last else found


def recording_lines(conversion: Conversion) -> Iterator[str]:
    """The lines of a recording, with the microseconds between them."""
    entries = sorted(filter(None, conversion.lines), key=lambda entry: entry[0])
    before = entries[0][0] if entries else 0
    for now, line in entries:
        yield f"{now - before} {line}"
        before = now
