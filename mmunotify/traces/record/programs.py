"""What an executable is, as far as it decides how it can be recorded."""

from __future__ import annotations

import os
import stat
import struct
from typing import Final

import attrs

_MAGIC: Final = b"\x7fELF"
_CLASS_32: Final = 1
_PT_INTERP: Final = 3
_HEADER_64: Final = struct.Struct("<16sHHIQQQIHHH")
_PROGRAM_HEADERS: Final = 64


@attrs.frozen
class Program:
    """One executable file."""

    path: str
    narrow: bool
    """Of 32 bits, whose system calls have other numbers."""
    reason: str | None
    """Why nothing can be preloaded into it, or None."""


def program(path: str) -> Program:
    """Look at an executable; one that cannot be read is taken to be ordinary."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(_HEADER_64.size)
            if len(head) < _HEADER_64.size or head[:4] != _MAGIC:
                return Program(path, False, None)
            if head[4] == _CLASS_32:
                return Program(path, True, "a program of 32 bits")
            _, _, _, _, _, begin, _, _, _, size, count = _HEADER_64.unpack(head)
            file.seek(begin)
            table = file.read(size * min(count, _PROGRAM_HEADERS))
        kinds = {struct.unpack_from("<I", table, at)[0] for at in range(0, len(table), size or 1)}
    except (OSError, struct.error):
        return Program(path, False, None)
    if _PT_INTERP not in kinds:
        return Program(path, False, "a static binary")
    if status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        return Program(path, False, "setuid")
    try:
        os.getxattr(path, "security.capability")
    except OSError:
        return Program(path, False, None)
    return Program(path, False, "with file capabilities")
