"""What a KVM guest does to its host's memory: which accesses the host has to serve.

As much of KVM as decides that: a shadow of what is mapped for the guest, dropped when the host
announces; writable whenever the host's page is; filled ahead of a fault with writable neighbours.
Recordings are checked with it unless a driver is named that offers a `GuestDriver`.

Source: arch/x86/kvm/mmu/mmu.c (kvm_tdp_page_fault, __direct_pte_prefetch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mmunotify.drivers import AtomicDriver
from mmunotify.ranges import PAGE_SHIFT, Range

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmunotify.primary import Primary, Translation

PREFETCH: Final = 8


class Guest(AtomicDriver):
    """A `GuestDriver`: one guest in one process."""

    def __init__(self) -> None:
        self._primary: Primary | None = None
        self._memory: int | None = None
        self._shadow: dict[int, Translation] = {}
        self._writable: set[int] = set()
        self._dirty: set[int] | None = None
        self._sequence = 0
        self._fault: Callable[[int, bool], object] = _ignore
        self._mapped: Callable[[int, bool, bool], object] = _ignore
        self._devices: set[int] = set()

    def attach(self, primary: Primary | None) -> None:
        """Learn what to translate with."""
        self._primary = primary

    def invalidate_range_start(self, rng: Range) -> None:
        """Forget what is mapped in the range."""
        for page in [page for page in self._shadow if rng.overlaps(*self._span(page))]:
            del self._shadow[page]
            self._writable.discard(page)

    def invalidate_range_end(self, rng: Range) -> None:
        """A fault that was being served when the range was announced is served again."""
        self._sequence += 1

    def record(
        self, fault: Callable[[int, bool], object], mapped: Callable[[int, bool, bool], object]
    ) -> None:
        """See `GuestDriver`."""
        self._fault, self._mapped = fault, mapped

    async def set_memory(self, address: int | None, size: int) -> None:
        """See `GuestDriver`; there is no end of it."""
        self._shadow.clear()
        self._writable.clear()
        self._devices.clear()
        self._memory = address

    async def log_dirty(self, on: bool) -> None:
        """See `GuestDriver`."""
        self._dirty = set() if on else None
        if on:
            self._writable.clear()

    async def dirty_log(self) -> list[int] | None:
        """See `GuestDriver`."""
        if self._dirty is None:
            return None
        dirty = sorted(self._dirty)
        self._dirty.clear()
        self._writable.difference_update(dirty)
        return dirty

    async def load(self, address: int) -> int | None:
        """See `GuestDriver`."""
        translation = await self._translate(address >> PAGE_SHIFT, write=False)
        if translation is None:
            return None
        assert self._primary is not None
        return self._primary.read(translation, self._offset(address, translation), 1)[0]

    async def store(self, address: int, value: int) -> bool:
        """See `GuestDriver`."""
        translation = await self._translate(address >> PAGE_SHIFT, write=True)
        if translation is None:
            return False
        assert self._primary is not None
        self._primary.write(translation, self._offset(address, translation), bytes([value]))
        return True

    async def _translate(self, page: int, *, write: bool) -> Translation | None:
        primary = self._primary
        if self._memory is None:
            if page not in self._devices:
                self._devices.add(page)
                self._fault(page, write)
            return None
        assert primary is not None
        while True:
            translation = self._shadow.get(page)
            if translation is not None and (not write or page in self._writable):
                return translation
            self._fault(page, write)
            sequence = self._sequence
            translation = await primary.fault_in(self._span(page)[0], write=write)
            if sequence != self._sequence:
                continue
            primary.mark_young(*self._span(page))
            self._map(page, translation, prefetched=False)
            if self._dirty is None:
                self._prefetch(page)

    def _map(self, page: int, translation: Translation, *, prefetched: bool) -> None:
        assert self._primary is not None
        self._shadow[page] = translation
        self._mapped(page, translation.writable, prefetched)
        if translation.writable:
            self._writable.add(page)
            self._primary.set_dirty(*self._span(page))
            if self._dirty is not None:
                self._dirty.add(page)

    def _prefetch(self, page: int) -> None:
        """Map the unmapped runs of the aligned 8 pages around, as far as the host can write them.

        A run whose first page it cannot ends the whole attempt.
        """
        assert self._primary is not None
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
                    self._map(wanted, translation, prefetched=True)
                start = None

    def _span(self, page: int) -> tuple[int, int]:
        start = (self._memory or 0) + (page << PAGE_SHIFT)
        return start, start + (1 << PAGE_SHIFT)

    def _offset(self, address: int, translation: Translation) -> int:
        return (self._memory or 0) + address - translation.address


def _ignore(*told: object) -> None:
    """Nobody records."""
