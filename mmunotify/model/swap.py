"""Swap: slots counted by the entries that hold them, and the swap cache.

A slot lives while an entry or the cache holds it. The device is synchronous (zram): a page whose
slot nobody shares is read past the cache, a shared one through it and with its neighbours.

Source: mm/swapfile.c, mm/swap_state.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from . import frames as fr

if TYPE_CHECKING:
    import numpy.typing as npt

    from .frames import Frames
    from .vma import Vma

_MAX_WINDOW: Final = 8
_HITS_MAX: Final = 63


class Swap:
    """The swap device of one machine. Sizes are pages; nothing here suspends."""

    def __init__(self, count: int, frames: Frames) -> None:
        self.count: Final = count
        self.frames: Final = frames
        self._counts: Final[npt.NDArray[np.uint16]] = np.zeros(count, np.uint16)
        self._uses: Final[Any] = self._counts.data
        self._stack: Final[npt.NDArray[np.uint32]] = np.arange(count - 1, -1, -1, dtype=np.uint32)
        self._slots: Final[Any] = self._stack.data
        self.free = count
        """Slots that can be allocated; a plain attribute, which reclaim tests for every page."""
        self.cache: Final[dict[int, int]] = {}
        """Slot to the frame that has its contents (the swap cache)."""
        self.slot_of: Final[dict[int, int]] = {}
        """Frame to its slot, the other way round."""
        self.data: Final[dict[int, bytearray]] = {}

    @property
    def used(self) -> int:
        """Slots that hold something."""
        return self.count - self.free

    def uses(self, slot: int) -> int:
        """How many entries hold a slot; the cache is not counted."""
        uses: int = self._uses[slot]
        return uses

    def dup(self, slot: int) -> None:
        """One more entry holds the slot (swap_duplicate)."""
        self._uses[slot] += 1

    def dup_many(self, slots: npt.NDArray[np.int64]) -> None:
        """`dup` of distinct slots."""
        self._counts[slots] += np.uint16(1)

    def drop(self, slot: int) -> None:
        """One entry less; the last one frees the slot unless the cache has it (swap_free)."""
        left = self._uses[slot] - 1
        self._uses[slot] = left
        if not left and slot not in self.cache:
            self._release(slot)

    def drop_unmapped(self, slot: int) -> None:
        """`drop` of what was zapped: a cached page that nobody needs any more goes, too."""
        left = self._uses[slot] - 1
        self._uses[slot] = left
        if not left:
            if slot in self.cache:
                self.reclaim_unmapped(slot)
            else:
                self._release(slot)

    def drop_many(self, slots: npt.NDArray[np.int64]) -> None:
        """`drop_unmapped` of distinct slots."""
        counts = self._counts[slots] - np.uint16(1)
        self._counts[slots] = counts
        gone = slots[counts == 0]
        if self.cache:
            cached = [slot for slot in gone.tolist() if slot in self.cache]
            if cached:
                for slot in cached:
                    self.reclaim_unmapped(slot)
                gone = gone[~np.isin(gone, cached)]
        if self.data:
            for slot in gone.tolist():
                self.data.pop(slot, None)
        self._stack[self.free : self.free + len(gone)] = gone[::-1]
        self.free += len(gone)

    def _release(self, slot: int) -> None:
        self.data.pop(slot, None)
        self._slots[self.free] = slot
        self.free += 1

    def swap_out(self, frame: int) -> int:
        """A slot with what is in a frame, held by one entry; there must be a free one."""
        self.free = top = self.free - 1
        slot: int = self._slots[top]
        self._uses[slot] = 1
        if self.frames.data is not None:
            self.write(frame, slot)
        return slot

    def swap_in(self, slot: int, frame: int) -> None:
        """Read a slot that one entry holds, and not the cache, into a fresh frame, and free it."""
        if self.data:
            self.read(slot, frame)
            self.data.pop(slot, None)
        self._uses[slot] = 0
        self._slots[self.free] = slot
        self.free += 1

    def alloc(self) -> int:
        """A slot that nobody holds yet, or -1."""
        if not self.free:
            return -1
        self.free -= 1
        slot: int = self._slots[self.free]
        return slot

    # ------------------------------------------------------------------ the swap cache

    def add_to_cache(self, frame: int, slot: int) -> None:
        """The frame has the slot's contents; the cache takes a reference."""
        self.cache[slot] = frame
        self.slot_of[frame] = slot
        self.frames.word[frame] = self.frames.word[frame] + fr.REF_ONE | fr.PG_SWAPCACHE

    def delete_from_cache(self, frame: int) -> None:
        """Forget that the frame has a slot's contents; frees the slot if no entry holds it."""
        slot = self.slot_of.pop(frame)
        del self.cache[slot]
        self.frames.word[frame] &= ~(fr.PG_SWAPCACHE | fr.PG_READAHEAD)
        self.frames.put(frame)
        if not self._uses[slot]:
            self._release(slot)

    def reclaim_unmapped(self, slot: int) -> None:
        """No entry holds a cached slot any more: drop the page unless it is mapped."""
        frame = self.cache.get(slot, -1)
        if frame >= 0 and not self.frames.word[frame] & fr.MAP_MASK:
            self.try_free(frame)

    def try_free(self, frame: int) -> bool:
        """Take a page out of the cache if no entry needs its slot (folio_free_swap)."""
        if self._uses[self.slot_of[frame]]:
            return False
        self.frames.word[frame] |= fr.PG_DIRTY
        self.delete_from_cache(frame)
        return True

    def write(self, frame: int, slot: int) -> None:
        """Write a page out (swap_writeout)."""
        data = self.frames.data
        if data is not None:
            contents = data.get(frame)
            if contents is None:
                self.data.pop(slot, None)
            else:
                self.data[slot] = bytearray(contents)
        self.frames.word[frame] &= ~fr.PG_DIRTY

    def read(self, slot: int, frame: int) -> None:
        """Read a slot into a fresh frame."""
        data = self.frames.data
        if data is not None and slot in self.data:
            data[frame] = bytearray(self.data[slot])

    # ------------------------------------------------------------------ readahead

    def hit(self, vma: Vma, page: int, frame: int) -> None:
        """A fault found its page in the cache: count whether readahead was why."""
        word = self.frames.word
        _, window, hits = vma.swap_ra
        if word[frame] & fr.PG_READAHEAD:
            word[frame] &= ~fr.PG_READAHEAD
            hits = min(hits + 1, _HITS_MAX)
        vma.swap_ra = (page, window, hits)

    def window(self, vma: Vma, page: int) -> tuple[int, int]:
        """The pages [first, last) worth reading for a fault at `page` (swap_vma_ra_win)."""
        before, previous, hits = vma.swap_ra
        wanted = hits + 2
        if wanted == 2:
            if page not in (before + 1, before - 1):
                wanted = 1
        else:
            wanted = max(4, 1 << (wanted - 1).bit_length())
        size = max(min(wanted, _MAX_WINDOW), previous // 2)
        vma.swap_ra = (page, size, 0)
        if size == 1:
            return page, page + 1
        if page == before + 1:
            first, last = page, page + size
        elif before == page + 1:
            first, last = page - size + 1, page + 1
        else:
            left = (size - 1) // 2
            first, last = page - left, page + size - left
        table = page & ~511
        return max(first, vma.first, table), min(last, vma.last, table + 512)
