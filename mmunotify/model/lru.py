"""The LRU lists: append logs whose entries are valid by position.

Adding a run of pages is one slice, and freeing a page costs nothing: an entry counts only while its
frame is on the list (its flags say which) and remembers this position. Stale entries go when the
log is packed. Anonymous and shmem pages (swap-backed) are apart from file pages; each kind has an
inactive and an active list.

A CPU collects up to 31 pages before it changes a list for them, one batch per kind of change, and
each batch holds a reference of its pages: new ones (which count as listed here, `is_new` tells
them), those to activate, to deactivate, that MADV_FREE gave up, and those that a mapping which
was locked lost. A full batch is done by
itself; `drain` does all.

Source: include/linux/mm_inline.h, mm/swap.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from . import frames as fr

if TYPE_CHECKING:
    import numpy.typing as npt

    from .frames import Frames

    Indices = npt.NDArray[np.int64] | npt.NDArray[np.uint32]

INACTIVE_ANON: Final = 0
ACTIVE_ANON: Final = 1
INACTIVE_FILE: Final = 2
ACTIVE_FILE: Final = 3
_BATCH: Final = 31
_FEW: Final = 16
"""Up to so many pages are appended one by one, which is cheaper than vector steps then."""
_STEP: Final = 1 << 15
_LAZY_CLEARS: Final = fr.PG_SWAPBACKED | fr.PG_ACTIVE | fr.PG_REFERENCED
_WHICH: Final = fr.PG_LRU | fr.PG_ACTIVE | fr.PG_SWAPBACKED | fr.PG_UNEVICTABLE
_FLAGS: Final = (
    fr.PG_LRU | fr.PG_SWAPBACKED,
    fr.PG_LRU | fr.PG_SWAPBACKED | fr.PG_ACTIVE,
    fr.PG_LRU,
    fr.PG_LRU | fr.PG_ACTIVE,
)


class _Log:
    __slots__ = ("entries", "head", "slots", "tail")

    def __init__(self, size: int) -> None:
        self.entries: npt.NDArray[np.uint32] = np.zeros(size, np.uint32)
        self.slots: Any = self.entries.data
        self.head = 0
        self.tail = 0


class Lru:
    """The lists of one machine."""

    def __init__(self, frames: Frames) -> None:
        self._frames: Final = frames
        self._positions: Final[npt.NDArray[np.uint32]] = np.zeros(frames.count, np.uint32)
        self._position: Final[Any] = self._positions.data
        self._logs: Final = [_Log(1024) for _ in range(4)]
        # What was put off until `drain`: frames with their generation.
        self._lazy: Final[dict[int, int]] = {}
        self._activate: Final[dict[int, int]] = {}
        self._deactivate: Final[dict[int, int]] = {}
        self._munlock: Final[dict[int, int]] = {}
        # Where the logs ended at the last `drain`: what came since is in the batch of new pages.
        self._drained: Final = [0, 0, 0, 0]

    def append(self, frame: int, which: int = INACTIVE_ANON) -> None:
        """A page whose flags name this list already goes to its young end."""
        log = self._logs[which]
        tail = log.tail
        if tail == len(log.slots):
            self._pack(which, 1)
            tail = log.tail
        log.slots[tail] = frame
        self._position[frame] = tail
        log.tail = tail + 1

    def append_all(self, frames: list[int], which: int) -> None:
        """`append` of some distinct frames, oldest first."""
        if len(frames) > _FEW:
            self._extend(which, np.array(frames, np.int64))
        else:
            for frame in frames:
                self.append(frame, which)

    def append_many(self, frames: Indices, which: int = INACTIVE_ANON) -> None:
        """`append` of distinct frames, oldest first."""
        self._extend(which, frames)

    def _extend(self, which: int, frames: Indices) -> None:
        count = len(frames)
        log = self._logs[which]
        if log.tail + count > len(log.entries):
            self._pack(which, count)
        tail = log.tail
        log.entries[tail : tail + count] = frames
        self._positions[frames] = np.arange(tail, tail + count, dtype=np.uint32)
        log.tail = tail + count

    def add(self, frame: int, *, file: bool) -> None:
        """Put a frame on the inactive list of its kind."""
        self._frames.word[frame] |= fr.PG_LRU
        self.append(frame, INACTIVE_FILE if file else INACTIVE_ANON)

    def move(self, frame: int) -> None:
        """Put a frame at the young end of the list that its flags name now."""
        word = self._frames.word[frame] | fr.PG_LRU
        self._frames.word[frame] = word
        which = (0 if word & fr.PG_SWAPBACKED else 2) + (1 if word & fr.PG_ACTIVE else 0)
        self.append(frame, which)

    def activate(self, frame: int) -> None:
        """A page of an inactive list was used again (folio_activate)."""
        if self.is_new(frame):
            self._frames.word[frame] |= fr.PG_ACTIVE
            self.move(frame)
            return
        self._activate[frame] = self._frames.word[frame] & fr.GEN_MASK
        if len(self._activate) == _BATCH:
            self._drain(self._activate, fr.PG_ACTIVE, fr.PG_REFERENCED)

    def deactivate(self, frames: npt.NDArray[np.int64]) -> None:
        """Active pages are the first candidates for reclaim again (folio_deactivate)."""
        words = self._frames.words[frames]
        self._frames.words[frames] = words & ~np.uint64(fr.PG_REFERENCED)
        able = (words & np.uint64(fr.PG_ACTIVE | fr.PG_UNEVICTABLE)) == np.uint64(fr.PG_ACTIVE)
        words &= np.uint64(fr.GEN_MASK)
        for frame, generation in zip(frames[able].tolist(), words[able].tolist(), strict=True):
            self._deactivate[frame] = generation
            if len(self._deactivate) == _BATCH:
                self._drain(self._deactivate, 0, fr.PG_ACTIVE | fr.PG_REFERENCED)

    def lazyfree(self, frames: npt.NDArray[np.int64]) -> None:
        """Anonymous pages that may be dropped: in batches they lose PG_SWAPBACKED."""
        words = self._frames.words[frames]
        able = (words & np.uint64(fr.PG_SWAPBACKED | fr.PG_SWAPCACHE | fr.PG_UNEVICTABLE)) == (
            np.uint64(fr.PG_SWAPBACKED)
        )
        words &= np.uint64(fr.GEN_MASK)
        for frame, generation in zip(frames[able].tolist(), words[able].tolist(), strict=True):
            self._lazy[frame] = generation
            if len(self._lazy) == _BATCH:
                self._drain(self._lazy, 0, _LAZY_CLEARS)

    def is_pending(self, frame: int) -> bool:
        """Whether a batch that waits to be drained, not that of new pages, holds the page."""
        if not (self._lazy or self._activate or self._deactivate or self._munlock):
            return False
        generation = self._frames.word[frame] & fr.GEN_MASK
        return generation in (
            self._lazy.get(frame), self._activate.get(frame), self._deactivate.get(frame),
            self._munlock.get(frame),
        )  # fmt: skip

    def munlock(self, frame: int) -> None:
        """A mapping that was locked has lost a page that others still map (munlock_folio)."""
        self._munlock[frame] = self._frames.word[frame] & fr.GEN_MASK
        if len(self._munlock) == _BATCH:
            self._munlock.clear()

    def holds(self, frame: int) -> bool:
        """Whether a batch holds the page, once all are drained if it is that of new ones."""
        if self.is_new(frame):
            self.drain()
        return self.is_pending(frame)

    def is_new(self, frame: int) -> bool:
        """Whether the page is in the batch of new ones: not PG_lru in Linux yet."""
        word = self._frames.word[frame]
        which = (0 if word & fr.PG_SWAPBACKED else 2) + (1 if word & fr.PG_ACTIVE else 0)
        tail = self._logs[which].tail
        behind = tail - self._position[frame]
        if not 0 < behind < _BATCH or not word & fr.PG_LRU:
            return False
        if behind > tail - self._drained[which]:
            return False
        anon, active_anon, file, active_file = self._logs
        added = anon.tail + active_anon.tail + file.tail + active_file.tail - sum(self._drained)
        return bool(behind <= added % _BATCH)

    def drain(self) -> None:
        """Do all that was put off to be done in batches (lru_add_drain)."""
        if self._activate:
            self._drain(self._activate, fr.PG_ACTIVE, fr.PG_REFERENCED)
        if self._deactivate:
            self._drain(self._deactivate, 0, fr.PG_ACTIVE | fr.PG_REFERENCED)
        if self._lazy:
            self._drain(self._lazy, 0, _LAZY_CLEARS)
        self._munlock.clear()
        for which, log in enumerate(self._logs):
            self._drained[which] = log.tail

    def _drain(self, batch: dict[int, int], set_: int, clear: int) -> None:
        words = self._frames.word
        frames = [
            frame
            for frame, generation in batch.items()
            if words[frame] & (fr.GEN_MASK | fr.PG_LRU) == generation | fr.PG_LRU
        ]
        batch.clear()
        for frame in frames:
            words[frame] = (words[frame] & ~clear) | set_
        self.put_back(np.array(frames, np.int64))

    def put_back(self, frames: npt.NDArray[np.int64]) -> None:
        """Put distinct frames on the lists that their flags name."""
        if not len(frames):
            return
        words = self._frames.words[frames]
        for which, flags in enumerate(_FLAGS):
            mine = (words & np.uint64(_WHICH)) == np.uint64(flags)
            if np.count_nonzero(mine):
                self._extend(which, frames[mine])

    def _pack(self, which: int, room: int) -> None:
        """Drop the stale entries of a log; grow it if half of what is left is still in the way."""
        log = self._logs[which]
        valid = self._valid(which, log.head, log.tail)
        size = len(log.entries)
        while len(valid) + room > size // 2:
            size *= 2
        if size != len(log.entries):
            log.entries = np.zeros(size, np.uint32)
            log.slots = log.entries.data
        self._drained[which] -= log.tail - len(valid)
        log.entries[: len(valid)] = valid
        self._positions[valid] = np.arange(len(valid), dtype=np.uint32)
        log.head, log.tail = 0, len(valid)

    def _valid(self, which: int, low: int, high: int) -> npt.NDArray[np.uint32]:
        found = []
        flags, mask = np.uint64(_FLAGS[which]), np.uint64(_WHICH)
        for start in range(low, high, _STEP):
            entries = self._logs[which].entries[start : min(high, start + _STEP)].astype(np.int64)
            # Most stale entries are of pages that were freed: their flags say so.
            at = ((self._frames.words[entries] & mask) == flags).nonzero()[0]
            if len(at):
                entries = entries[at]
                found.append(entries[self._positions[entries] == at + start])
        if not found:
            return np.zeros(0, np.uint32)
        return np.concatenate(found).astype(np.uint32)

    def size(self, which: int) -> int:
        """How many pages are on a list, at most: stale entries are counted."""
        log = self._logs[which]
        return log.tail - log.head

    def pages(self, which: int) -> list[int]:
        """The frames on a list, oldest first; they stay there."""
        log = self._logs[which]
        found: list[int] = self._valid(which, log.head, log.tail).tolist()
        return found

    def take(self, which: int, wanted: int) -> list[int]:
        """Isolate up to `wanted` of the oldest frames of a list; `move` puts one back."""
        log = self._logs[which]
        taken: list[int] = []
        while len(taken) < wanted and log.head < log.tail:
            high = min(log.tail, log.head + wanted)
            found = self._valid(which, log.head, high)
            log.head = high
            taken += found.tolist()
        return taken
