"""Lines of a recording into columns, a block at a time.

A line is `<dt> <kind> <tid> <fields...>`: microseconds since the line before, one letter, a task.
Numbers become columns in a dozen numpy operations per block and field, eight digits at a time in
the bytes of a word. Calls and mappings, which have words as well, are parsed line by line, and so
is everything of a block in which something is wrong, to say where.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import numpy as np

from mmunotify.errors import RecordingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    Numbers: TypeAlias = npt.NDArray[np.int64]
    Words: TypeAlias = npt.NDArray[np.uint64]
    Bytes: TypeAlias = npt.NDArray[np.uint8]

HEX: Final = "hexadecimal number of at most 16 digits"
DEC: Final = "decimal number"
SIZE: Final = "decimal number, or a negative one"
KIND: Final = "letter of > < o v f F u a t m n x e g s"
COPY: Final = "letter of S F E"
WORD: Final = "word"

FIELDS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
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
    ">": (("system call", WORD),),
    "<": (("system call", WORD), ("result", HEX)),
    "o": (("start", HEX), ("end", HEX), ("protection", WORD), ("offset", HEX), ("inode", DEC)),
    "v": (
        *(("copy", COPY), ("start", HEX), ("end", HEX), ("permissions", WORD)),
        *(("offset", HEX), ("inode", DEC)),
    ),
    "x": (),
}
"""The fields of each kind of line, in order."""
_COLUMNS: Final = {"f": (0, 2), "v": (1, 2), "<": (1,)}
"""Which fields columns `a` and `b` hold, where not the first two: nobody asks for a fault's ip."""
_OPEN: Final = frozenset("oxv>")
"""Kinds that end in a path, which may have blanks, or in arguments."""

_FRAME: Final = 24
"""Bytes before the text, so that whole words can be read backwards from the end of any number."""
_DIGIT: Final = 0x0F
_NOT_DEC: Final = 0x10
_NOT_HEX: Final = 0x20
_NEITHER: Final = _NOT_DEC | _NOT_HEX
_BLANK: Final = 0x40 | _NEITHER
_NEWLINE: Final = 0x80 | _BLANK
_CLASSES: Final = bytes(
    int(chr(byte)) if chr(byte) in "0123456789"
    else _NOT_DEC | int(chr(byte), 16) if chr(byte) in "abcdef"
    else {ord(" "): _BLANK, ord("\n"): _NEWLINE}.get(byte, _NEITHER)
    for byte in range(256)
)  # fmt: skip
"""What a byte is: a digit with its value, what it is no digit of, a separator."""
_KNOWN: Final = np.zeros(256, np.bool_)
_KNOWN[list("".join(FIELDS).encode())] = True
_COPIES: Final = np.frombuffer(b"SFE", np.uint8)


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
class Call:
    """A `>` line: a system call was entered."""

    name: str
    args: tuple[int, ...]


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
    """The first number (`f`: address, `v`: start, `<`: result)."""
    b: Words
    """The second (`f`: code)."""
    texts: dict[int, Call | Mapping]
    """By index: what a line says that has words (`>`, `o`)."""

    def __len__(self) -> int:
        return len(self.kinds)


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
    framed = b"\0" * _FRAME + text
    data = np.frombuffer(framed, np.uint8)
    classes = np.frombuffer(framed.translate(_CLASSES), np.uint8)
    separators = np.flatnonzero(classes >= _BLANK)
    ends = np.flatnonzero(classes[separators] == _NEWLINE)
    first = np.concatenate((np.zeros(1, np.int64), ends[:-1] + 1))
    tokens = ends - first + 1
    if not len(ends) or (tokens < 3).any():
        return None
    starts = np.concatenate((np.array([_FRAME]), separators[ends[:-1]] + 1))
    kind_at = separators[first] + 1
    kinds = data[kind_at]
    if (separators[first + 1] != kind_at + 1).any() or not _KNOWN[kinds].all():
        return None
    numbers = Numbering(classes)
    micros = numbers.decimal(starts, separators[first])
    tids = numbers.decimal(kind_at + 2, separators[first + 2])
    if micros is None or tids is None:
        return None
    a = np.zeros(len(ends), np.uint64)
    b = np.zeros(len(ends), np.uint64)
    texts: dict[int, Call | Mapping] = {}
    for letter, fields in FIELDS.items():
        rows = np.flatnonzero(kinds == ord(letter))
        if not len(rows):
            continue
        extra = tokens[rows] - (len(fields) + 3)
        if (extra < 0).any() or (letter not in _OPEN and extra.any()):
            return None
        slots = _COLUMNS.get(letter, (0, 1))
        read: list[Words] = []
        at = first[rows] + 2
        end = separators[at]
        for index, (_, form) in enumerate(fields, 1):
            begin, end = end + 1, separators[at + index]
            if form is WORD:
                right = bool((end > begin).all())
            elif form is COPY:
                right = bool((end == begin + 1).all() and np.isin(data[begin], _COPIES).all())
            elif index - 1 in slots or letter == "o":
                values = (numbers.hexadecimal if form is HEX else numbers.decimal)(begin, end)
                right = values is not None
                if values is not None:
                    read.append(values)
                    if index - 1 in slots:
                        (a, b)[slots.index(index - 1)][rows] = values
            else:
                if form is SIZE:
                    begin = begin + (data[begin] == ord("-"))
                right = numbers.are_numbers(begin, end, hexadecimal=form is HEX)
            if not right:
                return None
        if letter == ">":
            calls = _calls(framed, rows, first[rows] + 3, ends[rows], separators, numbers)
            if calls is None:
                return None
            texts.update(calls)
        elif letter == "o":
            texts.update(_mappings(framed, rows, first[rows], ends[rows], separators, read))
    return Block(line, micros.view(np.int64), kinds, tids.view(np.int64), a, b, texts)


