"""Page frames: one packed 64-bit word each, a stack of free ones, and who maps them.

    63      48 47      32 31       16 15        0
    generation    flags     mapcount   refcount

The word is a numpy array for range work and a memoryview of the same memory for one page, because
numpy scalars cost five times as much. A freed frame is reused at once (the free list is a stack);
its generation is bumped when it is freed, so that who kept a translation is found out when it is
used. `rmap` holds the owner's number (an anon_vma or a file) and the page index within it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    U64 = npt.NDArray[np.uint64]
    U32 = npt.NDArray[np.uint32]
    Indices = npt.NDArray[np.int64] | npt.NDArray[np.uint32]

REF_ONE: Final = 1
REF_MASK: Final = 0xFFFF
MAP_SHIFT: Final = 16
MAP_ONE: Final = 1 << MAP_SHIFT
MAP_MASK: Final = 0xFFFF << MAP_SHIFT
COUNTS_MASK: Final = REF_MASK | MAP_MASK
MAPPED_ONCE: Final = REF_ONE | MAP_ONE
GEN_SHIFT: Final = 48
GEN_ONE: Final = 1 << GEN_SHIFT
GEN_MASK: Final = 0xFFFF << GEN_SHIFT
WORD_MASK: Final = (1 << 64) - 1

PG_ANON: Final = 1 << 32
"""The owner is an anon_vma, not a file."""
PG_EXCLUSIVE: Final = 1 << 33
"""PageAnonExclusive: its only mapping may write without a copy."""
PG_DIRTY: Final = 1 << 34
PG_LRU: Final = 1 << 35
PG_ACTIVE: Final = 1 << 36
PG_REFERENCED: Final = 1 << 37
PG_SWAPBACKED: Final = 1 << 38
"""Cleared by MADV_FREE: the page may be dropped instead of swapped out."""
PG_SWAPCACHE: Final = 1 << 39
PG_KSM: Final = 1 << 40
PG_MLOCKED: Final = 1 << 41
PG_PINNED: Final = 1 << 42
"""FOLL_LONGTERM: `pins` counts them."""
PG_READAHEAD: Final = 1 << 43
PG_HUGE: Final = 1 << 44
"""Part of a folio of 512 frames."""
PG_PAGECACHE: Final = 1 << 45
PG_UNEVICTABLE: Final = 1 << 46
PG_LARGE: Final = 1 << 47
"""Part of a file's folio of several frames."""

OWNER_SHIFT: Final = 40
INDEX_MASK: Final = (1 << OWNER_SHIFT) - 1
HUGE_NR: Final = 512


