"""What goes wrong, with the errno that XPMEM's ioctls return, and the constants of its API."""

from __future__ import annotations

import errno
from typing import Final

from mmunotify import BadAddress, MmuNotifyError

RDONLY: Final = 0x1
"""`get`: read through the permit."""
RDWR: Final = 0x2
"""`get`: read and write through the permit."""
PERMIT_MODE: Final = 0x1
"""`make` and `get`: the permit is an octal mode, checked as System V IPC does."""
MAXADDR_SIZE: Final = (1 << 64) - 1
"""`make(0, MAXADDR_SIZE)` exports everything, whatever will be mapped there."""
VERSION: Final = 0x0001_0000
"""What `version` returns: major, minor and revision in 16, 8 and 8 bits."""
XPMEM_ERRNO_NOPROC: Final = 2004
"""The thread group has no address space to export: it was opened without one, or has exited."""


class XpmemError(MmuNotifyError, OSError):
    """An operation was refused: `errno` as XPMEM's, the text says what was asked and found."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, what)


class ExporterGone(XpmemError):
    """EHOSTDOWN: the exporting partition has not answered for as long as the importer is patient.

    Its memory is gone if it is dead, and what was read from it before is no longer vouched for.
    """

    def __init__(self, what: str) -> None:
        super().__init__(errno.EHOSTDOWN, what)


class FencedError(XpmemError):
    """ECONNRESET: the exporter took this partition for dead while it had a store under way.

    The store may have happened or not. Reads never raise this: they attach again and go on.
    """

    def __init__(self, what: str) -> None:
        super().__init__(errno.ECONNRESET, what)


def bus_error(what: str, address: int) -> BadAddress:
    """SIGBUS: the segment, or the page of it, is gone."""
    return BadAddress(what, signal="BUS", code=2, address=address)
