"""Dirty logging: which pages the guest has written, by a bitmap per slot or a ring per vCPU.

Who wants to know write-protects what it has been told, so that the next write is noted again.
Source: virt/kvm/dirty_ring.c, kvm_get_dirty_log_protect.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

RESERVED: Final = 64
"""Entries that a ring keeps free for what one exit may still add (KVM_DIRTY_RING_RSVD_ENTRIES)."""


class DirtyBitmap:
    """One flag per page of a slot."""

    __slots__ = ("_flag", "_flags")

    def __init__(self, pages: int, *, all_set: bool = False) -> None:
        self._flags: npt.NDArray[np.bool_] = (np.ones if all_set else np.zeros)(pages, np.bool_)
        self._flag: Any = self._flags.view(np.uint8).data

    def set(self, page: int) -> bool:
        """Note a page; whether it was not noted before."""
        fresh = not self._flag[page]
        self._flag[page] = 1
        return fresh

    def pages(self, first: int = 0, last: int | None = None) -> npt.NDArray[np.int64]:
        """Those of [first, last) that are noted, ascending."""
        return np.flatnonzero(self._flags[first:last]) + first

    def clear(self, pages: npt.NDArray[np.int64]) -> None:
        """Forget some pages."""
        self._flags[pages] = False


@attrs.frozen
class DirtyGfn:
    """An entry of a ring: a page of a slot, counted from its first (struct kvm_dirty_gfn)."""

    slot: int
    page: int


class DirtyRing:
    """What one vCPU has written, in order; `size` entries at most, of which some are kept free."""

    __slots__ = ("_entries", "_harvested", "limit", "size")

    def __init__(self, size: int) -> None:
        self.size: Final = size
        self.limit: Final = size - RESERVED
        """Entries from which on the vCPU has to exit before it runs on."""
        self._entries: list[DirtyGfn] = []
        self._harvested: list[DirtyGfn] = []

    def __len__(self) -> int:
        """Entries that are taken: collected ones too, until the ring is reset."""
        return len(self._entries) + len(self._harvested)

    @property
    def soft_full(self) -> bool:
        """Whether the vCPU must exit."""
        return len(self) >= self.limit

    def push(self, slot: int, page: int) -> None:
        """Note a page."""
        assert len(self) < self.size, "a dirty ring is full: its vCPU did not exit in time"
        self._entries.append(DirtyGfn(slot, page))

    def collect(self) -> list[DirtyGfn]:
        """What was noted since the last time, oldest first; protected again by the reset."""
        collected, self._entries = self._entries, []
        self._harvested += collected
        return collected

    def reset(self) -> list[DirtyGfn]:
        """Free what was collected: what to write-protect now (kvm_dirty_ring_reset)."""
        harvested, self._harvested = self._harvested, []
        return harvested
