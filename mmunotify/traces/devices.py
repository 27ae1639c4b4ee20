"""A device with a translation cache, in the three colours: what designs are compared with.

It does what every secondary MMU must and nothing more: it looks a page up, keeps the translation,
drops it when it is told to, and begins again when an invalidation overtook its lookup (I-SEQ,
I-NOEST). What is real about the plugins (shadow page tables, chiplets, importers) is theirs.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio.lowlevel

from mmunotify import PAGE_SHIFT, AtomicDriver, DeferredDriver, SleepableDriver

if TYPE_CHECKING:
    from mmunotify import Primary, Range


class _Tlb:
    """Translations by page, and the invalidations that keep lookups out."""

    def __init__(self) -> None:
        self.counters: Final[Counter[str]] = Counter()
        """See `mmunotify.Device`."""
        self._writable: Final[dict[int, bool]] = {}
        self._dropped: Final[set[int]] = set()
        self._open: Final[list[tuple[int, int]]] = []
        self._sequence = 0
        self._primary: Primary | None = None

    def attach(self, primary: Primary | None) -> None:
        """Learn what to translate with."""
        self._primary = primary

    def access(self, address: int, *, write: bool = False) -> bool:
        """Whether there is a translation that allows this."""
        writable = self._writable.get(address >> PAGE_SHIFT)
        return writable is not None and (writable or not write)

    async def fault(self, address: int, *, write: bool = False) -> None:
        """Look the page up and keep its translation; again if an invalidation came in between."""
        primary = self._primary
        assert primary is not None
        page = address >> PAGE_SHIFT
        while True:
            sequence = self._sequence
            await primary.fault_in(address, write=write)
            # No await from here on: what the lookup says now holds when it is installed.
            found = primary.translate(address)
            if found is not None and sequence == self._sequence and not self._closed(page):
                break
            self.counters["retries"] += 1
            await anyio.lowlevel.checkpoint()
        self._writable[page] = found.writable
        self.counters["installed"] += 1
        if page in self._dropped:
            self._dropped.discard(page)
            self.counters["refaults"] += 1

    async def release(self) -> None:
        """Drop everything."""
        self._writable.clear()

    def _closed(self, page: int) -> bool:
        return any(first <= page < last for first, last in self._open)

    def _begin(self, rng: Range) -> None:
        self._open.append((rng.start >> PAGE_SHIFT, rng.end >> PAGE_SHIFT))

    def _end(self, rng: Range) -> None:
        self._sequence += 1
        self._open.remove((rng.start >> PAGE_SHIFT, rng.end >> PAGE_SHIFT))

    def _flush(self, rng: Range) -> None:
        pages = range(rng.start >> PAGE_SHIFT, rng.end >> PAGE_SHIFT)
        table = self._writable
        if len(pages) <= len(table):
            found = [page for page in pages if page in table]
        else:
            found = [page for page in table if page in pages]
        if found:
            for page in found:
                del table[page]
            self._dropped.update(found)
            self.counters["flushes"] += 1
            self.counters["mapped"] += len(found)


class AtomicTlb(_Tlb, AtomicDriver):
    """Flushes at once."""

    def invalidate_range_start(self, rng: Range) -> None:
        """Drop the range; no lookup in it succeeds before the end."""
        self._begin(rng)
        self._flush(rng)

    def invalidate_range_end(self, rng: Range) -> None:
        """Let lookups in again."""
        self._end(rng)


class SleepableTlb(_Tlb, SleepableDriver):
    """Flushes in a coroutine, as who has to wait for a device does."""

    async def invalidate_range_start(self, rng: Range) -> None:
        """Drop the range; no lookup in it succeeds before the end."""
        self._begin(rng)
        self._flush(rng)

    async def invalidate_range_end(self, rng: Range) -> None:
        """Let lookups in again."""
        self._end(rng)


class DeferredTlb(_Tlb, DeferredDriver):
    """Marks under the locks; flushes when they are dropped. In between, the device goes on."""

    def invalidate_range(self, rng: Range) -> None:
        """Keep lookups out of the range; its translations stay until the sync."""
        self._begin(rng)

    async def invalidate_range_sync(self, rng: Range) -> None:
        """Drop what was marked, and let lookups in again."""
        self._flush(rng)
        self._end(rng)


Tlb: TypeAlias = AtomicTlb | SleepableTlb | DeferredTlb
TLBS: Final[dict[str, type[Tlb]]] = {
    "atomic": AtomicTlb,
    "sleepable": SleepableTlb,
    "deferred": DeferredTlb,
}
"""By the name that `--driver` takes."""