class Frames:
    """The frames of one machine. Counts are pages; nothing here suspends."""

    def __init__(self, count: int, *, contents: bool) -> None:
        self.count: Final = count
        self.words: Final[U64] = np.zeros(count, np.uint64)
        self.word: Final[Any] = self.words.data
        self.rmaps: Final[U64] = np.zeros(count, np.uint64)
        self.rmap: Final[Any] = self.rmaps.data
        self._stack: Final[U32] = np.zeros(count, np.uint32)
        self._slot: Final[Any] = self._stack.data
        self._top = 0
        # [_fresh, _limit) was never used: small frames come from below, huge ones from above.
        self._fresh = 0
        self._limit = count
        self._huge: Final[list[int]] = []
        self.free = count
        """Frames that can be allocated; a plain attribute, which every allocation tests."""
        self.data: Final[dict[int, bytearray] | None] = {} if contents else None
        """Contents of the frames that are not all zeros, if the machine keeps contents."""
        self.pins: Final[dict[int, int]] = {}
        self.on_free: Callable[[int], object] | None = None
        """Called with each frame that is about to be freed, if somebody checks."""
        self.on_drop: Callable[[int], object] | None = None
        """Called with each page that goes as its contents are elsewhere, if somebody checks."""
        self.leaked = 0
        """Frames that a failed driver may still use: never freed."""

    @property
    def used(self) -> int:
        """Frames that are allocated."""
        return self.count - self.free

    def label(self, frame: int) -> tuple[int, int]:
        """The frame and its generation: what tells it from its earlier lives."""
        return frame, self.word[frame] >> GEN_SHIFT

    def alloc(self) -> int:
        """One frame, its word zero but for the generation, or -1."""
        top = self._top
        if top:
            self._top = top - 1
            self.free -= 1
            frame: int = self._slot[top - 1]
            return frame
        frame = self._fresh
        if frame < self._limit:
            self._fresh = frame + 1
            self.free -= 1
            return frame
        if self._huge:
            self._break_huge()
            return self.alloc()
        return -1

    def alloc_many(self, wanted: int) -> U32:
        """Up to `wanted` frames: the most recently freed first, then ascending unused ones."""
        if self._huge and self.free - HUGE_NR * len(self._huge) < wanted:
            self._break_huge()
        top = self._top
        again = min(wanted, top)
        self._top = top - again
        self.free -= again
        reused = self._stack[top - again : top][::-1]
        unused = min(wanted - again, self._limit - self._fresh)
        if not unused:
            return reused.copy()
        first = self._fresh
        self._fresh = first + unused
        self.free -= unused
        fresh = np.arange(first, first + unused, dtype=np.uint32)
        return np.concatenate((reused, fresh)) if again else fresh

    def alloc_high(self, above: int, wanted: int) -> list[int]:
        """Up to `wanted` frames that were used before: the highest free ones above `above`."""
        stack = self._stack[: self._top]
        high = np.sort(stack[stack > above])[::-1][:wanted]
        rest = stack[~np.isin(stack, high)]
        self._stack[: len(rest)] = rest
        self._top = len(rest)
        self.free -= len(high)
        found: list[int] = high.tolist()
        return found

    def alloc_huge(self) -> int:
        """The first of 512 aligned frames, or -1 if memory is too fragmented."""
        head = self._take_huge()
        if head >= 0:
            self.free -= HUGE_NR
        return head

    def _take_huge(self) -> int:
        if self._huge:
            return self._huge.pop()
        head = (self._limit // HUGE_NR - 1) * HUGE_NR
        if head >= self._fresh:
            for frame in range(head + HUGE_NR, self._limit):
                self._push(frame)
                self.free -= 1
            self._limit = head
            return head
        stack = self._stack[: self._top]
        whole = np.flatnonzero(np.bincount(stack // HUGE_NR) == HUGE_NR)
        if not len(whole):
            return -1
        block = int(whole[-1])
        rest = stack[stack // HUGE_NR != block]
        self._stack[: len(rest)] = rest
        self._top = len(rest)
        return block * HUGE_NR

    def _break_huge(self) -> None:
        head = self._huge.pop()
        self._stack[self._top : self._top + HUGE_NR] = np.arange(
            head + HUGE_NR - 1, head - 1, -1, dtype=np.uint32
        )
        self._top += HUGE_NR

    def _push(self, frame: int) -> None:
        self._slot[self._top] = frame
        self._top += 1
        self.free += 1

    def get(self, frame: int) -> None:
        """Take a reference."""
        self.word[frame] += REF_ONE

    def put(self, frame: int) -> None:
        """Drop a reference; the last one frees the frame, which can be reused at once."""
        word = self.word[frame] - REF_ONE
        if word & REF_MASK:
            self.word[frame] = word
        else:
            self.free_one(frame, word)

    def give_back(self, frame: int) -> None:
        """Free a frame that was allocated and never used."""
        self.free_one(frame, self.word[frame])

    def free_one(self, frame: int, word: int) -> None:
        """Free a frame, whose word was `word`."""
        if self.on_free is not None:
            self.on_free(frame)
        self.word[frame] = ((word & GEN_MASK) + GEN_ONE) & WORD_MASK
        if self.data is not None:
            self.data.pop(frame, None)
        top = self._top
        self._slot[top] = frame
        self._top = top + 1
        self.free += 1

    def put_many(self, frames: Indices) -> None:
        """Drop one reference of each of these distinct frames."""
        words = self.words[frames] - np.uint64(REF_ONE)
        alive = (words & np.uint64(REF_MASK)) != 0
        if np.count_nonzero(alive):
            self.words[frames[alive]] = words[alive]
            frames = frames[~alive]
            words = words[~alive]
        self.free_many(frames, words)

    def free_many(self, frames: Indices, words: U64) -> None:
        """Free these distinct frames, whose words were `words`."""
        if self.on_free is not None:
            for frame in frames.tolist():
                self.on_free(frame)
        self.words[frames] = (words & np.uint64(GEN_MASK)) + np.uint64(GEN_ONE)
        if self.data is not None:
            for frame in frames.tolist():
                self.data.pop(frame, None)
        count = len(frames)
        # Reversed, so that the next allocation gets them in the order in which they were freed.
        self._stack[self._top : self._top + count] = frames[::-1]
        self._top += count
        self.free += count

    def set_owner(self, frame: int, owner: int, index: int) -> None:
        """Say whose page `index` this frame is; `owner` is a number of `rmap.Owners`."""
        self.rmap[frame] = owner << OWNER_SHIFT | index

    def copy(self, source: int, target: int) -> None:
        """Copy the contents, if the machine keeps any (copy_user_highpage)."""
        if self.data is not None and source in self.data:
            self.data[target] = bytearray(self.data[source])

    def pin(self, frame: int) -> None:
        """A long-term pin and its reference."""
        self.pins[frame] = self.pins.get(frame, 0) + 1
        self.word[frame] = self.word[frame] + REF_ONE | PG_PINNED

    def unpin(self, frame: int) -> None:
        """Drop one `pin`."""
        left = self.pins[frame] - 1
        if left:
            self.pins[frame] = left
        else:
            del self.pins[frame]
            self.word[frame] &= ~PG_PINNED
        self.put(frame)
