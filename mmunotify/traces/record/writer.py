"""A recording as a file: the header, which counts the lines, and the lines.

They are kept in a file without a name until the last one is known, so that a recorder that is
killed leaves nothing. FILE appears when it is whole.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import tempfile
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from mmunotify.errors import RecorderError
from mmunotify.traces.recording import FORMAT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

_CHUNK: Final = 1 << 18
_PRESET: Final = 3


class RecordingWriter:
    """Lines, and the file that they become. Raises RecorderError where there is no room.

    `body` is where the lines are kept meanwhile (`scratch`).
    """

    def __init__(self, path: Path, body: BinaryIO) -> None:
        self.path: Final = path
        self.events = 0
        """Lines so far."""
        self._body: Final = body

    def write(self, lines: list[str]) -> None:
        """Append some lines, each without its newline."""
        if not lines:
            return
        text = "\n".join(lines) + "\n"
        with no_room(self.path):
            self._body.write(text.encode(errors="surrogateescape"))
        self.events += len(lines)

    def finish(self, header: Mapping[str, Any], proceed: Callable[[], None] = lambda: None) -> None:
        """Write the file: compressed if its name ends in .xz.

        `proceed` is called now and then, and may raise: then there is no file.
        """
        first = json.dumps({"format": FORMAT, **header, "events": self.events})
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with no_room(self.path):
                compressed = self.path.suffix == ".xz"
                with (
                    lzma.open(part, "wb", preset=_PRESET) if compressed else part.open("wb") as out
                ):
                    out.write(f"#{first}\n".encode())
                    self._body.seek(0)
                    while chunk := self._body.read(_CHUNK):
                        proceed()
                        out.write(chunk)
                part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def scratch(path: Path) -> Iterator[BinaryIO]:
    """A file without a name beside the one that will be written."""
    raw = tempfile.TemporaryFile(dir=path.parent, buffering=0)  # noqa: SIM115 - closed below
    file = io.BufferedRandom(raw, _CHUNK)
    try:
        yield file
    finally:
        # There may be no room for what it still has to write, which is of no use any more.
        with suppress(OSError):
            file.close()


@contextmanager
def no_room(path: Path) -> Iterator[None]:
    """Say which recording it was that could not be written."""
    try:
        yield
    except OSError as error:
        raise RecorderError(f"{path}: cannot be written: {error.strerror}") from error
