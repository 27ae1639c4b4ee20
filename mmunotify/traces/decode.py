"""Lines of a recording into columns, a block at a time.

A line is `<dt> <kind> <tid> <fields...>`: microseconds since the line before, one letter, a task.
Kinds whose fields are numbers become columns in a few dozen numpy operations per block; the rest
are parsed line by line, and so is everything of a block in which something is wrong, to say where.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import numpy as np

from mmunotify.errors import RecordingError
from mmunotify.ranges import PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Numbers: TypeAlias = npt.NDArray[np.int64]
    Words: TypeAlias = npt.NDArray[np.uint64]
    Bytes: TypeAlias = npt.NDArray[np.uint8]

_DEC_MAX: Final = 18
_HEX_MAX: Final = 16

HEX: Final = "hexadecimal number of at most 16 digits"
DEC: Final = "decimal number"
SIZE: Final = "decimal number, or a negative one"
KIND: Final = "letter of > < o v f F u a t m n x e g s"
COPY: Final = "letter of S F E"
WORD: Final = "word"

NUMERIC: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "f": (("address", HEX), ("ip", HEX), ("code", HEX)),
    "F": (("address", HEX), ("code", HEX)),
    "u": (("start", HEX), ("end", HEX)),
    "a": (("start", HEX), ("end", HEX)),
    "t": (("address", HEX),),
    "g": (("address", HEX), ("code", HEX)),
    "s": (("gfn", HEX), ("spte", HEX)),
    "m": (("mm", HEX), ("member", DEC), ("size", SIZE)),
    "n": (("child", DEC), ("flags", HEX)),
    "e": (),
}
"""The fields of the kinds that become columns, in order."""
_COLUMNS: Final = {"f": (0, 2)}
"""Which fields columns `a` and `b` hold, where not the first two: nobody asks for a fault's ip."""
TEXT: Final = "><ovx"

_DIGITS: Final = np.full(256, 255, np.uint8)
for _value, _digit in enumerate(b"0123456789abcdef"):
    _DIGITS[_digit] = _value
_KNOWN: Final = np.zeros(256, np.bool_)
_KNOWN[list("".join(NUMERIC).encode() + TEXT.encode())] = True
_POWERS: Final = 10 ** np.arange(_DEC_MAX - 1, -1, -1, dtype=np.int64)


@attrs.define
class Mapping:
    """An `o` line: a mapping that the kernel made or changed. Bytes."""

    start: int
    end: int
    prot: str
    offset: int
    inode: int
    path: str


@attrs.define
class MapsLine:
    """A `v` line: one mapping of a copy of /proc/self/maps. Bytes."""

    when: str
    """S at the program's start, F in a forked child, E at exit."""
    start: int
    end: int
    perms: str
    path: str


@attrs.define
class Call:
    """A `>` line: a system call was entered; or a `<` line: its result is `args[0]`."""

    name: str
    args: tuple[int, ...]


Payload: TypeAlias = "Call | Mapping | MapsLine | str | None"


@attrs.define
class Block:
    """Some consecutive events as columns of equal length."""

    line: int
    """The line number of the first event."""
    micros: Numbers
    """Microseconds since the event before."""
    kinds: Bytes
    """The letters."""
    tids: Numbers
    a: Words
    """The first field (`f`: address), where fields are numbers."""
    b: Words
    """The second (`f`: code)."""
    texts: dict[int, Payload]
    """By index: what a line of the other kinds says."""

    def __len__(self) -> int:
        return len(self.kinds)

    def runs(self) -> tuple[Numbers, Numbers]:
        """Where runs begin, and where they end: the index of their last event.

        A run are faults of one task on the next page each, alike, or ageing likewise; an event of
        another kind is a run of one. What KVM installed (`s`) changes nothing and is left out.
        """
        told = np.flatnonzero(self.kinds != ord("s"))
        kinds, tids, codes = self.kinds[told], self.tids[told], self.b[told]
        pages = self.a[told] >> np.uint64(PAGE_SHIFT)
        ages = kinds[1:] == ord("a")
        joins = (
            (kinds[1:] == kinds[:-1])
            & ((kinds[1:] == ord("f")) | ages)
            & (tids[1:] == tids[:-1])
            & (pages[1:] == pages[:-1] + np.uint64(1))
            & (ages | (codes[1:] == codes[:-1]))
        )
        begins = np.ones(len(told), np.bool_)
        begins[1:] = ~joins
        ends = np.ones(len(told), np.bool_)
        ends[:-1] = begins[1:]
        return told[begins], told[ends]


