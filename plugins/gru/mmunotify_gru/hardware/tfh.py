"""TLB fault handles: how a control block says that it misses, and how it is helped.

Each control block has one. While it is in a miss state the block stands still. The operating system
reads the handle, finds a translation, and writes it back with a restart.

Between that read and the restart an invalidate may run whose range has the missing address, and
then the translation that was found is stale. The handle notices: such an invalidate disarms it, and
the restart is carried out without its translation, so that the block runs on and misses again.
Without this rule no order of checks in software would close the race (I-INFLIGHT).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mmunotify import Translation

    from .cbr import Cbr


class TfhState(enum.Enum):
    """What a handle waits for."""

    INACTIVE = enum.auto()
    """Its control block runs, or has nothing to do."""
    IDLE = enum.auto()
    """The block was taken away from under its miss."""
    MISS_FMM = enum.auto()
    """A miss that was announced by interrupt: fault map mode."""
    MISS_UPM = enum.auto()
    """A miss for which the user has to call the operating system: user polling mode."""


class TfhStatus(enum.Enum):
    """How the last operation on a handle went."""

    IDLE = enum.auto()
    EXCEPTION = enum.auto()
    """A miss waits to be served."""


# Members of an enum as globals: looked up in their class they cost more than the rest (3.11).
_INACTIVE: Final = TfhState.INACTIVE
_IDLE: Final = TfhState.IDLE
_MISS_UPM: Final = TfhState.MISS_UPM
_NO_MISS: Final = TfhStatus.IDLE
_EXCEPTION: Final = TfhStatus.EXCEPTION


class Tfh:
    """The fault handle of one control block."""

    __slots__ = ("address", "cbr", "disarmed", "missing", "state", "status", "tag", "write")

    def __init__(self, cbr: Cbr) -> None:
        self.cbr: Final = cbr
        self.state = _INACTIVE
        self.status = _NO_MISS
        self.missing = False
        """Whether a miss waits to be served: the state is MISS_FMM or MISS_UPM."""
        self.address = 0
        """missvaddr: the address that has no translation."""
        self.tag = 0
        """missasid: ASID and region; 0 where the context has none."""
        self.write = False
        """Whether the miss was a store (TFHCAUSE_TLB_MOD)."""
        self.disarmed = 0
        """Counts the invalidates that hit the miss; what `read` gives and a restart compares."""

    def raise_miss(self, tag: int, address: int, write: bool, state: TfhState) -> None:
        """The hardware's side: the block has missed."""
        self.address = address
        self.tag = tag
        self.write = write
        self.state = state
        self.status = _EXCEPTION
        self.missing = True
        self.cbr.chiplet.missing[self.cbr.number] = self

    def read(self) -> int:
        """Read the handle into the cache; the answer belongs to the restart that follows it."""
        return self.disarmed

    def write_restart(self, seen: int, entry: Translation) -> bool:
        """Drop `entry` in and let the block run on; False if an invalidate has disarmed the handle.

        Real software is not told which; the caller uses it to count and for nothing else.
        """
        cbr = self.cbr
        cbr.chiplet.operations["tfh_write_restart"] += 1
        if not self.missing:
            return False
        accepted = self.accepts(seen)
        if accepted:
            cbr.chiplet.tlb.insert(self.tag, entry)
        self._over()
        if not cbr.running:
            cbr.resume()
        return accepted

    def accepts(self, seen: int) -> bool:
        """The rule: no invalidate hit this miss since it was read."""
        return seen == self.disarmed

    def write_only(self, seen: int, entry: Translation) -> bool:
        """Drop a further entry in for the same block, which stands still (preloading)."""
        self.cbr.chiplet.operations["tfh_write_only"] += 1
        accepted = self.missing and self.accepts(seen)
        if accepted:
            self.cbr.chiplet.tlb.insert(self.tag, entry)
        return accepted

    def user_polling_mode(self) -> None:
        """The user shall call the operating system: its control block says CALL_OS."""
        self.cbr.chiplet.operations["tfh_user_polling_mode"] += 1
        self.state = _MISS_UPM
        self.cbr.call_os()

    def exception(self) -> None:
        """There is no translation: the instruction ends with OS_FATAL_TLB_FAULT."""
        self.cbr.chiplet.operations["tfh_exception"] += 1
        self._over()
        self.cbr.fatal(self.address)

    def invalidated(self, tag: int, start: int, end: int, contexts: int) -> None:
        """The hardware's side: an invalidate of [start, end) runs for these contexts."""
        if self.tag == tag and contexts >> self.cbr.context & 1 and start <= self.address < end:
            self.disarmed += 1

    def idle(self) -> None:
        """The block is taken away: whoever has read the handle restarts nobody."""
        if self.missing:
            self._over()
            self.disarmed += 1
            self.state = _IDLE

    def _over(self) -> None:
        self.state = _INACTIVE
        self.status = _NO_MISS
        self.missing = False
        del self.cbr.chiplet.missing[self.cbr.number]