def _calls(
    framed: bytes,
    rows: Numbers,
    names: Numbers,
    ends: Numbers,
    separators: Numbers,
    numbers: Numbering,
) -> Iterator[tuple[int, Call]] | None:
    """By row, of calls whose names end at separators `names`; None if an argument is no number."""
    # Call by call, which separators are before an argument.
    counts = ends - names
    last = counts.cumsum()
    before = np.repeat(names, counts) + np.arange(int(last[-1])) - np.repeat(last - counts, counts)
    begin, end = separators[before] + 1, separators[before + 1]
    # A call without arguments has the blank before them all the same.
    blank = np.flatnonzero(begin == end)
    blank = blank[np.isin(blank, last - 1)]
    counts[np.searchsorted(last, blank, "right")] -= 1
    begin, end = np.delete(begin, blank), np.delete(end, blank)
    arguments: list[int] = []
    if len(begin):
        values = numbers.hexadecimal(begin, end)
        if values is None:
            return None
        arguments = values.tolist()
    last = counts.cumsum()
    words = zip(
        rows.tolist(),
        (separators[names - 1] + 1).tolist(),
        separators[names].tolist(),
        (last - counts).tolist(),
        last.tolist(),
        strict=True,
    )
    return (
        (row, Call(framed[begin:end].decode(errors="surrogateescape"), tuple(arguments[low:high])))
        for row, begin, end, low, high in words
    )


def _mappings(
    framed: bytes,
    rows: Numbers,
    first: Numbers,
    ends: Numbers,
    separators: Numbers,
    read: list[Words],
) -> Iterator[tuple[int, Mapping]]:
    """By row, of `o` lines whose first separators are `first` and whose numbers have been read."""
    words = zip(
        rows.tolist(),
        *(column.tolist() for column in read),
        *((separators[first + at] + 1).tolist() for at in (4, 7)),
        separators[first + 5].tolist(),
        separators[ends].tolist(),
        strict=True,
    )
    for row, start, end, offset, inode, prot, path, prot_end, path_end in words:
        yield (
            row,
            Mapping(
                start,
                end,
                framed[prot:prot_end].decode(errors="surrogateescape"),
                offset,
                inode,
                # No path, no blank before it.
                framed[path:path_end].decode(errors="surrogateescape"),
            ),
        )