def decode(text: bytes, line: int, path: object) -> Block:
    """Decode whole lines, of which the first is number `line` of the recording at `path`.

    Raises RecordingError with the line and the column of the first thing that is wrong.
    """
    columns = _decode(text, line)
    if columns is None:
        for number, content in enumerate(text.split(b"\n")[:-1], line):
            check_line(content, number, path)
        raise AssertionError(f"{path}: lines from {line} on: two decoders, two opinions")
    return columns


def _decode(text: bytes, line: int) -> Block | None:
    """The columns, or None if anything is wrong."""
    # A frame on the left, so that numbers can be gathered right-aligned without a bound check.
    data = np.frombuffer(b"\0" * _DEC_MAX + text, np.uint8)
    separators = np.flatnonzero((data == 32) | (data == 10))
    ends = np.flatnonzero(data[separators] == 10)
    first = np.concatenate((np.zeros(1, np.int64), ends[:-1] + 1))
    tokens = ends - first + 1
    if not len(ends) or (tokens < 3).any():
        return None
    starts = np.concatenate((np.array([_DEC_MAX]), separators[ends[:-1]] + 1))
    kind_at = separators[first] + 1
    kinds = data[kind_at]
    if (separators[first + 1] != kind_at + 1).any() or not _KNOWN[kinds].all():
        return None
    micros = _decimals(data, starts, separators[first])
    tids = _decimals(data, kind_at + 2, separators[first + 2])
    if micros is None or tids is None:
        return None
    a = np.zeros(len(ends), np.uint64)
    b = np.zeros(len(ends), np.uint64)
    for letter, fields in NUMERIC.items():
        rows = np.flatnonzero(kinds == ord(letter))
        if not len(rows):
            continue
        if (tokens[rows] != len(fields) + 3).any():
            return None
        slots = _COLUMNS.get(letter, (0, 1))
        for index, (_, form) in enumerate(fields):
            begin = separators[first[rows] + 2 + index] + 1
            end = separators[first[rows] + 3 + index]
            if form is SIZE:
                begin = begin + (data[begin] == ord("-"))
            values = (
                _hexadecimals(data, begin, end) if form is HEX else (_decimals(data, begin, end))
            )
            if values is None:
                return None
            if index in slots:
                (a, b)[slots.index(index)][rows] = values
    texts: dict[int, Payload] = {}
    for row in np.flatnonzero(np.isin(kinds, list(TEXT.encode()))).tolist():
        content = text[starts[row] - _DEC_MAX : separators[ends[row]] - _DEC_MAX]
        try:
            texts[row] = _PAYLOADS[chr(kinds[row])](
                content.decode(errors="surrogateescape").split(" ")[3:]
            )
        except ValueError:
            return None
    return Block(line, micros, kinds, tids, a, b, texts)


def _gather(data: Bytes, begin: Numbers, end: Numbers, width: int) -> Bytes | None:
    """Digits of tokens, right-aligned in `width` columns and filled with zeros on the left."""
    lengths = end - begin
    if (lengths < 1).any() or (lengths > width).any():
        return None
    places = np.arange(-width, 0)
    digits: Bytes = _DIGITS[data[end[:, None] + places]]
    digits[places < -lengths[:, None]] = 0
    return digits


