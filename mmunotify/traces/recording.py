"""One recording: its header, checked, and its events in blocks, in constant memory.

The file is text, plain or compressed with xz: a line `#{json}`, then one event per line. A file
that ends too early is read up to its last whole line, and `truncated` says so.
"""

from __future__ import annotations

import json
import lzma
from typing import TYPE_CHECKING, Any, Final

import attrs

from mmunotify.errors import RecordingError

from .decode import Block, decode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

_XZ: Final = b"\xfd7zXZ\0"
_CHUNK: Final = 1 << 16
_BLOCK: Final = 1 << 20
_LONGEST_LINE: Final = 1 << 16


@attrs.frozen
class Header:
    """What the first line says of the whole run."""

    command: tuple[str, ...]
    wall_ms: int
    """From the start of the command to its end."""
    root: int
    """The task that the command was started in."""
    events: int
    """Lines that follow."""
    lost: int
    """Events that the kernel could not record."""
    vm: bool
    """Whether there was a VM in each process, without which the kernel announces nothing."""


_HEADER: Final[dict[str, tuple[type, str]]] = {
    "cmd": (list, "a list of words"),
    "wall_ms": (int, "milliseconds"),
    "root": (int, "a task number"),
    "events": (int, "a number of lines"),
    "lost": (list, "two numbers"),
    "vm": (bool, "true or false"),
}


FORMAT: Final = 1
"""The latest version that is understood. A file that does not say is of the first."""


class Recording:
    """A recording to be read once. Raises RecordingError, which names file, line and column."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self._chunks = _chunks(path)
        self._rest = b""
        self._ended = False
        self.header: Final = self._read_header()
        self.read = 0
        """Events read so far."""
        self.truncated = False
        """The file ended before its last event."""

    @property
    def name(self) -> str:
        """The file's name without what says how it is stored."""
        return self.path.name.removesuffix(".xz").removesuffix(".mmt")

    def blocks(self) -> Iterator[Block]:
        """The events, some thousands at a time."""
        while True:
            more = self._fill(_BLOCK)
            end = self._rest.rfind(b"\n", 0, _BLOCK) + 1
            if end:
                block = decode(self._rest[:end], self.read + 2, self.path)
                self._rest = self._rest[end:]
                self.read += len(block)
                yield block
            elif more:
                raise RecordingError(
                    f"{self.path}:{self.read + 2}:1: expected a line of less than {_BLOCK} bytes"
                )
            else:
                break
        self.truncated = bool(self._rest) or self.read < self.header.events
        if self.read > self.header.events:
            raise RecordingError(
                f"{self.path}: {self.read} events: expected {self.header.events}, as line 1 says"
            )

    def _fill(self, size: int) -> bool:
        """Have `size` bytes at hand if the file has them; False at its end."""
        parts = [self._rest]
        have = len(self._rest)
        while have < size and not self._ended:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._ended = True
            else:
                parts.append(chunk)
                have += len(chunk)
        self._rest = b"".join(parts)
        return not self._ended

    def _read_header(self) -> Header:
        self._fill(_LONGEST_LINE)
        line, newline, self._rest = self._rest.partition(b"\n")
        where = f"{self.path}:1"
        if not line.startswith(b"#{") or not newline:
            raise RecordingError(
                f"{where}:1: expected a line #{{...}}, the header of a recording, "
                f"found {line[:20].decode(errors='replace')!r}"
            )
        try:
            fields: dict[str, Any] = json.loads(line[1:])
        except ValueError as error:
            at = getattr(error, "colno", 1) + 1
            raise RecordingError(f"{where}:{at}: expected JSON after #: {error}") from None
        version = fields.get("format", FORMAT)
        if type(version) is not int or not 1 <= version <= FORMAT:
            raise RecordingError(
                f"{where}:2: expected 'format', a version up to {FORMAT}, found {version!r}"
            )
        for key, (kind, meaning) in _HEADER.items():
            value = fields.get(key)
            if type(value) is not kind or (type(value) is int and value < 0):
                found = f"found {value!r}" if key in fields else "found no such key"
                raise RecordingError(f"{where}:2: expected {key!r}, {meaning}, {found}")
        return Header(
            command=tuple(map(str, fields["cmd"])),
            wall_ms=fields["wall_ms"],
            root=fields["root"],
            events=fields["events"],
            lost=_lost(fields["lost"], where),
            vm=fields["vm"],
        )


def _lost(value: list[Any], where: str) -> int:
    if not all(isinstance(count, int) for count in value):
        raise RecordingError(f"{where}:2: expected 'lost', two numbers, found {value!r}")
    return sum(value)


def _chunks(path: Path) -> Iterator[bytes]:
    """The text of the file; it ends early where the compressed data does."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise RecordingError(f"{path}: expected a recording: {error.strerror}") from error
    with file:
        if file.peek(len(_XZ)).startswith(_XZ):
            yield from _unpacked(file, path)
        else:
            while chunk := file.read(_CHUNK):
                yield chunk


def _unpacked(file: BinaryIO, path: Path) -> Iterator[bytes]:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        while not unpacker.eof:
            packed = file.read(_CHUNK) if unpacker.needs_input else b""
            if unpacker.needs_input and not packed:
                return
            yield unpacker.decompress(packed, max_length=_BLOCK)
    except lzma.LZMAError as error:
        raise RecordingError(
            f"{path}: expected xz data up to byte {file.tell()}: {error}"
        ) from error