class Numbering:
    """Numbers out of a text, many at once: eight digits are the eight bytes of a word.

    The text is given as the classes of its bytes, and begins with `_FRAME` bytes that belong to no
    number. The readers answer None if a token has no digit, too many, or anything else in it.
    """

    def __init__(self, classes: Bytes) -> None:
        # Every position's word, overlapping: a word that ends where a number does is one load.
        self._words = np.ndarray(len(classes) - 7, "<u8", classes, strides=(1,))

    def decimal(self, begin: Numbers, end: Numbers) -> Words | None:
        """Of at most 18 digits."""
        parts = self._parts(begin, end, 18, _NOT_DEC)
        return _sum(parts, _TENS, np.uint64(10**8)) if parts else None

    def hexadecimal(self, begin: Numbers, end: Numbers) -> Words | None:
        """Of at most 16 digits, in lower case."""
        parts = self._parts(begin, end, 16, _NOT_HEX)
        return _sum(parts, _SIXTEENS, np.uint64(1 << 32)) if parts else None

    def are_numbers(self, begin: Numbers, end: Numbers, *, hexadecimal: bool) -> bool:
        """Whether one of the two could read them."""
        most, strange = (16, _NOT_HEX) if hexadecimal else (18, _NOT_DEC)
        return bool(self._parts(begin, end, most, strange))

    def _parts(self, begin: Numbers, end: Numbers, most: int, strange: int) -> list[Words]:
        """The last eight digits of each number, those before, and so on; empty if one is none."""
        lengths = end - begin
        longest = int(lengths.max())
        if int(lengths.min()) < 1 or longest > most:
            return []
        parts = []
        for done in range(0, longest, 8):
            # What is left of this word's own digits belongs to somebody else: mask it.
            part = self._words[end - (done + 8)] & _MASKS[lengths + (16 - done)]
            if int(np.bitwise_or.reduce(part)) & _every(strange):
                return []
            parts.append(part)
        return parts


def _sum(parts: list[Words], bases: tuple[np.uint64, ...], scale: np.uint64) -> Words:
    total: Words | None = None
    for part in reversed(parts):
        value = part & _DIGITS
        # A base times each digit and the next one: the sum is where the next one was.
        for base, shift, kept in zip(bases, _SHIFTS, _KEPT, strict=True):
            value *= base
            value >>= shift
            value &= kept
        total = value if total is None else total * scale + value
    assert total is not None
    return total


def _every(byte: int) -> int:
    return byte * 0x0101_0101_0101_0101


_MASKS: Final = np.array(
    [(1 << 64) - (1 << 8 * (8 - min(max(kept - 16, 0), 8))) for kept in range(35)], np.uint64
)
"""By 16 more than the digits that are left: which bytes of a word, its last ones, are digits."""
_DIGITS: Final = np.uint64(_every(_DIGIT))
_SHIFTS: Final = tuple(map(np.uint64, (8, 16, 32)))
_KEPT: Final = tuple(map(np.uint64, (0x00FF_00FF_00FF_00FF, 0x0000_FFFF_0000_FFFF, 0xFFFF_FFFF)))
_TENS: Final = tuple(map(np.uint64, (1 + (10 << 8), 1 + (100 << 16), 1 + (10**4 << 32))))
_SIXTEENS: Final = tuple(map(np.uint64, (1 + (1 << 12), 1 + (1 << 24), 1 + (1 << 48))))


# ---------------------------------------------------------------------- line by line


def check_line(content: bytes, number: int, path: object) -> None:
    """Check line `number`, without its newline; RecordingError says what is wrong in it, where."""
    words = content.decode(errors="surrogateescape").split(" ")
    due = [("microseconds", DEC), ("kind", KIND), ("task", DEC)]
    kind = words[1] if len(words) > 1 else ""
    if kind in FIELDS:
        due += FIELDS[kind]
    if kind == ">":
        if len(words) > len(due) and not words[-1]:
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
    if len(words) > len(due) and kind not in _OPEN - {">"}:
        raise RecordingError(
            f"{path}:{number}:{column}: expected the end of the line after the "
            f"{len(due) - 3} fields of {kind!r}, found {words[len(due)]!r}"
        )


_FORMS: Final[dict[str, Callable[[str], bool]]] = {
    HEX: lambda word: re.fullmatch(r"[0-9a-f]{1,16}", word) is not None,
    DEC: lambda word: re.fullmatch(r"[0-9]{1,18}", word) is not None,
    SIZE: lambda word: re.fullmatch(r"-?[0-9]{1,18}", word) is not None,
    KIND: lambda word: word in FIELDS,
    COPY: lambda word: word in {"S", "F", "E"},
    WORD: bool,
}