def _hexadecimals(data: Bytes, begin: Numbers, end: Numbers) -> Words | None:
    digits = _gather(data, begin, end, _HEX_MAX)
    if digits is None or (digits > 15).any():
        return None
    packed = digits[:, 0::2] << 4 | digits[:, 1::2]
    return np.ascontiguousarray(packed).view(">u8")[:, 0].astype(np.uint64)


def _decimals(data: Bytes, begin: Numbers, end: Numbers) -> Numbers | None:
    width = int((end - begin).max())
    digits = _gather(data, begin, end, min(width, _DEC_MAX))
    if digits is None or (digits > 9).any():
        return None
    values: Numbers = digits @ _POWERS[-width:]
    return values


# ---------------------------------------------------------------------- line by line


def _call(words: list[str]) -> Call:
    # A call without arguments has the blank before them all the same.
    name, *args = words
    return Call(_word(name), tuple([int(word, 16) for word in args if word]))


def _result(words: list[str]) -> Call:
    name, result = words
    return Call(_word(name), (int(result, 16),))


def _mapping(words: list[str]) -> Mapping:
    start, end, prot, offset, inode, *path = words
    return Mapping(
        int(start, 16), int(end, 16), _word(prot), int(offset, 16), int(inode), " ".join(path)
    )


def _maps_line(words: list[str]) -> MapsLine:
    when, start, end, perms, _offset, _inode, *path = words
    if when not in {"S", "F", "E"}:
        raise ValueError(when)
    return MapsLine(when, int(start, 16), int(end, 16), _word(perms), " ".join(path))


def _word(word: str) -> str:
    if not word:
        raise ValueError(word)
    return word


_PAYLOADS: Final[dict[str, Callable[[list[str]], Payload]]] = {
    ">": _call,
    "<": _result,
    "o": _mapping,
    "v": _maps_line,
    "x": " ".join,
}
_FIELDS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    **NUMERIC,
    ">": (("system call", WORD),),
    "<": (("system call", WORD), ("result", HEX)),
    "o": (("start", HEX), ("end", HEX), ("protection", WORD), ("offset", HEX), ("inode", DEC)),
    "v": (
        *(("copy", COPY), ("start", HEX), ("end", HEX), ("permissions", WORD)),
        *(("offset", HEX), ("inode", DEC)),
    ),
    "x": (),
}
_OPEN: Final = "oxv"
"""Kinds that end in a path, which may have blanks."""


def check_line(content: bytes, number: int, path: object) -> None:
    """Check line `number`, without its newline; RecordingError says what is wrong in it, where."""
    words = content.decode(errors="surrogateescape").split(" ")
    due = [("microseconds", DEC), ("kind", KIND), ("task", DEC)]
    kind = words[1] if len(words) > 1 else ""
    if kind in _FIELDS:
        due += _FIELDS[kind]
    if kind == ">":
        while len(words) > len(due) and not words[-1]:
            words.pop()
        due += [("argument", HEX)] * (len(words) - len(due))
    column = 1
    for index, (name, form) in enumerate(due):
        word = words[index] if index < len(words) else None
        if word is None or not _FORMS[form](word):
            found = repr(word)
            if word is None:
                column, found = column - 1, "the end of the line"
            raise RecordingError(
                f"{path}:{number}:{column}: expected {name}, a {form}, found {found}"
            )
        column += len(word) + 1
    if len(words) > len(due) and kind not in _OPEN:
        raise RecordingError(
            f"{path}:{number}:{column}: expected the end of the line after the "
            f"{len(due) - 3} fields of {kind!r}, found {words[len(due)]!r}"
        )


_FORMS: Final[dict[str, Callable[[str], bool]]] = {
    HEX: lambda word: re.fullmatch(r"[0-9a-f]{1,16}", word) is not None,
    DEC: lambda word: re.fullmatch(r"[0-9]{1,18}", word) is not None,
    SIZE: lambda word: re.fullmatch(r"-?[0-9]{1,18}", word) is not None,
    KIND: lambda word: word in _FIELDS,
    COPY: lambda word: word in {"S", "F", "E"},
    WORD: bool,
}
