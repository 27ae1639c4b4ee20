"""What a KVM guest does to its host's memory: which accesses the host has to serve.

As much of KVM as decides that: a shadow of what is mapped for the guest, dropped when the host
announces. What KVM maps ahead of an access, and its own faults, are not modelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmunotify.drivers import AtomicDriver
from mmunotify.errors import BadAddress
from mmunotify.ranges import PAGE_SHIFT, Range

from .observe import BASE, group

if TYPE_CHECKING:
    from mmunotify.model.mm import AddressSpace
    from mmunotify.primary import Translation


class Guest(AtomicDriver):
    """One guest, whose memory is the area from the page of its slot on; pages are its own."""

    def __init__(self) -> None:
        self._slot: int | None = 0
        self._shadow: dict[int, Translation] = {}
        self._writable: set[int] = set()
        self._dirty: set[int] | None = None

    def invalidate_range_start(self, rng: Range) -> None:
        """Forget what is mapped in the range."""
        for page in [page for page in self._shadow if rng.overlaps(*_span(page))]:
            del self._shadow[page]
            self._writable.discard(page)

    def set_slot(self, slot: int | None) -> None:
        """Put the guest's memory elsewhere, or nowhere."""
        self._slot = slot
        self._shadow.clear()
        self._writable.clear()

    def log_dirty(self, on: bool) -> None:
        """Start or stop logging which pages are written."""
        self._dirty = set() if on else None
        self._writable.clear()

    def dirty_log(self) -> list[list[int]] | None:
        """[first, count] of the pages written since the last call; None when nothing is logged."""
        if self._dirty is None:
            return None
        dirty = [[first, count] for first, count, _ in group(dict.fromkeys(self._dirty, 0))]
        self._dirty.clear()
        self._writable.clear()
        return dirty

    async def read(self, mm: AddressSpace[Any], at: int, count: int) -> list[Any]:
        """The first byte of each of the guest's pages, or why it cannot be read."""
        values: list[Any] = []
        for page in range(at, at + count):
            if self._slot is None:
                values.append("MMIO")
                continue
            try:
                values.append(
                    mm.primary.read(await self._map(mm, page + self._slot, False), 0, 1)[0]
                )
            except BadAddress:
                values.append("EFAULT")
        return values

    async def write(
        self, mm: AddressSpace[Any], at: int, count: int, value: int
    ) -> list[list[Any]]:
        """Write the first byte of each page; [page, reason] of those that cannot be written."""
        bad: list[list[Any]] = []
        for page in range(at, at + count):
            if self._slot is None:
                bad.append([page, "MMIO"])
                continue
            try:
                translation = await self._map(mm, page + self._slot, True)
            except BadAddress:
                bad.append([page, "EFAULT"])
                continue
            mm.primary.write(translation, 0, bytes([value]))
            if self._dirty is not None:
                self._dirty.add(page)
        return bad

    async def _map(self, mm: AddressSpace[Any], page: int, write: bool) -> Translation:
        translation = self._shadow.get(page)
        if translation is not None and (not write or page in self._writable):
            return translation
        start, end = _span(page)
        translation = await mm.primary.fault_in(start, write=write)
        self._shadow[page] = translation
        if translation.writable and (write or self._dirty is None):
            self._writable.add(page)
        mm.primary.mark_young(start, end)
        if page in self._writable:
            mm.primary.set_dirty(start, end)
        return translation


def _span(page: int) -> tuple[int, int]:
    start = BASE + (page << PAGE_SHIFT)
    return start, start + (1 << PAGE_SHIFT)
