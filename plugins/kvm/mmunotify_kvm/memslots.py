"""Memslots: which guest physical pages are which host virtual ones.

There are two sets of them, which take turns: the one that is in use is read under SRCU, the other
is brought up to date, then they change places. Page numbers of the guest are gfns.
Source: struct kvm_memslots, virt/kvm/kvm_main.c.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

import attrs

from mmunotify import ADDRESS_END, PAGE_SHIFT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .dirty import DirtyBitmap
    from .tables import SpteTable

LOG_DIRTY_PAGES: Final = 1 << 0
READONLY: Final = 1 << 1
INVALID: Final = 1 << 16
"""Internal: on its way out. Faults wait; nothing new is mapped."""
VALID_FLAGS: Final = LOG_DIRTY_PAGES | READONLY
MAX_SLOTS: Final = (1 << 15) - 1 - 3
"""KVM_USER_MEM_SLOTS of x86."""
MAX_PAGES: Final = (1 << 31) - 1
"""KVM_MEM_MAX_NR_PAGES."""


@attrs.frozen(eq=False)
class MemorySlot:
    """One range of guest memory. A change of flags makes another object with the same table."""

    id: int
    base: int
    """Its first gfn."""
    pages: int
    hva: int
    """The host's address of the first page, in bytes."""
    flags: int
    table: SpteTable
    dirty: DirtyBitmap | None
    """Which pages were written; None without LOG_DIRTY_PAGES, or where rings log."""

    end: int = attrs.field(init=False)
    """The gfn after its last one."""
    hva_end: int = attrs.field(init=False)
    """The host's address after its last byte."""

    @end.default
    def _end(self) -> int:
        return self.base + self.pages

    @hva_end.default
    def _hva_end(self) -> int:
        return self.hva + (self.pages << PAGE_SHIFT)

    def address(self, gfn: int) -> int:
        """The host's address of a page of it."""
        return self.hva + ((gfn - self.base) << PAGE_SHIFT)


class Memslots:
    """One set of memslots, ordered by gfn and by host address; `generation` counts updates."""

    def __init__(self) -> None:
        self.generation = 0
        self.by_id: Final[dict[int, MemorySlot]] = {}
        self._bases: Final[list[int]] = []
        self._by_base: Final[list[MemorySlot]] = []
        self._hvas: Final[list[int]] = []
        self._by_hva: Final[list[MemorySlot]] = []
        self._longest = 0
        """No slot is longer, in bytes: how far before an address one may begin that covers it."""

    def __len__(self) -> int:
        return len(self.by_id)

    def __iter__(self) -> Iterator[MemorySlot]:
        """Ascending by gfn."""
        return iter(self._by_base)

    def find(self, gfn: int) -> MemorySlot | None:
        """The slot that a gfn is in."""
        at = bisect_right(self._bases, gfn) - 1
        if at >= 0:
            slot = self._by_base[at]
            if gfn < slot.end:
                return slot
        return None

    def overlapping(self, start: int, end: int) -> Sequence[MemorySlot]:
        """The slots whose host memory meets [start, end) in bytes, ascending."""
        hvas = self._hvas
        last = bisect_left(hvas, end)
        if not last:
            return ()
        first = bisect_left(hvas, start - self._longest, 0, last)
        if first == last - 1:
            slot = self._by_hva[first]
            return (slot,) if slot.hva_end > start else ()
        return [slot for slot in self._by_hva[first:last] if slot.hva_end > start]

    def meeting(self, base: int, end: int, *, but: int) -> MemorySlot | None:
        """A slot with a gfn in [base, end), other than that of one id."""
        at = bisect_left(self._bases, end) - 1
        while at >= 0 and self._by_base[at].end > base:
            if self._by_base[at].id != but:
                return self._by_base[at]
            at -= 1
        return None

    def neighbours(self, address: int) -> tuple[int, int]:
        """The end of the last slot before a host address, and the start of the next; 0 or 2**64.

        Only where slots do not share host memory.
        """
        at = bisect_right(self._hvas, address)
        before = self._by_hva[at - 1].hva_end if at else 0
        after = self._hvas[at] if at < len(self._hvas) else ADDRESS_END
        return before, after

    def replace(self, old: MemorySlot | None, new: MemorySlot | None) -> None:
        """Take one out and put another one in (kvm_replace_memslot)."""
        if old is not None:
            del self.by_id[old.id]
            at = bisect_left(self._bases, old.base)
            del self._bases[at], self._by_base[at]
            at = bisect_left(self._hvas, old.hva)
            while self._by_hva[at].id != old.id:
                at += 1
            del self._hvas[at], self._by_hva[at]
        if new is not None:
            self.by_id[new.id] = new
            at = bisect_left(self._bases, new.base)
            self._bases.insert(at, new.base)
            self._by_base.insert(at, new)
            at = bisect_left(self._hvas, new.hva)
            self._hvas.insert(at, new.hva)
            self._by_hva.insert(at, new)
            self._longest = max(self._longest, new.pages << PAGE_SHIFT)
