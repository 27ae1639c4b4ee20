"""The log of a replay: sections as they begin and end, and callbacks as they end, a line each.

A callback's line has its `duration_ns`, so that its beginning needs no line of its own. Who only
watches for the replay itself is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from mmunotify import Record
from mmunotify.log import CALLBACK

from .history import Watcher
from .matching import Witness

if TYPE_CHECKING:
    from pathlib import Path

_LINES: Final = 4096
_Line: Final = msgspec.defstruct(
    "_Line", [(key, Any, None) for key in Record._fields], omit_defaults=True
)
WATCHERS: Final = frozenset((Witness.__qualname__, Watcher.__qualname__))
"""By the name that a subscription has."""


class TraceLog:
    """A context manager; what was appended is in the file when it is left, however that happens."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._encode = msgspec.json.Encoder().encode
        self._lines: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._write()
        self._file.close()

    def append(self, record: Record) -> None:
        """Log an event; a key that does not apply is left out."""
        if record.event == CALLBACK and (record.phase == "start" or record.driver in WATCHERS):
            return
        self._lines.append(self._encode(_Line(*record)))
        if len(self._lines) >= _LINES:
            self._write()

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        self._file.write(b"".join([line + b"\n" for line in lines]))
