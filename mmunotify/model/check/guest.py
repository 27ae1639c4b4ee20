"""What a KVM guest does to its host's memory: which accesses the host has to serve.

As much of KVM as decides that: a shadow of what is mapped for the guest, dropped when the host
announces; writable whenever the host's page is; filled ahead of a fault with writable neighbours.
Pages are the guest's own unless they are called the host's.

Source: arch/x86/kvm/mmu/mmu.c (kvm_tdp_page_fault, __direct_pte_prefetch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mmunotify.drivers import AtomicDriver
from mmunotify.errors import BadAddress
from mmunotify.ranges import PAGE_SHIFT, Range

from .observe import BASE, group

if TYPE_CHECKING:
    from mmunotify.model.mm import AddressSpace
    from mmunotify.primary import Translation

PREFETCH: Final = 8


class Guest(AtomicDriver):
    """One guest in one process, whose memory is the area from the page of its slot on."""

    def __init__(self, mm: AddressSpace[Any]) -> None:
        self._primary = mm.primary
        self._slot: int | None = 0
        self._shadow: dict[int, Translation] = {}
        self._writable: set[int] = set()
        self._dirty: set[int] | None = None

    def invalidate_range_start(self, rng: Range) -> None:
        """Forget what is mapped in the range."""
        for page in [page for page in self._shadow if rng.overlaps(*self._span(page))]:
            del self._shadow[page]
            self._writable.discard(page)

    def set_slot(self, slot: int | None) -> None:
        """Let the guest's memory begin at another page of the host, or take it away."""
        self._shadow.clear()
        self._writable.clear()
        self._slot = slot

    def log_dirty(self, on: bool) -> None:
        """Start or stop logging which pages are written."""
        self._dirty = set() if on else None
        self._writable.clear()

    def dirty_log(self) -> list[list[int]] | None:
        """[first, count] of the pages written since the last call; None when nothing is logged."""
        if self._dirty is None:
            return None
        dirty = [[first, count] for first, count, _ in group(dict.fromkeys(self._dirty, ""))]
        self._dirty.clear()
        self._writable.clear()
        return dirty

    async def read(self, page: int) -> int:
        """The first byte of a page; BadAddress where the host cannot supply it."""
        translation = await self._translate(page, write=False)
        return self._primary.read(translation, self._offset(page, translation), 1)[0]

    async def write(self, page: int, value: int) -> None:
        """Write the first byte of a page; errors as for `read`."""
        translation = await self._translate(page, write=True)
        self._primary.write(translation, self._offset(page, translation), bytes([value]))
        if self._dirty is not None:
            self._dirty.add(page)

    @property
    def absent(self) -> bool:
        """Whether the guest has no memory: an access is one to a device."""
        return self._slot is None

    async def _translate(self, page: int, *, write: bool) -> Translation:
        translation = self._shadow.get(page)
        if translation is not None and (not write or page in self._writable):
            return translation
        start, end = self._span(page)
        translation = await self._primary.fault_in(start, write=write)
        self._primary.mark_young(start, end)
        self._map(page, translation, writable=write or self._dirty is None)
        if self._dirty is None:
            self._prefetch(page)
        return translation

    def _map(self, page: int, translation: Translation, *, writable: bool) -> None:
        self._shadow[page] = translation
        if translation.writable and writable:
            self._writable.add(page)
            self._primary.set_dirty(*self._span(page))

    def _prefetch(self, page: int) -> None:
        """Map the unmapped runs of the aligned 8 pages around, as far as the host can write them.

        A run whose first page it cannot ends the whole attempt.
        """
        first = page & -PREFETCH
        start: int | None = None
        for near in range(first, first + PREFETCH + 1):
            if near < first + PREFETCH and near not in self._shadow:
                start = near if start is None else start
            elif start is not None:
                for wanted in range(start, near):
                    translation = self._primary.translate(self._span(wanted)[0])
                    if translation is None or not translation.writable:
                        if wanted == start:
                            return
                        break
                    self._map(wanted, translation, writable=True)
                start = None

    def _span(self, page: int) -> tuple[int, int]:
        start = BASE + ((page + (self._slot or 0)) << PAGE_SHIFT)
        return start, start + (1 << PAGE_SHIFT)

    def _offset(self, page: int, translation: Translation) -> int:
        return self._span(page)[0] - translation.address


async def touch(guest: Guest, at: int, count: int, value: int | None) -> list[Any]:
    """Read (or write, if given a value) the first byte of each page: values, or why not."""
    seen: list[Any] = []
    for page in range(at, at + count):
        if guest.absent:
            seen.append("MMIO")
            continue
        try:
            if value is None:
                seen.append(await guest.read(page))
            else:
                await guest.write(page, value)
                seen.append(0)
        except BadAddress:
            seen.append("EFAULT")
    return seen
