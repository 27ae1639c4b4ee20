"""What a driver may ask of any address space.

A driver sees its primary MMU through this protocol alone, so that one driver serves the software
model, real process memory and somebody's own address space. Addresses and sizes are bytes unless a
name says pages; ranges are half-open. Plain functions never suspend and may be called from atomic
callbacks; coroutines may fault, and so may notify the very driver that called them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@attrs.define(slots=True)
class Translation:
    """One leaf of the primary page table, as it was when it was looked up.

    No reference to the frame is held: it is good until the next `invalidate_range_start` over
    `address`, and no longer. `generation` is the frame's stamp, by which the owner of the frames
    tells a stale translation from a live one that has the same number.
    """

    address: int
    """First byte that it maps, aligned to `size`."""
    frame: int
    """Page frame number of the first byte."""
    writable: bool
    """Whether the secondary MMU may write through it (I-PERM: never more than the primary)."""
    size: int
    """Bytes mapped: PAGE_SIZE, or PMD_SIZE for a huge page."""
    generation: int
    since: object = attrs.field(default=None, eq=False, repr=False)
    """By which the owner of the frames knows when it was looked up; for the text of an error."""


@attrs.define(slots=True)
class Translations:
    """The translations of a range as columns, absent pages left out, ascending.

    Each column is any sequence of integers; an address space that keeps its tables in arrays
    gives arrays, so that a driver that keeps its own in arrays can copy them in one step. A huge
    page appears as its small pages.
    """

    pages: Sequence[int]
    """Page numbers (address >> PAGE_SHIFT)."""
    frames: Sequence[int]
    """Page frame number of each."""
    writable: Sequence[int]
    """1 where the secondary MMU may write, else 0."""
    generations: Sequence[int]
    """Frame stamp of each."""

    def __len__(self) -> int:
        """How many pages of the range were present."""
        return len(self.pages)


@attrs.define(slots=True)
class Region:
    """One mapping of the address space (a vma): [start, end) in bytes."""

    start: int
    end: int
    readable: bool
    writable: bool


class Pin(Protocol):
    """Frames that stay where they are until `unpin` (FOLL_LONGTERM)."""

    @property
    def translations(self) -> Translations:
        """What is pinned."""
        ...


@runtime_checkable
class Primary(Protocol):
    """An address space as a driver sees it."""

    def translate(self, address: int) -> Translation | None:
        """The leaf that maps `address`, or None. Never suspends, never faults."""
        ...

    def translate_range(self, start: int, end: int) -> Translations:
        """What is present in [start, end). Never suspends, never faults."""
        ...

    async def fault_in(self, address: int, *, write: bool = False) -> Translation:
        """Make `address` present, writable if `write`, as the process's own access would.

        May suspend and may notify (a COW break does). What it returns may be stale by the time
        that it is seen: compare sequence counts under the driver's own lock before use (I-SEQ).
        Raises BadAddress where the process would get a signal.
        """
        ...

    async def fault_in_range(self, start: int, end: int, *, write: bool = False) -> Translations:
        """`fault_in` for every page of [start, end), all or error."""
        ...

    async def pin(self, start: int, end: int, *, write: bool = True) -> Pin:
        """Fault in [start, end) and hold its frames (pin_user_pages with FOLL_LONGTERM).

        A pinned frame is never freed or moved, yet it may stop being what the address maps:
        invalidations still come. Raises BadAddress like `fault_in`.
        """
        ...

    def unpin(self, pin: Pin) -> None:
        """Drop the references that `pin` took; once. Callable from atomic callbacks."""
        ...

    def read(self, translation: Translation, offset: int, size: int) -> bytes:
        """Bytes of the mapped frame, read as a device does: by frame, not by address.

        `offset` counts from the translation's first byte; offset + size <= its size. Raises
        StaleTranslation when the frame was freed since (I-FREE broken).
        """
        ...

    def write(self, translation: Translation, offset: int, data: bytes) -> None:
        """Store through the translation. Raises like `read`; PermissionError if not writable."""
        ...

    def set_dirty(self, start: int, end: int, mask: Sequence[int] | None = None) -> None:
        """Hand dirty bits over before a mapping is dropped (I-DIRTY); set_page_dirty.

        `mask` has one integer per page of [start, end), 0 for clean; None means all dirty.
        """
        ...

    def mark_young(self, start: int, end: int) -> None:
        """Tell reclaim that the device has used these pages (mark_page_accessed)."""
        ...

    def regions(self, start: int, end: int) -> Iterator[Region]:
        """The mappings that meet [start, end), ascending. A lock-free look: a hint."""
        ...

    def tryget(self) -> bool:
        """Take a reference on the address space unless it is exiting (mmget_not_zero)."""
        ...

    async def put(self) -> None:
        """Give a `tryget` reference back; the last one tears the address space down (mmput)."""
        ...
